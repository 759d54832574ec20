import json
import re

import pytest
import torch
from small_models import VARIANTS, text_config, vision_config
from transformers import AutoConfig, AutoModel, PreTrainedConfig

import lion_hf
from lion_hf import PAPER_PRESETS, PRESETS, LionConfig, LionVisionConfig


CONFIGS = {"text": LionConfig, "image": LionVisionConfig}
SPELLINGS = [
    *(("mask_type", given, "lit") for given in ("lit", "Lit", "LIT", "lion-lit", "LION-LIT", "Lion-Lit")),
    *(("mask_type", given, "decay") for given in ("decay", "Decay", "DECAY", "lion-d", "LION-D")),
    *(("mask_type", given, "selective") for given in ("selective", "Selective", "SELECTIVE", "lion-s", "LION-S")),
    *(("format", given, "attention") for given in ("attention", "Attention", "ATTENTION")),
    *(("format", given, "rnn") for given in ("rnn", "RNN", "Rnn")),
    *(("format", given, "chunk") for given in ("chunk", "Chunk", "CHUNK")),
    *(("format", given, "auto") for given in ("auto", "Auto", "AUTO")),
    *(("order", given, "normal") for given in ("normal", "Normal", "NORMAL")),
    *(("order", given, "s") for given in ("s", "S", "snake", "Snake")),
    *(("norm_position", given, "pre") for given in ("pre", "Pre")),
    *(("mlp_type", given, "glu") for given in ("glu", "GLU")),
    *(("feature_map", given, "unit_silu") for given in ("unit_silu", "Unit_SiLU")),
]
INVALID = [("mask_type", "softmax"), ("mask_type", "lion"), ("format", "nonsense"), ("format", ""), ("order", "z")]
INVALID += [("norm_position", "sandwich"), ("mlp_type", "moe"), ("feature_map", "relu")]

# Parameter counts of the published models; tied weights count once.
PARAMETERS = {
    "lion-lit-base": 109_537_344,
    "lion-d-base": 109_125_840,
    "lion-s-base": 109_236_432,
    "lion-lit-large": 335_229_760,
    "lion-d-large": 334_656_704,
    "lion-s-large": 335_049_920,
    "lion-lit-tiny-patch16-224": 5_679_592,
    "lion-d-tiny-patch16-224": 5_679_628,
    "lion-d-tiny-patch16-224-snake": 5_679_664,
    "lion-s-tiny-patch16-224": 5_686_540,
    "lion-s-tiny-patch16-224-snake": 5_693_488,
    "lion-lit-small-patch16-224": 21_975_016,
    "lion-d-small-patch16-224": 21_975_088,
    "lion-d-small-patch16-224-snake": 21_975_160,
    "lion-s-small-patch16-224": 22_002_736,
    "lion-s-small-patch16-224-snake": 22_030_456,
    "lion-lit-base-patch16-224": 86_416_360,
    "lion-d-base-patch16-224": 86_416_504,
    "lion-d-base-patch16-224-snake": 86_416_648,
    "lion-s-base-patch16-224": 86_527_096,
    "lion-s-base-patch16-224-snake": 86_637_832,
}


def classes_with(option):
    return [c for c in CONFIGS.values() if option in c.__dataclass_fields__]


# ------------------------------------------------------------------------------------------------------- defaults


def test_an_option_of_an_image_processor_is_no_typo():
    assert LionVisionConfig(do_normalize=True).normalize and LionVisionConfig(do_normalize=False).do_normalize is False


def test_the_models_of_the_paper_are_frozen():
    assert PAPER_PRESETS is PRESETS and PAPER_PRESETS.keys() == PARAMETERS.keys()
    with pytest.raises(TypeError):
        PAPER_PRESETS["lion-s-tiny"] = {}
    with pytest.raises(TypeError):
        PAPER_PRESETS["lion-s-base"]["hidden_size"] = 1


def test_text_defaults_are_bert_base_with_lion_s():
    config = LionConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (3072, 30522, 512)
    assert (config.mask_type, config.format, config.pad_token_id) == ("selective", "auto", 0)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.0)
    assert config.tie_word_embeddings is True


