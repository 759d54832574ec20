"""Code shared by the benchmarks: alternating timings, counted work, peak memory, models, tables, JSON, pictures."""

import argparse
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTForImageClassification

from lion_hf import LionConfig, LionForImageClassification, LionForMaskedLM, LionModel, LionVisionConfig
from lion_hf.nn.variants import VARIANTS as REGISTRY
from lion_hf.nn.variants import variant_class


Candidate = Callable[[], object]
CPU = torch.device("cpu")
VARIANTS = ("lit", "decay", "selective")  # the variants of the paper, which benchmarks time by default
ALL_VARIANTS = tuple(REGISTRY)


def count(text: str) -> int:
    """Parse an option that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} was given; it must be at least 1")
    return number


def output_folder(text: str) -> Path:
    """Parse an option that must be a writable folder, before anything is timed. `save` creates the folder."""
    folder = Path(text)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{nearest} is not a folder that can be written to")
    return folder


def usable_device(text: str) -> torch.device:
    """Parse an option that must be an available device."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a PyTorch built without this device
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error


def wall_time(run: Candidate) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def cpu_time(run: Candidate) -> float:
    """Return the time that the processors spent on a run, which other programs disturb less than wall time."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def device_timer(device: torch.device) -> Callable[[Candidate], float]:
    """Return a function that measures one run: device seconds from cold caches, or wall time on a CPU.

    The device is first kept busy for a few milliseconds, so that it does not wait for the host between small kernels.
    """
    if device.type != "cuda":
        return wall_time
    scratch = torch.empty(2**30, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_on_device(run: Candidate) -> float:
        for _ in range(16):
            scratch.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return time_on_device


def alternate(
    candidates: dict[Hashable, Candidate],
    seconds: float = 4.0,
    rounds: int = 3,
    timer: Callable[[Candidate], float] = wall_time,
    survive: tuple[type[Exception], ...] = (),
) -> dict[Hashable, float]:
    """Return the median seconds of each candidate, timed in turn so that other work on the machine slows them alike.

    One warm-up round is followed by at least `rounds` rounds, and by more until `seconds` have passed. A candidate that
    raises one of the exceptions in `survive` (out of memory, for example) is reported, left out of later rounds, and
    gets NaN.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in candidates}
    remaining = dict(candidates)
    start = 0.0
    for turn in itertools.count():
        if turn == 1:
            start = time.perf_counter()
        if not remaining or (turn > rounds and time.perf_counter() - start >= seconds):
            break
        for name, run in list(remaining.items()):
            try:
                times[name].append(timer(run))
            except survive as error:
                print(f"{name}: n/a, {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
                del remaining[name]
    return {name: statistics.median(values[1:]) if name in remaining else math.nan for name, values in times.items()}


def compare(
    reference: Candidate,
    candidates: dict[Hashable, Candidate],
    seconds: float = 4.0,
    rounds: int = 7,
    timer: Callable[[Candidate], float] = wall_time,
) -> dict[Hashable, tuple[float, float]]:
    """Return the median seconds of each candidate, and its median ratio to a neighbouring run of the reference.

    In each round the reference runs next to every candidate, so that a change in the speed of the machine between the
    first and the last of many candidates does not enter the ratios.
    """
    times: dict[Hashable, list[tuple[float, float]]] = {name: [] for name in candidates}
    for run in (reference, *candidates.values()):
        run()  # the first run of each warms up
    start = time.perf_counter()
    for turn in itertools.count():
        if turn >= rounds and time.perf_counter() - start >= seconds:
            break
        for name, run in candidates.items():
            # The two take turns in going first, so that the caches favour neither.
            if turn % 2:
                own, other = timer(run), timer(reference)
            else:
                other, own = timer(reference), timer(run)
            times[name].append((own, own / other))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}


class Work(TorchDispatchMode):
    """Count what PyTorch's operators compute while this context is active, in the backward pass too.

    Attributes:
        products: multiply-adds of matrix products.
        elementwise: multiplications and divisions of elements.
        exponentials: exponentials of elements.
    """

    # The position of the first matrix among the arguments. Its last dimension is what the product sums over.
    PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
    ELEMENTWISE = ("mul", "div", "addcmul", "addcdiv")
    EXPONENTIALS = ("exp", "exp2", "expm1")
    # They contain products, but how many does not follow from the shapes in the same way.
    UNKNOWN = ("conv", "attention", "matmul", "einsum", "linear", "::addbmm", "vdot")

    def __init__(self):
        super().__init__()
        self.products = self.elementwise = self.exponentials = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode, operators such as matmul arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        name = name.rstrip("_")  # in place
        if namespace != "aten" or any(word in func._schema.name for word in self.UNKNOWN):
            raise NotImplementedError(f"the work of {func} is not counted")
        if name in self.PRODUCTS:
            self.products += result.numel() * args[self.PRODUCTS[name]].shape[-1]
        elif name in self.ELEMENTWISE and result.is_floating_point():
            self.elementwise += result.numel()
        elif name in self.EXPONENTIALS:
            self.exponentials += result.numel()
        return result


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that end only one candidate on a GPU: no memory, no kernel for this shape or device."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, TritonError


