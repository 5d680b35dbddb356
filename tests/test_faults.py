"""Disks that fail and tear writes, power losses, kills, signals and damaged files: nothing finished is lost.

`python tests/inject_faults.py` does the same with more faults.
"""

import errno
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from faults import disk, shim
from faults.disk import Change, Disk, Journal, Op

from adamjax._core import files

TESTS = Path(__file__).parent
IN_CI = 4
TIMES = int(os.environ.get("ADAMJAX_FAULTS", IN_CI))
needs_shim = pytest.mark.skipif(shim.why_not() is not None, reason=str(shim.why_not()))


def change(op, path, other="", offset=0, data=b""):
    return Change(op, path, other, offset, data)


def outcomes(changes, journal, tmp_path, times=200):
    """Return the sets of files, with their contents, that power losses may leave."""
    found = set()
    for seed in range(times):
        made, target = Disk(), Path(tempfile.mkdtemp(dir=tmp_path)) / "disk"
        for x in changes:
            made.apply(x)
        made.write_after_power_loss(target, random.Random(seed), journal)
        paths = sorted(path for path in target.rglob("*") if path.is_file())
        found.add(tuple((str(path.relative_to(target)), path.read_bytes()) for path in paths))
    return found


def test_data_that_is_not_synced_may_be_lost_in_part(tmp_path):
    written = [change(Op.CREATE, "a"), change(Op.WRITE, "a", data=b"12"), change(Op.WRITE, "a", offset=2, data=b"34")]
    found = {content for ((_, content),) in outcomes(written, Journal.ALL, tmp_path)}
    assert {b"", b"1234", b"12", b"\0\0" + b"34", b"1\0" + b"34", b"123"} <= found
    assert outcomes([*written, change(Op.SYNC, "a")], Journal.ALL, tmp_path) == {(("a", b"1234"),)}


def test_names_that_are_not_synced_may_be_lost(tmp_path):
    first = [change(Op.CREATE, "a"), change(Op.WRITE, "a", data=b"1"), change(Op.SYNC, "a"), change(Op.SYNC, ".")]
    moved = [*first, change(Op.CREATE, "b"), change(Op.RENAME, "b", "a")]
    old, new, both = (("a", b"1"),), (("a", b""),), (("a", b"1"), ("b", b""))
    for journal in (Journal.ORDERED, Journal.FOLDERS):
        assert outcomes(moved, journal, tmp_path) == {old, new, both}
    assert outcomes([*moved, change(Op.SYNC, ".")], Journal.ANY, tmp_path) == {new}


def test_folders_keep_their_names_for_themselves(tmp_path):
    made = [change(Op.MKDIR, "x"), change(Op.CREATE, "x/a"), change(Op.SYNC, "x")]
    inside = (("x/a", b""),)
    assert outcomes(made, Journal.FOLDERS, tmp_path) == {inside, ()}
    assert outcomes(made, Journal.ORDERED, tmp_path) == {inside}  # a journal that all folders share


