"""Configurations are inferred from the file. Missing options are requested, and contradictions are errors."""

import argparse

import pytest
import torch
from checkpoints import bare_image, bare_text, composer, deit, golden
from small_models import VARIANTS

from lion_hf.convert.config import infer_config
from lion_hf.convert.source import ConversionError, interpret


ALL_FLAGS = {"mask_type": "lit", "num_attention_heads": 3, "cls_tok": True, "order": "normal", "image_size": 16}


def infer(content, **flags):
    return infer_config(interpret(content, "source.pth"), flags)


NAMES = {
    "lit": ("text_lit_yaml", ["lion-lit", "linear_attention", "Linear_Attention", "LIT"]),
    "decay": ("text_d_yaml", ["lion-d", "nova", "NOVA", "Decay"]),
    "selective": ("text_s_ln_holes", ["lion-s", "nova-inputdep", "Nova-InputDep", "LION-S"]),
}


@pytest.mark.parametrize("mask_type, name", [(m, name) for m, (_, names) in NAMES.items() for name in names])
def test_every_name_of_a_variant_is_understood_in_any_case(mask_type, name):
    weights, _, config = golden(NAMES[mask_type][0])
    assert infer(composer(weights, config, arch_type=name))[0].mask_type == mask_type
    image, _ = bare_image(mask_type)
    options = {
        "order": "Normal",
        "pos_emb": False,
        "cls_tok": False,
        "img_size": 16,
        "num_classes": 5,
        "mask_type": name,
    }
    assert infer(deit(image, options, num_heads=3))[0].mask_type == mask_type


@pytest.mark.parametrize("size, heads", [("tiny", 3), ("small", 6), ("base", 12)])
def test_the_name_of_an_image_model_tells_the_heads_of_lit(size, heads):
    weights, _ = bare_image("lit", num_attention_heads=heads)
    content = deit(
        weights, {"mask_type": "Lit", "order": "S", "pos_emb": False, "cls_tok": True, "img_size": 16, "num_classes": 5}
    )
    content["args"].model = f"lion_{size}_patch16_224"
    config, origins, _ = infer(content)
    assert config.num_attention_heads == heads and origins["num_attention_heads"] == "args"
    assert (config.order, config.cls_tok, config.drop_path_rate) == ("s", True, 0.1)


@pytest.mark.parametrize("order", ["normal", "s"])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_bare_image_weights_ask_for_what_they_do_not_tell_and_for_nothing_else(mask_type, order):
    weights, model = bare_image(mask_type, order=order, cls_tok=True, chunk_size=64)
    needed = {"cls_tok": True, "image_size": 16}
    if mask_type == "lit":
        needed |= {"mask_type": "lit", "num_attention_heads": 3, "order": order}
    flags = {"mask_type": "--mask-type", "num_attention_heads": "--num-heads", "cls_tok": "--cls-tok"}
    flags |= {"order": "--order", "image_size": "--image-size"}
    with pytest.raises(ConversionError) as error:
        infer(weights)
    assert {name for name, flag in flags.items() if flag in str(error.value)} == needed.keys()
    assert "--image-size N (in pixels; without a position table the weights do not determine" in str(error.value)
    config, *_ = infer(weights, **needed)
    assert config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("mask_type", VARIANTS)
def test_bare_text_weights_ask_only_for_the_heads_of_lit(mask_type):
    weights, model = bare_text(mask_type)
    needed = {"num_attention_heads": 3} if mask_type == "lit" else {}
    if needed:
        with pytest.raises(ConversionError, match="--num-heads N"):
            infer(weights)
    config, *_ = infer(weights, **needed)
    same = ("mask_type", "num_attention_heads", "pos_emb", "layer_norm_after", "vocab_size", "max_position_embeddings")
    assert [getattr(config, name) for name in same] == [getattr(model.config, name) for name in same]


def test_a_position_table_tells_the_size_of_the_image():
    weights, _ = bare_image("decay", pos_emb=True)
    config, origins, _ = infer(weights, cls_tok=False)
    assert (config.pos_emb, config.image_size, origins["image_size"]) == (True, 16, "weights")


def test_plain_bert_and_vit_weights_are_only_taken_where_the_user_says_lit():
    weights, _ = bare_text("lit", layer_norm_after=False)
    with pytest.raises(ConversionError, match="LION-LIT, or to a plain BERT or ViT"):
        infer(weights, num_attention_heads=3)
    assert infer(weights, num_attention_heads=3, mask_type="lit")[0].layer_norm_after is False
    weights, _ = bare_image("lit")
    args = argparse.Namespace(model="deit_tiny_patch16_224", input_size=16, nb_classes=5)
    with pytest.raises(ConversionError, match="--mask-type lit"):
        infer({"model": weights, "args": args})


@pytest.mark.parametrize("mask_type", ["decay", "selective"])
def test_the_position_table_of_text_without_description_is_dead_unless_the_user_says_otherwise(mask_type):
    weights, _ = bare_text(mask_type)
    assert infer(weights)[0].pos_emb is False
    assert infer(weights, pos_emb=True)[0].pos_emb is True
    del weights["bert.embeddings.position_embeddings.weight"]
    assert infer(weights)[0].pos_emb is False
    with pytest.raises(ConversionError, match="contain no position table"):
        infer(weights, pos_emb=True)


