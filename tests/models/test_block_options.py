"""Options of the block: each alone and all together, in text and image models, by properties and definitions."""

import pytest
import torch
from small_models import FORMS, spread_decays, text_config, text_inputs, vision_config
from text_models import assert_same_model, left_padded
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import lion_hf
from lion_hf import LionConfig, LionVisionConfig
from lion_hf.nn import LocalMixer, Mixer, SoftmaxMixer


CONFIGS = {"text": text_config, "image": vision_config}
HEADS = {"text": lion_hf.LionForMaskedLM, "image": lion_hf.LionForImageClassification}
ROPE = {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
LINEAR_ROPE = {"linear_attention": {"rope_theta": [30.0, None]}}
# Every option with what it needs; windows are narrower than the inputs.
OPTIONS = {
    "norm_type": {"norm_type": "rms"},
    "use_bias": {"use_bias": False},
    "final_norm": {"norm_position": "pre", "final_norm": False},
    "final_norm of post-norm": {"norm_position": "post", "final_norm": True},
    "first_norm": {"norm_position": "pre", "first_norm": False},
    "embedding_norm of text": {"embedding_norm": False},
    "embedding_norm of images": {"embedding_norm": True},
    "feature_map": {"feature_map": "silu"},
    "decay_init": {"decay_init": "windows"},
    "local_layers": {"local_layers": [1], "local_window": 4},
    "rope_theta": {"local_layers": [1], "local_window": 4, "softmax_layers": [0], "rope_parameters": ROPE},
    "rope of LION's layers": {"rope_parameters": LINEAR_ROPE},
    "rope before a learned map": {"rope_parameters": LINEAR_ROPE, "feature_map": "hedgehog", "normalize": True},
}
MODERN = {
    "num_hidden_layers": 3,
    "norm_position": "pre",
    "norm_type": "rms",
    "use_bias": False,
    "first_norm": False,
    "embedding_norm": True,
    "mlp_type": "glu",
    "feature_map": "silu",
    "decay_init": "windows",
    "local_layers": [1],
    "local_window": 4,
    "softmax_layers": [2],
    "rope_parameters": ROPE | {"linear_attention": {"rope_theta": 40.0}},
    "output_norm": "head_rms",
    "output_gate": "silu",
    "short_conv": 3,
}
CASES = {**OPTIONS, "all": MODERN}


def build(kind, options, head=None, dtype=torch.float64):
    """Return a model in which every weight has an effect, in evaluation mode."""
    model = (head or HEADS[kind])(CONFIGS[kind](**options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return spread_decays(model).eval()


def inputs_for(kind, dtype=torch.float64):
    return text_inputs() if kind == "text" else {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}


def gradients(model, inputs, **config):
    """Return the logits and the gradient of every parameter that the loss reads."""
    for name, value in config.items():
        setattr(model.config, name, value)
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------- each and together


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_forms_agree_in_outputs_and_every_gradient(kind, options):
    model, inputs = build(kind, options), inputs_for(kind)
    expected = gradients(model, inputs, format="attention")
    for form in FORMS[1:]:
        assert_close(gradients(model, inputs, format=form), expected)
    model.gradient_checkpointing_enable()
    assert_close(gradients(model.train(), inputs), expected)
    unread = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Softmax is the same for a shift of all keys, unless RoPE turns it, and token type 1 does not occur.
    assert unread <= {f"lion.layers.{i}.mixer.k_proj.bias" for i in (0, 1)}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_padding_packing_and_unpadding_change_no_real_token(options):
    model, inputs = build("text", options), text_inputs()
    rows = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
    alone = [model(row[None]).logits[0] for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    joined = torch.cat(rows)[None]
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    for form in FORMS:
        model.config.format = form
        packed = model(joined, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits[0]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-9, atol=1e-10)
        for unpad in (False, True):
            model.config.unpad = unpad
            for given in (inputs, left_padded(inputs)):
                real = model(**given).logits[given["attention_mask"].bool()]
                torch.testing.assert_close(real, torch.cat(alone), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_saved_model_is_the_loaded_one(tmp_path, kind, options):
    model = build(kind, options, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs_for(kind, torch.float32))
    assert loaded.config.structure() == model.config.structure()
    assert AutoConfig.from_pretrained(tmp_path, **{k: v for k, v in options.items() if k != "rope_theta"})
    layers = [layer.mixer for layer in loaded.base_model.layers]
    assert [i for i, mixer in enumerate(layers) if isinstance(mixer, LocalMixer)] == loaded.config.local_layers
    assert [i for i, mixer in enumerate(layers) if isinstance(mixer, SoftmaxMixer)] == loaded.config.softmax_layers


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_with_its_code_computes_the_same(tmp_path, kind, modules_cache):
    model = build(kind, MODERN, dtype=torch.float32)
    lion_hf.save_with_code(model, tmp_path)
    name = f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}"
    theirs = get_class_from_dynamic_module(name, tmp_path).from_pretrained(tmp_path).eval()
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert_same_model(theirs, model, inputs_for(kind, torch.float32))


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_norms_train_those_that_are_there(kind):
    peft = pytest.importorskip("peft")
    model = build(kind, MODERN, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LNTuningConfig())
    adapted(**inputs_for(kind, torch.float32)).logits.square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert sum("mlp_norm" in name for name in trained) == 3 and sum("mixer_norm" in name for name in trained) == 2


OTHER = {
    "norm_type": "rms",
    "use_bias": False,
    "final_norm": False,
    "first_norm": False,
    "local_layers": [0],
    "local_window": 6,
    "rope_parameters": {"rope_theta": 3.0},
    "rope_theta": 3.0,
    "feature_map": "elu",
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", OTHER)
def test_what_decides_the_structure_cannot_change(tmp_path, kind, name):
    stored = {"norm_position": "pre", "local_layers": [1], "feature_map": "silu"}
    model = build(kind, stored, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    option = {"rope_theta": "rope_parameters"}.get(name, name)
    with pytest.raises(ValueError, match=f"{option}=.* contradicts the checkpoint"):
        AutoModel.from_pretrained(tmp_path, **{name: OTHER[name]})
    setattr(model.config, name, OTHER[name])
    with pytest.raises(ValueError, match=f"config.{option} is .* but the model was built with"):
        model.save_pretrained(tmp_path / "other")


# ----------------------------------------------------------------------------------------------------- what they are


def norms_of(model):
    return [m for m in model.base_model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("position", ["post", "pre"])
def test_norms_are_of_one_type_around_the_layers(kind, position):
    for options in ({"norm_type": "rms"}, {"norm_type": "layer", "use_bias": False}, {}):
        model = HEADS[kind](CONFIGS[kind](norm_position=position, embedding_norm=True, **options))
        norms, rms = norms_of(model), options.get("norm_type") == "rms"
        assert len(norms) == 2 * 2 + 1 + (position == "pre")
        assert all(isinstance(norm, nn.RMSNorm if rms else nn.LayerNorm) for norm in norms)
        assert all(norm.eps == model.config.layer_norm_eps for norm in norms)
        assert all((getattr(norm, "bias", None) is None) == bool(options) for norm in norms)
    for final, embedding in ((True, False), (False, True), (None, False)):
        options = {"final_norm": final, "embedding_norm": embedding}
        model = HEADS[kind](CONFIGS[kind](norm_position=position, **options))
        ends = position == "pre" if final is None else final
        assert len(norms_of(model)) == 4 + ends + embedding and (model.base_model.norm is not None) == ends


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_biases_only_gates_of_decays_heads_and_patches_have_one(kind):
    options = {**MODERN, "short_conv": 0, "norm_type": "layer"}
    encoder = HEADS[kind](CONFIGS[kind](**options)).base_model
    biases = {name.rpartition("mixer.")[2] for name, _ in encoder.named_parameters() if "bias" in name}
    assert biases == {"decay_proj.bias"} | (
        {"embeddings.patch_embeddings.projection.bias"} if kind == "image" else set()
    )
    if kind == "text":
        assert lion_hf.LionForMaskedLM(CONFIGS[kind](**options)).head.norm.bias is not None


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_first_mixer_reads_the_stream_itself(kind):
    model, seen = build(kind, {"norm_position": "pre", "first_norm": False}), []
    base = model.base_model
    for layer in base.layers:
        layer.mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    states = base(**inputs_for(kind), output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], states[0]) and not torch.equal(seen[1], states[1])


def test_cosine_scores_have_scale_1_and_sign():
    mixer = Mixer(24, 3, "lit", feature_map="silu").double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    matrix = mixer(x, output_attentions=True)[1]
    query, key = (nn.functional.silu(y) for y in mixer.project(x)[:2])
    torch.testing.assert_close(matrix, torch.cosine_similarity(query[..., None, :], key[..., None, :, :], dim=-1) * 1.0,
                               rtol=0, atol=1e-3)  # fmt: skip
    assert (matrix < 0).any() and not mixer.normalize
    with pytest.raises(ValueError, match="normalize is True with feature_map='silu', whose scores may be negative"):
        Mixer(24, 3, feature_map="silu", normalize=True)


def test_images_normalise_outputs_where_scores_have_both_signs(tmp_path):
    config = vision_config(feature_map="silu")
    assert (config.normalize, config.output_norm) == (False, "rms")
    config.save_pretrained(tmp_path)
    config = LionVisionConfig.from_pretrained(tmp_path)
    config.feature_map = "elu"
    assert (config.normalize, config.output_norm) == (True, "none")
    config.update({"feature_map": "silu"})
    assert (config.normalize, config.output_norm) == (False, "rms")
    assert LionConfig(mask_type="grfa").normalize and not LionConfig(mask_type="grfa", feature_map="silu").normalize
    for kind in (LionConfig, LionVisionConfig):
        with pytest.raises(Exception, match="feature_map is 'silu' with normalize=True"):
            kind(feature_map="silu", normalize=True)


# -------------------------------------------------------------------------------------------------- windows of decays


def windows_of(mixer):
    """Return how many tokens each head reads on both sides together, for inputs of zeros."""
    x = torch.zeros(1, 2, mixer.dim, dtype=mixer.q_proj.weight.dtype)
    decay = mixer.recurrences(x)[0].log_decay.exp().double()
    decay = decay[0, :, -1] if decay.dim() > 2 else decay
    return ((1 + decay) / (1 - decay)).view(mixer.num_heads, -1)[:, 0]


def assert_windows(layers, expected):
    for layer in layers:
        expected = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(windows_of(layer.mixer), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("mask_type", ["decay", "selective", "decay-channel", "selective-channel"])
def test_decays_of_a_new_model_start_from_windows(mask_type):
    for kind, largest in (("text", 40), ("image", 16)):
        model = HEADS[kind](CONFIGS[kind](mask_type, decay_init="windows"))
        assert_windows(model.base_model.layers, [4, (4 * largest) ** 0.5, largest])
        model = HEADS[kind](CONFIGS[kind](mask_type, decay_init="Windows", decay_windows=(8, 8)))
        assert_windows(model.base_model.layers, [8, 8, 8])
    encoder = lion_hf.nn.Encoder(24, 1, 3, mask_type, decay_init="windows", decay_windows=[3.0, 5.0, 7.0])
    assert_windows(encoder.layers, [3, 5, 7])


def test_windows_do_not_replace_what_a_checkpoint_holds(tmp_path):
    model = build("text", {"decay_init": "windows"}, dtype=torch.float32)
    weights = model.state_dict()
    lost = "lion.layers.1.mixer.decay_proj.bias"
    model.save_pretrained(tmp_path, state_dict={name: x for name, x in weights.items() if name != lost})
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights if name != lost)
    windows = torch.tensor([4, 160**0.5, 40])
    torch.testing.assert_close(loaded[lost], -torch.log((windows - 1) / 2))


@pytest.mark.parametrize("kind", [LionConfig, LionVisionConfig])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"decay_windows": [4]}, r"decay_windows is \[4\]; it must be .smallest, largest. or one number per head, 12"),
        ({"decay_windows": [1, 9]}, r"decay_windows is \[1, 9\].*above 1"),
        ({"decay_windows": 9}, "decay_windows is 9; it must be"),
        ({"decay_init": "zeros"}, "decay_init is 'zeros'.*allowed are 'normal', 'windows'"),
        ({"norm_type": "batch"}, "norm_type is 'batch'.*allowed are 'layer', 'rms'"),
        ({"use_bias": "no"}, "use_bias"),
        ({"first_norm": False, "norm_position": "post"}, "first_norm is False with norm_position='post'"),
        ({"local_layers": [12]}, r"local_layers is \[12\]; with num_hidden_layers 12 its numbers must be from 0 to 11"),
        ({"local_layers": [1], "softmax_layers": [1]}, r"softmax_layers and local_layers both contain \[1\]"),
        ({"local_layers": [0.5]}, r"local_layers is \[0.5\]; it must be a list of layer numbers"),
        ({"local_window": 0}, "local_window is 0; it must be at least 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "the default type of RoPE only"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "the default type of RoPE only"),
        ({"rope_parameters": {"full_attention": {}, "local": {}}}, "rope_parameters names the layers 'local'; allowed"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0; it must be a number above 1"),
        ({"rope_theta": 1e4, "num_attention_heads": 256}, "heads are 3 wide.*an even width"),
        ({"norm_typ": "rms"}, "no option 'norm_typ'; did you mean 'norm_type'"),
        ({"local_layer": [1]}, "no option 'local_layer'; did you mean 'local_layers'"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_what_is_allowed(kind, options, message):
    with pytest.raises(Exception, match=message):
        kind(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"local_layers": [2]}, r"local_layers is \[2\]; with depth 2, its numbers must be from 0 to 1"),
        ({"local_layers": [1], "softmax_layers": [1]}, r"both contain \[1\]"),
        ({"local_layers": [1], "direction": "forward"}, "direction is 'forward', but local_layers read both"),
        ({"first_norm": False, "norm_position": "post"}, "first_norm is False with norm_position='post'"),
        ({"norm_type": "batch"}, "norm_type is 'batch'; allowed are 'layer', 'rms'"),
        ({"decay_init": "zeros"}, "decay_init is 'zeros'; allowed are 'normal', 'windows'"),
        ({"decay_init": "windows", "decay_windows": (1, 5)}, "windows is .1, 5."),
    ],
)
def test_wrong_options_of_an_encoder_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lion_hf.nn.Encoder(24, 2, 3, **options)


# -------------------------------------------------------------------------------------------- RoPE and local layers


@pytest.mark.parametrize("kind", [LionConfig, LionVisionConfig])
def test_rope_is_stated_in_every_spelling_of_transformers(tmp_path, kind):
    flat = {"rope_type": "default", "rope_theta": 500.0}
    for options in (
        {"rope_theta": 500},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"type": "default", "rope_theta": 500.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": flat, "rope_theta": 7.0},
    ):
        config = kind(**options)
        assert config.rope_parameters == flat and (config.rope_theta, config.local_rope_theta) == (500.0, 500.0)
        config.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).rope_parameters == flat
        assert kind.from_pretrained(tmp_path, rope_theta=500.0).rope_parameters == flat
    config.rope_theta = 9.0
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 9.0}
    config = kind(rope_parameters={"sliding_attention": {"rope_theta": 9.0}})
    assert (config.rope_theta, config.local_rope_theta) == (None, 9.0)
    config.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    assert (
        kind().rope_parameters is kind(rope_parameters={}).rope_parameters is kind(rope_theta=None).rope_theta is None
    )


def test_thetas_reach_the_layers_of_their_kind():
    options = {"softmax_layers": [0], "local_layers": [1], "local_window": 6}
    for config in (text_config, vision_config):
        layers = HEADS["image" if config is vision_config else "text"](
            config(num_hidden_layers=3, rope_parameters=ROPE, **options)
        ).base_model.layers
        assert (layers[0].mixer.rope_theta, layers[1].mixer.rope_theta, layers[1].mixer.window) == (500.0, 50.0, 6)
    encoder = lion_hf.nn.Encoder(24, 2, 3, rope_theta=500.0, local_rope_theta=50.0, **options)
    assert [layer.mixer.rope_theta for layer in encoder.layers] == [500.0, 50.0]
    encoder = lion_hf.nn.Encoder(24, 2, 3, rope_theta=500.0, **options)
    assert [layer.mixer.rope_theta for layer in encoder.layers] == [500.0, 500.0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rope_of_lions_own_layers_is_a_kind_of_its_own(kind, tmp_path):
    def thetas(config):
        return [layer.mixer.rope_theta for layer in HEADS[kind](config).base_model.layers]

    config = CONFIGS[kind]
    assert thetas(config(softmax_layers=[1], rope_theta=9.0)) == [None, 9.0]  # the flat form is not for them
    assert thetas(config(softmax_layers=[1], rope_parameters=ROPE)) == [None, 500.0]
    assert thetas(config(softmax_layers=[1], rope_parameters=LINEAR_ROPE)) == [30.0, None]
    assert thetas(config(rope_parameters={"linear_attention": {"rope_theta": 7}})) == [7.0, 7.0]
    assert config(rope_parameters={"linear_attention": {"rope_theta": [None, None]}}).rope_parameters is None
    model = build(kind, {"rope_parameters": LINEAR_ROPE}, dtype=torch.float32)
    with torch.no_grad():
        plain = build(kind, {}, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())  # the same names and shapes
        assert not torch.allclose(*(m(**inputs_for(kind, torch.float32)).logits for m in (plain, model)), atol=1e-4)
    model.config.rope_parameters = {"linear_attention": {"rope_theta": 31.0}}
    with pytest.raises(ValueError, match="config.rope_parameters is .* but the model was built with"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rope_parameters": {"linear_attention": {"rope_theta": [9.0]}}}, "has 1 thetas .* each of the 2 layers"),
        ({"rope_parameters": {"linear_attention": {"rope_theta": [9.0, 1.0]}}}, "rope_theta is 1.0; it must be"),
        ({"rope_parameters": {"full_attention": {"rope_theta": [9.0, 9.0]}}}, "rope_theta is .9.0, 9.0.; it must be"),
        ({"rope_parameters": LINEAR_ROPE, "mask_type": "hgrn2"}, "keys of HGRN2 are gates, which cannot be rotated"),
        ({"rope_parameters": LINEAR_ROPE, "key_dim": 5}, "key_dim is 5 with rope_parameters"),
    ],
)
def test_rope_that_does_not_fit_the_layers_is_refused(options, message):
    for kind in (LionConfig, LionVisionConfig):
        with pytest.raises(Exception, match=message):
            kind(**{"num_hidden_layers": 2, **options})


@pytest.mark.parametrize("kind", CONFIGS)
def test_local_layers_give_their_matrices_and_drop_attention_in_training(kind):
    model, inputs = build(kind, {"local_layers": [1], "local_window": 4}), inputs_for(kind)
    matrix = model(**inputs, output_attentions=True).attentions[1]
    length = matrix.shape[-1]
    near = (torch.arange(length)[:, None] - torch.arange(length)).abs() <= 2
    assert (matrix[:, :, ~near] == 0).all() and matrix[0, :, near].all()
    expected = model(**inputs).logits
    model.config.attention_probs_dropout_prob = 0.5
    if kind == "image":
        torch.testing.assert_close(model(**inputs).logits, expected)
    model.train()
    assert not torch.allclose(model(**inputs).logits, expected)


# ------------------------------------------------------------------------------------------------------------ presets


def test_modern_presets_have_the_shapes_of_modernbert_and_ettin():
    sizes = {"tiny": 16.9e6, "small": 32.1e6, "base": 149.7e6, "large": 396.1e6}
    assert lion_hf.MODERN_PRESETS.keys() == {f"lion-s-modern-{size}" for size in sizes}
    assert not lion_hf.MODERN_PRESETS.keys() & lion_hf.PAPER_PRESETS.keys()
    for size, parameters in sizes.items():
        with torch.device("meta"):
            model = lion_hf.LionForMaskedLM(LionConfig.from_preset(f"LION-S-modern-{size}"))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)
        kinds = [type(layer.mixer).__name__ for layer in model.lion.layers]
        assert kinds == ["LionMixer" if i % 3 == 0 else "LocalMixer" for i in range(len(kinds))]
        assert not [name for name, _ in model.lion.named_parameters() if "bias" in name and "decay_proj" not in name]
    with pytest.raises(TypeError):
        lion_hf.MODERN_PRESETS["lion-s-modern-base"]["hidden_size"] = 1
    with pytest.raises(ValueError, match="is not a preset of LionVisionConfig"):
        LionVisionConfig.from_preset("lion-s-modern-base")


def test_a_modern_preset_learns_with_fewer_layers_and_another_vocabulary():
    config = LionConfig.from_preset("lion-s-modern-tiny", num_hidden_layers=2, vocab_size=61)
    assert (config.pad_token_id, config.local_layers, config.rope_theta) == (0, [1], 10000.0)
    model = lion_hf.LionForMaskedLM(config)
    inputs = text_inputs(batch=2, length=70)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [LionConfig, LionVisionConfig])
