"""Checkpoints: what is restored, what is refused, and runs that go on from them."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import kill_and_resume
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from bowl import BOWL
from golden import checkpoints as golden
from helpers import assert_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from specs import SPECS

import adamjax
from adamjax import checkpoint, cli, training
from adamjax.run_folder import RunFolder
from adamjax.training import train


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Keyless:
    """A node that names neither its children nor its module's names: only places and static data."""

    a: Any
    b: Any
    paths: tuple[str, ...] = ("layer/kernel", "layer/bias")

    def tree_flatten(self):
        return (self.a, self.b), self.paths

    @classmethod
    def tree_unflatten(cls, paths, children):
        return cls(*children, paths)


PARAMS = {
    "wide": jnp.linspace(-1, 1, 16 * 300, dtype=jnp.bfloat16).reshape(16, 300),
    "a/b": {"c.d": jnp.arange(3.0), "é": None},
    "empty": jnp.zeros((3, 0)),
    "complex": jnp.asarray([1 + 2j]),
}
REAL = {name: x for name, x in PARAMS.items() if name != "complex"}
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")


def counting(init):
    """A transformation of optax's kind that keeps what `init` makes of the parameters."""
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


CASES = {
    "adamw": (adamjax.adamw(1e-3), PARAMS),
    "amsgrad": (adamjax.amsgrad(1e-3), PARAMS),
    "schedules": (SPECS["adamw schedules"].make(), PARAMS),
    "mask": (adamjax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), PARAMS),
    "quantized": (adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(mu_dtype=INT8, nu_dtype=INT4)), REAL),
    "stochastic_rounding": (adamjax.stochastic_rounding(adamjax.adamw(1e-3), seed=2), REAL),
    "kahan": (adamjax.kahan(adamjax.adamw(1e-3)), REAL),
    "dynamic_loss_scale": (adamjax.dynamic_loss_scale(adamjax.kahan(adamjax.adamw(1e-3))), REAL),
    "master_weights": (adamjax.master_weights(optax.adam(1e-3), low_bits=True), {"w": REAL["wide"]}),
    "low_bits=8": (adamjax.master_weights(adamjax.adam(1e-3), low_bits=8), {"w": REAL["wide"]}),
    "groups": (adamjax.groups({"wide": {"learning_rate": 0.1}}, default=adamjax.adamw(1e-3)), PARAMS),
    "groups that overlap": (
        adamjax.groups({"wide": {"learning_rate": adamjax.scale(0.1)}, ".": {"b2": 0.9}}, default=adamjax.adamw(1e-3)),
        PARAMS,
    ),
    "schedule free": (adamjax.schedule_free_adamw(1e-3, nu_dtype=INT8), PARAMS),
    "average": (adamjax.average_params(adamjax.adamw(1e-3), dtype=jnp.bfloat16), REAL),
    "packed": (adamjax.packed(adamjax.adamw(1e-3), below=20), PARAMS),
    "optax": (optax.chain(optax.scale_by_adam(), optax.trace(0.9)), PARAMS),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adamw)(1e-3), {"w": jnp.ones(3)}),
    "keys": (counting(lambda params: jax.random.split(jax.random.key(3), 2)), {"w": jnp.ones(3)}),
    "keyless nodes": (counting(lambda params: Keyless(params, {"n": jnp.arange(3)})), {"w": jnp.ones(3)}),
    "flax": (adamjax.adamw(1e-3), flax.core.freeze({"params": {"kernel": jnp.ones((2, 3))}})),
    "equinox": (adamjax.adamw(1e-3), eqx.filter(eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.is_inexact_array)),
}


