"""Cost of the options of `two_sided_attention`, over the cost of LION-S (part --options of bench_ops.py)."""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import (
    Work,
    added_memory,
    compare,
    count,
    cpu_time,
    draw_lines,
    goal,
    peak_memory,
    print_table,
    save,
    token_axis,
    wall_time,
)
from torch import Tensor

from lion_hf import bidirectional_linear_attention
from lion_hf.ops import two_sided_attention


REFERENCE = "LION-S"
# What each option changes in a call with one decay per token and head (LION-S), from the tensors of `Tensors`.
OPTIONS: dict[str, Callable[["Tensors"], dict[str, object]]] = {
    "thin": lambda t: {"operator": bidirectional_linear_attention},
    "no_decay": lambda t: {"log_decay": None},
    "head": lambda t: {"log_decay": t.head},
    "channel": lambda t: {"log_decay": t.channel},
    "token_channel": lambda t: {"log_decay": t.token_channel},
    "backward_log_decay": lambda t: {"backward_log_decay": t.backward_log_decay},
    "backward_all": lambda t: {
        "backward_query": t.backward_query,
        "backward_key": t.backward_key,
        "backward_value": t.backward_value,
        "backward_log_decay": t.backward_log_decay,
    },
    "log_weight": lambda t: {"log_weight": t.log_weight},
    "backward_log_weight": lambda t: {"log_weight": t.log_weight, "backward_log_weight": t.backward_log_weight},
    "entered": lambda t: {"convention": "entered"},
    "between": lambda t: {"convention": "between"},
    "edge": lambda t: {"convention": "edge"},
    "forward": lambda t: {"direction": "forward"},
    "diagonal_number": lambda t: {"diagonal": 2.0},
    "diagonal_head": lambda t: {"diagonal": t.factor},
    "diagonal_given": lambda t: {"diagonal": t.diagonal},
    "normalize": lambda t: {"normalize": True},
    "normalize_mask": lambda t: {"normalize": "mask"},
    "normalize_clamp": lambda t: {"normalize": "clamp"},
    "key_groups": lambda t: {"query": t.group_query, "key": t.group_key},
}
# Goals for forward and backward in the chunk form: at most this many times the time of LION-S, from SHORT tokens.
LIMITS = {"channel": 2.0, "token_channel": 2.0, "backward_log_decay": 1.3, "backward_all": 1.3, "log_weight": 1.1}
SHORT, LONG = 2048, 16384
GROWTH = 1.3  # goal for the cost per token at LONG over that at SHORT
PROBE = 256  # tokens; a second probe takes twice as many


class Tensors(NamedTuple):
    """The tensors of all options. Queries, keys, values and decays per channel are laid out as projections are."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    head: Tensor
    channel: Tensor
    token_channel: Tensor
    backward_query: Tensor
    backward_key: Tensor
    backward_value: Tensor
    backward_log_decay: Tensor
    log_weight: Tensor
    backward_log_weight: Tensor
    factor: Tensor
    diagonal: Tensor
    group_query: Tensor
    group_key: Tensor


def make_tensors(batch: int, length: int, heads: int, width: int) -> Tensors:
    """Return positive queries and keys, so that every option may divide by the row sums, and the other tensors."""

    def tokens(draw=torch.rand, heads=heads):
        return draw(batch, length, heads, width).transpose(1, 2)

    def scalars():
        return torch.rand(batch, heads, length)

    tensors = Tensors(
        query=tokens(),
        key=tokens(),
        value=tokens(torch.randn),
        log_decay=-scalars(),
        head=-torch.rand(heads),
        channel=-torch.rand(heads, width),
        token_channel=-tokens(),
        backward_query=tokens(),
        backward_key=tokens(),
        backward_value=tokens(torch.randn),
        backward_log_decay=-scalars(),
        log_weight=torch.randn(batch, heads, length),
        backward_log_weight=torch.randn(batch, heads, length),
        factor=torch.rand(heads),
        diagonal=scalars(),
        group_query=tokens(heads=1),
        group_key=tokens(heads=1),
    )
    return Tensors(*(x.requires_grad_() for x in tensors))


def make_call(name: str, tensors: Tensors, form: str, chunk_size: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a call of the operator with one option, and the tensors that it reads."""
    inputs = {field: getattr(tensors, field) for field in ("query", "key", "value", "log_decay")}
    inputs |= {} if name == REFERENCE else OPTIONS[name](tensors)
    operator = inputs.pop("operator", two_sided_attention)

    def call():
        return operator(**inputs, format=form, chunk_size=chunk_size)

    return call, [x for x in inputs.values() if isinstance(x, Tensor)]


