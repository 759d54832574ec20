import pytest
import torch
from small_models import text_config, vision_config

from lion_hf import convert_text_state_dict, convert_vision_state_dict


def test_unused_tables_are_dropped_and_used_ones_kept():
    table = torch.zeros(40, 24)
    official = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "bert.embeddings.position_embeddings.weight": table,
        "bert.encoder.layer.0.attention.self.distance_embedding.weight": table,
    }
    assert convert_text_state_dict(official, text_config("decay")) == {}
    assert set(convert_text_state_dict(official, text_config("lit"))) == {"lion.embeddings.position_embeddings.weight"}
    table = {"pos_embed": torch.zeros(1, 17, 24)}
    assert convert_vision_state_dict(table, vision_config()) == {}
    assert set(convert_vision_state_dict(table, vision_config(pos_emb=True))) == {
        "lion_vision.embeddings.position_embeddings"
    }


def test_stacked_projection_is_split_in_the_order_query_key_value():
    stacked = torch.arange(72.0)
    parts = convert_vision_state_dict({"blocks.1.attn.qkv.bias": stacked}, vision_config())
    for i, name in enumerate("qkv"):
        assert torch.equal(parts[f"lion_vision.layers.1.mixer.{name}_proj.bias"], stacked[24 * i : 24 * (i + 1)])


@pytest.mark.parametrize(
    "convert, config", [(convert_text_state_dict, text_config()), (convert_vision_state_dict, vision_config())]
)
def test_a_foreign_name_is_an_error_that_names_it(convert, config):
    with pytest.raises(ValueError, match="model.encoder.0.weight"):
        convert({"model.encoder.0.weight": torch.zeros(1)}, config)
