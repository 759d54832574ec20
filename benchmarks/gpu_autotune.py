"""Search for the constants of the GPU kernels and for CROSSOVER; see bench_gpu.py."""

import argparse
import itertools
import math
from collections.abc import Callable
from unittest import mock

import torch
from common import alternate, count, device_timer, draw_lines, failures, gpu_options, print_table, save, token_axis
from gpu_operator import KINDS, Inputs, lion


def kernels(inputs: Inputs, variant: str, backward: bool, choice: tuple[int, int]) -> Callable:
    """Return a run of the kernels with or without backward; `choice` is (tokens per tile, warps per program)."""
    run = inputs.runner(lion("auto", "triton"), variant, backward)
    constants = {"_FORWARD": choice, "_BACKWARD": choice, "_ONE_TILE": (0, 0)}

    def with_constants():
        with mock.patch.multiple("lion_hf.ops.triton.launch", **constants):
            run()

    return with_constants


def search_tiles(arguments, timer) -> list[dict]:
    """Return the milliseconds of forward and of backward for every tile and number of warps, by length and decay."""
    rows = []
    grid = list(itertools.product(arguments.tiles, arguments.warps))
    for length, (variant, kind) in itertools.product(arguments.lengths, KINDS.items()):
        inputs = Inputs(max(1, arguments.batch_tokens // length), length, arguments.device)
        runs = {(c, backward): kernels(inputs, variant, backward, c) for c in grid for backward in (False, True)}
        times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
        for tile, warps in grid:
            forward, both = (1e3 * times[(tile, warps), backward] for backward in (False, True))
            row = {"length": length, "decay": kind, "tile": tile, "warps": warps}
            rows.append(row | {"forward": forward, "backward": both - forward})
        print_table(rows[-len(grid) :])
    return rows


def search_forms(arguments, timer) -> tuple[list[dict], dict[str, int]]:
    """Return the times of the PyTorch forms, and the crossover of the attention and the chunk form.

    The crossover is, for each kind of decay, the largest length up to which the attention form is at least as fast (0
    if it is slower at the first length). These forms run where the kernels cannot.
    """
    rows, crossover = [], {}
    for variant, kind in KINDS.items():
        ours = []
        for length in arguments.lengths:
            inputs = Inputs(max(1, arguments.batch_tokens // length), length, arguments.device)
            runs = {form: inputs.runner(lion(form, "torch"), variant) for form in ("attention", "chunk")}
            times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
            ours.append({"length": length, "decay": kind, **{form: 1e3 * t for form, t in times.items()}})
        print_table(ours)
        first = itertools.takewhile(lambda row: row["attention"] <= row["chunk"], ours)
        crossover[kind] = max((row["length"] for row in first), default=0)
        rows += ours
    return rows, crossover


def require_kernels(device: torch.device) -> None:
    try:
        from lion_hf.ops.triton import launch
    except ImportError as error:
        raise argparse.ArgumentError(
            None, f"autotune times the fused kernels, which cannot be imported: {error}"
        ) from error
    reason = launch.unsupported(*Inputs(1, 1, device).leaves)
    if reason is not None:
        raise argparse.ArgumentError(None, f"autotune times the fused kernels, which cannot run here: {reason}")


def best(rows: list[dict], part: str) -> tuple[int, int]:
    """Return the tile and the number of warps whose times have the least sum of logarithms."""
    totals: dict[tuple[int, int], float] = {}
    for row in rows:
        choice = row["tile"], row["warps"]
        totals[choice] = totals.get(choice, 0.0) + (math.log(row[part]) if row[part] > 0 else math.nan)
    return min(totals, key=lambda c: math.inf if math.isnan(totals[c]) else totals[c])


def main(arguments) -> None:
    require_kernels(arguments.device)
    timer = device_timer(arguments.device)
    tile_rows = search_tiles(arguments, timer)
    form_rows, crossover = search_forms(arguments, timer)
    decayed = [row for row in tile_rows if row["decay"] != "none" and row["length"] > max(arguments.tiles)] or tile_rows
    print(f"ops/triton/launch.py: _FORWARD = {best(decayed, 'forward')}, _BACKWARD = {best(decayed, 'backward')}")
    print(f'ops/api.py: CROSSOVER["accelerator"] = {crossover}')

    def picture(axis):
        drawn = [row | {"attention / chunk": row["attention"] / row["chunk"]} for row in form_rows]
        draw_lines(axis, drawn, "length", "attention / chunk", "decay")
        axis.axhline(1, color="grey", linewidth=0.8)
        token_axis(axis, arguments.lengths)
        axis.set(yscale="log", ylabel="attention form / chunk form, in PyTorch")

    save("gpu_autotune", arguments.output, tile_rows + form_rows, picture, device=arguments.device)


def add_part(parts) -> None:
    options = gpu_options(main, seconds=1.0, rounds=10)
    parser = parts.add_parser(
        "autotune", parents=[options], help="search for the constants of the kernels and for CROSSOVER"
    )
    parser.add_argument(
        "--lengths",
        type=count,
        nargs="+",
        default=[128, 197, 256, 512, 1024, 2048, 4096, 16384],
        help="tokens in a row",
    )
    parser.add_argument("--batch_tokens", type=count, default=16384, help="tokens in a batch (at least one row)")
    parser.add_argument("--tiles", type=count, nargs="+", default=[64, 128], help="tokens in a tile; powers of two")
    parser.add_argument("--warps", type=count, nargs="+", default=[4, 8], help="warps in a program")
