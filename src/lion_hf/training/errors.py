"""What scripts say to their user: lines of progress, and one line for a mistake; checks of files, folders and disks."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError


class UserError(Exception):
    """A mistake in what the user gave; shown as one line, without a traceback."""


def run(main: Callable[[], Any]) -> None:
    """Runs a script; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from the last checkpoint, if one was saved\n")
        sys.exit(130)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        # Ends the threads of the group, which would abort the process if they met the interpreter's end.
        dist.destroy_process_group()


def say(text: str) -> None:
    """Writes a line for the user to stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def user_errors(prefix: str, *kinds: type[Exception]):
    """Turns errors of these kinds, which other libraries raise for wrong input, into a one-line `UserError`."""
    try:
        yield
    except kinds as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise UserError(f"{prefix}: {' '.join(lines[:3]) or type(cause).__name__}") from error


def make_output_dir(folder: str | Path) -> Path:
    """Makes the folder and tries that it can be written to."""
    folder = Path(folder)
    with user_errors(f"cannot write to --output_dir {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    return folder


def require_disk(folder: str | Path, num_bytes: int) -> None:
    """Raises a `UserError` if the disk has no room for what a run is known to write."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{str(folder)!r} has {free / 1e9:.1f} GB free, but this run writes {num_bytes / 1e9:.1f} GB (checkpoints "
            "with optimizer states, and the final model): free space, choose another --output_dir, or a smaller "
            "--save_total_limit"
        )


def require_path(path: str | Path, what: str) -> Path:
    """The path, if it exists."""
    if not Path(path).exists():
        raise UserError(f"{what} {str(path)!r} does not exist")
    return Path(path)
