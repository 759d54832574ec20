"""The model that the arguments of a script name."""

import re
from pathlib import Path

import pytest
from small_models import text_config
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import lion_hf
from lion_hf.convert import from_bert, from_vit
from lion_hf.hub import hint_if_missing
from lion_hf.training.arguments import TextModelArguments
from lion_hf.training.data import load_named
from lion_hf.training.errors import UserError
from lion_hf.training.models import SMALL_TEXT_MODEL, build_model


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def built(**arguments):
    return build_model(AutoModelForMaskedLM, "lion", TextModelArguments(**arguments), {}, {"vocab_size": 61})


def test_the_format_is_the_stored_one_unless_it_is_given(tmp_path):
    lion_hf.LionForMaskedLM(text_config(format="chunk")).save_pretrained(tmp_path / "lion")
    BertForMaskedLM(BertConfig(vocab_size=61, **SMALL)).save_pretrained(tmp_path / "bert")
    assert built(model_name_or_path=str(tmp_path / "lion")).config.format == "chunk"
    assert built(model_name_or_path=str(tmp_path / "lion"), format="rnn").config.format == "rnn"
    assert built(**SMALL).config.format == built(warm_start=str(tmp_path / "bert")).config.format == "auto"
    assert built(**SMALL, format="chunk").config.format == "chunk"
    assert type(built(model_name_or_path=str(tmp_path / "bert"))) is BertForMaskedLM
    for arguments in ({"model_name_or_path": str(tmp_path / "bert")}, SMALL | {"model_type": "bert"}):
        with pytest.raises(UserError, match="--format is an option of LION"):
            built(format="chunk", **arguments)


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lion_hf.LionForMaskedLM(text_config()).save_pretrained("outputs/first")
    for folder in ("outputs/firs", "./outputs/firs", str(tmp_path / "outputs/firs")):
        found = str(Path(folder).with_name("first"))
        message = f"there is no folder {folder!r}; did you mean {found!r}?"
        with pytest.raises(UserError, match=f"^{re.escape('--model_name_or_path: ' + message)}$"):
            built(model_name_or_path=folder)
        with pytest.raises(UserError, match=f"^--warm_start: {re.escape(message)}$"):
            built(warm_start=folder)
        with pytest.raises(UserError, match=f"^--dataset_name: {re.escape(message)}$"):
            load_named(folder)
        with pytest.raises(OSError, match=re.escape(f"{folder!r} is neither a folder nor a name on the Hub; did you")):
            from_bert(Path(folder) if folder[0] == "/" else folder)
    with pytest.raises(UserError, match="there is no folder 'outputs/x/absent'$"):
        built(model_name_or_path="outputs/x/absent")
    with pytest.raises(OSError, match="'outputs/x/absent' is neither a folder nor a name on the Hub.$"):
        from_vit("outputs/x/absent")
    for name in ("train.csv", "outputs/trian.csv", "outputs/first/config.json"):
        with pytest.raises(UserError, match="for a local file use --train_file"):
            load_named(name)


@pytest.mark.parametrize("where", ["cache", "Hub", "other"])
def test_a_name_on_the_hub_stays_one_beside_a_folder_of_its_owner(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("user/model-16").mkdir(parents=True)
    if where == "cache":
        (tmp_path / "cache" / "models--user--model-32").mkdir(parents=True)
        monkeypatch.setattr("lion_hf.hub.HF_HUB_CACHE", str(tmp_path / "cache"))
    if where == "Hub":
        monkeypatch.setattr("lion_hf.hub.HfApi.repo_info", lambda self, *args, **kwargs: "found")
    assert hint_if_missing("user/tiger" if where == "other" else "user/model-32") is None
    assert hint_if_missing("bert-base-uncased") is None


def test_new_text_models_rotate_where_that_was_compared_and_no_flag_or_preset_says_otherwise():
    def theta(**arguments):
        options = {"vocab_size": 61, "pad_token_id": 0}
        return build_model(
            AutoModelForMaskedLM, "lion", TextModelArguments(**arguments), SMALL_TEXT_MODEL, options
        ).config

    small = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2}
    for name in (None, "lit", "decay", "LION-S"):
        config = theta(**small, mask_type=name)
        assert config.linear_rope_theta == 10000.0 and config.rope_theta is None
        assert theta(**small, mask_type=name, linear_rope_theta=0).linear_rope_theta is None
    assert theta(**small | {"hidden_size": 6}).linear_rope_theta is theta(**small, key_dim=3).linear_rope_theta is None
    for name in ("hgrn2", "gla"):
        assert theta(**small, mask_type=name).linear_rope_theta is None
    assert theta(**small, mask_type="gla", linear_rope_theta=50, rope_theta=30).rope_parameters == {
        "full_attention": {"rope_type": "default", "rope_theta": 30.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        "linear_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    assert theta(**small, preset="lion-s-base").linear_rope_theta is None
    changed = theta(**small, preset="lion-s-modern-tiny", rope_theta=30, local_layers=[0])
    assert (changed.rope_theta, changed.linear_rope_theta) == (30.0, 10000.0)
    assert not hasattr(theta(**small, model_type="bert"), "linear_rope_theta")


def test_an_existing_model_keeps_its_rotary_positions(tmp_path):
    lion_hf.LionForMaskedLM(text_config(linear_rope_theta=20.0)).save_pretrained(tmp_path)
    assert built(model_name_or_path=str(tmp_path)).config.linear_rope_theta == 20.0
    for theta in (0, 20.0):
        with pytest.raises(UserError, match="cannot be combined with --linear_rope_theta"):
            built(model_name_or_path=str(tmp_path), linear_rope_theta=theta)
