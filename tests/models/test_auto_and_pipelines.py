import json
import re

import numpy as np
import pytest
import torch
import transformers
from small_models import TEXT_HEADS, VARIANTS, spread_decays, text_config, text_inputs, vision_config
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, BertTokenizer, pipeline

import lion_hf


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", "sleeps", "in", "grass", "a", "runs", "##s", "."]
TEXT_AUTO = {
    head: f"AutoModel{head.__name__.removeprefix('Lion')}" for head in TEXT_HEADS if head.__name__ != "LionModel"
}
TEXT_AUTO[lion_hf.LionModel] = "AutoModel"
IMAGE_AUTO = {
    lion_hf.LionVisionModel: "AutoModel",
    lion_hf.LionForImageClassification: "AutoModelForImageClassification",
    lion_hf.LionForMaskedImageModeling: "AutoModelForMaskedImageModeling",
}
ALL_AUTO = [*TEXT_AUTO.items(), *IMAGE_AUTO.items()]
IDS = [head.__name__ for head, _ in ALL_AUTO]


def build(head, mask_type="selective", **options):
    config = (text_config if head in TEXT_AUTO else vision_config)(mask_type, **options)
    return spread_decays(head(config)).eval()


def inputs_for(head):
    if head in IMAGE_AUTO:
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = text_inputs()
    if head is lion_hf.LionForMultipleChoice:
        inputs = {k: v[:, None].repeat(1, 2, 1) for k, v in inputs.items()}
    return inputs


def assert_same_outputs(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], **tolerance)


@pytest.fixture
def text_folder(tmp_path):
    """Return a folder that holds only a tokenizer of 14 words."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def picture():
    image = pytest.importorskip("PIL.Image")
    return image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


# ---------------------------------------------------------------------------------------------------- Auto classes


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("head, auto", ALL_AUTO, ids=IDS)
def test_auto_classes_load_every_head_from_a_saved_folder(tmp_path, head, auto, sharded):
    model, inputs = build(head), inputs_for(head)
    model.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head and not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_outputs(loaded.eval()(**inputs), model(**inputs))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is head.config_class and config.mask_type == "selective"


@pytest.mark.parametrize("head, auto", ALL_AUTO, ids=IDS)
def test_auto_classes_build_every_head_from_a_configuration(head, auto):
    config = build(head).config
    assert type(getattr(transformers, auto).from_config(config)) is head


def test_automodel_of_a_head_checkpoint_is_its_encoder(tmp_path):
    for head, part in ((lion_hf.LionForMaskedLM, "lion"), (lion_hf.LionForImageClassification, "lion_vision")):
        model = build(head)
        model.save_pretrained(tmp_path / part)
        encoder = AutoModel.from_pretrained(tmp_path / part)
        for name, p in getattr(model, part).named_parameters():
            assert torch.equal(encoder.get_parameter(name), p), name


def test_configurations_are_made_by_their_model_type():
    assert type(AutoConfig.for_model("lion")) is lion_hf.LionConfig
    assert type(AutoConfig.for_model("lion_vision")) is lion_hf.LionVisionConfig


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModelForImageClassification"])
def test_heads_that_text_does_not_have_are_refused(tmp_path, auto):
    build(lion_hf.LionModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LionConfig"):
        getattr(transformers, auto).from_pretrained(tmp_path)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, "bfloat16", "auto"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head, auto", ALL_AUTO, ids=IDS)
def test_every_head_loads_and_runs_in_every_dtype(tmp_path, head, auto, dtype):
    model, inputs = build(head), inputs_for(head)
    (model.to(torch.bfloat16) if dtype == "auto" else model).save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path, dtype=dtype).eval()
    expected = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    assert loaded.dtype == expected
    for name, p in loaded.named_parameters():
        wider = torch.promote_types(expected, torch.float32)  # decays are at least float32
        assert p.dtype == (wider if "decay_" in name else expected), name
    assert all(x.dtype == expected and x.isfinite().all() for x in loaded(**inputs).values())


# ------------------------------------------------------------------------------------------------------ device_map


@pytest.mark.parametrize("head, auto", ALL_AUTO, ids=IDS)
def test_device_map_auto_loads_and_runs(tmp_path, head, auto):
    pytest.importorskip("accelerate")
    model, inputs = build(head), inputs_for(head)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path, device_map="auto").eval()
    outputs = loaded(**{k: v.to(loaded.device) for k, v in inputs.items()})
    assert_same_outputs({k: v.cpu() for k, v in outputs.items()}, model(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "head, options",
    [
        *((lion_hf.LionForMaskedLM, {"mask_type": v}) for v in VARIANTS),
        *((lion_hf.LionForSequenceClassification, {"mask_type": v}) for v in VARIANTS),
        *((lion_hf.LionForImageClassification, {"mask_type": v, "order": "s", "pos_emb": True}) for v in VARIANTS),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(map(str, x.values())),
)
def test_weights_that_lie_on_disk_are_fetched_where_they_are_used(tmp_path, head, options):
    """device_map="auto" offloads to disk what does not fit into memory. Only the weights' own module can read them."""
    pytest.importorskip("accelerate")
    model, inputs = build(head, **options), inputs_for(head)
    model.save_pretrained(tmp_path / "model")
    encoder = model.base_model_prefix
    device_map = {name: "disk" for name, _ in model.named_children() if name != encoder}
    device_map |= {f"{encoder}.{name}": "disk" for name, _ in getattr(model, encoder).named_children()}
    device_map[f"{encoder}.layers"] = "cpu"
    loaded = head.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload").eval()
    assert any(p.device.type == "meta" for p in loaded.parameters())
    with torch.no_grad():
        assert_same_outputs(loaded(**inputs), model(**inputs))


