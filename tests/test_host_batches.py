"""Problems with batches from the host, with a state of the model, and with metrics on the host."""

import gc
import itertools
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fed import Fed, FedOnHost
from helpers import assert_close, assert_equal, free_port, make_mesh
from jax.sharding import AxisType
from tolerances import RECOMPILED

import adamjax
from adamjax import checkpoint, cli, problems
from adamjax.problems._batches import AHEAD
from adamjax.run_folder import read_metrics
from adamjax.training import train
from adamjax.tuning import Log, Report, Space, lr_range_test, sweep, tune

OPT = adamjax.adam(0.1)
SPACE = Space(learning_rate=Log(1e-2, 1.0))


def last(problem, **options):
    *_, report = train(problem, OPT, **{"steps": 30} | options)
    return report


@pytest.fixture(scope="module")
def plain():
    """A loop written down plainly: the parameters and the state of the model after 30 steps."""
    problem = Fed()
    keys = adamjax.training.keys_of(0)
    params, model_state = problem.init(keys.init)
    state = OPT.init(params)

    @jax.jit
    def step(params, model_state, state, batch):
        (_, model_state), grads = jax.value_and_grad(problem.loss, has_aux=True)(params, model_state, batch, None)
        return *OPT.step(grads, state, params), model_state

    for batch in itertools.islice(problem.batches(0), 30):
        params, state, model_state = step(params, model_state, state, jax.tree.map(jnp.float32, batch))
    return params, model_state


@pytest.mark.parametrize("kind", [Fed, FedOnHost])
def test_a_run_is_that_of_a_plain_loop(plain, kind):
    problem = kind()
    report = last(problem)
    assert_close((report.params, report.model_state["mean"]), (plain[0], plain[1]["mean"]), RECOMPILED)
    assert report.model_state["key"] == plain[1]["key"]
    expected = {name: float(x) for name, x in Fed().evaluate(*plain).items()}
    assert report.metrics == pytest.approx(expected, rel=1e-5)
    assert problem.draws == {0: 30}


@pytest.mark.parametrize("execution", ["vmap", "map"])
@pytest.mark.parametrize("kind", [Fed, FedOnHost])
def test_all_settings_see_the_batches_of_a_run(execution, kind):
    """A loader is advanced once a step and seed; the statistics are those of training."""
    problem, settings = kind(), [{"learning_rate": lr} for lr in (0.01, 0.1, 1e30)]
    found = sweep(problem, settings, optimizer=adamjax.adam, steps=30, points=3, seeds=[0, 7], execution=execution)
    assert problem.draws == {0: 30, 7: 30}
    for i, seed in enumerate((0, 7)):
        report = last(Fed(), seed=seed)
        for name, x in report.metrics.items():
            assert found.metrics[name][1, i, -1] == pytest.approx(x, rel=1e-5)
    assert (found.diverged_at[:2] == 0).all()


def test_blocks_of_batches_end_where_runs_are_evaluated(monkeypatch):
    whole = sweep(Fed(), SPACE, steps=17, points=3, trials=2, execution="vmap")
    monkeypatch.setattr("adamjax.tuning._blocks.BLOCK_STEPS", 4)
    problem = Fed()
    parts = sweep(problem, SPACE, steps=17, points=3, trials=2, execution="vmap")
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    np.testing.assert_array_equal(parts.metrics["count"], whole.metrics["count"])
    assert problem.draws == {0: 17}


def test_range_tests_and_searches_take_them():
    problem = Fed()
    assert 0.01 < lr_range_test(problem, num_steps=120, max_lr=100.0).suggestion() < 10
    assert problem.draws == {0: 120}
    options = {"num_steps": 40, "max_lr": 100.0}
    one, mesh = (lr_range_test(Fed(), mesh=m, **options) for m in (None, make_mesh(AxisType.Auto)))
    np.testing.assert_allclose(mesh.losses, one.losses, rtol=1e-4)
    report = tune(problem, space=SPACE, trials=4, steps=20, confirm=(1, 2), halving=False)
    assert {t.metrics["count"][-1] for t in report.trials} == {20}
    assert set(problem.draws) == {0, 1, 2}


