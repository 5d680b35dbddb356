"""Compile the CPU kernels for this machine and this jaxlib."""

import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jaxlib

from adamjax.kernels import _flags

SOURCE = Path(__file__).with_name("adam.cc")
TIME_LIMIT = 300.0  # seconds; g++ takes about 10, and more than 30 on a busy machine
_DEFAULTS = ("c++", "g++", "clang++")
_CURE = "choose another compiler by CXX, or fused=False"


def key() -> str:
    """Return a hash of all that compiled code depends on but the compiler, which may be gone when it is loaded."""
    parts = (SOURCE.read_text(), jaxlib.__version__, *_arguments(), platform.machine(), processor())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compiler() -> list[str]:
    """Return the command of the C++ compiler: the words of `$CXX`, or the first that is installed.

    Raises:
      RuntimeError: There is none.
    """
    given = os.environ.get("CXX", "")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise RuntimeError(f"CXX={given!r} is not a command ({error}): name a C++ compiler by CXX") from error
    for name, *options in [words] if words else [[name] for name in _DEFAULTS]:
        if (found := shutil.which(name)) is not None:
            return [found, *options]
    names = words[0] if words else f"{', '.join(_DEFAULTS[:-1])} or {_DEFAULTS[-1]}"
    raise RuntimeError(
        f"a fused step is compiled on first use, and there is no C++ compiler ({names}): "
        "install one (apt install g++, say), or name one by CXX"
    )


def compile_kernel(folder: Path) -> Path:
    """Compile the kernel in a folder, and return its path.

    Raises:
      RuntimeError: There is no C++ compiler, or it fails.
    """
    command = compiler()
    name = shlex.join(command)
    made = folder / "adam.so"
    try:
        status, said = _run(
            [*command, *_arguments(), f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)], folder
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{name} did not compile the kernel of a fused step in {TIME_LIMIT:.0f} seconds: {_CURE}"
        ) from error
    except OSError as error:
        raise RuntimeError(f"{name} cannot be run ({error.strerror}): {_CURE}") from error
    if status != 0:
        raise RuntimeError(f"{name} could not compile the kernel of a fused step: {_CURE}. It said:\n{said}")
    if not made.is_file():
        raise RuntimeError(f"{name} wrote no kernel for a fused step: {_CURE}")
    return made


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command, and return its status and the beginning of its output. If it is stopped, so are its children."""
    # To a file: a pipe would stay open as long as a server that the compiler starts.
    with tempfile.TemporaryFile(dir=folder) as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(TIME_LIMIT)
        except BaseException:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            raise
        output.seek(0)
        return status, output.read(4000).decode(errors="replace").strip()


def _arguments() -> tuple[str, ...]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return (*_flags.FLAGS, "-shared", *(("-march=native", *_flags.X86_FLAGS) if is_x86 else ("-mcpu=native",)))


@cache
def processor() -> str:
    """Return the features that "native" stands for on this machine."""
    try:
        found = re.findall(r"^(?:flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[0] if found else ""
    except OSError:
        return platform.processor()
