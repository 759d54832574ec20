"""What variants can turn on in a mixer: neighbours, gates, norms, groups and directions, by their definitions."""

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS
from torch.nn import functional as F

import lion_hf
from lion_hf.nn import Encoder, LocalMixer, Mixer, SoftmaxMixer
from lion_hf.nn.names import MIXER_OPTIONS
from lion_hf.nn.variants import VARIANTS


DIM, HEADS, LENGTH = 24, 3, 11
NEIGHBOURS = {"short_conv": 3, "token_shift": True, "output_gate": "sigmoid", "output_norm": "head_rms"}


def mixer_of(variant, **options):
    """Return a mixer in which every weight has an effect."""
    mixer = Mixer(DIM, HEADS, variant, **options).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def tokens(batch=2, length=LENGTH):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def neighbour(x, i, step):
    """Return token i + step of x (batch, length, width), or zeros beyond the ends."""
    return x[:, i + step] if 0 <= i + step < x.shape[1] else torch.zeros_like(x[:, 0])


# ------------------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_a_short_convolution_reads_what_it_says(width, direction):
    mixer, x = mixer_of("lit", short_conv=width, direction=direction), tokens()
    query = mixer.recurrences(x)[0].query.transpose(1, 2).flatten(2)
    projected = mixer.q_proj(x)
    steps = {
        "both": [k - width // 2 for k in range(width)],
        "forward": [k - width + 1 for k in range(width)],
        "backward": [width - 1 - k for k in range(width)],
    }[direction]
    for i in range(LENGTH):
        taps = zip(steps, mixer.q_conv.weight[:, 0].unbind(1), strict=True)
        expected = mixer.q_conv.bias + sum(tap * neighbour(projected, i, step) for step, tap in taps)
        close(query[:, i], (F.elu(F.silu(expected).unflatten(-1, (HEADS, -1))) + 1).flatten(1))


@pytest.mark.parametrize("direction, steps", [("both", (-1, 1)), ("forward", (-1,)), ("backward", (1,))])
def test_a_token_shift_reads_what_it_says(direction, steps):
    mixer, x = mixer_of("lit", token_shift=True, direction=direction, output_gate="silu"), tokens()
    value = mixer.recurrences(x)[0].value.transpose(1, 2).flatten(2)
    for i in range(LENGTH):
        shifted = sum(neighbour(x, i, step) for step in steps) / len(steps)
        close(value[:, i], mixer.v_proj(x[:, i] + mixer.mu_v * (shifted - x[:, i])))
    assert [name for name, _ in mixer.named_parameters() if "mu_" in name] == ["mu_q", "mu_k", "mu_v", "mu_gate"]
    assert "mu_decay" in dict(Mixer(DIM, HEADS, "selective", token_shift=True).named_parameters())


def test_gates_and_norms_are_what_they_say():
    x = tokens()
    plain = mixer_of("lit")
    mixed = []
    plain.o_proj.register_forward_pre_hook(lambda module, inputs: mixed.append(inputs[0]))
    plain(x)
    by_head = mixed[0].unflatten(-1, (HEADS, -1))
    centred = by_head - by_head.mean(-1, keepdim=True)
    for kind, expected in {
        "rms": mixed[0] / (mixed[0].square().mean(-1, keepdim=True) + 1e-5).sqrt(),
        "head_rms": (by_head / (by_head.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2),
        "head_layer": (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2),
    }.items():
        for gate, function in {"silu": F.silu, "sigmoid": torch.sigmoid}.items():
            mixer = mixer_of("lit", output_norm=kind, output_gate=gate)
            mixer.load_state_dict(plain.state_dict(), strict=False)
            factor = function(mixer.gate_proj(x))
            close(mixer(x), mixer.o_proj(expected * mixer.out_norm.weight * factor))


def test_a_gate_before_the_norm_is_normalised_too():
    mixer, x, mixed = mixer_of("mamba2", output_norm="rms"), tokens(), tokens()
    gated = mixed * F.silu(mixer.gate_proj(x))
    size = (gated.square().mean(-1, keepdim=True) + mixer.variant.norm_eps).sqrt()
    close(mixer._normed(mixed, x), gated / size * mixer.out_norm.weight)


@pytest.mark.parametrize("variant", ["lit", "selective", "decay-channel", "gla", "grfa", "mamba2"])
def test_groups_of_heads_are_repeated_queries_and_keys(variant):
    options = {"key_dim": 5, "output_norm": "none"}  # a norm may depend on the groups
    shared, x = mixer_of(variant, key_heads=1, **options), tokens()
    state = shared.state_dict()
    for name in state:
        if name.startswith(("q_", "k_")):
            state[name] = state[name].repeat(HEADS, *[1] * (state[name].dim() - 1))
    whole = Mixer(DIM, HEADS, variant, **options).double()
    whole.load_state_dict(state)
    assert shared.q_proj.out_features == 5 and whole.q_proj.out_features == 15
    for form in FORMS:
        close(shared(x, format=form, chunk_size=4), whole(x, format=form, chunk_size=4))


# ----------------------------------------------------------------------------------------------------- every variant


@pytest.mark.parametrize("options", [{}, NEIGHBOURS], ids=["preset", "neighbours"])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_padding_and_packing_change_no_real_token_in_any_form(variant, options):
    mixer, x = mixer_of(variant, **options), tokens()
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])
    real[0, 4] = False  # also between real tokens
    x = torch.where(real.unsqueeze(-1), x, torch.nan)
    holed = torch.where(real.unsqueeze(-1), x, 7.0)
    expected = mixer(holed, real)
    alone = mixer(x[1:, :6])
    close(expected[1:, :6], alone)
    row, kept = torch.cat([holed[0], holed[1, :6]])[None], torch.cat([real[0], real[1, :6]])[None]
    bounds = torch.tensor([0, LENGTH, LENGTH + 6])
    for form in FORMS:
        options = {"format": form, "chunk_size": 4}
        close(mixer(holed, real, **options), expected)
        packed = mixer(row, kept, cu_seqlens=bounds, **options)
        close(packed[0, :LENGTH], expected[0])
        close(packed[0, LENGTH:], alone[0])


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_one_direction_reads_one_side_and_the_other_is_its_mirror_image(variant):
    forward, x = mixer_of(variant, direction="forward"), tokens()
    backward = Mixer(DIM, HEADS, variant, direction="backward").double()
    backward.load_state_dict(forward.state_dict())
    expected = forward(x)
    close(backward(x.flip(1)).flip(1), expected)
    changed = x.clone()
    changed[:, 6:] += 1
    close(forward(changed)[:, :6], expected[:, :6])
    assert (forward(changed)[:, 6:] - expected[:, 6:]).abs().max() > 1e-3
    for form in FORMS:
        close(forward(x, format=form, chunk_size=4), expected)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_prefix_tokens_do_not_decay_and_have_no_neighbours(variant):
    """A token before the row that does not decay is read by all tokens alike, and reads them as without it."""
    mixer, x = mixer_of(variant, prefix_tokens=1, **NEIGHBOURS), tokens(1)
    rows = torch.cat([x, x])
    rows[1, 0] += 1
    first, second = mixer._prepared(rows, lion_hf.nn.local.Sequences(prefix_tokens=1))[0][0][:2]
    close(first[0, :, 1:], first[1, :, 1:])
    close(second[0, :, 1:], second[1, :, 1:])
    decay = mixer.recurrences(rows)[0].log_decay
    if decay is not None and decay.dim() > 2:
        assert (decay[:, :, 0] == 0).all() and (decay[:, :, 1:] < 0).all()


