"""The model that the arguments of a script name."""

import pytest
from small_models import text_config
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import lion_hf
from lion_hf.training.arguments import TextModelArguments
from lion_hf.training.errors import UserError
from lion_hf.training.models import build_model


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