@pytest.mark.parametrize("head", [lion_hf.LionForSequenceClassification, lion_hf.LionForImageClassification])
def test_layers_and_embeddings_are_never_split_over_devices(head):
    accelerate = pytest.importorskip("accelerate")
    model = build(head, num_hidden_layers=4)
    for budget in range(2_000, 80_000, 3_000):
        places = accelerate.infer_auto_device_map(
            model, max_memory={"cpu": budget, "disk": 10**9}, no_split_module_classes=model._no_split_modules
        )
        inside = [key for key in places if re.search(r"\.layers\.\d+\.|\.embeddings\.", key)]
        assert not inside, f"with {budget} bytes: {inside}"


# -------------------------------------------------------------------------------------- tokenizer, image processor


def test_auto_tokenizer_from_the_configuration_alone(tmp_path):
    text_config(vocab_size=len(WORDS)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    encoded = tokenizer("The lion runs.", "A lion sleeps.")
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert names == ["[CLS]", "the", "lion", "runs", ".", "[SEP]", "a", "lion", "sleeps", ".", "[SEP]"]
    assert set(encoded["token_type_ids"]) == {0, 1}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head, auto", [*TEXT_AUTO.items()][:-1], ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_saved_tokenizer_returns_is_what_the_model_takes(text_folder, head, auto, side):
    build(head, vocab_size=len(WORDS)).save_pretrained(text_folder)
    tokenizer = AutoTokenizer.from_pretrained(text_folder, padding_side=side)
    assert isinstance(tokenizer, BertTokenizer)
    batch = tokenizer(["the lion sleeps in the grass.", "a lion"], padding=True, return_tensors="pt")
    assert {"input_ids", "attention_mask"} <= batch.keys()
    model = getattr(transformers, auto).from_pretrained(text_folder).eval()
    if head is lion_hf.LionForMultipleChoice:
        batch = {k: v[None] for k, v in batch.items()}
    assert all(x.isfinite().all() for x in model(**batch).values())


def test_auto_image_processor_fits_the_model_without_torchvision(tmp_path, picture):
    model = build(lion_hf.LionForImageClassification)
    model.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    # This file names no processor class, so it is found through the model's configuration.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}), encoding="utf-8")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor([picture, picture], return_tensors="pt")
    assert pixels["pixel_values"].shape == (2, 3, 16, 16)
    assert model(**pixels).logits.shape == (2, 5)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert torch.equal(again(picture, return_tensors="pt")["pixel_values"], pixels["pixel_values"][:1])


# ------------------------------------------------------------------------------------------------------- pipelines


def save_for_pipeline(head, folder, **options):
    model = build(head, vocab_size=len(WORDS), **options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("mask_type", VARIANTS)
def test_fill_mask(text_folder, mask_type):
    model = save_for_pipeline(lion_hf.LionForMaskedLM, text_folder, mask_type=mask_type)
    answers = pipeline("fill-mask", str(text_folder))("the [MASK] sleeps in the grass.", top_k=3)
    ids = AutoTokenizer.from_pretrained(text_folder)("the [MASK] sleeps in the grass.", return_tensors="pt")
    place = ids["input_ids"][0] == WORDS.index("[MASK]")
    best = model(**ids).logits[0, place].softmax(-1)[0].topk(3)
    assert [a["token"] for a in answers] == best.indices.tolist()
    assert [a["score"] for a in answers] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_text_classification(text_folder):
    labels = {0: "calm", 1: "wild", 2: "asleep"}
    options = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    model = save_for_pipeline(lion_hf.LionForSequenceClassification, text_folder, **options)
    texts = ["the lion sleeps in the grass.", "a lion"]
    answers = pipeline("text-classification", str(text_folder))(texts, top_k=None, batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    for text, answer in zip(texts, answers, strict=True):
        expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        scores = {a["label"]: a["score"] for a in answer}
        assert scores == pytest.approx({name: expected[i].item() for i, name in labels.items()}, rel=1e-4)


def test_token_classification(text_folder):
    labels = {0: "O", 1: "B-ANIMAL"}
    options = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    model = save_for_pipeline(lion_hf.LionForTokenClassification, text_folder, **options)
    with torch.no_grad():
        model.classifier.bias[1] = 5.0
    model.save_pretrained(text_folder)
    answers = pipeline("token-classification", str(text_folder), aggregation_strategy="none")("the lion sleeps")
    assert [(a["word"], a["entity"]) for a in answers] == [(w, "B-ANIMAL") for w in ("the", "lion", "sleeps")]


def test_feature_extraction(text_folder):
    model = save_for_pipeline(lion_hf.LionModel, text_folder)
    features = pipeline("feature-extraction", str(text_folder))("the lion sleeps", return_tensors=True)
    ids = AutoTokenizer.from_pretrained(text_folder)("the lion sleeps", return_tensors="pt")
    torch.testing.assert_close(features, model(**ids).last_hidden_state)


@pytest.mark.parametrize("order", ["normal", "s"])
def test_image_classification(tmp_path, picture, order):
    model = build(lion_hf.LionForImageClassification, order=order)
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    answers = pipeline("image-classification", str(tmp_path))(picture, top_k=5)
    expected = model(**processor(picture, return_tensors="pt")).logits[0].softmax(-1)
    scores = {a["label"]: a["score"] for a in answers}
    assert scores == pytest.approx({f"LABEL_{i}": expected[i].item() for i in range(5)}, rel=1e-4)


@pytest.mark.parametrize("pool", [False, True])
def test_image_feature_extraction(tmp_path, picture, pool):
    model = build(lion_hf.LionVisionModel)
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    features = pipeline("image-feature-extraction", str(tmp_path))(picture, return_tensors=True, pool=pool)
    outputs = model(**processor(picture, return_tensors="pt"))
    torch.testing.assert_close(features, outputs.pooler_output if pool else outputs.last_hidden_state)
