"""Save models to folders and to the Hub, with the code that loads them without this package and with a card."""

import copy
import difflib
import glob
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, PushToHubMixin

from ._flatten import flat_files
from .nn.variants import variant_class


# Heads that a checkpoint of each model_type can be loaded into, by Auto class.
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


# ---------------------------------------------------------------------------------------------------- names and folders


def hint_if_missing(name: str | Path, repo_type: str = "model") -> str | None:
    """Return a hint if a name can only be a folder, and there is none; return None for folders and names on the Hub.

    A name such as "outputs/firs" counts as a folder if outputs/ holds a folder with a similar name, and the Hub, asked
    once, does not have the name. The hint names the similar folder, or is empty.
    """
    path, name = Path(name), str(name)
    if path.exists():
        return None
    near = []
    if path.name and path.parent != Path() and path.parent.is_dir():
        siblings = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
        near = difflib.get_close_matches(path.name, siblings, 1, 0.7)
    is_path = name.count("/") > 1 or name.startswith((".", "/"))
    if not is_path and not (near and not _is_on_hub(name, repo_type)):
        return None
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _is_on_hub(name: str, repo_type: str) -> bool:
    """Return whether a name is in the cache of the Hub, or the Hub answers that it exists. There are no retries."""
    try:
        if Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type)).is_dir():
            return True
        return HfApi().repo_info(name, repo_type=repo_type, timeout=5) is not None
    except Exception:  # no network, no such name; the types depend on the network library
        return False


# --------------------------------------------------------------------------------------------------------------- code


def save_with_code(
    model: PreTrainedModel, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs
) -> Path:
    """Save a model together with its code, so that the folder loads without this package.

    This is `model.save_pretrained(folder)` plus the modelling code. Afterwards
    `AutoModelForX.from_pretrained(folder, trust_remote_code=True)` works wherever Transformers is installed, for every
    head of the model type. Save the tokenizer or image processor into the same folder as usual.

    The modules of this package become flat files beside the weights, the only form that Transformers loads:
    `lion_hf/ops/api.py` becomes `lion_ops_api.py`. Files of classes from outside the package that the model uses, such
    as a custom variant, are included.

    Args:
        model: any LION model of this package.
        folder: where to write. Created if it does not exist.
        push_to_hub: upload the files of the folder to `repo_id` afterwards. The repository is created if it does not
            exist. `push` also adds a card and can list the files before the upload.
        repo_id: "user/name" on the Hub. By default the name of the folder.
        kwargs: passed to `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is not from this package, or uses a class whose file cannot be included: one that is
            defined in the running script or in a notebook, or needs other files. Nothing is written then.
    """
    kind = _kind(model)
    code = flat_files(type(model).__module__, _foreign_classes(model))
    folder = Path(folder)
    model.save_pretrained(folder, **kwargs)
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8")
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = _AUTO_MAPS[kind]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if push_to_hub:
        upload(folder, repo_id or folder.name, token=kwargs.get("token"))
    return folder


def _kind(model: PreTrainedModel) -> str:
    """The model_type of a model whose code can be saved. Raises ValueError for other models."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _AUTO_MAPS:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) is not a LION model; allowed are {', '.join(_AUTO_MAPS)}. "
            "Save it with save_pretrained."
        )
    classes = lion_classes(kind)
    home = type(model).__module__.partition(".")[0]
    # Models loaded from a checkpoint with code have the same classes, in modules that Transformers created.
    if type(model).__name__ not in classes or home not in (__package__, "transformers_modules"):
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} is not a class of lion_hf, so its code would be missing; "
            f"allowed are {', '.join(sorted(classes))}. For a custom class, use register_for_auto_class and "
            "save_pretrained."
        )
    return kind


def lion_classes(kind: str) -> set[str]:
    """Return the names of the classes of this package for a model_type."""
    return {reference.split(".")[1] for reference in _AUTO_MAPS[kind].values()}


def _foreign_classes(model: PreTrainedModel) -> list[type]:
    """The classes from outside the package that a model uses. Their files are saved with its code."""
    if type(model).__module__.partition(".")[0] != __package__:
        return []  # loaded with its code, which is complete
    variant = variant_class(model.config.mask_type)
    return [] if variant.__module__.partition(".")[0] == __package__ else [variant]


def holds_lion(folder: Path) -> bool:
    """Return whether the config.json of a folder belongs to a LION model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type")) in _AUTO_MAPS


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a save_pretrained folder as Transformers finds them.

    These are model.safetensors, else the files named in its index, whether they exist or not. The list is empty if
    there is neither.

    Raises:
        OSError, ValueError: if the index cannot be read.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is not an index of weights") from error


