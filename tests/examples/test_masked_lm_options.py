"""Options of run_mlm.py: sparse prediction, packed rows, fewer masks in the decay, a stable phase to decay from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import text_config

import lion_hf


pytestmark = pytest.mark.usefixtures("examples", "without_curves")
TEXTS = [" ".join(["red cat", "old dog saw", "the big new"][i % 3] for i in range(1 + n)) for n in range(30)]
TINY = ["--max_length=16", "--vocab_size=60", "--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2"]
TINY += ["--use_cpu=true", "--disable_tqdm=true", "--per_device_train_batch_size=4", "--logging_steps=1"]
TINY += ["--eval_strategy=no"]
STABLE = ["--lr_scheduler_type=warmup_stable_decay", "--warmup_steps=2", "--save_strategy=steps", "--save_steps=3"]


@pytest.fixture
def mlm(tmp_path):
    import run_mlm

    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    data = [f"--train_file={file}", f"--validation_file={file}", "--max_eval_samples=6"]

    def train(name, *flags):
        own = [] if "--model_type=modernbert" in flags else ["--hidden_dropout_prob=0"]
        return run_mlm.main([f"--output_dir={tmp_path / name}", *data, *TINY, *own, *flags])

    return train


@pytest.fixture(scope="module")
def tokenizer():
    from lion_hf.training.text import train_tokenizer

    return train_tokenizer(TEXTS, 60, 64)


def logged(folder, key="loss"):
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in history if key in entry}


# ------------------------------------------------------------------------------------------------ sparse prediction


SMOOTHING, BASELINE = ["--label_smoothing_factor=0.2"], ["--model_type=modernbert"]


@pytest.mark.parametrize(
    "more", [[], *(pytest.param(x, marks=pytest.mark.slow) for x in (SMOOTHING, BASELINE))], ids=str
)
def test_a_run_with_sparse_prediction_is_the_run_without(mlm, tmp_path, more):
    """Also in steps without any masked token, and with accumulation over batches of different numbers of them."""
    flags = ["--max_steps=6", "--save_strategy=no", "--mlm_probability=0.02", "--gradient_accumulation_steps=2"]
    flags += ["--per_device_train_batch_size=1", "--logging_nan_inf_filter=false", *more]
    dense, sparse = mlm("dense", *flags), mlm("sparse", *flags, "--sparse_prediction=true")
    assert json.loads((tmp_path / "sparse/config.json").read_text())["sparse_prediction"] is True
    assert {loss == 0 for loss in logged(tmp_path / "dense").values()} == {True, False}
    np.testing.assert_allclose(
        list(logged(tmp_path / "sparse").values()), list(logged(tmp_path / "dense").values()), rtol=1e-5
    )
    for name in ("eval_loss", "eval_masked_accuracy", "eval_perplexity"):
        assert sparse[name] == pytest.approx(dense[name], rel=1e-5)


def test_metrics_of_sparse_logits_are_those_of_dense_ones():
    import run_mlm

    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[torch.rand(3, 5) < 0.5] = -100
    labels[0, 0] = logits[0, 0].argmax()
    dense, sparse = run_mlm.hits_and_losses(logits, labels), run_mlm.hits_and_losses(logits[labels != -100], labels)
    for one, other in zip(dense, sparse, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one[labels != -100], other[labels != -100])
    empty = run_mlm.hits_and_losses(logits[:0, 0], torch.full((3, 5), -100))
    assert not empty[0].any() and not empty[1].any()


# ------------------------------------------------------------------------------------------------------ packed rows


def test_packed_rows_hold_every_piece_once_and_are_full(tokenizer):
    from lion_hf.training.text import pack_texts, tokenize_pieces

    pieces = tokenize_pieces({"text": TEXTS}, tokenizer, 16)["input_ids"]
    rows = pack_texts({"text": TEXTS}, tokenizer, 16)
    found = []
    for ids, lengths in zip(rows["input_ids"], rows["lengths"], strict=True):
        assert len(ids) == sum(lengths) <= 16
        found += [ids[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]
    assert sorted(found) == sorted(pieces) and max(map(len, pieces)) == 16
    free = sorted(16 - len(ids) for ids in rows["input_ids"])
    assert len(rows["input_ids"]) < len(pieces) and free[0] + free[1] < 16  # no two rows fit into one


def test_a_packed_batch_has_the_loss_of_its_texts_apart(tokenizer):
    from lion_hf.training.data import Key
    from lion_hf.training.text import MaskingCollator, pack_texts

    torch.manual_seed(0)
    columns = pack_texts({"text": TEXTS}, tokenizer, 16)
    last = range(len(columns["lengths"]) - 6, len(columns["lengths"]))  # the rows of several texts
    rows = [{name: values[i] for name, values in columns.items()} | {"key": Key(0, i)} for i in last]
    collator = MaskingCollator(tokenizer, 0.3, seed=1)
    packed = collator.training_batch(collator(rows), decaying=False)
    assert packed.keys() == {"input_ids", "labels", "position_ids"} and packed["input_ids"].shape[0] == 1
    apart = []
    for row in rows:
        masked, start = collator.mask(row["input_ids"], row["key"]), 0
        for length in row["lengths"]:
            part = slice(start, start + length)
            apart.append({"input_ids": masked["input_ids"][part], "labels": masked["labels"][part]})
            start += length
    assert len(apart) > len(rows)
    model = lion_hf.LionForMaskedLM(text_config("selective", pos_emb=True)).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).loss, model(**collator(apart)).loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_on_packed_rows_learns_and_is_evaluated_on_texts(mlm, tmp_path, stream):
    more = ["--streaming=true", "--max_eval_samples=12"] if stream else []
    metrics = mlm("out", "--packing=true", "--max_steps=6", "--save_strategy=no", "--learning_rate=1e-2", *more)
    losses = list(logged(tmp_path / "out").values())
    assert losses[-1] < losses[0] and 0 < metrics["eval_loss"] < 5


# --------------------------------------------------------------------------------------------------- masks in decay


def test_masks_in_the_decay_are_those_of_a_collator_of_that_share(tokenizer):
    from lion_hf.training.data import Key
    from lion_hf.training.text import MaskingCollator, tokenize_pieces

    pieces = tokenize_pieces({"text": TEXTS}, tokenizer, 16)["input_ids"]
    rows = [{"input_ids": ids, "key": Key(2, i)} for i, ids in enumerate(pieces)]
    both = MaskingCollator(tokenizer, 0.5, seed=3, decay_probability=0.2)
    for share, decaying in ((0.5, False), (0.2, True)):
        expected = MaskingCollator(tokenizer, share, seed=3)(rows)
        found = both.training_batch(both(rows), decaying=decaying)
        assert found.keys() == expected.keys() and all(torch.equal(found[x], expected[x]) for x in found)
    assert (both(rows)["labels"] != -100).sum() > (expected["labels"] != -100).sum() > 0


# ------------------------------------------------------------------------------------------- stable phase and decay


def test_a_decay_from_a_checkpoint_is_the_run_that_planned_it(mlm, tmp_path):
    """The same losses, rates, masks and weights as a run that decays in the same steps; resumed too."""
    packing = [*STABLE, "--packing=true", "--decay_mlm_probability=0.15", "--learning_rate=1e-3"]
    mlm("planned", *packing, "--max_steps=9", "--decay_steps=3")
    mlm("stable", *packing, "--max_steps=6", "--decay_steps=0")
    assert set(list(logged(tmp_path / "stable", "learning_rate").values())[2:]) == {0.001}
    mlm("decayed", *packing, "--decay_steps=3", f"--decay_from={tmp_path / 'stable'}", "--learning_rate=0.5")
    said = torch.load(tmp_path / "decayed/training_args.bin", weights_only=False)
    assert said.learning_rate == 0.001, "the rate is that of the checkpoint, and so is the one that is told"
    late = {step: loss for step, loss in logged(tmp_path / "planned").items() if step > 6}
    assert len(late) == 3 and logged(tmp_path / "decayed") == logged(tmp_path / "stable") | late
    rates = list(logged(tmp_path / "decayed", "learning_rate").values())
    assert rates[-3] == 0.001 > rates[-2] > rates[-1] > 0
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("decayed", "planned"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_an_interrupted_decay_goes_on_from_its_own_checkpoint(mlm, tmp_path):
    mlm("stable", *STABLE, "--max_steps=6")
    flags = [*STABLE, "--decay_steps=4", f"--decay_from={tmp_path / 'stable/checkpoint-3'}", "--save_steps=2"]
    mlm("decayed", *flags)
    first, early = logged(tmp_path / "decayed"), logged(tmp_path / "stable")
    assert list(first) == list(range(1, 8)) and all(first[step] == early[step] for step in (1, 2, 3))
    shutil.rmtree(tmp_path / "decayed/checkpoint-7")
    mlm("decayed", *flags, "--learning_rate=0.5")  # the rate is that of the checkpoint
    assert logged(tmp_path / "decayed") == first


def test_fewer_masks_from_the_first_step_of_the_decay(mlm, tmp_path, monkeypatch):
    from lion_hf.training.text import MaskingCollator

    seen, change = [], MaskingCollator.training_batch

    def noting(self, batch, decaying):
        seen.append(decaying)
        return change(self, batch, decaying)

    monkeypatch.setattr(MaskingCollator, "training_batch", noting)
    flags = [*STABLE, "--save_strategy=no", "--max_steps=6", "--decay_mlm_probability=0.1"]
    mlm("out", *flags, "--decay_steps=0.5", "--gradient_accumulation_steps=2")
    assert seen == [False] * 6 + [True] * 6
    rates = list(logged(tmp_path / "out", "learning_rate").values())
    assert rates[2] == rates[3] > rates[4]
    assert "Training masks 30% of the tokens (10% while the learning rate decays), evaluation 15%" in (
        tmp_path / "out/README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("flags, message", [
    (["--decay_steps=2"], "--decay_steps requires --lr_scheduler_type warmup_stable_decay, not 'linear'"),
    (["--decay_steps=-1"], "--decay_steps is -1"),
    (["--decay_mlm_probability=0.5"], "--decay_mlm_probability is 0.5; it must be at most --mlm_probability, 0.3"),
    (["--decay_from=absent", *STABLE, "--decay_steps=3"], "--decay_from 'absent' does not exist"),
    (["--decay_from=.", *STABLE, "--decay_steps=3"], "--decay_from '.' is not a complete checkpoint: trainer_state"),
    (["--decay_from=.", *STABLE], "--decay_from requires --decay_steps of at least 1, not 0"),
    (["--packing=true", "--line_by_line=true"], "--packing cannot be combined with --line_by_line"),
    (["--packing=true", "--model_type=modernbert"], "--packing is an option of LION"),
    (["--sparse_prediction=true", "--model_type=bert"], "--sparse_prediction is not an option of a 'bert' model"),
    (["--phase=stable"], "--phase is 'stable'; it requires a recipe with phases"),
])  # fmt: skip
def test_wrong_options_are_said(tmp_path, flags, message, monkeypatch):
    import run_mlm

    from lion_hf.training.errors import UserError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_mlm.main([f"--output_dir={tmp_path / 'out'}", "--use_cpu=true", *flags])


def test_stable_adamw_names_the_package_that_it_requires(tmp_path, monkeypatch):
    import run_mlm

    from lion_hf.training import arguments
    from lion_hf.training.errors import UserError

    monkeypatch.setattr(arguments, "is_torch_optimi_available", lambda: False)
    with pytest.raises(UserError, match="requires the package torch-optimi.*pip install torch-optimi"):
        run_mlm.main([f"--output_dir={tmp_path / 'out'}", "--optim=stable_adamw"])


@pytest.mark.slow
def test_a_run_with_stable_adamw_learns_and_resumes(mlm, tmp_path):
    pytest.importorskip("optimi")
    flags = ["--optim=stable_adamw", "--max_grad_norm=0", "--learning_rate=1e-2", "--max_steps=6"]
    flags += ["--save_strategy=steps", "--save_steps=3"]
    mlm("out", *flags)
    first = logged(tmp_path / "out")
    assert first[6] < first[1]
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    mlm("out", *flags)
    assert logged(tmp_path / "out") == first


# ------------------------------------------------------------------------------------------- a finished run repeated


def test_repeating_a_finished_run_keeps_the_best_model(mlm, tmp_path):
    best = ["--load_best_model_at_end=true", "--metric_for_best_model=masked_accuracy", "--greater_is_better=false"]
    flags = ["--eval_strategy=steps", "--save_strategy=steps", "--eval_steps=2", "--save_steps=2", "--max_steps=6"]
    flags += ["--learning_rate=2e-2"]
    first = mlm("out", *flags, *best)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert not state["best_model_checkpoint"].endswith("checkpoint-6")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    again = mlm("out", *flags, *best)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before and again["eval_loss"] == first["eval_loss"]
    # A folder that was moved, too; and one without the best checkpoint says so.
    (tmp_path / "out").rename(tmp_path / "moved")
    assert mlm("moved", *flags, *best)["eval_loss"] == first["eval_loss"]
    (tmp_path / "moved" / Path(state["best_model_checkpoint"]).name).rename(tmp_path / "elsewhere")
    from lion_hf.training.errors import UserError

    with pytest.raises(UserError, match="the best checkpoint of the finished run, .* is no longer in"):
        mlm("moved", *flags, *best)
