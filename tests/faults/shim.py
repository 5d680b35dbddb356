"""The preloaded library that makes writes fail and records them: building it, and talking to it."""

import contextlib
import ctypes
import enum
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
TESTS = SOURCE.parents[1]
VARIABLE = "ADAMJAX_FAULTS_ROOT"
# Compiling it, or loading it, can fail for reasons that are no fault of adamjax.
COMPILERS = ("cc", "gcc", "clang")


class Kind(enum.IntEnum):
    """The faults; their numbers are those of shim.c."""

    FAIL = 1  # the change is refused with an error
    FULL = 2  # one write is cut short, and all later changes that need space are refused
    SHORT = 3  # a write writes half, and says so
    TEAR = 4  # a write writes half, and the process is killed
    KILL_BEFORE = 5
    KILL_AFTER = 6
    SIGNAL = 7
    FAIL_READ = 8  # a read is refused with an error, instead of a change


def why_not():
    """Return the reason why there can be no shim here, or None."""
    if sys.platform != "linux":
        return "the shim of the fault injector is for Linux"
    if not any(map(shutil.which, COMPILERS)):
        return f"the fault injector needs one of {', '.join(COMPILERS)}"
    return None


def build(folder):
    """Compile the shim into a folder; return its path."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    library = Path(folder) / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-lpthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def run_again_with_shim():
    """Replace this process by one that has the shim, in a folder of its own; return that folder once it has."""
    if VARIABLE not in os.environ:
        scratch = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
        (scratch / "root").mkdir()
        os.environ |= {VARIABLE: str(scratch / "root"), "LD_PRELOAD": str(build(scratch))}
        # The checkout is tested, wherever adamjax is installed.
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # Processes that are started from here begin without it.
    del os.environ["LD_PRELOAD"]
    return Path(os.environ[VARIABLE]).parent


class Shim:
    """The shim of this process."""

    def __init__(self):
        self._library = ctypes.CDLL(None)

    @contextlib.contextmanager
    def armed(self, kind, at, value=0, *, lasting=False):
        """Let changes be hit from the `at`-th on, counted from 1."""
        self._library.faults_arm(int(kind), ctypes.c_long(at), int(value), int(lasting))
        try:
            yield
        finally:
            self.hit = bool(self._library.faults_fired())
            self._library.faults_arm(0, ctypes.c_long(0), 0, 0)

    @contextlib.contextmanager
    def recorded(self, path):
        """Record all changes into a file."""
        self._library.faults_record(os.fsencode(path))
        try:
            yield
        finally:
            self._library.faults_record(None)

    def mark(self, text):
        """Write a mark into the record: what is promised from here on."""
        self._library.faults_mark(text.encode())
