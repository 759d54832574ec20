"""Models to folders and to the Hub: with the code that loads them without this package, and with a card."""

import glob
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, PushToHubMixin

from ._flatten import flat_files
from .nn.variants import variant_class


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


# --------------------------------------------------------------------------------------------------------------- code


def save_with_code(
    model: PreTrainedModel, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs
) -> Path:
    """Like `model.save_pretrained(folder)`, plus the modelling code, so that the folder loads without this package.

    `AutoModelForX.from_pretrained(folder, trust_remote_code=True)` then works wherever Transformers is installed, for
    every head that the kind of model has. Save the tokenizer or image processor into the same folder as usual.

    Modules of this package lie flat beside the weights, the only form that Transformers carries: `lion_hf/ops/api.py`
    becomes `lion_ops_api.py`. The files of classes that a model uses from outside the package come along.

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
        ValueError: for a model that is not from this package, or that uses a class whose file cannot come along (it
            stands in the script that runs or in a notebook, or needs other files of its own). Nothing is written then.
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
    """The model_type of a model whose code can be saved; raises ValueError for any other."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _AUTO_MAPS:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) is not a LION model; allowed are {', '.join(_AUTO_MAPS)}. "
            "Use save_pretrained for it."
        )
    classes = lion_classes(kind)
    home = type(model).__module__.partition(".")[0]
    # What came with a checkpoint, and its code, has the same classes in modules that Transformers made.
    if type(model).__name__ not in classes or home not in (__package__, "transformers_modules"):
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} is not a class of lion_hf, so its code would be missing; "
            f"allowed are {', '.join(sorted(classes))}. Register your own class with register_for_auto_class and use "
            "save_pretrained."
        )
    return kind


def lion_classes(kind: str) -> set[str]:
    """Names of the classes of this package for a model_type."""
    return {reference.split(".")[1] for reference in _AUTO_MAPS[kind].values()}


def _foreign_classes(model: PreTrainedModel) -> list[type]:
    """The classes from outside the package that a model uses; their files come along with its code."""
    if type(model).__module__.partition(".")[0] != __package__:
        return []  # it came with a checkpoint, and its code with all that belongs to it
    variant = variant_class(model.config.mask_type)
    return [] if variant.__module__.partition(".")[0] == __package__ else [variant]


def holds_lion(folder: Path) -> bool:
    """Whether the config.json of a folder is a LION model's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type")) in _AUTO_MAPS


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a save_pretrained folder, as Transformers finds them: model.safetensors, else
    those that its index names, whether they are there or not. Empty where there is neither.

    Raises:
        OSError, ValueError: for an index that cannot be read.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of weights") from error


# ------------------------------------------------------------------------------------------------------------ the Hub


class UploadFile(NamedTuple):
    """A file that an upload takes: its name in the repository, and its size in bytes."""

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
    """Saves a model with its code and card into a folder, and uploads the files of that folder.

    Only files that lie in the folder itself are uploaded, not its sub-folders. Use a new folder, or look at a dry run
    first: other files that lie there are uploaded too.

    Args:
        model: any LION model of this package.
        folder: where to write; made if absent.
        repo_id: "user/name" on the Hub; the repository is made if absent.
        card: a `huggingface_hub.ModelCard`, or the path of a Markdown file, to become README.md; by default the
            README.md that is in the folder. It starts with metadata between two lines `---`.
            It is not changed: that of lion-convert tells how to load without this package only where `--with-code` was
            given.
        processor: the tokenizer or image processor of the model, saved beside it.
        dry_run: write the folder, upload nothing. Needs no network and no token.
        private: whether a new repository is private; by default the account's choice.
        token: of the Hub; by default the one of `hf auth login`.

    Returns:
        Path and size in bytes of every file that was uploaded, or would be.

    Raises:
        ValueError: for a model that is not from this package, a place that is no folder or holds another kind of model,
            a repo_id that the Hub does not take, a processor that is none, or a card that is neither a card
            nor a path, missing, malformed or without metadata. Nothing is written then.

    ```python
    >>> for file in lion_hf.push(model, "to-upload", "user/lion", card="card.md", dry_run=True):
    ...     print(f"{file.size:>12,} {file.path}")
    ```"""
    folder = Path(folder)
    _require_place(folder)
    _require_repo_id(repo_id)
    if not isinstance(processor, PushToHubMixin | None):
        raise ValueError(
            f"processor is {processor!r}; it must be a tokenizer or image processor, such as "
            "AutoTokenizer.from_pretrained(...) returns."
        )
    card = _load_card(folder / "README.md" if card is None else card)
    save_with_code(model, folder)
    if processor is not None:
        processor.save_pretrained(folder)
    card.save(folder / "README.md")
    if not dry_run:
        upload(folder, repo_id, token=token, private=private)
    return files_to_upload(folder)


def _require_place(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"The folder cannot be {str(folder)!r}: {str(existing)!r} is a file. Give another place.")
    if (folder / "config.json").exists() and not holds_lion(folder):
        raise ValueError(
            f"{str(folder)!r} holds the config.json of something other than a LION model, which would be overwritten. "
            "Give a new folder, or that of a LION model."
        )


def _require_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id or "")  # it lets None pass
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
            f"card is the text {card[:30]!r}...; it must be the path of a Markdown file, or a ModelCard: for text "
            "give card=huggingface_hub.ModelCard(text)."
        )
    if not isinstance(card, ModelCard):
        path = Path(card)
        if not os.path.isfile(path):  # Path.is_file() raises where the text of a card is given, too long for a name
            raise ValueError(
                f"There is no card at {str(path)!r}. Give card=, a ModelCard or the path of a Markdown file that "
                "starts with metadata between two lines '---'."
            )
        try:
            card = ModelCard.load(path)
        except Exception as error:  # of YAML, of the encoding, or of the type of a field
            raise ValueError(
                f"The card {str(path)!r} is malformed; mend the metadata between its first two lines '---', which "
                f"must be YAML such as 'license: apache-2.0', in UTF-8: {' '.join(str(error).split())}"
            ) from error
    if not card.data.to_dict():
        raise ValueError(
            "The card has no metadata, without which the Hub knows neither licence nor task. Start it with lines such "
            "as 'license: apache-2.0' and 'library_name: transformers' between two lines '---'."
        )
    return card


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