def timer(arguments: argparse.Namespace) -> Callable[[Callable[[], None]], float]:
    return cpu_time if arguments.cpu_time else wall_time


def make_runner(name: str, tensors: Tensors, form: str, chunk_size: int, inference: bool) -> Callable[[], None]:
    call, leaves = make_call(name, tensors, form, chunk_size)
    gradient = torch.randn_like(tensors.value)

    def run():
        if inference:
            with torch.inference_mode():
                call()
        else:
            torch.autograd.grad(call(), leaves, gradient)

    return run


def work(name: str, tensors: Tensors, form: str, chunk_size: int, inference: bool) -> Work:
    run = make_runner(name, tensors, form, chunk_size, inference)
    with Work() as counted:
        run()
    return counted


def is_linear(name: str, form: str, chunk_size: int, width: int) -> bool:
    """Whether twice as many tokens take about twice the work, by the operations counted for one head."""
    done = []
    for length in (PROBE, 2 * PROBE):
        counted = work(name, make_tensors(1, length, 1, width), form, chunk_size, inference=False)
        done.append(counted.products + counted.elementwise + counted.exponentials)
    return done[1] < 3 * done[0]


def affordable(arguments: argparse.Namespace, width: int) -> Callable[[str, int], bool]:
    """Return whether an option may run at a length. Only linear options run beyond `--longest` tokens."""
    known: dict[str, bool] = {}

    def check(name: str, length: int) -> bool:
        if length <= arguments.longest:
            return True
        if name not in known:
            known[name] = is_linear(name, arguments.form, arguments.chunk_size, width)
            if not known[name]:
                print(
                    f"{name}: the work grows with the square of the length, so it stops at {arguments.longest} tokens"
                )
        return known[name]

    return check


