"""Training and inference of LION's models on a GPU against their softmax twins; see bench_gpu.py."""

import math
from collections.abc import Callable

import bench_modern
import torch
from common import (
    ALL_VARIANTS,
    VARIANTS,
    alternate,
    count,
    device_memory,
    device_timer,
    draw_lines,
    failures,
    goal,
    gpu_options,
    image_models,
    print_table,
    save,
    text_models,
    token_axis,
)
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


# Upper limits of the ratio to the twin with SDPA, by case. Images in snake order have a limit of their own.
GOALS = {"image 224": 1.0, "text 128": 1.0, "text 512": 1.0, "text 2048": 0.7, "text 8192": 0.38}
SNAKE_GOAL = 1.1
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}


# ------------------------------------------------------------------------------------------------ training


def training_step(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """Return a training step in bfloat16 autocast with AdamW, on the loss or on an encoder's mean output."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run():
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**inputs)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def eager(run: Callable[[], None]) -> Callable[[], None]:
    def run_eagerly():
        with torch.compiler.set_stance("force_eager"):
            run()

    return run_eagerly


def training_case(case: str, models: dict, inputs: dict[str, Tensor], timer: Callable, arguments) -> list[dict]:
    """Return one row per model, eager and with every layer compiled. Ratios are to the first model."""
    device, runs = arguments.device, {}
    torch.compiler.reset()
    for name, model in models.items():
        step = training_step(model.train(), inputs, device)
        runs[name, "no"] = eager(step)
        if not arguments.no_compile:
            for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
                layer.compile()  # all layers share one compilation, which takes seconds instead of minutes
            runs[name, "yes"] = step
    times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
    peer, rows = next(iter(models)), []
    for (name, compiled), seconds in times.items():
        memory = device_memory(runs[name, compiled], device) if not math.isnan(seconds) else math.nan
        row = {"case": case, "model": name, "compiled": compiled, "ms": 1e3 * seconds}
        rows.append({**row, "/ SDPA twin": seconds / times[peer, compiled], "peak MiB": memory})
    print_table(rows)
    return rows


def goals(rows: list[dict]) -> list[dict]:
    """Compare LION's training steps, eager and compiled, with the goals."""
    found = []
    for row in rows:
        name, case = row["model"], row["case"]
        if name.partition("-")[0] in VARIANTS and case in GOALS:
            at_most = SNAKE_GOAL if "snake" in name else GOALS[case]
            subject = f"{name} / SDPA twin, {case}{', compiled' * (row['compiled'] == 'yes')}"
            found.append(goal(subject, row["/ SDPA twin"], at_most=at_most))
    return found


def training(arguments) -> None:
    device, timer, rows = arguments.device, device_timer(arguments.device), []
    if not arguments.no_images:
        with device:
            models = image_models(arguments.variants, {**BASE, "image_size": arguments.image_size}, eager=True)
        pixels = torch.randn(arguments.image_batch, 3, arguments.image_size, arguments.image_size, device=device)
        inputs = {"pixel_values": pixels, "labels": torch.randint(0, 1000, pixels.shape[:1], device=device)}
        rows += training_case(f"image {arguments.image_size}", models, inputs, timer, arguments)
    for length in arguments.lengths:
        models = None  # frees the memory of the previous models
        with device:
            models = text_models(length, arguments.variants, LARGE)
        ids = torch.randint(1, 30000, (max(1, arguments.batch_tokens // length), length), device=device)
        rows += training_case(f"text {length}", models, {"input_ids": ids}, timer, arguments)

    def picture(*axes):
        for axis, compiled in zip(axes, ("no", "yes"), strict=False):
            drawn = [row for row in rows if row["compiled"] == compiled]
            draw_lines(axis, drawn, "case", "/ SDPA twin", "model")
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set(ylabel="training step / twin with SDPA", title="compiled" if compiled == "yes" else "eager")

    panels = 1 if arguments.no_compile else 2
    save("gpu_training", arguments.output, rows, picture, panels=panels, device=device, goals=goals(rows))


# ------------------------------------------------------------------------------------------------ modern block


def modern(arguments) -> None:
    device, timer, rows = arguments.device, device_timer(arguments.device), []
    for length in arguments.lengths:
        with device:
            models = {name: bench_modern.model(name, arguments.layers) for name in bench_modern.MODELS}
        shape = max(1, arguments.batch_tokens // length), length
        ids = {"input_ids": torch.randint(10, 50000, shape, device=device)}
        runs = {}
        for name, model in models.items():
            runs |= {(name, mode): in_mode(model, mode, ids, device) for mode in bench_modern.MODES}
        times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
        for (name, mode), seconds in times.items():
            memory = device_memory(runs[name, mode], device) if not math.isnan(seconds) else math.nan
            row = {"tokens": length, "mode": mode, "model": name, "ms": 1e3 * seconds}
            peer = times[bench_modern.MODELS[0], mode]
            rows.append({**row, "/ ModernBERT": seconds / peer, "peak MiB": memory})
        print_table(rows[-len(times) :])

    def picture(axis):
        for mode in bench_modern.MODES:
            drawn = [row for row in rows if (row["mode"], row["model"]) == (mode, bench_modern.MODELS[1])]
            axis.plot([row["tokens"] for row in drawn], [row["/ ModernBERT"] for row in drawn], "o-", label=mode)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(ylabel="time / ModernBERT with SDPA")
        token_axis(axis, arguments.lengths)
        axis.legend()

    save("gpu_modern", arguments.output, rows, picture, device=device)


def in_mode(model: nn.Module, mode: str, inputs: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """Return a training step, or a forward pass, of a model that is timed in both modes."""
    step = training_step(model, inputs, device)

    def forward():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            model(**inputs)

    def run():
        model.train(mode == "train")
        (step if mode == "train" else forward)()

    return run


# ------------------------------------------------------------------------------------------------ resolution


def inference(model: nn.Module, pixels: Tensor, format: str | None = None) -> Callable[[], None]:
    def run():
        model.config.format = format  # only LION reads it
        with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16):
            model(pixel_values=pixels)

    return run


def resolution(arguments) -> None:
    device, timer, rows = arguments.device, device_timer(arguments.device), []
    for size in arguments.sizes:
        with device:
            models = image_models([arguments.variant], {**BASE, "image_size": size}, snake=False, eager=True)
        pixels = torch.randn(arguments.batch, 3, size, size, device=device)
        lion = models.pop(arguments.variant).eval()
        runs = {name: inference(model.eval(), pixels) for name, model in models.items()}
        runs |= {f"LION {form}": inference(lion, pixels, form) for form in ("attention", "chunk", "rnn")}
        times = alternate(runs, arguments.seconds, arguments.rounds, timer, failures())
        for name, seconds in times.items():
            memory = device_memory(runs[name], device) if not math.isnan(seconds) else math.nan
            row = {"pixels": size, "model": name, "ms": 1e3 * seconds, "/ ViT": seconds / times["vit"]}
            rows.append({**row, "peak MiB": memory})
        print_table(rows[-len(times) :])

    def picture(*axes):
        for axis, column in zip(axes, ("peak MiB", "ms"), strict=True):
            draw_lines(axis, rows, "pixels", column, "model")
            axis.set(yscale="log", xlabel="pixels on a side", ylabel=f"{column}, batch of {arguments.batch}")

    save("gpu_resolution", arguments.output, rows, picture, panels=2, device=device)


def add_parts(parts) -> None:
    options = gpu_options(training, seconds=5.0, rounds=5)
    parser = parts.add_parser("training", parents=[options], help="time and memory of training steps")
    parser.add_argument("--lengths", type=count, nargs="*", default=[128, 512, 2048, 8192], help="tokens in a text")
    parser.add_argument("--batch_tokens", type=count, default=32768, help="tokens in a batch (at least one row)")
    parser.add_argument("--variants", nargs="+", choices=ALL_VARIANTS, default=VARIANTS, help="default: those of LION")
    parser.add_argument("--image_size", type=count, default=224, help="pixels a side")
    parser.add_argument("--image_batch", type=count, default=256, help="images in a batch")
    parser.add_argument("--no_images", action="store_true", help="time text models only")
    parser.add_argument("--no_compile", action="store_true", help="time eager models only")
    options = gpu_options(modern, seconds=3.0, rounds=3)
    parser = parts.add_parser("modern", parents=[options], help="the modern block against ModernBERT")
    parser.add_argument("--lengths", type=count, nargs="+", default=[128, 512, 2048, 8192], help="tokens in a text")
    parser.add_argument("--batch_tokens", type=count, default=16384, help="tokens in a batch (at least one row)")
    parser.add_argument("--layers", type=count, default=22, help="layers of both models")
    options = gpu_options(resolution, seconds=3.0, rounds=3)
    parser = parts.add_parser("resolution", parents=[options], help="inference of image models by resolution")
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[224, 512, 768, 1024, 1536, 2048, 2496], help="pixels a side"
    )
    parser.add_argument("--batch", type=count, default=8, help="images in a batch")
    parser.add_argument("--variant", choices=ALL_VARIANTS, default="selective", help="variant of LION")
