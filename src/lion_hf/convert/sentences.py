"""Folders of sentence-transformers: the encoder in them, and the files beside it that do not depend on it."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..hub import hint_if_missing
from .source import ConversionError


_MODULES = "modules.json"
_OPTIONS = ("config_sentence_transformers.json", "sentence_bert_config.json")
# Files directly in a folder that `copy_sentence_files` writes.
SENTENCE_FILES = (_MODULES, *_OPTIONS)


def sentence_folder(source: str | Path) -> Path | None:
    """Return the folder of a model of sentence-transformers, None for any other model.

    Of a name on the Hub, the files that sentence-transformers adds are downloaded.

    Raises:
        ConversionError: if modules.json is malformed, or lists a path outside the folder. It is a ValueError.
    """
    folder = Path(source)
    if not folder.exists():
        if hint_if_missing(source) is not None:
            return None
        try:
            listed = hf_hub_download(str(source), _MODULES)
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):  # no such file, repository or network
            return None
        inside = [f"{module['path']}/*" for module in modules_of(Path(listed).parent) if module["path"]]
        folder = Path(snapshot_download(str(source), allow_patterns=[*SENTENCE_FILES, *inside]))
    if not (folder / _MODULES).is_file():
        return None
    modules_of(folder)
    return folder


def modules_of(folder: Path) -> list[dict[str, Any]]:
    """Return the modules that a folder of sentence-transformers lists, in their order; see `sentence_folder`."""
    file = folder / _MODULES
    try:
        modules = sorted(json.loads(file.read_text(encoding="utf-8")), key=lambda module: module["idx"])
        paths = [folder / module["path"] for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{str(file)!r} is not a list of modules of sentence-transformers; repair it") from error
    if any(not path.resolve().is_relative_to(folder.resolve()) for path in paths):
        raise ConversionError(f"{str(file)!r} lists a module outside its folder; repair it")
    return modules


def transformer_folder(source: str | Path) -> str:
    """Return the folder of the encoder inside a model of sentence-transformers, or else the source itself."""
    folder = sentence_folder(source)
    modules = modules_of(folder) if folder is not None else []
    return str(folder / modules[0]["path"]) if modules and modules[0]["path"] else str(source)


def copy_sentence_files(folder: Path, out: Path, context: int | None = None) -> None:
    """Copy what a folder of sentence-transformers holds beside its encoder, such as the configuration of its pooling.

    Args:
        folder: as `sentence_folder` returns it.
        out: a folder with another encoder, whose files are in the folder itself.
        context: number of tokens that the encoder reads, if it is not that of the source.
    """
    modules = modules_of(folder)
    inner = modules[0]["path"] if modules else ""
    for module in modules[1:]:
        if module["path"] and module["path"] != inner:
            (out / module["path"]).mkdir(parents=True, exist_ok=True)  # even if empty, as that of a normalisation
            if (folder / module["path"]).is_dir():
                shutil.copytree(folder / module["path"], out / module["path"], dirs_exist_ok=True)
    for name in _OPTIONS:
        found = next((place / name for place in (folder, folder / inner) if (place / name).is_file()), None)
        if found is not None:
            options = json.loads(found.read_text(encoding="utf-8"))
            if context is not None and "max_seq_length" in options:
                options["max_seq_length"] = context
            (out / name).write_text(json.dumps(options, indent=2), encoding="utf-8")
    for module in modules:
        if module["path"] == inner:
            module["path"] = ""
    (out / _MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")
