"""Softmax attention in a band: equal to its definition, linear in the length, padding and packing exact."""

import copy
import json
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from lion_hf.nn.local_attention import LocalMixer
from lion_hf.nn.softmax import SoftmaxMixer


DIM, HEADS = 12, 2
# Around one and two blocks of 64 queries, and around the longest text in one call: 120 tokens for windows of 2 to 16,
# 288 for window 128.
LENGTHS = (1, 2, 61, 64, 65, 120, 121, 128, 193, 288, 289)
MASKS = ("none", "left", "right", "inner", "all")
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def rows(length, batch=2, dim=DIM, dtype=torch.float64):
    return torch.randn(batch, length, dim, dtype=dtype)


def mask_of(kind, batch, length):
    """Mask tokens of the last row only, except for masks inside rows."""
    real = torch.ones(batch, length, dtype=torch.bool)
    if kind == "left":
        real[-1, : length // 2] = False
    elif kind == "right":
        real[-1, length // 3 + 1 :] = False
    elif kind == "all":
        real[-1] = False
    elif kind == "inner":
        real = torch.rand(batch, length) > 0.5
    return None if kind == "none" else real


def rotated(x, theta):
    """Rotate pairs of features as complex numbers by the angle position * theta**(-2 i / width)."""
    width = x.shape[-1]
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    rates = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * rates
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def definition(mixer, x, key_mask, reach):
    """Compute the layer from exponentials of all scores, with weight 0 outside the band and at masked keys."""
    batch, length, dim = x.shape
    heads = mixer.num_heads
    query, key, value = (
        proj(x).view(batch, length, heads, dim // heads).transpose(1, 2)
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    if mixer.rope_theta is not None:
        query, key = rotated(query, mixer.rope_theta), rotated(key, mixer.rope_theta)
    scores = query @ key.mT / (dim // heads) ** 0.5
    token = torch.arange(length)
    near = (token >= token[:, None] - reach) & (token <= token[:, None] + reach)
    weights = scores.exp() * near
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return mixer.o_proj((weights @ value).transpose(1, 2).flatten(2))


def check_definition(mixer, length, batch, kind, matrix=True):
    """Compare the outputs and all gradients of the layer, in both ways, with the definition."""
    x, real = rows(length, batch), mask_of(kind, batch, length)
    direction = torch.randn_like(x)

    def with_gradients(compute):
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        return [y.detach(), *torch.autograd.grad((y * direction).sum(), [leaf, *mixer.parameters()])]

    expected = with_gradients(lambda x: definition(mixer, x, real, mixer.window // 2))
    ways = [lambda x: mixer(x, real), lambda x: mixer(x, real, output_attentions=True)[0]]
    for way in ways[: 1 + matrix]:
        for found, e in zip(with_gradients(way), expected, strict=True):
            torch.testing.assert_close(found, e, **CLOSE, msg=lambda m: f"{length} {kind}: {m}")


# ------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("window", [1, 2, 3, 16, 128, 1000])
def test_equals_the_definition_in_outputs_and_every_gradient(window):
    for i, length in enumerate(LENGTHS):
        batch, heads = (1, 1) if i % 2 else (2, HEADS)
        mixer = LocalMixer(DIM, heads, window=window, rope_theta=100.0 if i % 3 else None).double()
        # All masks at two lengths: in one block and in several.
        for kind in MASKS if length in (61, 289) else MASKS[i % 2 :: 4]:
            check_definition(mixer, length, batch, kind)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 3, 7, 16, 126, 128, 130, 254, 1000])
def test_equals_the_definition_at_many_lengths_and_masks(window):
    mixer = LocalMixer(DIM, HEADS, window=window, rope_theta=100.0).double()
    for length in (3, 63, 96, 97, 129, 193, 319, 320, 321, 1021, 2311):
        for kind in MASKS:
            check_definition(mixer, length, 2, kind, matrix=False)


def test_window_128_is_a_local_layer_of_modernbert(monkeypatch):
    """Compare with Transformers' layer, given angles in float64 (it rotates in float32 by itself)."""
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    config = modernbert.ModernBertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=3, local_attention=128, vocab_size=40,
        intermediate_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        attention_dropout=0.0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    layer = next(i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention")
    theirs = modernbert.ModernBertAttention(config, layer).double().eval()
    theta = config.rope_parameters["sliding_attention"]["rope_theta"]
    mixer = LocalMixer(32, 2, window=128, qkv_bias=False, out_bias=False, rope_theta=theta).double().eval()
    weights = theirs.Wqkv.weight.data.chunk(3)
    for proj, weight in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj), weights, strict=True):
        proj.weight.data = weight.clone()
    mixer.o_proj.weight.data = theirs.Wo.weight.data.clone()
    x, real = rows(301, 3, 32), torch.ones(3, 301, dtype=torch.bool)
    real[1, :70], real[2, 230:] = False, False
    masks = modernbert.create_bidirectional_sliding_window_mask(config, x, real.long())
    rotary = modernbert.ModernBertRotaryEmbedding(config)(x, torch.arange(301)[None], "sliding_attention")
    torch.testing.assert_close(mixer(x, real)[real], theirs(x, rotary, masks)[0][real], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(
        modernbert, "apply_rotary_pos_emb", lambda q, k, *_, **__: (rotated(q, theta), rotated(k, theta))
    )
    torch.testing.assert_close(mixer(x, real)[real], theirs(x, rotary, masks)[0][real], **CLOSE)


# -------------------------------------------------------------------------------------------- padding and packing


@pytest.mark.parametrize("length", [40, 150])
@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
def test_padding_on_either_side_changes_no_real_token(build, length):
    options = {"window": 32} if build is LocalMixer else {}
    mixer = build(DIM, HEADS, rope_theta=100.0, **options).double()
    x, junk = rows(length, 1), rows(75, 1) * 100
    alone = mixer(x)
    for padded, here in (
        (torch.cat([junk, x], 1), slice(75, None)),
        (torch.cat([x, junk], 1), slice(None, length)),
        (torch.cat([junk, x, junk], 1), slice(75, 75 + length)),
    ):
        real = torch.zeros(padded.shape[:2], dtype=torch.bool)
        real[:, here] = True
        torch.testing.assert_close(mixer(padded, real)[:, here], alone, **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
def test_packed_rows_are_their_sequences(build, masked):
    options = {"window": 32} if build is LocalMixer else {}
    mixer = build(DIM, HEADS, rope_theta=100.0, **options).double()
    for lengths in ([5, 9], [70, 1, 130, 0, 3, 64], [0, 300]):
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        row = rows(sum(lengths), 1).requires_grad_()
        real = torch.rand(1, sum(lengths)) > 0.3 if masked else None
        direction = torch.randn_like(row)
        packed = mixer(row, real, cu_seqlens=bounds)
        alone = torch.cat(
            [mixer(row[:, i:j], None if real is None else real[:, i:j]) for i, j in pairwise(bounds.tolist()) if j > i],
            1,
        )
        torch.testing.assert_close(packed, alone, **CLOSE)
        leaves = [row, *mixer.parameters()]
        found, expected = (torch.autograd.grad((y * direction).sum(), leaves) for y in (packed, alone))
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("wanted", [False, True], ids=["band", "matrix"])
@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
def test_masked_tokens_may_be_nan(build, wanted, length):
    mixer = build(DIM, HEADS, rope_theta=100.0)
    x, real = rows(length, dtype=torch.float32), torch.rand(2, length) > 0.5
    clean, spoiled = (
        mixer(y, real, output_attentions=wanted) for y in (x, x.masked_fill(~real.unsqueeze(-1), torch.nan))
    )
    clean, spoiled = (y[0] if wanted else y for y in (clean, spoiled))
    assert torch.equal(spoiled[real], clean[real])


@pytest.mark.parametrize("length", [20, 300])
def test_nan_in_one_row_stays_there(length):
    mixer, x = LocalMixer(DIM, HEADS, window=32), rows(length, 3, dtype=torch.float32)
    expected = mixer(x)
    x[1] = torch.nan
    found = mixer(x)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
@pytest.mark.parametrize("lengths", [(9, 5, 6), (90, 3, 0, 130, 70)], ids=str)
@pytest.mark.parametrize("spoilt", [0, 1, -1])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_in_one_packed_sequence_stays_there(build, lengths, spoilt, masked):
    """In outputs and input gradients, whichever of query, key and value it reaches."""
    mixer, row = build(DIM, HEADS, rope_theta=100.0), rows(sum(lengths), 1, dtype=torch.float32)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    real = torch.ones(1, sum(lengths), dtype=torch.bool) if masked else None
    start = bounds.tolist()[spoilt % len(lengths)]
    end = start + lengths[spoilt]
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[start:end] = False
    if masked:
        real[0, others] = torch.rand(int(others.sum())) > 0.2
    results = []
    for value in (None, torch.nan):
        x = row.clone()
        if value is not None:
            x[0, start], x[0, end - 1] = value, value
        y = mixer(x.requires_grad_(), real, cu_seqlens=bounds)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for clean, found in zip(*results, strict=True):
        torch.testing.assert_close(found[0, others], clean[0, others], rtol=1e-5, atol=1e-6)
        assert found[0, start].isnan().any(), "NaN is not lost"


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("wanted", [False, True], ids=["band", "matrix"])
def test_tokens_that_see_no_key_read_0_with_finite_gradients(wanted, length):
    mixer, x = LocalMixer(DIM, HEADS, window=4), rows(length, dtype=torch.float32).requires_grad_()
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, 5:15] = False  # the tokens 7 to 12 read masked tokens only
    real[1] = False
    mixed = mixer(x, real, output_attentions=wanted)
    mixed, matrix = mixed if wanted else (mixed, None)
    for row, blind in ((0, slice(7, 13)), (1, slice(None))):
        torch.testing.assert_close(mixed[row, blind], mixer.o_proj.bias.expand_as(mixed[row, blind]))
        assert not wanted or (matrix[row, :, blind] == 0).all()
    assert not torch.equal(mixed[0, 6], mixer.o_proj.bias)
    mixed.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all()


# --------------------------------------------------------------------------------------------- cost, matrix, dropout


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_grows_faster_than_the_length(masked):
    mixer, largest = LocalMixer(8, 1, window=16, rope_theta=100.0).train(), {}
    for length in (1024, 4096):
        x = rows(length, 1, 8, torch.float32).requires_grad_()
        with Largest() as mode:
            mixer(x, mask_of("inner", 1, length) if masked else None, dropout=0.1).sum().backward()
        largest[length] = mode.elements
    assert largest[4096] <= 4 * largest[1024] < 1024**2


def test_the_matrix_is_that_of_the_band():
    mixer, x, real = LocalMixer(DIM, HEADS, window=6).double(), rows(30), mask_of("right", 2, 30)
    mixed, matrix = mixer(x, real, output_attentions=True)
    assert matrix.shape == (2, HEADS, 30, 30)
    distance = (torch.arange(30)[:, None] - torch.arange(30)).abs()
    read = (distance <= 3) & real[:, None, :]
    assert ((matrix > 0) == read[:, None]).all()
    sums = matrix.sum(-1)
    torch.testing.assert_close(sums, read.any(-1)[:, None].expand_as(sums).double())
    value = mixer.project(x)[2]
    torch.testing.assert_close(mixed, mixer.o_proj((matrix @ value).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("wanted", [False, True], ids=["band", "matrix"])
def test_dropout_acts_on_weights_in_training_only(wanted, length):
    """With identity projections of value and output, and values 1, a token reads the sum of its weights."""
    mixer = LocalMixer(8, 2, window=8).double()
    for proj, factor in ((mixer.v_proj, 0), (mixer.o_proj, 1)):
        proj.weight.data = factor * torch.eye(8, dtype=torch.float64)
        proj.bias.data.fill_(1 - factor)

    def sums(x):
        mixed = mixer(x, dropout=0.5, output_attentions=wanted)
        return mixed[0] if wanted else mixed

    x = rows(length, 40, 8)
    mixer.eval()
    torch.testing.assert_close(sums(x), torch.ones_like(x))
    mixer.train()
    found = sums(x)
    assert found.std() > 0.1 and abs(found.mean() - 1) < 0.05


# -------------------------------------------------------------------------------------------- precision and copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_autocast_stay_near_float32(dtype):
    mixer, x, real = LocalMixer(32, 2, rope_theta=1e4), rows(300, 2, 32, torch.float32), mask_of("left", 2, 300)
    expected = mixer(x, real)[real]
    with torch.autocast("cpu", dtype):
        cast = mixer(x, real)
    low = copy.deepcopy(mixer).to(dtype)(x.to(dtype), real)
    for found in (cast, low):
        assert found.dtype == dtype
        assert (found[real].float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_holds_the_four_projections_and_nothing_else():
    mixer = LocalMixer(DIM, HEADS, rope_theta=1e4)
    x = rows(300, dtype=torch.float32)
    expected = mixer(x)
    assert set(mixer.state_dict()) == {f"{x}_proj.{y}" for x in "qkvo" for y in ("weight", "bias")}
    bare = LocalMixer(DIM, HEADS, qkv_bias=False, out_bias=False)
    assert set(bare.state_dict()) == {f"{x}_proj.weight" for x in "qkvo"}
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(other(x), expected)
    assert "window=128, rope_theta=10000.0" in repr(mixer)


def test_runs_on_the_meta_device():
    mixer = LocalMixer(DIM, HEADS, rope_theta=1e4).to("meta")
    assert mixer(torch.empty(2, 300, DIM, device="meta")).shape == (2, 300, DIM)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LocalMixer(DIM, HEADS, window=0), "window is 0; it must be a whole number of tokens, at least 1"),
        (lambda: LocalMixer(DIM, HEADS, window=2.5), "window is 2.5; it must be a whole number"),
        (lambda: LocalMixer(DIM, HEADS, window=True), "window is True; it must be a whole number"),
        (lambda: LocalMixer(DIM, 5), "dim 12 is not divisible by heads 5"),
        (lambda: LocalMixer(DIM, HEADS)(torch.randn(2, 5, 9)), r"it must be \(batch, length, 12\)"),
        (
            lambda: LocalMixer(DIM, HEADS)(torch.randn(1, 5, DIM), cu_seqlens=torch.tensor([0, 4])),
            "cu_seqlens runs from 0 to 4",
        ),
        (
            lambda: LocalMixer(DIM, HEADS)(
                torch.randn(1, 5, DIM), cu_seqlens=torch.tensor([0, 5]), output_attentions=True
            ),
            "several packed sequences, for which no attention matrix is built",
        ),
        (lambda: LocalMixer(DIM, HEADS)(torch.randn(1, 5, DIM), dropout=1.0), r"dropout is 1.0; .*\[0, 1\)"),
    ],
)
def test_mistakes_raise_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------- graphs, torch.func


@pytest.mark.parametrize("length", [20, 300])
def test_gradients_of_each_sample_are_those_of_autograd(length):
    mixer = LocalMixer(DIM, HEADS, window=32, rope_theta=100.0).double()
    x, real = rows(length, 3), mask_of("left", 3, length)
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}

    def loss(parameters, x, real):
        return functional_call(mixer, parameters, (x[None], real[None])).sin().sum()

    samples = vmap(grad(loss), (None, 0, 0))(parameters, x, real)
    for i in range(3):
        mixer.zero_grad()
        mixer(x[i : i + 1], real[i : i + 1]).sin().sum().backward()
        for name, p in mixer.named_parameters():
            torch.testing.assert_close(samples[name][i], p.grad, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [20, 300])
def test_compiles_into_one_graph(length, packed):
    torch.compiler.reset()
    mixer = LocalMixer(DIM, HEADS, window=32, rope_theta=100.0).double()
    x = rows(length, 1 if packed else 2).requires_grad_()
    inputs = {"cu_seqlens": torch.tensor([0, 7, length])} if packed else {"key_mask": mask_of("left", 2, length)}
    results = []
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        y = function(x, **inputs)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
def test_export_takes_any_batch_and_length(build):
    mixer = build(DIM, HEADS, rope_theta=100.0).double().eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=5000)
    dims = {0: batch, 1: length}
    inputs = rows(9), mask_of("left", 2, 9)
    program = torch.export.export(mixer, inputs, dynamic_shapes={"x": dims, "key_mask": dims}).module()
    for size in ((2, 9), (1, 2), (3, 64), (2, 193), (1, 1000)):
        x, real = rows(size[1], size[0]), mask_of("right", *size)
        torch.testing.assert_close(program(x, real), mixer(x, real), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
@pytest.mark.filterwarnings("ignore")  # the tracer warns about every size that is read
def test_traced_graphs_take_any_batch_and_length(build):
    mixer = build(DIM, HEADS, rope_theta=100.0).double().eval()
    traced = torch.jit.trace(mixer, (rows(9), mask_of("left", 2, 9)), check_trace=False)
    for size in ((2, 9), (1, 1), (3, 64), (2, 193)):
        x, real = rows(size[1], size[0]), mask_of("right", *size)
        torch.testing.assert_close(traced(x, real), mixer(x, real), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("build", [LocalMixer, SoftmaxMixer], ids=lambda x: x.__name__)
def test_onnx_takes_any_batch_and_length(tmp_path, build):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mixer = build(DIM, HEADS, rope_theta=100.0).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=5000)
    dims, path = {0: batch, 1: length}, tmp_path / "mixer.onnx"
    inputs = rows(9, dtype=torch.float32), mask_of("left", 2, 9)
    torch.onnx.export(mixer, inputs, path, dynamo=True, dynamic_shapes={"x": dims, "key_mask": dims}, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((2, 9), (3, 64), (2, 193), (1, 1000)):
        x, real = rows(size[1], size[0], dtype=torch.float32), mask_of("right", *size)
        (found,) = session.run(None, {"x": x.numpy(), "key_mask": real.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), mixer(x, real).detach(), rtol=1e-4, atol=1e-5)


def test_the_benchmark_compares_layers_that_are_equal(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import bench_local

    monkeypatch.setattr(bench_local, "WIDTH", 8)
    monkeypatch.setattr(bench_local, "memory", lambda *_: 1.0)  # each in a process of its own
    small = ["--device", "cpu", "--tokens", "40", "--window", "8", "--seconds", "0", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_local", *small, "--lengths", "40", "150", "--output", str(tmp_path)])
    bench_local.main()
    result = json.loads((tmp_path / "bench_local.json").read_text())["rows"]
    assert len(result) == 2 * 2 * 2 * 3 and all(row["us/token"] > 0 for row in result)
    assert "times the time per token, 40 to 150 tokens" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_local", *small, "--blocks", "8", "16", "--lengths", "150"])
    arguments = bench_local.parser().parse_args(sys.argv[1:])
    assert [row["block"] for row in bench_local.blocks(arguments, bench_local.device_timer(arguments.device))] == [
        8,
        16,
        8,
        16,
    ]
    query, key, value = (rows(150, 1, 96, torch.float32).view(1, 150, 12, 8).transpose(1, 2) for _ in range(3))
    local, dense, full = (
        bench_local.attention(name, arguments)(query, key, value) for name in ("local", "dense band", "full")
    )
    torch.testing.assert_close(local, dense)
    assert not torch.allclose(local, full)
