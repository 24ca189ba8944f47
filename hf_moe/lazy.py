"""Module attributes that are imported on first use (PEP 562), so that importing a package stays cheap."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


__all__ = ["lazy_exports"]


def lazy_exports(package: str, exports: Mapping[str, str]) -> tuple[Callable, Callable, list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` for a package whose names live in sub-modules.

    Args:
        package (`str`): The package's `__name__`.
        exports (`Mapping[str, str]`): Public name to the module that defines it, relative (`".callbacks"`) or
            absolute. A name equal to the module's own, as in `{"metrics": ".metrics"}`, may also mean the module.

    Returns:
        `tuple`: The two module functions and the sorted list of public names.

    Example:
        ```python
        __getattr__, __dir__, __all__ = lazy_exports(__name__, {"MoeTrainerMixin": ".mixin"})
        ```
    """
    exports = dict(exports)
    own_modules = {name for name, module in exports.items() if module == f".{name}"}

    class Package(ModuleType):
        # Python binds a sub-module to its package when it is imported by its full name; that must not hide what the
        # package exports under the same name.
        def __setattr__(self, name: str, value: Any) -> None:
            if name in own_modules and isinstance(value, ModuleType):
                value = getattr(value, name, value)
            super().__setattr__(name, value)

    if own_modules and type(sys.modules[package]) is ModuleType:
        sys.modules[package].__class__ = Package

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(exports[name], package)
        is_module = exports[name].rpartition(".")[2] == name
        value = getattr(module, name, module) if is_module else getattr(module, name)
        setattr(sys.modules[package], name, value)  # the next access is a plain attribute read
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports})

    return __getattr__, __dir__, sorted(exports)
