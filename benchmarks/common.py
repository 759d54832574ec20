"""What the benchmarks share: alternating timings, peak memory of a fresh process, tables, JSON and pictures."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def alternate(candidates: dict[str, Callable[[], object]], seconds: float = 4.0, rounds: int = 3) -> dict[str, float]:
    """Median seconds of each candidate, all timed in turn so that a busy machine slows them alike.

    At least `rounds` rounds after one for warming up, more until `seconds` have passed.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    start = time.perf_counter()
    while min(map(len, times.values())) < rounds or time.perf_counter() - start < seconds:
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(script: str, *arguments: str) -> float:
    """MiB that `python script arguments` reports on its last line: each case needs a process of its own."""
    command = [sys.executable, script, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def machine() -> dict[str, object]:
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    columns = list(rows[0])
    cells = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)


def save(name: str, output: str, rows: list[dict[str, object]], picture: Callable[[object], None]) -> None:
    """Writes OUTPUT/name.json and OUTPUT/name.png; `picture` draws on a matplotlib axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    picture(axis)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"written: {folder / name}.json and .png")
