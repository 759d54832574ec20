"""LION in graphs: torch.compile, torch.export and ONNX."""

import logging

import models
import pytest
import torch
from models import FORMS, TEXT_HEADS, VARIANTS, spread_decays, text_inputs

import lion_hf


def text_config(*args, **options):
    return models.text_config(*args, **{"num_hidden_layers": 1, "chunk_size": 6, **options})


def vision_config(*args, **options):
    return models.vision_config(*args, **{"num_hidden_layers": 1, "chunk_size": 9, **options})


def inputs_for(head, inputs):
    if head is lion_hf.LionForMultipleChoice:
        return {k: v.unsqueeze(1).repeat(1, 2, 1) for k, v in inputs.items()}
    return inputs


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else next(iter(outputs.values()))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
def test_text_heads_compile_into_one_graph(head, form):
    model = spread_decays(head(text_config(format=form))).eval()
    inputs = inputs_for(head, text_inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled(**inputs)), first(model(**inputs)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type, order", [("lit", "normal"), ("decay", "normal"), ("selective", "s")])
@pytest.mark.parametrize("head", [lion_hf.LionVisionModel, lion_hf.LionForImageClassification])
def test_image_heads_compile_into_one_graph(head, mask_type, order, form):
    model = spread_decays(head(vision_config(mask_type, order=order, format=form))).eval()
    pixels = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled(pixels)), first(model(pixels)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_compiled_training_step_has_the_same_gradients(mask_type, form):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format=form)))
    inputs = text_inputs()
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_inductor_training_step_equals_eager(form):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(format=form)))
    inputs = text_inputs()
    inputs["labels"] = inputs["input_ids"]
    loss = model(**inputs).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled_loss = torch.compile(model, fullgraph=True)(**inputs).loss
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask_type", VARIANTS)
def test_text_export_takes_any_batch_and_length_in_the_attention_form(mask_type):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format="attention"))).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=40)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    program = torch.export.export(model, (), text_inputs(2, 9), dynamic_shapes=shapes)
    for size in ((2, 9), (5, 23), (3, 2)):
        inputs = text_inputs(*size)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", ["rnn", "chunk"])
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_text_export_takes_any_batch_at_one_length_in_the_linear_forms(mask_type, form):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format=form))).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"input_ids": {0: batch}, "attention_mask": {0: batch}}
    program = torch.export.export(model, (), text_inputs(2, 11), dynamic_shapes=shapes)
    inputs = text_inputs(5, 11)
    torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["normal", "s"])
def test_image_export_takes_any_batch(order, form):
    model = spread_decays(lion_hf.LionForImageClassification(vision_config(order=order, format=form))).eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    pixels = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (), {"pixel_values": pixels}, dynamic_shapes=shapes)
    pixels = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(pixel_values=pixels).logits, model(pixels).logits)


def test_auto_is_exported_as_the_attention_form_and_says_so(caplog):
    from transformers.utils import logging as hf_logging

    from lion_hf import lion_ops

    lion_ops.logger.warning_once.cache_clear()
    model = lion_hf.LionModel(text_config(format="auto")).eval()
    length = torch.export.Dim("length", min=2, max=1000)
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        program = torch.export.export(
            model, (), {"input_ids": torch.ones(2, 5).long()}, dynamic_shapes={"input_ids": {1: length}}
        )
    hf_logging.disable_propagation()
    assert "exported as the attention form" in caplog.text
    long = torch.randint(0, 61, (2, 400))
    torch.testing.assert_close(program.module()(input_ids=long)[0], model(long)[0])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["attention", "chunk"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_onnx_runs_and_agrees(tmp_path, kind, form):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if kind == "text":
        model = lion_hf.LionForMaskedLM(text_config(format=form)).eval()
        inputs = text_inputs(2, 11)
    else:
        model = lion_hf.LionForImageClassification(vision_config(order="s", format=form)).eval()
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    spread_decays(model)
    file = tmp_path / "lion.onnx"
    torch.onnx.export(model, (), str(file), kwargs=inputs, dynamo=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    (logits, *_) = session.run(None, {n: x.numpy() for n, x in inputs.items() if n in names})
    torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4, atol=1e-5)
