"""The shared parts of the training scripts: data order, masking, schedules, optimizer groups, checkpoints, streams."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import VARIANTS, text_config, vision_config

import lion_hf


pytestmark = pytest.mark.usefixtures("examples")

WORDS = ["red", "cat", "old", "dog", "saw", "the", "a", "big", "new", "sad"]


@pytest.fixture
def text_file(tmp_path):
    random = np.random.default_rng(0)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(random.choice(WORDS, 9)) for _ in range(60)) + "\n")
    return file


@pytest.fixture
def tokenizer():
    from lion_hf.training.text import train_tokenizer

    return train_tokenizer([" ".join(WORDS)] * 3, 80, 64)


# ----------------------------------------------------------------------------------------------- order of the data


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    repeats=st.integers(1, 3),
)
def test_processes_read_together_what_one_would_read(length, batch_size, world, epoch, repeats):
    from lion_hf.training.data import EpochBatchSampler

    def batches(size, rank, processes):
        sampler = EpochBatchSampler(length, size, seed=5, rank=rank, world_size=processes, repeats=repeats)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    alone = batches(batch_size * world, 0, 1)
    shared = [batches(batch_size, rank, world) for rank in range(world)]
    for i, whole in enumerate(alone):
        parts = [key for rank in range(world) for key in shared[rank][i] if not key.filler]
        assert Counter(parts) == Counter(whole)
    assert {len(batch) for rank in range(world) for batch in shared[rank]} <= set(range(1, batch_size + 1))
    keys = [key for batch in alone for key in batch]
    assert len(set(keys)) == length and all(key.epoch == epoch for key in keys)
    if repeats == 1:
        assert {key.index for key in keys} == set(range(length))


def test_every_epoch_has_an_order_of_its_own():
    from lion_hf.training.data import EpochBatchSampler

    sampler = EpochBatchSampler(100, 10, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([key.index for batch in sampler for key in batch])
    assert orders[0] == orders[2] != orders[1]


def test_the_last_smaller_batch_can_be_left_out():
    from lion_hf.training.data import EpochBatchSampler

    sampler = EpochBatchSampler(21, 4, seed=5, world_size=2, drop_last=True)
    assert [len(batch) for batch in sampler] == [4, 4] and len(sampler) == 2


# --------------------------------------------------------------------------------------------------------- masking


def test_masks_follow_the_recipe(tokenizer):
    from lion_hf.training.data import Key
    from lion_hf.training.text import MaskingCollator

    ids = np.array([tokenizer.cls_token_id, *tokenizer("red cat saw the old dog")["input_ids"][1:-1] * 3000])
    row = MaskingCollator(tokenizer, 0.3, seed=0).mask(ids, Key(0, 0))
    asked = row["labels"] != -100
    assert asked[1:].mean() == pytest.approx(0.3, abs=0.01) and not asked[0]
    assert (row["labels"][asked] == ids[asked]).all() and (row["input_ids"][~asked] == ids[~asked]).all()
    hidden = (row["input_ids"] == tokenizer.mask_token_id)[asked].mean()
    kept = (row["input_ids"] == ids)[asked].mean()
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.02)


def test_masks_depend_on_the_key_alone(tokenizer):
    from lion_hf.training.data import Key
    from lion_hf.training.text import MaskingCollator

    collator = MaskingCollator(tokenizer, 0.5, seed=0)
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "key": Key(0, i)}
        for i, text in enumerate(("red cat", "the dog saw a cat"))
    ]
    both, second = collator(rows), collator(rows[1:])
    assert both["input_ids"][1].equal(second["input_ids"][0]) and both["labels"][1].equal(second["labels"][0])
    width = len(rows[0]["input_ids"])
    assert both["attention_mask"][0].tolist() == [1] * width + [0] * (both["input_ids"].shape[1] - width)
    assert (both["labels"][0, width:] == -100).all()
    masks = {collator([rows[1] | {"key": Key(epoch, 1)}])["labels"].numpy().tobytes() for epoch in range(8)}
    assert len(masks) > 4


# --------------------------------------------------------------------------------------- schedules, optimizer groups


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_start_peak_and_end_where_they_should(kind):
    from lion_hf.training.trainer import learning_rate_share

    options = {"kind": kind, "warmup": 10, "total": 110, "floor": 0.02, "start": 0.1}
    shares = [learning_rate_share(step, **options) for step in range(111)]
    assert shares[0] == pytest.approx(0.1) and shares[10] == 1 and shares[110] == pytest.approx(0.02)
    assert shares[60] == pytest.approx(0.51)  # both kinds reach the middle half-way
    assert all(a < b for a, b in pairwise(shares[:11]))
    assert all(a > b for a, b in pairwise(shares[10:]))


def trainer_for(model, tmp_path, **options):
    from lion_hf.training.arguments import LionTrainingArguments
    from lion_hf.training.trainer import LionTrainer

    options = {"use_cpu": True, "weight_decay": 0.1, "eval_strategy": "no"} | options
    return LionTrainer(model=model, args=LionTrainingArguments(output_dir=str(tmp_path), **options))


def test_the_trainer_follows_the_schedule(tmp_path):
    trainer = trainer_for(torch.nn.Linear(2, 2), tmp_path, learning_rate=1e-3, warmup_steps=0.1, lr_floor=0.02)
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert (rates[0], max(rates), rates[-1]) == (0, 1e-3, pytest.approx(2e-5)) and rates.index(1e-3) == 10


@pytest.mark.parametrize("mask_type", VARIANTS)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_weight_decay_is_for_matrices_unless_all_is_asked_for(mask_type, kind, tmp_path):
    if kind == "text":
        model = lion_hf.LionForMaskedLM(text_config(mask_type, pos_emb=True))
    else:
        model = lion_hf.LionForImageClassification(vision_config(mask_type, pos_emb=True))
    names = {name for name, _ in model.named_parameters()}
    decayed = set(trainer_for(model, tmp_path).get_decay_parameter_names(model)) & names
    spared = names - decayed
    assert all(p.dim() > 1 for name, p in model.named_parameters() if name in decayed)
    for word in ("bias", "decay_logit", "decay_proj", "cls_token", "position_embeddings", "norm"):
        assert all(name in spared for name in names if word in name.lower())
    assert any("q_proj.weight" in name for name in decayed)
    everything = set(trainer_for(model, tmp_path, decay_all=True).get_decay_parameter_names(model))
    assert names <= everything


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_only_complete_checkpoints_are_gone_on_with(tmp_path, caplog):
    from safetensors.torch import save_file

    from lion_hf.training.arguments import LionTrainingArguments
    from lion_hf.training.checkpoints import checkpoint_to_resume

    def checkpoint(step):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"x": torch.zeros(3)}, folder / "model.safetensors")
        torch.save({"x": 1}, folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return folder

    arguments = LionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert checkpoint_to_resume(arguments) is None
    complete = checkpoint(9)
    (checkpoint(10) / "trainer_state.json").unlink()
    (checkpoint(11) / "trainer_state.json").write_text('{"global_')
    whole = (checkpoint(12) / "model.safetensors").read_bytes()
    (tmp_path / "checkpoint-12" / "model.safetensors").write_bytes(whole[:-4])
    (checkpoint(100) / "optimizer.pt").write_bytes(b"PK")
    sharded = checkpoint(101)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00002.safetensors")
    shards = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert checkpoint_to_resume(arguments) == str(complete)
    arguments.resume_from_checkpoint = str(tmp_path / "checkpoint-12")
    with pytest.raises(Exception, match="not a complete checkpoint: model.safetensors is damaged"):
        checkpoint_to_resume(arguments)
    arguments.resume_from_checkpoint = str(sharded)
    with pytest.raises(Exception, match="not a complete checkpoint: model-00002-of-00002.safetensors is missing"):
        checkpoint_to_resume(arguments)
    arguments.resume_from_checkpoint = "no"
    assert checkpoint_to_resume(arguments) is None


def test_a_disk_without_room_is_an_error_before_training(tmp_path, monkeypatch):
    from lion_hf.training import arguments, errors
    from lion_hf.training.checkpoints import check_disk

    options = arguments.LionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_total_limit=2)
    model = lion_hf.LionModel(text_config())
    check_disk(options, model)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(errors.UserError, match="0.0 GB free"):
        check_disk(options, model)


# --------------------------------------------------------------------------------------------------- data, streams


def mlm(text_file: Path, output: Path, *flags: str) -> dict:
    import run_mlm

    tiny = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--use_cpu=true"]
    data = [f"--train_file={text_file}", "--max_length=16", "--vocab_size=60", "--per_device_train_batch_size=8"]
    return run_mlm.main([f"--output_dir={output}", *data, *tiny, "--disable_tqdm=true", "--save_strategy=no", *flags])


def test_a_stream_trains_beyond_its_end_and_keeps_its_validation_rows_apart(text_file, tmp_path):
    metrics = mlm(
        text_file, tmp_path / "out", "--streaming=true", "--max_steps=12", "--max_eval_samples=10",
        "--line_by_line=true", "--eval_strategy=no",
    )  # fmt: skip
    assert math.isfinite(metrics["eval_loss"])  # 12 steps of 8 rows need more than the 50 rows of the stream
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 12


def test_a_stream_needs_a_number_of_steps(text_file, tmp_path):
    from lion_hf.training.errors import UserError

    with pytest.raises(UserError, match="--streaming requires --max_steps"):
        mlm(text_file, tmp_path / "out", "--streaming=true")


def test_workers_of_a_stream_number_their_rows_apart(monkeypatch):
    from lion_hf.training import text

    seen = set()
    for worker in range(3):
        info = type("Info", (), {"num_workers": 3, "id": worker})()
        monkeypatch.setattr(text, "get_worker_info", lambda info=info: info)
        seen |= {text.add_position({}, i)["position"] for i in range(5)}
    assert len(seen) == 15


@pytest.mark.parametrize("flags, message", [
    (["--dataloader_num_workers=2"], "requires separate validation data"),
    (["--max_eval_samples=60"], "the stream ends within its first 60 rows"),
])  # fmt: skip
def test_streams_that_cannot_be_held_out_of_are_errors(text_file, tmp_path, flags, message):
    from lion_hf.training.errors import UserError

    with pytest.raises(UserError, match=message):
        mlm(text_file, tmp_path / "out", "--streaming=true", "--max_steps=2", *flags)


def test_evaluation_alone_needs_a_model_and_leaves_it_as_it_is(text_file, tmp_path):
    import run_mlm

    from lion_hf.training.errors import UserError

    trained = mlm(text_file, tmp_path / "out", "--max_steps=2", "--eval_strategy=no", "--line_by_line=true")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--do_train false requires --model_name_or_path"):
        mlm(text_file, tmp_path / "out", "--do_train=false")
    flags = [f"--train_file={text_file}", "--max_length=16", "--use_cpu=true", "--line_by_line=true"]
    again = [f"--model_name_or_path={tmp_path / 'out'}", f"--output_dir={tmp_path / 'out'}", "--do_train=false"]
    metrics = run_mlm.main([*flags, *again])
    assert metrics["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_yaml_no_is_a_strategy(text_file, tmp_path):
    import run_mlm

    file = tmp_path / "arguments.yaml"
    file.write_text(f"output_dir: {tmp_path}/out\neval_strategy: no\nsave_strategy: no\n")
    with pytest.raises(Exception, match="does not exist"):  # and not an error about False as a strategy
        run_mlm.main([str(file), "--train_file=absent.txt"])


def test_shards_are_read_by_pattern(tmp_path):
    from lion_hf.training.data import load_file
    from lion_hf.training.errors import UserError

    for i in range(3):
        (tmp_path / f"shard-{i}.jsonl").write_text(json.dumps({"text": f"row {i}"}) + "\n")
    assert sorted(load_file(str(tmp_path / "shard-*.jsonl"))["text"]) == ["row 0", "row 1", "row 2"]
    with pytest.raises(UserError, match="no file matches"):
        load_file(str(tmp_path / "absent-*.jsonl"))


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ("\n \n\n", [], "is shorter than one row of --max_length"),
        ("red", [], "is shorter than one row of --max_length"),
        ("\n \n", ["--line_by_line=true"], "holds no text"),
    ],
    ids=["blank", "short", "blank lines"],
)
def test_a_stream_without_a_row_is_an_error_and_no_endless_search(text_file, tmp_path, content, flags, message):
    from lion_hf.training.errors import UserError

    (tmp_path / "train.txt").write_text(content)
    data = [f"--train_file={tmp_path / 'train.txt'}", f"--validation_file={text_file}"]
    with pytest.raises(UserError, match=message):
        mlm(text_file, tmp_path / "out", *data, "--streaming=true", "--max_steps=1", *flags)


def test_models_of_other_kinds_are_refused_before_data_is_read(text_file, tmp_path, monkeypatch):
    import run_mlm

    from lion_hf.training.errors import UserError

    monkeypatch.setattr(run_mlm, "load_texts", lambda *args: pytest.fail("data was read"))
    model = lion_hf.LionForImageClassification(vision_config("lit"))
    model.save_pretrained(tmp_path / "image")
    with pytest.raises(UserError, match="a text model that can fill masks"):
        run_mlm.main([f"--output_dir={tmp_path / 'out'}", f"--model_name_or_path={tmp_path / 'image'}"])
    with pytest.raises(UserError, match="sideways"):
        run_mlm.main([f"--output_dir={tmp_path / 'out'}", "--mask_type=sideways"])


def test_no_evaluation_where_it_is_not_wanted(text_file, tmp_path):
    metrics = mlm(text_file, tmp_path / "out", "--max_steps=2", "--do_eval=false", "--eval_strategy=epoch")
    assert "train_loss" in metrics and not any(name.startswith("eval_") for name in metrics)


def test_the_evaluation_loss_does_not_depend_on_the_batches(text_file, tmp_path):
    flags = ["--max_steps=3", "--line_by_line=true", "--eval_strategy=no"]
    losses = [
        mlm(text_file, tmp_path / str(size), *flags, f"--per_device_eval_batch_size={size}")["eval_loss"]
        for size in (1, 2, 7)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_baselines_train_by_one_flag(text_file, tmp_path, model_type):
    from transformers import AutoModelForMaskedLM

    mlm(text_file, tmp_path / "out", f"--model_type={model_type}", "--max_steps=2", "--eval_strategy=no")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.model_type == model_type


@pytest.mark.parametrize("flags, message", [
    (["--model_type=bert", "--mask_type=lit"], "--mask_type is an option of LION; a 'bert' model does not have it"),
    (["--model_type=bert", "--preset=lion-s-base"], "--preset is an option of LION"),
    (["--model_type=brt"], "allowed are lion, bert, modernbert"),
    (["--preset=lion-x"], "allowed are lion-lit-base"),
    (["--model_type=modernbert", "--hidden_dropout_prob=0.5"], "not an option of a 'modernbert' model"),
    (["--lr_scheduler_type=constant", "--lr_warmup_start=0.1"], "requires --lr_scheduler_type linear or cosine"),
    (["--lr_floor=2"], "0 to 1"),
    (["--lr_scheduler_type=constant", "--lr_floor=0.1"], "requires --lr_scheduler_type linear or cosine"),
    (["--preset=lion-s-tiny-patch16-224"], "allowed are lion-lit-base, lion-lit-large"),
    (["--max_train_samples=0"], "--max_train_samples is 0; it must be at least 1"),
    (["--hidden_size=0"], "--hidden_size is 0; it must be at least 1"),
    (["--learning_rate=nan"], "--learning_rate is nan; it must be at least 0 and finite"),
    (["--weight_decay=inf"], "--weight_decay is inf; it must be at least 0 and finite"),
    (["--warmup_steps=nan"], "--warmup_steps is nan"),
    (["--mlm_probability=nan"], "--mlm_probability is nan; it must be greater than 0 and at most 1"),
    (["--eval_mlm_probability=-1"], "--eval_mlm_probability is -1"),
    (["--hidden_dropout_prob=nan"], "hidden_dropout_prob is nan; it must be a probability"),
    (["--warm_start=unread", "--warm_start_distillation=nan"], "--warm_start_distillation is nan"),
    (["--per_device_train_batch_size=0"], "--per_device_train_batch_size is 0"),
    (["--gradient_accumulation_steps=0"], "--gradient_accumulation_steps is 0"),
    (["--learning_rate=-1"], "--learning_rate is -1"),
    (["--seed=-1"], "--seed is -1"),
    (["--report_to=tensorbord"], "tensorbord"),
    (["--validation_share=1.5"], "--validation_share is 1.5"),
    (["--vocab_size=3"], "--vocab_size is 3; it must be at least 32"),
    (["--train_tokenizer=0"], "--train_tokenizer is 0"),
    (["--eval_strategy=epochs"], "argument --eval_strategy.*epochs"),
    (["arguments.yaml"], "'arguments.yaml': an argument file must come before all flags"),
    (["--train_file=."], "is a folder; give a file, or a pattern"),
    (["--load_best_model_at_end=true", "--metric_for_best_model=acc", "--max_steps=1", "--eval_strategy=steps",
      "--eval_steps=1", "--save_strategy=steps", "--save_steps=1"],
     "is 'acc'; it must be one of eval_loss, eval_masked"),
])  # fmt: skip
def test_wrong_options_are_said(text_file, tmp_path, flags, message):
    from lion_hf.training.errors import UserError

    with pytest.raises(UserError, match=message):
        mlm(text_file, tmp_path / "out", *flags)


# -------------------------------------------------------------------------------------------------- picture of decays


def test_drawn_decays_are_the_ones_the_model_uses(tmp_path, tokenizer):
    from draw_decays import draw_decays, layer_decays

    from lion_hf.training.errors import UserError

    model = lion_hf.LionModel(text_config("decay")).eval()
    torch.testing.assert_close(layer_decays(model)[0], model.layers[0].mixer.decay_logit.sigmoid())
    assert layer_decays(model).shape == (model.config.num_hidden_layers, model.config.num_attention_heads)

    config = vision_config("selective", order="s")
    model = lion_hf.LionForImageClassification(config).eval()
    pixels = torch.randn(1, config.num_channels, config.image_size, config.image_size)
    patches = math.prod(config.grid_size)
    decays = layer_decays(model, pixel_values=pixels)
    assert decays.shape == (config.num_hidden_layers, patches) and ((decays > 0) & (decays < 1)).all()
    tokens = model.lion_vision.embeddings(pixels)
    mixer, norm = model.lion_vision.layers[0].mixer, model.lion_vision.layers[0].mixer_norm
    gates = torch.stack([gate(norm(tokens))[0, 1:] for gate in (mixer.decay_proj, mixer.decay_proj_2)])
    torch.testing.assert_close(decays[0], torch.sigmoid(-gates).mean((0, 2)))

    lit = lion_hf.LionForMaskedLM(text_config("lit"))
    lit.save_pretrained(tmp_path / "lit")
    with pytest.raises(UserError, match="no decays to draw"):
        draw_decays([tmp_path / "lit"], tmp_path / "picture.png")
    model = lion_hf.LionForMaskedLM(text_config("selective", vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "s")
    with pytest.raises(UserError, match="--text"):
        draw_decays([tmp_path / "s"], tmp_path / "picture.png")
    draw_decays([tmp_path / "s"], tmp_path / "picture.png", text="the red cat")
    assert (tmp_path / "picture.png").stat().st_size > 5000


# -------------------------------------------------------------------------------------------------------- evidence


def test_evidence_is_written_with_means_deviations_and_commands(tmp_path):
    from run_evidence import RATES, write

    row = {
        "command": f"python examples/run_mlm.py --train_file {tmp_path}/data/train.txt",
        "learning_rate": RATES[0],
        "sweep": {f"{rate:g}": 2 + rate for rate in RATES},
        "seeds": [1, 2, 3],
        "accuracy": [0.1, 0.2, 0.3],
        "loss": [2.0, 2.0, 2.0],
        "unigram_entropy": 3.0,
        "train_runtime": [60.0, 60.0, 120.0],
    }
    write("text", {"LION-D": row}, tmp_path / "data", tmp_path)
    table = (tmp_path / "text.md").read_text()
    assert "| LION-D | 20.00 ± 10.00 | 2.000 ± 0.000 | 3 | 0.0005 | 1.3 |" in table
    assert "--train_file DATA/train.txt" in table and str(tmp_path) not in table
    assert json.loads((tmp_path / "text.json").read_text())["LION-D"]["accuracy"] == row["accuracy"]
    assert (tmp_path / "text.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_loss_of_parts_adds_up_and_fillers_do_not_count(kind):
    from lion_hf.training.trainer import summed_loss

    logits = torch.randn(6, 3 if kind == "classes" else 1, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0, 2]) if kind == "classes" else torch.randn(6)
    whole = summed_loss({"logits": logits}, labels)
    expected = (
        torch.nn.functional.cross_entropy(logits.float(), labels)
        if kind == "classes"
        else ((logits[:, 0].float() - labels) ** 2).mean()
    )
    torch.testing.assert_close(whole, expected)
    filler = torch.full_like(labels[:1], -100)
    parts = [summed_loss({"logits": logits[i : i + 4]}, labels[i : i + 4], torch.tensor(6)) for i in (0, 4)]
    nothing = summed_loss({"logits": logits[:1]}, filler, torch.tensor(6))
    torch.testing.assert_close(sum(parts), whole)
    assert nothing == 0


def test_label_smoothing_reaches_the_loss(tmp_path):
    model = lion_hf.LionForSequenceClassification(text_config())
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.2)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, -100])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(trainer.compute_loss_func({"logits": logits}, labels), expected)
