"""Damage to the files of a step: found and named, never restored as if it were right."""

import errno
import gc
import json
import os
import shutil
from contextlib import contextmanager
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_equal
from kill_and_resume import Train

import adamjax
from adamjax import DamagedFileError, checkpoint, cli
from adamjax.checkpoint import _array_digests, _description, _step_folder

# Orbax gives up the reads that it has begun once the first fails. Each complains when it is collected.
pytestmark = [pytest.mark.numbers, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

OPT = adamjax.adamw(1e-3, mu_dtype=adamjax.quantized("int8"))
LIKE = {"w": jnp.zeros((8, 300), jnp.bfloat16), "b": jnp.zeros(3)}
MODEL_STATE = {"mean": jnp.zeros(5), "dropout": jax.random.key(0)}


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


def content(step):
    """Parameters, state and model state with other numbers at each step."""
    numbers = np.random.default_rng(step)
    params = jax.tree.map(lambda x: jnp.asarray(numbers.normal(size=x.shape), x.dtype), LIKE)
    state = OPT.init(params)
    _, state = OPT.update(params, state, params)
    return params, state, {"mean": jnp.full(5, step, jnp.float32), "dropout": jax.random.key(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with two steps."""
    directory = tmp_path_factory.mktemp("saved")
    for step in (20, 40):
        params, state, model_state = content(step)
        checkpoint.save(directory, OPT, params, state, step=step, key=jax.random.key(step), model_state=model_state)
    return directory


def restored(directory, **options):
    return checkpoint.restore(directory, OPT, LIKE, model_state=MODEL_STATE, **options)


def assert_right(found, step=40):
    assert found.step == step
    arrays, key = [found.params, found.state, found.model_state["mean"]], found.model_state["dropout"]
    params, state, model_state = content(step)
    assert_equal(arrays, [params, state, model_state["mean"]])
    for is_now, was in ((key, model_state["dropout"]), (found.key, jax.random.key(step))):
        assert is_now.dtype == was.dtype
        np.testing.assert_array_equal(jax.random.key_data(is_now), jax.random.key_data(was))


def flip(path, numbers, other):
    content = bytearray(path.read_bytes())
    place = numbers.integers(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def cut(path, numbers, other):
    os.truncate(path, numbers.integers(path.stat().st_size))


def empty(path, numbers, other):
    os.truncate(path, 0)


def halve(path, numbers, other):
    os.truncate(path, path.stat().st_size // 2)


def shorten(path, numbers, other):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path, numbers, other):
    with open(path, "ab") as file:
        file.write(numbers.bytes(7))


def scramble(path, numbers, other):
    path.write_bytes(numbers.bytes(path.stat().st_size))


def zero(path, numbers, other):
    path.write_bytes(bytes(path.stat().st_size))


def swap(path, numbers, other):
    path.write_bytes(other.read_bytes())


def remove(path, numbers, other):
    path.unlink()


def replace_by_folder(path, numbers, other):
    path.unlink()
    path.mkdir()


def replace_by_pipe(path, numbers, other):
    path.unlink()
    os.mkfifo(path)


KINDS = [cut, empty, halve, shorten, lengthen, scramble, zero, swap, remove, replace_by_folder, replace_by_pipe]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def damaged(path, kind, seed, other):
    """Damage a file, and mend it again."""
    before = path.read_bytes()
    kind(path, np.random.default_rng(seed), other)
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def all_damage(directory, flips):
    """Damage each file of the last step in each way, one after another, and yield the file."""
    others = files_of(directory / "20")
    for place, path in enumerate(files_of(directory / "40")):
        other = others[place % len(others)]
        for seed, kind in enumerate([flip] * flips + KINDS):
            with damaged(path, kind, (place, seed), other):
                yield path


def outcome(directory, **options):
    """What is restored, or the error."""
    try:
        return restored(directory, **options)
    except ValueError as error:
        return error


@pytest.mark.parametrize("flips", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_damage_is_found_and_named(saved, flips):
    cases = 0
    for path in all_damage(saved, flips):
        cases += 1
        found = outcome(saved)
        if not isinstance(found, DamagedFileError):
            assert_right(found)
            continue
        assert found.step == 40
        # By the description of another step, other files are wrong.
        assert found.path == path or path.name == "metadata"
        assert found.path.relative_to(saved / "40").as_posix() in str(found)
        assert str(found).endswith("; step 20 is whole: restore(..., step=20)")
        assert len(str(found)) < 600
    assert cases > (512 if flips == 24 else 0)
    assert_right(restored(saved, step=20), step=20)
    assert_right(restored(saved))


@pytest.mark.slow
def test_without_verifying_damage_raises_no_raw_error(saved):
    """It may restore wrong numbers."""
    for path in all_damage(saved, flips=8):
        found = outcome(saved, verify=False)
        if isinstance(found, Exception):
            assert isinstance(found, DamagedFileError)
            assert found.step == 40
            assert path.is_relative_to(found.path) or path.name == "metadata"


@pytest.fixture(scope="module")
def without_digests(saved, tmp_path_factory):
    """The same steps, as an earlier version saved them."""
    directory = tmp_path_factory.mktemp("old") / "there"
    shutil.copytree(saved, directory)
    for step in (20, 40):
        path = directory / str(step) / "description" / "metadata"
        description = json.loads(path.read_text())
        del description["digest"], description["digests"]
        path.write_text(json.dumps(description))
    return directory


@pytest.mark.slow
def test_damage_to_a_step_without_digests_raises_no_raw_error(without_digests):
    assert_right(restored(without_digests))
    for path in all_damage(without_digests, flips=8):
        found = outcome(without_digests)
        if isinstance(found, DamagedFileError):
            assert found.step == 40
            assert path.is_relative_to(found.path)
            assert str(found).endswith("; step 20 is whole: restore(..., step=20)")
        elif isinstance(found, ValueError):
            assert path.name == "metadata"
            assert any(text in str(found) for text in ("is of another optimizer", "is of an optimizer", "does not fit"))


def test_folders_that_are_none(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "there")
    step = tmp_path / "there" / "40"
    for name in ("arrays", "description", "arrays/d", "arrays/ocdbt.process_0"):
        for content in (None, b"", b"x"):
            (step / name).rename(tmp_path / "aside")
            if content is not None:
                (step / name).write_bytes(content)
            for verify in (True, False):
                with pytest.raises(DamagedFileError, match=r"step 20 is whole: restore\(..., step=20\)$") as caught:
                    restored(tmp_path / "there", verify=verify)
                assert caught.value.path.is_relative_to(step / name)
            (step / name).unlink(missing_ok=True)
            (tmp_path / "aside").rename(step / name)
    assert_right(restored(tmp_path / "there"))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"format": None},
        {"optimizer": []},
        {"params": "w"},
        {"key": {"bits": [1], "dtype": "uint32", "impl": "threefry2x32"}},
        {"key": {"bits": [1, 2], "dtype": "float1", "impl": None}},
        {"key": {"bits": [1, -2], "dtype": "uint32", "impl": "x"}},
        {"key": [1, 2]},
        {"key": "x"},
        {"digests": {}},
        {"more": 1},
    ],
)
def test_a_description_with_wrong_types(without_digests, tmp_path, change):
    """That no digest guards."""
    shutil.copytree(without_digests, tmp_path / "there")
    path = tmp_path / "there" / "40" / "description" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedFileError, match="step 20 is whole") as caught:
        restored(tmp_path / "there")
    assert (caught.value.path, caught.value.step) == (path, 40)


@pytest.mark.parametrize(
    "digests", [None, [], {"files": {}}, {"files": {"x": 1}, "arrays": {}}, {"files": [], "arrays": 1}]
)
def test_digests_with_wrong_types(saved, tmp_path, digests):
    """As somebody can make them, who also makes the digest of the description."""
    shutil.copytree(saved, tmp_path / "there")
    path = tmp_path / "there" / "40" / "description" / "metadata"
    description = json.loads(path.read_text()) | {"digests": digests}
    del description["digest"]
    path.write_text(json.dumps(description | {"digest": _description._digest(description)}))
    with pytest.raises(DamagedFileError, match="step 20 is whole"):
        restored(tmp_path / "there")


def test_a_later_format_is_no_damage(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "there")
    path = tmp_path / "there" / "40" / "description" / "metadata"
    description = json.loads(path.read_text()) | {"format": 2}
    del description["digest"]
    path.write_text(json.dumps(description | {"digest": _description._digest(description)}))
    with pytest.raises(ValueError, match=r"has format 2, expected 1: update adamjax to restore it$") as caught:
        restored(tmp_path / "there")
    assert not isinstance(caught.value, DamagedFileError)


def test_wrong_arrays_in_right_files(saved, tmp_path, monkeypatch):
    """As if memory were at fault."""
    monkeypatch.setattr(_array_digests, "_sums", lambda rows, starts: np.zeros(2, np.uint64))
    with pytest.raises(DamagedFileError, match=r"40/arrays is damaged \(model_state\['dropout'\] is not"):
        restored(saved)
    assert_right(restored(saved, verify=False))


def test_errors_of_the_machine_are_no_damage(saved, monkeypatch):
    for error, number in ((OSError(errno.EIO, "x"), errno.EIO), (ValueError("[OS error 13: EACCES]"), errno.EACCES)):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
            with pytest.raises(OSError, match=f"40 cannot be read: {os.strerror(number)}$") as caught:
                restored(saved)
        assert caught.value.errno == number
    with monkeypatch.context() as patch:
        patch.setattr(_step_folder.hashlib, "file_digest", Mock(side_effect=PermissionError(errno.EACCES, "x")))
        with pytest.raises(PermissionError):
            restored(saved)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            restored(saved)


def damage_arrays(step):
    path = max((step / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(path, np.random.default_rng(0), None)
    return path


def test_resume_goes_on_from_a_whole_step_aloud(tmp_path, capsys):
    run, directory = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert (
        cli.main(["train", "bowl:BOWL", "--steps=60", "--report-every=4", "--checkpoint-every=20", f"--out={run}"]) == 0
    )
    assert checkpoint.steps(directory) == [20, 40, 60]
    expected = Train().result(run)
    (directory / "40" / "description" / "metadata").unlink()
    path = damage_arrays(directory / "60")
    (directory / "60.damaged").mkdir()
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert f"adamjax: {path} is damaged (its content is not what was saved): going on from step 20; see " in said
    assert (
        f"it has no description to be read, description/metadata: going on from step 20; see {directory}/40.dam" in said
    )
    assert checkpoint.steps(directory) == [20, 40, 60]
    assert sorted(path.name for path in directory.glob("*.damaged*")) == ["40.damaged", "60.damaged", "60.damaged-2"]
    assert Train().result(run) == expected
    for step in (20, 40, 60):
        damage_arrays(directory / str(step))
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert f"no step is whole: without {directory}, --resume starts the run from" in capsys.readouterr().err
    assert checkpoint.steps(directory) == [20, 40, 60]
