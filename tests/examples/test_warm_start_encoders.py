"""--warm_start of the training scripts from encoders other than BERT and ViT."""

import importlib
import json

import numpy as np
import pytest
import torch
import transformers
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification

import lion_hf
from lion_hf.convert import from_bert, from_encoder


pytestmark = pytest.mark.usefixtures("examples")

WORDS = ["red", "cat", "old", "dog", "saw", "the", "a", "big", "new", "sad"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
DISTIL = {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24}
QUICK = ["--use_cpu=true", "--disable_tqdm=true", "--max_steps=1", "--eval_strategy=no", "--save_strategy=no"]
QUICK += ["--learning_rate=0", "--logging_steps=1"]
# By class of the source: its options, and the softmax and local layers that are kept by default.
SOURCES = {
    "Bert": ({**SHAPE, "max_position_embeddings": 32}, [], []),
    "Roberta": ({**SHAPE, "max_position_embeddings": 34}, [1, 3], []),
    "DistilBert": ({**DISTIL, "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0}, [1, 3], []),
    "ModernBert": ({**SHAPE, "local_attention": 8, "global_attn_every_n_layers": 2}, [], [1, 3]),
}

OTHERS = ("Roberta", "DistilBert", "ModernBert")


@pytest.fixture
def saved(tmp_path):
    """Function that saves a random text encoder and its tokenizer."""
    from lion_hf.training.text import train_tokenizer

    def save(name, head="Model"):
        tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 80, 32)
        ids = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
        ids |= dict.fromkeys(("bos_token_id", "cls_token_id"), tokenizer.cls_token_id)
        ids |= dict.fromkeys(("eos_token_id", "sep_token_id"), tokenizer.sep_token_id)
        kind = getattr(transformers, name + head)
        torch.manual_seed(0)
        source = kind(kind.config_class(**SOURCES[name][0] | ids))
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        source.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def mlm(folder, source, *flags):
    from run_mlm import main

    text, random = folder / "text.txt", np.random.default_rng(0)
    text.write_text("\n".join(" ".join(random.choice(WORDS, 9)) for _ in range(60)) + "\n")
    data = [f"--train_file={text}", f"--validation_file={text}", "--max_length=16"]
    main([f"--output_dir={folder / 'out'}", f"--warm_start={source}", *data, *QUICK, *flags])
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"][0]["loss"]


def require_equal(model, expected):
    expected = expected.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weights, expected[name]) for name, weights in model.state_dict().items())


@pytest.mark.parametrize(
    "name, packing", [("ModernBert", True), pytest.param("Roberta", False, marks=pytest.mark.slow)]
)
def test_masked_language_models_start_from_the_encoder(tmp_path, saved, name, packing):
    source = saved(name)
    mlm(tmp_path, source, "--mask_type=decay", f"--packing={packing}")
    model = lion_hf.LionForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.mask_type == "decay"
    assert (model.config.softmax_layers, model.config.local_layers) == SOURCES[name][1:]
    require_equal(model.lion, from_encoder(source, "decay", model_class=lion_hf.LionForMaskedLM).lion)


