"""Files that hold what was written, or are said to be damaged: durable writing, and reading with limits."""

import errno
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Far above what any file of ours has; a larger one would only fill the memory.
MAX_BYTES = 1 << 30


class DamagedFileError(ValueError):
    """A file is damaged, or is not one that adamjax wrote.

    Attributes:
      path: The file or folder, a pathlib.Path.
      step: The step of the checkpoint that it belongs to; None for other files.
    """

    def __init__(self, path: str | os.PathLike[str], message: str, step: int | None = None) -> None:
        super().__init__(path, message, step)
        self.path: Path = Path(path)
        self.step = step
        self._message = message

    def __str__(self) -> str:
        return self._message


def replace(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole, and make its folder: a reader finds the old file or the new one, after any crash."""
    make_folder(path.parent)
    with naming(path), _new_file(path) as (descriptor, new):
        with open(descriptor, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            sync(file.fileno())
        os.replace(new, path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they do not exist; no crash undoes it."""
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of the machine name the file, as those of a write to an open file do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[int, str]]:
    """Make a file beside another, and remove it if it is not moved there."""
    descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with suppress(OSError):  # on some file systems, modes cannot be changed
            os.chmod(new, 0o666 & ~_umask())
        yield descriptor, new
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def append(path: Path, content: bytes, after: int | None = None) -> int:
    """Write at the end of a file, or after so many bytes of it; return its new size once that is on disk."""
    is_new = not path.exists()
    with naming(path), open(path, "ab") as file:
        start = file.seek(0, os.SEEK_END) if after is None else after
        file.truncate(start)
        try:
            file.write(content)
            file.flush()
            sync(file.fileno())
        except OSError:
            with suppress(OSError):  # leave no part of it, which the next one would follow
                file.truncate(start)
            raise
    if is_new:
        sync_folder(path.parent)
    return start + len(content)


def sync(descriptor: int) -> None:
    """Write an open file to disk, if its file system can do that when it is told."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def sync_folder(path: Path) -> None:
    """Write the names in a folder to disk: without this, a crash of the machine may undo a rename."""
    with suppress(OSError):  # some file systems cannot
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file.

    Raises:
      FileNotFoundError: There is none.
      DamagedFileError: It is no regular file, or larger than `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, "No such file", str(path)) from error
    with open(descriptor, "rb") as file:
        if not path.is_file():
            raise DamagedFileError(path, f"{path} is not a file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedFileError(path, f"{path} is larger than {limit} bytes, so adamjax did not write it")
    return content


def json_object(content: bytes, path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in the content of a file.

    Raises:
      DamagedFileError: There is none; the message ends with the remedy.
    """
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        # Not the error itself, which would keep the frames of the callers until the garbage collector comes.
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedFileError(path, f"{path} is damaged ({reason}): {remedy}") from error
    if not isinstance(found, dict):
        raise DamagedFileError(path, f"{path} is damaged (it has {type(found).__name__}, not an object): {remedy}")
    return found
