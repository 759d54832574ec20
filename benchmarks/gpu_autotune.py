"""The search for the constants of the GPU kernels and for CROSSOVER; see bench_gpu.py."""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from common import alternate, count, device_timer, draw_lines, failures, gpu_options, print_table, save, token_axis
from gpu_operator import KINDS, Inputs, lion


def kernels(inputs: Inputs, format: str, variant: str, constants: dict[str, int]) -> Callable:
    """Forward and backward of the kernels with these constants of ops/triton/launch.py."""
    run = inputs.runner(lion(format, "triton"), variant)

    def with_constants():
        with mock.patch.multiple("lion_hf.ops.triton.launch", **constants):
            run()

    return with_constants


def search_tiles(arguments, timer) -> tuple[list[dict], dict[str, int]]:
    """Every tile size with every number of warps and stages, LION-S: time over the best one's at each length."""
    names = "_TILE", "_WARPS", "_STAGES"
    grid = list(itertools.product(arguments.tiles, arguments.warps, arguments.stages))
    ratios = {choice: {} for choice in grid}
    for length in arguments.lengths:
        inputs = Inputs(max(1, arguments.batch_tokens // length), length, arguments.device)
        runs = {c: kernels(inputs, "auto", "selective", dict(zip(names, c, strict=True))) for c in grid}
        times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
        best = min((t for t in times.values() if not math.isnan(t)), default=math.nan)
        winner = next((c for c in grid if times[c] == best), None)
        print(f"{length} tokens: {1e3 * best:.3g} ms with {names} = {winner}", flush=True)
        for choice, seconds in times.items():
            ratios[choice][str(length)] = seconds / best
    rows = [
        {**dict(zip(names, choice, strict=True)), **row, "mean": statistics.geometric_mean(list(row.values()))}
        for choice, row in ratios.items()
    ]
    rows.sort(key=lambda row: math.inf if math.isnan(row["mean"]) else row["mean"])
    print_table(rows)
    return rows, {name: rows[0][name] for name in names}


def search_chunks(arguments, timer, constants: dict[str, int]) -> list[dict]:
    """Milliseconds of the full form and of every chunk size, by length and kind of decay."""
    rows = []
    for length in arguments.lengths:
        inputs = Inputs(max(1, arguments.batch_tokens // length), length, arguments.device)
        for variant, kind in KINDS.items():
            runs = {"full": kernels(inputs, "attention", variant, constants)}
            for chunk in arguments.chunks:
                runs[f"chunk {chunk}"] = kernels(inputs, "chunk", variant, constants | {"_CHUNK": chunk})
            times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
            rows.append({"length": length, "decay": kind, **{name: 1e3 * t for name, t in times.items()}})
        print_table(rows[-len(KINDS) :])
    return rows


def advise(rows: list[dict], chunks: list[int]) -> tuple[int, dict[str, int]]:
    """The chunk size that is best on the mean over lengths with more than one chunk of any size, and by kind of decay
    the last length up to which the full form is no slower (0: none)."""
    several = [row for row in rows if row["length"] > max(chunks)] or rows
    means = {c: statistics.geometric_mean([row[f"chunk {c}"] for row in several]) for c in chunks}
    chunk = min(chunks, key=lambda c: math.inf if math.isnan(means[c]) else means[c])
    crossover = {}
    for kind in KINDS.values():
        ours = sorted((row for row in rows if row["decay"] == kind), key=lambda row: row["length"])
        full = itertools.takewhile(lambda row: row["full"] <= row[f"chunk {chunk}"], ours)
        crossover[kind] = max((row["length"] for row in full), default=0)
    return chunk, crossover


def require_kernels(device: torch.device) -> None:
    try:
        from lion_hf.ops.triton import launch
    except ImportError as error:
        raise argparse.ArgumentError(None, f"autotune times the fused kernels, and {error}") from error
    reason = launch.unsupported(*Inputs(1, 1, device).leaves)
    if reason is not None:
        raise argparse.ArgumentError(None, f"autotune times the kernels alone, and {reason}")


def main(arguments) -> None:
    require_kernels(arguments.device)
    timer = device_timer(arguments.device)
    tile_rows, constants = search_tiles(arguments, timer)
    chunk_rows = search_chunks(arguments, timer, constants)
    chunk, crossover = advise(chunk_rows, arguments.chunks)
    settings = ", ".join(f"{name} = {value}" for name, value in (constants | {"_CHUNK": chunk}).items())
    print(f'ops/triton/launch.py: {settings}\nops/api.py: CROSSOVER["accelerator"] = {crossover}')

    def picture(axis):
        drawn = [row | {"full / chunk": row["full"] / row[f"chunk {chunk}"]} for row in chunk_rows]
        draw_lines(axis, drawn, "length", "full / chunk", "decay")
        axis.axhline(1, color="grey", linewidth=0.8)
        token_axis(axis, arguments.lengths)
        axis.set(yscale="log", ylabel=f"full form / chunks of {chunk}")

    save("gpu_autotune", arguments.output, tile_rows + chunk_rows, picture, device=arguments.device)


def add_part(parts) -> None:
    options = gpu_options(main, seconds=1.0, rounds=10)
    parser = parts.add_parser("autotune", parents=[options], help="the constants of the kernels, and CROSSOVER")
    parser.add_argument(
        "--lengths", type=count, nargs="+", default=[128, 197, 256, 512, 1024, 2048, 4096, 16384, 65536]
    )
    parser.add_argument("--batch_tokens", type=count, default=16384, help="tokens in a batch (at least one row)")
    parser.add_argument("--tiles", type=count, nargs="+", default=[32, 64, 128], help="tokens in a tile, powers of two")
    parser.add_argument("--warps", type=count, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=count, nargs="+", default=[2, 3])
    parser.add_argument("--chunks", type=count, nargs="+", default=[128, 256, 512, 1024])
