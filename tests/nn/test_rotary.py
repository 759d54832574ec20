"""Rotary position embeddings: Transformers' convention, relative positions, tables that belong to no module."""

import math

import pytest
import torch

from lion_hf.nn import rotary
from lion_hf.nn.local_attention import LocalMixer
from lion_hf.nn.rotary import apply_rotary
from lion_hf.nn.softmax import SoftmaxMixer


@pytest.mark.parametrize("theta", [10000.0, 160000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotates_as_modernbert_does(dtype, theta):
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    query, key = torch.randn(2, 2, 3, 700, 64, dtype=dtype)
    rates = 1.0 / (theta ** (torch.arange(0, 64, 2, dtype=torch.float) / 64))
    angles = (torch.arange(700).float()[:, None] * rates).repeat(1, 2)[None]
    expected = modernbert.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    found = apply_rotary(query, key, theta)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.01  # of one rounding
        torch.testing.assert_close(f, e, rtol=tolerance, atol=1e-5)


def test_products_depend_on_the_distance_only_and_lengths_are_kept():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 50, 8)
    rotated_query, rotated_key = apply_rotary(query, key, 100.0)
    scores = (rotated_query @ rotated_key.mT)[0, 0]
    for distance in (-20, -1, 0, 3):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-6
    torch.testing.assert_close(rotated_query.norm(dim=-1), query.norm(dim=-1))


def test_positions_start_from_0_in_each_packed_sequence():
    query, key = torch.randn(2, 1, 2, 12, 8, dtype=torch.float64)
    packed = apply_rotary(query, key, 100.0, torch.tensor([0, 5, 5, 12]))
    for start, stop in ((0, 5), (5, 12)):
        alone = apply_rotary(query[:, :, start:stop], key[:, :, start:stop], 100.0)
        for p, a in zip(packed, alone, strict=True):
            torch.testing.assert_close(p[:, :, start:stop], a, rtol=0, atol=0)


def test_float64_angles_are_exact_far_from_the_start():
    x = torch.zeros(1, 1, 9001, 4, dtype=torch.float64)
    x[..., 1] = 1
    y = apply_rotary(x, x, 10000.0)[0][0, 0, 9000]
    expected = [0, math.cos(9000 / 100), 0, math.sin(9000 / 100)]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_table_of_inference_serves_training():
    rotary._TABLES.clear()
    mixer, x = SoftmaxMixer(8, 1, rope_theta=100.0), torch.randn(1, 5, 8)
    with torch.inference_mode():
        expected = mixer(x)
    y = mixer(x)
    y.sum().backward()
    assert torch.equal(y, expected)


def test_tables_of_another_length_dtype_or_device_do_not_mix():
    rotary._TABLES.clear()
    results = {}
    for turn in range(2):
        for length in (300, 5, 400):
            for dtype in (torch.float32, torch.float64):
                x = torch.ones(1, 1, length, 8, dtype=dtype)
                found = apply_rotary(x, x, 100.0)[0]
                assert found.dtype == dtype and found.shape == x.shape
                expected = results.setdefault((length, dtype), found)
                assert turn == 0 or torch.equal(found, expected)
        x = torch.empty(1, 1, 5, 8, device="meta")
        assert apply_rotary(x, x, 100.0)[0].is_meta
    assert all(not table.is_meta for table in rotary._TABLES.values())
    torch.testing.assert_close(results[300, torch.float32][:, :, :5], results[5, torch.float32], rtol=0, atol=0)


def test_tables_do_not_pile_up():
    for i in range(100):
        x = torch.ones(1, 1, 3, 2)
        apply_rotary(x, x, 100.0 + i)
    assert len(rotary._TABLES) <= 32


@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
@pytest.mark.parametrize("theta", [0, -1.0, math.inf, math.nan, "10000", True])
def test_theta_is_a_positive_number(build, theta):
    with pytest.raises(ValueError, match="rope_theta is .*; it must be a positive number"):
        build(8, 2, rope_theta=theta)


def test_odd_heads_cannot_rotate():
    with pytest.raises(ValueError, match="rope_theta is 10.0, but heads are 3 wide; .*must be even"):
        LocalMixer(6, 2, rope_theta=10.0)