def count_row(name: str, tensors: Tensors, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the operations per token and head, of the forward pass and with the backward pass."""
    batch, heads, length, _ = tensors.value.shape
    row = {}
    for suffix, inference in (("forward", True), ("with backward", False)):
        counted = work(name, tensors, arguments.form, arguments.chunk_size, inference)
        for kind, number in (
            ("multiply-adds", counted.products),
            ("elementwise", counted.elementwise),
            ("exponentials", counted.exponentials),
        ):
            row[f"{kind}, {suffix}"] = number / (batch * heads * length)
    return row


def measure(length: int, names: list[str], arguments: argparse.Namespace, heads: int, width: int) -> list[dict]:
    """Return one row for LION-S and for each option, all timed in turn."""
    batch = max(1, arguments.tokens // length)
    tensors = make_tensors(batch, length, heads, width)
    runs = {
        name: make_runner(name, tensors, arguments.form, arguments.chunk_size, arguments.inference)
        for name in (REFERENCE, *names)
    }
    times = compare(runs[REFERENCE], runs, arguments.seconds, arguments.rounds, timer(arguments))
    rows = []
    for name, (seconds, ratio) in times.items():
        counts = count_row(name, tensors, arguments)
        base = rows[0] if rows else counts
        rows.append(
            {"length": length, "option": name, "us per token": 1e6 * seconds / (batch * length), "time / LION-S": ratio}
            | {f"{kind} / LION-S": counts[kind] / base[kind] for kind in counts if kind.startswith("multiply-adds")}
            | counts
        )
    print_table([{key: value for key, value in row.items() if key not in counts} for row in rows])
    print("\nOperations per token and head:\n")
    print_table([{key: row[key] for key in ("length", "option", *counts)} for row in rows])
    return rows


def growth(names: list[str], arguments: argparse.Namespace, heads: int, width: int) -> list[dict[str, object]]:
    """Return the cost per token of each option at LONG tokens over that at SHORT tokens, timed in turn."""
    rows = []
    sizes = {length: max(1, arguments.tokens // length) for length in (SHORT, LONG)}
    tensors = {length: make_tensors(batch, length, heads, width) for length, batch in sizes.items()}
    for name in names:
        short, long = (
            make_runner(name, tensors[length], arguments.form, arguments.chunk_size, arguments.inference)
            for length in sizes
        )
        _, ratio = compare(short, {name: long}, arguments.seconds / 2, arguments.rounds, timer(arguments))[name]
        per_token = ratio * (sizes[SHORT] * SHORT) / (sizes[LONG] * LONG)
        rows.append({"option": name, f"cost per token at {LONG} / {SHORT}": per_token})
    if rows:
        print_table(rows)
    return rows


def memory(script: str, names: list[str], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return the peak memory of LION-S and of each option, each in a fresh process."""
    mode, length = "inference" if arguments.inference else "training", str(arguments.memory_length)
    column, rows = f"peak MiB at {length}", []
    for name in (REFERENCE, *names):
        mib = peak_memory(script, "--one_option", name, arguments.form, str(arguments.chunk_size), mode, length)
        base = rows[0][column] if rows else mib
        # A very short call may use less memory than the system can measure.
        rows.append(
            {"option": name, "mode": mode, column: mib, "memory / LION-S": mib / base if base else float("nan")}
        )
    print_table(rows)
    return rows


def one_option(name: str, form: str, chunk_size: str, mode: str, length: str, heads: int, width: int) -> None:
    """Print the peak memory in MiB that one call adds to the process."""
    for size in (64, int(length)):  # first a short call, which loads lazily imported libraries
        tensors = make_tensors(1, size, heads, width)
        mib = added_memory(make_runner(name, tensors, form, int(chunk_size), mode == "inference"))
    print(mib)


def goals(rows: list[dict], growth_rows: list[dict], names: list[str], lengths: list[int]) -> list[dict[str, object]]:
    """Return the goals of all chosen options. What was not measured is not met."""
    times = {(row["option"], row["length"]): row["time / LION-S"] for row in rows}
    found = [
        goal(f"{name} / LION-S, {length}", times.get((name, length), math.nan), at_most=LIMITS[name])
        for name in names
        if name in LIMITS
        for length in lengths
        if length >= SHORT
    ]
    if {SHORT, LONG} <= set(lengths):
        column = f"cost per token at {LONG} / {SHORT}"
        measured = {row["option"]: row[column] for row in growth_rows}
        found += [
            goal(f"{name}, {column}", measured.get(name, math.nan), at_most=GROWTH) for name in (REFERENCE, *names)
        ]
    return found


def run(arguments: argparse.Namespace, script: str, heads: int, width: int) -> None:
    """Measure the chosen options at all lengths, and write bench_options.json and .png."""
    names, lengths = arguments.only, sorted(set(arguments.lengths))
    may_run = affordable(arguments, width)
    rows = []
    for length in lengths:
        if may_run(REFERENCE, length):
            rows += measure(length, [name for name in names if may_run(name, length)], arguments, heads, width)
    if not rows:
        raise SystemExit(f"nothing was run: all of --lengths are beyond --longest {arguments.longest}")
    growth_rows, memory_rows = [], []
    if {SHORT, LONG} <= set(lengths):
        growth_rows = growth([name for name in (REFERENCE, *names) if may_run(name, LONG)], arguments, heads, width)
    if may_run(REFERENCE, arguments.memory_length):
        memory_rows = memory(script, [name for name in names if may_run(name, arguments.memory_length)], arguments)
    stated = arguments.form == "chunk" and not arguments.inference

    def picture(axis):
        draw_lines(axis, rows, "length", "time / LION-S", "option")
        mode = "forward" if arguments.inference else "forward + backward"
        axis.set(yscale="log", ylabel="time / LION-S", title=f"{arguments.form} form, {mode}, {heads} heads of {width}")
        token_axis(axis, lengths)

    results = rows + growth_rows + memory_rows
    save("bench_options", arguments.output, results, picture, goals=goals(rows, growth_rows, names, lengths) * stated)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of the general operator")
    group.add_argument("--options", action="store_true", help="compare every option of two_sided_attention with LION-S")
    group.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="default: all")
    group.add_argument("--form", choices=("attention", "rnn", "chunk"), default="chunk", help="form of --options")
    group.add_argument("--rounds", type=count, default=7, help="minimum number of repeats of each option")
    group.add_argument("--cpu_time", action="store_true", help="time the processors of --options, on a busy machine")
    group.add_argument(
        "--longest", type=count, default=128, help="longest row for options whose work is not linear in the length"
    )
    group.add_argument("--one_option", nargs=5, help=argparse.SUPPRESS)