def test_image_defaults_are_base_patch16_224_with_lion_s():
    config = LionVisionConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.image_size, config.patch_size, config.num_channels, config.qkv_bias) == (224, 16, 3, True)
    assert (config.mask_type, config.format, config.order) == ("selective", "auto", "normal")
    assert (config.pos_emb, config.cls_tok) == (False, False)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.drop_path_rate) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("mask_type, expected", [("lit", True), ("decay", False), ("selective", False)])
@pytest.mark.parametrize("option", ["pos_emb", "layer_norm_after"])
def test_text_structure_follows_the_variant_unless_given(option, mask_type, expected):
    assert getattr(LionConfig(mask_type=mask_type), option) is expected
    assert getattr(LionConfig(mask_type=mask_type.upper()), option) is expected
    for given in (True, False):
        assert getattr(LionConfig(mask_type=mask_type, **{option: given}), option) is given


@pytest.mark.parametrize(
    "size, grid", [(224, (14, 14)), ([32, 48], (2, 3)), ((48, 32), (3, 2))], ids=["square", "wide", "tall"]
)
def test_grid_size_counts_patches(size, grid):
    assert LionVisionConfig(image_size=size).grid_size == grid


# ------------------------------------------------------------------------------------------------------ spellings


@pytest.mark.parametrize("option, given, expected", SPELLINGS)
def test_every_spelling_is_normalised_in_the_constructor_and_live(option, given, expected):
    for kind in classes_with(option):
        assert getattr(kind(**{option: given}), option) == expected
        config = kind()
        setattr(config, option, given)
        assert getattr(config, option) == expected


@pytest.mark.parametrize("option, given, expected", SPELLINGS)
def test_every_spelling_is_accepted_at_load(tmp_path, option, given, expected):
    for kind in classes_with(option):
        kind(**{option: expected}).save_pretrained(tmp_path)
        assert getattr(kind.from_pretrained(tmp_path, **{option: given}), option) == expected
        assert getattr(AutoConfig.from_pretrained(tmp_path, **{option: given}), option) == expected


