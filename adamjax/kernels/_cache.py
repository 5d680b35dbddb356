"""Kernels kept on disk. The name of a file ends with the SHA-256 digest of its content."""

import hashlib
import os
import tempfile
from pathlib import Path

from adamjax._core import files


class UnusableCacheError(RuntimeError):
    """No kernel can be kept."""


def folder() -> Path:
    """Return `$ADAMJAX_CACHE_DIR`, or `adamjax` in the user's cache folder.

    Raises:
      UnusableCacheError: There is neither of them.
    """
    try:
        if given := os.environ.get("ADAMJAX_CACHE_DIR"):
            return Path(given).absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "adamjax"
    except (OSError, RuntimeError) as error:  # the working folder is gone, or the user has no home
        raise UnusableCacheError(f"there is no cache folder ({error}): name one by ADAMJAX_CACHE_DIR") from error


def kept() -> list[Path]:
    """List all files of kernels in the cache, whatever their state."""
    try:
        return sorted(folder().glob("adam-*.so"))
    except (OSError, UnusableCacheError):
        return []


def find(key: str) -> Path | None:
    """Return a kept kernel that may be loaded, or None."""
    return next((path for path in kept() if path.name.startswith(f"adam-{key}-") and fault(path) is None), None)


def fault(path: Path) -> str | None:
    """Return the reason why a kept kernel must not be loaded, or None."""
    return _exposed(path.parent) or _exposed(path) or damage(path)


def damage(path: Path) -> str | None:
    """Return a sentence if the content of a file does not have the digest that its name ends with, or None."""
    try:
        intact = path.is_file() and _digest(path) == path.stem.rpartition("-")[2]
    except OSError as error:
        return _unreadable(path, error)
    return None if intact else f"{path} is damaged"


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder in the cache, where a kernel can be made that is to be kept.

    Raises:
      UnusableCacheError: The cache is not writable, or others could write to it.
    """
    path = folder()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        if (why := _exposed(path)) is not None:
            raise UnusableCacheError(why)
        return tempfile.TemporaryDirectory(dir=path, ignore_cleanup_errors=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def keep(made: Path, key: str) -> Path:
    """Move a kernel from a scratch folder to the cache.

    Returns:
      Its new path.

    Raises:
      UnusableCacheError: It cannot be written.
    """
    path = folder()
    try:
        made.chmod(0o644)  # the umask may let others write
        # Without this, a crash of the machine may leave the new name on a file without its content.
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        kept_as = path / f"adam-{key}-{_digest(made)}.so"
        os.replace(made, kept_as)
        files.sync_folder(path)
        return kept_as
    except OSError as error:
        raise _unwritable(path, error) from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _exposed(path: Path) -> str | None:
    """Return the reason why somebody else could have written a file or folder, or None."""
    if os.name != "posix":
        return None
    try:
        found = path.stat()
    except OSError as error:
        return _unreadable(path, error)
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user: name another folder by ADAMJAX_CACHE_DIR"
    if found.st_mode & 0o022:
        return f"others may write to {path}: forbid it (chmod go-w), or name another folder by ADAMJAX_CACHE_DIR"
    return None


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror})"


def _unwritable(path: Path, error: OSError) -> UnusableCacheError:
    return UnusableCacheError(
        f"no kernel can be kept in {path} ({error.strerror}): name another folder by ADAMJAX_CACHE_DIR"
    )
