"""With direction="forward" each mixer is the causal layer of its paper. What both directions add is checked as well."""

import pytest
import torch
from causal_references import Shape, causal_layer
from small_models import FORMS
from torch import nn

from lion_hf.nn import Mixer
from lion_hf.ops.scans import snake_orders


OWN_LAYER = ("retnet", "gla", "grfa", "lstm", "hgrn2", "rwkv6", "mamba2", "decay-channel", "selective-channel")
SIGNED = ("retnet", "gla", "hgrn2", "rwkv6", "mamba2")
LENGTH = 65

# The biases that open and close the gates of each variant.
GATES = {
    "retnet": (),
    "gla": ("decay_proj.up.bias",),
    "grfa": ("decay_proj.bias",),
    "lstm": ("forget_gate.bias", "input_gate.bias"),
    "hgrn2": ("k_proj.bias",),
    "rwkv6": ("decay_up.bias",),
    "mamba2": ("dt_bias", "A_log"),
    "decay-channel": ("decay_logit",),
    "selective-channel": ("decay_proj.bias",),
}

# Heads and widths, groups of heads, convolutions, shifts, prefix tokens and layers.
SHAPES = {
    "heads": {"dim": 24, "heads": 3},
    "one-head": {"dim": 7, "heads": 1, "qkv_bias": False},
    "wide-keys": {"dim": 10, "heads": 2, "key_dim": 7, "layer_idx": 1, "num_layers": 3},
    "groups": {"dim": 24, "heads": 4, "key_heads": 2, "key_dim": 5, "short_conv": 3, "layer_idx": 4, "num_layers": 5},
    "one-group": {
        "dim": 15,
        "heads": 3,
        "key_heads": 1,
        "short_conv": 1,
        "token_shift": True,
        "layer_idx": 1,
        "num_layers": 2,
    },
    "all": {"dim": 12, "heads": 2, "short_conv": 4, "token_shift": True, "prefix_tokens": 2},
}


def make(variant, direction="forward", **options):
    """Build a mixer in float64 whose weights are all random."""
    mixer = Mixer(variant=variant, direction=direction, **options).double().eval()
    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            fan_in = weight.shape[-1] if weight.dim() > 1 else 1
            weight.normal_(0, fan_in**-0.5 if weight.dim() > 1 else 1.0)
            if name.startswith("mu_"):
                weight.uniform_(0, 1)
    return mixer


def saturate(mixer):
    """Set the biases of the gates far beyond where they are open or closed."""
    levels = torch.tensor([-1000.0, -100, -40, -30, -2, 0, 2, 30, 40, 100, 1000])
    with torch.no_grad():
        for name in GATES[mixer.variant.name]:
            bias = mixer.state_dict().get(name)
            if bias is not None:
                drawn = levels[torch.randint(len(levels), bias.shape)].double()
                bias.copy_(drawn.clamp(max=6) if name == "A_log" else drawn)


