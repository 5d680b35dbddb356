"""The machine and the versions that the figures depend on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from benchmarks._measure import cores

LIBRARIES = ("adamjax", "jax", "jaxlib", "optax", "torch", "torchao", "bitsandbytes", "numpy")


def machine() -> dict[str, str]:
    """Return facts about the machine, and the versions of the libraries that are compared, by name."""
    return {
        "CPU": _line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(cores()),
        "memory": f"{memory() / 2**30:.1f} GiB",
        "system": platform.platform(terse=True),
        "transparent huge pages": _huge_pages(),
        "C compiler": _first_line("cc", "--version"),
        "Python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def memory() -> int:
    """Return the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _line_of(path: str, name: str) -> str:
    """Return the value of a name in a file of lines `name : value`; empty if there is none."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else "unknown"


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
