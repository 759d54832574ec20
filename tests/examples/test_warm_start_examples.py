"""--warm_start of the training scripts: weights, tokenizer or image processor, and the hidden states of the source."""

import importlib
import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import lion_hf
from lion_hf.convert import from_bert, from_vit


pytestmark = pytest.mark.usefixtures("examples")

WORDS = ["red", "cat", "old", "dog", "saw", "the", "a", "big", "new", "sad"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
UNREAD = "--train_file=absent.txt"  # any other error was found before data was read
QUICK = ["--use_cpu=true", "--disable_tqdm=true", "--max_steps=2", "--eval_strategy=no", "--save_strategy=no"]


@pytest.fixture
def bert(tmp_path):
    from lion_hf.training.text import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 80, 64)
    config = BertConfig(**SHAPE, vocab_size=len(tokenizer), max_position_embeddings=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def vit(tmp_path):
    config = ViTConfig(**SHAPE, image_size=8, patch_size=4, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1] * 3).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def mlm(folder, source, *flags):
    from run_mlm import main

    text = folder / "text.txt"
    random = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(random.choice(WORDS, 9)) for _ in range(60)) + "\n")
    data = [f"--train_file={text}", f"--validation_file={text}", "--max_length=16", "--logging_steps=1"]
    return main([f"--output_dir={folder / 'out'}", f"--warm_start={source}", *data, *QUICK, *flags])


def first_loss(folder):
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"][0]["loss"]


def test_masked_language_models_start_from_the_source_and_keep_its_tokenizer(tmp_path, bert):
    mlm(tmp_path, bert, "--learning_rate=0", "--mask_type=decay", "--softmax_layers", "1")
    model = lion_hf.LionForMaskedLM.from_pretrained(tmp_path / "out")
    assert (model.config.mask_type, model.config.softmax_layers, model.config.pos_emb) == ("decay", [1], True)
    expected = from_bert(bert, "decay", softmax_layers=[1]).state_dict()
    for name, weights in model.lion.state_dict().items():
        assert torch.equal(weights, expected[name]), name
    vocabulary = AutoTokenizer.from_pretrained(bert).get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocabulary


def test_the_distance_to_the_source_is_part_of_the_training_loss_alone(tmp_path, bert):
    losses, evaluated = {}, {}
    for weight in (0, 1, 3):
        metrics = mlm(tmp_path, bert, f"--warm_start_distillation={weight}", "--learning_rate=0", "--max_steps=1")
        losses[weight], evaluated[weight] = first_loss(tmp_path), metrics["eval_loss"]
    assert losses[1] > losses[0] + 1e-3
    assert losses[3] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)
    assert evaluated[0] == evaluated[3]


def test_with_softmax_everywhere_there_is_no_distance(tmp_path, bert):
    """The student equals its teacher; dropout, which only the student has, is off."""
    losses = []
    for weight in (0, 5):
        flags = ["--softmax_layers", "0", "1", "--hidden_dropout_prob=0", "--learning_rate=0", "--max_steps=1"]
        mlm(tmp_path, bert, *flags, f"--warm_start_distillation={weight}")
        losses.append(first_loss(tmp_path))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_classifiers_start_from_the_source(tmp_path, bert):
    from run_glue import main

    rows = tmp_path / "rows.csv"
    rows.write_text("sentence,label\n" + "".join(f"{WORDS[i % 10]} cat,{'abc'[i % 3]}\n" for i in range(30)))
    data = ["--task=custom", f"--train_file={rows}", f"--validation_file={rows}", "--max_length=16"]
    flags = [f"--warm_start={bert}", "--mask_type=lit", "--learning_rate=0", "--warm_start_distillation=1"]
    main([f"--output_dir={tmp_path / 'out'}", *data, *flags, *QUICK])
    model = lion_hf.LionForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.mask_type == "lit"
    expected = from_bert(bert, "lit").state_dict()
    assert all(torch.equal(weights, expected[name]) for name, weights in model.lion.state_dict().items())


@pytest.mark.parametrize("size", [8, 16])
def test_image_classifiers_start_from_the_source_and_keep_its_processor(tmp_path, vit, size):
    from run_image_classification import main

    flags = [
        f"--warm_start={vit}",
        "--mask_type=decay",
        "--order=s",
        "--learning_rate=0",
        "--warm_start_distillation=1",
    ]
    rows = ["--max_train_samples=40", "--max_eval_samples=20"]
    main([f"--output_dir={tmp_path / 'out'}", *flags, *rows, *QUICK, *([f"--image_size={size}"] if size != 8 else [])])
    model = lion_hf.LionForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.order, model.config.cls_tok, model.config.image_size) == ("s", True, size)
    expected = from_vit(vit, "decay", order="s").lion_vision.layers.state_dict()
    assert all(torch.equal(weights, expected[name]) for name, weights in model.lion_vision.layers.state_dict().items())
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.1] * 3 and processor.size["height"] == size