@pytest.mark.parametrize(
    "stated, reads", [("absolute", True), ("relative_key", False), ("relative_key_query", False), (None, False)]
)
def test_the_type_of_positions_says_whether_the_table_is_read(stated, reads):
    weights, _, config = golden("text_d_yaml")
    assert infer(composer(weights, config, position_embedding_type=stated))[0].pos_emb is reads


@pytest.mark.parametrize("stated", ["alibi", "rotary", "Absolute", "", 1, {"type": "absolute"}], ids=str)
def test_unknown_types_of_positions_are_refused_by_name(stated):
    weights, _, config = golden("text_d_yaml")
    with pytest.raises(ConversionError, match=f"has position_embedding_type={stated!r}, .*allowed are 'absolute'"):
        infer(composer(weights, config, position_embedding_type=stated))


def test_the_padded_vocabulary_is_kept_whatever_the_file_states():
    weights, _, config = golden("text_d_yaml")
    assert infer(composer(weights, config, vocab_size=97))[0].vocab_size == 101


def test_what_a_text_checkpoint_states_is_kept():
    weights, _, config = golden("text_cls_d")
    stated = {"hidden_dropout_prob": 0.25, "layer_norm_eps": 1e-7, "problem_type": "single_label_classification"}
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    found, *_ = infer(composer(weights, config, **stated, **labels))
    assert {name: getattr(found, name) for name in stated} == stated
    assert found.id2label == {0: "a", 1: "b", 2: "c"} and found.num_labels == 3


def image_description(**changes):
    options = {"mask_type": "Decay", "order": "S", "pos_emb": False, "cls_tok": False, "img_size": 16, "num_classes": 5}
    return options | changes


CONTRADICTIONS = {
    "flag and weights": (
        {},
        {"num_attention_heads": 4},
        "num_attention_heads is 4 according to the flag, but 3.*weights",
    ),
    "flag and args": ({}, {"cls_tok": True}, "cls_tok is True according to the flag, but False according to the args"),
    "flag and order": ({}, {"order": "normal"}, "order is 'normal' according to the flag"),
    "flag and variant": ({}, {"mask_type": "selective"}, "mask_type is 'selective' according to the flag"),
    "args and weights": ({"mask_type": "Selective"}, {}, "selective.*args, but 'decay' according to the weights"),
    "order in args": ({"order": "Normal"}, {}, "order is 'normal' according to the args, but 's'"),
    "classes in args": ({"num_classes": 7}, {}, "num_labels is 7 according to the args, but 5"),
    "missing table": ({"pos_emb": True}, {}, "contain no position table"),
    "unknown variant": ({"mask_type": "Mamba"}, {}, "names the variant 'Mamba'; allowed are 'lit'"),
    "odd size": ({"img_size": 15}, {}, "not give a valid configuration: .*not divisible"),
    "odd type": ({"cls_tok": "maybe"}, {}, "contains cls_tok='maybe'; it must be true or false"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradictions_are_errors_that_name_both_sides(kind):
    changes, flags, message = CONTRADICTIONS[kind]
    weights, _ = bare_image("decay", order="s")
    assert infer(deit(weights, image_description()))[0].order == "s"
    with pytest.raises(ConversionError, match=message) as error:
        infer(deit(weights, image_description(**changes)), **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stated", ["Decay", "Selective"])
def test_a_variant_with_decays_needs_them_in_the_weights(stated):
    weights, _ = bare_image("lit")
    with pytest.raises(ConversionError, match="the weights contain no decay"):
        infer(deit(weights, image_description(mask_type=stated), num_heads=3))


@pytest.mark.parametrize("flag", [{"cls_tok": True}, {"order": "normal"}, {"image_size": 16}])
def test_a_flag_for_images_is_an_error_for_text(flag):
    weights, _ = bare_text("decay")
    with pytest.raises(ConversionError, match="no such option"):
        infer(weights, **flag)


@pytest.mark.parametrize(
    "missing", ["bert.encoder.layer.0.intermediate.dense.weight", "cls.predictions", "bert.embeddings.token_type"]
)
def test_an_incomplete_text_model_is_an_error(missing):
    weights, _ = bare_text("decay")
    with pytest.raises(ConversionError, match="is missing|neither a masked language modelling head"):
        infer({name: x for name, x in weights.items() if not name.startswith(missing)})


def test_stated_values_of_any_type_are_no_crash():
    weights, _ = bare_image("decay")
    content = deit(weights, image_description(order="normal"))
    content["args"].input_size = torch.zeros(2)  # ignored: only plain values count
    with pytest.raises(ConversionError, match="--image-size"):
        infer(content)
    content["args"].mask_type = {"a": 1}
    with pytest.raises(ConversionError, match="names the variant"):
        infer(content)


@pytest.mark.parametrize("stated, expected", [("True", True), ("false", False), (1, True), (0, False)])
def test_truths_are_understood_as_files_write_them(stated, expected):
    weights, _ = bare_image("decay", order="s")
    config, *_ = infer(deit(weights, image_description(cls_tok=stated)))
    assert config.cls_tok is expected
