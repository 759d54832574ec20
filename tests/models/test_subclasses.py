"""A user's subclass of a head or of a configuration behaves like its base class, whatever its name."""

import copy

import pytest
import torch
from small_models import TEXT_HEADS, text_config, vision_config
from text_models import inputs_for, labels_for

import lion_hf
from lion_hf.convert.checkpoint import reverse_checkpoint
from lion_hf.convert.source import read_source


IMAGE_HEADS = (lion_hf.LionVisionModel, lion_hf.LionForImageClassification, lion_hf.LionForMaskedImageModeling)
HEADS = (*TEXT_HEADS, *IMAGE_HEADS, lion_hf.LionBackbone)
# Transformers derives the loss from the class name. For these names it finds none, or a wrong one.
NAMES = ("Clinical", "ClinicalForCausalLM", "ForTokenClassificationOrNot", "MyForSemanticSegmentation")


def config_of(head, **options):
    return text_config(**options) if head in TEXT_HEADS else vision_config(**options)


def inputs_of(head):
    if head in TEXT_HEADS:
        return inputs_for(head) | labels_for(head)
    images = {"pixel_values": torch.randn(3, 3, 16, 16)}
    if head is lion_hf.LionForImageClassification:
        return images | {"labels": torch.tensor([0, 4, 2])}
    return images | ({"bool_masked_pos": torch.rand(3, 16) < 0.5} if head is lion_hf.LionForMaskedImageModeling else {})


def gradients(model, inputs):
    outputs = model(**inputs)
    if "loss" in outputs:
        outputs.loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], outputs[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", HEADS, ids=lambda x: x.__name__)
def test_a_subclass_of_any_name_computes_what_its_head_computes(tmp_path, head, name):
    kind = type(name, (head,), {})
    model, inputs = head(config_of(head)).eval(), inputs_of(head)
    derived = kind(copy.deepcopy(model.config)).eval()
    derived.load_state_dict(model.state_dict())
    expected, actual = gradients(model, inputs), gradients(derived, inputs)
    assert len(actual[0]) == len(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))
    first = (actual[1], expected[1]) if torch.is_tensor(actual[1]) else (actual[1][0], expected[1][0])
    assert torch.equal(*first)
    derived.save_pretrained(tmp_path)
    for loaded in (head.from_pretrained(tmp_path), kind.from_pretrained(tmp_path)):
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("head", [head for head in HEADS if head.stated_loss_type], ids=lambda x: x.__name__)
def test_a_loss_that_the_user_sets_is_taken(head):
    model = type("Clinical", (head,), {})(config_of(head))
    model.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    assert model(**inputs_of(head)).loss == 7


@pytest.mark.parametrize("kind", [lion_hf.LionConfig, lion_hf.LionVisionConfig], ids=lambda x: x.__name__)
def test_a_configuration_with_a_model_type_of_its_own_builds_and_loads(tmp_path, kind):
    head = lion_hf.LionForMaskedLM if kind is lion_hf.LionConfig else lion_hf.LionForImageClassification
    clinical = type("ClinicalConfig", (kind,), {"model_type": "clinical"})
    base = config_of(head).to_dict()
    config = clinical(**{k: v for k, v in base.items() if k not in ("model_type", "transformers_version")})
    model = type("Clinical", (head,), {"config_class": clinical})(config)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, format="chunk")
    assert type(loaded.config) is clinical and loaded.config.format == "chunk"
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="mask_type='lit' contradicts the checkpoint"):
        type(model).from_pretrained(tmp_path, mask_type="lit")
    head(config)  # the head accepts the configuration, and so does the encoder inside it


@pytest.mark.parametrize(
    "head",
    [lion_hf.LionForMaskedLM, lion_hf.LionForSequenceClassification, lion_hf.LionForImageClassification],
    ids=lambda x: x.__name__,
)
def test_what_a_subclass_saved_is_written_for_the_authors_code(tmp_path, head):
    for folder, kind in (("own", head), ("derived", type("Clinical", (head,), {}))):
        torch.manual_seed(0)
        kind(config_of(head)).save_pretrained(tmp_path / folder)
        reverse_checkpoint(tmp_path / folder, tmp_path / f"{folder}.pth")
    own, derived = (read_source(tmp_path / f"{name}.pth").weights for name in ("own", "derived"))
    assert own.keys() == derived.keys() and all(torch.equal(own[name], derived[name]) for name in own)
