"""Imports an example by its name, as a user's interpreter would run the file."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


__all__ = ["load_example"]

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    """The module in `examples/<name>.py`; `name` may have a folder, as in `"benchmarks/adapters"`."""
    path = FOLDER / f"{name}.py"
    if str(path.parent) not in sys.path:  # where a script's own folder is
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
