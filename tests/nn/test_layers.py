"""Layers without a configuration: the examples of the documentation, and equality with the layers of the models."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, text_config, text_inputs, vision_config

import lion_hf
from lion_hf.nn import MLP, Block, Encoder, Mixer, SoftmaxMixer
from lion_hf.ops import snake_orders


PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = re.findall(
    r"^## ([^\n]*)\n.*?^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


def example(title):
    """Run the first block of code below a heading of the page and return what it defines."""
    defined = {}
    exec(compile(dict(EXAMPLES)[title], str(PAGE), "exec"), defined)
    return defined


# ------------------------------------------------------------------------------------------------ the documented models


def test_the_plain_classifier_knows_no_padding():
    model = example("In a plain PyTorch model")["Classifier"](100, 3).double().eval()
    ids, real = torch.randint(100, (2, 50)), torch.arange(50) < torch.tensor([[50], [30]])
    together = model(ids, real)
    torch.testing.assert_close(together[1:], model(ids[1:, :30], real[1:, :30]), rtol=1e-9, atol=1e-12)
    assert torch.equal(model(torch.where(real, ids, 0), real), together)


def test_the_vision_transformer_takes_any_grid_and_every_form():
    model = example("In a vision transformer")["VisionTransformer"]().double().eval()
    images = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    expected = model(images)
    for form in FORMS:
        for block in model.blocks:
            block.attn.forward = lambda x, paths, form=form, mixer=block.attn: Mixer.forward(
                mixer, x, paths=paths, format=form, chunk_size=8
            )
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-12)


def test_a_padded_signal_is_encoded_as_it_is_alone():
    model = example("Over a signal")["SignalEncoder"]().double().eval()
    signal, lengths = torch.randn(2, 1, 1600, dtype=torch.float64), torch.tensor([1600, 960])
    tokens, real = model(signal, lengths)
    alone, _ = model(signal[1:, :, :960], lengths[1:])
    torch.testing.assert_close(tokens[1, real[1]], alone[0], rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------- the layers of the models


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_an_encoder_with_the_options_of_the_paper_is_the_text_model(variant, form):
    config = text_config(variant, unpad=False, softmax_layers=[1], format=form)
    model = lion_hf.LionModel(config, add_pooling_layer=False).double().eval()
    encoder = Encoder(
        24, 2, 3, variant, hidden=40, norm_position="post", norm_eps=1e-12, normalize=variant == "grfa",
        norm=variant == "lit", gate_eps=1e-7, softmax_layers=[1],
    ).double().eval()  # fmt: skip
    encoder.load_state_dict({name: x for name, x in model.state_dict().items() if name.startswith("layers.")})
    inputs = text_inputs()
    real = inputs["attention_mask"].bool()
    states = encoder(model.embeddings(inputs["input_ids"]), key_mask=real, format=form, chunk_size=4)
    torch.testing.assert_close(states, model(**inputs).last_hidden_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["normal", "snake"])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_an_encoder_with_the_options_of_the_paper_is_the_image_model(variant, order):
    model = lion_hf.LionVisionModel(vision_config(variant, order=order)).double().eval()
    scans = 2 if order == "snake" else 1
    options = {"norm_eps": 1e-6, "scans": scans, "prefix_tokens": 1, "output_norm": model.config.output_norm}
    encoder = Encoder(24, 2, 3, variant, hidden=40, **options).double().eval()
    encoder.load_state_dict({k: x for k, x in model.state_dict().items() if k.startswith(("layers.", "norm."))})
    pixels = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    states = encoder(model.embeddings(pixels), paths=snake_orders(3, 5))
    torch.testing.assert_close(states, model(pixels).last_hidden_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mlp_type", ["mlp", "glu"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_blocks_are_options_of_the_text_model_too(norm_position, mlp_type, tmp_path):
    config = text_config(norm_position=norm_position, mlp_type=mlp_type, normalize=True, feature_map="unit_silu")
    model = lion_hf.LionForMaskedLM(config).double().eval()
    names = {name.removeprefix("lion.") for name, _ in model.named_parameters()}
    assert ("norm.weight" in names) == (norm_position == "pre")
    assert ("layers.0.mlp.gate_proj.weight" in names) == (mlp_type == "glu")
    inputs = text_inputs()
    expected = model(**inputs).logits
    for form in FORMS:
        model.config.format = form
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path, dtype=torch.float64)(**inputs).logits, expected)


def test_gated_layers_multiply_by_the_gate():
    mlp, x = MLP(6, 10, gated=True), torch.randn(2, 3, 6)
    expected = mlp.down_proj(torch.nn.functional.gelu(mlp.up_proj(x)) * mlp.gate_proj(x))
    torch.testing.assert_close(mlp(x), expected)


def test_gradients_reach_every_parameter_in_training():
    encoder = Encoder(24, 3, 3, softmax_layers=[1], mlp_type="glu", dropout=0.1, drop_path=0.1, norm=True)
    encoder(torch.randn(4, 9, 24), key_mask=torch.arange(9) < torch.tensor([[9], [9], [4], [1]])).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_packed_rows_are_their_sequences():
    encoder = Encoder(24, 2, 3, softmax_layers=[1]).double().eval()
    row = torch.randn(1, 12, 24, dtype=torch.float64)
    packed = encoder(row, cu_seqlens=torch.tensor([0, 5, 12]))
    for start, stop in ((0, 5), (5, 12)):
        torch.testing.assert_close(packed[:, start:stop], encoder(row[:, start:stop]), rtol=1e-9, atol=1e-12)


def test_attention_matrices_are_returned_where_asked_for():
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for mixer in (Mixer(24, 3).double(), SoftmaxMixer(24, 3).double()):
        mixed, matrix = mixer(x, output_attentions=True)
        assert matrix.shape == (2, 3, 7, 7)
        torch.testing.assert_close(mixed, mixer(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_layers_can_be_built_without_memory():
    with torch.device("meta"):
        encoder = Encoder(24, 2, 3, "decay", scans=2)
    assert all(p.is_meta for p in encoder.parameters())


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Mixer(25, 3), "dim 25 is not divisible by heads 3"),
        (lambda: Mixer(24, 3, "selektive"), "'selektive' is not a variant; known are 'lit', 'lion-lit'"),
        (
            lambda: Mixer(24, 3, feature_map="relu"),
            "feature_map is 'relu'; allowed are 'identity', 'elu', 'unit_silu', 'silu', 'hedgehog'",
        ),
        (lambda: Mixer(24, 3, feature_map="identity"), "feature_map is 'identity' with normalize=True"),
        (
            lambda: Block(24, None, None, norm_position="sandwich"),
            "norm_position is 'sandwich'; allowed are 'post', 'pre'",
        ),
        (lambda: Encoder(24, 2, 3, mlp_type="moe"), "mlp_type is 'moe'; allowed are 'mlp', 'glu'"),
        (lambda: MLP(4, 8, activation="swish"), "activation is 'swish'; allowed are 'gelu', 'relu', 'silu'"),
        (lambda: Mixer(24, 3, scans=2)(torch.randn(1, 5, 24)), "averages 2 scans, so it needs 2 paths"),
        (
            lambda: Mixer(24, 3, scans=2)(torch.randn(1, 5, 24), torch.ones(1, 5).bool(), paths=snake_orders(2, 2)),
            "support neither key_mask nor cu_seqlens",
        ),
        (
            lambda: Mixer(24, 3, prefix_tokens=1)(torch.randn(1, 5, 24), cu_seqlens=torch.tensor([0, 5])),
            "has prefix_tokens=1, counted from the beginning of a row, so it does not support packed rows",
        ),
        (
            lambda: Mixer(24, 3)(torch.randn(1, 5, 24), format="chunk", output_attentions=True),
            "needs the attention matrix, which format='chunk' never builds",
        ),
        (lambda: Mixer(24, 3, scans=3), "scans is 3; allowed are 1, 2"),
        (lambda: Mixer(24, 3, prefix_tokens=-1), "prefix_tokens is -1; it must be a number of tokens"),
        (lambda: Mixer(24, 3, prefix_tokens=6)(torch.randn(1, 5, 24)), "prefix_tokens=6, but x holds 5 tokens"),
        (lambda: Mixer(24, 3)(torch.randn(5, 24)), r"x has shape \(5, 24\); it must be \(batch, length, 24\)"),
        (lambda: Mixer(24, 3).set_windows([4, 8, 16, 32]), "or 3 numbers, one per head"),
        (lambda: Mixer(24, 3, "lit").set_windows([1, 8]), "each a finite number of tokens above 1"),
        *(
            (
                lambda length=length, form=form: Mixer(24, 3, scans=2)(
                    torch.randn(1, length, 24), paths=snake_orders(2, 2), format=form
                ),
                f"paths are for 5 tokens, but x holds {length}",
            )
            for length in (4, 9)
            for form in FORMS
        ),
        *(
            (
                lambda call=call: call(torch.randn(1, 5, 24), cu_seqlens=torch.tensor([0, 2, 5])),
                "several packed sequences, for which no attention matrix is built",
            )
            for call in (
                partial(Mixer(24, 3), output_attentions=True),
                partial(Mixer(24, 3, normalize=False), dropout=0.1),
                partial(SoftmaxMixer(24, 3), output_attentions=True),
            )
        ),
    ],
)
def test_invalid_options_raise_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()


MASKED = {
    "mixer": lambda: Mixer(24, 3),
    "softmax": lambda: SoftmaxMixer(24, 3),
    "encoder": lambda: Encoder(24, 2, 3, softmax_layers=[1]),
    "unpadded": lambda: Encoder(24, 2, 3, softmax_layers=[1], unpad=True),
}


@pytest.mark.parametrize("layer", MASKED)
def test_masks_of_every_dtype_are_read_alike_and_additive_ones_are_refused(layer):
    """Converted to bool, an additive mask (0 for real tokens, -inf for padding) would mask the real tokens."""
    layer, x = MASKED[layer](), torch.randn(2, 40, 24)
    real = torch.arange(40) < torch.tensor([[40], [10]])
    expected = layer(x, real)
    for dtype in (torch.float32, torch.uint8, torch.int64):
        torch.testing.assert_close(layer(x, real.to(dtype))[real], expected[real])
    with pytest.raises(ValueError, match="key_mask holds values other than 0 and 1.*Convert an additive mask"):
        layer(x, torch.zeros(2, 40).masked_fill(~real, -torch.inf))
    with pytest.raises(ValueError, match=r"key_mask has shape \(2, 39\); it must be \(batch, length\) = \(2, 40\)"):
        layer(x, real[:, 1:])


def test_windows_let_a_new_layer_read_distant_tokens():
    """The gradient of a token 299 tokens away is 0 in float32 with decays near 0.5."""
    x = torch.randn(1, 300, 24, requires_grad=True)
    for variant in ("decay", "selective"):
        mixer = Mixer(24, 3, variant)
        (near,) = torch.autograd.grad(mixer(x)[0, -1].sum(), x)
        mixer.set_windows((16, 600))
        (far,) = torch.autograd.grad(mixer(x)[0, -1].sum(), x)
        assert near[0, 0].abs().max() < 1e-12 < 1e-6 < far[0, 0].abs().max()


def test_paths_of_a_grid_alone_are_those_with_a_class_token_without_it():
    for (order, inverse), (other, _) in zip(snake_orders(3, 4, prefix_tokens=0), snake_orders(3, 4), strict=True):
        assert torch.equal(order, other[1:] - 1) and torch.equal(order[inverse], torch.arange(12))
    mixer = Mixer(24, 3, scans=2)
    assert mixer(torch.randn(2, 12, 24), paths=snake_orders(3, 4, prefix_tokens=0)).shape == (2, 12, 24)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variant", ["decay", "selective"])
def test_two_scans_are_averaged_alike_in_every_form(variant, normalize):
    mixer = Mixer(24, 3, variant, scans=2, prefix_tokens=1, normalize=normalize).double().eval()
    x, paths = torch.randn(2, 13, 24, dtype=torch.float64), snake_orders(3, 4)
    expected, matrix = mixer(x, paths=paths, output_attentions=True)
    for form in FORMS:
        torch.testing.assert_close(mixer(x, paths=paths, format=form, chunk_size=4), expected, rtol=1e-9, atol=1e-11)
    value = mixer.project(x)[2]
    torch.testing.assert_close(expected, mixer.o_proj((matrix @ value).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("options", [{"softmax_layers": [2]}, {"softmax_layers": [-1]}, {"attention_dropout": 0.1}])
def test_options_without_effect_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        Encoder(24, 2, 3, **options)
