"""`python -m lion_hf SCRIPT ARGS` runs a script, such as an example of Transformers, with LION registered.

python -m lion_hf run_glue.py --model_name_or_path lion-s-base ...
accelerate launch -m lion_hf run_glue.py ...
torchrun --nproc_per_node 2 -m lion_hf --import my_variants run_glue.py ...
"""

import argparse
import importlib
import os
import sys

from ._script import run_script


IMPORT_HELP = "module to import before the script, such as one with a custom variant; can be repeated"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 2 after an error in the arguments, else 0 unless the script exits by itself."""
    options = _parser().parse_args(arguments)
    if not os.path.isfile(options.script):
        return _error(f"there is no script {options.script!r}")
    for module in options.imports:
        if not all(part.isidentifier() for part in module.split(".")) or module.endswith(".py"):
            name, where = os.path.splitext(module)[0].replace(os.sep, "."), ""
            if not all(part.isidentifier() for part in name.split(".")):  # not below the current folder
                folder, name = os.path.split(os.path.splitext(module)[0])
                where = f"; its folder {folder!r} must be in PYTHONPATH" if folder else ""
            return _error(f"--import {module}: give the name of the module, {name}, not its file{where}")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            return _error(f"--import {module}: there is no module {error.name!r} in the current folder or installed")
    run_script(options.script, options.args, options.imports)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lion_hf",
        description="Run a script as `python SCRIPT ARGS` does, with LION registered with Transformers' Auto classes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--import", dest="imports", metavar="MODULE", action="append", default=[], help=IMPORT_HELP)
    add("script", metavar="SCRIPT", help="script to run")
    add("args", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _error(message: str) -> int:
    sys.stderr.write(f"lion_hf: error: {message}.\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
