"""Compiled kernels, kept and prebuilt: no file and no compiler can do harm to a run."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers import assert_equal

import adamjax
from adamjax import cli, kernels
from adamjax.kernels import _cache, _compile, _cpu, _flags, _fused, _library, _prebuilt

pytestmark = pytest.mark.skipif(not any(map(shutil.which, _compile._DEFAULTS)), reason="no C++ compiler")

PARAMS = {"a": jnp.ones((128, 128)), "b": jnp.ones((128, 256))}
SAVE_AS = 'while [ "$1" != -o ]; do shift; done; '  # then $2 is the library that a compiler is to write


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A kernel, compiled once and in haste."""
    path = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_flags, "FLAGS", (*_flags.FLAGS, "-O0"))
        return _compile.compile_kernel(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache. Nothing is remembered of kernels, before and after."""
    monkeypatch.setattr(_library, "_target", _library._target.__wrapped__)
    for module, name in ((_cpu, "_missing"), (_fused, "_warn_once")):
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))
    monkeypatch.setattr(_library, "_register", lambda name, library: None)  # one to a process
    monkeypatch.setenv("ADAMJAX_CACHE_DIR", str(tmp_path / "cache" / "kernels"))
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path / "prebuilt")
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes a compiler of lines of shell, and returns the file where its calls are counted."""

    def make(does, mode=0o755):
        path, calls = tmp_path / "compiler", tmp_path / "calls"
        path.write_bytes(f"#!/bin/sh\necho called >> {calls}\n".encode() + os.fsencode(does) + b"\n")
        path.chmod(mode)
        monkeypatch.setenv("CXX", str(path))
        return calls

    return make


@pytest.fixture
def copier(compiler, library):
    """A compiler whose work was done before."""
    return compiler(f'{SAVE_AS}cp {library} "$2"')


def calls_of(path):
    return path.read_text().count("called") if path.exists() else 0


def damaged_kernel(kept, how):
    content = kept.read_bytes()
    kept.unlink()  # this process may have loaded it, and a loaded library that is cut short ends its process at exit
    kept.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "foreign": b"x" * len(content)}[how])


BAD_COMPILERS = {
    "fails": ("echo wrong >&2; exit 1", "could not compile the kernel .* It said:\nwrong"),
    "writes nothing": ("", "wrote no kernel"),
    "writes an empty file": (f'{SAVE_AS}: > "$2"', "could not be loaded: .*file too short"),
    "writes no library": (f'{SAVE_AS}echo "this is not a library, but text" > "$2"', "could not be loaded"),
    "hangs": ("sleep 60", "did not compile the kernel of a fused step in 1 seconds"),
    "speaks Latin-1": (b"printf 'caf\\351'; exit 1", "It said:\ncaf�"),
}


@pytest.mark.parametrize("name", BAD_COMPILERS)
def test_a_bad_compiler_leaves_the_step_to_xla(name, folder, compiler, monkeypatch):
    does, said = BAD_COMPILERS[name]
    monkeypatch.setattr(_compile, "TIME_LIMIT", 1.0)
    check_refused(said, compiler(does))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "/no/compiler",
            r"there is no C\+\+ compiler \(/no/compiler\): install one \(apt install g\+\+, say\), or name",
        ),
        ("'unclosed", 'CXX="\'unclosed" is not a command .No closing quotation.'),
        (__file__, r"there is no C\+\+ compiler"),  # which is not executable
    ],
)
def test_a_command_that_is_no_compiler(command, said, folder, monkeypatch):
    monkeypatch.setenv("CXX", command)
    check_refused(said)


def test_a_compiler_that_is_no_program(folder, compiler, monkeypatch):
    compiler("")
    Path(os.environ["CXX"]).write_bytes(b"\x7fELF")
    check_refused("cannot be run \\(Exec format error\\): choose another")


def check_refused(said, calls=None):
    opt, auto, plain = (adamjax.adam(fused=fused) for fused in (True, "auto", False))
    state = plain.init(PARAMS)
    with pytest.raises(ValueError, match=f"fused=True cannot step params\\['a'\\]: .*{said}"):
        opt.step(PARAMS, state, PARAMS)
    with pytest.warns(UserWarning, match=said) as warned:
        found = auto.step(PARAMS, state, PARAMS)
    assert len(warned) == len(PARAMS)
    assert_equal(found, plain.step(PARAMS, state, PARAMS))
    auto.step(PARAMS, state, PARAMS)  # without a word
    if calls is not None:
        assert calls_of(calls) == 1, "it is tried once"
    assert cli.main(["kernels", "build"]) == 2
    assert cli.main(["kernels", "status"]) == 0


