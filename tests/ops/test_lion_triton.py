"""The fused kernels against a float64 reference: in Triton's interpreter on a CPU (float32), compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases_triton import DECAYS, DEVICE, DTYPES, ON_GPU, RESULTS, assert_close, inputs, lion_triton, run, textbook
from cases_triton import kernels as kernels
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from lion_hf.nn.features import unit_silu
from lion_hf.ops import backend
from lion_hf.ops.api import bidirectional_linear_attention
from lion_hf.ops.scans import averaged_scans, snake_orders


@pytest.fixture(params=["walk", "propagate"])
def walk(request, monkeypatch):
    """Whether one kernel or two compute what reaches each chunk, whatever the number of sequences."""
    monkeypatch.setattr(lion_triton, "_WALKS", 0 if request.param == "walk" else 10**9)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("result", RESULTS)
def test_equals_the_textbook(decay, result, dtype, monkeypatch):
    """Test every pair of decay and result. The forms alternate, because the kernels compute both in the same way."""
    form = ("attention", "chunk")[(DECAYS.index(decay) + list(RESULTS).index(result)) % 2]
    leaves, mask = inputs(39, decay, dtype=dtype)  # 3 chunks of one tile; without decay, chunks of several tiles
    if result == "normalized":  # positive features, as in image encoders
        leaves[:2] = [x.detach().abs().requires_grad_() for x in leaves[:2]]
    options = {"format": form, "key_mask": mask, **RESULTS[result]}
    assert_close(run(leaves, **options), textbook(leaves, monkeypatch, **options), dtype)


LENGTHS = [1, 15, 16, 17, 33] + [63, 64, 65, 197, 1000, 16384] * ON_GPU


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length, monkeypatch):
    leaves, _ = inputs(length, "token", batch=2, heads=1)
    assert_close(run(leaves, format="chunk"), textbook(leaves, monkeypatch))


@pytest.mark.parametrize(
    "head_dim, value_dim", [(16, 16), (20, 40), (33, 7)] + [(64, 64), (60, 128), (128, 128)] * ON_GPU
)
def test_any_width(head_dim, value_dim, monkeypatch):
    leaves, _ = inputs(20, "head", head_dim=head_dim, value_dim=value_dim)
    assert_close(run(leaves, format="attention"), textbook(leaves, monkeypatch))


@pytest.mark.parametrize("decay", DECAYS[1:3])
@pytest.mark.parametrize("result", RESULTS)
def test_both_ways_to_the_states(decay, result, walk, monkeypatch):
    """Few sequences and many give the same."""
    leaves, mask = inputs(55, decay, heads=1)
    options = {"format": "chunk", "key_mask": mask, **RESULTS[result]}
    if result == "normalized":
        leaves[:2] = [x.detach().abs().requires_grad_() for x in leaves[:2]]
    assert_close(run(leaves, **options), textbook(leaves, monkeypatch, **options))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences_are_separate(decay, walk, monkeypatch):
    """A row of sequences, some of them empty, equals the sequences computed separately."""
    leaves, mask = inputs(69, decay, heads=1)
    bounds = torch.tensor([0, 1, 1, 38, 69, 69], device=DEVICE)
    options = {"format": "chunk", "key_mask": mask, "return_denominator": True, "cu_seqlens": bounds}
    assert_close(run(leaves, **options), textbook(leaves, monkeypatch, **options))


def test_padding_may_hold_anything():
    leaves, mask = inputs(34, "token")
    spoiled = [x.detach().clone() for x in leaves]
    for x in spoiled[1:3]:
        x.masked_fill_(~mask[:, None, :, None], torch.nan)
    options = {"format": "chunk", "key_mask": mask, "normalize": True}
    for result, want in zip(run([x.requires_grad_() for x in spoiled], **options), run(leaves, **options), strict=True):
        assert torch.equal(result, want)


def test_rows_without_keys_are_zero():
    leaves, mask = inputs(34, "token")
    results = run(leaves, format="chunk", key_mask=torch.zeros_like(mask), normalize=True)
    assert all((x == 0).all() for x in results)


def test_every_run_gives_the_same_bits():
    leaves, mask = inputs(34, "token")
    first, second = (run(leaves, format="chunk", key_mask=mask, normalize=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_read_where_they_lie(monkeypatch):
    """Views of (batch, length, heads, width) are not copied, and outputs have the memory layout of the next layer."""
    leaves, _ = inputs(20, "none")
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **kwargs: copies.append(x) or contiguous(x, **kwargs))
    out = bidirectional_linear_attention(*leaves)
    assert not copies
    assert out.transpose(1, 2).is_contiguous()


def test_empty_inputs():
    for length, width in ((0, 16), (5, 0)):
        leaves, _ = inputs(length, "head", value_dim=width)
        out, *gradients = run(leaves)
        assert out.shape == (1, 2, length, width)
        assert all((x == 0).all() for x in gradients)


def test_stays_in_a_compiled_graph():
    leaves, mask = inputs(20, "token")
    compiled = torch.compile(
        bidirectional_linear_attention, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager"
    )
    options = {"format": "chunk", "key_mask": mask, "normalize": True}
    out = compiled(*leaves, **options)
    want = bidirectional_linear_attention(*leaves, **options)
    assert torch.equal(out, want)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_a_cuda_graph_replays_with_new_inputs(packed):
    """The capture of a CUDA graph raises an error if the code waits for the device."""
    leaves, mask = inputs(700, "token")
    bounds = torch.tensor([0, 1, 300, 700], device=DEVICE) if packed else None
    options = {"format": "chunk", "key_mask": mask, "cu_seqlens": bounds}
    gradient = torch.randn(1, 2, 700, 24, device=DEVICE)

    def step():
        out = bidirectional_linear_attention(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, gradient)]

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


@pytest.mark.slow
@pytest.mark.parametrize("result", [0, 1, 2])
def test_operators_of_pytorch_are_what_they_say(result):
    """Forward and backward declare correct mutations, shapes, strides and dtypes, and work under compilers."""
    leaves, mask = inputs(20, "token")
    torch.library.opcheck(lion_triton._mix.operator, (*leaves, mask, None, None, 0.25, 1e-6, result))


def test_backend_is_chosen_and_explained(monkeypatch):
    leaves, _ = inputs(5, "none")
    doubles = [x.detach().double() for x in leaves]
    with pytest.raises(ValueError, match="LION_BACKEND=triton, but .* not torch.float64"):
        bidirectional_linear_attention(*doubles)
    if not ON_GPU:
        with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
            bidirectional_linear_attention(*(x.detach().bfloat16() for x in leaves))
    wide, _ = inputs(5, "none", head_dim=130)
    with pytest.raises(ValueError, match="at most 128 features, not 130"):
        bidirectional_linear_attention(*wide)
    monkeypatch.setattr(backend, "BACKEND", "cuda")
    with pytest.raises(ValueError, match="LION_BACKEND is 'cuda'; allowed are 'torch' and 'triton'"):
        bidirectional_linear_attention(*leaves)
    monkeypatch.setattr(backend, "BACKEND", "")
    monkeypatch.setattr(lion_triton, "_mix", None)  # not called for tensors on a CPU
    if not ON_GPU:
        bidirectional_linear_attention(*leaves)


def test_rnn_keeps_its_promise_of_memory(monkeypatch):
    leaves, _ = inputs(5, "head")
    monkeypatch.setattr(lion_triton, "_mix", None)
    assert_close(run(leaves, format="rnn"), textbook(leaves, monkeypatch))


def test_row_sums_need_no_values(monkeypatch):
    leaves, mask = inputs(34, "token", value_dim=0)
    options = {"format": "chunk", "key_mask": mask, "return_denominator": True}
    results, expected = run(leaves, **options), textbook(leaves, monkeypatch, **options)
    for index in (1, 2, 3, 5):  # row sums and the gradients of queries, keys and decays; the others are empty
        assert_close(results[index : index + 1], expected[index : index + 1])


@pytest.mark.parametrize("decay", DECAYS[:3])
def test_transforms_and_forward_mode_use_the_forms_in_pytorch(decay, monkeypatch):
    """The kernels have no rules for them: torch.func raised an error, and forward mode returned tangents of 0."""
    leaves, _ = inputs(9, decay)
    leaves = [x.detach() for x in leaves if x is not None]
    orders = snake_orders(2, 4, DEVICE)

    def scans(query, key, value, log_decay):
        return averaged_scans(query, key, value, [log_decay, 2 * log_decay], orders)

    def features(*tensors):
        return sum(unit_silu(x).sum() for x in tensors)

    def results(function):
        tangents = [x.sin() for x in leaves]
        with forward_ad.dual_level():
            # One dual argument, the last one, is enough.
            dual = function(*leaves[:-1], forward_ad.make_dual(leaves[-1], tangents[-1]))
            by_level = forward_ad.unpack_dual(dual).tangent
        gradients = grad(lambda *x: function(*x).sin().sum(), tuple(range(len(leaves))))(*leaves)
        batched = vmap(function)(*(torch.stack([x, x / 2]) for x in leaves))
        return [jvp(function, tuple(leaves), tuple(tangents))[1], batched, by_level, *gradients]

    functions = [bidirectional_linear_attention, features] + [scans] * (decay != "none")
    found = [results(function) for function in functions]
    monkeypatch.setattr(backend, "BACKEND", "torch")
    for function, values in zip(functions, found, strict=True):
        torch.testing.assert_close(values, results(function))
        assert values[0].abs().max() > 0


FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "dtypes, allowed, precision",
    [
        ((FLOAT, FLOAT, FLOAT), False, "ieee"),
        ((BRAIN, BRAIN, FLOAT), False, "ieee"),
        ((BRAIN, FLOAT, BRAIN), False, "ieee"),
        ((FLOAT, FLOAT, FLOAT), True, "tf32"),
        ((HALF, HALF, HALF), False, "tf32"),
    ],
)
def test_float32_is_exact_unless_tf32_is_allowed(dtypes, allowed, precision, monkeypatch):
    monkeypatch.setattr(lion_triton, "_tf32_is_allowed", lambda: allowed)
    operator = lion_triton._Operator(*(torch.zeros(1, 1, 5, 16, dtype=x) for x in dtypes), None, None, None, None, 1.0)
    assert operator.precision == precision


# In separate processes: once the newer setting is used, PyTorch raises an error when the older ones are read.
@pytest.mark.parametrize(
    "setting, allowed",
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
    ],
)
@pytest.mark.slow
def test_tf32_is_allowed_by_old_and_new_settings(setting, allowed):
    if "fp32_precision" in setting and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no such setting")
    code = f"import torch; {setting}; from lion_hf.ops.triton import launch; print(launch._tf32_is_allowed())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(allowed)


def test_grids_hold_very_long_texts(monkeypatch):
    """A GPU accepts at most 65535 programs in every dimension of the grid except the first."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in [name for name in vars(lion_triton) if name.endswith("_kernel")]:
        monkeypatch.setattr(lion_triton, name, Recorder())
    x = torch.zeros(1).expand(1, 1, 65536 * 64 + 1, 16)
    operator = lion_triton._Operator(x, x, x, None, None, None, None, 1.0)
    operator.delta(x, x)
    operator.forward(x, None, 0, 0.0)
    operator.backward(x, x, x, x, None, None, None)
    assert len(grids) == 9
    assert all(max(grid[1:]) <= 65535 for grid in grids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--decays", "none", "token"],
        ["--decays", "head", "--packed", "--dtypes", "float16"],
        ["--decays", "token", "--widths", "128", "--dtypes", "float32", "--tf32"],
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_there(options):
    """The compiler accepts the kernels, which the interpreter alone does not show.

    No kernel needs many more registers than there are, or more shared memory than a Hopper GPU has.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "benchmarks/kernel_resources.py"
    command = [sys.executable, "-W", "ignore", str(script), *options]
    table = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    kernels = {"states", "propagate", "forward", "backward", "delta"} | ({"walk"} if "128" not in options else set())
    assert {row["kernel"] for row in rows} >= kernels
    assert all(int(row["stack (bytes)"]) < 1024 for row in rows)
    assert all(float(row["shared (KiB)"]) <= 227 for row in rows)
    assert all(
        int(row["tensor core"]) > 0 for row in rows if row["kernel"] in ("states", "walk", "forward", "backward")
    )


@pytest.mark.parametrize("decay, normalize", [("head", False), ("token", True)])
def test_scans_read_tokens_where_they_lie(decay, normalize, walk, monkeypatch):
    """Outputs and gradients of two snake scans, without a copy of any token."""
    leaves, _ = inputs(1 + 5 * 7, decay, heads=2)
    leaves[:2] = [x.detach().abs().requires_grad_() for x in leaves[:2]]
    orders = snake_orders(5, 7, DEVICE)

    def run(leaves):
        query, key, value, log_decay = leaves
        out = averaged_scans(query, key, value, [log_decay, 2 * log_decay], orders, format="chunk", normalize=normalize)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad((weight * out).sum(), leaves)]

    with monkeypatch.context() as patch:
        patch.setattr(backend, "BACKEND", "torch")
        expected = run([x.detach().double().requires_grad_() for x in leaves])
    monkeypatch.setattr(torch.Tensor, "index_select", None)
    assert_close(run(leaves), expected)


@pytest.mark.parametrize("name", ["query", "value", "log_decay"])
def test_a_nan_stays_in_its_row(name):
    leaves, _ = inputs(34, "token", batch=2)
    leaves = [x.detach().clone() for x in leaves]
    leaves[("query", "key", "value", "log_decay").index(name)][1, 0, 3] = torch.nan
    out = bidirectional_linear_attention(*leaves, check_values=False)
    assert out[0].isfinite().all() and out[1, 1].isfinite().all()
    assert out[1, 0, 3].isnan().any()
