"""TorchScript graphs: torch.jit.trace, and ONNX export that uses it (dynamo=False)."""

import io
import warnings

import pytest
import torch
from small_models import ALL_VARIANTS, FORMS, VARIANTS, spread_decays, text_config, text_inputs, vision_config

import lion_hf


def text(mask_type, form, **options):
    model = lion_hf.LionForSequenceClassification(text_config(mask_type, format=form, softmax_layers=[1], **options))
    ones = {"input_ids": torch.randint(1, 61, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    left = {name: x.flip(1) for name, x in text_inputs(2, 12).items()}
    holes = text_inputs(1, 7)
    holes["attention_mask"][0, 2:4] = 0
    return model, ones, [text_inputs(3, 17), text_inputs(1, 1), left, holes, text_inputs(2, 33)]


def image(mask_type, form):
    order = "normal" if mask_type == "lit" else "s"
    model = lion_hf.LionForImageClassification(vision_config(mask_type, format=form, order=order))
    others = [(3, 3, 16, 16), (1, 3, 24, 16), (2, 3, 8, 32)]
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}, [{"pixel_values": torch.randn(size)} for size in others]


every_model = pytest.mark.parametrize("build", [text, image], ids=lambda x: x.__name__)


@pytest.mark.parametrize("form", (*FORMS, "auto"))
@pytest.mark.parametrize("mask_type", ALL_VARIANTS)
@every_model
def test_a_trace_is_right_at_other_batches_lengths_and_paddings(build, mask_type, form):
    model, example, others = build(mask_type, form)
    model = spread_decays(model).eval()
    with warnings.catch_warnings(), torch.set_grad_enabled(form == "chunk"):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example_kwarg_inputs=example, strict=False, check_trace=False)
    for inputs in (example, *others):
        torch.testing.assert_close(traced(**inputs)["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_trace_with_unpadding_reads_no_mask():
    model, example, others = text("decay", "chunk", unpad=True)
    model = spread_decays(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example_kwarg_inputs=example, strict=False, check_trace=False)
    for inputs in others:
        torch.testing.assert_close(traced(**inputs)["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_trace_pools_the_mean_of_real_tokens():
    model, example, others = text("selective", "auto", classifier_pooling="mean")
    none_real = text_inputs(2, 6)
    none_real["attention_mask"][0] = 0
    model = spread_decays(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example_kwarg_inputs=example, strict=False, check_trace=False)
    for inputs in (*others, none_real):
        torch.testing.assert_close(traced(**inputs)["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_trace_refuses_images_whose_sides_the_patches_do_not_divide():
    model, example, _ = image("selective", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.eval(), example_kwarg_inputs=example, strict=False, check_trace=False)
    traced(pixel_values=torch.randn(1, 3, 24, 16))
    for size in ((23, 16), (16, 17)):
        with pytest.raises(RuntimeError):
            traced(pixel_values=torch.randn(1, 3, *size))


class FirstOutput(torch.nn.Module):
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", (*VARIANTS, "retnet"))
@every_model
def test_onnx_through_torchscript_is_right_at_other_sizes(build, mask_type, form):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, example, others = build(mask_type, form)
    model, names, file = spread_decays(model).eval(), list(example), io.BytesIO()
    axes = {
        name: {0: "batch", 2: "rows", 3: "columns"} if x.dim() == 4 else {0: "batch", 1: "length"}
        for name, x in example.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            FirstOutput(model, names), tuple(example.values()), file, input_names=names, output_names=["logits"],
            dynamic_axes=axes, dynamo=False, opset_version=17,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for inputs in (example, *others):
        (logits,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4, atol=1e-5)
    if build is image:
        for size in ((2, 3, 15, 16), (2, 3, 16, 23)):
            with pytest.raises(Exception, match="Non-zero status"):
                session.run(None, {"pixel_values": torch.randn(size).numpy()})
