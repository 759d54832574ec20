"""Models work if a layer is replaced by a quantised layer, an adapter or a wrapper, whose inside is never read."""

import copy

import pytest
import torch
from small_models import FORMS, TEXT_HEADS, spread_decays, text_config, text_inputs, vision_config
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

import lion_hf
from lion_hf.nn import GateLinear, Recurrence, Variant, register_variant
from lion_hf.nn.variants import VARIANTS


class Wrapped(nn.Module):
    """A wrapper that hides the attributes of the layer inside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Int8Linear(nn.Module):
    """A quantised linear layer: integers and scales, and no attribute `weight`."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, (self.codes * self.scale).to(x.dtype), self.bias)


@pytest.fixture
def gate_and_proj():
    """Register a user's variant with plain linear layers, whose names are suffixes of other modules' names."""

    @register_variant("gate_and_proj")
    class GateAndProj(Variant):
        label = "LION-GP"
        decay = "token"
        float32_weights = ("gate", "proj")

        def build(self):
            self.add("gate", nn.Linear(self.dim, self.heads))
            self.add("proj", nn.Linear(self.dim, self.heads))

        def prepare(self, x, query, key, value, prefix_tokens):
            logits = (self.gate(x) + self.proj(x)).float().transpose(1, 2)
            return Recurrence(query, key, value, nn.functional.logsigmoid(logits))

    yield "gate_and_proj"
    del VARIANTS["gate_and_proj"]


def text(mask_type="selective", head=lion_hf.LionForMaskedLM, **options):
    inputs = text_inputs()
    if head is lion_hf.LionForMultipleChoice:
        inputs = {name: x[:, None] for name, x in inputs.items()}
    return spread_decays(head(text_config(mask_type, **options))), inputs


def image(mask_type="selective", head=lion_hf.LionForImageClassification, **options):
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if head is lion_hf.LionForMaskedImageModeling:
        inputs["bool_masked_pos"] = torch.rand(2, 16) < 0.5
    return spread_decays(head(vision_config(mask_type, order="s", **options))), inputs


IMAGE_HEADS = (
    lion_hf.LionVisionModel,
    lion_hf.LionForImageClassification,
    lion_hf.LionForMaskedImageModeling,
    lion_hf.LionBackbone,
)


# ------------------------------------------------------------------------------------------------------------- wrappers


def outputs_and_gradients(model, inputs):
    model.zero_grad()
    outputs = [x for x in model(**inputs).to_tuple() if isinstance(x, torch.Tensor)] or [*model(**inputs)[0]]
    sum(x.square().sum() for x in outputs).backward()
    return [*outputs, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mask_type", ["lit", "decay", "selective", "grfa", "mamba2", "rwkv6"])
@pytest.mark.parametrize("head", [*TEXT_HEADS, *IMAGE_HEADS], ids=lambda head: head.__name__)
def test_every_layer_may_hide_in_a_wrapper(head, mask_type):
    """Outputs and gradients are unchanged if every linear layer, convolution, embedding and norm is wrapped."""
    options = {"mlp_type": "glu", "softmax_layers": [1], "pos_emb": True}
    make = text if head in TEXT_HEADS else image
    model, inputs = make(mask_type, head, **options)
    expected = outputs_and_gradients(model, inputs)
    leaves = [name for name, module in model.named_modules() if not [*module.children()] and [*module.parameters()]]
    assert len(leaves) >= 20
    for name in leaves:
        model.set_submodule(name, Wrapped(model.get_submodule(name)))
    for a, b in zip(outputs_and_gradients(model, inputs), expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_may_be_of_any_dtype_and_hide(form):
    """A wrapper receives inputs in the model's dtype; the gate inside may compute in any dtype."""
    model, inputs = text(format=form)
    half = model.bfloat16()
    expected = half(**inputs).logits
    for layer in half.lion.layers:
        layer.mixer.decay_proj = Wrapped(layer.mixer.decay_proj.float())
    found = half(**inputs).logits
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.02 * expected.norm()


# ----------------------------------------------------------------------------------------------------------- quantisers


def whole_layers(model):
    """Return the names of the linear layers that were not replaced."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def gates(model):
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, lion_hf.nn.Mixer)
        for own in module.variant.float32_weights + tuple(f"{own}_2" for own in module.variant.float32_weights)
        if isinstance(getattr(module, own, None), nn.Linear)
    }


def quantise(model, applies, by_parameter):
    """Replace linear layers as Transformers' integrations do, and return the output layer, which they leave alone.

    bitsandbytes and quanto select layers by the names of modules, torchao by the names of parameters.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in list(model.named_modules()):
        asked = f"{name}.weight" if by_parameter else name
        if applies(module) and should_convert_module(asked, kept):
            model.set_submodule(name, Int8Linear(module))
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if head is not None and module is head}


QUANTISERS = {
    "bitsandbytes": (lambda module: type(module) is nn.Linear, False),
    "quanto": (lambda module: isinstance(module, nn.Linear), False),
    "torchao": (lambda module: isinstance(module, nn.Linear), True),
}
MODELS = {
    "text-lit": lambda: text("lit"),
    "text-decay": lambda: text("decay", lion_hf.LionForSequenceClassification),
    "text-selective": lambda: text(mlp_type="glu", softmax_layers=[0]),
    "text-encoder": lambda: text(head=lion_hf.LionModel),
    "image-snake": image,
    "backbone": lambda: image(head=lion_hf.LionBackbone),
    "own": lambda: text("gate_and_proj", lion_hf.LionForTokenClassification, mlp_type="glu"),
}


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("kind", MODELS)
def test_quantisers_leave_the_gates_alone_and_nothing_else(kind, quantiser, gate_and_proj):
    model, inputs = MODELS[kind]()
    expected = model(**inputs)[0]
    found, by_type, by_parameter = gates(model), *QUANTISERS[quantiser]
    assert bool(found) == (kind not in ("text-lit", "text-decay"))
    output = quantise(model, by_type, by_parameter)
    assert whole_layers(model) == found | output
    actual = model(**inputs)[0]
    actual, expected = (x if isinstance(x, torch.Tensor) else x[0] for x in (actual, expected))
    assert 0 < (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "own"])