def rows(mixer, length=LENGTH, batch=2):
    """Return x and a mask: padding at the beginning of the first row, inside and at the end of the second."""
    x = torch.randn(batch, length, mixer.dim, dtype=torch.float64)
    mask = torch.ones(batch, length, dtype=torch.bool)
    first = mixer.prefix_tokens
    mask[0, first : first + length // 5] = False
    mask[1, length - length // 7 :] = False
    mask[1, first + length // 4 : first + length // 3] = False
    return x, mask


def by_the_paper(mixer, x, mask):
    shape = Shape(
        mixer.num_heads, mixer.key_heads, mixer.key_dim, mixer.prefix_tokens, mixer.layer_idx, mixer.num_layers,
        mixer.variant.norm_eps, mixer.feature_map, getattr(mixer.variant, "gate_soft_cap", None),
    )  # fmt: skip
    return causal_layer(mixer.variant.name, mixer.state_dict(), x, mask, shape)


def assert_causal_layer(mixer, x, mask):
    expected = by_the_paper(mixer, x, mask)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    assert expected.isfinite().all() and expected[real].abs().max() > 1e-3
    for form in FORMS:
        actual = mixer(x, mask, format=form, chunk_size=16)
        torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------- the causal layers


@pytest.mark.parametrize("gates", ["random", "saturated"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", OWN_LAYER)
def test_each_mixer_is_the_causal_layer_of_its_paper(variant, shape, gates):
    mixer = make(variant, **SHAPES[shape])
    if gates == "saturated":
        saturate(mixer)
    assert_causal_layer(mixer, *rows(mixer))


@pytest.mark.parametrize("variant", OWN_LAYER)
def test_the_causal_layers_begin_as_they_are_initialised_without_padding(variant):
    mixer = Mixer(12, 2, variant, direction="forward", layer_idx=1, num_layers=3).double()
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), by_the_paper(mixer, x, None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("variant", OWN_LAYER)
def test_short_rows(variant, length):
    mixer = make(variant, dim=6, heads=2)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    assert_causal_layer(mixer, x, None)


@pytest.mark.parametrize("features", ["elu", "unit_silu"])
@pytest.mark.parametrize("variant", ["grfa", "decay-channel", "selective-channel"])
def test_positive_features(variant, features):
    mixer = make(variant, dim=12, heads=2, feature_map=features)
    assert_causal_layer(mixer, *rows(mixer))


def test_the_gates_of_mlstm_can_be_capped_as_in_xlstm_7b():
    mixer = make("lstm", dim=12, heads=2)
    saturate(mixer)
    mixer.variant = type("Capped", (mixer.variant,), {"gate_soft_cap": 15.0})
    assert_causal_layer(mixer, *rows(mixer))


# ----------------------------------------------------------------------------------------------- Transformers' modules


@pytest.mark.parametrize("heads, groups, state, width", [(4, 1, 5, 4), (4, 2, 8, 3), (1, 1, 6, 4), (3, 3, 7, 2)])
def test_mamba2_is_that_of_transformers(heads, groups, state, width):
    """Transformers computes the recurrence and the norm in float32, so the tolerance is that of float32."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    dim = 6 * heads
    config = Mamba2Config(
        hidden_size=dim, num_heads=heads, head_dim=6, expand=1, state_size=state, n_groups=groups, conv_kernel=width,
        chunk_size=16, num_hidden_layers=1,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, 0).double().eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    ours = Mixer(
        dim, heads, "mamba2", direction="forward", key_heads=groups, key_dim=state, short_conv=width, qkv_bias=False
    ).double()
    inner = [dim, groups * state, groups * state]
    weights = {name: weight for name, weight in theirs.state_dict().items() if name in ("dt_bias", "A_log", "D")}
    gate, *parts, steps = theirs.in_proj.weight.split([dim, *inner, heads])
    for name, rows_of, taps, bias in zip(
        "vkq", parts, theirs.conv1d.weight.split(inner), theirs.conv1d.bias.split(inner), strict=True
    ):
        weights |= {f"{name}_proj.weight": rows_of, f"{name}_conv.weight": taps, f"{name}_conv.bias": bias}
    weights |= {"gate_proj.weight": gate, "dt_proj.weight": steps, "out_norm.weight": theirs.norm.weight}
    weights |= {"o_proj.weight": theirs.out_proj.weight}
    load(ours, weights)

    x, mask = rows(ours)
    mask[1] = True
    mask[1, 50:] = False  # Transformers lets padding inside a row decay as a token of zeros does
    for key_mask in (None, mask):
        expected = theirs(x, attention_mask=key_mask)
        real = slice(None) if key_mask is None else key_mask
        for form in FORMS:
            actual = ours(x, key_mask, format=form, chunk_size=16)
            torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps, tolerance", [(0.0, 1e-9), (1e-6, 1e-4)])
def test_mlstm_is_the_xlstm_of_transformers(eps, tolerance):
    """Transformers adds `eps` to the denominators, in stabilised units. Without it both are the same layer."""
    from transformers.models.xlstm.modeling_xlstm import xLSTMConfig, xLSTMLayer

    dim, heads = 24, 2
    config = xLSTMConfig(
        hidden_size=dim, num_heads=heads, mode="train", chunk_size=13, eps=eps, norm_reduction_force_float32=False
    )
    theirs = xLSTMLayer(config).double().eval()
    ours = Mixer(dim, heads, "lstm", direction="forward", key_dim=dim // (2 * heads), qkv_bias=False).double()
    ours.variant = type("Capped", (ours.variant,), {"gate_soft_cap": config.gate_soft_cap})
    with torch.no_grad():
        for gate in (theirs.igate_preact, theirs.fgate_preact):
            gate.bias.normal_(0, 5)
    state = theirs.state_dict()
    names = {
        "q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "gate_proj", "igate_preact": "input_gate",
        "fgate_preact": "forget_gate", "multihead_norm": "out_norm", "out_proj": "o_proj",
    }  # fmt: skip
    load(ours, {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": weight for n, weight in state.items()})
    x = torch.randn(2, LENGTH, dim, dtype=torch.float64)
    expected = theirs(x)[0]
    for form in FORMS:
        actual = ours(x, format=form, chunk_size=16)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_fixed_decay_per_head_is_the_lightning_attention_of_minimax():
    """It passes query, key and value through SiLU, as a convolution of width 1 does. Its norm is in float32."""
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    dim, heads, width = 24, 3, 8
    config = MiniMaxConfig(
        hidden_size=dim, num_attention_heads=heads, head_dim=width, num_hidden_layers=3, block_size=16,
        layer_types=["linear_attention"] * 3,
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, 1).double().eval()
    ours = Mixer(
        dim, heads, "decay", direction="forward", normalize=False, short_conv=1, output_norm="rms",
        output_gate="sigmoid", qkv_bias=False,
    ).double()  # fmt: skip
    theirs.norm.variance_epsilon = ours.out_norm.eps * width  # they have no scale, we have width**-0.5
    projections = theirs.qkv_proj.weight.view(heads, 3, width, dim).unbind(1)
    weights = {f"{name}_proj.weight": part.reshape(dim, dim) for name, part in zip("qkv", projections, strict=True)}
    weights |= {f"{name}_conv.weight": torch.ones(dim, 1, 1) for name in "qkv"}
    weights |= {"decay_logit": torch.logit(torch.exp(-theirs.slope_rate.flatten()))}
    weights |= {"out_norm.weight": theirs.norm.weight, "gate_proj.weight": theirs.output_gate.weight}
    load(ours, weights | {"o_proj.weight": theirs.out_proj.weight})
    x, mask = rows(ours)
    for key_mask in (None, mask):
        expected = theirs(x, None, key_mask)[0]
        real = slice(None) if key_mask is None else key_mask
        for form in FORMS:
            actual = ours(x, key_mask, format=form, chunk_size=16)
            torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-6)


def load(mixer, weights):
    """Copy weights by name. Biases that the other module lacks become 0, and nothing else may be missing."""
    state = mixer.state_dict()
    lacking = [name for name in state if name not in weights]
    assert all(name.endswith("bias") for name in lacking), lacking
    mixer.load_state_dict({name: weights.get(name, torch.zeros_like(x)).double() for name, x in state.items()})


# ------------------------------------------------------------------------------------------------------ both directions


@pytest.mark.parametrize("variant", OWN_LAYER)
def test_backward_is_forward_on_the_reversed_row(variant):
    options = {"dim": 12, "heads": 2, "short_conv": 4, "token_shift": True}
    ahead, back = make(variant, **options), make(variant, "backward", **options)
    back.load_state_dict(ahead.state_dict())
    x, mask = rows(ahead)
    expected = ahead(x.flip(1), mask.flip(1)).flip(1)
    torch.testing.assert_close(back(x, mask)[mask], expected[mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", SIGNED)
def test_both_directions_count_the_token_itself_once(variant):
    """Without a norm, forward and backward together are both directions and each token alone."""
    options = {"dim": 12, "heads": 2, "key_dim": 5, "output_norm": "none", "short_conv": 0, "token_shift": False}
    both = make(variant, "both", **options)
    saturate(both)
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    sides = []
    for direction in ("forward", "backward"):
        side = make(variant, direction, **options)
        side.load_state_dict(both.state_dict())
        sides.append(side(x))
    alone = both(x.reshape(-1, 1, 12)).view_as(x)
    for form in FORMS:
        torch.testing.assert_close(both(x, format=form) + alone, sides[0] + sides[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", SIGNED)
def test_two_scans_are_the_mean_of_two_layers(variant):
    """Without a norm, the second layer having the weights of the second scan; both count the token itself."""
    options = {"dim": 12, "heads": 2, "output_norm": "none", "short_conv": 0, "token_shift": False}
    mixer = make(variant, "both", scans=2, prefix_tokens=1, **options)
    paths = snake_orders(3, 4)
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    expected = 0
    for scan, (order, inverse) in enumerate(paths[: mixer.scans], 1):
        single = make(variant, "both", prefix_tokens=1, **options)
        state = mixer.state_dict()
        own = {name: mixer.variant.weight_name(name.split(".")[0], scan - 1) for name in single.state_dict()}
        names = {name: ".".join([first, *name.split(".")[1:]]) for name, first in own.items()}
        single.load_state_dict({name: state.get(names[name], state[name]) for name in names})
        expected = expected + single(x[:, order], format="attention")[:, inverse] / mixer.scans
    for form in FORMS:
        actual = mixer(x, paths=paths, format=form, chunk_size=4)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", OWN_LAYER)
def test_padding_changes_no_token_and_packed_rows_are_separate_rows(variant, form):
    mixer = make(variant, "both", dim=12, heads=2, layer_idx=1, num_layers=2)
    lengths = [1, 17, 5, 30]
    pieces = [torch.randn(1, length, 12, dtype=torch.float64) for length in lengths]
    alone = torch.cat([mixer(piece, format=form, chunk_size=8) for piece in pieces], 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = mixer(torch.cat(pieces, 1), cu_seqlens=bounds, format=form, chunk_size=8)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)

    x, mask = torch.randn(len(lengths), 40, 12, dtype=torch.float64), torch.zeros(len(lengths), 40, dtype=torch.bool)
    for row, (left, piece) in enumerate(zip((0, 23, 11, 10), pieces, strict=True)):
        x[row, left : left + piece.shape[1]] = piece
        mask[row, left : left + piece.shape[1]] = True
    torch.testing.assert_close(mixer(x, mask, format=form, chunk_size=8)[mask], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", OWN_LAYER)
def test_gradients_are_finite_however_far_the_gates_are_saturated(variant):
    mixer = make(variant, "both", dim=12, heads=2).float()
    saturate(mixer)
    for form in FORMS:
        mixer.zero_grad()
        y = mixer(torch.randn(2, LENGTH, 12), format=form, chunk_size=16)
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(weight.grad.isfinite().all() for weight in mixer.parameters())


# ---------------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize("variant", ["lstm", "mamba2", "hgrn2", "rwkv6", "gla", "grfa"])
def test_windows_set_the_decays(variant):
    """A head with window n decays by (n - 1) / (n + 1) at every token, so it reads n tokens on both sides together."""
    windows = [5.0, 40.0]
    mixer = Mixer(12, 2, variant).double()
    mixer.set_windows(windows)
    if variant == "hgrn2":
        nn.init.zeros_(mixer.k_proj.weight)  # windows set its biases only
    (recurrence,) = mixer.recurrences(torch.randn(1, 3, 12, dtype=torch.float64))
    decay = recurrence.log_decay.exp()
    decay = decay if decay.dim() == 4 else decay.unsqueeze(-1)
    expected = torch.tensor([(n - 1) / (n + 1) for n in windows], dtype=torch.float64)
    torch.testing.assert_close(decay, expected[None, :, None, None].expand_as(decay), rtol=1e-9, atol=1e-9)
