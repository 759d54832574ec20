"""Options that are stored, derived, given at load, or unknown: values set by the user win, and none is outdated."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_models import VARIANTS, text_config, vision_config
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertConfig, ViTConfig

import lion_hf
from lion_hf import LionConfig, LionVisionConfig
from lion_hf.models import configuration_lion
from lion_hf.nn.variants import VARIANTS as REGISTERED
from lion_hf.nn.variants import Variant, register_variant


KINDS = {"text": LionConfig, "image": LionVisionConfig}
DERIVED = {"pos_emb": "pos_emb", "layer_norm_after": "norm"}
SPECIAL_TOKENS = ("mask_token_id", "cls_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id")


@pytest.fixture
def said(monkeypatch):
    """Collect the warnings of the configuration."""
    lines = []
    monkeypatch.setattr(configuration_lion.logger, "warning_once", lines.append)
    return lines


@pytest.fixture
def placed():
    """Register a variant whose defaults are a position table and no norm."""

    @register_variant("placed")
    class Placed(Variant):
        label = "placed"
        pos_emb = True

    yield "placed"
    del REGISTERED["placed"]


# ---------------------------------------------------------------------------------------------- names that are not ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*SPECIAL_TOKENS, "position_embedding_type", "pooler_num_attention_heads"])
def test_what_transformers_knows_can_be_set_stored_and_loaded(tmp_path, said, kind, name):
    model = lion_hf.LionModel(text_config()) if kind == "text" else lion_hf.LionVisionModel(vision_config())
    setattr(model.config, name, 4)
    model.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).config):
        assert getattr(loaded, name) == 4
    assert getattr(KINDS[kind](**model.config.to_dict()), name) == 4 and not said


@pytest.mark.parametrize("kind, twin", [(LionConfig, BertConfig), (LionVisionConfig, ViTConfig)])
def test_the_keys_of_bert_and_vit_are_no_typos(kind, twin):
    options = {k: v for k, v in twin().to_dict().items() if k not in ("model_type", "architectures")}
    config = kind(**options, position_embedding_type="absolute", gradient_checkpointing=False)
    assert config.hidden_size == 768 and config.position_embedding_type == "absolute"


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_name_is_refused_where_a_user_gives_it_and_told_where_it_is_stored_or_set(tmp_path, said, kind):
    cls = KINDS[kind]
    for attempt in (lambda: cls(chunksize=3), lambda: cls.from_pretrained(tmp_path, chunksize=3)):
        cls().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no option 'chunksize'; did you mean 'chunk_size'"):
            attempt()
    said.clear()
    config = cls()
    config.chunksize = 3
    assert (
        len(said) == 1 and "no option 'chunksize': stored, but without effect. Did you mean 'chunk_size'?" in said.pop()
    )
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for load in (cls.from_pretrained, AutoConfig.from_pretrained, lambda _: cls.from_json_file(file)):
        loaded = load(tmp_path)
        assert (loaded.chunksize, loaded.chunk_size) == (3, 64)
        assert len(said) == 1 and "has no option 'chunksize': stored" in said.pop() and type(loaded) is cls


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_option_that_no_lion_reads_is_told_where_a_user_writes_it(tmp_path, said, kind):
    kind(num_labels=7, problem_type="regression", output_attentions=True, sep_token_id=4, use_cache=True)
    assert not said
    config = kind(sliding_window=7, query_pre_attn_scalar=1e4)
    names = "sliding_window, query_pre_attn_scalar"
    assert said == [f"{kind.__name__} has no option named {names}: stored, but without effect."]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, revision="main", trust_remote_code=False).sliding_window == 7
    assert len(said) == 1


def test_the_configuration_of_the_other_kind_is_refused(tmp_path):
    for kind, other in ((LionConfig, LionVisionConfig), (LionVisionConfig, LionConfig)):
        kind().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"{other.__name__} was given the configuration of a {kind.model_type!r}"):
            other.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------ options that are derived


def from_folder(config, folder):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


COPIES = {
    "itself": lambda config, folder: config,
    "copy": lambda config, folder: copy.copy(config),
    "deepcopy": lambda config, folder: copy.deepcopy(config),
    "pickle": lambda config, folder: pickle.loads(pickle.dumps(config)),
    "old pickle": lambda config, folder: pickle.loads(pickle.dumps(config, protocol=0)),
    "folder": from_folder,
    "dict": lambda config, folder: LionConfig.from_dict(config.to_dict()),
    "diff": lambda config, folder: LionConfig.from_dict(config.to_diff_dict()),
    "arguments": lambda config, folder: LionConfig(**config.to_dict()),
    "model": lambda config, folder: lion_hf.LionModel(config).config,
}
ASSIGNMENTS = {
    "attribute": lambda config, name: setattr(config, "mask_type", name),
    "update": lambda config, name: config.update({"mask_type": name}),
    "string": lambda config, name: config.update_from_string(f"mask_type={name},chunk_size=8"),
}


@pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_derived_options_follow_the_variant(tmp_path, placed, copied, assign):
    for before in (*VARIANTS, placed):
        config = copied(text_config(before), tmp_path)
        for after in (*VARIANTS, placed, before.upper()):
            assign(config, after)
            for option, attribute in DERIVED.items():
                expected = getattr(REGISTERED[after.lower()], attribute)
                assert getattr(config, option) is config.to_dict()[option] is expected
        assert not [name for name in config.to_dict() if name.startswith("_") and name != "_name_or_path"]
        copied(config, tmp_path)  # the variant is again the one that the model was built with


@pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@pytest.mark.parametrize("name", [name for name in COPIES if name not in ("folder", "dict", "diff", "arguments")])
@pytest.mark.parametrize("option", DERIVED)
@pytest.mark.parametrize("given", [True, False])
def test_what_the_user_set_stays_and_none_lets_it_follow_again(tmp_path, option, given, name, assign):
    for before, after in (("decay", "lit"), ("lit", "selective")):
        for config in (text_config(before, **{option: given}), text_config(before)):
            setattr(config, option, given)
            config = COPIES[name](config, tmp_path)
            assign(config, after)
            assert getattr(config, option) is given
            setattr(config, option, None)
            assert getattr(config, option) is (after == "lit")
            assign(config, "decay")
            assert getattr(config, option) is False


@pytest.mark.parametrize("option", DERIVED)
def test_what_a_folder_states_against_its_variant_stays(tmp_path, option):
    for before, after in (("decay", "lit"), ("lit", "selective")):
        config = from_folder(text_config(before, **{option: before != "lit"}), tmp_path)
        config.mask_type = after
        assert getattr(config, option) is (before != "lit")


def test_a_new_model_from_a_folder_with_another_variant_has_its_table(tmp_path):
    """The case of run_mlm.py --config_name FOLDER --config_overrides mask_type=lit, with a folder of any release."""
    text_config("selective").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["pos_emb"] is stored["layer_norm_after"] is False  # as 0.1 and 0.2 store them
    config = AutoConfig.from_pretrained(tmp_path)
    config.update_from_string("mask_type=lit")
    model = AutoModelForMaskedLM.from_config(config)
    assert model.lion.embeddings.position_embeddings is not None and model.lion.layers[0].mixer.norm is not None
    model.save_pretrained(tmp_path / "model")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "model").config.pos_emb is True


def test_presets_follow_until_set_and_compare_by_value():
    config = LionConfig.from_preset("lion-s-base", mask_type="lit")
    assert config.pos_emb is config.layer_norm_after is True
    config.update({"mask_type": "decay"})
    assert config.pos_emb is False
    assert LionConfig(pos_emb=False) == LionConfig() and LionConfig(pos_emb=True) != LionConfig()


def test_a_bag_of_words_is_told(said):
    LionConfig(mask_type="lit")
    LionConfig(mask_type="decay", pos_emb=False)
    LionVisionConfig(mask_type="lit")
    assert not said
    config = LionConfig(**{**LionConfig().to_dict(), "mask_type": "lit"})
    assert config.pos_emb is False and "order of its tokens" in said[0]


def test_a_bag_of_words_that_assignments_made_is_told_by_its_model(said):
    config = text_config("decay", pos_emb=False)
    config.mask_type = "lit"
    assert not said
    lion_hf.LionForTokenClassification(config)
    assert "order of its tokens" in said[0]


@pytest.mark.parametrize(
    "config, model, changed",
    [
        (
            text_config,
            lion_hf.LionModel,
            {"feature_map": "elu", "normalize": True, "attention_probs_dropout_prob": 0.1},
        ),
        (text_config, lion_hf.LionForMaskedLM, {"hidden_dropout_prob": float("nan")}),
        (vision_config, lion_hf.LionForImageClassification, {"image_size": 17}),
        (vision_config, lion_hf.LionBackbone, {"gate_eps": float("inf")}),
    ],
)
def test_what_a_constructor_refuses_a_model_refuses_after_an_assignment(config, model, changed):
    config, (*_, (name, value)) = config("selective"), changed.items()
    with pytest.raises(StrictDataclassError, match=f"{name} .*{value}"):
        type(config)(**{**config.to_diff_dict(), **changed})
    config.update(changed)
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        model(config)


# ------------------------------------------------------------------------------------------------- values of options


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8], ids=lambda x: x.__name__)
def test_numbers_of_numpy_are_taken_wherever_numbers_are(tmp_path, kind, number):
    build = {"text": text_config, "image": vision_config}[kind]
    plain = build(softmax_layers=[1], num_labels=3)
    counts = {k: v for k, v in plain.to_dict().items() if type(v) is int and (v >= 0 or number is not np.uint8)}
    assert len(counts) > 7
    given = {k: number(v) for k, v in counts.items()} | {"softmax_layers": np.array([1]), "num_labels": number(3)}
    given |= {"hidden_dropout_prob": np.float32(0.25), "normalize": np.bool_(plain.normalize)}
    given |= {"label2id": {"a": number(0), "b": number(1), "c": number(2)}}
    given |= {"image_size": [number(16), number(8)], "out_indices": np.array([1, 2])} if kind == "image" else {}
    config = KINDS[kind](**given)
    assert all(type(getattr(config, name)) is int for name in counts if name != "image_size")
    assert config.softmax_layers == [1] and config.hidden_dropout_prob == 0.25 and config.num_labels == 3
    for name, value in counts.items():
        setattr(config, name, number(value))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, chunk_size=number(8)).chunk_size == 8


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_serves_decoders_is_taken_as_no_and_refused_as_yes(tmp_path, kind):
    config = kind(use_cache=True, is_decoder=False, add_cross_attention=False)
    assert config.use_cache is True and kind().use_cache is kind().is_decoder is kind().add_cross_attention is False
    assert "use_cache" not in kind().to_dict()
    config.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).use_cache is True
    assert kind.from_pretrained(tmp_path, use_cache=False, is_decoder=False).use_cache is False
    config.use_cache = False
    for name in ("is_decoder", "add_cross_attention"):
        for attempt in (
            lambda name=name: kind(**{name: True}),
            lambda name=name: kind.from_pretrained(tmp_path, **{name: True}),
            lambda name=name: setattr(config, name, True),
        ):
            with pytest.raises(ValueError, match=f"{name} is True.*an encoder that reads both directions"):
                attempt()


# ------------------------------------------------------------------------------------------------- options of a load


@pytest.mark.parametrize("kind", KINDS)
def test_no_format_means_the_stored_one(tmp_path, kind):
    model = lion_hf.LionModel(text_config(format="chunk"))
    if kind == "image":
        model = lion_hf.LionVisionModel(vision_config(format="chunk"))
    model.save_pretrained(tmp_path)
    cls, config = KINDS[kind], copy.deepcopy(model.config)
    config.format = None
    loaded = (
        config,
        cls.from_pretrained(tmp_path, format=None),
        AutoConfig.from_pretrained(tmp_path, format=None),
        AutoModel.from_pretrained(tmp_path, format=None).config,
        AutoModel.from_pretrained(tmp_path, config=model.config, format=None).config,
        AutoModel.from_config(model.config, format=None).config,
    )
    assert [x.format for x in loaded] == ["chunk"] * len(loaded)
    preset = "lion-s-base" if kind == "text" else "lion-s-tiny-patch16-224"
    assert cls(format=None).format == cls.from_preset(preset, format=None).format == "auto"


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_taken_beside_a_configuration_object(tmp_path, kind):
    model = lion_hf.LionModel(text_config()) if kind == "text" else lion_hf.LionVisionModel(vision_config())
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for loaded in (
        AutoModel.from_pretrained(tmp_path, config=config, format="RNN", chunk_size=2),
        type(model).from_pretrained(tmp_path, config=str(tmp_path), format="rnn", chunk_size=2),
        AutoModel.from_config(config, format="rnn", chunk_size=2),
    ):
        assert (loaded.config.format, loaded.config.chunk_size) == ("rnn", 2)
    assert config.format == "auto"  # the caller's configuration is unchanged
    with pytest.raises(ValueError, match="mask_type='lit' contradicts the checkpoint"):
        AutoModel.from_pretrained(tmp_path, config=config, mask_type="lit")
    with pytest.raises(ValueError, match="format is 'nonsense'"):
        AutoModel.from_pretrained(tmp_path, config=config, format="nonsense")


@pytest.mark.parametrize("name", configuration_lion.STRUCTURAL)
def test_none_leaves_what_decides_the_structure_beside_a_configuration_object_too(name, tmp_path):
    config = text_config(mask_type="selective", pos_emb=True, layer_norm_after=True, mlp_type="glu")
    lion_hf.LionModel(config).save_pretrained(tmp_path)
    stored = config.structure()
    for model in (
        AutoModel.from_pretrained(tmp_path, **{name: None}),
        AutoModel.from_pretrained(tmp_path, config=config, **{name: None}),
        AutoModel.from_config(config, **{name: None}),
    ):
        assert model.config.structure() == stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", torch.float64, "auto", None], ids=str)
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_a_new_model_has_the_dtypes_of_a_loaded_one(tmp_path, mask_type, dtype):
    for config in (text_config(mask_type, dtype="bfloat16"), vision_config(mask_type, order="s", dtype="bfloat16")):
        new = AutoModel.from_config(config, dtype=dtype) if dtype else AutoModel.from_config(config)
        assert new.config.dtype == new.dtype
        new.save_pretrained(tmp_path / config.model_type)
        loaded = AutoModel.from_pretrained(tmp_path / config.model_type, dtype=dtype or "auto")
        expected = {name: p.dtype for name, p in loaded.named_parameters()}
        assert {name: p.dtype for name, p in new.named_parameters()} == expected
