"""Adapters, 8 bits, sentence embeddings, shards and dtypes. Tests skip if their library is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_models import VARIANTS, spread_decays, text_config, text_inputs, vision_config
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizer, pipeline

import lion_hf


LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


IMPORTS = """
import {first}, {second}, sys, torch
assert sys.argv[1] in sys.modules
from small_models import text_config, vision_config
for model in (lion_hf.LionForSequenceClassification(text_config()), lion_hf.LionBackbone(vision_config("decay"))):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
    layers = {{name.split(".lora_")[0].split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad}}
    assert layers == {{"q_proj", "v_proj"}}, layers
"""


@pytest.fixture
def bench_quantization(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import bench_quantization

    return bench_quantization


# -------------------------------------------------------------------------------------------------------------- PEFT


def tune(model, inputs, steps=30):
    """Train a few steps on one batch and return the loss before and after."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def cases():
    """Yield (model, inputs, layers to adapt) of every kind. The linear layer of the decay is adapted, too."""
    text = text_inputs(6, 11) | {"labels": torch.arange(6) % 3}
    image = {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.arange(6) % 3}
    sequence, picture = lion_hf.LionForSequenceClassification, lion_hf.LionForImageClassification
    return {
        "text-lit": (sequence(text_config("lit", num_labels=3)), text, LINEAR_LAYERS),
        "text-decay": (sequence(text_config("decay", num_labels=3)), text, LINEAR_LAYERS),
        "text-selective": (sequence(text_config(num_labels=3)), text, [*LINEAR_LAYERS, "decay_proj"]),
        "image-snake": (
            picture(vision_config(order="s", num_labels=3)),
            image,
            [*LINEAR_LAYERS, "decay_proj", "decay_proj_2"],
        ),
    }


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "IA3Config", "LNTuningConfig", "VeraConfig", "OSFConfig"])
@pytest.mark.parametrize("model", ["text", "image"])
def test_adapters_find_their_layers_where_none_are_named(model, kind):
    peft = pytest.importorskip("peft")
    if model == "text":
        model, inputs = lion_hf.LionForSequenceClassification(text_config()), text_inputs()
    else:
        model = lion_hf.LionForImageClassification(vision_config(order="s"))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    adapted = peft.get_peft_model(model, getattr(peft, kind)())
    adapted(**inputs).logits.square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and not any("decay" in name for name in trained)


def test_a_model_that_was_there_before_peft_is_known_to_it(monkeypatch):
    """Simulates an import of PEFT after the model: its tables are new and do not contain LION."""
    peft, model = pytest.importorskip("peft"), lion_hf.LionModel(text_config())
    constants = sys.modules.pop("peft.utils.constants")
    assert model.config.to_dict()["model_type"] == "lion"
    monkeypatch.setitem(sys.modules, "peft.utils.constants", constants)
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "lion", None)
    del table["lion"]
    assert {"q_proj", "v_proj"} == peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"].target_modules
    monkeypatch.setitem(table, "lion", ["k_proj"])  # a user's own entry is kept
    assert {"k_proj"} == peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"].target_modules


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("lion_hf", "peft"), ("peft", "lion_hf")])
def test_adapters_find_their_layers_whichever_library_is_imported_first(first, second):
    pytest.importorskip("peft")
    code = IMPORTS.format(first=first, second=second)
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{code}"
    subprocess.run([sys.executable, "-c", code, first], check=True)


@pytest.mark.slow
def test_neither_import_nor_configurations_load_peft():
    code = "import lion_hf, sys; lion_hf.LionConfig().to_dict(); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("case", ["text-lit", "text-decay", "text-selective", "image-snake"])
def test_lora_learns_merges_and_is_saved_as_an_adapter(tmp_path, case):
    peft = pytest.importorskip("peft")
    model, inputs, layers = cases()[case]
    spread_decays(model).save_pretrained(tmp_path / "base")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=layers, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    first, last = tune(adapted, inputs)
    assert last < first / 2
    adapted.eval()
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    # Only the adapted weights have changed, and the merged model is saved as a normal checkpoint.
    changed = {name for name, p in merged.state_dict().items() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("classifier") or name.split(".")[-2] in layers for name in changed)
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_decays_of_lion_d_are_trained_beside_an_adapter_and_stay_in_the_merged_model(tmp_path):
    """One number per head has no low rank, so it is saved with the whole model and not in the adapter's file."""
    peft = pytest.importorskip("peft")
    model, inputs, layers = cases()["text-decay"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers))
    decays = {name: p for name, p in adapted.named_parameters() if "decay_logit" in name}
    before = {name: p.requires_grad_(True).detach().clone() for name, p in decays.items()}
    tune(adapted, inputs, 5)
    assert len(decays) == 2 and all((p != before[name]).all() for name, p in decays.items())
    expected = adapted.eval()(**inputs).logits
    adapted.merge_and_unload().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "image", "masked-image"])
def test_lora_adapts_convolutions_and_tables_as_well(kind):
    """PEFT adapts every kind of layer: linear layers, patch projection, image decoder, embeddings, position tables."""
    peft = pytest.importorskip("peft")
    if kind == "text":
        model, inputs = lion_hf.LionForSequenceClassification(text_config("lit", num_labels=3)), text_inputs(6, 11)
    else:
        head = lion_hf.LionForImageClassification if kind == "image" else lion_hf.LionForMaskedImageModeling
        model = head(vision_config(order="s", num_labels=3, pos_emb=True))
        inputs = {"pixel_values": torch.randn(6, 3, 16, 16)}
    own = {} if kind == "masked-image" else {"labels": torch.arange(6) % 3}
    inputs |= own or {"bool_masked_pos": torch.arange(96).view(6, 16) % 2}
    spread_decays(model).eval()
    expected = model(**inputs)[1]
    kinds = torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert any("position_embeddings" in name or "projection" in name for name in layers)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers)).eval()
    torch.testing.assert_close(adapted(**inputs)[1], expected)  # a new adapter changes nothing
    first, last = tune(adapted, inputs, 10)
    assert last < first
    learned = adapted(**inputs)[1]
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs)[1], learned, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ 8 bits