CALLS = """
import os, pathlib, shutil, sys
os.chdir(os.environ["ADAMJAX_FAULTS_ROOT"])
pathlib.Path("a").write_bytes(b"0123456789" * 1000)
with open("a", "r+b", buffering=0) as file:
    os.pwrite(file.fileno(), b"at", 5)
    os.pwritev(file.fileno(), [b"v", b"w"], 9998)
    os.writev(file.fileno(), [b"x", b"yz"])
    file.truncate(9999)
    os.fsync(file.fileno())
with open("a", "ab") as file:
    file.write(b"end")
os.mkdir("d")
shutil.copyfile("a", "d/b")
os.link("a", "d/c")
os.rename("a", "d/e")
os.unlink("d/c")
os.mkdir("gone")
os.mkdir("gone/too")
shutil.rmtree("gone")
os.close(os.open("d/b", os.O_WRONLY | os.O_TRUNC))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def run(library, tmp_path):
    """Run Python code with the shim; its faults are below the folder root."""
    (tmp_path / "root").mkdir()

    def run(code, **variables):
        given = {f"ADAMJAX_FAULTS_{name}": str(x) for name, x in variables.items()}
        given |= {"ADAMJAX_FAULTS_ROOT": str(tmp_path / "root"), "LD_PRELOAD": str(library)}
        command = [sys.executable, "-S", "-c", code]
        return subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=60, check=False)

    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_shim
def test_record_has_all_changes(run, tmp_path):
    ended = run(CALLS, LOG=tmp_path / "record")
    assert ended.returncode == 0, ended.stderr
    made = Disk()
    for x in disk.read_record(tmp_path / "record", tmp_path / "root"):
        made.apply(x)
    made.write(tmp_path / "replayed")
    found = contents(tmp_path / "replayed")
    assert found == contents(tmp_path / "root")
    assert sorted(map(str, found)) == ["d/b", "d/e"]


@needs_shim
@pytest.mark.parametrize(
    ("kind", "variables", "expected"),
    [
        (shim.Kind.FAIL, {"VALUE": errno.ENOSPC}, "[Errno 28] No space left on device"),
        (shim.Kind.FAIL, {"VALUE": errno.EIO}, "[Errno 5] Input/output error"),
        (shim.Kind.FULL, {"LASTING": 1}, "[Errno 28] No space left on device"),
        (shim.Kind.SHORT, {"LASTING": 1}, ""),
        (shim.Kind.TEAR, {}, None),
        (shim.Kind.KILL_BEFORE, {}, None),
        (shim.Kind.KILL_AFTER, {}, None),
    ],
)
def test_faults_hit(run, tmp_path, kind, variables, expected):
    # The second change is the write: the file is made before.
    ended = run(CALLS.partition("with open")[0], KIND=int(kind), AT=2, **variables)
    assert ended.returncode == (-9 if expected is None else bool(expected))
    assert (expected or "") in ended.stderr
    size = {shim.Kind.FAIL: 0, shim.Kind.KILL_BEFORE: 0, shim.Kind.FULL: 5000, shim.Kind.TEAR: 5000}.get(kind, 10000)
    assert (tmp_path / "root" / "a").stat().st_size == size


WRITES = """
import importlib.util, os, pathlib
spec = importlib.util.spec_from_file_location("files", os.environ["ADAMJAX_FAULTS_FILES"])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
import ctypes
root = pathlib.Path(os.environ["ADAMJAX_FAULTS_ROOT"])
size = None
for i in range(6):
    files.replace(root / "new" / "replaced", str(i) * 1000)
    ctypes.CDLL(None).faults_mark(b"replaced")
    size = files.append(root / "appended", f"{i}\\n".encode(), after=size)
    ctypes.CDLL(None).faults_mark(b"appended")
"""


@needs_shim
@pytest.mark.parametrize("journal", list(Journal))
def test_durable_files_survive_power_losses(run, tmp_path, journal):
    ended = run(WRITES, LOG=tmp_path / "record", FILES=files.__file__)
    assert ended.returncode == 0, ended.stderr
    changes = disk.read_record(tmp_path / "record", tmp_path / "root")
    for seed in range(300):
        rng, made, target = random.Random(seed), Disk(), tmp_path / f"{seed}"
        for x in changes[: rng.randint(1, len(changes))]:
            made.apply(x)
        made.write_after_power_loss(target, rng, journal)
        replaced, appended = made.marks.count("replaced"), made.marks.count("appended")
        path = target / "new" / "replaced"
        found = path.read_text() if path.exists() else ""
        assert found in [str(i) * 1000 for i in (replaced - 1, replaced)] if replaced else found in ("", "0" * 1000)
        path = target / "appended"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        assert lines[:appended] == [str(i).encode() for i in range(appended)]


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("program", ["checkpoint.save", "adamjax train", "adamjax tune"])
def test_nothing_is_lost(program):
    """`ADAMJAX_FAULTS` says how many faults of each kind; except in CI, they are others each time."""
    seed = 0 if TIMES == IN_CI else random.randrange(1 << 32)
    command = [sys.executable, TESTS / "inject_faults.py", "--programs", program, "--times", TIMES, "--seed", seed]
    ended = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout
