"""A trained model to the Hub in one call: weights, code, tokenizer or image processor, and card."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from .save_with_code import UploadFile, files_to_upload, holds_lion, save_with_code, upload


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
        card: a card, or the path of one, to become README.md; by default the README.md that is already in the folder. It is
            not changed: that of lion-convert tells how to load without this package only if `--with-code` was given.
        processor: the tokenizer or image processor of the model, saved beside it.
        dry_run: write the folder, upload nothing. Needs no network and no token.
        private: whether a new repository is private; by default the account's choice.
        token: of the Hub; by default the one of `hf auth login`.

    Returns:
        Path and size in bytes of every file that was uploaded, or would be.

    Raises:
        ValueError: for a model that is not from this package, a place that is no folder or holds another kind of model, a
            repo_id that the Hub does not take, a processor that is none, or a card that is missing, malformed or without
            metadata. Nothing is written then.

    ```python
    >>> for file in lion_hf.push(model, "to-upload", "user/lion", card="card.md", dry_run=True):
    ...     print(f"{file.size:>12,} {file.path}")
    ```"""
    folder = Path(folder)
    _require_place(folder)
    _require_repo_id(repo_id)
    if not isinstance(processor, PushToHubMixin | None):
        raise ValueError(
            f"processor is {processor!r}; it must be a tokenizer or image processor, such as AutoTokenizer.from_pretrained(...) "
            "returns."
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
            f"{str(folder)!r} holds the config.json of something other than a LION model, which would be overwritten. Give a "
            "new folder, or that of a LION model."
        )


def _require_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id or "")  # it lets None pass
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}; it must be 'user/name'. {error}") from error


def _load_card(card: ModelCard | str | Path) -> ModelCard:
    if not isinstance(card, ModelCard):
        path = Path(card)
        if not os.path.isfile(path):  # Path.is_file() raises where the text of a card is given, too long for a name
            raise ValueError(
                f"There is no card at {str(path)!r}. Give card=, a ModelCard or the path of a Markdown file that starts "
                "with metadata between two lines '---'."
            )
        try:
            card = ModelCard.load(path)
        except Exception as error:  # of YAML, of the encoding, or of the type of a field
            raise ValueError(
                f"The card {str(path)!r} is malformed; mend the metadata between its first two lines '---', which must be "
                f"YAML such as 'license: apache-2.0', in UTF-8: {' '.join(str(error).split())}"
            ) from error
    if not card.data.to_dict():
        raise ValueError(
            "The card has no metadata, without which the Hub knows neither licence nor task. Start it with lines such as "
            "'license: apache-2.0' and 'library_name: transformers' between two lines '---'."
        )
    return card