def test_a_mesh_shares_each_batch():
    report, one = last(Fed(), mesh=make_mesh(AxisType.Auto)), last(Fed())
    assert_close((report.params, report.model_state["mean"]), (one.params, one.model_state["mean"]), RECOMPILED)
    assert report.params["x"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"batch\['rows'\] has shape \(6, 4\), and 8 devices cannot share 6 rows"):
        last(Fed(lambda seed, i, x: x[:6]), mesh=make_mesh(AxisType.Auto))


@pytest.mark.parametrize("starts", [False, True])
def test_a_resumed_run_sees_the_batches_that_follow(tmp_path, starts):
    class Starting(Fed):
        def batches(self, seed, start=0):
            yield from itertools.islice(super().batches(seed), start, None)

    kind, whole = (Starting if starts else Fed), last(Fed())
    for report in train(kind(), OPT, steps=30, report_every=7):
        if report.step == 14:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (report.params, report.model_state))
            checkpoint.save(tmp_path, OPT, report.params, report.state, step=14, model_state=report.model_state)
            break
    start = checkpoint.restore(tmp_path, OPT, like[0], model_state=like[1])
    resumed = last(kind(), start=start)
    assert resumed.model_state.pop("key") == whole.model_state.pop("key")
    assert_equal((resumed.params, resumed.model_state), (whole.params, whole.model_state))
    with pytest.raises(ValueError, match=r"does not fit: model_state is dict there and None here"):
        checkpoint.restore(tmp_path, OPT, like[0])
    with pytest.raises(ValueError, match="it has no model_state, and the problem is stateful"):
        train(kind(), OPT, steps=30, start=checkpoint.Checkpoint(*start))


@pytest.mark.filterwarnings("ignore:.*short batches are dropped")
def test_a_resumed_run_drops_the_batches_that_the_whole_one_dropped():
    class Epochs(Fed):
        def batches(self, seed):
            return [
                {"rows": x[:3] if i == 4 else x} for i, x in enumerate(np.random.default_rng(seed).random((5, 8, 4)))
            ]

    whole, start = last(Epochs(), steps=12), last(Epochs(), steps=7)
    assert_equal(last(Epochs(), steps=12, start=start).params, whole.params)


def test_epochs_start_a_list_again_and_drop_short_batches():
    class Epochs(Fed):
        def batches(self, seed):
            return list(itertools.islice(super().batches(seed), 5))

    assert last(Epochs(), steps=12).model_state["count"] == 12
    short = Epochs(lambda seed, i, x: x[:3] if i == 4 else x)
    with pytest.warns(UserWarning, match=r"step 5 of Epochs.batches\(0\) has 3 rows, and the first had 8"):
        report = last(short, steps=12)
    assert report.model_state["count"] == 12


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (lambda seed, i, x: x[:, :3] if i == 6 else x, ValueError, r"step 7 of .*\['rows'\] has shape \(8, 3\)"),
        (
            lambda seed, i, x: np.asarray(["a"]) if i == 6 else x,
            TypeError,
            "step 7 of .* a pytree of arrays",
        ),
        (lambda seed, i, x: 1 / 0 if i == 6 else x, ZeroDivisionError, "raised this instead of the batch of step 7"),
    ],
)
def test_what_a_loader_does_wrong_is_told_with_its_step(rows, error, message):
    reports = train(Fed(rows), OPT, steps=30, report_every=2)
    assert [next(reports).step for _ in range(4)] == [0, 2, 4, 6]
    with pytest.raises(error, match=message):
        next(reports)


def test_a_loader_may_use_its_memory_again():
    class OneBuffer(Fed):
        def batches(self, seed):
            buffer = np.empty((8, 4))
            for batch in super().batches(seed):
                buffer[:] = batch["rows"]
                yield {"rows": buffer}

    assert_equal(last(OneBuffer()).params, last(Fed()).params)
    found, expected = (sweep(kind(), SPACE, steps=9, trials=2, execution="vmap") for kind in (OneBuffer, Fed))
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_an_iterator_of_another_run_is_refused():
    class Shared(Fed):
        def __init__(self):
            super().__init__()
            self.iterator = super().batches(0)

        def batches(self, seed):
            return self.iterator

    with pytest.raises(ValueError, match=r"Shared.batches\(1\) returns an iterator that another run has begun"):
        sweep(Shared(), SPACE, steps=5, trials=2, seeds=2, execution="vmap")
    shared = Shared()
    assert last(shared).step == 30
    with pytest.raises(ValueError, match="make a new one at each call"):
        last(shared)