@pytest.mark.parametrize("option, given, expected", SPELLINGS)
def test_every_spelling_is_normalised_from_a_stored_file(tmp_path, option, given, expected):
    for kind in classes_with(option):
        stored = {"model_type": kind.model_type, option: given}
        (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is kind and getattr(config, option) == expected


@pytest.mark.parametrize("option, value", INVALID)
def test_invalid_choices_are_refused_on_all_three_ways(tmp_path, option, value):
    for kind in classes_with(option):
        kind().save_pretrained(tmp_path)
        config = kind()
        kept = getattr(config, option)
        for attempt in (
            lambda kind=kind: kind(**{option: value}),
            lambda kind=kind: kind.from_pretrained(tmp_path, **{option: value}),
            lambda config=config: setattr(config, option, value),
        ):
            with pytest.raises(ValueError, match=f"{option} is {value!r}.*allowed are"):
                attempt()
        assert getattr(config, option) == kept


NO_TEXT = [(option, value) for option in ("mask_type", "format", "order") for value in (3, None, True, ["rnn"])]


# format=None keeps the stored format
@pytest.mark.parametrize("option, value", [x for x in NO_TEXT if x != ("format", None)], ids=str)
def test_choices_that_are_no_text_are_refused(option, value):
    for kind in classes_with(option):
        with pytest.raises(Exception, match=option):
            kind(**{option: value})
        config = kind()
        with pytest.raises(Exception, match=option):
            setattr(config, option, value)


def test_format_given_at_load_reaches_the_model(tmp_path):
    lion_hf.LionModel(text_config()).save_pretrained(tmp_path)
    assert lion_hf.LionModel.from_pretrained(tmp_path, format="RNN").config.format == "rnn"
    assert AutoModel.from_pretrained(tmp_path, format="Chunk").config.format == "chunk"
    with pytest.raises(ValueError, match="format is 'nonsense'.*'chunk'"):
        lion_hf.LionModel.from_pretrained(tmp_path, format="nonsense")


# ----------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize("kind", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 50, "num_attention_heads": 4}, "hidden_size 50 is not divisible by num_attention_heads 4"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        ({"chunk_size": -3}, "chunk_size is -3"),
        ({"chunk_size": 2.5}, "chunk_size.*2.5"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size is -1; it must be at least 1"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob is 1.5; it must be a probability in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob is -0.1; it must be a probability"),
        ({"hidden_size": "wide"}, "hidden_size.*(?s:.*)wide"),
        ({"hidden_act": "nonsense"}, "hidden_act.*nonsense"),
        ({"layer_norm_eps": -1e-6}, "layer_norm_eps.*-1e-06"),
        ({"initializer_range": -0.02}, "initializer_range.*-0.02"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_bad_values_are_named_with_what_is_allowed(kind, options, message):
    with pytest.raises(Exception, match=message):
        kind(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "s"}, "order is 's' in LionConfig.*only 'normal' is allowed"),
        ({"order": "S"}, "only 'normal' is allowed"),
        ({"order": "z"}, "order is 'z'.*allowed are"),
        ({"classifier_dropout": 2}, "classifier_dropout is 2; it must be a probability"),
        ({"vocab_size": 0}, "vocab_size.*0"),
        ({"max_position_embeddings": 0, "mask_type": "lit"}, "max_position_embeddings.*0"),
        ({"type_vocab_size": -1}, "type_vocab_size is -1; it must be at least 0"),
        ({"pad_token_id": None, "roberta_positions": True}, "pad_token_id is None with roberta_positions=True"),
        ({"pooler_act": "tan"}, "pooler_act is 'tan'; allowed are"),
        ({"pos_emb": "yes"}, "pos_emb"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_bad_text_values_are_named_with_what_is_allowed(options, message):
    with pytest.raises(Exception, match=message):
        LionConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 225}, "image_size 225 is not divisible by patch_size 16"),
        ({"image_size": [224, 230]}, r"image_size \[224, 230\] is not divisible by patch_size 16"),
        ({"image_size": [224]}, r"image_size \[224\]"),
        ({"image_size": [32, 32, 32]}, r"image_size"),
        ({"image_size": 0}, "image_size 0"),
        ({"image_size": -16}, "image_size -16"),
        ({"patch_size": 0}, "patch_size is 0; it must be at least 1"),
        ({"num_channels": 0}, "num_channels is 0; it must be at least 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it must be a probability in \[0, 1\)"),
        ({"qkv_bias": "yes"}, "qkv_bias"),
        ({"append_patch_mean": True}, "append_patch_mean is True, but cls_tok is False"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_bad_image_values_are_named_with_what_is_allowed(options, message):
    with pytest.raises(Exception, match=message):
        LionVisionConfig(**options)


def test_order_normal_means_nothing_on_text_and_is_accepted(tmp_path):
    config = LionConfig(order="Normal")
    assert config.to_dict() == LionConfig().to_dict()
    config.save_pretrained(tmp_path)
    LionConfig.from_pretrained(tmp_path, order="normal")
    with pytest.raises(ValueError, match="only 'normal' is allowed"):
        LionConfig.from_pretrained(tmp_path, order="s")
    with pytest.raises(ValueError, match="only 'normal' is allowed"):
        config.order = "s"


@pytest.mark.parametrize(
    "kind, given, meant",
    [
        (LionConfig, "masktype", "mask_type"),
        (LionConfig, "chunksize", "chunk_size"),
        (LionConfig, "num_hidden_layer", "num_hidden_layers"),
        (LionConfig, "layernorm_after", "layer_norm_after"),
        (LionVisionConfig, "cls_token", "cls_tok"),
        (LionVisionConfig, "droppath_rate", "drop_path_rate"),
        (LionVisionConfig, "patchsize", "patch_size"),
    ],
)
def test_misspelt_options_are_refused_with_the_right_name(kind, given, meant):
    with pytest.raises(ValueError, match=f"no option {given!r}; did you mean {meant!r}"):
        kind(**{given: 2})


@pytest.mark.parametrize("kind", CONFIGS.values(), ids=CONFIGS)
def test_foreign_options_and_those_of_transformers_are_kept(kind):
    config = kind(num_labels=7, problem_type="regression", my_note="hello")
    assert (config.num_labels, config.problem_type, config.my_note) == (7, "regression", "hello")


# -------------------------------------------------------------------------------------------- save, load, override


def assert_same_options(loaded, config):
    assert type(loaded) is type(config) and loaded.num_labels == config.num_labels
    for name in type(config).__annotations__:
        assert getattr(loaded, name) == getattr(config, name), name


@pytest.mark.parametrize("pos_emb", [None, True, False])
@pytest.mark.parametrize("layer_norm_after", [None, True, False])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_text_configuration_survives_save_and_load(tmp_path, mask_type, pos_emb, layer_norm_after):
    config = text_config(mask_type, pos_emb=pos_emb, layer_norm_after=layer_norm_after, format="RNN", num_labels=4)
    config.save_pretrained(tmp_path)
    for loaded in (LionConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert_same_options(loaded, config)


@pytest.mark.parametrize("mask_type", VARIANTS)
@pytest.mark.parametrize("order", ["normal", "s"])
def test_image_configuration_survives_save_and_load(tmp_path, mask_type, order):
    options = {"image_size": [16, 24], "pos_emb": True, "cls_tok": True, "drop_path_rate": 0.25, "qkv_bias": False}
    config = vision_config(mask_type, order=order, **options)
    config.save_pretrained(tmp_path)
    assert_same_options(AutoConfig.from_pretrained(tmp_path), config)


@pytest.mark.parametrize(
    "stored, option, value",
    [
        ({"mask_type": "lit"}, "mask_type", "decay"),
        ({"mask_type": "selective"}, "mask_type", "LION-D"),
        ({"mask_type": "lit"}, "pos_emb", False),
        ({"mask_type": "lit", "pos_emb": False}, "pos_emb", True),
        ({"mask_type": "selective"}, "pos_emb", True),
        ({"mask_type": "lit"}, "layer_norm_after", False),
    ],
)
def test_text_structure_cannot_be_overridden_at_load(tmp_path, stored, option, value):
    lion_hf.LionModel(text_config(**stored)).save_pretrained(tmp_path)
    for load in (LionConfig.from_pretrained, AutoConfig.from_pretrained, lion_hf.LionModel.from_pretrained):
        with pytest.raises(ValueError, match=f"{option}={value!r} contradicts the checkpoint"):
            load(tmp_path, **{option: value})
    other = text_config(**stored | {option: value})
    for load in (lion_hf.LionModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=f"{option}=.* contradicts the checkpoint"):
            load(tmp_path, config=other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"{option}=.* contradicts the checkpoint"):
        lion_hf.LionModel.from_pretrained(tmp_path, config=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="contradicts the checkpoint"):
        AutoModel.from_pretrained(tmp_path, **{option: value})


@pytest.mark.parametrize(
    "stored, option, value",
    [
        ({"order": "normal"}, "order", "S"),
        ({"order": "s"}, "order", "normal"),
        ({"pos_emb": False}, "pos_emb", True),
        ({"pos_emb": True}, "pos_emb", False),
        ({"mask_type": "decay"}, "mask_type", "selective"),
    ],
)
def test_image_structure_cannot_be_overridden_at_load(tmp_path, stored, option, value):
    lion_hf.LionVisionModel(vision_config(**stored)).save_pretrained(tmp_path)
    for load in (LionVisionConfig.from_pretrained, AutoConfig.from_pretrained, lion_hf.LionVisionModel.from_pretrained):
        with pytest.raises(ValueError, match=f"{option}={value!r} contradicts the checkpoint"):
            load(tmp_path, **{option: value})
    with pytest.raises(ValueError, match=f"{option}=.* contradicts the checkpoint"):
        lion_hf.LionForImageClassification.from_pretrained(tmp_path, config=vision_config(**stored | {option: value}))


@pytest.mark.parametrize(
    "built, option, value",
    [
        (text_config("decay"), "mask_type", "lit"),
        (text_config("lit", pos_emb=False), "pos_emb", True),
        (text_config("selective"), "layer_norm_after", True),
        (text_config("decay"), "softmax_layers", [1]),
        (text_config("decay", softmax_layers=[0, 1]), "softmax_layers", [0]),
        (vision_config("decay"), "mask_type", "selective"),
        (vision_config("decay"), "order", "s"),
        (vision_config("selective", order="s"), "order", "normal"),
        (vision_config("lit", pos_emb=True), "pos_emb", False),
        (vision_config("lit"), "softmax_layers", [1]),  # loading cannot detect it: names of weights are equal
    ],
    ids=lambda x: x.model_type if isinstance(x, PreTrainedConfig) else str(x),
)
def test_a_model_whose_configuration_describes_another_is_not_saved(tmp_path, built, option, value):
    model = (lion_hf.LionModel if built.model_type == "lion" else lion_hf.LionForImageClassification)(built)
    before = getattr(built, option)
    setattr(model.config, option, value)
    message = f"config.{option} is {value!r}, but the model was built with {option}={before!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    setattr(model.config, option, before)
    model.save_pretrained(tmp_path / "model")


def test_what_fits_the_modules_is_saved(tmp_path):
    model = lion_hf.LionForMaskedLM(text_config("decay", num_hidden_layers=3, softmax_layers=[0, 2]))
    del model.lion.layers[0]
    model.config.update({"format": "chunk", "softmax_layers": [1], "num_hidden_layers": 2})
    model.save_pretrained(tmp_path / "pruned")
    again = lion_hf.LionForMaskedLM.from_pretrained(tmp_path / "pruned")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    unmarked = lion_hf.LionVisionModel(vision_config("lit"))
    unmarked.config.order = "s"  # the order has no effect without decay
    unmarked.save_pretrained(tmp_path / "lit")


def test_a_configuration_object_may_change_what_is_not_structure(tmp_path):
    lion_hf.LionModel(text_config("decay")).save_pretrained(tmp_path / "model")
    config = LionConfig.from_pretrained(tmp_path / "model", format="chunk", num_labels=5)
    model = lion_hf.LionForSequenceClassification.from_pretrained(tmp_path / "model", config=config)
    assert (model.config.format, model.num_labels) == ("chunk", 5)
    (tmp_path / "model" / "config.json").unlink()  # only the weights are left
    assert lion_hf.LionModel.from_pretrained(tmp_path / "model", config=config).config.format == "chunk"


def test_overrides_that_agree_with_the_stored_structure_are_no_error(tmp_path):
    text_config("lit", pos_emb=False).save_pretrained(tmp_path)
    config = LionConfig.from_pretrained(tmp_path, mask_type="LION-LIT", pos_emb=False, layer_norm_after=True)
    assert (config.mask_type, config.pos_emb, config.layer_norm_after) == ("lit", False, True)


# -------------------------------------------------------------------------------------------------------- presets


def test_presets_are_the_published_sizes():
    assert set(PRESETS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    image = "patch16" in name
    config = (LionVisionConfig if image else LionConfig).from_preset(name)
    with torch.device("meta"):
        model = (lion_hf.LionForImageClassification if image else lion_hf.LionForMaskedLM)(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_presets_take_overrides_and_any_case():
    config = LionConfig.from_preset("LION-D-Base-uncased", format="Chunk", num_hidden_layers=2)
    assert (config.mask_type, config.format, config.num_hidden_layers) == ("decay", "chunk", 2)


@pytest.mark.parametrize(
    "kind, name",
    [
        (LionConfig, "lion-x-base"),
        (LionConfig, "lion-s-base-patch16-224"),
        (LionVisionConfig, "lion-s-base"),
        (LionVisionConfig, "lion-lit-base-patch16-224-snake"),
    ],
)
def test_unknown_presets_list_the_known_ones(kind, name):
    known = "lion-s-base-patch16-224" if kind is LionVisionConfig else "lion-lit-large"
    with pytest.raises(ValueError, match=f"{name!r} is not a preset of {kind.__name__}; allowed are .*{known}"):
        kind.from_preset(name)