@pytest.mark.parametrize("variant", [name for name in ALL_VARIANTS if VARIANTS[name].scans_taken(2) == 2])
def test_two_scans_are_averaged_in_every_form_and_in_the_matrix(variant):
    options = {**NEIGHBOURS, "output_gate": "none", "output_norm": "none"}
    mixer, x = mixer_of(variant, scans=2, prefix_tokens=1, **options), tokens(2, 7)
    paths = lion_hf.ops.snake_orders(2, 3)
    expected, matrix = mixer(x, paths=paths, output_attentions=True)
    for form in FORMS:
        close(mixer(x, paths=paths, format=form, chunk_size=3), expected)
    values = mixer.recurrences(x)[0].value
    close(mixer.o_proj((matrix @ values).transpose(1, 2).flatten(2)), expected)
    if mixer.normalize:
        assert (matrix >= 0).all() and (matrix.sum(-1) - 1).abs().max() < 1e-3
        return
    # The mean of two mixers, each with the decays of one scan and the tokens in its order.
    along = []
    for scan, (order, inverse) in enumerate(paths):
        single = mixer_of(variant, prefix_tokens=1, **(options | {"short_conv": 0, "token_shift": False}))
        state = dict(mixer.state_dict())
        for name in single.variant_weights:
            for key in [key for key in single.state_dict() if key.split(".")[0] == name]:
                state[key] = state.get(key.replace(name, f"{name}_2", 1), state[key]) if scan else state[key]
        single.load_state_dict({key: state[key] for key in single.state_dict()})
        along.append((single, order, inverse))
    flat = Mixer(
        DIM,
        HEADS,
        variant,
        scans=2,
        prefix_tokens=1,
        output_gate="none",
        output_norm="none",
        short_conv=0,
        token_shift=False,
    ).double()
    flat.load_state_dict({key: mixer.state_dict()[key] for key in flat.state_dict()})
    mean = sum(single(x[:, order])[:, inverse] for single, order, inverse in along) / 2
    close(flat(x, paths=paths), mean)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_signed_variants_never_divide_and_images_normalise_instead(variant):
    signed = VARIANTS[variant].signed
    text, image = lion_hf.LionConfig(mask_type=variant), lion_hf.LionVisionConfig(mask_type=variant)
    if signed:
        assert not text.normalize and not image.normalize and image.output_norm != "none"
        for owner in (lion_hf.LionConfig, lion_hf.LionVisionConfig):
            with pytest.raises(Exception, match="may be negative"):
                owner(mask_type=variant, normalize=True)
        with pytest.raises(ValueError, match="may be negative"):
            Mixer(DIM, HEADS, variant, normalize=True)
    else:
        assert image.normalize and Mixer(DIM, HEADS, variant).normalize
        scores = Mixer(DIM, HEADS, variant).double()(tokens(), output_attentions=True)[1]
        assert (scores >= 0).all()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_gradients_reach_every_weight(variant):
    encoder = Encoder(DIM, 2, HEADS, variant, **NEIGHBOURS)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    encoder(torch.randn(2, LENGTH, DIM)).square().sum().backward()
    lost = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not lost


