"""Learned feature maps: their definition, and that forms, padding, packing and folders hold with them."""

import pytest
import torch
from torch.func import functional_call

from lion_hf import LionConfig, LionForMaskedLM, LionVisionConfig, LionVisionModel
from lion_hf.nn import Mixer
from lion_hf.nn.learned_features import Hedgehog


LENGTHS = (5, 1, 12)


def make(variant="selective", **options):
    torch.manual_seed(0)
    mixer = Mixer(24, 3, variant, feature_map="hedgehog", **options).double().eval()
    with torch.no_grad():
        for module in (mixer.q_feature, mixer.k_feature):
            module.weight.add_(torch.randn_like(module.weight))
    return mixer


def gradients(mixer, x, weight, **arguments):
    """Return the output and the gradients of a weighted sum of it, for the input and for every parameter."""
    x = x.clone().requires_grad_()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    y = functional_call(mixer, parameters, (x,), arguments)
    return y, torch.autograd.grad((y * weight).sum(), [x, *parameters.values()])


def test_features_are_a_softmax_over_both_signs_of_a_linear_map_of_each_head():
    x, module = torch.randn(2, 3, 7, 4, dtype=torch.float64), Hedgehog(3, 4).double()
    torch.nn.init.normal_(module.weight)
    y = module(x)
    for head in range(3):
        positive = ((x[:, head] + x[:, head] @ module.weight[head].T) / 4**0.25).exp()
        features = torch.cat([positive, 1 / positive], -1)
        torch.testing.assert_close(y[:, head], features / features.sum(-1, keepdim=True))


def test_the_start_has_the_logits_of_softmax_attention():
    """The logarithms of two features, less their common sum, are z."""
    q, k = (torch.randn(1, 2, 1, 9, dtype=torch.float64) for _ in range(2))
    logs = [Hedgehog(2, 9).double()(x).log() for x in (q, k)]
    z = [(log[..., :9] - log[..., 9:]) / 2 for log in logs]
    torch.testing.assert_close((z[0] * z[1]).sum(-1), (q * k).sum(-1) / 3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variant", ["lit", "decay", "selective"])
def test_forms_agree_with_gradients(variant, normalize):
    mixer = make(variant, normalize=normalize)
    x, weight = torch.randn(2, 2, 21, 24, dtype=torch.float64)
    mask = torch.arange(21) < torch.tensor([[21], [13]])
    results = [
        gradients(mixer, x, weight * mask[..., None], key_mask=mask, format=form, chunk_size=8)
        for form in ("attention", "rnn", "chunk")
    ]
    for y, grads in results[1:]:
        torch.testing.assert_close(y[mask], results[0][0][mask], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-9, atol=1e-10)
    names = [name for name, _ in mixer.named_parameters()]
    moved = {name: grad.abs().max() for name, grad in zip(names, results[0][1][1:], strict=True)}
    assert min(moved["q_feature.weight"], moved["k_feature.weight"]) > 1e-6


def test_packed_rows_and_padding_give_the_output_of_each_sequence_alone():
    mixer = make()
    sequences = [torch.randn(1, n, 24, dtype=torch.float64) for n in LENGTHS]
    alone = torch.cat([mixer(x) for x in sequences], 1)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    torch.testing.assert_close(mixer(torch.cat(sequences, 1), cu_seqlens=bounds), alone, rtol=1e-9, atol=1e-11)
    padded = torch.nn.utils.rnn.pad_sequence([x[0] for x in sequences], batch_first=True, padding_value=9.0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(mixer(padded, mask)[mask], alone[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config, model_class", [(LionConfig, LionForMaskedLM), (LionVisionConfig, LionVisionModel)])
def test_models_keep_learned_maps_in_their_folder(config, model_class, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": 50} if config is LionConfig else {"image_size": 32}
    model = model_class(config(mask_type="decay", feature_map="hedgehog", normalize=True, **sizes)).eval()
    with torch.no_grad():
        model.base_model.layers[1].mixer.q_feature.weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    inputs = torch.arange(9)[None] if config is LionConfig else torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(inputs)[0], model(inputs)[0], rtol=0, atol=0)
    assert loaded.base_model.layers[1].mixer.q_feature.weight.std() > 0.5


@pytest.mark.parametrize("variant, reason", [("lstm", "scores of either sign"), ("decay-channel", "per channel")])
def test_variants_without_positive_scores_or_with_decays_per_channel_are_refused(variant, reason):
    with pytest.raises(ValueError, match=f"feature_map is 'hedgehog'.*{reason}"):
        Mixer(16, 2, variant, feature_map="hedgehog", normalize=False)


def test_half_precision_keeps_the_digits_of_the_softmax():
    module = Hedgehog(2, 8)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(1, 2, 50, 8)
    half = Hedgehog(2, 8).to(torch.bfloat16)
    half.load_state_dict(module.state_dict())
    low = x.to(torch.bfloat16)
    z = (low + low @ half.weight.transpose(1, 2)).double() / 8**0.25
    expected = torch.cat([z, -z], -1).softmax(-1)
    assert half(low).dtype == torch.bfloat16
    torch.testing.assert_close(half(low).double(), expected, rtol=2**-8, atol=1e-10)
