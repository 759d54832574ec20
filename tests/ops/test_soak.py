"""Every form gives the same bits in every run on a busy machine, whatever freed memory contains.

An operator that reads uninitialised memory, changes an input, or adds in an order that depends on the load is correct
most of the time. These tests give it 200 chances to fail.
"""

import subprocess
import sys
import threading

import pytest
import torch
from small_models import FORMS, VARIANTS, spread_decays, text_config, text_inputs, vision_config

import lion_hf
from lion_hf import bidirectional_linear_attention
from lion_hf.nn.mixer import OPERATORS
from lion_hf.ops.reference import textbook
from lion_hf.ops.scans import averaged_scans, snake_orders


KINDS = ("none", "head", "token")
LAYOUTS = ("rows", "packed", "snake")
BOUNDS = [0, 1, 1, 9, 26]
SIZES = [2**power + extra for power in range(3, 19) for extra in (0, 8, 24)]  # bytes


def poison_free_memory():
    """Fill free memory with ones in all bits, so that uninitialised memory reads as NaN."""
    blocks = [torch.empty(size, dtype=torch.uint8).fill_(255) for size in SIZES for _ in range(3)]
    del blocks


@pytest.fixture(scope="module")
def load():
    """Run two processes and two threads that compute all the time."""
    busy = "import torch\nx = torch.rand(64, 64)\nwhile True: x = (x @ x).softmax(-1)"
    processes = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2)]
    over = threading.Event()

    def work():
        x = torch.rand(64, 64)
        while not over.is_set():
            x = (x @ x).softmax(-1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(kind, layout):
    """Return the leaves, and the function of them that is tested."""
    batch, length = {"rows": (2, 26), "packed": (1, BOUNDS[-1]), "snake": (2, 13)}[layout]
    leaves = [0.1 + torch.rand(batch, 2, length, width, dtype=torch.float64) for width in (4, 4, 3)]
    shape = {"head": (2,), "token": (batch, 2, length)}.get(kind)
    decays = 0 if shape is None else 2 if layout == "snake" else 1
    leaves += [-torch.rand(shape, dtype=torch.float64) for _ in range(decays)]
    key_mask = torch.rand(batch, length) < 0.8
    orders = snake_orders(3, 4)

    def function(form, query, key, value, *decays):
        options = {"format": form, "chunk_size": 4}
        if layout == "snake":
            return averaged_scans(query, key, value, decays, orders, **options)
        bounds = torch.tensor(BOUNDS) if layout == "packed" else None
        options |= {"key_mask": key_mask, "normalize": True, "cu_seqlens": bounds}
        return bidirectional_linear_attention(query, key, value, *decays, **options)

    return leaves, function


def output_and_gradients(function, leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def assert_equal_bits(function, leaves, what, times):
    """Check that outputs and all gradients have equal bits in every run, and that the leaves do not change."""
    before = [x.clone() for x in leaves]
    expected = output_and_gradients(function, leaves)
    assert all(x.isfinite().all() for x in expected), what
    for repetition in range(times):
        poison_free_memory()
        for number, (x, y) in enumerate(zip(output_and_gradients(function, leaves), expected, strict=True)):
            error = (x - y).abs().max().item()
            assert torch.equal(x, y), f"{what}, repetition {repetition}, result {number}: {error:.1e} apart"
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True)), f"{what}: an input was changed"


def cases():
    return [(k, layout) for k in KINDS for layout in LAYOUTS if (k, layout) != ("none", "snake")]


def check_operator(kind, layout, form, times):
    leaves, function = operands(kind, layout)
    assert_equal_bits(lambda *x: function(form, *x), leaves, f"{kind} {layout} {form}", times)


def text_model(mask_type, form):
    model = spread_decays(lion_hf.LionForMaskedLM(text_config(mask_type, format=form)))
    return model.double().eval(), text_inputs()


def image_model(mask_type, form):
    config = vision_config(mask_type, order="normal" if mask_type == "lit" else "s", format=form)
    model = spread_decays(lion_hf.LionForImageClassification(config)).double().eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}


MODELS = {"text": text_model, "image": image_model}


def check_model(model, inputs, what, times):
    names, parameters = zip(*((name, p.detach().clone()) for name, p in model.named_parameters()), strict=True)

    def function(*parameters):
        called = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (), inputs)
        return called.logits + 0 * sum(p.sum() for p in parameters)  # so that unused parameters have a gradient

    assert_equal_bits(function, parameters, what, times)


@pytest.fixture
def by_the_textbook(monkeypatch):
    """Return a function that computes the logits of a model with the textbook in place of every form."""
    calls = []

    def by_definition(query, key, value, log_decay=None, *, key_mask=None, normalize=False, cu_seqlens=None, **_):
        assert cu_seqlens is None
        calls.append(query.dtype)
        return textbook(query, key, value, log_decay, key_mask, normalize)

    def logits(model, inputs):
        before = len(calls)
        with monkeypatch.context() as patch:
            patch.setitem(OPERATORS, "linear_attention", OPERATORS["linear_attention"]._replace(run=by_definition))
            found = model(**inputs).logits
        assert calls[before:] == [torch.float64] * model.config.num_hidden_layers
        return found

    return logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind, layout", cases())
def test_a_few_runs_give_equal_bits(kind, layout, form):
    check_operator(kind, layout, form, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_a_text_model_is_the_textbook_to_rounding(mask_type, form, by_the_textbook):
    model, inputs = text_model(mask_type, form)
    real = inputs["attention_mask"].bool()
    logits = model(**inputs).logits[real]
    torch.testing.assert_close(logits, by_the_textbook(model, inputs)[real], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind, layout", cases())
def test_two_hundred_runs_under_load_give_equal_bits(kind, layout, form, threads, load):
    check_operator(kind, layout, form, 200)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_two_hundred_runs_of_a_model_under_load_give_equal_bits(model, mask_type, form, threads, load):
    check_model(*MODELS[model](mask_type, form), f"{model} {mask_type} {form}", 200)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_type", VARIANTS)
def test_two_hundred_new_text_models_under_load_are_the_textbook_to_rounding(mask_type, form, load, by_the_textbook):
    for _ in range(200):
        model, inputs = text_model(mask_type, form)
        real = inputs["attention_mask"].bool()
        poison_free_memory()
        logits = model(**inputs).logits[real]
        torch.testing.assert_close(logits, by_the_textbook(model, inputs)[real], rtol=1e-12, atol=1e-13)
