"""The CPU kernel that this process uses: prebuilt, compiled for this machine earlier, or compiled now."""

import ctypes
import hashlib
import shlex
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax

from adamjax.kernels import _cache, _compile, _prebuilt

# The functions of a library, by the end of their FFI targets' names.
_HANDLERS = {"": "AdamjaxStep", "-group": "AdamjaxGroup", "-sum": "AdamjaxSum"}
_lock = threading.Lock()


class Kernel(NamedTuple):
    """A compiled kernel on disk.

    Fields:
      path: The library.
      size: The bytes of the library.
      current: True if this machine and these versions use it.
      fault: The reason why it is never loaded, or None.
    """

    path: Path
    size: int
    current: bool
    fault: str | None


def build() -> Path:
    """Have a kernel ready for fused steps: the prebuilt one, or one that is compiled for this machine and this jaxlib.

    A compiled one is kept in the cache. Many processes may compile at once: each moves a complete file into place. The
    file is flushed to disk, and its name has the digest of its content, so that a damaged one is not loaded, but
    compiled again.

    Returns:
      The path of the library.

    Raises:
      RuntimeError: There is no C++ compiler, it fails, or the cache is not writable or not safe from other users.
    """
    return _existing() or _compile_and_keep()


def target() -> str:
    """Load and register the kernel, and return its FFI target.

    With "-group", it is the target for several arrays, and with "-sum" the one for what factors of whole arrays are
    made of.

    Raises:
      RuntimeError: There is no kernel, and none can be compiled.
    """
    with _lock:  # a second library cannot be registered under the same name
        return _target()


@cache
def _target() -> str:
    # The name does not tell libraries apart, so that an exported step runs wherever one of the same source is loaded.
    name = f"adam-{hashlib.sha256(_compile.SOURCE.read_bytes()).hexdigest()[:16]}"
    if (path := _prebuilt.find()) is not None:
        with suppress(RuntimeError):  # a jaxlib may refuse it, and then takes one that is compiled for it
            _register(name, _load(path))
            return name
    try:
        _register(name, _load(_cache.find(_compile.key()) or _compile_and_keep()))
    except _cache.UnusableCacheError as why:
        with tempfile.TemporaryDirectory(prefix="adamjax-", ignore_cleanup_errors=True) as folder:
            library = _load(_compile.compile_kernel(Path(folder)))
        warnings.warn(f"The kernel of fused steps was compiled for this process alone, since {why}", stacklevel=2)
        _register(name, library)
    return name


def _existing() -> Path | None:
    """Return the kernel that needs no compiler, or None."""
    return _prebuilt.find() or _cache.find(_compile.key())


def _compile_and_keep() -> Path:
    with _cache.scratch() as folder:
        made = _compile.compile_kernel(Path(folder))
        _load(made)  # or a file that is no kernel would be kept
        return _cache.keep(made, _compile.key())


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for function in _HANDLERS.values():
            getattr(library, function)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the kernel of a fused step could not be loaded: {error}") from error
    return library


def _register(name: str, library: ctypes.CDLL) -> None:
    jax.default_backend()  # before a backend is there, a handler that it refuses would end it
    try:
        for suffix, function in _HANDLERS.items():
            jax.ffi.register_ffi_target(name + suffix, jax.ffi.pycapsule(getattr(library, function)), platform="cpu")
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(f"jaxlib refuses the kernel of a fused step: {error}") from error


def status() -> list[Kernel]:
    """List the compiled kernels, prebuilt and kept in the cache, usable or not.

    Returns:
      A `Kernel` for each.
    """
    faults = {path: _prebuilt.fault(path) for path in _prebuilt.files()}
    faults |= {path: _cache.fault(path) for path in _cache.kept()}
    used = _existing()
    return [Kernel(path, _size(path), path == used, fault) for path, fault in faults.items()]


def choice() -> str:
    """Return a sentence on the kernel that a fused step uses, and why."""
    if (path := _existing()) is not None:
        level = _prebuilt.files().get(path)
        why = "it was compiled for this machine" if level is None else f"of the prebuilt ones, it is for {level}"
        return f"fused steps use {path.name}: {why}"
    if (missing := shortage()) is not None:
        return f"there is no kernel for fused steps: {missing}"
    command = shlex.join(_compile.compiler())
    return f"the first fused step compiles a kernel by {command}: none is prebuilt or kept for this machine"


def shortage() -> str | None:
    """Return the reason why there is no kernel, and none can be compiled, or None."""
    try:
        _existing() or _compile.compiler()
    except RuntimeError as error:
        return str(error)
    return None


def clear() -> list[Path]:
    """Remove all compiled kernels from the cache. Loaded ones go on working.

    Returns:
      The paths of the removed kernels.

    Raises:
      OSError: A kernel cannot be removed.
    """
    found = _cache.kept()
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