def test_the_distance_of_parts_adds_up_and_fillers_do_not_count(bert):
    from lion_hf.training.hidden_teacher import HiddenStateTeacher

    teacher = HiddenStateTeacher(str(bert), 0.7, torch.device("cpu"))
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    labels = torch.tensor([[3, -100, 2, 1], [-100, 1, -100, -100], [-100] * 4, [5, 6, 7, -100]])
    inputs = {"input_ids": torch.randint(5, 20, (4, 4)), "attention_mask": torch.ones(4, 4).long(), "labels": labels}
    inputs["attention_mask"][1, 2:] = 0
    student = tuple(torch.randn(4, 4, 16, requires_grad=True) for _ in range(3))

    def loss(rows, items=None):
        return teacher.loss([x[rows] for x in student], {k: v[rows] for k, v in inputs.items()}, items)

    whole, parts = loss(slice(0, 4)), [loss(slice(i, i + 2), 7) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)
    assert loss(slice(2, 3), 7) == 0
    rows = [loss(slice(i, i + 1)) for i in (0, 1, 3)]
    torch.testing.assert_close(whole, (3 * rows[0] + rows[1] + 3 * rows[2]) / 7)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--hidden_size=32", UNREAD], "cannot start from .*hidden_size=32 cannot be chosen"),
        (["--mask_type=foo", UNREAD], "cannot start from .*mask_type is 'foo'"),
        (["--preset=lion-s-base"], "cannot be combined with --preset"),
        (["--model_type=bert"], "cannot be combined with --model_type"),
        (["--model_name_or_path={bert}"], "cannot be combined with --warm_start"),
        (["--softmax_layers", "2", UNREAD], "cannot start from .*softmax_layers is .2.; .*from 0 to 1"),
        (["--warm_start_distillation=-1"], "--warm_start_distillation is -1.0; it must be finite and at least 0"),
        (["--warm_start=nowhere/at/all"], "--warm_start: there is no folder 'nowhere/at/all'"),
        (["--warm_start={gpt2}"], "is a 'gpt2' model, which AutoModelForMaskedLM cannot load"),
        (["--warm_start={lion}", UNREAD], "--warm_start: .* is a LION already; .*use --model_name_or_path"),
    ],
)
def test_wrong_options_are_said_in_one_line(tmp_path, bert, flags, message):
    from lion_hf.training.errors import UserError

    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    lion_hf.LionForMaskedLM(lion_hf.LionConfig(**SHAPE, vocab_size=9)).save_pretrained(tmp_path / "lion")
    flags = [flag.format(bert=bert, gpt2=tmp_path / "gpt2", lion=tmp_path / "lion") for flag in flags]
    with pytest.raises(UserError, match=message) as error:
        mlm(tmp_path, bert, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--hidden_size=32", "--mask_type=foo", "--softmax_layers=2", "--patch_size=2"])
def test_wrong_options_of_images_are_said_before_images_are_read(tmp_path, vit, flag):
    from run_image_classification import main

    from lion_hf.training.errors import UserError

    flags = [
        f"--output_dir={tmp_path / 'out'}",
        f"--warm_start={vit}",
        "--image_size=16",
        "--dataset_name=absent",
        *QUICK,
    ]
    with pytest.raises(UserError, match=f"cannot start from .*{flag[2:].partition('=')[0]}"):
        main([*flags, flag])


@pytest.mark.parametrize(
    "script, flag",
    [
        ("run_mlm", "--mask_type=lit"),
        ("run_glue", "--hidden_size=32"),
        ("run_image_classification", "--patch_size=2"),
    ],
)
def test_an_existing_model_keeps_its_structure(tmp_path, script, flag):
    from lion_hf.training.errors import UserError

    main = importlib.import_module(script).main
    name = flag.partition("=")[0]
    with pytest.raises(UserError, match=f"--model_name_or_path determines the model; .* combined with {name}"):
        main([f"--output_dir={tmp_path / 'out'}", "--model_name_or_path=unread", flag])


@pytest.mark.parametrize("source", ["warm_start", "model_name_or_path"])
@pytest.mark.parametrize("script, flags", [("run_mlm", []), ("run_glue", ["--task=custom"])])
def test_models_keep_the_vocabulary_of_their_source(tmp_path, bert, script, flags, source):
    from lion_hf.training.errors import UserError

    main = importlib.import_module(script).main
    flags = [f"--output_dir={tmp_path / 'out'}", UNREAD, f"--{source}={bert}", "--vocab_size=100", *flags]
    with pytest.raises(
        UserError, match=f"--{source} uses the tokenizer of that model; it cannot be combined with --vocab_size"
    ):
        main(flags)


def test_distillation_needs_a_source(tmp_path):
    from run_mlm import main

    from lion_hf.training.errors import UserError

    with pytest.raises(UserError, match="--warm_start_distillation requires --warm_start"):
        main([f"--output_dir={tmp_path / 'out'}", "--warm_start_distillation=1"])


def test_evidence_compares_the_source_warm_starts_and_cold_ones(bert, tmp_path):
    from run_evidence import warm_models, write

    models = warm_models(bert)
    assert models["BERT, the source"] == f"--model_name_or_path {bert}"
    assert "--softmax_layers 1" in models["LION-S, warm, every second layer softmax"]
    assert "--layer_norm_after true" in models["LION-D, from scratch"], "as the warm start has it"
    assert "--hidden_size 16 --num_hidden_layers 2" in models["LION-D, from scratch"]
    row = {"command": "python", "seeds": [1], "accuracy": [0.2], "loss": [2.0], "train_runtime": [60.0]}
    curves = {name: row | {"curve": [(25, 5.0 + i), (50, 4.0 + i)]} for i, name in enumerate(models)}
    write("warm_start_mlm", curves, tmp_path / "data", tmp_path)
    assert "| LION-D, from scratch | 20.00 | 2.000 | 1 |" in (tmp_path / "warm_start_mlm.md").read_text()
    assert (tmp_path / "warm_start_mlm.png").stat().st_size > 5000
