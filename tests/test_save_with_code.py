import json
import os
import subprocess
import sys

import pytest
import torch
from models import spread_decays, text_config, text_inputs, vision_config
from transformers import BertConfig, BertModel

import lion_hf
from lion_hf import save_with_code


# Loads a folder in a process that has Transformers but not the package, and saves what the model returns.
FOREIGN_PROCESS = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lion_hf":
            raise ModuleNotFoundError("No module named 'lion_hf'")

sys.meta_path.insert(0, Absent())
import transformers

folder, inputs, results = sys.argv[1:4]
inputs, outputs = torch.load(inputs), {}
for auto_class in sys.argv[4:]:
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs[auto_class] = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            "config": type(model.config).__name__,
            "values": {k: v for k, v in model(**inputs).items()},
        }
assert not any(name.partition(".")[0] == "lion_hf" for name in sys.modules)
torch.save(outputs, results)
"""


def load_elsewhere(tmp_path, folder, inputs, *auto_classes):
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [folder, tmp_path / "inputs.pt", tmp_path / "outputs.pt", *auto_classes]
    process = subprocess.run(
        [sys.executable, "-I", "-c", FOREIGN_PROCESS, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(tmp_path / "outputs.pt")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expected_values(head, folder, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(head.from_pretrained(folder).eval()(**inputs).items())


@pytest.mark.parametrize(
    "mask_type, form, head, others",
    [
        ("selective", "chunk", "MaskedLM", ["AutoModel", "AutoModelForTokenClassification"]),
        ("lit", "auto", "SequenceClassification", ["AutoModel", "AutoModelForQuestionAnswering"]),
        ("decay", "rnn", "MultipleChoice", ["AutoModelForMaskedLM"]),
    ],
    ids=["selective-chunk", "lit-auto", "decay-rnn"],
)
def test_text_folder_loads_without_the_package_and_outputs_are_bit_equal(
    tmp_path, one_thread, mask_type, form, head, others
):
    model = spread_decays(getattr(lion_hf, f"LionFor{head}")(text_config(mask_type, format=form))).eval()
    folder, inputs = save_with_code(model, tmp_path / "model"), text_inputs()
    if head == "MultipleChoice":
        inputs, others = {k: v[:, None].repeat(1, 2, 1) for k, v in inputs.items()}, []
    outputs = load_elsewhere(tmp_path, folder, inputs, f"AutoModelFor{head}", *others)
    assert len(outputs) == 1 + len(others)
    for auto_class, output in outputs.items():
        kind = "LionModel" if auto_class == "AutoModel" else auto_class.replace("AutoModelFor", "LionFor")
        assert (output["class"], output["config"]) == (kind, "LionConfig")
        assert output["module"].startswith("transformers_modules.")
        values = expected_values(getattr(lion_hf, kind), folder, inputs)
        assert output["values"].keys() == values.keys()
        for name, value in output["values"].items():
            assert torch.equal(value, values[name]), (auto_class, name)
    with torch.no_grad():  # and not only equal to what this process loads, but to the model that was saved
        original = model(**inputs)
    for name, value in outputs[f"AutoModelFor{head}"]["values"].items():
        torch.testing.assert_close(value, original[name], rtol=1e-5, atol=1e-6)


def test_image_folder_loads_without_the_package_and_outputs_are_bit_equal(tmp_path, one_thread):
    model = spread_decays(lion_hf.LionForImageClassification(vision_config(order="s", format="chunk"))).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    folder = save_with_code(model, tmp_path / "model")
    outputs = load_elsewhere(tmp_path, folder, inputs, "AutoModelForImageClassification", "AutoModel")
    for auto_class, head in (
        ("AutoModelForImageClassification", lion_hf.LionForImageClassification),
        ("AutoModel", lion_hf.LionVisionModel),
    ):
        assert (outputs[auto_class]["class"], outputs[auto_class]["config"]) == (head.__name__, "LionVisionConfig")
        values = expected_values(head, folder, inputs)
        for name, value in outputs[auto_class]["values"].items():
            assert torch.equal(value, values[name]), (auto_class, name)
    with torch.no_grad():
        original = model(**inputs).logits
    torch.testing.assert_close(outputs["AutoModelForImageClassification"]["values"]["logits"], original)


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


def test_code_in_the_folder_is_the_code_of_the_package_and_flat(tmp_path):
    save_with_code(lion_hf.LionForImageClassification(vision_config()), tmp_path)
    copied = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.py")}
    package = os.path.dirname(lion_hf.__file__)
    for name, text in copied.items():
        with open(os.path.join(package, name), encoding="utf-8") as file:
            assert text == file.read()
        imported = {line.split()[1] for line in text.splitlines() if line.startswith("from .")}
        assert {f"{x[1:]}.py" for x in imported} <= copied.keys(), f"{name} needs a file that is not there"
    assert {"modeling_lion_vision.py", "configuration_lion.py", "lion_layer.py", "lion_ops.py"} <= copied.keys()


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
    """A user's subclass, whose code lies outside the package."""


def test_a_subclass_from_elsewhere_never_leaves_a_folder_that_cannot_load(tmp_path):
    try:
        save_with_code(OwnModel(text_config()), tmp_path)
    except ValueError:
        return
    for target in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"].values():
        assert (tmp_path / f"{target.split('.')[0]}.py").exists(), f"auto_map names {target}"


def test_push_to_hub_uploads_the_whole_folder(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id, exist_ok))
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path):
            files = {file.name for file in folder_path.iterdir()}
            calls.append(("upload", repo_id, {"config.json", "model.safetensors", "modeling_lion.py"} <= files))

    monkeypatch.setattr(sys.modules["lion_hf.save_with_code"], "HfApi", Hub)
    save_with_code(lion_hf.LionModel(text_config()), tmp_path / "tiny")
    assert not calls
    save_with_code(lion_hf.LionModel(text_config()), tmp_path / "tiny", push_to_hub=True)
    assert calls[1:] == [("create", "tiny", True), ("upload", "me/tiny", True)]
