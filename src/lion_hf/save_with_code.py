"""Checkpoints that carry their code, for users who have Transformers but not this package."""

import glob
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files


# The heads a checkpoint of each kind can be loaded into, by Auto class.
_AUTO_MAPS = {
    "lion": {
        "AutoConfig": "configuration_lion.LionConfig",
        "AutoModel": "modeling_lion.LionModel",
        "AutoModelForMaskedLM": "modeling_lion.LionForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_lion.LionForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_lion.LionForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_lion.LionForQuestionAnswering",
        "AutoModelForMultipleChoice": "modeling_lion.LionForMultipleChoice",
    },
    "lion_vision": {
        "AutoConfig": "configuration_lion.LionVisionConfig",
        "AutoModel": "modeling_lion_vision.LionVisionModel",
        "AutoModelForImageClassification": "modeling_lion_vision.LionForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_lion_vision.LionForMaskedImageModeling",
        "AutoBackbone": "modeling_lion_vision.LionBackbone",
    },
}


def save_with_code(
    model: PreTrainedModel, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs
) -> Path:
    """Like `model.save_pretrained(folder)`, plus the modelling code, so that the folder loads without this package.

    `AutoModelForX.from_pretrained(folder, trust_remote_code=True)` then works wherever Transformers is installed, for
    every head that the kind of model has. Save the tokenizer or image processor into the same folder as usual.

    Args:
        model: any LION model of this package.
        folder: where to write; made if absent.
        push_to_hub: upload the files of the folder to `repo_id` afterwards (the repository is made if absent).
            [`push`] adds a card and shows beforehand what it would upload.
        repo_id: "user/name" on the Hub; the folder's name by default.
        kwargs: passed to `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: for a model that is not from this package.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _AUTO_MAPS:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) is not a LION model; allowed are {', '.join(_AUTO_MAPS)}. Use "
            "save_pretrained for it."
        )
    classes = {reference.split(".")[1] for reference in _AUTO_MAPS[kind].values()}
    if type(model).__name__ not in classes:
        raise ValueError(
            f"{type(model).__name__} is not a class of lion_hf, so its code would be missing; allowed are "
            f"{', '.join(sorted(classes))}. Register your own class with register_for_auto_class and use save_pretrained."
        )
    folder = Path(folder)
    model.save_pretrained(folder, **kwargs)
    source = Path(sys.modules[type(model).__module__].__file__)
    for file in (source, *map(Path, get_relative_import_files(source))):
        if file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = _AUTO_MAPS[kind]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if push_to_hub:
        upload(folder, repo_id or folder.name, token=kwargs.get("token"))
    return folder


def holds_lion(folder: Path) -> bool:
    """Whether the config.json of a folder is a LION model's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type")) in _AUTO_MAPS


class UploadFile(NamedTuple):
    """A file that an upload takes: its name in the repository, and its size in bytes."""

    path: str
    size: int


def files_to_upload(folder: Path) -> list[UploadFile]:
    """The files that lie in the folder itself, by name: a model, its code, tokenizer or processor, and card are flat.

    Folders (checkpoints of a training run, logs) and hidden files stay here.
    """
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [UploadFile(file.name, file.stat().st_size) for file in files]


def upload(folder: Path, repo_id: str, token: str | bool | None = None, private: bool | None = None) -> None:
    """Uploads [`files_to_upload`] to a model repository of the Hub, which is made if absent."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    names = [glob.escape(file.path) for file in files_to_upload(folder)]
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names)
