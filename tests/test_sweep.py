"""Sweeps: many settings in one program are as many runs, one by one."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowl import BOWL, Bowl
from helpers import free_port
from tolerances import SWEEP

import adamjax
from adamjax.training import train
from adamjax.tuning import Log, Space, sweep, tune

DIGITS = adamjax.problems.digits(hidden=(8,), batch_size=16)
STEPS = 30
SETTINGS = [{"learning_rate": lr, "b1": b1} for lr in (1e-3, 3e-3, 1e-2) for b1 in (0.8, 0.9)]


@pytest.fixture(scope="module")
def by_map():
    return sweep(DIGITS, SETTINGS, steps=STEPS, points=3, execution="map", seeds=[3, 5])


def assert_same_results(a, b, tolerance=SWEEP):
    np.testing.assert_array_equal(a.steps, b.steps)
    np.testing.assert_array_equal(a.diverged_at, b.diverged_at)
    np.testing.assert_allclose(a.losses, b.losses, rtol=tolerance)
    assert a.metrics.keys() == b.metrics.keys()
    np.testing.assert_allclose(a.metrics["loss"], b.metrics["loss"], rtol=tolerance)


def test_a_member_is_a_run_of_its_own(by_map):
    assert by_map.losses.shape == by_map.metrics["accuracy"].shape == (6, 2, 3)
    np.testing.assert_array_equal(by_map.steps, [10, 20, 30])
    for i, k, seed in ((1, 0, 3), (4, 1, 5)):
        opt = adamjax.adamw(**SETTINGS[i])
        reports = list(train(DIGITS, opt, steps=STEPS, seed=seed, report_every=10, evaluate_every=10))[1:]
        np.testing.assert_allclose(by_map.losses[i, k], [r.losses.mean() for r in reports], rtol=SWEEP)
        for name in ("loss", "accuracy"):
            expected = [r.metrics[name] for r in reports]
            np.testing.assert_allclose(by_map.metrics[name][i, k], expected, rtol=SWEEP)


@pytest.mark.parametrize("execution", ["vmap", "sharded", "auto"])
def test_executions_agree(by_map, execution):
    found = sweep(DIGITS, SETTINGS, steps=STEPS, points=3, execution=execution, seeds=[3, 5])
    assert_same_results(found, by_map)
    # Of the eight devices here, "vmap" takes one; the others say what they decided on, and why.
    assert ("on each of 8 devices" in found.execution) == (execution != "vmap")
    assert set(found.probe) <= {"vmap", "map"}
    assert bool(found.probe) == (execution != "vmap")
    assert found.execution.split()[0] == (min(found.probe, key=found.probe.get) if found.probe else "vmap")


@pytest.mark.slow
def test_a_mesh_of_ones_own(by_map):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    found = sweep(DIGITS, SETTINGS, steps=STEPS, points=3, execution="map", seeds=[3, 5], mesh=mesh)
    assert found.execution == "map on each of 4 devices"
    assert_same_results(found, by_map)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["vmap", "sharded"])
def test_chunks_where_memory_is_short(by_map, execution, monkeypatch):
    sizes = []
    original = adamjax.tuning._population._stack

    def stack(opts, indices, size):
        sizes.append(size)
        return original(opts, indices, size)

    monkeypatch.setattr(adamjax.tuning._population, "_stack", stack)
    settings = SETTINGS * 4
    whole = sweep(DIGITS, settings, steps=STEPS, points=3, execution=execution, seeds=[3, 5])
    assert set(sizes) == {24}
    sizes.clear()
    short = sweep(DIGITS, settings, steps=STEPS, points=3, execution=execution, seeds=[3, 5], memory=1.0)
    assert sizes[-1] == (8 if execution == "sharded" else 1)
    assert_same_results(short, whole)
    np.testing.assert_allclose(whole.losses, np.tile(by_map.losses, (4, 1, 1)), rtol=SWEEP)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["vmap", "sharded"])  # in "map", one comes after the other
def test_a_diverging_setting_disturbs_no_other(execution):
    calm = [dict(s) for s in SETTINGS]
    wild = [dict(s) for s in SETTINGS]
    wild[2]["learning_rate"] = 1e30
    calm, wild = (sweep(DIGITS, s, steps=STEPS, points=3, execution=execution) for s in (calm, wild))
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(wild.losses[others], calm.losses[others])
    np.testing.assert_array_equal(wild.metrics["loss"][others], calm.metrics["loss"][others])
    *_, report = train(DIGITS, adamjax.adamw(1e30, b1=0.8), steps=STEPS)
    assert wild.diverged_at[2, 0] == report.diverged_at > 0
    np.testing.assert_array_equal(wild.infeasible, [False, False, True, False, False, False])
    assert 2 not in wild.ranking
    assert np.isnan(wild.last[2])
    assert np.isnan(wild.best[2])
    assert "1 diverged" in repr(wild)


@pytest.mark.slow
def test_settings_of_different_structure():
    settings = [
        {"learning_rate": 1e-2, "amsgrad": False},
        {"learning_rate": 1e-2, "amsgrad": "paper"},
        {"learning_rate": adamjax.schedules.cosine(1e-2, STEPS)},
        {"learning_rate": 3e-3, "amsgrad": "paper"},
    ]
    together = sweep(DIGITS, settings, optimizer=adamjax.adam, steps=STEPS, points=2, execution="vmap")
    for i, setting in enumerate(settings[:3]):
        alone = sweep(DIGITS, [setting], optimizer=adamjax.adam, steps=STEPS, points=2, execution="vmap")
        np.testing.assert_allclose(together.losses[i], alone.losses[0], rtol=SWEEP)
    assert len({float(x) for x in together.losses[:, 0, -1]}) == 4


@pytest.mark.slow
def test_optimizers_of_ones_own():
    def warmed_up(learning_rate, max_norm):
        rate = adamjax.schedules.warmup_cosine(learning_rate, warmup_steps=3, total_steps=STEPS)
        return adamjax.chain(adamjax.clip_by_global_norm(max_norm), adamjax.adam(rate))

    setting = {"learning_rate": 1e-2, "max_norm": 0.5}
    found = sweep(DIGITS, [setting], optimizer=warmed_up, steps=STEPS, points=1, execution="vmap")
    *_, report = train(DIGITS, warmed_up(**setting), steps=STEPS)
    np.testing.assert_allclose(found.last[0, 0], report.metrics["loss"], rtol=SWEEP)


def test_a_scale_of_the_loss():
    def scaled(learning_rate):
        return adamjax.dynamic_loss_scale(adamjax.adam(learning_rate, eps=1e-3))  # which sees gradients not scaled back

    found = sweep(BOWL, [{"learning_rate": 0.1}], optimizer=scaled, steps=STEPS, points=1, execution="vmap")
    *_, report = train(BOWL, scaled(0.1), steps=STEPS)
    np.testing.assert_allclose(found.last[0, 0], report.metrics["loss"], rtol=SWEEP)
    within = "dynamic_loss_scale is within Chain, where the loss cannot be scaled: put it around"
    with pytest.raises(ValueError, match=within):
        sweep(
            BOWL,
            [{"learning_rate": 0.1}],
            optimizer=lambda learning_rate: adamjax.chain(scaled(learning_rate)),
            steps=1,
        )
    with pytest.raises(ValueError, match=within):
        list(train(BOWL, adamjax.chain(scaled(0.1)), steps=1))


@pytest.mark.slow
def test_optimizers_of_optax(by_map, lenient):
    found = sweep(DIGITS, SETTINGS[:2], optimizer=optax.adamw, steps=STEPS, points=3, execution="vmap", seeds=[3, 5])
    np.testing.assert_allclose(found.losses, by_map.losses[:2], rtol=SWEEP)


def test_ranking_is_by_the_metric_at_the_end(by_map):
    assert by_map.ranking == list(np.argsort(by_map.metrics["loss"][:, :, -1].mean(axis=1)))
    assert by_map.winner == SETTINGS[by_map.ranking[0]]
    found = sweep(DIGITS, SETTINGS, steps=STEPS, points=3, execution="vmap", metric="accuracy", mode="max")
    accuracy = found.metrics["accuracy"][:, 0]
    assert accuracy[found.ranking[0], -1] == accuracy[:, -1].max()
    np.testing.assert_array_equal(found.best[:, 0], accuracy.max(axis=1))


class Cliff:
    """Its training loss is finite throughout, its validation is not after step 4."""

    full_batch = True

    def init(self, key):
        return {"x": jnp.zeros((), jnp.float32)}

    def batch(self, step, key):
        return jnp.float32(1)

    def loss(self, params, batch, key):
        return -params["x"] * batch

    def evaluate(self, params):
        return {"loss": jnp.where(params["x"] > 4.5, jnp.nan, params["x"])}


def test_a_validation_that_is_not_finite_at_the_end_is_no_result():
    opt = adamjax.scale_by_learning_rate
    settings = [{"learning_rate": 1.0}, {"learning_rate": 0.1}]
    found = sweep(Cliff(), settings, optimizer=opt, steps=8, points=8, execution="vmap")
    np.testing.assert_array_equal(found.diverged_at, [[0], [0]])
    np.testing.assert_array_equal(found.infeasible, [True, False])
    assert found.ranking == [1]
    assert "1 without a finite loss" in repr(found)
    with pytest.raises(ValueError, match="no setting has a result: loss is nan at the end, though the training losses"):
        sweep(Cliff(), settings[:1], optimizer=opt, steps=8, points=8, execution="vmap").winner  # noqa: B018


@dataclasses.dataclass(frozen=True)
class Undefined(Bowl):
    """A score that is undefined until the parameters have moved."""

    until: float = 0.02

    def evaluate(self, params):
        metrics = super().evaluate(params)
        apart = jnp.mean(jnp.abs(params["x"] - 3))
        return metrics | {"score": jnp.where(apart > 3 - self.until, jnp.nan, metrics["score"])}


@pytest.mark.parametrize("halving", [False, True])
def test_a_metric_that_is_undefined_at_first_is_judged_at_the_end(halving):
    settings = [{"learning_rate": x} for x in (1e-3, 1e-2, 1e-1)]
    judged = {"metric": "score", "mode": "max"}
    found = sweep(Undefined(until=0.5), settings, steps=40, points=8, execution="vmap", **judged)
    assert np.isnan(found.metrics["score"][:, 0, 0]).all()
    assert 2 in found.ranking
    assert np.isfinite(found.best[2]).all()
    tuned = tune(
        Undefined(until=0.5), trials=8, steps=40, range_test=None, confirm=None, halving=halving, sampler="halton",
        space=Space(learning_rate=Log(1e-2, 1.0)), execution="vmap", schedule="constant", **judged,
    )  # fmt: skip
    assert tuned.best.arguments["learning_rate"] > 1e-2
    assert {t.status for t in tuned.searched} <= {"complete", "pruned", "failed"}


def test_a_metric_that_is_never_defined_gets_advice_about_the_metric():
    never = Undefined(until=math.inf)
    judged = {"metric": "score", "mode": "max"}
    with pytest.raises(ValueError, match=r"score is nan at the end.*look at how evaluate computes it"):
        sweep(never, [{"learning_rate": 1e-3}], steps=8, execution="vmap", **judged).winner  # noqa: B018
    tuned = tune(never, trials=3, steps=8, range_test=None, confirm=None, execution="vmap", **judged)
    assert {t.status for t in tuned.searched} == {"failed"}
    assert any("score is nan at the end" in warning for warning in tuned.warnings)
    with pytest.raises(ValueError, match="all 3 trials failed, most often with: score is nan at the end"):
        tuned.best  # noqa: B018


@pytest.mark.slow
def test_spaces_and_the_progress_bar(capsys):
    space = Space(learning_rate=Log(1e-3, 1e-2))
    found = sweep(DIGITS, space, trials=5, method="random", steps=4, points=2, execution="vmap", progress=True)
    assert found.settings == space.points(5, method="random")
    assert "adamjax: 20 of 20 steps" in capsys.readouterr().err
    assert sweep(DIGITS, space, trials=2, steps=4, execution="vmap").steps.tolist() == [1, 2, 3, 4]


BAD = [
    (lambda: sweep(DIGITS, [], steps=1), ValueError, "there are no settings"),
    (lambda: sweep(DIGITS, SETTINGS, steps=0), ValueError, "Invalid steps value: 0; steps must be at least 1"),
    (lambda: sweep(DIGITS, SETTINGS, steps=True), TypeError, "Invalid steps value: True; steps must be an int"),
    (lambda: sweep(DIGITS, SETTINGS, steps=1, seeds=0), ValueError, "Invalid seeds value: 0"),
    (lambda: sweep(DIGITS, SETTINGS, steps=1, seeds=[]), ValueError, r"Invalid seeds value: \[\]"),
    (lambda: sweep(DIGITS, SETTINGS, steps=1, seeds=[0.5]), ValueError, r"Invalid seeds value: \[0.5\]"),  # type: ignore[list-item]
    (lambda: sweep(DIGITS, SETTINGS, steps=1, mode="least"), ValueError, "Invalid mode value: 'least'"),
    (
        lambda: sweep(DIGITS, SETTINGS, steps=1, metric="accuracy"),
        ValueError,
        "Invalid mode value: None; say whether the lowest accuracy is the best",
    ),
    (lambda: sweep(DIGITS, SETTINGS, steps=1, mesh=3), TypeError, "Invalid mesh value: 3"),  # type: ignore[arg-type]
    (lambda: sweep(DIGITS, SETTINGS, steps=1, memory="1GB"), TypeError, "Invalid memory value: '1GB'"),  # type: ignore[arg-type]
    (lambda: sweep(DIGITS, SETTINGS, steps=1, memory=0), ValueError, "Invalid memory value: 0"),
    (
        lambda: sweep(DIGITS, SETTINGS, steps=1, metric="f1"),
        ValueError,
        "Invalid metric value: 'f1'; the problem's evaluate returns accuracy, loss",
    ),
    (lambda: sweep(DIGITS, SETTINGS, steps=1, execution="pmap"), ValueError, "Invalid execution value: 'pmap'"),
    (
        lambda: sweep(object(), SETTINGS, steps=1),  # type: ignore[arg-type]
        TypeError,
        "object is not a problem: it has no method init",
    ),
    (
        lambda: sweep(DIGITS, [{"learning_rate": 1e-3, "momentum": 0.9}], steps=1),
        TypeError,
        r"setting 0, \{'learning_rate': 0.001, 'momentum': 0.9\}: .*momentum",
    ),
    (
        lambda: sweep(DIGITS, [*SETTINGS, {"learning_rate": -1.0}], steps=1),
        ValueError,
        r"setting 6, \{'learning_rate': -1.0\}: Invalid learning rate: -1.0",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


PROCESS = """
    import sys
    import jax
    import numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    port, process = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    import adamjax
    from adamjax.tuning import sweep
    problem = adamjax.problems.digits(hidden=(8,), batch_size=16)
    settings = [{"learning_rate": lr, "b1": b1} for lr in (1e-3, 3e-3, 1e-2) for b1 in (0.8, 0.9)]
    found = sweep(problem, settings, steps=30, points=3, seeds=[3, 5])
    assert "on each of 4 devices" in found.execution, found.execution
    np.save(f"losses-{process}.npy", found.losses)

    # A tuning too, whose folder the first process reads and writes for all.
    from pathlib import Path
    from bowl import BOWL
    from jax.experimental.multihost_utils import sync_global_devices
    tune = lambda: adamjax.tuning.tune(BOWL, steps=8, trials=7, confirm=(1, 2), out="tuned", halving=True)
    whole, lines = tune().to_json(), Path("tuned/trials.jsonl").read_text().splitlines(keepends=True)
    sync_global_devices("read")
    if process == "0":
        Path("tuned/trials.jsonl").write_text("".join(lines[:5]) + lines[5][:9])
    sync_global_devices("cut")
    assert tune().to_json() == whole
    Path(f"report-{process}.json").write_text(whole)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes(by_map, tmp_path):
    port = str(free_port())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), port]
    processes = [
        subprocess.Popen([*command, str(i)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for i in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"losses-{i}.npy"), by_map.losses, rtol=SWEEP)
    reports = [(tmp_path / f"report-{i}.json").read_text() for i in range(2)]
    assert reports[0] == reports[1]
    trials = [json.loads(line) for line in (tmp_path / "tuned" / "trials.jsonl").read_text().splitlines()]
    assert {(t["number"], t["seed"]) for t in trials} == {
        (t["number"], t["seed"]) for t in json.loads(reports[0])["trials"]
    }
    assert len(trials) == 7 + (2 + 3) * 2  # with the best at three constant rates
