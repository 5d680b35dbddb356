"""Compile the CPU kernels on first use, for this machine and this jaxlib, and cache them."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

SOURCE = Path(__file__).with_name("adam.cc")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


class Kernel(NamedTuple):
    """A compiled kernel in the cache.

    Fields:
      path: The library.
      size: The bytes of the library.
      current: True if this machine and these versions use it.
    """

    path: Path
    size: int
    current: bool


def cache_dir() -> Path:
    """Return `$ADAMJAX_CACHE_DIR`, or `adamjax` in the user's cache folder."""
    if given := os.environ.get("ADAMJAX_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamjax"


def build() -> Path:
    """Compile the library for this machine, jaxlib and compiler, unless it is cached.

    Many processes may do so at once: each moves a complete file into place.

    Returns:
      The path of the library.

    Raises:
      RuntimeError: There is no C++ compiler, or it fails.
    """
    compiler = _compiler()
    path = _path(compiler)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_flags(), f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"{compiler} could not compile the kernel of a fused step: choose another compiler by CXX, or "
                f"fused=False. It said:\n{done.stderr}"
            )
        os.replace(made, path)
    return path


@cache
def target() -> str:
    """Compile, load and register the kernel, and return its FFI target; with "-group", that for several arrays."""
    path = build()
    library = ctypes.CDLL(str(path))
    for suffix, name in (("", "AdamjaxStep"), ("-group", "AdamjaxGroup")):
        jax.ffi.register_ffi_target(path.stem + suffix, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return path.stem


def status() -> list[Kernel]:
    """List the compiled kernels in the cache.

    Returns:
      A `Kernel` for each; an empty list if there is no cache.
    """
    try:
        current = _path(_compiler())
    except RuntimeError:
        current = None
    return [Kernel(path, path.stat().st_size, path == current) for path in sorted(cache_dir().glob("*.so"))]


def clear() -> list[Path]:
    """Remove all compiled kernels from the cache. Loaded ones go on working.

    Returns:
      The paths of the removed kernels.

    Raises:
      OSError: A kernel cannot be removed.
    """
    found = [kernel.path for kernel in status()]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if (found := shutil.which(name)) is not None:
            return found
    raise RuntimeError(
        f"a fused step is compiled on first use, and there is no C++ compiler ({chosen or 'c++, g++ or clang++'}): "
        "install one (apt install g++, say), or name one by CXX"
    )


def _flags() -> tuple[str, ...]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return (*_FLAGS, *(("-march=native", "-mprefer-vector-width=512") if is_x86 else ("-mcpu=native",)))


def _path(compiler: str) -> Path:
    """Return the path of the library, with a hash of everything that the compiled code depends on."""
    key = (SOURCE.read_text(), jaxlib.__version__, _version(compiler), *_flags(), platform.machine(), _processor())
    return cache_dir() / f"adam-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """Return the features that "native" stands for on this machine."""
    try:
        found = re.findall(r"^(?:flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[0] if found else ""
    except OSError:
        return platform.processor()
