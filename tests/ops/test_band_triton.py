"""Fused local attention against its float64 definition: in Triton's interpreter on a CPU, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, vmap

from lion_hf.nn.local_attention import LocalMixer
from lion_hf.ops import backend
from lion_hf.ops.band import band_attention


launch = pytest.importorskip("lion_hf.ops.triton.band_launch", reason="Triton is not installed", exc_type=ImportError)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
# Relative error of the whole tensor; low precision rounds weights and their gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Force the kernels, count their launches, and fill new memory with NaN. Without a GPU tiles are small."""
    monkeypatch.setattr(backend, "BACKEND", "triton")
    if not ON_GPU:
        for table in (launch._NARROW, launch._WIDE):
            for kind in table:
                small = {"forward": (32, 16, 4, 2), "queries": (16, 32, 4, 2), "keys": (16, 16, 4, 2)}
                monkeypatch.setitem(table, kind, small)
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    launches = []
    run = launch._Launcher.launch
    monkeypatch.setattr(
        launch._Launcher, "launch", lambda self, name, *a, **k: launches.append(name) or run(self, name, *a, **k)
    )
    return launches


def poisoned(new):
    def full_of_nan(self, *shape, **options):
        made = new(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return full_of_nan


def inputs(length, *, batch=1, heads=1, head_dim=16, value_dim=None, dtype=torch.float32):
    """Return leaves with the strides of a layer, views of (batch, length, heads, width)."""
    widths = head_dim, head_dim, head_dim if value_dim is None else value_dim
    leaves = [torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2) for width in widths]
    return [x.to(DEVICE).requires_grad_() for x in leaves]


def holes(batch, length, hidden=slice(0, 0)):
    """Return a mask with holes, False for all of the tokens `hidden`."""
    mask = torch.rand(batch, length) < 0.7
    mask[:, hidden] = False
    return mask.to(DEVICE)


def definition(query, key, value, reach, *, key_mask=None, cu_seqlens=None):
    """Compute exponentials of all scores, times 0 where a query does not read a key."""
    token = torch.arange(query.shape[2], device=query.device)
    reads = (token[:, None] - token).abs() <= reach
    if cu_seqlens is not None:
        counts = cu_seqlens.diff()
        own = torch.repeat_interleave(torch.arange(len(counts), device=query.device), counts)
        reads = reads & (own[:, None] == own)
    reads = reads[None, None] if key_mask is None else reads & key_mask[:, None, None, :]
    weights = (query @ key.mT / query.shape[-1] ** 0.5).exp() * reads
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ value


def run(attention, leaves, reach, direction, **options):
    """Return the output and the gradients of its product with `direction`."""
    out = attention(*leaves, reach, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(out.dtype))]


def check(leaves, reach, **options):
    """Compare outputs and all gradients with the definition in float64."""
    value = leaves[2]
    direction = torch.randn(value.shape).to(value.device, value.dtype)
    found = run(band_attention, leaves, reach, direction, **options)
    expected = run(definition, [x.detach().double().requires_grad_() for x in leaves], reach, direction, **options)
    for name, f, e in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert f.dtype == value.dtype
        assert f.isfinite().all(), name
        # The gradient of a query that reads one key is 0.
        error = (f.double() - e).norm() / e.norm().clamp(min=0.1 * direction.double().norm())
        assert error < TOLERANCE[value.dtype], (name, error)


# ------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reach", [0, 1, 7, 100])
def test_equals_the_definition(reach, dtype, kernels):
    check(inputs(37, heads=2, dtype=dtype, value_dim=24), reach, key_mask=holes(1, 37))
    assert kernels == ["forward", "queries", "keys"]


LENGTHS = [(1, 3), (16, 0), (17, 20), (31, 5), (33, 16)]
LENGTHS += [(64, 64), (65, 64), (127, 1), (197, 64), (1000, 64), (1000, 300), (16384, 64)] * ON_GPU


@pytest.mark.parametrize("length, reach", LENGTHS)
def test_any_length(length, reach):
    check(inputs(length, batch=2), reach) if length < 2000 else check_long(length, reach)


