"""Runs a script as `python SCRIPT` does, in this process and in those that multiprocessing spawns from it.

A spawned process imports the main module of its parent under the name "__mp_main__". It would find the script by its
path, and not know LION; so the main module bears the name of this one, which imports the package and runs the script.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType


# Tells spawned processes which script runs, and what it needs beforehand.
_SCRIPT = "LION_HF_SCRIPT"
_IMPORTS = "LION_HF_IMPORTS"


def run_script(script: str, arguments: Sequence[str], imports: Sequence[str] = ()) -> None:
    """Runs a script as the main module of this process.

    Args:
        script: path of the file.
        arguments: what `sys.argv` holds after it.
        imports: modules that were imported for it; spawned processes import them, too. Where there are any, the current
            folder stays on the path, after that of the script.
    """
    file = os.path.abspath(script)
    os.environ |= {_SCRIPT: file, _IMPORTS: ",".join(imports)}
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # else Python puts no folder there
        sys.path[:1] = [os.path.dirname(os.path.realpath(file)), *([os.getcwd()] if imports else [])]
    main = ModuleType("__main__")
    main.__file__ = file
    main.__spec__ = ModuleSpec(__name__, None, origin=file)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # spawned processes name its classes by the latter
    sys.excepthook = _Traceback(file, sys.excepthook)
    exec(_compiled(file), vars(main))


def _compiled(file: str) -> CodeType:
    loader = SourceFileLoader("__main__", file)
    return loader.source_to_code(loader.get_data(file), file)


class _Traceback:
    """Shows errors of a script from its own first line on, as if it ran alone."""

    def __init__(self, file: str, hook):
        self.file, self.hook = file, hook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        own = traceback
        while own is not None and own.tb_frame.f_code.co_filename != self.file:
            own = own.tb_next
        if own is not None or issubclass(kind, SyntaxError):
            traceback = own
        self.hook(kind, error.with_traceback(traceback), traceback)


if __name__ == "__mp_main__":
    for _module in filter(None, os.environ[_IMPORTS].split(",")):
        importlib.import_module(_module)
    __file__ = os.environ[_SCRIPT]
    exec(_compiled(__file__), globals())
