"""How a step gets on disk: in which order, with which digests, and what is left if it does not."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_equal, free_port
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import adamjax
from adamjax import FolderInUseError, checkpoint
from adamjax._core import files
from adamjax._core.locks import FolderLock
from adamjax.checkpoint import _array_digests, _description, _save
from adamjax.checkpoint._array_digests import array_digests

OPT = adamjax.adam()
PARAMS = {"w": jnp.arange(300.0)}


def save(directory, step, **options):
    params = {"w": PARAMS["w"] + step}
    checkpoint.save(directory, OPT, params, OPT.init(params), step=step, **options)


DTYPES = ["bool", "int8", "uint8", "int4", "uint4", "int16", "float16", "bfloat16", "float32", "int32", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


def numbers(shape, dtype):
    """Any bits, but 0 and 1 for booleans."""
    bits = np.random.default_rng(len(shape)).integers(0, 2 if dtype == "bool" else 4, shape)
    return jnp.asarray(bits, "int32").astype(dtype)


def by_definition(x):
    """The digest of an array on this machine, word by word."""
    x = np.asarray(x)
    if x.dtype.name.endswith("int4"):
        x = x.astype(np.int8).view(np.uint8) & 15
    content = x.tobytes()
    words = np.frombuffer(content + bytes(-len(content) % 4), np.uint32).tolist()
    total, weighted = sum(words) % 2**64, sum(i * word for i, word in enumerate(words)) % 2**64
    return f"{total:016x}{weighted:016x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_are_those_of_the_bits(dtype):
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 4, 5), (300, 41)):
        x = numbers(shape, dtype)
        assert array_digests({"x": x}) == {"x": by_definition(x)}


def test_digests_of_64_bits():
    with jax.enable_x64(True):
        for dtype in ("float64", "complex128", "int64"):
            x = numbers((5, 7), dtype)
            assert array_digests({"x": x}) == {"x": by_definition(x)}


def test_digests_of_more_than_a_block(monkeypatch):
    monkeypatch.setattr(_array_digests, "_BLOCK", 64)
    for shape in ((1000,), (3, 101), (101, 3), (5, 2, 17)):
        for dtype in ("uint8", "bfloat16", "float32"):
            x = numbers(shape, dtype)
            assert array_digests({"x": x}) == {"x": by_definition(x)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_digests_do_not_depend_on_shardings(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    specs = [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),), (None, None, "b"), ("a", None, "b"), (None, "b", "a")]
    for dtype in ("uint8", "bfloat16", "float32", "complex64"):
        x = numbers((8, 8, 4), dtype)
        for spec in specs:
            sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            assert array_digests({"x": sharded}) == {"x": by_definition(x)}, spec
    host = jax.device_put(x, SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host"))
    assert array_digests({"x": host}) == {"x": by_definition(x)}


def test_digests_see_any_bit_and_any_order():
    x = np.random.default_rng(0).integers(0, 256, 37, np.uint8)
    seen = {by_definition(x)}
    for place in range(8 * x.size):
        flipped = x.copy()
        flipped[place // 8] ^= 1 << place % 8
        seen.add(array_digests({"x": jnp.asarray(flipped)})["x"])
    assert len(seen) == 1 + 8 * x.size
    words = x[:36].view(np.float32)
    swapped = words.copy()
    swapped[[1, 3]] = swapped[[3, 1]]
    assert array_digests({"x": jnp.asarray(words)}) != array_digests({"x": jnp.asarray(swapped)})


def test_orbax_reads_what_was_saved(tmp_path):
    """As versions without digests do."""
    save(tmp_path, 3, key=5)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [3]
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), description=ocp.args.JsonRestore())
        found = manager.restore(3, args=items)
    assert (found.description["format"], found.description["key"]) == (1, 5)
    np.testing.assert_array_equal(found.arrays["params"]["['w']"], PARAMS["w"] + 3)


def test_what_is_no_step(tmp_path):
    save(tmp_path, 3)
    for name in ("4.damaged", "5.adamjax-tmp", "6.orbax-checkpoint-tmp-1", "+7", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "9").touch()
    assert checkpoint.steps(tmp_path) == ocp.utils.checkpoint_steps(tmp_path) == [3]
    save(tmp_path, 4)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "3", "4", "4.damaged", "+7", "x", "9"}


def test_a_step_counts_once_it_is_on_disk(tmp_path, monkeypatch):
    """All files and folders are synchronised, then it is renamed, then its directory is synchronised."""
    said = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        said.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recorded_rename(old, new):
        said.append((str(old), str(new)))
        rename(old, new)

    save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path, 2, keep=1)
    begun, final = f"{tmp_path}/2.adamjax-tmp", f"{tmp_path}/2"
    commit = said.index((begun, final))
    written = {str(path).replace(final, begun, 1) for path in [*(tmp_path / "2").rglob("*"), tmp_path / "2"]}
    # The description is moved into its place.
    written.remove(f"{begun}/description/metadata")
    assert written <= set(said[:commit])
    assert any(isinstance(path, str) and path.startswith(f"{begun}/description/.metadata") for path in said[:commit])
    assert said[commit + 1] == str(tmp_path)
    assert said.index((f"{tmp_path}/1", f"{tmp_path}/1.adamjax-tmp")) > commit
    assert sorted(os.listdir(tmp_path)) == [".lock", "2"]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "x")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (os, "fsync"),
        (os, "rename"),
        (files.os, "replace"),
        (_save._step_folder, "seal"),
        (_description, "write"),
        (ocp.Checkpointer, "save"),
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, module, name):
    for step in (20, 40):
        save(tmp_path, step, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(
            OSError, match=r"^step 60 was not saved: No space left on device, in .*; step 40 stays whole$"
        ):
            save(tmp_path, 60, keep=2)
    assert sorted(os.listdir(tmp_path)) == [".lock", "20", "40"]
    assert_equal(checkpoint.restore(tmp_path, OPT, PARAMS).params, {"w": PARAMS["w"] + 40})
    save(tmp_path, 60, keep=2)
    assert checkpoint.steps(tmp_path) == [40, 60]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"^step 1 was not saved: Not a directory, in .*/file/checkpoints$"
    ) as caught:
        save(tmp_path / "file" / "checkpoints", 1)
    assert caught.value.errno == errno.ENOTDIR


LIMITED = """
    import resource, sys, jax, adamjax
    opt = adamjax.adam()
    def save(step):
        params = {"w": jax.random.normal(jax.random.key(step), (100_000,))}
        adamjax.checkpoint.save(sys.argv[1], opt, params, opt.init(params), step=step, keep=2)
    save(20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        save(40)
    except OSError as error:
        print(error.errno, error)
    print(adamjax.checkpoint.steps(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save(40)
    print(adamjax.checkpoint.steps(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path):
    """Which the library that writes the arrays meets, and words in its way."""
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    sentence = f"step 40 was not saved: File too large, in {tmp_path}; step 20 stays whole"
    assert found.stdout.splitlines() == [f"{errno.EFBIG} {sentence}", "[20]", "[20, 40]"]


def test_one_writer_at_a_time(tmp_path):
    save(tmp_path, 1)
    code = "import sys; from pathlib import Path; from adamjax._core.locks import FolderLock\n"
    code += "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        (tmp_path / "2.adamjax-tmp").mkdir()
        with pytest.raises(FolderInUseError, match=f"is in use by process {holder.pid}"):
            save(tmp_path, 2)
        assert (tmp_path / "2.adamjax-tmp").exists()
        assert checkpoint.restore(tmp_path, OPT, PARAMS).step == 1
    save(tmp_path, 2)
    with FolderLock(tmp_path):  # a run may hold it itself
        save(tmp_path, 3)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_the_description_has_the_digests(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "1"
    description = json.loads((folder / "description" / "metadata").read_text())
    digests = description["digests"]
    assert digests["arrays"]["params['w']"] == by_definition(PARAMS["w"] + 1)
    assert set(digests["arrays"]) == {"params['w']", "state[0].count", "state[0].mu['w']", "state[0].nu['w']"}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(digests["files"]) == there - {"description/metadata"}
    for name, (size, _) in digests["files"].items():
        assert (folder / name).stat().st_size == size


TOGETHER = """
    import errno, os, sys
    from pathlib import Path
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    import adamjax
    from adamjax import DamagedFileError, checkpoint
    from adamjax.checkpoint import _save, _step_folder

    directory, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    whole = {"w": np.arange(6000, dtype=np.float32).reshape(60, 100), "b": np.arange(7, dtype=np.float16)}
    specs = {"w": PartitionSpec("x"), "b": PartitionSpec()}
    params = {
        name: jax.make_array_from_callback(x.shape, NamedSharding(mesh, specs[name]), lambda at, x=x: x[at])
        for name, x in whole.items()
    }
    opt = adamjax.adam()
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda at: np.zeros(x.shape, x.dtype)),
        jax.eval_shape(opt.init, params),
    )

    def check(step):
        found = checkpoint.restore(directory, opt, params, state=state, step=step)
        for name, x in found.params.items():
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), whole[name][shard.index])

    check(0)  # which one process saved
    checkpoint.save(directory, opt, params, state, step=1)
    check(1)

    commit = _step_folder.commit
    def full(*_):
        raise OSError(errno.ENOSPC, "x")
    _step_folder.commit = full
    try:
        checkpoint.save(directory, opt, params, state, step=2)
    except OSError as error:
        print(error)
    _step_folder.commit = commit
    lock = _save.FolderLock
    def held(folder):
        raise adamjax.FolderInUseError(folder, "process 7")
    _save.FolderLock = held
    try:
        checkpoint.save(directory, opt, params, state, step=2)
    except OSError as error:
        print(error)
    _save.FolderLock = lock
    print(checkpoint.steps(directory))
    multihost_utils.sync_global_devices("looked")
    checkpoint.save(directory, opt, params, state, step=2)
    if index == 0:
        largest = max((directory / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    try:
        check(2)
    except DamagedFileError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_and_one(tmp_path):
    params = {"w": jnp.arange(6000.0).reshape(60, 100), "b": jnp.arange(7, dtype=jnp.float16)}
    state = OPT.init(params)
    checkpoint.save(tmp_path, OPT, params, state, step=0)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", textwrap.dedent(TOGETHER), str(tmp_path), str(free_port())]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen([*command, str(i)], **kwargs) for i in range(2)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    first, second = ([line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in said)
    assert first == second
    assert first[0] == f"step 2 was not saved: No space left on device, in {tmp_path}; step 1 stays whole"
    assert first[1].startswith(f"{tmp_path} is in use by process 7: wait")
    assert first[2] == "[0, 1]"
    assert "is damaged (its content is not what was saved); step 1 is whole: restore(..., step=1)" in first[3]
    found = checkpoint.restore(tmp_path, OPT, params, step=1)
    assert_equal((found.params, found.state), (params, state))
    digests = [
        json.loads((tmp_path / str(step) / "description" / "metadata").read_text())["digests"] for step in (0, 1)
    ]
    assert digests[0]["arrays"] == digests[1]["arrays"]
    assert any("ocdbt.process_1" in name for name in digests[1]["files"])


def test_what_cannot_be_removed_stays(tmp_path, monkeypatch):
    """The step is saved all the same, and the next save removes the others."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(_save._step_folder.shutil, "rmtree", full)
        save(tmp_path, 2, keep=1)
    assert sorted(os.listdir(tmp_path)) == [".lock", "1.adamjax-tmp", "2"]
    save(tmp_path, 3, keep=1)
    assert sorted(os.listdir(tmp_path)) == [".lock", "3"]