def test_dynamic_quantisation_of_all_linear_layers_leaves_the_gates_alone(kind):
    model, inputs = MODELS[kind]()
    expected = model(**inputs)[0]
    quantised = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert whole_layers(quantised) == gates(model)
    actual = quantised(**inputs)[0]
    actual, expected = (x if isinstance(x, torch.Tensor) else x[0] for x in (actual, expected))
    assert 0 < (actual - expected).norm() < 0.1 * expected.norm()


def real_plans():
    """Return functions that make the configuration of each quantiser, by the name of its package."""
    import transformers

    def torchao():
        return transformers.TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())

    return {
        "bitsandbytes-4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes-8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao": torchao,
        "optimum.quanto": lambda: transformers.QuantoConfig(weights="int8"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantiser", ["bitsandbytes-4", "bitsandbytes-8", "torchao", "optimum.quanto"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_quantised_loading_leaves_the_gates_alone_and_nothing_else(kind, quantiser, dtype, tmp_path):
    pytest.importorskip(quantiser.partition("-")[0])
    options = {"hidden_size": 192, "intermediate_size": 192}  # bitsandbytes requires multiples of 32 on a CPU
    if kind == "text":
        model, inputs = text(vocab_size=64, mlp_type="glu", **options)
    else:
        model, inputs = image(num_labels=32, **options)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        plan = real_plans()[quantiser]()
        loaded = type(model).from_pretrained(tmp_path, quantization_config=plan, dtype=dtype)
        actual = loaded(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}).logits
    whole = {
        name
        for name, module in loaded.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter and module.weight.is_floating_point()
    }
    assert whole - {"head.decoder"} == gates(model)
    assert all(loaded.get_submodule(name).weight.dtype == torch.float32 for name in gates(model))
    assert (actual - expected).norm() < (0.2 if quantiser.endswith("4") else 0.03) * expected.norm()


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_whole_names_decide_what_stays_float32(dtype, gate_and_proj, tmp_path):
    """`gate` and `proj` of a variant stay float32; `mlp.gate_proj` and other projections of its mixer do not."""
    model, _ = text(gate_and_proj, mlp_type="glu")
    model.save_pretrained(tmp_path)
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    wide = {name.rpartition(".")[0] for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert wide == gates(model)


def test_a_gate_takes_inputs_of_any_dtype_and_stays_as_precise_as_its_weights():
    gate, x = GateLinear(24, 3), torch.randn(2, 5, 24)
    expected = nn.functional.linear(x, gate.weight, gate.bias)
    assert torch.equal(gate(x.double()), gate(x)) and torch.equal(gate(x), expected)
    assert torch.equal(gate(x.bfloat16()), gate(x.bfloat16().float()))
    assert gate.double()(x).dtype == torch.float64