def test_a_compiler_that_hangs_is_killed_with_its_children(folder, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(_compile, "TIME_LIMIT", 1.0)
    compiler(f"sleep 60 & echo $! > {tmp_path / 'child'}; wait")
    with pytest.raises(RuntimeError, match="did not compile"):
        kernels.build()
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not is_running(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child of the compiler goes on")


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_compiler_may_have_arguments(folder, copier, monkeypatch):
    monkeypatch.setenv("CXX", f"env SOME=thing '{os.environ['CXX']}'")
    assert kernels.build().parent == folder


def test_kernels_are_kept(folder, copier, monkeypatch, capsys):
    assert kernels.status() == []
    assert cli.main(["kernels", "status"]) == 0
    assert "the first fused step compiles a kernel by" in capsys.readouterr().out
    monkeypatch.setattr(os, "umask", os.umask)
    before = os.umask(0)
    try:
        with ThreadPoolExecutor() as pool:  # as many processes would
            (path,) = set(pool.map(lambda _: kernels.build(), range(2)))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(folder.iterdir()) == [path]
    assert kernels.status() == [(path, path.stat().st_size, True, None)]
    monkeypatch.setenv("CXX", "/no/compiler")  # it is not needed any more
    made = path.stat().st_mtime_ns
    assert cli.main(["kernels", "build"]) == 0
    assert path.stat().st_mtime_ns == made
    assert cli.main(["kernels", "status"]) == 0
    assert f"{path}  {path.stat().st_size} bytes  used here\nfused steps use {path.name}" in capsys.readouterr().out
    monkeypatch.setattr(_compile, "processor", lambda: "another one")
    assert [kernel.current for kernel in kernels.status()] == [False]
    assert cli.main(["kernels", "status"]) == 0
    said = capsys.readouterr().out
    assert "bytes  not used here\n" in said
    assert "there is no kernel for fused steps: a fused step is compiled on first use, and there is no" in said
    assert cli.main(["kernels", "clear"]) == 0
    assert kernels.status() == []


@pytest.mark.parametrize("how", ["cut", "empty", "foreign"])
def test_a_damaged_kernel_is_compiled_again(how, folder, copier, monkeypatch, capsys):
    path = kernels.build()
    whole = path.read_bytes()
    damaged_kernel(path, how)
    assert kernels.status() == [(path, path.stat().st_size, False, f"{path} is damaged")]
    assert cli.main(["kernels", "status"]) == 0
    assert f"never loaded: {path} is damaged" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/no/compiler")
        check_refused(r"there is no C\+\+ compiler")
    assert kernels.build() == path
    assert path.read_bytes() == whole
    assert calls_of(copier) == 2


def as_another_user(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, -1)


PLANTED = {
    "another's file": ("path", as_another_user, "belongs to another user"),
    "another's folder": ("folder", as_another_user, "belongs to another user"),
    "a file for all": ("path", lambda path: path.chmod(0o646), "others may write to"),
    "a folder for a group": ("folder", lambda folder: folder.chmod(0o770), "others may write to"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_kernel_that_others_could_have_written_is_not_loaded(name, folder, copier, monkeypatch):
    which, give_away, said = PLANTED[name]
    path = kernels.build()
    planted = path if which == "path" else folder
    give_away(planted)
    assert _cache.find(_compile.key()) is None
    (kernel,) = kernels.status()
    assert not kernel.current
    assert kernel.fault.startswith(f"{planted} belongs to" if "belongs" in said else f"{said} {planted}")
    before = sorted(folder.iterdir())
    if which == "folder":
        with pytest.raises(RuntimeError, match=f"{said}.* by ADAMJAX_CACHE_DIR"):
            kernels.build()
        with pytest.warns(UserWarning, match=f"was compiled for this process alone, since .*{said}"):
            _library.target()
        assert sorted(folder.iterdir()) == before, "nothing is written there"
    else:
        assert kernels.build() == path
        assert _cache.fault(path) is None
    assert kernels.clear() == [path]


def unusable(name, tmp_path, monkeypatch):
    """Make the cache unusable."""
    if name == "no home":
        monkeypatch.delenv("ADAMJAX_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home.")))
        return
    (tmp_path / "file").touch()
    places = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "kernels", "read-only": "/proc/adamjax"}
    monkeypatch.setenv("ADAMJAX_CACHE_DIR", str(places[name]))


@pytest.mark.parametrize("name", ["no home", "a file", "below a file", "read-only"])
def test_without_a_cache_a_kernel_is_compiled_for_the_process(name, folder, tmp_path, copier, monkeypatch):
    unusable(name, tmp_path, monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert kernels.status() == kernels.clear() == []
    for action, status in (("build", 2), ("status", 0), ("clear", 0)):
        assert cli.main(["kernels", action]) == status
    with pytest.raises(RuntimeError, match=r"name (one|another folder) by ADAMJAX_CACHE_DIR$"):
        kernels.build()
    with pytest.warns(UserWarning, match="was compiled for this process alone, since .* ADAMJAX_CACHE_DIR$"):
        _library.target()
    assert list((tmp_path / "temporary").iterdir()) == [], "nothing is left"
    monkeypatch.setenv("CXX", "/no/compiler")
    check_refused(r"there is no C\+\+ compiler")


def test_a_kernel_is_on_disk_before_it_has_its_name(folder, copier, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, name=name, real=real: (done.append(name), real(*x)))
    kernels.build()
    assert done == ["fsync", "replace", "fsync"]


V2, V3, V4 = reversed(_flags.LEVELS["x86_64"].values())


@pytest.fixture
def prebuilt(folder, monkeypatch):
    """The kernels of a wheel, by their levels, of which this machine has the highest; and no compiler."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(_compile, "processor", lambda: f"flags : fpu {' '.join(V4)}")
    monkeypatch.setenv("CXX", "/no/compiler")
    _prebuilt.FOLDER.mkdir()
    paths = {}
    for level in _flags.LEVELS["x86_64"]:
        digest = hashlib.sha256(level.encode()).hexdigest()
        paths[level] = _prebuilt.FOLDER / f"adam-{level}-{digest}.so"
        paths[level].write_text(level)
    return paths


@pytest.mark.parametrize(
    ("features", "level"), [(V4, "x86-64-v4"), (V3, "x86-64-v3"), (V4 - {"avx512bw"}, "x86-64-v3"), (V2, "x86-64-v2")]
)
def test_the_prebuilt_kernel_of_the_highest_level(features, level, prebuilt, monkeypatch, capsys):
    monkeypatch.setattr(_compile, "processor", lambda: f"flags : fpu {' '.join(features)}")
    assert _prebuilt.find() == prebuilt[level]
    found = {kernel.path: kernel for kernel in kernels.status()}
    assert [path for path, kernel in found.items() if kernel.current] == [prebuilt[level]]
    for name, path in prebuilt.items():
        missing = sorted(_flags.LEVELS["x86_64"][name] - features)
        assert found[path].fault == (f"this processor has no {', '.join(missing)}" if missing else None)
    assert cli.main(["kernels", "status"]) == 0
    assert f"of the prebuilt ones, it is for {level}\n" in capsys.readouterr().out


def test_without_a_prebuilt_kernel_for_this_machine(prebuilt, monkeypatch):
    monkeypatch.setattr(_compile, "processor", lambda: "")
    assert _prebuilt.find() is None
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert kernels.status() == []
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler"):
        _library.target()


def test_a_damaged_prebuilt_kernel_is_not_loaded(prebuilt):
    damaged_kernel(prebuilt["x86-64-v4"], "cut")
    assert _prebuilt.find() == prebuilt["x86-64-v3"]
    for path in prebuilt.values():
        damaged_kernel(path, "empty")
    assert [kernel.fault for kernel in kernels.status()] == [f"{path} is damaged" for path in prebuilt.values()]
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler"):
        _library.target()


def test_the_order_of_kernels(prebuilt, folder, library, compiler, monkeypatch):
    """A prebuilt one, which needs neither a compiler nor a cache; one that is kept; one that is compiled."""
    loaded = []
    monkeypatch.setattr(_library, "_load", lambda path: loaded.append(path) or path)
    with monkeypatch.context() as patch:
        patch.setenv("ADAMJAX_CACHE_DIR", "/proc/adamjax")
        _library.target()
        assert loaded == [kernels.build()] == [prebuilt["x86-64-v4"]]

    def refuse_prebuilt(name, path):
        if path.parent == _prebuilt.FOLDER:
            raise RuntimeError("jaxlib refuses the kernel")

    monkeypatch.setattr(_library, "_register", refuse_prebuilt)
    calls = compiler(f'{SAVE_AS}cp {library} "$2"')
    for _ in range(2):
        loaded.clear()
        _library.target()
        (kept,) = folder.iterdir()
        assert (loaded[0], loaded[-1]) == (prebuilt["x86-64-v4"], kept)
    assert calls_of(calls) == 1
    assert kernels.build() == prebuilt["x86-64-v4"]


STEP = """
import warnings
import jax.numpy as jnp, numpy as np
import adamjax
from adamjax.kernels import _prebuilt

_prebuilt.files = dict  # as in a checkout, wherever adamjax is installed from
params = {"w": jnp.ones((128, 128))}
opt, plain = adamjax.adam(fused=True), adamjax.adam()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    (found, _), (right, _) = [x.step(params, x.init(params), params) for x in (opt, plain)]
np.testing.assert_allclose(found["w"], right["w"], rtol=1e-6)
print(len(warned), *[x.message for x in warned])
"""


@pytest.mark.slow  # it starts processes
def test_steps_of_a_process_with_and_without_a_cache(folder, copier, tmp_path):
    def steps(**variables):
        command = [sys.executable, "-c", STEP]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert steps() == "0\n"
    (path,) = folder.iterdir()
    damaged_kernel(path, "cut")
    assert steps() == "0\n"
    assert calls_of(copier) == 2
    assert steps(CXX="/no/compiler") == "0\n"
    assert steps(ADAMJAX_CACHE_DIR="/proc/adamjax").startswith(
        "1 The kernel of fused steps was compiled for this process"
    )
