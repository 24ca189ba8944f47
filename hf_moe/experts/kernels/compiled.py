"""The optional compiled operators: built when asked for, kept in the user's cache, never required.

Importing builds nothing. The first call under `experts_implementation="hf_moe_compiled"` does, and
`hf-moe bench experts --tune` does where a compiler is installed; from then on `"hf_moe"` uses it where the
measurement said so.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hf_moe.weights.cache import building, default_cache_dir


__all__ = ["build_compiled", "compiled_dtypes", "compiler", "load_compiled"]

_FILES = [
    Path(__file__).with_name(f"compiled{name}") for name in (".cpp", "_epilogue.cpp", "_products.cpp", "_tiles.h")
]
_LIBRARY = "hf_moe_compiled.so"

#: What the operator multiplies.
compiled_dtypes = (torch.float32, torch.bfloat16)


def compiler() -> str | None:
    """Path of the C++ compiler that would be used, or `None` if there is none (or no ninja to drive it)."""
    from torch.utils import cpp_extension  # slow to import, and rarely needed

    found = next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if (path := _which(name))), None)
    return found if cpp_extension.is_ninja_available() else None


def build_compiled() -> Path:
    """Compiles the operator for this CPU and this torch, unless that was done before.

    Returns:
        `Path`: The shared library, in a folder of its own in the user's cache.

    Raises:
        ImportError: There is no C++ compiler, or it failed.

    Example:
        ```python
        from hf_moe.experts.kernels import build_compiled

        build_compiled()
        ```
    """
    folder = _folder()
    if (folder / _LIBRARY).is_file():
        return folder / _LIBRARY
    from torch.utils import cpp_extension

    if compiler() is None:
        raise ImportError(
            '`experts_implementation="hf_moe_compiled"` needs a C++ compiler (`c++`, `g++`, `clang++` or `$CXX`) and '
            'ninja (`pip install ninja`), and found none. Install them, or use `experts_implementation="hf_moe"`.'
        )
    with building(folder, replace=True) as partial:
        try:
            cpp_extension.load(
                name=Path(_LIBRARY).stem,
                sources=[str(file) for file in _FILES if file.suffix == ".cpp"],
                extra_cflags=["-O3", "-std=c++20", "-march=native" if _is_x86() else "-mcpu=native", *_threads()],
                build_directory=str(partial),
                is_python_module=False,
            )
        except (RuntimeError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ImportError(
                f"The compiled experts operator could not be built ({lines[0]}). Use "
                '`experts_implementation="hf_moe"`, which needs no compiler.'
            ) from error
    return folder / _LIBRARY


def load_compiled(build: bool = False) -> bool:
    """Makes the operator callable in this process.

    Args:
        build (`bool`, *optional*, defaults to `False`): Compile it first if that was never done.

    Returns:
        `bool`: Whether `torch.ops.hf_moe_compiled.grouped_rows` exists now.

    Raises:
        ImportError: `build=True` and it cannot be built.
    """
    if hasattr(torch.ops.hf_moe_compiled, "grouped_rows"):
        return True
    library = build_compiled() if build else _folder() / _LIBRARY
    if hasattr(torch.ops.hf_moe_compiled, "grouped_rows"):  # building loads it, too
        return True
    if not library.is_file():
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _threads() -> list[str]:
    """The flag without which torch's parallel loops run on one thread.

    Nothing is linked for it: the threads are those of the OpenMP torch came with, which speaks GCC's dialect only.
    """
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=False).stdout
    is_gcc = "Free Software Foundation" in version
    return ["-fopenmp"] if is_gcc and sys.platform == "linux" and torch.backends.openmp.is_available() else []


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


@functools.cache
def _folder() -> Path:
    # Code for this very CPU must not be run on another one that shares the cache.
    code = [file.read_text(encoding="utf-8") for file in (*_FILES, Path(__file__))]
    parts = (*code, torch.__version__, platform.machine(), _cpu_flags())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return default_cache_dir() / "kernels" / key


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