# ------------------------------------------------------------------------------------------------------------ the Hub


class UploadFile(NamedTuple):
    """A file to upload: its name in the repository, and its size in bytes."""

    path: str
    size: int


def push(
    model: PreTrainedModel,
    folder: str | Path,
    repo_id: str,
    *,
    card: ModelCard | str | Path | None = None,
    processor: Any = None,
    dry_run: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
) -> list[UploadFile]:
    """Save a model with its code and card into a folder, and upload the files of that folder to the Hub.

    Only files directly in the folder, pictures that the card shows, and modules of sentence-transformers are uploaded.
    Other files that are already there are uploaded too: use a new folder, or check the result of a dry run first.

    Args:
        model: any LION model of this package.
        folder: where to write. Created if it does not exist.
        repo_id: "user/name" on the Hub. The repository is created if it does not exist.
        card: a `huggingface_hub.ModelCard` or the path of a Markdown file, saved as README.md. By default the README.md
            in the folder. It must start with metadata between two lines `---`. In its Python examples, the name of the
            folder of the card is replaced by `repo_id`; pictures that it shows by relative path are copied. A card that
            lion-convert wrote explains how to load without this package only if `--with-code` was given.
        processor: the tokenizer or image processor of the model, saved into the folder.
        dry_run: write the folder, but upload nothing. Needs no network and no token.
        private: whether a new repository is private. By default the setting of the account.
        token: token of the Hub. By default that of `hf auth login`.

    Returns:
        Path and size in bytes of every file that was (or, in a dry run, would be) uploaded.

    Raises:
        ValueError: if the model is not from this package; if the folder is a file or holds another kind of model; if
            repo_id, processor or card is invalid; or if the card is missing or has no metadata. Nothing is written
            then.

    Example:
        >>> for file in lion_hf.push(model, "to-upload", "user/lion", card="card.md", dry_run=True):
        ...     print(f"{file.size:>12,} {file.path}")
    """
    folder = Path(folder)
    _require_place(folder)
    _require_repo_id(repo_id)
    if not isinstance(processor, PushToHubMixin | None):
        raise ValueError(
            f"processor is {processor!r}; it must be a tokenizer or image processor, such as "
            "AutoTokenizer.from_pretrained(...) returns."
        )
    home = Path(card).parent if isinstance(card, str | Path) else folder
    card = _with_repo_id(_load_card(folder / "README.md" if card is None else card), home, repo_id)
    save_with_code(model, folder)
    if processor is not None:
        processor.save_pretrained(folder)
    card.save(folder / "README.md")
    for picture in _pictures(folder / "README.md", home):
        if not (folder / picture).exists() or not (folder / picture).samefile(home / picture):
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / picture, folder / picture)
    if not dry_run:
        upload(folder, repo_id, token=token, private=private)
    return files_to_upload(folder)


def _require_place(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"The folder cannot be {str(folder)!r}: {str(existing)!r} is a file. Give another path.")
    if (folder / "config.json").exists() and not holds_lion(folder):
        raise ValueError(
            f"{str(folder)!r} has the config.json of another kind of model, which would be overwritten. Give a new "
            "folder, or the folder of a LION model."
        )


