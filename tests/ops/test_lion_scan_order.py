from pathlib import Path

import pytest
import torch

from lion_hf.ops.reference import textbook_mask
from lion_hf.ops.scans import averaged_scans, snake_orders


GRIDS = [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 2), (4, 4), (5, 7), (7, 4), (14, 14)]
GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


def coordinates(order, width):
    """Return the row and the column of every patch along the curve, without the class token."""
    patches = order[1:] - 1
    return torch.stack([patches // width, patches % width], 1)


@pytest.mark.parametrize("height, width", GRIDS)
def test_both_curves_are_permutations_with_the_class_token_first(height, width):
    curves = snake_orders(height, width)
    assert len(curves) == 2
    for order, inverse in curves:
        assert order.dtype == inverse.dtype == torch.int64
        assert order[0] == 0 and inverse[0] == 0
        assert torch.equal(order.sort().values, torch.arange(1 + height * width))


@pytest.mark.parametrize("height, width", GRIDS)
def test_the_inverse_undoes_the_curve(height, width):
    tokens = torch.randn(1 + height * width)
    for order, inverse in snake_orders(height, width):
        assert torch.equal(tokens[order][inverse], tokens)
        assert torch.equal(tokens[inverse][order], tokens)


@pytest.mark.parametrize("height, width", GRIDS)
def test_neighbours_on_the_curve_are_neighbours_on_the_grid(height, width):
    for order, _ in snake_orders(height, width):
        steps = coordinates(order, width).diff(dim=0).abs().sum(1)
        assert (steps == 1).all()


@pytest.mark.parametrize("height, width", GRIDS)
def test_the_first_curve_walks_rows_and_the_second_columns_from_the_same_corner(height, width):
    for (order, _), axis, side in zip(snake_orders(height, width), (0, 1), (width, height), strict=True):
        places = coordinates(order, width)
        assert places[0].tolist() == [0, 0]
        assert torch.equal(places[:, axis], torch.arange(height * width) // side), "one line after the other"
        across = places[:, 1 - axis].view(-1, side)
        assert torch.equal(across[::2], torch.arange(side).expand_as(across[::2])), "even lines run forward"
        assert torch.equal(across[1::2], torch.arange(side).flip(0).expand_as(across[1::2])), "odd lines run back"


def test_a_transposed_grid_swaps_the_curves():
    (rows, _), (columns, _) = snake_orders(3, 5)
    (rows_t, _), (columns_t, _) = snake_orders(5, 3)
    assert torch.equal(coordinates(rows, 5), coordinates(columns_t, 3).flip(1))
    assert torch.equal(coordinates(columns, 5), coordinates(rows_t, 3).flip(1))


@pytest.mark.skipif(not (GOLDEN / "masks.safetensors").exists(), reason="the reference numbers are not available")
@pytest.mark.parametrize("side", [2, 3, 4, 5, 8, 14])
def test_curves_equal_the_reference(side):
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "masks.safetensors")
    names = ("s_curv_ind", "rev_s_curv_ind")
    for (order, inverse), name in zip(snake_orders(side, side), names, strict=True):
        assert torch.equal(order[1:] - 1, golden[f"output.order.grid{side}.{name}"])
        assert torch.equal(inverse[1:] - 1, golden[f"output.order.grid{side}.{name}_inv"])


@pytest.mark.parametrize("decay", ["head", "token", "saturated"])
@pytest.mark.parametrize("form", ["attention", "chunk", "rnn"])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 4), (5, 2)])
def test_scans_are_averaged_as_the_mean_of_their_masks(height, width, form, decay):
    """Outputs and all gradients equal those of the textbook masks, built along each curve and averaged."""
    length, heads = 1 + height * width, 2
    query, key = (torch.rand(2, heads, length, 3, dtype=torch.float64) for _ in range(2))
    shape = (heads,) if decay == "head" else (2, heads, length)
    gates = [-torch.rand(shape, dtype=torch.float64) for _ in range(2)]
    if decay == "saturated":
        gates = [g.masked_fill(torch.rand(shape) < 0.3, -300.0) for g in gates]
    leaves = [x.requires_grad_() for x in (query, key, torch.randn(2, heads, length, 5, dtype=torch.float64), *gates)]
    orders = snake_orders(height, width)

    mixed = averaged_scans(*leaves[:3], leaves[3:], orders, format=form, chunk_size=3)

    masks = 0
    for gate, (order, inverse) in zip(leaves[3:], orders, strict=True):
        along = gate[None, :, None].expand(2, -1, length) if gate.dim() == 1 else gate[:, :, order]
        masks = masks + textbook_mask(along.exp())[:, :, inverse][..., inverse] / 2
    scores = leaves[0] @ leaves[1].transpose(2, 3) * 3**-0.5 * masks
    expected = scores @ leaves[2] / (scores.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (mixed, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_scans_need_log_decays_of_one_kind():
    query = torch.rand(2, 2, 3, 4)
    orders = snake_orders(1, 2)
    for log_decays in ([], [-torch.rand(2), -torch.rand(2, 2, 3)]):
        with pytest.raises(ValueError, match=r"all of them \(heads,\) or all \(batch, heads, length\)"):
            averaged_scans(query, query, query, log_decays, orders)
