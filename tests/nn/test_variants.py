"""Variants from a file outside the package work wherever those of the package do."""

import copy
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from small_models import FORMS, text_config, text_inputs, vision_config
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

import lion_hf
from lion_hf.convert import from_bert, from_vit
from lion_hf.models.configuration_lion import spellings
from lion_hf.nn import Mixer, Recurrence, Variant, register_variant, variant_class
from lion_hf.nn.variants import VARIANTS


FILE = Path(__file__).parents[1] / "data" / "two_variants.py"
OWN = ("head_times_token", "gated_key")
PAPER = ("lit", "decay", "selective")


@pytest.fixture(autouse=True, scope="module")
def two_variants():
    """Import the user's file, and unregister its variants afterwards."""
    spec = importlib.util.spec_from_file_location("two_variants", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_variants"] = module
    spec.loader.exec_module(module)
    yield module
    for name in OWN:
        VARIANTS.pop(name)
    del sys.modules["two_variants"]


def model_of(kind, mask_type, **options):
    if kind == "text":
        return lion_hf.LionForMaskedLM(text_config(mask_type, **options)).double().eval()
    return lion_hf.LionForImageClassification(vision_config(mask_type, **options)).double().eval()


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("mask_type", OWN)
def test_every_form_computes_the_same_outputs_and_gradients_in_text_with_padding(mask_type):
    model, inputs = model_of("text", mask_type), text_inputs()
    results = []
    for form in FORMS:
        model.config.format = form
        model.zero_grad()
        logits = model(**inputs).logits
        logits[inputs["attention_mask"].bool()].square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    own = [n for n, p in model.named_parameters() if any(w in n for w in ("head_logit", "token_proj", "key_gate"))]
    assert own and all(model.get_parameter(name).grad.abs().sum() > 0 for name in own)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask_type", OWN)
@pytest.mark.parametrize("form", FORMS)
def test_padding_and_the_rest_of_the_batch_change_no_real_token(mask_type, form):
    model, inputs = model_of("text", mask_type, format=form, unpad=False), text_inputs()
    together = model(**inputs).logits
    for row, real in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = model(inputs["input_ids"][row : row + 1, :real]).logits[0]
        torch.testing.assert_close(together[row, :real], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mask_type, order", [(OWN[0], "normal"), (OWN[0], "snake"), (OWN[1], "normal"), (OWN[1], "s")])
def test_every_form_computes_the_same_images(mask_type, order):
    model, pixels = model_of("image", mask_type, order=order), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(pixels, output_attentions=True)
    for form in FORMS:
        model.config.format = form
        torch.testing.assert_close(model(pixels).logits, expected.logits, rtol=1e-9, atol=1e-9)
    assert all((attention > 0).all() for attention in expected.attentions)
    names = {name for name, _ in model.named_parameters()}
    second = "lion_vision.layers.1.mixer.head_logit_2" in names
    assert second == (mask_type == "head_times_token" and order == "snake")


def test_a_changed_key_is_what_its_definition_says():
    mixer = Mixer(24, 3, "gated_key").double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    query, key, value = mixer.project(x)
    query, key = (torch.nn.functional.elu(t) + 1 for t in (query, key))
    key = key * mixer.key_gate(x).sigmoid().transpose(1, 2)[..., None]
    scores = query @ key.transpose(2, 3) * 8**-0.5
    mixed = scores @ value / (scores.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(mixer(x), mixer.o_proj(mixed.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("mask_type", OWN)
def test_loaded_values_survive_the_initialisation(kind, mask_type, tmp_path):
    model = model_of(kind, mask_type).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_weights_that_a_checkpoint_lacks_are_initialised_as_the_variant_says(tmp_path):
    """Also if a module of the variant owns the weights. Models are built without memory when they are loaded."""
    model = lion_hf.LionForMaskedLM(text_config("head_times_token"))
    state = {name: x for name, x in model.state_dict().items() if "layers.1.mixer.token_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path).lion.layers
    assert (loaded[1].mixer.token_proj.bias == -2).all()
    assert torch.equal(loaded[0].mixer.head_logit, model.lion.layers[0].mixer.head_logit)


def test_initialisation_depends_on_the_layer():
    layers = lion_hf.LionModel(text_config("head_times_token", num_hidden_layers=4, num_attention_heads=12)).layers
    means = [layer.mixer.head_logit.mean().item() for layer in layers]
    assert all(abs(mean - 1 - i / 4) < 0.15 for i, mean in enumerate(means)), means


def test_decays_stay_float32_where_the_variant_says_so(tmp_path):
    lion_hf.LionForMaskedLM(text_config("head_times_token")).save_pretrained(tmp_path)
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.split(".mixer.")[1]: p.dtype for name, p in loaded.named_parameters() if ".mixer." in name}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "head_logit",
        "token_proj.weight",
        "token_proj.bias",
    }
    assert loaded(**text_inputs()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_models_can_be_copied_and_pickled(copied):
    model, inputs = model_of("text", "head_times_token"), text_inputs()
    twin = copied(model)
    with torch.no_grad():
        twin.lion.layers[0].mixer.head_logit.add_(1)
    before = copied(model)(**inputs).logits
    assert torch.equal(model(**inputs).logits, before) and not torch.equal(twin(**inputs).logits, before)


def test_an_unknown_variant_at_load_names_the_way_to_register_one(tmp_path):
    lion_hf.LionModel(text_config("gated_key")).save_pretrained(tmp_path)
    entry = VARIANTS.pop("gated_key")
    try:
        with pytest.raises(Exception, match="mask_type is 'gated_key'.*register_variant"):
            lion_hf.LionModel.from_pretrained(tmp_path)
    finally:
        VARIANTS["gated_key"] = entry


# ----------------------------------------------------------------------------------------------- starts, cards and runs


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


@pytest.mark.parametrize("mask_type", OWN)
def test_warm_starts_copy_what_the_source_has_and_set_the_windows_of_the_variant(mask_type, caplog):
    source = BertForMaskedLM(BertConfig(vocab_size=61, **SMALL)).eval()
    start = from_bert(source, mask_type, windows=(4, 16))
    assert start.config.mask_type == mask_type and start(**text_inputs()).logits.isfinite().all()
    mixer = start.lion.layers[0].mixer
    assert torch.equal(mixer.o_proj.weight, source.bert.encoder.layer[0].attention.output.dense.weight)
    if mask_type == "head_times_token":
        decay = mixer.recurrences(torch.randn(1, 5, 24))[0].log_decay.exp()[0, :, 0]
        torch.testing.assert_close((1 + decay) / (1 - decay), torch.tensor([4.0, 8.0, 16.0]), rtol=1e-3, atol=0)
    image = from_vit(ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SMALL)), mask_type)
    assert image(torch.randn(1, 3, 16, 16)).logits.isfinite().all()
    assert "newly initialised" not in caplog.text


@pytest.mark.parametrize("mask_type", OWN)
def test_a_run_of_masked_language_modelling_ends_with_its_report(mask_type, tmp_path, examples):
    import draw_decays
    import run_mlm

    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    data = ["--vocab_size=300", "--max_train_samples=20", "--max_eval_samples=6", "--max_length=16"]
    run_mlm.main([f"--output_dir={tmp_path}", f"--mask_type={mask_type}", "--max_steps=3", "--use_cpu", *sizes, *data])
    label = variant_class(mask_type).label
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        re.search(rf"^# Masked language model of .+, {label}$", card, re.MULTILINE)
        and "| eval_masked_accuracy |" in card
    )
    assert "import lion_hf\nimport two_variants\n" in card
    assert "python -m lion_hf --import two_variants examples/run_mlm.py" in card
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] > 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.mask_type == mask_type
    if mask_type == "head_times_token":
        draw_decays.draw_decays([tmp_path], tmp_path / "decays.png", text="a word and another")
        assert (tmp_path / "decays.png").stat().st_size > 10_000


@pytest.mark.parametrize("mask_type", OWN)
def test_code_of_the_user_travels_with_the_model(mask_type, tmp_path):
    folder = lion_hf.save_with_code(lion_hf.LionForMaskedLM(text_config(mask_type)), tmp_path)
    assert (folder / "two_variants.py").is_file()
    assert "from .two_variants import" in (folder / "configuration_lion.py").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- registry


def test_the_papers_variants_are_registered_with_the_authors_spellings():
    assert [VARIANTS[name].label for name in PAPER] == ["LION-LIT", "LION-D", "LION-S"]
    assert (
        spellings("mask_type").items()
        >= {
            word: name
            for name, words in zip(PAPER, ("lion-lit", "lion-d", "lion-s"), strict=True)
            for word in (name, words)
        }.items()
    )
    assert spellings("mask_type")["lion-ht"] == "head_times_token"


@pytest.mark.parametrize("spelling", ["LION-HT", "head_times_token", "Lion-ht"])
def test_mask_type_takes_names_and_spellings_in_any_case(spelling):
    assert text_config(spelling).mask_type == "head_times_token"
    assert Mixer(24, 3, spelling).variant is variant_class("head_times_token")


class Plain(Variant):
    label = "plain"


@pytest.mark.parametrize(
    "name, attributes, message",
    [
        ("lit", {}, "'lit' is already the variant lion_hf.nn.variants.Lit"),
        ("lion-d", {}, "'lion-d' is already the variant .*HeadDecay"),
        ("new", {"spellings": ("lion-s",)}, "'lion-s' is already the variant"),
        ("New", {}, "'New'; it must be in lower case"),
        ("new", {"label": None}, "has no label"),
        (
            "new",
            {"feature_map": "relu"},
            "feature_map is 'relu'; allowed are 'identity', 'elu', 'unit_silu', 'silu', 'hedgehog'",
        ),
        ("new", {"decay": "row"}, "decay is 'row'; allowed are None, 'head', 'token', 'channel', 'token_channel'"),
        ("new", {"preset": {"conv": 3}}, "preset is 'conv'; allowed are 'short_conv', "),
        ("new", {"preset": {"output_norm": "layer"}}, "output_norm is 'layer'; allowed are 'none', 'rms', 'head_rms'"),
        ("new", {"masks": ("padding",)}, "masks is 'padding'; allowed are 'key_mask', 'cu_seqlens'"),
        ("new", {"lable": "x"}, "has the attribute 'lable'; did you mean 'label'?"),
        ("new", {"output_gate": "silu"}, "'output_gate', which is an option of a mixer; set preset = {'output_gate': "),
        (
            "new",
            {"operators": ("two_sided")},
            "is 'two_sided'; it must be a tuple, .'two_sided',. with a comma",
        ),
        ("new", {"float32_weights": ("gate")}, "float32_weights is 'gate'; it must be a tuple"),
        ("new", {"spellings": "newer"}, "spellings is 'newer'; it must be a tuple"),
    ],
)
def test_what_cannot_be_registered_is_refused(name, attributes, message):
    with pytest.raises(ValueError, match=message):
        register_variant(name)(type("Own", (Plain,), attributes))
    assert "new" not in VARIANTS


def test_only_variants_can_be_registered():
    with pytest.raises(TypeError, match="is not a subclass of lion_hf.nn.Variant"):
        register_variant("new")(nn.Module)


@pytest.fixture
def registered():
    """Register a variant under the name "new" for one test."""
    yield lambda cls: register_variant("new")(cls)
    VARIANTS.pop("new", None)


def test_a_name_that_the_mixer_has_is_refused(registered):
    class Own(Plain):
        def build(self):
            self.add("q_proj", nn.Linear(2, 2))

    registered(Own)
    with pytest.raises(ValueError, match="Own adds 'q_proj', but the mixer or the variant already has"):
        Mixer(24, 3, "new")
    for name in ("norm", "decay", "heads", "prepare"):
        Own.build = lambda self, name=name: self.add(name, nn.Parameter(torch.zeros(3)))
        with pytest.raises(ValueError, match=f"Own adds '{name}'"):
            Mixer(24, 3, "new")


def test_weights_that_build_does_not_add_are_refused(registered):
    class Own(Plain):
        float32_weights = ("gate",)

        def build(self):
            self.add("gates", nn.Linear(2, 2))

    registered(Own)
    with pytest.raises(ValueError, match="Own.float32_weights names 'gate', but build adds no weight"):
        Mixer(24, 3, "new")
    for weight in (nn.Linear(2, 2), nn.Parameter(torch.zeros(3))):
        Own.build = lambda self, weight=weight: setattr(self, "gate", weight)
        with pytest.raises(ValueError, match=r"Own.build sets self.gate; write self.add\('gate', ...\)"):
            Mixer(24, 3, "new")
    Own.build = lambda self: self.add("gate", torch.zeros(3))
    with pytest.raises(TypeError, match="Own adds 'gate', which is Tensor; it must be an nn.Parameter or an nn.Module"):
        Mixer(24, 3, "new")


def test_an_init_without_that_of_the_base_class_is_told(registered):
    class Own(Plain):
        def __init__(self, mixer, scan=0):
            self.rank = 4

        def build(self):
            self.add("gate", nn.Linear(self.dim, self.rank))

    registered(Own)
    with pytest.raises(AttributeError, match="Own has no mixer: its __init__ must call super"):
        Mixer(24, 3, "new")


@pytest.mark.parametrize("make", [lambda name: Mixer(24, 3, name), lambda name: lion_hf.LionConfig(mask_type=name)])
def test_a_misspelt_variant_is_told_with_the_nearest_name(make):
    with pytest.raises(ValueError, match="in any case. Did you mean 'selective'. A custom variant must be registered"):
        make("Selektive")


def test_masks_scans_and_operators_that_a_variant_does_not_state_are_refused(registered):
    class Own(Plain):
        decay = "head"
        masks = ("key_mask",)

        def prepare(self, x, query, key, value, prefix_tokens):
            return Recurrence(query, key + 1, value, torch.zeros(3), operator="other")

    registered(Own)
    x = torch.randn(1, 5, 24)
    with pytest.raises(ValueError, match="plain does not support cu_seqlens; its class sets masks"):
        Mixer(24, 3, "new")(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="requests the operator 'other'; it must be one of its operators"):
        Mixer(24, 3, "new")(x)
    Own.prepare = lambda self, x, query, key, value, prefix_tokens: Recurrence(query, key + 1, value, torch.zeros(3))
    paths = lion_hf.ops.snake_orders(2, 2)
    with pytest.raises(ValueError, match="changes query, key or value, .* set scans = 1"):
        Mixer(24, 3, "new", scans=2)(x, paths=paths)


def test_prepare_returns_what_its_class_states(registered):
    class Own(Plain):
        decay = "head"

    registered(Own)
    with pytest.raises(ValueError, match="Own sets decay = 'head', but prepare returned no log_decay"):
        Mixer(24, 3, "new")(torch.randn(1, 5, 24))
    Own.prepare = lambda self, x, query, key, value, prefix_tokens: (query, key, value)
    with pytest.raises(TypeError, match="Own.prepare returned tuple; it must return a Recurrence"):
        Mixer(24, 3, "new")(torch.randn(1, 5, 24))
    Own.prepare = lambda self, x, query, key, value, prefix_tokens: Recurrence(query, key, value, torch.ones(3))
    with pytest.raises(ValueError, match="Own.prepare returned a positive log_decay .largest: 1.0.; .* must be <= 0"):
        Mixer(24, 3, "new")(torch.randn(1, 5, 24))


def test_padding_stays_where_a_variant_mixes_neighbours(registered):
    """Unpadding joins rows, which such a variant does not support, so it is skipped instead of raising an error."""

    class Own(Plain):
        masks = ("key_mask",)

        def prepare(self, x, query, key, value, prefix_tokens):
            return Recurrence(query, key + key.roll(1, 2), value)

    registered(Own)
    mask = (torch.arange(80) < torch.tensor([[20], [10]])).long()
    for unpad in (None, True):
        model = lion_hf.LionModel(text_config("new", unpad=unpad, max_position_embeddings=80)).train()
        assert model(torch.ones(2, 80).long(), attention_mask=mask).last_hidden_state.isfinite().all()


def test_the_decorator_requires_a_name():
    with pytest.raises(TypeError, match="write @register_variant"):
        register_variant(Plain)
