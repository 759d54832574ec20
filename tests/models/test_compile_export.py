"""LION in graphs: torch.compile, torch.export and ONNX."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import small_models
import torch
from small_models import ALL_VARIANTS, FORMS, TEXT_HEADS, VARIANTS, spread_decays, text_inputs
from torch._dynamo.testing import CompileCounterWithBackend

import lion_hf


# Rows and tokens: two chunks of 3, the second not full. Short, because graphs of the rnn form can grow with the length.
SHORT = (3, 5)
# Quick tests have the variants of the paper, the slow ones all.
SAMPLED = [
    *(pytest.param(name) for name in VARIANTS),
    *(pytest.param(x, marks=pytest.mark.slow) for x in ALL_VARIANTS[3:]),
]
ANY_BATCH, ANY_LENGTH = torch.export.Dim("batch"), torch.export.Dim("length")
ANY_IMAGE = {0: ANY_BATCH, 2: 4 * torch.export.Dim("rows", min=2), 3: 4 * torch.export.Dim("columns", min=2)}


def text_config(*args, **options):
    return small_models.text_config(*args, **{"num_hidden_layers": 1, "chunk_size": 3, **options})


def vision_config(*args, **options):
    return small_models.vision_config(*args, **{"image_size": 8, "num_hidden_layers": 1, "chunk_size": 3, **options})


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


@pytest.mark.parametrize("head", TEXT_HEADS, ids=lambda x: x.__name__)
def test_text_heads_compile_into_one_graph(head):
    """One form is enough: forms differ only in the encoder, which the training step compiles in all forms."""
    form = {lion_hf.LionModel: "rnn", lion_hf.LionForMaskedLM: "chunk"}.get(head, "attention")
    model = spread_decays(head(text_config(format=form))).eval()
    inputs = inputs_for(head, text_inputs(*SHORT))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(first(compiled(**inputs)), first(model(**inputs)))


@pytest.mark.parametrize("order", ["normal", "s"])
@pytest.mark.parametrize(
    "mask_type", [name if name in VARIANTS else pytest.param(name, marks=pytest.mark.slow) for name in ALL_VARIANTS]
)
def test_layers_compiled_one_by_one_share_their_graphs(mask_type, order):
    """Graphs do not depend on the index of the layer, but for HGRN2, whose gates have another bound in each layer."""
    model = lion_hf.LionForImageClassification(vision_config(mask_type, num_hidden_layers=4, order=order)).train()
    counter = CompileCounterWithBackend("eager")
    for layer in model.lion_vision.layers:
        layer.compile(backend=counter)
    model(torch.randn(2, 3, 8, 8)).logits.sum().backward()
    assert counter.frame_count == (4 if mask_type == "hgrn2" else 1)


def pairs(variants):
    """Return all pairs of variant and form. The quick tests have three variants and each form once."""
    for i, variant in enumerate(variants):
        for j, form in enumerate(FORMS):
            marks = [] if (i + j) % 3 == 1 and i < 3 else [pytest.mark.slow]
            name = "-".join([variant] if isinstance(variant, str) else variant)
            yield pytest.param(variant, form, id=f"{name}-{form}", marks=marks)


@pytest.mark.parametrize("variant, form", pairs([("lit", "normal"), ("decay", "normal"), ("selective", "s")]))
def test_image_heads_compile_into_one_graph(variant, form):
    """Covers all pairs of variant and form; the heads alternate. Two scans are compiled with autograd, too."""
    mask_type, order = variant
    number = VARIANTS.index(mask_type) + FORMS.index(form)
    head = (lion_hf.LionVisionModel, lion_hf.LionForImageClassification)[number % 2]
    model = spread_decays(head(vision_config(mask_type, order=order, format=form, num_hidden_layers=1))).eval()
    pixels = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if order == "s" else "eager")
    torch.testing.assert_close(first(compiled(pixels)), first(model(pixels)))


@pytest.mark.parametrize("mask_type", ["decay", "selective"])
def test_snake_scans_compile_without_gradients(mask_type):
    config = vision_config(mask_type, order="s", format="attention")
    model = spread_decays(lion_hf.LionForImageClassification(config)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask_type", ["lit", "decay"])
def test_position_ids_compile_into_one_graph(mask_type, batch):
    """In one row they could mean packed texts, which a graph rejects at run time. Without a table they are ignored."""
    model = lion_hf.LionForSequenceClassification(text_config(mask_type, format="chunk")).eval()
    inputs = {"input_ids": torch.randint(1, 61, (batch, 5)), "position_ids": torch.arange(5)[None]}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    if batch == 1:
        with pytest.raises(RuntimeError, match="several texts.*cu_seq_lens_q"):
            compiled(input_ids=inputs["input_ids"], position_ids=torch.tensor([[0, 1, 0, 1, 2]]))


@pytest.mark.slow
@pytest.mark.parametrize("head", [lion_hf.LionForMaskedImageModeling, lion_hf.LionBackbone])
def test_further_image_heads_compile_and_export(head):
    model = spread_decays(head(vision_config(order="s", format="attention", num_hidden_layers=1))).eval()
    pixels = torch.randn(5, 3, 8, 8)
    expected = first(model(pixels))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled(pixels)), expected)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), {"pixel_values": pixels[:2]}, dynamic_shapes=shapes)
    torch.testing.assert_close(first(program.module()(pixel_values=pixels)), expected)


@pytest.mark.parametrize("mask_type, form", pairs(ALL_VARIANTS))
def test_compiled_training_step_has_the_same_gradients(mask_type, form):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format=form, num_hidden_layers=1)))
    inputs = text_inputs(*SHORT)
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
    inputs = text_inputs(*SHORT)
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


@pytest.mark.parametrize("mask_type", SAMPLED)
def test_text_export_takes_any_batch_and_length_in_the_attention_form(mask_type):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format="attention"))).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=40)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    program = torch.export.export(model, (), text_inputs(2, 9), dynamic_shapes=shapes)
    for size in ((2, 9), (5, 23), (3, 2)):
        inputs = text_inputs(*size)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", ["rnn", "chunk"])
@pytest.mark.parametrize("mask_type", SAMPLED)
def test_text_export_takes_any_batch_at_one_length_in_the_linear_forms(mask_type, form):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format=form))).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"input_ids": {0: batch}, "attention_mask": {0: batch}}
    program = torch.export.export(model, (), text_inputs(2, 5), dynamic_shapes=shapes)
    inputs = text_inputs(5, 5)
    torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mask_type, order",
    [
        ("selective", "normal"),
        *(pytest.param(x, "s", marks=() if x == "selective" else pytest.mark.slow) for x in ALL_VARIANTS[2:]),
    ],
)
def test_image_export_takes_any_batch(mask_type, order, form):
    config = vision_config(mask_type, order=order, format=form)
    model = spread_decays(lion_hf.LionForImageClassification(config)).eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    pixels = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (), {"pixel_values": pixels}, dynamic_shapes=shapes)
    pixels = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(pixel_values=pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("order", ["normal", "s"])
def test_image_export_takes_any_size_from_two_patches_in_the_attention_form(order):
    model = spread_decays(lion_hf.LionForImageClassification(vision_config(order=order, format="attention"))).eval()
    shapes = {"pixel_values": ANY_IMAGE}
    inputs = {"pixel_values": torch.randn(2, 3, 16, 24)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    for size in ((2, 16, 24), (5, 32, 20), (1, 8, 8)):
        pixels = torch.randn(size[0], 3, *size[1:])
        torch.testing.assert_close(program.module()(pixel_values=pixels).logits, model(pixels).logits)


def test_auto_is_exported_as_the_attention_form_and_says_so(caplog):
    from lion_hf.ops.backend import warn_once

    warn_once.cache_clear()
    model = lion_hf.LionModel(text_config(format="auto")).eval()
    length = torch.export.Dim("length", min=2, max=1000)
    with caplog.at_level(logging.WARNING):
        program = torch.export.export(
            model, (), {"input_ids": torch.ones(2, 5).long()}, dynamic_shapes={"input_ids": {1: length}}
        )
    assert "exported as the attention form" in caplog.text
    long = torch.randint(0, 61, (2, 400))
    torch.testing.assert_close(program.module()(input_ids=long)[0], model(long)[0])


# Runs an ONNX file on arrays in a process without this package and without PyTorch.
ONNX_PROCESS = """
import sys
import numpy, onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for inputs, outputs in zip(sys.argv[2::2], sys.argv[3::2]):
    numpy.save(outputs, session.run(["logits"], dict(numpy.load(inputs)))[0])
