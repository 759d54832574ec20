"""Folders of version 0.1 load through Transformers, Trainer and PEFT, and give the outputs of 0.1."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import text_config, vision_config

import lion_hf


DATA = Path(__file__).parent / "data" / "v0_1"
FOLDERS = sorted(file.parent.name for file in DATA.glob("*/config.json") if "trainer" not in file.parent.name)
TEXTS = [name for name in FOLDERS if name.startswith("text")]


def expectation(name):
    """Return the inputs of a folder's model, and the output recorded with 0.1."""
    tensors = load_file(DATA / name / "expected.safetensors")
    output = tensors.pop("output")
    return {name.removeprefix("input."): tensor for name, tensor in tensors.items()}, output


def auto_class(name):
    (architecture,) = json.loads((DATA / name / "config.json").read_text(encoding="utf-8"))["architectures"]
    return getattr(transformers, architecture.replace("Lion", "AutoModel"))


def weights(name):
    return {k: x for file in (DATA / name).glob("model*.safetensors") for k, x in load_file(file).items()}


def assert_as_before(model, name, **tolerance):
    inputs, expected = expectation(name)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    torch.testing.assert_close(logits.float(), expected, **tolerance or {"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_auto_classes_load_every_folder(name, options):
    model, info = auto_class(name).from_pretrained(DATA / name, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("lion_hf.models.")
    assert_as_before(model, name)


@pytest.mark.parametrize("name", FOLDERS)
def test_half_precision_loads_every_folder_and_keeps_decays_wide(name):
    model = auto_class(name).from_pretrained(DATA / name, dtype=torch.bfloat16)
    stored = weights(name)
    for key, tensor in model.state_dict().items():
        wide = "decay_" in key
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16)
        if key in stored:
            assert torch.equal(tensor, stored[key].to(tensor.dtype))
    assert_as_before(model, name, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FOLDERS)
def test_8_bit_models_load_from_every_folder(name):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    plan = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = auto_class(name).from_pretrained(DATA / name, quantization_config=plan)
    kinds = {key: type(x).__name__ for key, x in model.named_parameters() if key.endswith("q_proj.weight")}
    assert set(kinds.values()) == {"Int8Tensor"}
    assert not any(type(x).__name__ == "Int8Tensor" for key, x in model.named_parameters() if "decay" in key)
    assert_as_before(model, name, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FOLDERS)
def test_dynamic_quantization_of_projections_stays_near(name):
    model = auto_class(name).from_pretrained(DATA / name)
    chosen = {key for key, module in model.named_modules() if key.endswith(("_proj", "proj")) and "decay" not in key}
    kinds = dict.fromkeys(chosen, torch.ao.quantization.default_dynamic_qconfig)
    quantized = torch.ao.quantization.quantize_dynamic(model, kinds, torch.qint8)
    assert any("dynamic" in type(module).__module__ for module in quantized.modules())
    assert_as_before(quantized, name, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FOLDERS)
def test_state_dicts_load_strictly_and_names_stay_on_saving(name, tmp_path):
    stored = weights(name)
    kind = getattr(lion_hf, auto_class(name).__name__.replace("AutoModel", "Lion"))
    model = kind(kind.config_class.from_pretrained(DATA / name))
    tied = (
        {"head.decoder.weight": stored["lion.embeddings.word_embeddings.weight"]}
        if "head.dense.weight" in stored
        else {}
    )
    model.load_state_dict(stored | tied, strict=True)
    assert_as_before(model, name)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stored.keys()
    assert_as_before(kind.from_pretrained(tmp_path), name)


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("variant", ["lit", "decay", "selective"])
def test_a_seed_gives_the_weights_that_it_gave(kind, variant):
    torch.manual_seed(0)
    if kind == "text":
        model = lion_hf.LionForMaskedLM(text_config(variant))
    else:
        model = lion_hf.LionForImageClassification(vision_config(variant, order="s"))
    prefix = f"{kind}_{variant}."
    sums = load_file(DATA / "seeded_sums.safetensors")
    sums = {name.removeprefix(prefix): x for name, x in sums.items() if name.startswith(prefix)}
    state = model.state_dict()
    assert state.keys() == sums.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.double().sum().view(1), sums[name], rtol=1e-5, atol=1e-5, msg=name)


# ----------------------------------------------------------------------------------------------------------- with code


@pytest.fixture
def with_code(tmp_path, modules_cache):
    """Return a copy of the folder that carries the code of 0.1."""
    return shutil.copytree(DATA / "text_decay_with_code", tmp_path / "folder")


def test_a_folder_with_code_loads_beside_the_package(with_code):
    model = transformers.AutoModelForMaskedLM.from_pretrained(with_code, trust_remote_code=True)
    assert_as_before(model, "text_decay_with_code")


def test_the_code_of_0_1_runs_beside_the_package(with_code):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    ours = lion_hf.LionForMaskedLM.from_pretrained(with_code)
    theirs = get_class_from_dynamic_module("modeling_lion.LionForMaskedLM", with_code).from_pretrained(with_code)
    assert type(ours) is not type(theirs)
    for form in ("attention", "rnn", "chunk"):
        for model in (ours, theirs):
            model.config.format = form
            assert_as_before(model, "text_decay_with_code")


@pytest.mark.slow
def test_the_code_of_a_folder_is_renewed_by_saving_it_again(with_code, tmp_path):
    model = lion_hf.LionForMaskedLM.from_pretrained(with_code)
    folder = lion_hf.save_with_code(model, tmp_path / "renewed")
    assert "lion_ops.py" not in {file.name for file in folder.glob("*.py")}
    code = (
        "import sys, torch; sys.modules['lion_hf'] = None\n"
        "from transformers import AutoModelForMaskedLM\n"
        "from safetensors.torch import load_file\n"
        "tensors = load_file(sys.argv[2]); expected = tensors.pop('output')\n"
        "inputs = {name.removeprefix('input.'): x for name, x in tensors.items()}\n"
        "model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(DATA / "text_decay_with_code" / "expected.safetensors")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "other-modules")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- Trainer and PEFT


def test_trainer_resumes_and_reaches_the_same_weights(tmp_path):
    pytest.importorskip("accelerate")
    checkpoint = shutil.copytree(DATA / "trainer_checkpoint-2", tmp_path / "checkpoint-2")
    expected = load_file(checkpoint / "expected.safetensors")
    ids = torch.arange(1, 23).view(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    rows = [{"input_ids": ids[i % 2], "attention_mask": mask[i % 2], "labels": ids[i % 2]} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-3,
        seed=3,
    )
    model = lion_hf.LionForMaskedLM(text_config("selective"))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    state, before = model.state_dict(), weights("trainer_checkpoint-2")
    assert state.keys() - {"head.decoder.weight"} == {name.removeprefix("step4.") for name in expected}
    for name, tensor in expected.items():
        name = name.removeprefix("step4.")
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(state[name], x) for name, x in before.items()), "the weights did not change"


@pytest.mark.parametrize("way", ["onto a base", "with its base"])
def test_an_adapter_loads(monkeypatch, way):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(DATA)  # the adapter names its base by a relative path
    if way == "onto a base":
        model = peft.PeftModel.from_pretrained(lion_hf.LionForMaskedLM.from_pretrained("text_selective"), "adapter")
    else:  # it names a class of lion_hf.modeling_lion, the module's name in 0.1
        model = peft.AutoPeftModel.from_pretrained("adapter", import_allowlist=["lion_hf.modeling_lion"])
    assert_as_before(model, "adapter")
    with model.disable_adapter(), torch.no_grad():
        inputs, expected = expectation("adapter")
        assert (model(**inputs).logits - expected).abs().max() > 1e-4  # far above 1e-6, to which outputs agree
