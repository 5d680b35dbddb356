"""The folders of steps: written beside their place, sealed by digests, moved there as a whole, and removed likewise.

Until a step is complete and on disk, its folder has a name that no reader takes for a step.
"""

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from adamjax._core import files, processes
from adamjax._core.locks import FolderLock

DESCRIPTION = "description/metadata"
ARRAYS = "arrays"
_UNFINISHED = ".adamjax-tmp"
# Also those of orbax, which earlier versions left behind, and which it makes beside ours.
_ANY_UNFINISHED = re.compile(r"\d+(\.adamjax-tmp|\.orbax-checkpoint-tmp).*")
_SHA256_BYTES = 32

FileDigests = dict[str, list[int | str]]  # by path below the step: size and SHA-256


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Return the steps that are saved in a directory.

    Args:
      directory: The directory of a run's checkpoints; it need not exist.

    Returns:
      Their numbers, in ascending order.

    Raises:
      OSError: The directory cannot be read.
    """
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = [entry.name for entry in entries if re.fullmatch("0|[1-9][0-9]*", entry.name) and entry.is_dir()]
    return sorted(map(int, names))


def folder_of(directory: str | os.PathLike[str], step: int) -> Path:
    return Path(directory).absolute() / str(step)


def unfinished(final: Path) -> Path:
    """Return the path at which a step is written."""
    return final.with_name(final.name + _UNFINISHED)


def remove_unfinished(directory: Path) -> None:
    """Remove what crashes have left of steps, so far as it can be removed."""
    for path in list(directory.iterdir()):
        if _ANY_UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def commit(folder: Path, final: Path) -> None:
    """Make a complete and sealed folder a step; once this returns, no crash undoes it."""
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        files.sync_folder(path)
    os.rename(folder, final)
    for parent in (final.parent, final.parent.parent):  # the directory may be new
        files.sync_folder(parent)


def remove_before(directory: Path, keep: int) -> None:
    """Remove all but the last steps, so far as they can be removed."""
    with suppress(OSError):  # the next save tries again
        for step in steps(directory)[:-keep]:
            folder = folder_of(directory, step)
            os.rename(folder, unfinished(folder))
            shutil.rmtree(unfinished(folder))


def set_aside(directory: str | os.PathLike[str], step: int) -> Path:
    """Rename a damaged step, so that it does not count any more; return its new path."""
    folder = folder_of(directory, step)
    suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    aside = next(path for x in suffixes if not (path := folder.with_name(f"{step}.damaged{x}")).exists())
    with FolderLock(folder.parent):
        os.rename(folder, aside)
        files.sync_folder(folder.parent)
    return aside


def seal(folder: Path) -> FileDigests:
    """Write the files of a folder to disk, and return their digests; all processes must call it, and share the work.

    The description, which the digests are written to, is not among them.
    """
    with processes.together():
        names = sorted(_names(folder)) if processes.is_first() else []
    names = processes.broadcast("\n".join(names)).split("\n")
    mine = _mine(names)
    row = np.zeros((len(names), 2 + _SHA256_BYTES // 4), np.uint32)
    with processes.together(), ThreadPoolExecutor() as pool:
        paths = [folder / names[i] for i in mine]
        for i, (size, digest) in zip(mine, pool.map(_sealed, paths), strict=True):
            row[i] = [size >> 32, size & 0xFFFFFFFF, *np.frombuffer(digest, np.uint32)]
    rows = processes.gather(row).astype(np.uint32).sum(axis=0, dtype=np.uint32)
    return {
        name: [int(row[0]) << 32 | int(row[1]), row[2:].tobytes().hex()] for name, row in zip(names, rows, strict=True)
    }


def unreadable_file(folder: Path) -> Path | None:
    """Return a file that is neither a file nor a folder, such as a pipe, at which a reader would wait for ever."""
    return next((path for path in folder.rglob("*") if not path.is_file() and not path.is_dir()), None)


def first_damaged(folder: Path, digests: FileDigests, *, content: bool) -> tuple[str, str] | None:
    """Return the first file that is not as it was sealed, and what is wrong with it; all processes share the work.

    Args:
      folder: The folder of the step.
      digests: Those of its files.
      content: False to look at types and sizes only.

    Raises:
      OSError: A file cannot be read.
    """
    names, none = list(digests), len(digests) * len(_PROBLEMS)
    found = none
    with processes.together():
        mine = {names[i]: digests[names[i]] for i in _mine(names)}
        for i, problem in zip(_mine(names), _problems(folder, mine, content=content), strict=True):
            if problem is not None:
                found = min(found, i * len(_PROBLEMS) + problem)
    found = int(processes.gather(np.array([found], np.uint32)).min())
    return None if found == none else (names[found // len(_PROBLEMS)], _PROBLEMS[found % len(_PROBLEMS)])


def is_whole(folder: Path, digests: FileDigests) -> bool:
    """Return whether all files are as they were sealed; other processes need not call it."""
    return all(problem is None for problem in _problems(folder, digests, content=True))


_PROBLEMS = ("it is missing", "it is not a file", "its size is wrong", "its content is not what was saved")


def _problems(folder: Path, digests: FileDigests, *, content: bool) -> list[int | None]:
    """Return what is wrong with each of the files, as an index of `_PROBLEMS`."""
    with ThreadPoolExecutor() as pool:
        paths = [folder / name for name in digests]
        return list(pool.map(_problem, paths, digests.values(), itertools.repeat(content)))


def _mine(names: Sequence[str]) -> range:
    """Return which of the files are this process's part of the work."""
    return range(jax.process_index(), len(names), jax.process_count())


def _problem(path: Path, expected: Iterable[int | str], content: bool) -> int | None:
    try:
        if not path.is_file():
            return 1 if path.exists() else 0
        with open(path, "rb") as file:
            size, digest = expected
            if os.fstat(file.fileno()).st_size != size:
                return 2
            return 3 if content and hashlib.file_digest(file, "sha256").hexdigest() != digest else None
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name != DESCRIPTION:
            yield name


def _sealed(path: Path) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        files.sync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").digest()
