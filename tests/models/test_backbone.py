import json

import pytest
import torch
from small_models import ALL_VARIANTS, spread_decays, vision_config
from transformers import (
    AutoBackbone,
    AutoModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.auto import auto_factory

import lion_hf


ORDERS = ("normal", "s")
ALL_STAGES = ["stem", "stage1", "stage2"]


def build(mask_type="selective", **options):
    return spread_decays(lion_hf.LionBackbone(vision_config(mask_type, **options))).eval()


# ------------------------------------------------------------------------------------------------------- feature maps


@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["square", "wide"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
def test_feature_maps_are_the_tokens_of_the_encoder_in_their_places(mask_type, order, size):
    backbone = build(mask_type, order=order, out_features=ALL_STAGES)
    pixels = torch.randn(2, 3, *size)
    rows, columns = size[0] // 4, size[1] // 4
    encoded = backbone.lion_vision(pixels, output_hidden_states=True)
    maps = backbone(pixels).feature_maps
    assert [m.shape for m in maps] == [(2, 24, rows, columns)] * 3
    for feature_map, tokens in zip(maps, encoded.hidden_states, strict=True):
        tokens = backbone.lion_vision.norm(tokens)
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (1, 2)):
            torch.testing.assert_close(feature_map[:, :, row, column], tokens[:, 1 + row * columns + column])
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), encoded.last_hidden_state[:, 1:])


@pytest.mark.parametrize("order", ORDERS)
def test_the_stem_sees_one_patch_and_a_layer_sees_them_all(order):
    backbone = build(order=order, out_features=["stem", "stage1"])
    pixels = torch.randn(1, 3, 12, 20)
    changed = pixels.clone()
    changed[:, :, 4:8, 16:20] += 1  # row 1, column 4
    for before, after, reached in zip(backbone(pixels)[0], backbone(changed)[0], (1, 15), strict=True):
        moved = (before != after).any(1)[0]
        assert moved[1, 4] and moved.sum() == reached


def test_the_final_norm_is_optional():
    pixels = torch.randn(2, 3, 16, 16)
    backbone = build(apply_layernorm=False, out_features=ALL_STAGES)
    outputs = backbone(pixels, output_hidden_states=True)
    for feature_map, tokens in zip(outputs.feature_maps, outputs.hidden_states, strict=True):
        torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_hidden_states_and_attentions_come_on_request_only():
    backbone, pixels = build(out_indices=[1]), torch.randn(2, 3, 16, 16)
    assert list(backbone(pixels)) == ["feature_maps"]
    outputs = backbone(pixels, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and [a.shape for a in outputs.attentions] == [(2, 3, 17, 17)] * 2
    (maps,) = backbone(pixels, return_dict=False)
    torch.testing.assert_close(maps, outputs.feature_maps)


def test_positions_fit_any_image_unless_told_otherwise():
    backbone = build(pos_emb=True)
    assert backbone(torch.randn(1, 3, 12, 20)).feature_maps[0].shape == (1, 24, 3, 5)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        backbone(torch.randn(1, 3, 12, 20), interpolate_pos_encoding=False)


@pytest.mark.parametrize("order", ORDERS)
def test_forms_agree(order):
    backbone = build(order=order, out_features=ALL_STAGES).double()
    pixels = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    expected = backbone(pixels).feature_maps
    for form in ("rnn", "chunk"):
        backbone.config.format = form
        torch.testing.assert_close(backbone(pixels).feature_maps, expected, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------------- chosen stages


@pytest.mark.parametrize(
    "options, names, numbers",
    [
        ({}, ["stage2"], [2]),
        ({"out_features": ["stem", "stage2"]}, ["stem", "stage2"], [0, 2]),
        ({"out_indices": [0, 1]}, ["stem", "stage1"], [0, 1]),
        ({"out_indices": (-2, -1)}, ["stage1", "stage2"], [-2, -1]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_stages_are_chosen_by_name_or_number_and_default_to_the_last(tmp_path, options, names, numbers):
    backbone = build(**options)
    backbone.save_pretrained(tmp_path)
    for same in (backbone, lion_hf.LionBackbone.from_pretrained(tmp_path)):
        assert (same.out_features, same.out_indices) == (names, numbers)
        assert same.channels == [24] * len(names) and same.num_features == [24] * 3
        assert len(same(torch.randn(1, 3, 16, 16)).feature_maps) == len(names)


def test_the_choice_can_change_at_load_and_on_a_live_backbone(tmp_path):
    build().save_pretrained(tmp_path)
    backbone = lion_hf.LionBackbone.from_pretrained(tmp_path, out_indices=[0, 1])
    assert backbone.out_features == ["stem", "stage1"]
    backbone.out_features = ALL_STAGES
    assert backbone.out_indices == [0, 1, 2] and len(backbone(torch.randn(1, 3, 16, 16)).feature_maps) == 3


def test_a_shortened_checkpoint_ends_with_its_own_last_stage(tmp_path):
    lion_hf.LionForImageClassification(vision_config()).save_pretrained(tmp_path)
    assert lion_hf.LionBackbone.from_pretrained(tmp_path, num_hidden_layers=1).out_features == ["stage1"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out_features": ["stage3"]}, r"subset of stage_names: \['stem', 'stage1', 'stage2'\] got \['stage3'\]"),
        ({"out_features": ["stage2", "stage1"]}, "same order"),
        ({"out_indices": [3]}, "valid indices"),
        ({"out_indices": [1, 1]}, "duplicates"),
        ({"out_indices": [1], "out_features": ["stage2"]}, "correspond to the same stages"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_stages_that_are_not_there_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vision_config(**options)


# -------------------------------------------------------------------------------------------- weights, configurations


@pytest.mark.parametrize(
    "head", [lion_hf.LionVisionModel, lion_hf.LionForImageClassification, lion_hf.LionForMaskedImageModeling]
)
def test_any_image_checkpoint_is_a_backbone(tmp_path, head):
    model = spread_decays(head(vision_config(order="s"))).eval()
    model.save_pretrained(tmp_path)
    backbone, info = lion_hf.LionBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    pixels = torch.randn(2, 3, 12, 20)
    encoder = getattr(model, "lion_vision", model)
    (feature_map,) = backbone.eval()(pixels).feature_maps
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), encoder(pixels).last_hidden_state[:, 1:])


def test_configurations_of_other_users_are_written_as_before(tmp_path):
    lion_hf.LionForImageClassification(vision_config()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not [name for name in stored if name.startswith(("out_", "_out", "stage", "apply_", "encoder_"))]
    build(out_indices=[1], apply_layernorm=False).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (stored["out_features"], stored["out_indices"], stored["apply_layernorm"]) == (["stage1"], [1], False)


class HubThatHasEverything:
    def repo_exists(self, name):
        return True


def test_auto_classes_know_backbones(tmp_path, monkeypatch):
    backbone, pixels = build(out_indices=[1, 2]), torch.randn(1, 3, 16, 16)
    assert type(AutoBackbone.from_config(backbone.config)) is lion_hf.LionBackbone
    backbone.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is lion_hf.LionVisionModel
    # AutoBackbone.from_pretrained asks the Hub first, and uses timm if the Hub has no such repository.
    monkeypatch.setattr(auto_factory, "hf_api", HubThatHasEverything)
    loaded = AutoBackbone.from_pretrained(str(tmp_path)).eval()
    assert type(loaded) is lion_hf.LionBackbone
    torch.testing.assert_close(loaded(pixels).feature_maps, backbone(pixels).feature_maps)


@pytest.mark.parametrize("order", ORDERS)
def test_a_segmentation_model_of_transformers_learns_on_it(order):
    config = UperNetConfig(
        backbone_config=vision_config(order=order, num_hidden_layers=3, out_indices=[0, 1, 2, 3]),
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=2,
    )
    model = UperNetForSemanticSegmentation(config).train()
    assert type(model.backbone) is lion_hf.LionBackbone
    pixels = torch.randn(4, 3, 12, 20)
    labels = (pixels.mean(1) > 0).long()
    outputs = model(pixels, labels=labels)
    assert outputs.logits.shape == (4, 2, 12, 20)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.backbone.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert gradients["lion_vision.layers.0.mixer.q_proj.weight"].abs().max() > 0


def test_the_configuration_that_a_backbone_was_built_from_stays_as_it_is():
    config = vision_config("decay")
    before = config.to_dict()
    lion_hf.LionBackbone(config)
    assert config.to_dict() == before


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_tokens_come_as_they_are_where_they_are_not_reshaped(order, apply_layernorm, tmp_path):
    backbone = build(order=order, out_indices=[0, 2], apply_layernorm=apply_layernorm)
    pixels = torch.randn(2, 3, 12, 20)
    maps = backbone(pixels).feature_maps
    backbone.config.reshape_hidden_states = False
    backbone.save_pretrained(tmp_path)
    for same in (backbone, lion_hf.LionBackbone.from_pretrained(tmp_path).eval()):
        outputs = same(pixels, output_hidden_states=True)
        for tokens, feature_map, state in zip(
            outputs.feature_maps, maps, (outputs.hidden_states[0], outputs.hidden_states[2]), strict=True
        ):
            assert tokens.shape == (2, 16, 24)
            torch.testing.assert_close(tokens[:, 1:].transpose(1, 2), feature_map.flatten(2))
            expected = backbone.lion_vision.norm(state) if apply_layernorm else state
            torch.testing.assert_close(tokens, expected)
    assert "reshape_hidden_states" not in json.loads(lion_hf.LionVisionConfig().to_json_string(use_diff=False))


@pytest.mark.parametrize("kind", ["dpt", "depth_anything"])
def test_depth_models_of_transformers_learn_on_it(kind):
    config = vision_config(
        order="s", num_hidden_layers=4, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=False
    )
    shared = {"backbone_config": config, "reassemble_hidden_size": 24, "neck_hidden_sizes": [8, 8, 8, 8]}
    shared |= {"fusion_hidden_size": 8, "head_in_index": -1}
    if kind == "dpt":
        model = DPTForDepthEstimation(DPTConfig(**shared, is_hybrid=False, hidden_size=24)).train()
    else:
        model = DepthAnythingForDepthEstimation(DepthAnythingConfig(**shared, patch_size=4, head_hidden_size=4)).train()
    assert type(model.backbone) is lion_hf.LionBackbone
    outputs = model(torch.randn(2, 3, 16, 16))
    assert outputs.predicted_depth.shape[0] == 2
    outputs.predicted_depth.sum().backward()
    gradients = [p.grad for name, p in model.backbone.named_parameters() if "q_proj" in name]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
