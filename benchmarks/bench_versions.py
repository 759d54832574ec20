"""Time of two versions of the package, to find out whether a change costs speed.

    git worktree add ../before v0.1.0
    python benchmarks/bench_versions.py ../before/src
    python benchmarks/bench_versions.py ../before/src --cases text --seconds 30

Both versions run in turn in one process, with the same weights and inputs: training steps and inference of text models
in each form and of image models in both orders, and the operator alone. The ratio is the time now over the time before:
below 1, this version is faster. Each ratio is the median over pairs of neighbouring runs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from common import VARIANTS, Candidate, count, output_folder, print_table, save, wall_time


TEXT = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}
IMAGE = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
FORMS = ("attention", "chunk", "rnn")


def load_version(source: Path) -> ModuleType:
    """Import the package from a folder of sources, without replacing the version that is already imported."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "lion_hf"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    try:
        import lion_hf

        return lion_hf
    finally:
        sys.path.remove(str(source))
        for name in [name for name in sys.modules if name.partition(".")[0] == "lion_hf"]:
            del sys.modules[name]
        sys.modules.update(ours)


def training_step(model, inputs: dict) -> Candidate:
    def run():
        model.zero_grad(set_to_none=True)
        outputs = model(**inputs)[0]
        (outputs.float().mean() if outputs.dim() else outputs).backward()

    return run


def inference(model, inputs: dict) -> Candidate:
    def run():
        with torch.inference_mode():
            model(**inputs)

    return run


def model_cases(build: Callable[[ModuleType], torch.nn.Module], inputs: dict, versions: dict[str, ModuleType]) -> dict:
    """Return for each mode the runs of one model in both versions, with the same weights."""
    models = {name: build(version) for name, version in versions.items()}
    first = next(iter(models.values()))
    for model in models.values():
        model.load_state_dict(first.state_dict())
    return {
        mode: {name: wrap(model.train(mode == "training"), inputs) for name, model in models.items()}
        for mode, wrap in (("training", training_step), ("inference", inference))
    }


def text_cases(versions: dict[str, ModuleType], length: int):
    for variant in VARIANTS:
        for form, tokens in (("attention", length // 8), ("chunk", length), ("rnn", length)):
            options = {"mask_type": variant, "format": form, "max_position_embeddings": tokens, **TEXT}
            inputs = {"input_ids": torch.randint(1, 30000, (length // tokens, tokens))}

            def build(version, options=options):
                config = version.LionConfig(hidden_dropout_prob=0.0, **options)
                return version.LionModel(config, add_pooling_layer=False)

            for mode, runs in model_cases(build, inputs, versions).items():
                yield {"case": f"text {tokens}", "variant": variant, "form": form, "mode": mode}, runs


def image_cases(versions: dict[str, ModuleType], length: int):
    for variant in VARIANTS:
        for order in ("normal", "s"):
            options = {"mask_type": variant, "order": order, **IMAGE}
            inputs = {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.randint(0, 2, (4,))}

            def build(version, options=options):
                return version.LionForImageClassification(version.LionVisionConfig(**options))

            for mode, runs in model_cases(build, inputs, versions).items():
                yield {"case": f"image, {order}", "variant": variant, "form": "auto", "mode": mode}, runs


def operator_cases(versions: dict[str, ModuleType], length: int):
    decays = {"none": None, "head": -torch.rand(12), "token": -torch.rand(1, 12, length)}
    query, key, value = (torch.randn(1, 12, length, 64, requires_grad=True) for _ in range(3))
    for kind, decay in decays.items():
        decay = decay if decay is None else decay.requires_grad_()
        for form in FORMS:

            def run(version, decay=decay, form=form):
                return lambda: (
                    version.bidirectional_linear_attention(query, key, value, decay, format=form).sum().backward()
                )

            runs = {name: run(version) for name, version in versions.items()}
            yield {"case": f"operator {length}", "variant": f"{kind} decay", "form": form, "mode": "training"}, runs


def paired_ratio(runs: dict[str, Candidate], seconds: float, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of both runs, and the median ratio of neighbouring runs, second over first."""
    (_, first), (_, second) = runs.items()
    first(), second()
    times: list[tuple[float, float]] = []
    while len(times) < rounds or sum(map(sum, times)) < seconds:
        # The two take turns in going first, so that the caches favour neither.
        if len(times) % 2:
            after, before = wall_time(second), wall_time(first)
        else:
            before, after = wall_time(first), wall_time(second)
        times.append((before, after))
    names = [*runs, "ratio"]
    columns = [*zip(*times, strict=True)]
    medians = [1e3 * statistics.median(column) for column in columns]
    return dict(zip(names, [*medians, statistics.median(after / before for before, after in times)], strict=True))


CASES = {"text": text_cases, "image": image_cases, "operator": operator_cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder src of the other version, which holds the package lion_hf")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument(
        "--length", type=count, default=1024, help="tokens in a text; the attention form takes an eighth"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="minimum time for each comparison")
    parser.add_argument("--rounds", type=count, default=11, help="minimum number of pairs of runs for each comparison")
    parser.add_argument("--output", type=output_folder, default="benchmarks/results", help="folder for results")
    arguments = parser.parse_args()
    if not (arguments.before / "lion_hf" / "__init__.py").is_file():
        parser.error(f"{arguments.before} does not hold the package lion_hf. Give the folder src of another version.")
    torch.manual_seed(0)
    import lion_hf

    versions = {"before ms": load_version(arguments.before), "now ms": lion_hf}
    print(" against ".join(f"{version.__version__} ({Path(version.__file__).parent})" for version in versions.values()))
    rows = []
    for name in arguments.cases:
        timed = [
            case | paired_ratio(runs, arguments.seconds, arguments.rounds)
            for case, runs in CASES[name](versions, arguments.length)
        ]
        print_table(timed)
        rows += timed
    ratios = [row["ratio"] for row in rows]
    print(f"ratios: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")

    def picture(axis):
        axis.barh([f"{r['case']}, {r['variant']}, {r['form']}, {r['mode']}" for r in rows], ratios)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.tick_params(axis="y", labelsize=6)
        axis.set(xlabel="now / before", title="below 1 is faster")

    save("bench_versions", arguments.output, rows, picture)


if __name__ == "__main__":
    main()