# ----------------------------------------------------------------------------------------------------------- the papers


def test_retnet_decays_are_fixed_and_spread():
    mixer = Mixer(DIM, 4, "retnet")
    decay = mixer.recurrences(torch.randn(1, 5, DIM))[0].log_decay
    torch.testing.assert_close(1 - decay.exp(), torch.tensor([2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8]), rtol=1e-4, atol=0)
    assert not mixer.variant_weights and mixer.output_gate == "silu" and mixer.output_norm == "head_layer"


def test_gla_decays_are_the_sixteenth_root_of_a_gate_of_rank_16():
    mixer, x = mixer_of("gla"), tokens()
    down, up = mixer.decay_proj.down, mixer.decay_proj.up
    gate = torch.sigmoid(x @ down.weight.T @ up.weight.T + up.bias) ** (1 / 16)
    assert down.weight.shape == (16, DIM) and down.bias is None
    decay = mixer.recurrences(x)[0].log_decay.exp().transpose(1, 2).flatten(2)
    close(decay, gate)


@pytest.mark.parametrize("variant", [name for name in ALL_VARIANTS if VARIANTS[name].decay])
def test_windows_set_the_decays(variant):
    mixer, x = Mixer(DIM, HEADS, variant), torch.zeros(1, 5, DIM)
    before = mixer.recurrences(x)[0].log_decay
    mixer.set_windows((4.0, 8.0, 16.0))
    decay = mixer.recurrences(x)[0].log_decay.exp().double()
    if variant == "retnet":  # its decays are fixed
        assert torch.equal(decay, before.exp().double())
        return
    by_head = decay.unflatten(0, (-1, 1)) if decay.dim() < 3 else decay.transpose(0, 1)
    windows = torch.tensor([4.0, 8.0, 16.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        (1 + by_head.flatten(1)) / (1 - by_head.flatten(1)), windows.expand_as(by_head.flatten(1)), rtol=0.01, atol=0
    )


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"direction": "left"}, "direction is 'left'; allowed are 'both', 'forward', 'backward'"),
        ({"direction": "forward", "scans": 2}, "a grid is read in both directions"),
        ({"short_conv": -1}, "short_conv is -1; it must be a whole number, at least 0"),
        ({"short_conv": True}, "short_conv is True"),
        ({"token_shift": "both"}, "token_shift is 'both'; allowed are False, True"),
        ({"output_gate": "relu"}, "output_gate is 'relu'; allowed are 'none', 'silu', 'sigmoid'"),
        ({"output_norm": "layer"}, "output_norm is 'layer'; allowed are 'none', 'rms', "),
        ({"output_norm": "rms", "norm": True}, "normalise the output twice"),
        ({"key_heads": 2}, "key_heads is 2; it must divide the number of heads, 3"),
        ({"key_dim": 0}, "key_dim is 0; it must be a whole number, at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixer(DIM, HEADS, "decay", **options)
    config = {name: value for name, value in options.items() if name in MIXER_OPTIONS}
    if len(config) == len(options):
        with pytest.raises(Exception, match=f"{next(iter(config))}"):
            lion_hf.LionConfig(hidden_size=DIM, num_attention_heads=HEADS, **config)


@pytest.mark.parametrize(
    "build, given, meant",
    [
        (Mixer, "outputgate", "output_gate"),
        (Mixer, "Short_conv", "short_conv"),
        (LocalMixer, "windows", "window"),
        (SoftmaxMixer, "rope_teta", "rope_theta"),
        (Encoder, "outputgate", "output_gate"),
        (Encoder, "local_layer", "local_layers"),
    ],
)
def test_a_misspelt_option_is_told_with_the_nearest_one(build, given, meant):
    sizes = {"depth": 2} if build is Encoder else {}
    message = f"{build.__name__} has no option '{given}'. Did you mean '{meant}'"
    for layers in ([], [0, 1]) if build is Encoder else ([],):  # also where no layer would read it
        options = {"softmax_layers": layers} if build is Encoder else {}
        with pytest.raises(TypeError, match=message):
            build(dim=8, heads=2, **sizes, **options, **{given: None})
    with pytest.raises(TypeError, match=f"{build.__name__} has no option 'colour'. Its options are dim, .*heads, "):
        build(8, **sizes, heads=2, colour="red")


def test_softmax_layers_have_no_direction():
    with pytest.raises(ValueError, match="softmax_layers read both directions"):
        Encoder(DIM, 2, HEADS, softmax_layers=[1], direction="forward")