def test_batches_that_stay_short_are_refused():
    with pytest.warns(UserWarning, match="has 7 rows"), pytest.raises(ValueError, match=r"has shape \(7, 4\)"):
        last(Fed(lambda seed, i, x: x[:7] if i else x))


def test_a_loader_that_ends_early_is_told_with_its_step():
    class Ending(Fed):
        def batches(self, seed):
            yield from itertools.islice(super().batches(seed), 7)

    class Empty(Fed):
        def batches(self, seed):
            return []

    with pytest.raises(ValueError, match=r"Ending.batches\(0\) ended before step 8: .*loop over the epochs"):
        last(Ending())
    with pytest.raises(ValueError, match=r"Empty.batches\(0\) is empty"):
        last(Empty())


def test_a_loader_that_raises_leaves_a_journal_that_resumes(tmp_path):
    broken = {"now": False}

    def rows(seed, i, x):
        if broken["now"] and seed == 2 and i == 6:
            raise OSError("disk on fire")
        return x

    options = {"space": SPACE, "trials": 4, "steps": 20, "confirm": (1, 2), "halving": False, "execution": "vmap"}
    whole = tune(Fed(), **options)
    broken["now"] = True
    with pytest.raises(OSError, match="disk on fire"):
        tune(Fed(rows), out=tmp_path, **options)
    kept = (tmp_path / "trials.jsonl").read_text()
    assert kept.count("\n") == 4
    broken["now"] = False
    resumed = tune(Fed(rows), out=tmp_path, **options)
    assert (tmp_path / "trials.jsonl").read_text().startswith(kept)
    assert resumed.table() == whole.table() == Report.load(tmp_path).table()


def test_a_thread_draws_no_more_than_it_needs_and_ends():
    problem = Fed()
    reports = train(problem, OPT, steps=1000, report_every=5)
    assert [next(reports).step for _ in range(3)] == [0, 5, 10]
    reports.close()
    assert problem.draws[0] <= 10 + 2 * AHEAD + 2
    assert not [t for t in threading.enumerate() if t.name == "adamjax-batches"]


def test_memory_does_not_grow_with_the_steps(monkeypatch):
    """At most so many batches live at once, however long the run."""
    monkeypatch.setattr("adamjax.tuning._blocks.BLOCK_STEPS", 2)
    alive, most = [0], [0]

    def freed():
        alive[0] -= 1

    def rows(seed, i, x):
        weakref.finalize(x, freed)
        alive[0] += 1
        most.append(alive[0])
        return x

    peaks = []
    for steps in (40, 160):
        gc.collect()
        tracemalloc.start()
        sweep(Fed(rows), SPACE, steps=steps, points=2, trials=2, execution="vmap")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(most) <= 2 * (AHEAD + 2) + 2
    assert peaks[1] < 1.5 * peaks[0]


def test_x64_mode_keeps_batches_in_float64():
    with jax.enable_x64(True):
        seen = []

        class Wide(Fed):
            def loss(self, params, state, batch, key):
                seen.append(batch["rows"].dtype)
                loss, state = super().loss(params, state, jax.tree.map(lambda x: x.astype("float32"), batch), key)
                return loss, state

        last(Wide(), steps=3)
        assert set(seen) == {np.dtype("float64")}


def test_a_step_that_is_skipped_leaves_the_state_of_the_model():
    problem = Fed(lambda seed, i, x: x * np.nan if i == 4 else x)
    *_, report = train(problem, adamjax.skip_nonfinite(OPT), steps=10)
    assert report.model_state["count"] == 9
    assert np.isfinite(report.model_state["mean"]).all()
    assert report.diverged_at is None


def test_half_precision_parameters_leave_the_dtypes_of_the_state():
    report = last(Fed(), dtype="bfloat16", steps=3)
    assert report.params["x"].dtype == "bfloat16"
    assert report.model_state["mean"].dtype == "float32"