assert not {"lion_hf", "torch", "transformers"} & sys.modules.keys()
"""


def test_a_compiled_loss_that_settles_the_problem_type_warns_of_nothing(recwarn):
    """The first labels of a classifier set `problem_type` in its configuration, inside the graph."""
    torch.compiler.reset()
    model = lion_hf.LionForSequenceClassification(text_config(num_hidden_layers=1))
    compiled = torch.compile(model, backend="eager")
    compiled(**text_inputs(2, 5), labels=torch.tensor([0, 1])).loss.backward()
    assert model.config.problem_type == "single_label_classification"
    assert not [str(w.message) for w in recwarn if "lru_cache" in str(w.message)]


def run_onnx(file, batches):
    names = []
    for number, inputs in enumerate(batches):
        names += [file.parent / f"inputs{number}.npz", file.parent / f"outputs{number}.npy"]
        np.savez(names[-2], **{name: x.numpy() for name, x in inputs.items()})
    subprocess.run([sys.executable, "-I", "-c", ONNX_PROCESS, file, *names], check=True)
    return [torch.from_numpy(np.load(name)) for name in names[1::2]]


# Inputs that the PyTorch model rejects: lengths above the position table, sides not divisible by patch_size, other
# grids than that of the position table.
REFUSED = {
    "lit-attention": [(2, 41)],
    "image-attention": [(2, 18, 24), (2, 16, 25)],
    "snake-attention": [(2, 18, 24), (1, 15, 24)],
    "snake-chunk": [(2, 18, 24), (1, 16, 23)],
    "image-pos-emb": [(2, 9, 8), (2, 8, 12)],
}
ONNX_CASES = {  # options, dynamic dimensions, sizes to run (the first is exported)
    "text-attention": ({"format": "attention"}, {0: ANY_BATCH, 1: ANY_LENGTH}, [(2, 9), (5, 40), (1, 1)]),
    "lit-attention": ({"mask_type": "lit", "format": "attention"}, {0: ANY_BATCH, 1: ANY_LENGTH}, [(2, 9), (5, 40)]),
    "text-chunk": ({"format": "chunk"}, {0: ANY_BATCH}, [(2, 11), (5, 11), (1, 11)]),
    "image-attention": ({"format": "attention"}, ANY_IMAGE, [(2, 16, 24), (5, 32, 20), (1, 8, 8)]),
    "snake-attention": ({"format": "attention", "order": "s"}, ANY_IMAGE, [(2, 16, 24), (5, 32, 20), (1, 8, 8)]),
    "image-pos-emb": ({"format": "attention", "pos_emb": True}, {0: ANY_BATCH}, [(2, 8, 8), (3, 8, 8)]),
    "snake-chunk": ({"format": "chunk", "order": "s"}, {0: ANY_BATCH}, [(2, 16, 24), (5, 16, 24), (1, 16, 24)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ONNX_CASES)
def test_onnx_runs_without_the_package_and_agrees_at_every_size(tmp_path, case):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options, dynamic, sizes = ONNX_CASES[case]
    make = text_inputs if len(sizes[0]) == 2 else lambda batch, *side: {"pixel_values": torch.randn(batch, 3, *side)}
    if make is text_inputs:
        model = lion_hf.LionForMaskedLM(text_config(**options))
    else:
        model = lion_hf.LionForImageClassification(vision_config(**options))
    batches = [make(*size) for size in sizes]
    spread_decays(model).eval()
    file = tmp_path / "lion.onnx"
    shapes = dict.fromkeys(batches[0], dynamic)
    names = {"output_names": ["logits"]}
    torch.onnx.export(model, (), str(file), kwargs=batches[0], dynamic_shapes=shapes, dynamo=True, **names)
    for inputs, logits in zip(batches, run_onnx(file, batches), strict=True):
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in REFUSED.get(case, []):
        inputs = make(*size)
        with pytest.raises(ValueError):
            model(**inputs)
        with pytest.raises(Exception, match="Non-zero status|Invalid dimensions|Got invalid dimensions"):
            session.run(None, {name: x.numpy() for name, x in inputs.items()})