def test_rope_of_lions_own_layers_is_added_to_that_of_the_others(tmp_path, kind):
    config = kind(linear_rope_theta=20.0)
    assert config.rope_parameters == {
        "full_attention": None,
        "sliding_attention": None,
        "linear_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    both = kind(rope_theta=500.0, linear_rope_theta=[20, None], num_hidden_layers=2)
    assert (both.rope_theta, both.local_rope_theta, both.linear_rope_theta) == (500.0, 500.0, [20.0, None])
    both.linear_rope_theta = None
    assert both.linear_rope_theta is None and both.rope_theta == 500.0
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, linear_rope_theta=20.0).linear_rope_theta == 20.0
    with pytest.raises(ValueError, match="contradicts the checkpoint"):
        AutoConfig.from_pretrained(tmp_path, linear_rope_theta=30.0)


def test_rope_theta_leaves_rope_of_lions_own_layers_as_it_is(tmp_path):
    config = LionConfig.from_preset("lion-s-modern-tiny", rope_theta=500.0)
    assert (config.rope_theta, config.local_rope_theta, config.linear_rope_theta) == (500.0, 500.0, 10000.0)
    config.rope_theta = 50.0
    assert (config.rope_theta, config.linear_rope_theta) == (50.0, 10000.0)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, rope_theta=50.0).rope_parameters == config.rope_parameters
    config = LionConfig.from_preset("lion-s-modern-tiny", linear_rope_theta=None)
    assert (config.rope_theta, config.linear_rope_theta) == (10000.0, None)
    config = LionConfig.from_preset("lion-s-modern-tiny", rope_theta=7.0, linear_rope_theta=9.0)
    assert (config.rope_theta, config.linear_rope_theta) == (7.0, 9.0)
    LionConfig(rope_theta=500.0).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, linear_rope_theta=None).rope_parameters["rope_theta"] == 500.0
    config = LionConfig(rope_theta=500.0, linear_rope_theta=9.0)
    config.linear_rope_theta = None
    assert config.rope_parameters == LionConfig(rope_theta=500.0).rope_parameters
