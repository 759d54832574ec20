"""Modules of the package as flat files, the only form of code that Transformers loads beside weights.

The path of a module gives the name of its file: `lion_hf.ops.api` becomes lion_ops_api.py, and the package
`lion_hf.ops` becomes lion_ops.py. Modules of `lion_hf.models` keep their names, which stored configurations contain.
Imports of other modules are rewritten to `from .name import x`, the only form that Transformers follows.
"""

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


_PACKAGE = __package__
_ROOT = Path(__file__).parent
_MODELS = f"{_PACKAGE}.models."

# The start of a statement, up to the names that it imports.
_FROM = re.compile(r"from[ \t]+[\w.]+[ \t]+import\b")
_REGISTERS = "# From outside the package; importing it registers it."


def flat_files(module: str, foreign: Sequence[type] = ()) -> dict[str, str]:
    """Return the flat files of a module and of all modules of the package that it imports, directly or indirectly.

    Args:
        module: full name, such as "lion_hf.models.modeling_lion". The files of a module that came with a checkpoint,
            "transformers_modules...", are already flat and are returned unchanged.
        foreign: classes from outside the package that register themselves when their modules are imported. Their files
            are included under their own names, and the modules of `lion_hf.models` import them.

    Returns:
        The text of each file, by file name.

    Raises:
        ValueError: if the file of a class cannot be included, or if an import has no flat form.
    """
    if module.partition(".")[0] != _PACKAGE:
        source = Path(sys.modules[module].__file__)
        return {x.name: x.read_text(encoding="utf-8") for x in (source, *map(Path, get_relative_import_files(source)))}
    guests = {cls: _file_of(cls) for cls in foreign}
    texts, waiting = {}, [module]
    for cls, file in guests.items():
        texts[file.stem], imported = _flattened(file.read_text(encoding="utf-8"), cls.__module__, cls)
        waiting += imported
    own = _closure(waiting)
    _require_own_names(guests, own)
    lines = "".join(f"\n\n{_REGISTERS}\nfrom .{file.stem} import {cls.__name__}\n" for cls, file in guests.items())
    for name, text in own.items():
        texts[flat_name(name)] = text + lines * name.startswith(_MODELS)
    return {f"{name}.py": text for name, text in texts.items()}


def flat_name(module: str) -> str:
    """Return the name of the flat file of a module of the package, without ".py"."""
    if module.startswith(_MODELS):
        return module.removeprefix(_MODELS)
    return "_".join(["lion", *module.split(".")[1:]])


def _closure(waiting: list[str]) -> dict[str, str]:
    """The flat text of modules of the package and of all modules that they import, by full name."""
    texts: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module], imported = _flattened(_file(module).read_text(encoding="utf-8"), module)
            waiting += imported
    return texts


def _file(module: str) -> Path:
    place = _ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


# -------------------------------------------------------------------------------------------------------------- imports


def _flattened(text: str, module: str, owner: type | None = None) -> tuple[str, list[str]]:
    """The text with flat imports, and the modules of the package that it imports.

    Args:
        text: the source of the module.
        module: its full name.
        owner: the class from outside the package whose module this is, if any.
    """
    lines, imported = text.split("\n"), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _require_elsewhere(alias.name, node, module, owner)
        elif isinstance(node, ast.ImportFrom):
            target = _target(node, module, owner)
            if target.partition(".")[0] != _PACKAGE:
                _require_elsewhere(target, node, module, owner)
                continue
            _require_names(target, node, module, owner)
            line, column = lines[node.lineno - 1], node.col_offset
            start = _FROM.match(line, column)
            if line[:column].strip() or start is None:
                _refuse(node, module, owner, "write it on its own line, as `from x import y`")
            lines[node.lineno - 1] = f"{line[:column]}from .{flat_name(target)} import{line[start.end() :]}"
            imported.append(target)
    return "\n".join(lines), imported


def _target(node: ast.ImportFrom, module: str, owner: type | None) -> str:
    """The full name of the module that a statement imports from."""
    if not node.level:
        return node.module
    if owner is not None:
        _refuse(node, module, owner, "packages cannot be included; put everything that the class needs into one file")
    package = module.split(".") if _file(module).name == "__init__.py" else module.split(".")[:-1]
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _require_names(target: str, node: ast.ImportFrom, module: str, owner: type | None) -> None:
    """Raise ValueError if a statement imports modules instead of names from them."""
    if target == _PACKAGE:
        _refuse(node, module, owner, f"import from the module that defines it, as in `from {_PACKAGE}.nn import x`")
    file = _file(target)
    if not file.is_file():
        _refuse(node, module, owner, f"{target} is not a file of this package; import from its new path")
    if file.name == "__init__.py":
        inside = {x.stem for x in file.parent.glob("*.py")} | {x.parent.name for x in file.parent.glob("*/__init__.py")}
        if modules := [alias.name for alias in node.names if alias.name in inside]:
            _refuse(node, module, owner, f"import names from {target}.{modules[0]}, not the module")


def _require_elsewhere(name: str, node: ast.stmt, module: str, owner: type | None) -> None:
    """Raise ValueError for `import x` of this package, and for the user's other files, which are not included."""
    top = name.partition(".")[0]
    if top == _PACKAGE:
        _refuse(node, module, owner, f"import names, as in `from {_PACKAGE}.nn import x`")
    if owner is None:
        return
    folder = _file_of(owner).parent
    beside = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
    if top == owner.__module__.partition(".")[0] or (beside and "site-packages" not in folder.parts):
        _refuse(node, module, owner, f"{top} is not included; put everything that the class needs into one file")


def _refuse(node: ast.stmt, module: str, owner: type | None, remedy: str) -> None:
    reason = f"Transformers cannot follow `{ast.unparse(node)}` in line {node.lineno} of {module}: {remedy}"
    raise ValueError(f"{reason}." if owner is None else _refusal(owner, reason))


# ------------------------------------------------------------------------------------ classes from outside the package


def _file_of(cls: type) -> Path:
    """The file of a class from outside the package. Raises ValueError if it cannot be included."""
    module = sys.modules.get(cls.__module__)
    if cls.__module__ in ("__main__", "__mp_main__"):
        raise ValueError(
            _refusal(cls, "it is defined in a notebook or in the running script; move it to a file that is imported")
        )
    file = Path(getattr(module, "__file__", None) or "")
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(_refusal(cls, "its module has no source file; define it in a .py file"))
    if getattr(module, cls.__name__, None) is not cls:
        raise ValueError(_refusal(cls, f"{file.name} has no such name at top level; define it outside functions"))
    if not file.stem.isidentifier() or file.stem == "__init__":
        raise ValueError(_refusal(cls, f"{file.name} cannot be imported as a flat file; rename the file"))
    return file


def _require_own_names(guests: dict[type, Path], own: dict[str, str]) -> None:
    """Raise ValueError if two of the files have the same name."""
    taken = {flat_name(module): f"that of {module}" for module in own}
    if len(taken) < len(own):
        raise ValueError(f"Two of the modules {', '.join(sorted(own))} have the same flat name. Rename one.")
    for cls, file in guests.items():
        if taken.setdefault(file.stem, str(file)) != str(file):
            reason = f"{file.name} has the same name as another included file, {taken[file.stem]}; rename it"
            raise ValueError(_refusal(cls, reason))


def _refusal(cls: type, reason: str) -> str:
    return f"The code of {cls.__module__}.{cls.__qualname__} cannot be saved with the model: {reason}."
