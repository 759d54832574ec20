"""Every benchmark runs (at tiny sizes on a CPU), and the candidates that it compares compute the same function."""

import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import ModernBertConfig, ModernBertModel

from lion_hf import LionConfig, LionModel, bidirectional_linear_attention
from lion_hf.ops.api import CROSSOVER


TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def bench(monkeypatch):
    """Import bench_gpu and its parts, with small shapes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import bench_gpu

    monkeypatch.setattr(bench_gpu.gpu_models, "BASE", TINY)
    monkeypatch.setattr(bench_gpu.gpu_models, "LARGE", TINY)
    monkeypatch.setattr(bench_gpu.gpu_operator, "HEADS", 1)
    monkeypatch.setattr(bench_gpu.gpu_operator, "WIDTH", 16)
    return bench_gpu


def run(bench, part, folder, *arguments):
    """Return the rows that a part of bench_gpu.py writes. A candidate that failed has the time null."""
    short = "--device", "cpu", "--seconds", "0", "--rounds", "1", "--output", str(folder)
    bench.main([part, *arguments, *short])
    assert (folder / f"gpu_{part}.png").stat().st_size > 0
    return json.loads((folder / f"gpu_{part}.json").read_text())["rows"]


def test_operator(bench, tmp_path):
    rows = run(bench, "operator", tmp_path, "--lengths", "5", "40", "--batch_tokens", "10", "--ceiling_size", "8")
    assert {row["operator"] for row in rows} >= {"SDPA flash", "LION lit", "torch selective", "matmuls lit"}
    assert {(row["length"], row["batch"], row["mode"]) for row in rows} == {
        (length, batch, mode) for length, batch in ((5, 2), (40, 1)) for mode in ("forward", "forward + backward")
    }
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["distance"] < 2e-2 for row in rows if "SDPA" not in row["operator"])


def test_training(bench, tmp_path):
    sizes = "--lengths", "8", "--batch_tokens", "16", "--image_size", "32", "--image_batch", "2", "--no_compile"
    rows = run(bench, "training", tmp_path, *sizes)
    images = [row["model"] for row in rows if row["case"] == "image 32"]
    assert images == ["vit", "vit-eager", "lit", "decay", "decay-snake", "selective", "selective-snake"]
    assert [row["model"] for row in rows if row["case"] == "text 8"] == ["bert", "lit", "decay", "selective"]
    assert all(row["ms"] > 0 for row in rows)


def test_resolution(bench, tmp_path):
    rows = run(bench, "resolution", tmp_path, "--sizes", "32", "48", "--batch", "1")
    models = ["vit", "vit-eager", "LION attention", "LION chunk", "LION rnn"]
    assert [(row["pixels"], row["model"]) for row in rows] == [(size, m) for size in (32, 48) for m in models]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_autotune(bench, tmp_path, capsys):
    pytest.importorskip("triton")
    sizes = "--lengths", "17", "--batch_tokens", "17", "--tiles", "16", "--warps", "4"
    tiles, forms = [], []
    for row in run(bench, "autotune", tmp_path, *sizes):
        (tiles if "tile" in row else forms).append(row)
    assert len(tiles) == len(forms) == 3
    assert all(row["forward"] > 0 and row["tile"] == 16 for row in tiles)
    assert all(row["attention"] > 0 and row["chunk"] > 0 for row in forms)
    assert 'CROSSOVER["accelerator"] = {' in capsys.readouterr().out


def run_script(monkeypatch, name, folder, *arguments):
    """Return the rows that `benchmarks/name.py` writes, with small models."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = importlib.import_module(name)
    width = {name: value for name, value in TINY.items() if name != "num_hidden_layers"}
    for constant, value in {"BASE": width, "TINY": TINY, "HEADS": 2, "WIDTH": 8}.items():
        if hasattr(script, constant):
            monkeypatch.setattr(script, constant, value)
    arguments = [name, *arguments, "--seconds", "0", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    assert len(list(folder.glob("*.png"))) == 1
    return json.loads(next(folder.glob("*.json")).read_text())["rows"]


def test_models_are_timed_in_both_precisions(monkeypatch, tmp_path):
    rows = run_script(
        monkeypatch, "bench_models", tmp_path, "--lengths", "8", "--tokens", "16", "--rounds", "1", "--bf16", "--floor"
    )
    cases = {(row["case"], row["model"], row["precision"], row["mode"]) for row in rows}
    assert len(rows) == len(cases) == 2 * 2 * (5 + 7 + 7)
    assert all(row["ratio"] == 1 for row in rows if row["model"] in ("bert", "vit"))
    assert all(row["over float32"] == 1 for row in rows if row["precision"] == "float32")


def test_the_modern_block_is_timed_against_modernbert(monkeypatch, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 50368}

    def small(name, layers):
        if name == "modernbert":
            return ModernBertModel(ModernBertConfig(num_hidden_layers=layers, **sizes))
        return LionModel(LionConfig.from_preset("lion-s-modern-base", num_hidden_layers=layers, **sizes))

    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = importlib.import_module("bench_modern")
    monkeypatch.setattr(script, "model", small)
    monkeypatch.setattr(script, "peak_memory", lambda *_: 2.0)  # in a process of its own
    lengths = "--lengths", "8", "20", "--tokens", "16", "--rounds", "1"
    rows = run_script(monkeypatch, "bench_modern", tmp_path, *lengths, "--padded", "--bf16")
    assert [(row["tokens"], row["rows"], row["mode"], row["precision"], row["model"]) for row in rows] == [
        (length, kind, mode, precision, name)
        for kind in ("full", "padded")
        for length in (8, 20)
        for mode in ("inference", "train")
        for precision in ("float32", "bfloat16")
        for name in ("modernbert", "lion-s-modern")
    ]
    assert all(row["ratio"] == 1 for row in rows if row["model"] == "modernbert")


def test_packing_is_timed_on_documents_of_a_folder(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("word " * n for n in (3, 9, 2, 2, 30, 50)))
    sizes = (
        "--rows",
        "2",
        "--batches",
        "2",
        "--shortest",
        "4",
        "--longest",
        "40",
        "--rounds",
        "1",
        "--variants",
        "decay",
    )
    rows = run_script(monkeypatch, "bench_packing", tmp_path, "--data", str(tmp_path), *sizes)
    assert [row["batch"] for row in rows] == ["padded", "unpadded", "packed"]
    assert all(row["tokens/s"] > 0 for row in rows) and rows[0]["ratio"] == 1


def test_masked_loss_is_timed_with_all_logits_and_those_of_masked_tokens(monkeypatch, tmp_path):
    sizes = ("--batch", "1", "--length", "64", "--vocabulary", "99", "--layers", "1", "--shares", "0.3")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = importlib.import_module("bench_masked_loss")
    # A fresh process for each case takes seconds; one of them is measured here instead.
    monkeypatch.setattr(script, "peak_memory", lambda *arguments: 2.0 if "all" in arguments else 1.0)
    rows = run_script(monkeypatch, "bench_masked_loss", tmp_path, *sizes)
    assert [(row["logits"], row["memory ratio"]) for row in rows] == [("all", 1), ("masked", 0.5)]
    assert all(row["s"] > 0 for row in rows) and rows[0]["time ratio"] == 1


def test_gates_in_half_precision_cost_more_in_bfloat16(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script, sizes = importlib.import_module("bench_gates"), ["--lengths", "32", "64", "--dim", "24", "--heads", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_gates", *sizes, "--output", str(tmp_path)])
    script.main()
    rows = json.loads((tmp_path / "bench_gates.json").read_text())["rows"]
    assert {(row["variant"], row["kind"]) for row in rows} == {
        (variant, kind) for variant in ("decay", "selective") for kind in ("text", "image")
    }
    assert all(0 < row["fp16 worst"] < row["bf16 worst"] < 5e-2 for row in rows)
    assert (tmp_path / "bench_gates.png").stat().st_size > 0


def test_two_versions_are_timed_in_turn(monkeypatch, tmp_path):
    import lion_hf

    source = str(Path(lion_hf.__file__).parents[1])
    few = ["--cases", "operator", "--rounds", "1", "--seconds", "0", "--length", "64"]
    rows = run_script(monkeypatch, "bench_versions", tmp_path, source, *few)
    assert {row["form"] for row in rows} == {"attention", "chunk", "rnn"}
    assert all(row["ratio"] == pytest.approx(row["now ms"] / row["before ms"]) for row in rows)
    assert sys.modules["lion_hf"] is lion_hf, "the other version replaced this one"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("bench_models", ["--variants", "selectiv"], "invalid choice: 'selectiv'"),
        ("bench_models", ["--lengths", "0"], "must be at least 1"),
        ("bench_models", ["--output", __file__], "not a folder that can be written to"),
        ("bench_ops", ["--options", "--only", "decay_per_channel"], "invalid choice: 'decay_per_channel'"),
        ("bench_ops", ["--options", "--longest", "0"], "must be at least 1"),
        ("bench_gates", ["--dim", "24", "--heads", "5"], "[5] must divide --dim 24"),
        ("bench_masked_loss", ["--shares", "0"], "must be greater than 0 and at most 1"),
        ("bench_packing", ["--data", "nowhere"], "nowhere is not a folder with .txt files"),
        ("bench_versions", ["nowhere"], "nowhere does not hold the package lion_hf"),
        ("bench_gpu", ["operator", "--device", "gpu"], "'gpu' cannot be used"),
        ("bench_warm_start", ["--model", "bert", "--text", "nowhere.txt"], "no file nowhere.txt"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(bench, monkeypatch, capsys, script, arguments, message):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_crossover_is_timed(monkeypatch, tmp_path):
    rows = run_script(monkeypatch, "bench_ops", tmp_path, "--crossover", "--tokens", "32")
    assert {row["decay"] for row in rows} == {"none", "head", "token"}
    assert all(row["chunk / attention"] > 0 for row in rows)


def test_every_option_of_the_operator_is_compared(bench, monkeypatch, tmp_path):
    import op_options

    monkeypatch.setattr(op_options, "peak_memory", lambda script, option, name, *case: 1.0 + len(name))
    sizes = "--lengths", "16", "5", "--tokens", "16", "--rounds", "1", "--chunk_size", "8", "--memory_length", "16"
    rows = run_script(monkeypatch, "bench_ops", tmp_path, "--options", *sizes)
    names = ["LION-S", *op_options.OPTIONS]
    timed = {(row["length"], row["option"]): row for row in rows if "length" in row}
    assert list(timed) == [(length, name) for length in (5, 16) for name in names]
    assert all(row["us per token"] > 0 and row["time / LION-S"] > 0 for row in timed.values())
    parts = "multiply-adds, forward", "multiply-adds, with backward"
    for (length, _), row in timed.items():
        same = timed[length, "LION-S"]
        assert all(row[f"{part} / LION-S"] == pytest.approx(row[part] / same[part]) for part in parts)
        assert 0 < row[parts[0]] < row[parts[1]]
    for part in parts:
        assert timed[16, "thin"][part] == timed[16, "LION-S"][part]
        assert timed[16, "backward_all"][part] >= timed[16, "forward"][part]
    memory = {row["option"]: row["memory / LION-S"] for row in rows if "mode" in row}
    assert list(memory) == names and memory["edge"] == 5 / 7


def test_every_argument_that_costs_is_an_option_of_the_benchmark(bench):
    """Each option passes what no other one does, so a new argument of the operator is missing until it is added."""
    import inspect

    import op_options

    from lion_hf.ops import two_sided_attention

    tensors = op_options.make_tensors(1, 6, 4, 2)
    changes = {name: make(tensors) for name, make in op_options.OPTIONS.items()}
    given = set().union(*changes.values())
    different = {tuple((key, id(value)) for key, value in change.items()) for change in changes.values()}
    assert len({*different, ()}) == 1 + len(changes), "two options are the same call, or one is LION-S"
    for name in op_options.OPTIONS:
        call, leaves = op_options.make_call(name, tensors, "chunk", 4)
        assert all(gradient is not None for gradient in torch.autograd.grad(call().sum(), leaves)), name
    free = {"scale", "eps", "format", "chunk_size", "check_values", "value", "return_denominator", "operator"}
    assert given | free | {"key_mask", "cu_seqlens"} == {*inspect.signature(two_sided_attention).parameters, "operator"}


def test_only_linear_options_run_on_long_rows(bench, monkeypatch, tmp_path, capsys):
    import op_options

    monkeypatch.setattr(op_options, "peak_memory", lambda *case: pytest.fail("ran a long row"))
    sizes = "--lengths", "8", "40", "--tokens", "8", "--rounds", "1", "--longest", "16", "--memory_length", "40"
    quadratic = "--form", "attention", "--only", "entered"
    rows = run_script(monkeypatch, "bench_ops", tmp_path / "a", "--options", *quadratic, *sizes)
    assert [(row["length"], row["option"]) for row in rows] == [(8, "LION-S"), (8, "entered")]
    assert "LION-S: the work grows with the square of the length, so it stops at 16 tokens" in capsys.readouterr().out
    monkeypatch.setattr(op_options, "peak_memory", lambda *case: 1.0)
    rows = run_script(monkeypatch, "bench_ops", tmp_path / "c", "--options", "--only", "thin", *sizes)
    assert {row["length"] for row in rows if "length" in row} == {8, 40}
    with pytest.raises(SystemExit, match="beyond --longest 16"):
        run_script(monkeypatch, "bench_ops", tmp_path, "--options", *quadratic, *sizes[:1], *sizes[2:])


def test_goals_of_the_options(bench):
    import op_options

    cost = {("channel", 512): 9.0, ("channel", 2048): 2.0, ("channel", 16384): 2.1, ("entered", 2048): 9.0}
    rows = [{"option": name, "length": length, "time / LION-S": ratio} for (name, length), ratio in cost.items()]
    growth = [{"option": name, "cost per token at 16384 / 2048": r} for name, r in (("LION-S", 1.3), ("channel", 1.4))]
    names = ["channel", "log_weight", "entered"]
    found = {row["goal"]: row["met"] for row in op_options.goals(rows, growth, names, [512, 2048, 16384])}
    assert found == {
        "channel / LION-S, 2048": "yes",
        "channel / LION-S, 16384": "no",
        "log_weight / LION-S, 2048": "no",
        "log_weight / LION-S, 16384": "no",
        "LION-S, cost per token at 16384 / 2048": "yes",
        "channel, cost per token at 16384 / 2048": "no",
        "log_weight, cost per token at 16384 / 2048": "no",
        "entered, cost per token at 16384 / 2048": "no",
    }
    assert op_options.goals(rows, [], ["entered"], [512, 2048]) == []


def test_cost_per_token_is_compared_between_two_lengths(bench, monkeypatch):
    """Two rows of 4 tokens against one of 24: at the same time per token, the ratio of the two calls is 3."""
    import op_options

    monkeypatch.setattr(op_options, "SHORT", 4)
    monkeypatch.setattr(op_options, "LONG", 24)
    monkeypatch.setattr(op_options, "compare", lambda short, long, *limits: dict.fromkeys(long, (1.0, 3.6)))
    arguments = SimpleNamespace(
        tokens=8, form="chunk", chunk_size=4, inference=False, seconds=0, rounds=1, cpu_time=False
    )
    assert op_options.growth(["edge"], arguments, 2, 4) == [
        {"option": "edge", "cost per token at 24 / 4": pytest.approx(1.2)}
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not measure peak memory")
def test_peak_memory_of_one_option_is_measured_in_a_new_process(bench):
    import bench_ops
    from common import peak_memory

    mib = peak_memory(bench_ops.__file__, "--one_option", "edge", "chunk", "16", "inference", "2048")
    assert mib > 4 * 2048 * bench_ops.HEADS * bench_ops.WIDTH / 2**20  # at least the output


def test_ratios_are_those_of_neighbouring_runs(bench, monkeypatch):
    """The machine slows down from run to run, and the ratios stay."""
    import common

    speed = iter(range(1, 99))

    def slower(run):
        return run() * (100 + next(speed))

    found = common.compare(lambda: 1.0, {"a": lambda: 1.0, "b": lambda: 2.0}, seconds=0, rounds=6, timer=slower)
    assert found["a"][1] == pytest.approx(1, abs=0.02) and found["b"][1] == pytest.approx(2, abs=0.04)
    assert found["b"][0] > found["a"][0] > 100


def test_counted_work_is_that_of_the_shapes(bench):
    from common import Work

    a, b, c = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    for context in (torch.enable_grad, torch.inference_mode):
        with context(), Work() as work:
            torch.matmul(a, b)
            torch.einsum("bij,bjk->bik", a, b)
            c.clone().baddbmm_(a.detach(), b)
            torch.addmm(c[0], a[0], b[0]), a[0] @ b[0], a[0] @ b[0, :, 0], b[0, :, 0] @ b[0, :, 1]
        assert work.products == 3 * 3 * 4 * 5 * 6 + 2 * 4 * 5 * 6 + 4 * 5 + 5
        assert work.elementwise == work.exponentials == 0
    with Work() as work:
        (a @ b).sum().backward()
        c.clone().mul_(2).exp().addcmul_(c, c).div(c)
    assert work.products == 2 * 3 * 4 * 5 * 6  # b needs no gradient
    assert work.elementwise == 3 * c.numel() and work.exponentials == c.numel()
    with pytest.raises(NotImplementedError, match="conv"), Work():
        F.conv1d(torch.randn(1, 2, 8), torch.randn(2, 2, 3))


def test_counted_work_of_lion_is_that_of_its_documentation(bench):
    """L^2 (D + V) for the attention form, L (K (D + V) + 4 D V) and the product over the chunks for the chunk form."""
    from common import Work

    batch, heads, length, width, values, size = 2, 3, 48, 8, 4, 16
    query, key = torch.rand(2, batch, heads, length, width)
    value, log_decay = torch.rand(batch, heads, length, values), -torch.rand(batch, heads, length)
    chunks, pairs = length // size, batch * heads
    expected = {
        "attention": length**2 * (width + values),
        "chunk": length * (size * (width + values) + 4 * width * values) + 2 * chunks**2 * width * values,
    }
    for form, products in expected.items():
        with Work() as work:
            bidirectional_linear_attention(query, key, value, log_decay, format=form, chunk_size=size)
        assert work.products == pairs * products


@pytest.mark.parametrize("device, label", [("cpu", "CPU"), ("accelerator", "accelerator")])
def test_the_crossover_on_the_page_is_the_one_in_use(device, label):
    page = (Path(__file__).parents[1] / "docs/benchmarks.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {label} .*$", page, re.MULTILINE)
    assert [int(cell) for cell in row.split("|")[2:5]] == list(CROSSOVER[device].values())


def test_advice_follows_the_times(bench):
    """The choice is the best on the mean over lengths. A choice that failed once is not taken."""
    times = {(64, 4): (1.0, 4.0), (64, 8): (3.0, 2.0), (128, 8): (0.1, math.nan)}
    rows = [
        {"tile": tile, "warps": warps, "forward": forward, "backward": 1 / forward}
        for (tile, warps), pair in times.items()
        for forward in pair
    ]
    assert bench.gpu_autotune.best(rows, "forward") == (64, 4)
    assert bench.gpu_autotune.best(rows, "backward") == (64, 8)


def causal(query, key, value, log_decay):
    """Causal linear attention with gates per token, heads third. A state decays by the gate of the token it enters."""
    sums = log_decay.cumsum(1).transpose(1, 2)
    mask = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).exp().tril()
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return (query.shape[-1] ** -0.5 * query @ key.transpose(2, 3) * mask @ value).transpose(1, 2)


@pytest.mark.parametrize("decay", ["head", "token"])
def test_two_causal_calls_are_the_operator(bench, decay):
    query, key, value = torch.randn(3, 2, 3, 11, 4, dtype=torch.float64)
    log_decay = F.logsigmoid(torch.randn((3,) if decay == "head" else (2, 3, 11), dtype=torch.float64))
    out = bench.gpu_operator.two_causal_calls(causal)(query, key, value, log_decay)
    torch.testing.assert_close(out, bidirectional_linear_attention(query, key, value, log_decay))


def test_goals_are_met_or_not(bench):
    def operator(name, length, mode="forward + backward", **measured):
        return {"operator": name, "length": length, "mode": mode, **measured}

    times = {"/ SDPA flash": 0.2, "roofline %": 60.0, "LION / it": math.nan}
    rows = [operator("LION decay", 4096, **times), operator("LION decay", 16384, **times | {"roofline %": 40.0})]
    rows += [operator("LION decay", 4096, mode="forward", **times), operator("torch decay", 4096, **times)]
    rows += [operator("simple_gla decay", length, **times | {"LION / it": 0.3}) for length in (1024, 2048)]
    found = {row["goal"]: row["met"] for row in bench.gpu_operator.goals(rows)}
    assert found == {
        "LION decay / SDPA flash, 4096": "yes",
        "LION decay, roofline %, 4096": "yes",
        "LION decay / SDPA flash, 16384": "no",
        "LION decay, roofline %, 16384": "no",
        "LION / simple_gla decay, 2048": "yes",
    }
    steps = [("vit", "no", 1.0), ("decay", "no", 1.05), ("decay-snake", "yes", 1.05), ("lit", "yes", math.nan)]
    rows = [{"case": "image 224", "model": m, "compiled": c, "/ SDPA twin": ratio} for m, c, ratio in steps]
    found = {row["goal"]: row["met"] for row in bench.gpu_models.goals(rows)}
    assert found == {
        "decay / SDPA twin, image 224": "no",
        "decay-snake / SDPA twin, image 224, compiled": "yes",
        "lit / SDPA twin, image 224, compiled": "no",
    }


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("variant", ["lit", "decay", "selective"])
def test_least_work_is_linear_in_the_end(bench, variant, backward):
    def work(batch, length):
        return torch.tensor(bench.gpu_operator.least_work(variant, batch, length, backward), dtype=torch.float64)

    assert torch.equal(work(1, 2048), 2 * work(1, 1024))
    assert torch.equal(work(6, 10), 3 * work(2, 10))
    assert work(1, 8)[1] == 4 * work(1, 4)[1]  # in short texts, pairs of tokens are the least work


def test_one_failure_leaves_the_others(bench, capsys):
    from common import alternate

    calls = iter(range(9))

    def fails_late():
        if next(calls) == 2:
            raise torch.OutOfMemoryError("too large\nand more")

    times = alternate({"a": fails_late, "b": lambda: None}, seconds=0, rounds=3, survive=(RuntimeError,))
    assert math.isnan(times["a"]) and times["b"] >= 0
    assert capsys.readouterr().out == "a: n/a, OutOfMemoryError: too large\n"
    calls = iter((2,))
    with pytest.raises(torch.OutOfMemoryError):
        alternate({"a": fails_late}, seconds=0)


def test_memory_too_small_to_measure_has_no_ratio(bench, monkeypatch):
    import bench_ops

    used = {"attention": 0.0, "rnn": 0.0, "chunk": 0.5}
    monkeypatch.setattr(bench_ops, "peak_memory", lambda script, option, kind, form, mode, length: used[form])
    rows = bench_ops.memory(SimpleNamespace(memory_length=32))
    assert len(rows) == 18 and all(math.isnan(row["ratio to attention"]) for row in rows)
    used["attention"] = 2.0
    ratios = {row["form"]: row["ratio to attention"] for row in bench_ops.memory(SimpleNamespace(memory_length=64))}
    assert ratios == {"attention": 1, "rnn": 0, "chunk": 0.25}