def gpu_options(main: Callable, seconds: float, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all parts of bench_gpu.py share."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.set_defaults(main=main)
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to run on; default: the GPU if there is one, else the CPU",
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="minimum time for each comparison")
    parser.add_argument("--rounds", type=count, default=rounds, help="minimum number of repeats of each candidate")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    return parser


def peak_memory(script: str, *arguments: str) -> float:
    """Return the MiB that `python script arguments` prints on its last line. Each case needs a fresh process."""
    command = [sys.executable, script, *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def added_memory(run: Candidate) -> float:
    """Return the peak memory in MiB that one run adds to this process, as the operating system measures it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory_kib("VmRSS")
    run()
    return (_memory_kib("VmHWM") - before) / 1024


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def device_memory(run: Candidate, device: torch.device) -> float:
    """Return the peak memory of one run in MiB, beyond what the device already held; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def text_models(length: int, variants: list[str], shape: dict[str, object], masked_lm: bool = False) -> dict:
    """Return BERT with SDPA and LION's variants, without dropout, with a masked-LM head or without a head."""
    options = {"hidden_dropout_prob": 0.0, "max_position_embeddings": max(512, length), **shape}
    bert = BertConfig(**options, attention_probs_dropout_prob=0.0)
    bert._attn_implementation = "sdpa"
    models = {"bert": (BertForMaskedLM(bert) if masked_lm else BertModel(bert, add_pooling_layer=False))}
    for variant in variants:
        config = LionConfig(mask_type=variant, **options)
        models[variant] = LionForMaskedLM(config) if masked_lm else LionModel(config, add_pooling_layer=False)
    return models


def image_models(variants: list[str], shape: dict[str, object], snake: bool = True, eager: bool = False) -> dict:
    """Return image classifiers: ViT with SDPA (and with eager attention), and LION's variants (also in snake order)."""
    models = {}
    for name, attention in (("vit", "sdpa"), ("vit-eager", "eager"))[: 1 + eager]:
        config = ViTConfig(**shape, num_labels=1000)
        config._attn_implementation = attention
        models[name] = ViTForImageClassification(config)
    for variant in variants:
        for order in ("normal", "s") if snake and variant_class(variant).scans_taken(2) > 1 else ("normal",):
            config = LionVisionConfig(mask_type=variant, order=order, num_labels=1000, **shape)
            models[variant + ("-snake" if order == "s" else "")] = LionForImageClassification(config)
    return models


def processor() -> str:
    """Return the processor's name and vector units. They matter: AMX makes matrix products several times faster."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    family = f" family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    units = [torch.backends.cpu.get_cpu_capability(), *(["AMX"] if "amx_tile" in facts.get("flags", "") else [])]
    return f"{name}{family}, {', '.join(units)}"


def machine(device: torch.device) -> dict[str, object]:
    on_gpu = {}
    if device.type == "cuda":
        triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
        on_gpu = {"device": torch.cuda.get_device_name(device), "triton": triton}
    return {
        **on_gpu,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def print_table(rows: Sequence[dict[str, object]]) -> None:
    columns = list(rows[0])
    cells = [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "n/a"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def goal(subject: str, value: float, at_most: float = math.inf, at_least: float = -math.inf) -> dict[str, object]:
    """Return one row of the table of goals. A value that was not measured (NaN) is printed as n/a and meets no goal."""
    limit = f"<= {at_most:g}" if math.isfinite(at_most) else f">= {at_least:g}"
    return {"goal": subject, "limit": limit, "measured": value, "met": "yes" if at_least <= value <= at_most else "no"}


def draw_lines(axis, rows: list[dict[str, object]], x: str, y: str, name: str) -> None:
    """Draw one line for each value of the column `name`."""
    for label in dict.fromkeys(row[name] for row in rows):
        chosen = [row for row in rows if row[name] == label]
        axis.plot([row[x] for row in chosen], [row[y] for row in chosen], "o-", label=label)
    axis.legend(fontsize=7)


def token_axis(axis, lengths: Sequence[int]) -> None:
    """Set a logarithmic axis of tokens, with plain numbers at the measured lengths."""
    axis.set(xscale="log", xlabel="tokens")
    axis.set_xticks(lengths, lengths)
    axis.minorticks_off()


def save(
    name: str,
    folder: Path,
    rows: list[dict[str, object]],
    picture: Callable[..., None],
    panels: int = 1,
    device: torch.device = CPU,
    goals: Sequence[dict[str, object]] = (),
) -> None:
    """Write FOLDER/name.json and FOLDER/name.png. `picture` receives one matplotlib axis per panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(device), "rows": _without_nan(rows)}
    if goals:
        print_table(goals)
        result["goals"] = _without_nan(goals)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    figure, axes = pyplot.subplots(1, panels, figsize=(7 * panels, 4.5), squeeze=False)
    picture(*axes.flat)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)
    print(f"{result['machine']}\nwritten: {folder / name}.json and .png")


def _without_nan(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Replace NaN, which JSON does not have, by None."""
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