def check_long(length, reach):
    """Compare a long row with the definition of its parts, which has no (length, length) matrix of the row."""
    leaves = inputs(length, head_dim=64)
    out, part = band_attention(*leaves, reach), slice(length - 999, length)
    expected = definition(*(x[:, :, part].double() for x in leaves), reach)[:, :, reach:]
    error = (out[:, :, part][:, :, reach:].double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[torch.float32]


WIDTHS = [(24, 24), (33, 7), (20, 40)]
SIZES = [(64, 64), (16, 128), (128, 80)]


@pytest.mark.parametrize("head_dim, value_dim", WIDTHS + SIZES * ON_GPU)
def test_any_width(head_dim, value_dim):
    for dtype in DTYPES if ON_GPU else DTYPES[:1]:
        check(inputs(20, head_dim=head_dim, value_dim=value_dim, dtype=dtype), 4)


@pytest.mark.slow
@pytest.mark.parametrize("reach", [0, 3, 64, 200])
@pytest.mark.parametrize("width", [64, 128])
def test_many_lengths_with_the_tiles_of_a_gpu(reach, width, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(backend, "BACKEND", "triton")
    for length in (5, 64, 131, 257):
        check(inputs(length, head_dim=width), reach, key_mask=holes(1, length, slice(20, 120)))
        bounds = torch.tensor([0, length // 3, length // 3, length - 2, length], device=DEVICE)
        check(inputs(length, head_dim=width, value_dim=24), reach, cu_seqlens=bounds)


# ---------------------------------------------------------------------------------------------- padding and packing


def test_queries_that_read_no_key_are_zero():
    """In one neighbourhood of the first row, and in all of the second."""
    leaves, mask = inputs(40, batch=2), holes(2, 40, slice(4, 31))
    mask[1] = False
    check(leaves, 3, key_mask=mask)
    out, *gradients = run(band_attention, leaves, 3, torch.ones_like(leaves[2]), key_mask=mask)
    assert (out[0, :, 7:28] == 0).all() and (out[1] == 0).all()
    assert (gradients[0][0, :, 7:28] == 0).all() and all((x[1] == 0).all() for x in gradients)
    assert not (out[0, :, 6] == 0).any() or not mask[0, 3]


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_do_not_read_each_other(masked):
    bounds = torch.tensor([0, 0, 17, 18, 18, 39, 41, 41], device=DEVICE)
    mask = holes(1, 41, slice(20, 30)) if masked else None
    check(inputs(41), 6, cu_seqlens=bounds.to(torch.int32) if masked else bounds, key_mask=mask)
    check(inputs(5), 6, cu_seqlens=torch.tensor([0, 5], device=DEVICE))


def test_masked_keys_may_be_nan():
    leaves, mask = inputs(33), holes(1, 33, slice(10, 25))
    spoiled = [x.detach().clone() for x in leaves]
    for x in spoiled[1:]:
        x.masked_fill_(~mask[:, None, :, None], torch.nan)
    direction = torch.randn_like(leaves[2])
    results = [
        run(band_attention, tensors, 4, direction, key_mask=mask)
        for tensors in (leaves, [x.requires_grad_() for x in spoiled])
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("index", range(3), ids=("query", "key", "value"))
def test_nan_is_kept_and_stays_in_its_row_and_head(index):
    leaves = [x.detach() for x in inputs(20, batch=2, heads=2)]
    clean = band_attention(*leaves, 4)
    leaves[index][1, 0, 10] = torch.nan
    out = band_attention(*leaves, 4)
    near = slice(10, 11) if index == 0 else slice(6, 15)
    assert out[1, 0, near].isnan().all()
    out[1, 0], clean[1, 0] = 0, 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("value", [torch.inf, 1e38])
def test_extreme_scores(value):
    """A score of infinity gives NaN as in PyTorch's softmax; large finite scores choose one key."""
    query, key, mixed = (x.detach() for x in inputs(20))
    query.fill_(1)
    key.fill_(0)
    key[:, :, 10] = value / 16 if value < torch.inf else value
    out = band_attention(query, key, mixed, 3)
    if value == torch.inf:
        assert out[0, 0, 7:14].isnan().all()
    else:
        torch.testing.assert_close(out[0, 0, 7:14], mixed[0, 0, 10].expand(7, -1))
    assert out[0, 0, :7].isfinite().all() and out[0, 0, 14:].isfinite().all()


# ------------------------------------------------------------------------------------------------ memory and PyTorch


def test_inputs_are_read_where_they_lie(monkeypatch):
    """Views of (batch, length, heads, width) are not copied, and outputs have the memory layout of the next layer."""
    leaves, copies = inputs(20), []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **kwargs: copies.append(x) or contiguous(x, **kwargs))
    out = band_attention(*leaves, 3)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not copies
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *gradients))


def test_any_strides():
    leaves = inputs(20)
    others = [
        leaves[0].detach().mT.contiguous().mT.requires_grad_(),  # the last dimension is not contiguous
        leaves[1].detach().flip(2).requires_grad_(),
        torch.cat([leaves[2].detach()] * 2, -1)[..., ::2].requires_grad_(),
    ]
    check(others, 3)
    check([x.detach()[:, :1].expand(2, 3, -1, -1).requires_grad_() for x in leaves], 3)


@pytest.mark.parametrize("batch, length, value_dim", [(0, 5, 16), (2, 0, 16), (2, 5, 0)])
def test_empty_inputs(batch, length, value_dim):
    leaves = inputs(length, batch=batch, value_dim=value_dim)
    out, *gradients = run(band_attention, leaves, 3, torch.ones_like(leaves[2]))
    assert out.shape == (batch, 1, length, value_dim)
    assert all((x == 0).all() and x.shape == leaf.shape for x, leaf in zip(gradients, leaves, strict=True))


def test_every_run_gives_the_same_bits():
    leaves, mask, direction = inputs(20), holes(1, 20), torch.randn(1, 1, 20, 16, device=DEVICE)
    first, second = (run(band_attention, leaves, 5, direction, key_mask=mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    leaves = inputs(5)
    (gradient,) = torch.autograd.grad(band_attention(*leaves, 2).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"local attention do not support second derivatives.*LION_BACKEND=torch"):
        torch.autograd.grad(gradient.sum(), leaves[1])


def test_what_the_kernels_do_not_support_runs_in_pytorch(kernels):
    leaves = [x.detach() for x in inputs(9, head_dim=16)]
    expected = band_attention(*leaves, 2)
    assert kernels.pop() == "forward"
    doubles = [x.double() for x in leaves]
    torch.testing.assert_close(band_attention(*doubles, 2).float(), expected)
    wide = [x.repeat_interleave(9, -1) for x in leaves]
    assert band_attention(*wide, 2).shape == (1, 1, 9, 144)
    assert band_attention(*leaves, 2, dropout=0.5).shape == expected.shape
    torch.testing.assert_close(vmap(lambda *x: band_attention(*x, 2))(*(x[None] for x in leaves))[0], expected)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="does not support"):
        band_attention(*(forward_ad.make_dual(x, x) for x in leaves), 2)
    assert grad(lambda x: band_attention(x, *leaves[1:], 2).sin().sum())(leaves[0]).abs().max() > 0
    program = torch.export.export(LocalMixer(32, 2).to(DEVICE), (torch.randn(2, 9, 32, device=DEVICE),))
    assert not any("band" in str(node.target) for node in program.graph.nodes)
    assert not kernels


def test_a_gpu_or_the_backend_chooses_the_kernels(monkeypatch, kernels):
    leaves = [x.detach() for x in inputs(9)]
    for name, launches in (("torch", 0), ("", int(ON_GPU)), ("triton", 1)):
        monkeypatch.setattr(backend, "BACKEND", name)
        kernels.clear()
        band_attention(*leaves, 2)
        assert len(kernels) == launches
        kernels.clear()
        band_attention(*(x.requires_grad_() for x in map(torch.clone, leaves)), 2)
        assert len(kernels) == (launches if name else 0)  # float32 with gradients is faster in PyTorch


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_operators_of_pytorch_are_what_they_say(packed):
    """Forward and backward declare correct mutations, shapes, strides and dtypes, and work under compilers."""
    bounds = torch.tensor([[0] * 8 + [8] * 12, [8] * 8 + [20] * 12], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        launch._band.operator, (*inputs(20), None if packed else holes(1, 20), bounds if packed else None, 3)
    )


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: the interpreter runs the kernels in both ways alike")
@pytest.mark.parametrize("packed", [False, True])
def test_stays_in_a_compiled_graph(packed):
    """A layer compiles into one graph, and other lengths use it."""
    mixer = LocalMixer(64, 4, window=32, rope_theta=100.0).to(DEVICE)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True)
    for length in (90, 300, 701):
        x = torch.randn(1 if packed else 2, length, 64, device=DEVICE, requires_grad=True)
        options = {"cu_seqlens": torch.tensor([0, 7, length], device=DEVICE)} if packed else {}
        results = []
        for layer in (mixer, compiled):
            y = layer(x, **options)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_a_cuda_graph_replays_with_new_inputs(packed):
    """The capture of a CUDA graph raises an error if the code waits for the device."""
    leaves, mask = inputs(700), holes(1, 700)
    bounds = torch.tensor([0, 1, 300, 700], device=DEVICE) if packed else None
    direction = torch.randn(1, 1, 700, 16, device=DEVICE)

    def step():
        return run(band_attention, leaves, 64, direction, key_mask=mask, cu_seqlens=bounds)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


# ------------------------------------------------------------------------------------------------------- launches


FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "dtypes, allowed, precision",
    [
        ((FLOAT, FLOAT, FLOAT), False, "ieee"),
        ((BRAIN, BRAIN, FLOAT), False, "ieee"),
        ((BRAIN, HALF, BRAIN), True, "tf32"),
        ((FLOAT, FLOAT, FLOAT), True, "tf32"),
        ((HALF, HALF, HALF), False, "fp16"),
        ((BRAIN, BRAIN, BRAIN), False, "bf16"),
    ],
)
def test_float32_is_exact_unless_tf32_is_allowed(dtypes, allowed, precision, monkeypatch):
    monkeypatch.setattr(launch, "_tf32_is_allowed", lambda: allowed)
    launcher = launch._Launcher(*(torch.zeros(1, 1, 5, 16, dtype=x) for x in dtypes), None, None, 3)
    assert launcher.precision == precision


def test_grids_hold_very_long_texts(monkeypatch):
    """A GPU accepts at most 65535 programs in every dimension of the grid except the first, and numbers of 32 bits."""
    grids, numbers = [], []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: numbers.append([x for x in arguments if isinstance(x, int)])

    for name in [name for name in vars(launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(launch, name, Recorder())
    x = torch.zeros(1).expand(1, 1, 2**20 + 1, 16)
    launcher = launch._Launcher(x, x, x, None, None, 2**40)
    launcher.forward(x, x[..., 0])
    launcher.backward(x, x[..., 0], x, x, x, x)
    assert len(grids) == 3 and all(x[-1] == 2**20 + 1 and max(x) < 2**31 for x in numbers if x)
    assert all(max(grid[1:], default=1) <= 65535 for grid in grids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--widths", "64", "128"],
        ["--packed", "--dtypes", "float16"],
        ["--widths", "64", "128", "--dtypes", "float32"],
        ["--widths", "64", "128", "--dtypes", "float32", "--tf32"],
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_there(options):
    """No kernel keeps registers in memory, or needs more shared memory than small GPUs have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "benchmarks/kernel_resources.py"
    command = [sys.executable, "-W", "ignore", str(script), "--local", *options]
    table = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert {row["kernel"] for row in rows} == {"forward", "queries", "keys"}
    assert all(int(row["stack (bytes)"]) <= 64 for row in rows)
    assert all(float(row["shared (KiB)"]) <= 99 for row in rows)
    exact = "float32" in options and "--tf32" not in options
    assert all((int(row["tensor core"]) > 0) != exact for row in rows)
