"""Invalid rates and other numbers of layers and configurations raise an error when they are set."""

import math
import re

import pytest
from small_models import text_config, vision_config

from lion_hf.nn import MLP, Block, Encoder, Mixer
from lion_hf.nn.block import DropPath


WRONG = (math.nan, math.inf, -math.inf, -0.1, "0.1", None)
RATES = {
    "drop_path of an encoder": lambda value: Encoder(8, 2, 2, drop_path=value),
    "dropout of an encoder": lambda value: Encoder(8, 2, 2, dropout=value),
    "attention_dropout of an encoder": lambda value: Encoder(8, 2, 2, attention_dropout=value, normalize=False),
    "drop_path of a block": lambda value: Block(8, Mixer(8, 2), MLP(8, 8), drop_path=value),
    "dropout of a block": lambda value: Block(8, Mixer(8, 2), MLP(8, 8), dropout=value),
    "drop_path alone": DropPath,
    "dropout of an MLP": lambda value: MLP(8, 8, dropout=value),
    "drop_path_rate of an image model": lambda value: vision_config(drop_path_rate=value),
    **{
        f"{name} of a {kind} model": lambda value, name=name, make=make: make(**{name: value})
        for kind, make in (("text", text_config), ("image", vision_config))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
    },
}
SIZES = {
    "norm_eps of a block": lambda value: Block(8, Mixer(8, 2), MLP(8, 8), norm_eps=value),
    "gate_eps of a mixer": lambda value: Mixer(8, 2, gate_eps=value),
    **{
        f"{name} of a {kind} model": lambda value, name=name, make=make: make(**{name: value})
        for kind, make in (("text", text_config), ("image", vision_config))
        for name in ("layer_norm_eps", "initializer_range", "gate_eps")
    },
}


def said(error):
    """Return the message. Transformers' configurations wrap it, and have their own messages for wrong types."""
    return str(error.value.__cause__ or error.value)


@pytest.mark.parametrize("value", (*WRONG, 1, 1.5), ids=str)
@pytest.mark.parametrize("what", RATES)
def test_a_rate_is_a_probability_below_one(what, value):
    RATES[what](0.5)
    with pytest.raises(Exception) as error:
        RATES[what](value)
    name = what.split()[0]
    if not (isinstance(value, str | None) and "model" in what):
        assert re.search(rf"{name} is {re.escape(repr(value))}; it must be a probability in \[0, 1\)", said(error))
    assert name in said(error)


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("what", SIZES)
def test_a_size_is_finite_and_not_negative(what, value):
    SIZES[what](0.0)
    with pytest.raises(Exception) as error:
        SIZES[what](value)
    name = what.split()[0]
    if not (isinstance(value, str | None) and "model" in what):
        assert f"{name} is {value!r}; it must be a finite number that is not negative" in said(error)
    assert name in said(error)
