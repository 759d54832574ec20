"""Messages of the scripts: progress lines, one-line errors, and checks of files, folders and disk space."""

import atexit
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError


class UserError(Exception):
    """Wrong input of the user. Scripts show it as one line, without a traceback."""


def run(main: Callable[[], Any]) -> None:
    """Run a script. A `UserError` is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; run the same command again to resume from the last checkpoint, if one was saved\n")
        sys.exit(130)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        # Threads of the group that still run when the interpreter exits would abort the process.
        dist.destroy_process_group()


def say(text: str) -> None:
    """Write a line for the user to stdout and flush it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def user_errors(prefix: str, *kinds: type[Exception]):
    """Turn errors of these types, which other libraries raise for wrong input, into a one-line `UserError`."""
    try:
        yield
    except kinds as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise UserError(f"{prefix}: {' '.join(lines[:3]) or type(cause).__name__}") from error


def make_output_dir(folder: str | Path) -> Path:
    """Create the folder and check that it is writable. A new folder that is still empty at the end is removed."""
    folder = Path(folder)
    with user_errors(f"cannot write to --output_dir {folder}", OSError):
        if not folder.exists():
            atexit.register(_remove_if_empty, folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    return folder


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # raised if the folder holds anything
        folder.rmdir()


def require_disk(folder: str | Path, num_bytes: int) -> None:
    """Raise a `UserError` if the disk has less free space than a run needs."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{str(folder)!r} has {free / 1e9:.1f} GB free, but this run writes {num_bytes / 1e9:.1f} GB (checkpoints "
            "with optimizer states, and the final model). Free some space, use another --output_dir, or lower "
            "--save_total_limit"
        )


def require_path(path: str | Path, what: str) -> Path:
    """Return the path; raise a `UserError` if it does not exist."""
    if not Path(path).exists():
        raise UserError(f"{what} {str(path)!r} does not exist")
    return Path(path)
