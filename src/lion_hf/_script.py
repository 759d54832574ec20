"""Runs a script as `python SCRIPT` does, in this process and in the processes that multiprocessing spawns from it.

A spawned process imports the main module of its parent under the name "__mp_main__". By the path of the script it would
run without LION. The main module therefore has the name of this module, which imports the package and runs the script.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType


# Environment variables for spawned processes: the script, and the modules to import before it.
_SCRIPT = "LION_HF_SCRIPT"
_IMPORTS = "LION_HF_IMPORTS"


def run_script(script: str, arguments: Sequence[str], imports: Sequence[str] = ()) -> None:
    """Run a script as the main module of this process.

    Args:
        script: path of the file.
        arguments: the rest of `sys.argv`.
        imports: modules that were imported for the script. Spawned processes import them too. If there are any, the
            current folder stays on the path, after the folder of the script.
    """
    file = os.path.abspath(script)
    os.environ |= {_SCRIPT: file, _IMPORTS: ",".join(imports)}
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # in safe-path mode Python adds no folder
        sys.path[:1] = [os.path.dirname(os.path.realpath(file)), *([os.getcwd()] if imports else [])]
    main = ModuleType("__main__")
    main.__file__ = file
    main.__spec__ = ModuleSpec(__name__, None, origin=file)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # spawned processes look up its classes in the latter
    sys.excepthook = _Traceback(file, sys.excepthook)
    exec(_compiled(file), vars(main))


def _compiled(file: str) -> CodeType:
    loader = SourceFileLoader("__main__", file)
    return loader.source_to_code(loader.get_data(file), file)


class _Traceback:
    """Exception hook that shows only the part of a traceback from the script on, as `python SCRIPT` would."""

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
