"""Check docs/contributing/variant.patch: the new variant works wherever LION-S works."""

import tempfile

import torch
from small_models import FORMS, text_config, text_inputs, vision_config
from transformers import AutoModel, BertConfig, BertForMaskedLM

import lion_hf
from lion_hf.convert import from_bert
from lion_hf.training.reports import model_name


def text_loss(model):
    inputs = text_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return lambda: model(**inputs, labels=labels)


def image_loss(model):
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return lambda: model(pixels, labels=torch.tensor([0, 3]))


def check_step_and_forms(model, call):
    """The forms agree in outputs and gradients, the decay learns, and one step of training lowers the loss."""
    own = [p for n, p in model.named_parameters() if "decay_proj" in n]
    with torch.no_grad():
        for parameter in own:
            parameter.normal_()
    results = []
    for form in FORMS:
        model.config.format = form
        model.zero_grad()
        output = call()
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert own and all(parameter.grad.abs().sum() > 0 for parameter in own)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert call().loss < output.loss


def check_saved(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModel.from_pretrained(folder)
    assert loaded.config.mask_type == "bounded"
    for name, weight in model.base_model.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(loaded.state_dict()[name], weight)


def check_floor():
    """For any tokens, no decay is below l / (n + 1)."""
    for layer in (0, 3):
        mixer = lion_hf.nn.Mixer(24, 3, "bounded", layer_idx=layer, num_layers=4).double()
        decay = mixer.recurrences(1000 * torch.randn(2, 9, 24, dtype=torch.float64))[0].log_decay.exp()
        assert decay.min() >= (layer + 1) / 5 - 1e-12 and decay.max() <= 1


def check_warm_start():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    model = from_bert(BertForMaskedLM(BertConfig(vocab_size=61, **sizes)), "bounded", windows=(8, 32))
    decay = model.lion.layers[1].mixer.recurrences(torch.randn(1, 5, 24))[0].log_decay.exp()[0, :, 0]
    torch.testing.assert_close((1 + decay) / (1 - decay), torch.tensor([8.0, 16.0, 32.0]), rtol=1e-3, atol=0)
    assert model(**text_inputs()).logits.isfinite().all()


torch.manual_seed(0)
text = lion_hf.LionForMaskedLM(text_config("lion-sb")).double()
check_step_and_forms(text, text_loss(text))
images = [lion_hf.LionForImageClassification(vision_config("bounded", order=o)).double() for o in ("normal", "snake")]
for image in images:
    check_step_and_forms(image, image_loss(image))
check_saved(text.float())
check_saved(images[1].float())
check_floor()
check_warm_start()
assert [model_name(model.config) for model in (text, images[1])] == ["LION-SB", "LION-SB, snake"]