@pytest.mark.parametrize("recipe", ["int8 weights", "int8 weights and activations"])
@pytest.mark.parametrize("kind", [*VARIANTS, "image"])
def test_8_bit_models_stay_near_float32_and_keep_their_decays(bench_quantization, kind, recipe):
    if kind == "image":
        model = lion_hf.LionForImageClassification(vision_config(hidden_size=48, intermediate_size=96, order="s"))
        inputs = {"pixel_values": torch.randn(4, 3, 16, 16)}
    else:
        model = lion_hf.LionForMaskedLM(text_config(kind, hidden_size=48, intermediate_size=96))
        inputs = text_inputs(4, 11)
    spread_decays(model).eval()
    quantized = bench_quantization.quantized(model, recipe)
    for name, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module.weight, torch.nn.Parameter)
            assert (type(module.weight).__name__ == "Int8Tensor") == ("decay_proj" not in name), name
    with torch.no_grad():
        expected, actual = model(**inputs).logits, quantized(**inputs).logits
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < 0.03


# ------------------------------------------------------------------------------------------------ sentence embeddings


SENTENCES = ["the lion sleeps", "a lion", "the grass sleeps in the grass under a lion", "lion"]


@pytest.fixture
def sentence_folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", "sleeps", "in", "grass", "a", "under"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    spread_decays(lion_hf.LionForMaskedLM(text_config())).save_pretrained(tmp_path)
    return tmp_path


def mean_pooled(folder, sentences):
    """Compute embeddings as the documentation does: the normalised mean over real tokens."""
    tokenizer, model = BertTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_padding_changes_no_sentence_embedding(sentence_folder):
    together = mean_pooled(sentence_folder, SENTENCES)
    alone = torch.cat([mean_pooled(sentence_folder, [sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone)
    assert (together @ together.T).fill_diagonal_(0).max() < 0.9999


@pytest.mark.slow
def test_sentence_transformers_loads_a_folder_and_pools_alike(sentence_folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(sentence_folder), device="cpu")
    embeddings = model.encode(SENTENCES, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, mean_pooled(sentence_folder, SENTENCES))
    model.save(str(sentence_folder / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(sentence_folder / "saved"), device="cpu")
    assert torch.equal(loaded.encode(SENTENCES, normalize_embeddings=True, convert_to_tensor=True), embeddings)
    options = {"format": "chunk", "chunk_size": 2, "attn_implementation": "sdpa"}
    chunked = sentence_transformers.SentenceTransformer(str(sentence_folder), device="cpu", model_kwargs=options)
    assert chunked[0].auto_model.config.format == "chunk"
    again = chunked.encode(SENTENCES, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(again, embeddings)
    chunked.save(str(sentence_folder / "chunked"))
    stored = sentence_transformers.SentenceTransformer(
        str(sentence_folder / "chunked"), device="cpu", model_kwargs={"format": None}
    )
    assert stored[0].auto_model.config.format == "chunk"


def test_pipelines_take_options_of_the_configuration(sentence_folder):
    filled = pipeline("fill-mask", model=str(sentence_folder), model_kwargs={"format": "chunk", "chunk_size": 2})
    assert (filled.model.config.format, filled.model.config.chunk_size) == ("chunk", 2)
    expected = pipeline("fill-mask", model=str(sentence_folder))("the [MASK]")
    assert [x["token"] for x in filled("the [MASK]")] == [x["token"] for x in expected]


# ----------------------------------------------------------------------------------------------------- shards, dtypes


@pytest.mark.parametrize(
    "model",
    [
        lambda: lion_hf.LionForMaskedLM(text_config("lit")),
        lambda: lion_hf.LionForMaskedImageModeling(vision_config("decay", order="s", pos_emb=True)),
        lambda: lion_hf.LionBackbone(vision_config(out_indices=[1, 2])),
    ],
    ids=["text", "masked-images", "backbone"],
)
def test_shards_hold_every_weight_once_and_load_bit_equal(tmp_path, model):
    model = spread_decays(model())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    stored = []
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert all(index[name] == file.name for name in shard.keys())  # noqa: SIM118
            stored += shard.keys()
    assert len(set(index.values())) > 3 and sorted(stored) == sorted(index)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    expected = model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], p) for name, p in expected.items())


DTYPES = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_type", VARIANTS)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_automodel_in_four_dtypes_is_near_float32(tmp_path, kind, mask_type, dtype):
    if kind == "text":
        model, inputs = lion_hf.LionForMaskedLM(text_config(mask_type)), text_inputs()
    else:
        model = lion_hf.LionForImageClassification(vision_config(mask_type, order="s"))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    spread_decays(model).save_pretrained(tmp_path)
    for form in ("attention", "chunk"):
        expected = AutoModel.from_pretrained(tmp_path, format=form).eval()(**inputs).last_hidden_state
        loaded = AutoModel.from_pretrained(tmp_path, format=form, dtype=dtype).eval()
        actual = loaded(**inputs).last_hidden_state
        assert loaded.dtype == actual.dtype == dtype and actual.isfinite().all()
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < DTYPES[dtype], form


def test_a_classifier_goes_from_float64_to_half_and_back(tmp_path):
    model = spread_decays(lion_hf.LionForSequenceClassification(text_config())).double()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float64
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in loaded.state_dict().items())
