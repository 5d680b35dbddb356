"""One writer a folder: a lock that a crash frees, and that tells others who holds it."""

import json
import os
import socket
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from adamjax._core import files
from adamjax._core.text import printable

NAME = ".lock"
# A holder on another machine that has not been heard of for so long is taken for dead.
STALE_SECONDS = 30
_BEAT_SECONDS = 5


class FolderInUseError(OSError):
    """Another process writes to the folder.

    Attributes:
      path: The folder, a pathlib.Path.
      holder: The process, its machine, and since when, in words.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(path, holder)
        self.path: Path = path
        self.holder: str = holder

    def __str__(self) -> str:
        return f"{self.path} is in use by {self.holder}: wait for its end or stop it, or choose another folder"


class FolderLock:
    """The lock on a folder: held by this process until it is released, or until the process ends, however it ends.

    The operating system keeps it (`flock`), so no crash leaves it behind. Where machines share a file system but not
    its locks, the file tells the holder, who renews its date; a holder of another machine without a sign of life for
    `STALE_SECONDS` has lost it. A process may take a lock that it holds already.

    Attributes:
      stale: The holder whose lock was taken over since it is dead, in words; None if there was none.

    Raises:
      FolderInUseError: Another process holds it.
    """

    _held: ClassVar[dict[Path, "_Held"]] = {}
    _guard = threading.Lock()
    _released: ClassVar[deque[Path]] = deque()  # the folders of locks that were released, or are garbage

    def __init__(self, folder: Path) -> None:
        self.stale: str | None = None
        self._key: Path | None = None  # None if this object holds nothing
        key = folder.resolve()
        with self._guard:
            held = self._held.get(key)
            if held is None or held.pid != os.getpid():  # a fork does not inherit it
                held = self._held[key] = _Held(folder)
                self.stale = held.stale
            held.count += 1
            self._key = key
        self._let_go()

    def release(self) -> None:
        key, self._key = self._key, None
        if key is not None:
            self._released.append(key)
            self._let_go()

    @classmethod
    def _let_go(cls) -> None:
        """Release what is to be released. If another call is at it, or takes a lock, that one does so at its end.

        Never wait: the garbage collector may call this in the middle of another call.
        """
        while cls._released and cls._guard.acquire(blocking=False):
            try:
                while cls._released:
                    key = cls._released.popleft()
                    held = cls._held.get(key)
                    if held is not None and held.pid == os.getpid():
                        held.count -= 1
                        if not held.count:
                            cls._held.pop(key).close()
            finally:
                cls._guard.release()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        with suppress(Exception):  # modules may be gone
            self.release()


class _Held:
    """A lock that this process holds, as long as it has the file open."""

    def __init__(self, folder: Path) -> None:
        self.pid, self.count = os.getpid(), 0
        path = folder / NAME
        # A file object: wherever an interrupt comes, the garbage collector closes it.
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
        try:
            self.stale = _take(self._file.fileno(), path)
            _write(self._file.fileno(), {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
        except BaseException:
            self._file.close()
            raise
        self._ended = threading.Event()
        arguments = (weakref.ref(self), self._ended)
        threading.Thread(target=_beat, args=arguments, name="adamjax-lock", daemon=True).start()

    def beat(self) -> None:
        """Show that this process lives."""
        with suppress(OSError, ValueError):
            os.utime(self._file.fileno())

    def close(self) -> None:
        self._ended.set()
        with suppress(OSError, ValueError):
            self._file.truncate(0)
        with suppress(OSError):
            self._file.close()


def _beat(reference: "weakref.ref[_Held]", ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS) and (held := reference()) is not None:
        held.beat()
        del held  # while this waits, it must not keep the lock


def _take(descriptor: int, path: Path) -> str | None:
    """Lock an open file; return the dead holder whose lock this was, in words, or None."""
    try:
        is_locked = _flock(descriptor)
    except BlockingIOError:
        # A holder that has just got it has yet to write its name.
        for _ in range(10):
            if (holder := _read(descriptor)) is not None:
                break
            time.sleep(0.01)
        raise FolderInUseError(path.parent, _in_words(holder)) from None
    holder = _read(descriptor)
    if holder is None:
        return None
    here = holder.get("host") == socket.gethostname()
    if not is_locked and _runs(holder.get("pid")) if here else _beats(path):
        raise FolderInUseError(path.parent, _in_words(holder))
    return _in_words(holder)


def _flock(descriptor: int) -> bool:
    """Lock an open file; return whether there are such locks here."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # the file system has no locks
        return False
    return True


def _beats(path: Path) -> bool:
    """Return whether a holder on another machine shows that it lives, before its lock is stale."""
    written = path.stat().st_mtime
    while _now(path) - written < STALE_SECONDS:
        time.sleep(0.5)
        os.close(os.open(path, os.O_RDONLY))  # after which NFS asks the server for the date
        if path.stat().st_mtime != written:
            return True
    return False


def _now(path: Path) -> float:
    """Return the time by the clock of the file system that has the file."""
    beside = path.with_name(f"{NAME}-{os.getpid()}")
    try:
        beside.touch()
        return beside.stat().st_mtime
    finally:
        beside.unlink(missing_ok=True)


def _runs(pid: Any) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _write(descriptor: int, holder: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    with suppress(OSError):
        os.fsync(descriptor)


def _read(descriptor: int) -> dict[str, Any] | None:
    """Return what the holder wrote; None if there is none, or the file is not one of ours."""
    content = os.pread(descriptor, 1 << 12, 0)
    with suppress(files.DamagedFileError):
        return files.json_object(content, Path(NAME), "") or None
    return None


def _in_words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    try:
        since = f" since {datetime.fromtimestamp(float(holder['since']), UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        since = ""
    return printable(f"process {holder.get('pid')} on {holder.get('host')}{since}")
