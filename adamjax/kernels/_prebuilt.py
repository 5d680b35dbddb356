"""Kernels that come with the package: in wheels for Linux, one for each level of processors."""

import platform
from pathlib import Path

from adamjax.kernels import _cache, _compile, _flags

FOLDER = Path(__file__).with_name("prebuilt")


def files() -> dict[Path, str]:
    """Return the kernels for this machine with their levels, the highest first."""
    levels = _flags.LEVELS.get(platform.machine(), {})
    return {path: level for level in levels for path in sorted(FOLDER.glob(f"adam-{level}-*.so"))}


def find() -> Path | None:
    """Return the kernel of the highest level of this processor, or None."""
    return next((path for path in files() if fault(path) is None), None)


def fault(path: Path) -> str | None:
    """Return the reason why a kernel for this machine must not be loaded, or None."""
    level = files()[path]
    if missing := _flags.LEVELS[platform.machine()][level] - set(_compile.processor().split()):
        return f"this processor has no {', '.join(sorted(missing))}"
    return _cache.damage(path)