@pytest.mark.parametrize("name", OTHERS)
def test_the_teacher_has_the_hidden_states_of_the_source(saved, name):
    from lion_hf.training.hidden_teacher import HiddenStateTeacher

    source, device = saved(name, "ForMaskedLM"), torch.device("cpu")
    ids = torch.randint(5, 20, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    inputs["attention_mask"][1, 5:] = 0
    inputs["input_ids"] = ids.masked_fill(inputs["attention_mask"] == 0, 0)
    real = getattr(transformers, f"{name}Model").from_pretrained(source).eval()
    states = real(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True).hidden_states
    inputs["token_type_ids"] = torch.zeros_like(ids)  # as tokenizers of BERT give, which not all sources read
    teacher = HiddenStateTeacher(str(source), 1.0, device)
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    assert teacher.loss(states, inputs) < 1e-9
    assert teacher.loss([x + 1 for x in states], inputs) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_distance_to_the_encoder_vanishes_where_no_layer_becomes_lion(tmp_path, saved, name):
    source, loss = saved(name), {}
    for layers, weight in (("none", 0), ("none", 9), ("1", 0), ("1", 9)):
        flags = ["--warm_start_layers", layers, "--hidden_dropout_prob=0", f"--warm_start_distillation={weight}"]
        loss[layers, weight] = mlm(tmp_path, source, *flags)
    assert loss["none", 9] == pytest.approx(loss["none", 0], abs=1e-5)
    assert loss["1", 9] > loss["1", 0] + 1e-3


@pytest.mark.parametrize(
    "name, layers, kept",
    [
        ("ModernBert", ["0", "1"], ([2], [3])),
        ("DistilBert", ["all"], ([], [])),
    ],
)
@pytest.mark.slow
def test_classifiers_start_from_the_encoder_with_the_layers_that_are_chosen(tmp_path, saved, name, layers, kept):
    from run_glue import main

    source, rows = saved(name, "ForMaskedLM"), tmp_path / "rows.csv"
    rows.write_text("sentence,label\n" + "".join(f"{WORDS[i % 10]} cat,{'abc'[i % 3]}\n" for i in range(30)))
    data = ["--task=custom", f"--train_file={rows}", f"--validation_file={rows}", "--max_length=16"]
    flags = [f"--warm_start={source}", "--warm_start_layers", *layers, "--warm_start_distillation=1"]
    main([f"--output_dir={tmp_path / 'out'}", *data, *flags, *QUICK])
    model = lion_hf.LionForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.mask_type == "selective"
    assert (model.config.softmax_layers, model.config.local_layers) == kept
    chosen = layers[0] if layers == ["all"] else [int(x) for x in layers]
    expected = from_encoder(source, layers=chosen, model_class=lion_hf.LionForSequenceClassification)
    require_equal(model.lion.layers, expected.lion.layers)


@pytest.mark.parametrize(
    "name, layers, softmax",
    [
        ("Bert", None, []),
        ("Bert", ["1", "3"], [0, 2]),
        ("Bert", ["none"], [0, 1, 2, 3]),
        ("DistilBert", ["1,3"], [0, 2]),
    ],
)
def test_layers_of_a_bert_are_chosen_as_those_of_other_encoders(saved, name, layers, softmax):
    from lion_hf.training.arguments import TextModelArguments
    from lion_hf.training.models import build_model

    arguments = TextModelArguments(warm_start=str(saved(name)), warm_start_layers=layers)
    model = build_model(transformers.AutoModelForMaskedLM, "lion", arguments, {}, {})
    assert model.config.softmax_layers == softmax
    if name == "Bert":
        expected = from_bert(arguments.warm_start, softmax_layers=softmax, model_class=lion_hf.LionForMaskedLM)
        require_equal(model.lion, expected.lion)


@pytest.mark.parametrize("size", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_image_classifiers_start_from_dinov2_at_the_size_of_its_processor(tmp_path, size):
    """The position table of DINOv2 is that of larger images than its processor gives."""
    from run_image_classification import main

    shape = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
    source = Dinov2ForImageClassification(Dinov2Config(**shape, image_size=20, patch_size=4, num_labels=3))
    with torch.no_grad():
        source.dinov2.embeddings.position_embeddings.normal_()
    source.save_pretrained(tmp_path / "dino")
    crop = {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8}, "image_mean": [0.1] * 3}
    BitImageProcessorPil(**crop).save_pretrained(tmp_path / "dino")
    flags = [f"--warm_start={tmp_path / 'dino'}", "--warm_start_distillation=1", "--order=s"]
    flags += [f"--image_size={size}"] if size else []
    main([f"--output_dir={tmp_path / 'out'}", "--max_train_samples=40", "--max_eval_samples=20", *flags, *QUICK])
    model = lion_hf.LionForImageClassification.from_pretrained(tmp_path / "out")
    side = size or 8
    assert (model.config.image_size, model.config.order, model.config.softmax_layers) == (side, "s", [1, 3])
    expected = from_encoder(tmp_path / "dino", order="s", image_size=side)
    require_equal(model.lion_vision, expected.lion_vision)
    assert list(BitImageProcessorPil.from_pretrained(tmp_path / "out").image_mean) == [0.1] * 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--softmax_layers", "1"], "--softmax_layers cannot be combined .* 'distilbert' model; .*--warm_start_layers"),
        (["--warm_start_layers", "4"], "cannot start from .*layers is .4.; .* from 0 to 3"),
        (["--warm_start_layers", "some"], "--warm_start_layers is 'some'; it must be all, none, or numbers"),
        (["--warm_start={deberta}"], "cannot start from .*'deberta' model, which cannot be converted: "),
        (["--hidden_size=32"], "cannot start from .*hidden_size=32 cannot be chosen"),
        (["--packing=true", "--warm_start_distillation=1"], "--packing cannot be combined"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_options_are_said_before_data_is_read(tmp_path, saved, flags, message):
    from lion_hf.training.errors import UserError

    deberta = transformers.DebertaConfig(**SHAPE, vocab_size=9, architectures=["DebertaModel"])
    deberta.save_pretrained(tmp_path / "deberta")
    flags = [flag.format(deberta=tmp_path / "deberta") for flag in flags]
    with pytest.raises(UserError, match=message) as error:
        mlm(tmp_path, saved("DistilBert"), "--train_file=absent.txt", *flags)
    assert "\n" not in str(error.value)


def test_layers_to_become_lion_need_a_source(tmp_path):
    from lion_hf.training.errors import UserError

    for script in ("run_mlm", "run_glue", "run_image_classification"):
        with pytest.raises(UserError, match="--warm_start_layers requires --warm_start"):
            importlib.import_module(script).main([f"--output_dir={tmp_path / 'out'}", "--warm_start_layers", "all"])


def test_rows_fit_the_positions_that_a_roberta_uses(tmp_path, saved):
    """The table of RoBERTa has rows before that of the first token."""
    from lion_hf.training.errors import UserError

    source = saved("Roberta")
    with pytest.raises(UserError, match="--max_length 34 exceeds the model's 33 positions"):
        mlm(tmp_path, source, "--max_length=34")
