"""Time of the operator on a GPU, by length, against softmax attention and other linear attention; see bench_gpu.py.

"distance" is the relative difference between a candidate's output and LION's. The roofline is the time that the least
possible work (see `least_work`) takes at the speeds of a large copy and a large matrix product, which are measured in
the same run.
"""

import itertools
import math
from collections.abc import Callable
from unittest import mock

import torch
from common import (
    alternate,
    count,
    device_timer,
    draw_lines,
    failures,
    goal,
    gpu_options,
    print_table,
    save,
    token_axis,
)
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lion_hf import bidirectional_linear_attention
from lion_hf.ops import backend as lion_backend


HEADS, WIDTH = 12, 64
# Upper limits of the ratio to flash attention, by length, and to two causal calls, from a length up; least share (%) of
# the roofline.
SDPA_GOALS = {512: 0.9, 4096: 0.25, 16384: 0.08}
CAUSAL_GOAL, CAUSAL_GOAL_FROM = 0.4, 2048
ROOFLINE_GOAL = 50
KINDS = {"lit": "none", "decay": "head", "selective": "token"}  # kind of decay, by variant


class Inputs:
    """Query, key and value as a layer produces them, (batch, length, heads, width), and the decays of each variant.

    They are float32 without a GPU, because Triton's interpreter cannot multiply bfloat16.
    """

    def __init__(self, batch: int, length: int, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def normal() -> Tensor:
            return torch.randn(batch, length, HEADS, WIDTH, dtype=dtype, device=device)

        self.leaves = [normal().requires_grad_() for _ in range(3)]
        self.gradient = normal().transpose(1, 2)
        self.decays = {
            "lit": None,
            "decay": (-torch.rand(HEADS, device=device)).requires_grad_(),
            "selective": (-torch.rand(batch, length, HEADS, device=device)).requires_grad_(),
        }

    def runner(self, operator: Callable[..., Tensor], variant: str = "lit", backward: bool = True) -> Callable:
        """Return a call of operator(query, key, value, log_decay), heads first, and of its gradients if `backward`."""
        decay = self.decays[variant]
        leaves = self.leaves if decay is None else [*self.leaves, decay]

        def run():
            with torch.set_grad_enabled(backward):
                log_decay = decay.transpose(1, 2) if variant == "selective" else decay
                out = operator(*(x.transpose(1, 2) for x in self.leaves), log_decay)
                return torch.autograd.grad(out, leaves, self.gradient) if backward else out

        return run


# ------------------------------------------------------------------------------------------------ operators


def lion(format: str, backend: str) -> Callable[..., Tensor]:
    def operator(query, key, value, log_decay):
        with mock.patch.object(lion_backend, "BACKEND", backend):
            return bidirectional_linear_attention(query, key, value, log_decay, format=format)

    return operator


def softmax(backend: SDPBackend) -> Callable[..., Tensor]:
    def operator(query, key, value, _):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return operator


def two_matmuls(query, key, value, _):
    """Compute non-causal linear attention without decay by two matrix products."""
    return query @ (key.transpose(2, 3) @ value * WIDTH**-0.5)


def two_causal_calls(causal: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Build the operator from two calls of causal(query, key, value, log_decay), heads third.

    Its state decays by the gate of the token that it enters, ours by the gate of the token that it leaves. Gates are
    therefore shifted by one token.
    """

    def shifted(gates: Tensor) -> Tensor:
        return F.pad(gates[:, :-1], (0, 0, 1, 0))

    def operator(query, key, value, log_decay):
        tokens = query, key, value = [x.transpose(1, 2) for x in (query, key, value)]
        gates = log_decay.transpose(1, 2) if log_decay.dim() == 3 else log_decay.expand(query.shape[:3])
        out = causal(*tokens, shifted(gates)) + causal(*(x.flip(1) for x in tokens), shifted(gates.flip(1))).flip(1)
        diagonal = (query * key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5 * value
        return (out - diagonal).transpose(1, 2)

    return operator


def operators(device: torch.device) -> dict[str, tuple[Callable[..., Tensor], str]]:
    """Return each candidate with the variant that it computes; softmax attention ignores the decay."""
    on_gpu = device.type == "cuda"
    found = {"SDPA flash": (softmax(SDPBackend.FLASH_ATTENTION), "lit")}
    if on_gpu:
        found["SDPA cuDNN"] = softmax(SDPBackend.CUDNN_ATTENTION), "lit"
    for variant in KINDS:
        # On a GPU the kernels are required: a fallback to PyTorch would be timed under the wrong name.
        found[f"LION {variant}"] = lion("auto", "triton" if on_gpu else lion_backend.BACKEND), variant
        found[f"torch {variant}"] = lion("auto", "torch"), variant
    found["matmuls lit"] = two_matmuls, "lit"
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        print("Two causal calls are not timed. To add them: pip install flash-linear-attention")
    else:
        operator = two_causal_calls(lambda query, key, value, gates: chunk_simple_gla(query, key, value, gates)[0])
        found |= {f"simple_gla {variant}": (operator, variant) for variant in ("decay", "selective") if on_gpu}
    return found


# ------------------------------------------------------------------------------------------------ measurement


def least_work(variant: str, batch: int, length: int, backward: bool) -> tuple[int, float]:
    """Return the least number of bytes and FLOPs that the operator needs.

    Bytes: q, k, v and the output once; in backward q, k, v, dy and three gradients; decays per token and their
    gradients in float32. FLOPs per token and head (a multiply-add counts as two) are the smaller of two numbers.
    Attention form: 2 products with a row of L pairs, and 5 in backward. States: one is written and read in each
    direction (in one direction without decay), and backward has 4 products with states.
    """
    tokens = batch * length * HEADS
    traffic = tokens * WIDTH * 2 * (4 + 7 * backward) + tokens * 4 * (1 + 2 * backward) * (variant == "selective")
    pairs = 2 * length * WIDTH * (2 + 5 * backward)
    states = 2 * WIDTH**2 * (2 + 4 * backward) * (1 if variant == "lit" else 2)
    return traffic, tokens * min(pairs, states)


def ceilings(size: int, timer: Callable, device: torch.device) -> tuple[float, float]:
    """Measure bytes per second of a large copy (reads and writes) and FLOPs per second of a bfloat16 product."""
    a, b, c = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(3))
    source = a.repeat(8, 1)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=c)}, 1, 10, timer)
    return 2 * source.nbytes / times["copy"], 2 * size**3 / times["product"]


def distance(candidate: Callable[[], Tensor], reference: Callable[[], Tensor]) -> float:
    want = reference().float()
    return ((candidate().float() - want).norm() / want.norm()).item()


def compare(
    found: dict, length: int, backward: bool, speeds: tuple[float, float], timer: Callable, arguments
) -> list[dict]:
    batch = max(1, arguments.batch_tokens // length)
    inputs = Inputs(batch, length, arguments.device)
    forward = {name: inputs.runner(*candidate, backward=False) for name, candidate in found.items()}
    runs = {name: inputs.runner(*candidate) for name, candidate in found.items()} if backward else forward
    times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
    rows = []
    for name, seconds in times.items():
        variant, row = found[name][1], {"length": length, "batch": batch}
        row |= {"mode": "forward + backward" if backward else "forward", "operator": name, "ms": 1e3 * seconds}
        row |= {"/ SDPA flash": seconds / times["SDPA flash"], "LION / it": math.nan, "roofline %": math.nan}
        row["distance"] = math.nan
        if "SDPA" not in name and not math.isnan(seconds + times[f"LION {variant}"]):
            traffic, flops = least_work(variant, batch, length, backward)
            row["LION / it"] = times[f"LION {variant}"] / seconds
            row["roofline %"] = 100 * max(traffic / speeds[0], flops / speeds[1]) / seconds
            row["distance"] = distance(forward[name], forward[f"LION {variant}"])
        rows.append(row)
    print_table(rows)
    return rows


def goals(rows: list[dict]) -> list[dict]:
    """Compare the times of forward and backward together with the goals."""
    found = []
    for row in (row for row in rows if row["mode"] != "forward"):
        name, length = row["operator"], row["length"]
        if "LION" in name:
            if length in SDPA_GOALS:
                found.append(goal(f"{name} / SDPA flash, {length}", row["/ SDPA flash"], at_most=SDPA_GOALS[length]))
            found.append(goal(f"{name}, roofline %, {length}", row["roofline %"], at_least=ROOFLINE_GOAL))
        elif "simple_gla" in name and length >= CAUSAL_GOAL_FROM:
            found.append(goal(f"LION / {name}, {length}", row["LION / it"], at_most=CAUSAL_GOAL))
    return found


def main(arguments) -> None:
    timer, found, rows = device_timer(arguments.device), operators(arguments.device), []
    speeds = ceilings(arguments.ceiling_size, timer, arguments.device)
    print(f"copy {speeds[0] / 1e9:.0f} GB/s, matrix product {speeds[1] / 1e12:.1f} TFLOP/s")
    for length, backward in itertools.product(arguments.lengths, (False, True)):
        rows += compare(found, length, backward, speeds, timer, arguments)

    def picture(axis):
        drawn = [row for row in rows if row["mode"] != "forward" and "LION" in row["operator"]]
        draw_lines(axis, drawn, "length", "/ SDPA flash", "operator")
        axis.axhline(1, color="grey", linewidth=0.8)
        token_axis(axis, arguments.lengths)
        axis.set(yscale="log", ylabel="forward + backward / flash SDPA")

    save("gpu_operator", arguments.output, rows, picture, device=arguments.device, goals=goals(rows))


def add_part(parts) -> None:
    options = gpu_options(main, seconds=2.0, rounds=20)
    parser = parts.add_parser(
        "operator", parents=[options], help="time of the operator, ratios and share of the roofline"
    )
    parser.add_argument(
        "--lengths",
        type=count,
        nargs="+",
        default=[128, 197, 512, 1024, 2048, 4096, 16384, 65536],
        help="tokens in a row",
    )
    parser.add_argument("--batch_tokens", type=count, default=16384, help="tokens in a batch (at least one row)")
    parser.add_argument("--ceiling_size", type=count, default=8192, help="rows and columns of the large matrix product")