class Frozen:
    """Methods of a problem without a state, to be changed by the tests."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.loader = (self.rng.normal(size=4).astype(np.float32) for _ in range(1000))
        self.data = self.rng.normal(size=(64, 4)).astype(np.float32)
        self.i = 0

    def init(self, key):
        return {"x": jax.random.normal(key, (4,), jnp.float32)}

    def batch(self, step, key):
        return jax.random.normal(jax.random.fold_in(key, step), (4,), jnp.float32)

    def loss(self, params, batch, key):
        return jnp.mean((params["x"] - batch) ** 2)

    def evaluate(self, params):
        return {"loss": jnp.mean(params["x"] ** 2)}


class NextOfLoader(Frozen):
    def batch(self, step, key):
        return jnp.asarray(next(self.loader))


class FirstOfLoader(Frozen):
    def batch(self, step, key):
        return next(iter([self.data[:4].mean(0)]))


class DrawsWithNoise(Frozen):
    def batch(self, step, key):
        return self.rng.normal(size=4).astype(np.float32) + super().batch(step, key)


class GlobalRandomness(Frozen):
    def batch(self, step, key):
        return self.data[np.random.randint(64)] * (1 + 0 * step.astype(jnp.float32))  # noqa: NPY002


class RandomInLoss(Frozen):
    def loss(self, params, batch, key):
        return super().loss(params, batch, key) * min(1.0, 2 + np.random.random())  # noqa: NPY002


class OwnCounter(Frozen):
    def batch(self, step, key):
        self.i += 1
        return jax.lax.slice(jnp.asarray(self.data), (self.i, 0), (self.i + 1, 4))[0] + super().batch(step, key)


class JittedLoader(Frozen):
    def __init__(self):
        super().__init__()
        self.draw = jax.jit(lambda step: next(self.loader) + step.astype(jnp.float32))

    def batch(self, step, key):
        return self.draw(step)


class Callback(Frozen):
    def batch(self, step, key):
        shape = jax.ShapeDtypeStruct((4,), jnp.float32)
        return jax.pure_callback(lambda _: next(self.loader), shape, step)


class OwnKey(Frozen):
    def __init__(self):
        super().__init__()
        self.key = jax.random.key(0)

    def batch(self, step, key):
        self.key, now = jax.random.split(self.key)
        return jax.random.normal(now, (4,), jnp.float32) + super().batch(step, key)


class OneBatch(Frozen):
    def __init__(self):
        super().__init__()
        self.loader = iter([self.data[0]])

    def loss(self, params, batch, key):
        return jnp.mean((params["x"] - next(self.loader)) ** 2)


class LoaderInLoss(Frozen):
    def loss(self, params, batch, key):
        return jnp.mean((params["x"] - next(self.loader)) ** 2)


class RandomInit(Frozen):
    def init(self, key):
        return {"x": jnp.asarray(self.rng.normal(size=4), jnp.float32)}


class RandomValidation(Frozen):
    def evaluate(self, params):
        return {"loss": jnp.mean((params["x"] - next(self.loader)) ** 2)}


FROZEN = {
    NextOfLoader: "batch returns the same batch for all steps and keys",
    FirstOfLoader: "batch returns the same batch for all steps and keys",
    DrawsWithNoise: "batch gives something else each time that it is traced",
    GlobalRandomness: "batch (gives something else each time|draws from the global random numbers)",
    OwnCounter: "batch gives something else each time that it is traced",
    JittedLoader: "batch gives something else each time that it is traced",
    Callback: "batch gives different batches for the same step and key",
    OwnKey: "batch raises UnexpectedTracerError when it is traced again",
    OneBatch: "loss raises StopIteration when it is traced again",
    RandomInLoss: "loss draws from the global random numbers of NumPy or Python",
    LoaderInLoss: "loss gives something else each time that it is traced",
    RandomInit: "init gives something else each time that it is traced",
    RandomValidation: "evaluate gives something else each time that it is traced",
}
DOORS = {
    "check": problems.check,
    "train": lambda problem: train(problem, OPT, steps=3),
    "sweep": lambda problem: sweep(problem, SPACE, steps=3),
    "tune": lambda problem: tune(problem, trials=4, steps=3),
    "lr_range_test": lambda problem: lr_range_test(problem, num_steps=10),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_what_tracing_would_freeze_is_refused(kind):
    for door in DOORS.values():
        with pytest.raises(ValueError, match=FROZEN[kind]) as raised:
            door(kind())
        assert "batches(seed)" in str(raised.value) or kind in (RandomInit, RandomValidation)


def test_pure_problems_are_not_refused():
    class FullBatch(NextOfLoader):
        full_batch = True

        def batch(self, step, key):
            return self.data[:4].mean(0)

    class Printing(Frozen):
        def loss(self, params, batch, key):
            jax.debug.print("{}", batch.sum(), ordered=False)
            return super().loss(params, batch, key)

    class PureCallback(Frozen):
        def batch(self, step, key):
            shape = jax.ShapeDtypeStruct((4,), jnp.float32)
            return jax.pure_callback(lambda i: self.data[np.asarray(i) % 64], shape, step)

    class NoData(Frozen):
        def batch(self, step, key):
            return ()

        def loss(self, params, batch, key):
            return jnp.mean(params["x"] ** 2)

    for kind in (Frozen, FullBatch, Printing, PureCallback, NoData):
        problems.check(kind())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": lambda step, key: step}, "Fed has both batch and batches"),
        ({"stateful": 1}, "Fed.stateful is 1, expected True or False"),
        ({"init": lambda key: {"x": jnp.zeros(4)}}, r"Fed.init returns a dict; with stateful = True it returns"),
        ({"init": lambda key: ({"n": jnp.int32(0)}, None)}, r"params\['n'\]"),
        ({"loss": lambda p, s, b, k: p["x"].sum()}, "with stateful = True it returns \\(loss, model_state\\)"),
        (
            {"loss": lambda p, s, b, k: (p["x"].sum(), s | {"mean": b["rows"]})},
            r"\[8, 4\] for model_state\['mean'\]",
        ),
        ({"loss": lambda p, s, b, k: (p["x"].sum(), s | {"count": 0.5 * s["mean"][0]})}, r"model_state\['count'\]"),
        ({"loss": lambda p, s, b, k: (p["x"].sum(), {})}, "it must keep its structure"),
        ({"batches": lambda seed: 3}, r"Fed.batches\(0\) returns a int, expected an iterable"),
        ({"evaluate": lambda p, s: {"mean": p["x"].sum()}}, 'expected a dict with "loss"'),
    ],
)
def test_what_does_not_fit_the_protocol_is_refused(change, message):
    problem = Fed()
    vars(problem).update(change)
    with pytest.raises(TypeError, match=message):
        problems.check(problem)


def test_evaluation_on_the_host_is_checked():
    problem = FedOnHost()
    problem.evaluate = lambda params, state: {"mean": 0.0}
    with pytest.raises(TypeError, match='expected a dict with "loss"'):
        last(problem)


class OverMesh(Fed):
    """A matrix that is divided over both axes of a mesh, and batches over one of them."""

    batch_axes = ("data",)

    def init(self, key):
        params, state = super().init(key)
        return params | {"w": jax.random.normal(key, (16, 8), jnp.float32)}, state

    def loss(self, params, state, batch, key):
        loss, state = super().loss(params, state, batch, key)
        return loss + jnp.mean(params["w"] ** 2), state

    def param_shardings(self, mesh, params):
        return {"x": jax.P(), "w": jax.P("data", "model")}


def test_one_model_at_a_time_over_a_mesh():
    """Sharded as the problem says, with ZeRO-1 too; compiled once for all settings, with a population's numbers."""
    mesh = make_mesh(AxisType.Auto, (2, 4), ("data", "model"))

    def zero1(learning_rate):
        return adamjax.sharding.zero1(adamjax.adam(learning_rate), mesh=mesh, axis="data")

    options = {"steps": 20, "points": 2, "trials": 3, "seeds": 2}
    traces = []

    class Counted(OverMesh):
        def loss(self, *args):
            traces.append(args)
            return super().loss(*args)

    expected = sweep(OverMesh(), SPACE, optimizer=adamjax.adam, execution="vmap", **options)
    for optimizer in (adamjax.adam, zero1):
        traces.clear()
        found = sweep(Counted(), SPACE, optimizer=optimizer, execution="mesh", mesh=mesh, **options)
        assert len(traces) == 3  # two of the check, and one of the step
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(found.metrics["mean"], expected.metrics["mean"], rtol=1e-5)
    report = last(OverMesh(), steps=3, mesh=mesh)
    assert report.params["w"].sharding.spec == report.state[0].mu["w"].sharding.spec == jax.P("data", "model")