def spread(tree):
    """Other numbers at each place, to tell them apart."""

    def numbers(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.asarray(np.random.default_rng(x.size).permutation(x.size) % 100, x.dtype).reshape(x.shape)

    return jax.tree.map(numbers, tree)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", CASES)
def test_what_was_saved_is_restored(tmp_path, name):
    opt, like = CASES[name]
    params, state = spread(like), spread(opt.init(like))
    checkpoint.save(tmp_path, opt, params, state, step=12, key=7)
    shapes = jax.eval_shape(lambda: params)
    for target in (like, shapes):
        found = checkpoint.restore(tmp_path, opt, target)
        assert (found.step, found.key) == (12, 7)
        if name != "keys":
            assert_equal(found.params, params)
            assert_equal(found.state, state)
        else:
            np.testing.assert_array_equal(*(jax.random.key_data(x) for x in (found.state, state)))
            assert found.state.dtype == state.dtype


def test_keys(tmp_path):
    opt, params = adamjax.adam(), {"w": jnp.ones(3)}
    keys = (None, 3, jax.random.PRNGKey(1), jax.random.key(2), jax.random.key(3, impl="rbg"))
    for step, key in enumerate(keys):
        checkpoint.save(tmp_path, opt, params, opt.init(params), step=step, key=key, keep=None)
    for step, key in enumerate(keys):
        found = checkpoint.restore(tmp_path, opt, params, step=step).key
        assert type(found) is type(key)
        if step > 1:
            assert found.dtype == key.dtype
            np.testing.assert_array_equal(*(jax.random.key_data(k) if step > 2 else k for k in (found, key)))
    with pytest.raises(TypeError, match=r"Invalid key value: 0\.5; key must be a seed or a key of JAX"):
        checkpoint.save(tmp_path, opt, params, opt.init(params), step=9, key=0.5)


def test_the_last_steps_are_kept(tmp_path):
    opt, params = adamjax.adam(), {"w": jnp.ones(3)}
    assert checkpoint.steps(tmp_path / "nowhere") == []
    for step in (0, 5, 7, 12):
        checkpoint.save(tmp_path, opt, {"w": jnp.full(3, float(step))}, opt.init(params), step=step, keep=2)
    assert checkpoint.steps(tmp_path) == [7, 12]
    assert checkpoint.restore(tmp_path, opt, params, step=7).params["w"][0] == 7
    for step in (12, 3):
        with pytest.raises(ValueError, match=f"Invalid step value: {step}; .* has step 12 already: if another run"):
            checkpoint.save(tmp_path, opt, params, opt.init(params), step=step)
    for arguments, name in (({"step": -1}, "step"), ({"step": 13, "keep": 0}, "keep")):
        with pytest.raises(ValueError, match=f"Invalid {name} value"):
            checkpoint.save(tmp_path, opt, params, opt.init(params), **arguments)
    with pytest.raises(FileNotFoundError, match="has no step 8: it has 7, 12"):
        checkpoint.restore(tmp_path, opt, params, step=8)
    with pytest.raises(FileNotFoundError, match="nowhere has no checkpoint: it has none at all"):
        checkpoint.restore(tmp_path / "nowhere", opt, params)


OPT = adamjax.adamw(1e-3, b1=0.9)
REFUSED = {
    "dtype": ({"params": {"w": jnp.ones(3, jnp.bfloat16)}}, r"params\['w'\] is float32\[3\] there and bfloat16\[3\] h"),
    "shape": ({"params": {"w": jnp.ones((3, 1))}}, r"params\['w'\] is float32\[3\] there and float32\[3,1\] here"),
    "one more": ({"params": {"w": jnp.ones(3), "b": jnp.ones(2)}}, r"params\['b'\] is nothing there and float32\[2\]"),
    "one less": ({"params": {}}, r"params\['w'\] is float32\[3\] there and nothing here; nothing is cast"),
    "None": ({"params": {"w": None}}, r"params\['w'\] is float32\[3\] there and None here"),
    "container": ({"params": [jnp.ones(3)]}, "params is dict there and list here"),
    "number": ({"opt": adamjax.adamw(1e-3, b1=0.8)}, r"transforms\[0\].b1 is 0.9 there and 0.8 here; if that is meant"),
    "schedule": (
        {"opt": adamjax.adamw(adamjax.schedules.constant(1e-3))},
        r"is of another optimizer: optimizer.transforms\[2\].learning_rate is 0.001 there and Constant\(\) here",
    ),
    "option": ({"opt": adamjax.adamw(1e-3, nesterov=True)}, r"is ScaleByAdam\(\) there and ScaleByAdam\(nesterov=True"),
    "class": ({"opt": adamjax.adamaxw(1e-3)}, r"is ScaleByAdam\(\) there and ScaleByAdamax\(\) here; restore it with"),
    "wrapper": ({"opt": adamjax.kahan(OPT)}, r"optimizer is Chain\(\) there and Kahan\(\) here"),
    "not ours": ({"opt": optax.adamw(1e-3)}, r"optimizer is Chain\(\) there and Foreign\(transform="),
    "state": ({"state": OPT.init({"w": jnp.ones(3)})[:2]}, r"state\[2\] is tuple there and nothing here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, name):
    params = {"w": jnp.ones(3)}
    checkpoint.save(tmp_path, OPT, params, OPT.init(params), step=1)
    change, message = REFUSED[name]
    target = {"opt": OPT, "params": params, "state": None} | change
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, target["opt"], target["params"], state=target["state"])


def test_static_data_of_nodes_counts(tmp_path):
    opt, params = optax.identity(), {"w": jnp.ones(3)}
    checkpoint.save(tmp_path, opt, params, Keyless(params, None), step=1)
    assert checkpoint.restore(tmp_path, opt, params, state=Keyless(params, None)).state.b is None
    with pytest.raises(
        ValueError, match=r"state is Keyless \('layer/kernel', 'layer/bias'\) there and Keyless \('x',\)"
    ):
        checkpoint.restore(tmp_path, opt, params, state=Keyless(params, None, ("x",)))


def test_other_numbers_where_they_are_meant(tmp_path):
    params = {"w": jnp.ones(3)}
    checkpoint.save(tmp_path, OPT, params, OPT.init(params), step=1)
    slower = adamjax.adamw(jnp.float32(1e-4), b1=0.8)
    with pytest.raises(ValueError, match=r"b1 is 0.9 there and 0.8 here; if that is meant"):
        checkpoint.restore(tmp_path, slower, params)
    assert_equal(checkpoint.restore(tmp_path, slower, params, new_hyperparameters=True).params, params)
    with pytest.raises(ValueError, match="is of another optimizer"):
        checkpoint.restore(tmp_path, adamjax.radam(1e-3), params, new_hyperparameters=True)


def test_other_formats_and_other_programs_are_refused(tmp_path):
    params = {"w": jnp.ones(3)}
    checkpoint.save(tmp_path, OPT, params, OPT.init(params), step=1)
    description = tmp_path / "1" / "description" / "metadata"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, expected 1: update adamjax"):
        checkpoint.restore(tmp_path, OPT, params)
    shutil.rmtree(tmp_path / "1" / "description")
    with pytest.raises(ValueError, match="1 is not a checkpoint of adamjax: it has no description"):
        checkpoint.restore(tmp_path, OPT, params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_of_optax_is_restored_where_its_parameters_are(tmp_path, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"w": PartitionSpec("x", "y"), "b": PartitionSpec(None)}
    params = {"w": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones(3)}
    params = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in params.items()}
    opt = adamjax.chain(adamjax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = opt.init(params)
    checkpoint.save(tmp_path, opt, params, state, step=1)
    found = checkpoint.restore(tmp_path, opt, params)
    assert_equal((found.params, found.state), (params, state))
    moments, wanted = found.state[1][0], state[1][0]
    for name in params:
        assert moments.mu[name].sharding == wanted.mu[name].sharding == params[name].sharding
        assert moments.nu[name].sharding == wanted.nu[name].sharding
    assert moments.count.sharding == NamedSharding(mesh, PartitionSpec())


def test_what_is_no_whole_step_is_refused(tmp_path):
    params = {"w": jnp.ones(3)}
    with ocp.CheckpointManager(tmp_path / "another") as manager:
        manager.save(1, args=ocp.args.StandardSave(params))
    checkpoint.save(tmp_path / "no arrays", OPT, params, OPT.init(params), step=1)
    shutil.rmtree(tmp_path / "no arrays" / "1" / "arrays")
    checkpoint.save(tmp_path / "cut", OPT, params, OPT.init(params), step=1)
    (tmp_path / "cut" / "1" / "description" / "metadata").write_text("{")
    for name, message in (
        ("another", "1 is not a checkpoint of adamjax: it has no description"),
        ("no arrays", "1 is damaged: it has no arrays; no other step there is whole"),
        ("cut", r"1/description/metadata is damaged \(Expecting .*\): the step cannot be restored; no other"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.restore(tmp_path / name, OPT, params)


def test_many_devices_and_one(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows, columns, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("x",), (None, "x"), ()))
    opt = adamjax.adamw(1e-3, mu_dtype=INT8)
    like = {"w": jnp.zeros((8, 1024)), "b": jnp.zeros(3)}
    params, state = spread(like), spread(opt.init(like))
    one = jax.devices()[1]
    checkpoint.save(tmp_path / "one", opt, params, state, step=1)
    sharded = {"w": rows, "b": whole}
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, sharded)
    for as_arrays in (False, True):
        found = checkpoint.restore(tmp_path / "one", opt, jax.device_put(like, sharded) if as_arrays else target)
        assert_equal((found.params, found.state), (params, state))
        assert found.params["w"].sharding == rows
        assert found.state[0].mu["w"].codes.sharding == found.state[0].nu["w"].sharding == rows
        assert found.state[0].count.sharding == whole
    # The state may lie otherwise than the parameters; what was never put anywhere goes where they are.
    apart = opt.init(like)
    apart[0].nu["w"] = jax.device_put(apart[0].nu["w"], columns)
    other = checkpoint.restore(tmp_path / "one", opt, target, state=apart)
    assert other.state[0].nu["w"].sharding == columns
    assert other.state[0].count.sharding == whole
    assert_equal(other.state, state)
    # And back.
    checkpoint.save(tmp_path / "many", opt, found.params, found.state, step=1)
    back = checkpoint.restore(tmp_path / "many", opt, jax.device_put(like, one))
    assert_equal((back.params, back.state), (params, state))
    assert {x.device for x in jax.tree.leaves((back.params, back.state))} == {one}
    assert checkpoint.restore(tmp_path / "many", opt, like).state[0].count.device == jax.devices()[0]


def test_an_earlier_version_is_restored(tmp_path):
    params, state = golden.content()
    shutil.copytree(golden.FOLDER, tmp_path / "there")
    found = checkpoint.restore(tmp_path / "there", golden.optimizer(), params)
    assert_equal((found.params, found.state), (params, state))
    assert found.step == golden.STEP
    np.testing.assert_array_equal(jax.random.key_data(found.key), jax.random.key_data(jax.random.key(5)))


def test_codes_of_an_earlier_version_are_refused(tmp_path):
    shutil.copytree(golden.OLD_CODES, tmp_path / "there")
    with pytest.raises(ValueError, match=r"an earlier version quantised, in codes that are no longer read"):
        checkpoint.restore(tmp_path / "there", golden.optimizer(), golden.content()[0])


def test_missing_extra_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"a checkpoint needs orbax: run  pip install 'adamjax\[checkpoint\]'"):
        checkpoint.restore(tmp_path, OPT, {})
    assert cli.main(["train", "bowl:BOWL", "--checkpoint-every=5", "--out", str(tmp_path / "run")]) == 2
    assert "--checkpoint-every needs orbax: run  pip install 'adamjax[checkpoint]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


SAVES = """
    import sys, jax.numpy as jnp, adamjax
    opt = adamjax.adam()
    for step in range(1, 1000):
        params = {"w": jnp.full(300_000, step, jnp.float32)}
        adamjax.checkpoint.save(sys.argv[1], opt, params, opt.init(params), step=step)
"""


def kill_in_a_save(arguments, directory, **kwargs):
    """Start a process, and kill it while it writes its fourth checkpoint or a later one."""
    paths = [str(kill_and_resume.TESTS.parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL, **kwargs)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(1 for _ in directory.glob("*[0-9]")) > 2 and any(directory.glob("*tmp*")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_in_a_save(tmp_path):
    kill_in_a_save(["-c", textwrap.dedent(SAVES), str(tmp_path)], tmp_path)
    opt, like = adamjax.adam(), {"w": jnp.zeros(300_000)}
    found = checkpoint.restore(tmp_path, opt, like)
    assert found.step == checkpoint.steps(tmp_path)[-1] > 2
    np.testing.assert_array_equal(found.params["w"], found.step)
    # What was left half written is cleared away.
    checkpoint.save(tmp_path, opt, found.params, found.state, step=found.step + 1)
    assert not list(tmp_path.glob("*tmp*"))


def test_a_run_goes_on_from_a_report_and_from_a_checkpoint(tmp_path):
    opt = adamjax.adamw(adamjax.schedules.cosine(0.1, total_steps=30))
    reports = [
        r._replace(**jax.tree.map(jnp.array, {"params": r.params, "state": r.state}))
        for r in train(BOWL, opt, steps=30)
    ]
    checkpoint.save(tmp_path, opt, reports[1].params, reports[1].state, step=10)
    for start in (checkpoint.restore(tmp_path, opt, reports[1].params), reports[1]):
        rest = list(train(BOWL, opt, steps=30, start=start))
        assert [r.step for r in rest] == [20, 30]
        np.testing.assert_array_equal(rest[0].losses, reports[2].losses)
        assert rest[-1].metrics == reports[-1].metrics
        assert_equal((rest[-1].params, rest[-1].state), (reports[-1].params, reports[-1].state))
    assert list(train(BOWL, opt, steps=30, start=rest[-1])) == []


TRAIN = ["train", "bowl:BOWL", "--steps=60", "--report-every=4", "--evaluate-every=20"]
TRAIN = [*TRAIN, "--checkpoint-every=10", "--dtype=bfloat16", "--rounding=kahan"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main([*TRAIN, "--out", str(folder)]) == 0
    assert checkpoint.steps(folder / "checkpoints") == [40, 52, 60]
    return folder


def assert_same_run(folder, whole):
    program = kill_and_resume.Train()
    found, expected = program.result(folder), program.result(whole)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def copy_until(whole, folder, step, lines):
    """What a run leaves that was killed after this checkpoint and these lines."""
    shutil.copytree(whole, folder)
    for later in checkpoint.steps(folder / "checkpoints"):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:lines]) + text[lines][:9])
    (folder / "curves.png").unlink()
    return folder


@pytest.mark.parametrize(("step", "lines"), [(40, 14), (0, 2)])
def test_resume(tmp_path, whole, step, lines):
    folder = copy_until(whole, tmp_path / "run", step, lines)
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_run(folder, whole)


class StopsAfter(threading.Event):
    """As if a signal came after it has been asked so often for one."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def is_set(self):
        self.times -= 1
        return self.times < 0


# At a report, between two, and where an evaluation or a checkpoint is due, too.
@pytest.mark.parametrize(("update", "saved"), [(28, [12, 20, 28]), (30, [12, 20, 30]), (3, [3]), (40, [20, 32, 40])])
def test_resume_after_a_signal(tmp_path, whole, monkeypatch, capsys, update, saved):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "threading", SimpleNamespace(Event=lambda: StopsAfter(update)))
        assert cli.main([*TRAIN, "--out", str(folder)]) == 130
    said = capsys.readouterr()
    assert f"adamjax train --resume {folder} goes on" in said.err
    assert f"validation after {update} steps" in said.out
    assert checkpoint.steps(folder / "checkpoints") == saved
    assert "val_loss" in (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert cli.main(["train", "--resume", str(folder), "--checkpoint-every", "12"]) == 0
    assert_same_run(folder, whole)


def test_a_stop_is_remembered(tmp_path, whole, monkeypatch):
    """If the resumed run is killed before its next checkpoint, or if its later checkpoints are damaged."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "threading", SimpleNamespace(Event=lambda: StopsAfter(53)))
        assert cli.main([*TRAIN, "--out", str(folder)]) == 130

    def log(self, record):
        before(self, record)
        if record["step"] == 56:
            raise KeyboardInterrupt

    before = RunFolder.log
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert cli.main(["train", "--resume", str(folder)]) == 130
    assert checkpoint.steps(folder / "checkpoints")[-1] == 53
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_run(folder, whole)
    assert checkpoint.steps(folder / "checkpoints")[-2:] == [53, 60]
    shutil.rmtree(folder / "checkpoints" / "60" / "arrays")
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_run(folder, whole)


def test_a_run_that_is_stopped_is_saved_without_being_asked(tmp_path, monkeypatch, capsys):
    flags = ["train", "bowl:BOWL", "--steps=60", "--report-every=4", "--evaluate-every=20", "--out"]
    assert cli.main([*flags, str(tmp_path / "whole")]) == 0
    folder = tmp_path / "run"
    for update, command in ((30, [*flags, str(folder)]), (12, ["train", "--resume", str(folder)])):
        with monkeypatch.context() as patch:
            patch.setattr(training, "threading", SimpleNamespace(Event=lambda n=update: StopsAfter(n)))
            assert cli.main(command) == 130
    assert cli.main(["train", "--resume", str(folder)]) == 0
    for name in ("metrics.jsonl", "curves.png", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_after_kill_9(tmp_path, whole):
    kill_in_a_save(["-m", "adamjax", *TRAIN, "--out", "run"], tmp_path / "run" / "checkpoints", cwd=tmp_path)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", whole)


def test_what_resume_refuses(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "curves.png").unlink()  # killed before it was drawn
    for arguments, message in (
        ([], f"{tmp_path / 'run'} is finished: all its 60 steps are done"),
        (["--steps=80"], "--steps was 60, here it is 80: a run that is resumed goes on as it began; for another one"),
        (["--b1=0.8"], "--b1 was not given, here it is 0.8"),
        (["--out", "x"], "--out was not given, here it is x"),
        (["--checkpoint-every=0"], "Invalid checkpoint_every value: 0"),
    ):
        assert cli.main(["train", "--resume", str(tmp_path / "run"), *arguments]) == (2 if arguments else 0)
        assert message in "".join(capsys.readouterr())
    assert_same_run(tmp_path / "run", whole)
    both = ["--resume", str(tmp_path / "run"), "--config", str(tmp_path / "run" / "config.json")]
    assert cli.main(["train", *both]) == 2
    assert "argument --config: not allowed with argument --resume" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path / "nowhere")]) == 2
    assert "nowhere/config.json is not the config.json of a run" in capsys.readouterr().err


def test_resume_of_a_run_without_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self, title: None)
    folder = tmp_path / "run"
    assert cli.main(["train", "bowl:BOWL", "--steps=20", "--out", str(folder)]) == 0
    metrics = (folder / "metrics.jsonl").read_text()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert "is finished: all its 20 steps are done" in capsys.readouterr().out
    (folder / "metrics.jsonl").write_text(metrics[:-20])
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_text() == metrics
