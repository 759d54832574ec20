"""Import paths of version 0.1, which work in 0.2 with one warning each.

`lion_hf.lion_ops` and the others are no longer files. A finder creates them when they are imported: empty modules that
look up each name in the modules where it is now.
"""

import importlib
import runpy
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any


_PACKAGE = __package__

# Modules below lion_hf that hold the contents of each module of 0.1. Names are looked up in this order.
MOVED = {
    "configuration_lion": ("models.configuration_lion",),
    "convert_companions": ("convert.companions",),
    "convert_config": ("convert.config",),
    "convert_lion_checkpoint": ("convert.command", "convert.checkpoint", "convert.names"),
    "convert_names": ("convert.names",),
    "convert_plan": ("convert.plan",),
    "convert_reverse": ("convert.reverse",),
    "convert_source": ("convert.source",),
    "lion_checks": ("ops.checks",),
    "lion_forms": (
        "ops.autograd",
        "ops.tokens",
        "ops.decays",
        "ops.attention",
        "ops.chunk",
        "ops.recurrent",
        "ops.global_state",
    ),
    "lion_kernels": ("ops.triton.kernels", "ops.triton.parts"),
    "lion_layer": ("models.lion_layers", "nn.mixer", "nn.softmax", "nn.features"),
    "lion_ops": ("ops.api", "ops.scans", "ops.backend"),
    "lion_packing": ("ops.packing",),
    "lion_scan_order": ("ops.scans",),
    "lion_triton": ("ops.triton.launch",),
    "modeling_lion": ("models.modeling_lion", "models.lion_layers", "nn.mlp"),
    "modeling_lion_vision": ("models.modeling_lion_vision", "models.lion_layers", "nn.block"),
    "push": ("hub",),
    "save_with_code": ("hub",),
    "warm_start": ("convert.bert", "convert.vit", "convert.warm_start"),
}


def targets(name: str) -> list[str]:
    """Return the full names of the modules that now hold the contents of a module of 0.1."""
    return [f"{_PACKAGE}.{target}" for target in MOVED[name.removeprefix(f"{_PACKAGE}.")]]


def install() -> None:
    """Make the old paths importable, once in a process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    sys.modules[_PACKAGE].__class__ = _Package


def run(name: str) -> None:
    """Run the new module when `python -m` is given the old name."""
    _warn(name)
    runpy.run_module(targets(name)[0], run_name="__main__", alter_sys=True)


class _Package(ModuleType):
    """Class of the package. Importing an old module does not replace a function of its name (push, save_with_code)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, _Moved) and name in vars(self)):
            super().__setattr__(name, value)


class _Moved(ModuleType):
    """A module of 0.1. Every name is looked up in the module that now contains it."""

    def __getattr__(self, name: str) -> Any:
        modules = [importlib.import_module(target) for target in targets(self.__name__)]
        if name == "__all__":
            own = getattr(modules[0], "__all__", None)
            return (
                list(own)
                if own
                else [x for module in modules for x in getattr(module, "__all__", _public_names(module))]
            )
        for module in modules:
            if not name.startswith("__") and hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}; its contents are now in {_places(self.__name__)}."
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, _Loader(), origin=__file__) if package == _PACKAGE and name in MOVED else None


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for target in targets(module.__name__):
            importlib.import_module(target)
        _warn(module.__name__)

    def get_code(self, fullname: str) -> CodeType:
        """Return the code that `python -m` runs."""
        return compile(f"from {__name__} import run\nrun({fullname!r})\n", __file__, "exec")


def _public_names(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if not (name.startswith("_") or isinstance(value, ModuleType))]


def _places(name: str) -> str:
    return ", ".join(targets(name))


def _warn(name: str) -> None:
    """Warn once, at the line outside this package and the import system that imports the module."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (_PACKAGE, "importlib"):
        frame = frame.f_back
    warnings.warn_explicit(
        f"{name} is now {_places(name)}; the old path works in lion_hf 0.2 and will be removed in 0.3.",
        FutureWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
