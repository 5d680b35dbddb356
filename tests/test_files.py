"""Files that are written as a whole or not at all, and folders that have one writer."""

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from adamjax import DamagedFileError, FolderInUseError
from adamjax._core import files, locks
from adamjax._core.locks import FolderLock
from adamjax._core.text import printable

pytestmark = pytest.mark.numbers


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    files.replace(path, "old")
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, broken, fail)
            with pytest.raises(OSError, match=r"No space left on device: '.*deep/file'"):
                files.replace(path, "new")
        assert os.listdir(path.parent) == ["file"]
        assert path.read_text() == "old"
    files.replace(path, b"new\xff")
    assert files.read(path) == b"new\xff"


def test_what_is_appended_is_there_or_not(tmp_path, monkeypatch):
    path = tmp_path / "file"
    assert files.append(path, b"one\n") == 4
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            files.append(path, b"two\n")
    assert path.read_bytes() == b"one\n"
    assert files.append(path, b"2\n", after=2) == 4
    assert path.read_bytes() == b"on2\n"


def test_file_systems_that_cannot_sync_are_written_to(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.replace(tmp_path / "file", b"one\n")
    files.append(tmp_path / "file", b"two\n")
    assert files.read(tmp_path / "file") == b"one\ntwo\n"


def test_reading_has_limits(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read(tmp_path / "file", 5) == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for path, limit, message in (("file", 4, "is larger than 4 bytes"), ("pipe", 9, "is not a file")):
        with pytest.raises(DamagedFileError, match=message) as caught:
            files.read(tmp_path / path, limit)
        assert caught.value.path == tmp_path / path
    for missing in ("none", "file/none"):
        with pytest.raises(FileNotFoundError):
            files.read(tmp_path / missing)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"1", b"[" * 100_000, b'{"a": ' * 100_000])
def test_json_that_is_none(tmp_path, content):
    with pytest.raises(DamagedFileError, match=r"/a is damaged \(.*\): remove it") as caught:
        files.json_object(content, tmp_path / "a", "remove it")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.path, copy.step) == (str(caught.value), tmp_path / "a", None)


def test_terminals_get_no_orders():
    assert printable("a\x1b[31m\u202e\x07é\nß") == "a\\x1b[31m\\u202e\\x07é\nß"


HOLDER = """
    import sys, time
    from pathlib import Path
    from adamjax._core.locks import FolderLock
    lock = FolderLock(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_process_a_folder(tmp_path, holder):
    with pytest.raises(FolderInUseError, match=f"is in use by process {holder.pid} on .* since .* UTC: wait"):
        FolderLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path) as lock:
        assert f"process {holder.pid} on" in lock.stale


def test_a_lock_ends_with_the_last_that_took_it(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path / ".")
    first.release()
    first.release()
    assert (tmp_path / locks.NAME).read_bytes()
    second.release()
    assert not (tmp_path / locks.NAME).read_bytes()
    with FolderLock(tmp_path) as lock:
        assert lock.stale is None


class Garbage:
    """A lock in a circle, which only the garbage collector finds."""

    def __init__(self, folder):
        self.lock, self.circle = FolderLock(folder), self


def test_a_lock_that_is_garbage_is_released_wherever_it_is_found(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(locks, "_write", lambda *x, write=locks._write: (gc.collect(), write(*x)))
    for other in ("a", "b"):
        Garbage(tmp_path / "a")
        with FolderLock(tmp_path / other):
            gc.collect()
            assert (tmp_path / other / locks.NAME).read_bytes()
        assert not (tmp_path / "a" / locks.NAME).read_bytes()
        assert not (tmp_path / other / locks.NAME).read_bytes()
    assert not FolderLock._held


@pytest.fixture
def another_machine(tmp_path, monkeypatch):
    """The file of a holder on another machine, whose locks are not seen here."""
    monkeypatch.setattr(locks, "STALE_SECONDS", 2)
    lock = tmp_path / locks.NAME
    lock.write_text('{"host": "else\\u001bwhere", "pid": 7, "since": 0}')
    return lock


def test_a_dead_holder_on_another_machine(tmp_path, another_machine):
    with FolderLock(tmp_path) as lock:
        assert lock.stale == "process 7 on else\\x1bwhere since 1970-01-01 00:00:00 UTC"


def test_a_living_holder_on_another_machine(tmp_path, another_machine):
    def beat():
        while not done.wait(0.2):
            os.utime(another_machine)

    done = threading.Event()
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="process 7 on else"):
            FolderLock(tmp_path)
    finally:
        done.set()
        thread.join()


def test_where_there_are_no_locks_the_process_counts(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "_flock", lambda descriptor: False)
    with pytest.raises(FolderInUseError, match=f"process {holder.pid}"):
        FolderLock(tmp_path)
    holder.kill()
    holder.wait()
    with FolderLock(tmp_path) as lock:
        assert f"process {holder.pid} on" in lock.stale


@pytest.mark.parametrize("content", [b"[]", b"\xff", b'{"pid": "x"}', b'{"since": 1e300, "host": 3}'])
def test_a_lock_file_of_another_kind(tmp_path, content, monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.1)
    (tmp_path / locks.NAME).write_bytes(content)
    time.sleep(0.1)
    with FolderLock(tmp_path):
        pass
