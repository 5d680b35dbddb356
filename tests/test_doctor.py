"""`adamjax doctor` finds nothing wrong where all is well, and says what is wrong where something is."""

import json
import shutil
from importlib import metadata

import jax
import pytest

import adamjax
from adamjax import cli
from adamjax.kernels import _compile, _prebuilt

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, _compile._DEFAULTS)), reason="no C++ compiler")


def examined(capsys):
    """The exit status and what was found and is wrong."""
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    return status, found["found"], found["wrong"]


@needs_compiler
def test_all_is_well(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    status, found, wrong = examined(capsys)
    assert (status, wrong) == (0, {})
    assert found["jax"] == jax.__version__
    assert found["adamjax"].startswith(f"{adamjax.__version__} in ")
    assert found["JAX_PLATFORMS"] == "cpu"
    assert found["devices"].startswith(f"{jax.device_count()} cpu")
    assert found["fused step"] == "equals a plain one"
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["python", "adamjax"]
    assert lines[-1] == "nothing is wrong"


@needs_compiler
def test_a_broken_cache_a_wrong_step_and_old_packages(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAMJAX_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path)
    old = {"optax": "0.1.9", "jax": "0.10.1"}
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or version(name))
    adam = adamjax.adam
    monkeypatch.setattr(adamjax, "adam", lambda rate, fused, **moments: adam(rate * (2 if fused else 1), **moments))
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "below"))
    try:
        status, found, wrong = examined(capsys)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    assert status == 1
    assert wrong.keys() == {"jax", "optax", "kernel cache", "compilation cache", "fused step"}
    assert wrong["optax"].startswith("adamjax needs ")
    assert ": pip install --upgrade 'optax>=" in wrong["optax"]
    assert wrong["kernel cache"].endswith("name another folder by ADAMJAX_CACHE_DIR")
    assert str(tmp_path / "file") in wrong["kernel cache"]
    assert wrong["compilation cache"].endswith("name another folder by JAX_COMPILATION_CACHE_DIR")
    assert " of 16384 numbers differ from a plain step: take fused=False" in wrong["fused step"]
    assert found["kernel"].startswith("the first fused step compiles a kernel by ")


def test_bad_variables_and_no_compiler(capsys, monkeypatch, tmp_path):
    variables = {"XLA_FLAGS": "--xla_nonsense=1", "CXX": "/no/compiler", "ADAMJAX_CACHE": "x"}
    for name, x in (variables | {"ADAMJAX_CACHE_DIR": str(tmp_path / "empty")}).items():
        monkeypatch.setenv(name, x)
    monkeypatch.setattr(_prebuilt, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError) as missing:
        _compile.compiler()
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("wrong: ")] == [
        "wrong: ADAMJAX_CACHE: adamjax reads ADAMJAX_CACHE_DIR alone: rename or unset this",
        "wrong: devices: JAX cannot start (Unknown flag in XLA_FLAGS: --xla_nonsense=1): correct or unset XLA_FLAGS",
        f"wrong: kernel: {missing.value}",
    ]
    assert not any(line.startswith("fused step") for line in said)
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("ADAMJAX_CACHE")
    kernel = tmp_path / "empty" / f"adam-0-{'0' * 64}.so"
    kernel.write_text("no kernel")
    _, found, wrong = examined(capsys)
    assert wrong.keys() == {"kernel", "kernel cache"}
    assert wrong["kernel cache"] == f"{kernel} is damaged: adamjax kernels clear removes it"
    assert found["kernel cache"] == f"{tmp_path / 'empty'}, writable; kernels: 1, 0.0 MB"