@pytest.mark.slow
def test_a_search_over_a_mesh_is_that_of_a_population(tmp_path):
    options = {"space": SPACE, "trials": 5, "steps": 20, "confirm": (1, 2), "halving": False}
    mesh = make_mesh(AxisType.Auto, (2, 4), ("data", "model"))
    found = tune(OverMesh(), execution="mesh", mesh=mesh, out=tmp_path, **options)
    expected = tune(OverMesh(), execution="vmap", **options)
    for a, b in zip(found.trials, expected.trials, strict=True):
        assert a.setting == b.setting
        assert a.value("loss") == pytest.approx(b.value("loss"), rel=1e-4)
    assert "one after another, each over 8 devices" in (tmp_path / "report.json").read_text()


PROCESS = """
    import pickle, sys
    import jax
    import numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    port, process = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    import adamjax
    from adamjax.training import train
    from adamjax.tuning import sweep, tune
    from fed import Fed, FedOnHost
    mine = lambda seed, i, x: x[4 * int(process) :][:4]  # each process has its part of the rows
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    *_, report = train(Fed(mine), adamjax.adam(0.1), steps=30, mesh=mesh)
    settings = [{"learning_rate": lr} for lr in (0.01, 0.1, 0.3)]
    found = [sweep(kind(mine), settings, steps=12, points=2, seeds=2) for kind in (Fed, FedOnHost)]
    one = sweep(Fed(mine), settings, steps=12, points=2, seeds=2, execution="mesh", mesh=mesh)
    tuned = tune(Fed(mine), trials=6, steps=12, confirm=(1, 2), halving=False)
    result = np.asarray(report.params["x"]), report.metrics, [f.metrics for f in (*found, one)], tuned.searched
    with open(f"found-{process}.pkl", "wb") as file:
        pickle.dump(result, file)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_each_of_two_processes_has_its_part_of_the_rows(tmp_path):
    port = str(free_port())
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), port]
    processes = [
        subprocess.Popen(
            [*command, str(i)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    whole, settings = last(Fed()), [{"learning_rate": lr} for lr in (0.01, 0.1, 0.3)]
    expected = sweep(Fed(), settings, steps=12, points=2, seeds=2, execution="vmap").metrics
    tuned = tune(Fed(), trials=6, steps=12, confirm=(1, 2), halving=False, execution="vmap").searched
    for i in range(2):
        params, metrics, swept, trials = pickle.loads((tmp_path / f"found-{i}.pkl").read_bytes())
        for trial, same in zip(trials, tuned, strict=True):
            assert trial.setting == pytest.approx(same.setting, rel=1e-2)
            assert trial.value("loss") == pytest.approx(same.value("loss"), rel=1e-2)
        np.testing.assert_allclose(params, whole.params["x"], rtol=1e-5)
        assert metrics == pytest.approx(whole.metrics, rel=1e-5)
        for found in swept:
            for name, x in expected.items():
                np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-6)


def test_the_command_trains_resumes_and_says_how_to_go_on(tmp_path, capsys):
    """Also after an error of the loader, whose traceback is shown."""
    run = ["train", "--steps=20", "--report-every=5", "--evaluate-every=20", "--checkpoint-every=5"]
    for name in ("Fed", "FedUntil12"):
        assert cli.main([*run, f"fed:{name}", "--out", str(tmp_path / name)]) == (1 if name == "FedUntil12" else 0)
    errors = capsys.readouterr().err
    assert "OSError: no more data" in errors
    assert f"adamjax train --resume {tmp_path / 'FedUntil12'}" in errors
    assert checkpoint.steps(tmp_path / "FedUntil12" / "checkpoints")[-1] == 10
    config = json.loads((tmp_path / "FedUntil12" / "config.json").read_text())
    config["flags"]["problem"] = "fed:Fed"  # with its data back
    (tmp_path / "FedUntil12" / "config.json").write_text(json.dumps(config))
    assert cli.main(["train", "--resume", str(tmp_path / "FedUntil12")]) == 0
    lines = [read_metrics(tmp_path / name) for name in ("Fed", "FedUntil12")]
    assert lines[0] == lines[1]
