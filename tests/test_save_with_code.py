import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import spread_decays, text_config, text_inputs, vision_config
from transformers import BertConfig, BertModel, BertTokenizer, ViTImageProcessorPil, pipeline

import lion_hf
from lion_hf import save_with_code
from lion_hf._flatten import flat_files


IMAGE_HEADS = ["AutoModel", "AutoModelForMaskedImageModeling", "AutoBackbone"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lion", "sleeps", *(f"word{i}" for i in range(53))]

# Loads folders in a process with Transformers but without the package, and saves the models' outputs.
FOREIGN_PROCESS = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lion_hf":
            raise ModuleNotFoundError("No module named 'lion_hf'")

sys.meta_path.insert(0, Absent())
import transformers
from transformers.models.auto import auto_factory

class Hub:  # AutoBackbone asks it whether there is such a repository
    def repo_exists(self, name):
        return True

auto_factory.hf_api = Hub
jobs, results = torch.load(sys.argv[1]), []
for folder, inputs, auto_classes in jobs:
    outputs = {}
    for auto_class in auto_classes:
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            outputs[auto_class] = {
                "class": type(model).__name__,
                "module": type(model).__module__,
                "config": type(model.config).__name__,
                "values": dict(model(**inputs).items()),
            }
    results.append(outputs)
for task, folder, question in [
    ("fill-mask", jobs[0][0], "the [MASK] sleeps"), ("image-classification", jobs[3][0], sys.argv[3])
]:
    answers = transformers.pipeline(task, folder, trust_remote_code=True)(question, top_k=2)
    results.append([answer["score"] for answer in answers])
assert not any(name.partition(".")[0] == "lion_hf" for name in sys.modules)
torch.save(results, sys.argv[2])
"""


def load_elsewhere(tmp_path, jobs):
    torch.save(jobs, tmp_path / "jobs.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", FOREIGN_PROCESS, *(str(tmp_path / x) for x in ("jobs.pt", "results.pt", "x.png"))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(tmp_path / "results.pt")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_folders_load_without_the_package_and_outputs_are_bit_equal(tmp_path, one_thread):
    text, image = text_inputs(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    choices = {k: v[:, None].repeat(1, 2, 1) for k, v in text.items()}
    cases = [  # one process for all cases, because starting it takes the most time
        (
            lion_hf.LionForMaskedLM(text_config("selective", format="chunk")),
            text,
            ["AutoModel", "AutoModelForTokenClassification"],
        ),
        (
            lion_hf.LionForSequenceClassification(text_config("lit", softmax_layers=[1])),
            text,
            ["AutoModel", "AutoModelForQuestionAnswering"],
        ),
        (lion_hf.LionForMultipleChoice(text_config("decay", format="rnn", local_layers=[1])), choices, []),
        (lion_hf.LionForImageClassification(vision_config(order="s", format="chunk")), image, IMAGE_HEADS),
    ]
    jobs = []
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    for i, (model, inputs, others) in enumerate(cases):
        spread_decays(model).eval()
        folder = save_with_code(model, tmp_path / f"model{i}")
        jobs.append((str(folder), inputs, [type(model).__name__.replace("Lion", "AutoModel"), *others]))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(jobs[0][0])
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(jobs[3][0])
    *results, fill_mask, classification = load_elsewhere(tmp_path, jobs)
    here = pipeline("fill-mask", jobs[0][0])("the [MASK] sleeps", top_k=2)
    assert fill_mask == [answer["score"] for answer in here]
    here = pipeline("image-classification", jobs[3][0])(str(tmp_path / "x.png"), top_k=2)
    assert classification == [answer["score"] for answer in here]
    for (model, inputs, _), (folder, _, auto_classes), outputs in zip(cases, jobs, results, strict=True):
        kind = type(model.config).__name__.removesuffix("Config")
        for auto_class in auto_classes:
            output = outputs[auto_class]
            name = f"{kind}Model" if auto_class == "AutoModel" else re.sub("Auto(Model)?", "Lion", auto_class)
            assert (output["class"], output["config"]) == (name, f"{kind}Config")
            assert output["module"].startswith("transformers_modules.")
            torch.manual_seed(0)
            with torch.no_grad():
                expected = dict(getattr(lion_hf, name).from_pretrained(folder).eval()(**inputs).items())
            assert output["values"].keys() == expected.keys()
            for key, value in output["values"].items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=f"{name} {key}")
        with torch.no_grad():  # compares with the saved model too, not only with the one loaded here
            torch.testing.assert_close(outputs[auto_classes[0]]["values"]["logits"], model(**inputs).logits)


@pytest.mark.parametrize(
    "model, code",
    [
        (lambda: lion_hf.LionForMaskedLM(text_config()), "modeling_lion"),
        (lambda: lion_hf.LionForImageClassification(vision_config()), "modeling_lion_vision"),
    ],
    ids=["text", "image"],
)
def test_auto_map_names_classes_that_the_folder_holds_for_every_head(tmp_path, model, code):
    model = model()
    save_with_code(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    kind = "Lion" if code == "modeling_lion" else "LionVision"
    assert config["auto_map"]["AutoConfig"] == f"configuration_lion.{kind}Config"
    assert config["auto_map"]["AutoModel"] == f"{code}.{kind}Model"
    heads = {name for name in vars(lion_hf) if name.startswith("LionFor")}
    heads = {name for name in heads if getattr(lion_hf, name).config_class is type(model.config)}
    assert {k for k in config["auto_map"] if "For" in k} == {f"AutoModelFor{n.removeprefix('LionFor')}" for n in heads}
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text(encoding="utf-8")


def test_code_in_the_folder_is_the_code_that_the_model_needs_and_flat(tmp_path):
    save_with_code(lion_hf.LionForImageClassification(vision_config()), tmp_path)
    copied = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.py")}
    assert copied == flat_files("lion_hf.models.modeling_lion_vision")
    assert {"modeling_lion_vision.py", "configuration_lion.py", "lion_ops_api.py"} <= copied.keys()
    assert "modeling_lion.py" not in copied


def test_saving_twice_gives_the_same_folder_and_the_second_model(tmp_path):
    first, second = (lion_hf.LionForMaskedLM(text_config()).eval() for _ in range(2))
    assert save_with_code(first, str(tmp_path)) == tmp_path
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix != ".safetensors"}
    save_with_code(second, tmp_path)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix != ".safetensors"}
    assert before == after
    loaded = lion_hf.LionForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in second.state_dict().items())
    save_with_code(lion_hf.LionForMaskedLM.from_pretrained(tmp_path), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == json.loads(before["config.json"])["auto_map"]


def test_options_of_save_pretrained_are_passed_on(tmp_path):
    save_with_code(lion_hf.LionForMaskedLM(text_config()), tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


def test_a_model_that_is_not_lion_is_refused(tmp_path):
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match=r"BertModel \(model_type 'bert'\) is not a LION model.*lion, lion_vision"):
        save_with_code(bert, tmp_path / "model")
    assert not (tmp_path / "model").exists()


class OwnModel(lion_hf.LionForMaskedLM):
    """A user's subclass, defined outside the package."""


def test_a_subclass_from_elsewhere_never_leaves_a_folder_that_cannot_load(tmp_path):
    same_name = type("LionForMaskedLM", (OwnModel,), {"__module__": __name__})
    for kind in (OwnModel, same_name):
        with pytest.raises(ValueError, match=f"{kind.__name__} is not a class of lion_hf"):
            save_with_code(kind(text_config()), tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_push_to_hub_uploads_the_files_of_the_folder(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, exist_ok))
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            calls.append(("upload", repo_id, set(allow_patterns) == {file.name for file in folder_path.iterdir()}))

    monkeypatch.setattr("lion_hf.hub.HfApi", Hub)
    save_with_code(lion_hf.LionModel(text_config()), tmp_path / "tiny")
    assert not calls
    save_with_code(lion_hf.LionModel(text_config()), tmp_path / "tiny", push_to_hub=True)
    assert calls[1:] == [("create", "tiny", True), ("upload", "me/tiny", True)]
