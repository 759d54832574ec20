"""Rotary positions in LION's own layers: definition, distances, padding, packing, scans and graphs."""

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS

from lion_hf.nn import Encoder, Mixer
from lion_hf.nn.rotary import apply_rotary
from lion_hf.ops import snake_orders


DIM, HEADS, THETA = 24, 3, 20.0
ROTATED = [name for name in ALL_VARIANTS if name != "hgrn2"]  # whose keys are gates


def mixer_of(variant="selective", **options):
    """Return a mixer with RoPE in which every weight has an effect."""
    mixer = Mixer(DIM, HEADS, variant, rope_theta=THETA, **options).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


def tokens(batch=2, length=11):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def by_hand(mixer, x, positions):
    """Return the output for x (length, dim): a dense matrix of rotated features and decays per head, divided by rows.

    `positions` are (length,). The decays are those of LION-D or of none."""
    query, key, value = (y[0] for y in mixer.project(x[None]))
    rates = THETA ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(len(x), 4, dtype=torch.float64), positions.double()[:, None] * rates)
    features = []
    for y in (query, key):
        turned = torch.complex(y[..., :4], y[..., 4:]) * turn
        features.append(torch.nn.functional.elu(torch.cat([turned.real, turned.imag], -1)) + 1)
    matrix = features[0] @ features[1].mT * 8**-0.5
    if mixer.variant.decay:
        place = torch.arange(len(x))
        matrix = matrix * torch.sigmoid(mixer.decay_logit)[:, None, None] ** (place[:, None] - place).abs()
    mixed = matrix @ value / (matrix.sum(-1, keepdim=True) + 1e-6)
    return mixer.o_proj(mixed.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["lit", "decay"])
def test_queries_and_keys_rotate_before_the_feature_map(variant, form):
    mixer, x = mixer_of(variant, feature_map="elu"), tokens()
    actual = mixer(x, format=form, chunk_size=4)
    for row, output in zip(x, actual, strict=True):
        close(output, by_hand(mixer, row, torch.arange(11)))


@pytest.mark.parametrize("variant", ["lit", "decay"])
def test_without_a_feature_map_scores_of_equal_tokens_depend_on_the_distance(variant):
    mixer = mixer_of(variant, feature_map="identity", normalize=False)
    matrix = mixer(tokens(1, 1).expand(1, 12, DIM), output_attentions=True)[1]
    for distance in (-7, -1, 0, 3):
        along = matrix.diagonal(distance, 2, 3)
        close(along, along[..., :1].expand_as(along))
    assert ((matrix[0, :, 0, 1:] - matrix[0, :, 0, :1]).abs() > 1e-9).all()  # and on nothing else


@pytest.mark.parametrize("variant", ROTATED)
def test_forms_padding_and_packing_agree_in_outputs_and_gradients(variant):
    """Padding on both sides and inside: the positions of a row count from its first real token."""
    feature_map = {} if variant in ("rwkv6", "mamba2", "gla", "lstm", "retnet") else {"feature_map": "unit_silu"}
    mixer = mixer_of(variant, **feature_map)
    x = tokens(3, 9)
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()

    def run(*rows, form):
        """Return outputs at real tokens and the gradients of a loss over all of them."""
        mixer.zero_grad()
        found = torch.cat([mixer(y, format=form, chunk_size=4, **options)[real] for y, real, options in rows])
        (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum().backward()
        return {"output": found.detach()} | {name: p.grad.clone() for name, p in mixer.named_parameters()}

    first, last = (2, 0, 1), (7, 9, 6)
    alone = []
    for row, start, stop in zip(range(3), first, last, strict=True):
        y, real = x[row : row + 1, start:stop], mask[row : row + 1, start:stop]
        alone.append((y, real, {"key_mask": real}))
    expected = run(*alone, form="attention")
    bounds = torch.tensor([0, 9, 18, 27])
    packed = (x.flatten(0, 1)[None], mask.flatten()[None], {"cu_seqlens": bounds, "key_mask": mask.flatten()[None]})
    for form in FORMS:
        for rows in ([(x, mask, {"key_mask": mask})], [packed]):
            actual = run(*rows, form=form)
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_positions_of_scans_are_those_of_the_row():
    """Rotated inputs of a mixer without RoPE: each scan reads the same queries and keys."""
    mixer, x = mixer_of("decay", scans=2, feature_map="identity", normalize=False), tokens(2, 12)
    plain = Mixer(DIM, HEADS, "decay", scans=2, feature_map="identity", normalize=False).double()
    plain.load_state_dict(mixer.state_dict())
    expected = apply_rotary(*plain.project(x)[:2], THETA)
    for found in mixer.recurrences(x):
        close(found.query, expected[0])
        close(found.key, expected[1])
    paths = snake_orders(3, 4, prefix_tokens=0)
    for form in FORMS[1:]:
        close(mixer(x, paths=paths, format=form), mixer(x, paths=paths, format="attention"))


def test_masked_tokens_before_the_text_may_be_nan():
    mixer, x = mixer_of("decay", feature_map="elu"), tokens()
    mask = torch.arange(11).expand(2, -1) >= torch.tensor([[3], [0]])
    x[0, :3] = torch.nan
    close(mixer(x, mask)[0, 3:], mixer(x[:1, 3:])[0])


@pytest.mark.slow
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
def test_graphs_take_any_batch_length_and_padding(feature_map):
    mixer = mixer_of(feature_map=feature_map)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=5000)
    dims = {0: batch, 1: length}
    inputs = (tokens(2, 9), torch.arange(9).expand(2, -1) > 3)
    exported = torch.export.export(_Attention(mixer), inputs, dynamic_shapes={"x": dims, "key_mask": dims}).module()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    for size in ((3, 14), (1, 5)):
        x, mask = tokens(*size), torch.rand(size) > 0.4
        mask[:, -1] = True
        expected = mixer(x, mask)[mask]
        close(exported(x, mask)[mask], expected)
        close(compiled(x, mask)[mask], expected)


class _Attention(torch.nn.Module):
    """The attention form of a mixer, whose graph takes any length."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, key_mask):
        return self.mixer(x, key_mask, format="attention")


def test_an_encoder_has_a_theta_for_all_its_mixers_or_for_each():
    encoder = Encoder(DIM, 3, HEADS, softmax_layers=[1], rope_theta=9.0, linear_rope_theta=5.0)
    assert [layer.mixer.rope_theta for layer in encoder.layers] == [5.0, 9.0, 5.0]
    encoder = Encoder(DIM, 3, HEADS, softmax_layers=[1], linear_rope_theta=[5.0, 7.0, None])
    assert [layer.mixer.rope_theta for layer in encoder.layers] == [5.0, None, None]
    assert "rope_theta=5.0" in repr(encoder.layers[0].mixer) and "rope_theta" not in repr(encoder.layers[2].mixer)
    with pytest.raises(ValueError, match="linear_rope_theta is .5.0, 7.0.; .*each of the 3 blocks"):
        Encoder(DIM, 3, HEADS, linear_rope_theta=[5.0, 7.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rope_theta": 0.0}, "rope_theta is 0.0; it must be a positive number"),
        ({"rope_theta": 9.0, "key_dim": 5}, "heads are 5 wide; .*must be even"),
        ({"rope_theta": 9.0, "variant": "hgrn2"}, "keys of HGRN2 are gates, which cannot be rotated"),
    ],
)
def test_what_cannot_rotate_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixer(DIM, HEADS, **options)