def _require_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id or "")  # it accepts None
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}; it must be 'user/name'. {error}") from error


def _load_card(card: ModelCard | str | Path) -> ModelCard:
    if not isinstance(card, ModelCard | str | Path):
        raise ValueError(
            f"card is {card!r}; it must be a ModelCard, or the path of a Markdown file that starts with metadata "
            "between two lines '---'."
        )
    if isinstance(card, str) and "\n" in card:
        raise ValueError(
            f"card is the text {card[:30]!r}...; it must be the path of a Markdown file or a ModelCard. For a text, "
            "use card=huggingface_hub.ModelCard(text)."
        )
    if not isinstance(card, ModelCard):
        path = Path(card)
        if not os.path.isfile(path):  # Path.is_file() raises if a text is given that is too long for a file name
            raise ValueError(
                f"There is no card at {str(path)!r}. Set card to a ModelCard or the path of a Markdown file that "
                "starts with metadata between two lines '---'."
            )
        try:
            card = ModelCard.load(path)
        except Exception as error:  # invalid YAML, encoding or type of a field
            raise ValueError(
                f"The card {str(path)!r} is malformed; fix the metadata between its first two lines '---', which "
                f"must be YAML such as 'license: apache-2.0', in UTF-8: {' '.join(str(error).split())}"
            ) from error
    if not card.data.to_dict():
        raise ValueError(
            "The card has no metadata, so the Hub would show neither licence nor task. Start it with lines such as "
            "'license: apache-2.0' and 'library_name: transformers' between two lines '---'."
        )
    return card


def _with_repo_id(card: ModelCard, home: Path, repo_id: str) -> ModelCard:
    """Return the card with the repository in place of the local folder `home` in its Python examples."""
    whole = home.resolve()

    def renamed(string: re.Match) -> str:
        task, quote, name = string.groups()
        parts = Path(name).parts
        is_home = bool(parts) and (whole.parts[-len(parts) :] == parts or Path(name).resolve() == whole)
        return f"{quote}{repo_id}{quote}" if is_home and not task else string[0]

    card = copy.copy(card)
    # The first argument of `pipeline` is a task, which may be the name of a folder too.
    string = r"(pipeline\()?([\"'])([^\"'(),\n]+)\2"
    card.text = re.sub(r"(?ms)^```python$.*?^```", lambda code: re.sub(string, renamed, code[0]), card.text)
    return card


def _pictures(card: Path, home: Path) -> list[str]:
    """Return the pictures below the folder `home` that a card shows by relative path, if they exist."""
    if not card.is_file():
        return []
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img [^>]*?src=[\"']([^\"']+)", card.read_text(encoding="utf-8"))
    paths = {Path(unquote(one or other)) for one, other in shown}
    paths = {path for path in paths if not path.is_absolute() and ".." not in path.parts}
    return sorted(path.as_posix() for path in paths if (home / path).is_file())


def files_to_upload(folder: Path) -> list[UploadFile]:
    """Return the files directly in the folder: the model, its code, tokenizer or processor, and card.

    They are sorted by name. Pictures that the card shows, and the modules of sentence-transformers, are included; other
    files in subfolders (checkpoints of a training run, logs) and hidden files are left out.
    """
    names = {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    names |= set(_pictures(folder / "README.md", folder))
    if "modules.json" in names:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        inside = [folder / module["path"] for module in modules if module["path"]]
        files = [file for path in inside if path.is_dir() for file in path.rglob("*") if file.is_file()]
        names |= {file.relative_to(folder).as_posix() for file in files}
    return [UploadFile(name, (folder / name).stat().st_size) for name in sorted(names)]


def upload(folder: Path, repo_id: str, token: str | bool | None = None, private: bool | None = None) -> None:
    """Upload `files_to_upload(folder)` to a model repository of the Hub, which is created if it does not exist."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    names = [glob.escape(file.path) for file in files_to_upload(folder)]
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names)
