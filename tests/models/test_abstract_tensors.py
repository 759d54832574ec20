"""Models run on tensors without values: on the meta device, under FakeTensorMode, and in make_fx."""

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, TEXT_HEADS, VARIANTS, text_config, vision_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lion_hf


IMAGE_HEADS = (lion_hf.LionVisionModel, lion_hf.LionForImageClassification, lion_hf.LionForMaskedImageModeling)


def text_arguments(head):
    shape = (2, 3, 7) if head is lion_hf.LionForMultipleChoice else (2, 7)
    ids = torch.ones(shape, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_arguments(head):
    masked = {"bool_masked_pos": torch.ones(2, 16, dtype=torch.bool)}
    images = {"pixel_values": torch.ones(2, 3, 16, 16)}
    return images | masked if head is lion_hf.LionForMaskedImageModeling else images


# The variants that quick tests record: those of the paper, and one each with more options and with decays per channel.
QUICK = (*VARIANTS, "mamba2", "rwkv6")

# Every head, and every pair of variant and form, of further variants one form; the two values of an option alternate.
CASES = [(head, text_config, "selective", "auto", text_arguments) for head in TEXT_HEADS]
CASES += [(head, vision_config, "decay", "auto", image_arguments) for head in IMAGE_HEADS]
for variant in ALL_VARIANTS:
    forms = (*FORMS, "auto") if variant in VARIANTS else ("chunk",)
    CASES += [(TEXT_HEADS[0], text_config, variant, form, text_arguments) for form in forms]
    CASES += [(IMAGE_HEADS[0], vision_config, variant, form, image_arguments) for form in forms]
CASES = [pytest.param(*case, i % 2, id="-".join([case[0].__name__, *case[2:4]])) for i, case in enumerate(CASES)]


def step(model, arguments):
    """Run a training step and return the shapes of all outputs."""
    output = model.train()(**arguments)
    first = output.loss if "loss" in output else output[0]
    first.sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    return [tuple(x.shape) for x in output.values() if torch.is_tensor(x)]


def with_fake_weights(model, mode):
    """Replace the weights by fake ones, after an initialisation that may read values."""
    for module in model.modules():
        weights = module._parameters
        weights.update({name: mode.from_tensor(w) for name, w in weights.items() if w is not None})
    return model


@pytest.mark.parametrize("head, make_config, variant, form, arguments, option", CASES)
def test_steps_run_on_meta_and_fake_tensors(head, make_config, variant, form, arguments, option):
    options = {"unpad": (None, True)[option]} if make_config is text_config else {"order": ("normal", "s")[option]}
    config = make_config(variant, format=form, num_hidden_layers=1, chunk_size=9, **options)
    model = head(config)
    expected = step(model, arguments(head))
    with FakeTensorMode() as mode:
        assert step(with_fake_weights(model, mode), arguments(head)) == expected
    with torch.device("meta"):
        assert step(head(config), arguments(head)) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL_VARIANTS]
)
@pytest.mark.parametrize(
    "kind, mode",
    [("text", "real"), pytest.param("text", "symbolic", marks=pytest.mark.slow), ("image", "fake")],
)
def test_make_fx_records_a_graph_that_is_right_for_other_values(kind, mode, variant, form):
    options = {"format": form, "num_hidden_layers": 1, "chunk_size": 4 if kind == "text" else 9}
    if kind == "text":
        model = lion_hf.LionModel(text_config(variant, **options)).eval()
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[0, 4:] = 0
        examples, others = (torch.randint(1, 61, (2, 7)), torch.ones_like(mask)), (torch.randint(1, 61, (2, 7)), mask)
    else:
        model = lion_hf.LionVisionModel(
            vision_config(variant, order="normal" if form == "chunk" else "s", **options)
        ).eval()
        examples, others = (torch.randn(2, 3, 16, 16),), (torch.randn(2, 3, 16, 16),)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def function(weights, *inputs):
        return torch.func.functional_call(model, weights, inputs, {"return_dict": False})[0]

    graph = make_fx(function, tracing_mode=mode)(weights, *examples)
    torch.testing.assert_close(graph(weights, *others), function(weights, *others), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("abstract", ["meta", "fake"])
def test_positions_without_values_tell_of_no_packing(abstract):
    model_class, config = lion_hf.LionModel, text_config("lit")
    with torch.device("meta") if abstract == "meta" else FakeTensorMode():
        ids = torch.ones(1, 7, dtype=torch.long)
        output = model_class(config)(input_ids=ids, position_ids=torch.arange(7)[None])
        assert output.pooler_output.shape == (1, 24)
