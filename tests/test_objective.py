"""Tuning of training loops of one's own."""

import json
import math
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from flax import nnx

import adamjax
from adamjax import schedules
from adamjax.tuning import Choice, Log, LrRange, Pruned, Report, Space, lr_range_test, tune

pytestmark = pytest.mark.numbers

EPOCHS = 10


@jax.jit
def step(optimizer, state, x, noise):
    return optimizer.step(2 * (x - 1 - noise), state, x)


def objective(optimizer, trial):
    """A loop over epochs of a noisy quadratic, whose noise is NumPy's."""
    rng = np.random.default_rng(trial.seed)
    x = jnp.asarray(rng.normal(size=4), jnp.float32)
    state = optimizer.init(x)
    for epoch in range(EPOCHS):
        for _ in range(5):
            x, state = step(optimizer, state, x, np.float32(0.1 * rng.normal(size=4)))
        loss = float(np.mean((np.asarray(x) - 1) ** 2))
        trial.report(epoch, loss)
    return loss


def formula(optimizer, trial):
    """A curve that is a formula: what ends at a distance from the best learning rate, in decades."""
    for epoch in range(EPOCHS):
        trial.report(epoch, distance(trial) + 1 / (epoch + 1))
    return distance(trial)


def distance(trial):
    return abs(math.log10(trial.arguments["learning_rate"] / 0.03))


small = partial(tune, trials=12, confirm=(2, 2), range_test=None)


@pytest.fixture(scope="module")
def report():
    step.clear_cache()
    return tune(objective, trials=16)


def test_a_step_of_ones_own_compiles_once(report):
    assert step._cache_size() == 1
    assert len(report.searched) == 16
    assert {t.seed for t in report.trials} == set(range(9))
    assert report.range_test.mode == "constant"
    assert "amsgrad" not in report.best.arguments


def test_it_finds_better_hyperparameters_than_the_defaults(report):
    assert 0.01 < report.best.arguments["learning_rate"] < 2
    assert report.best.optimizer == adamjax.adamw(**report.best.arguments)
    assert report.confirmed[0].mean < 0.1 * next(c for c in report.confirmed if c.number == 0).mean
    assert report.question["problem"] == "test_objective.objective"
    assert report.execution == "one trial after another"
    assert all("lies on the edge" in warning for warning in report.warnings)


def test_records_are_what_was_reported(report):
    first = report.searched[0]
    assert first.status == "complete"
    assert first.steps == list(range(EPOCHS))
    assert first.metrics["loss"] == sorted(first.metrics["loss"], reverse=True)
    assert len(first.metrics["loss"]) == EPOCHS  # the loss that it returned is the one it reported last
    assert first.value("loss") == first.metrics["loss"][-1]


def test_the_worse_are_pruned_but_not_the_defaults_nor_what_confirms():
    found = small(formula, trials=30)
    pruned = [t for t in found.trials if t.status == "pruned"]
    assert len(pruned) >= 3
    assert all(t.number >= 4 and t.stage not in ("defaults", "confirm") for t in pruned)
    assert all(t.steps[-1] >= (EPOCHS - 1) / 4 for t in pruned)
    curves = {t.number: t.metrics["loss"] for t in found.searched}
    for t in pruned:
        end = t.steps[-1]
        others = [curves[n][end] for n in range(t.number) if len(curves[n]) > end]
        assert len(others) >= 4
        assert t.metrics["loss"][-1] > np.median(others)
        # It went on until then.
        for epoch in range(math.ceil((EPOCHS - 1) / 4), end):
            others = [curves[n][epoch] for n in range(t.number) if len(curves[n]) > epoch]
            assert t.metrics["loss"][epoch] <= np.median(others)
    assert not any(t.status == "pruned" for t in small(formula, trials=30, halving=False).trials)


def test_the_highest_metric_can_be_the_best():
    def score(optimizer, trial):
        for epoch in range(EPOCHS):
            trial.report(epoch, {"accuracy": -distance(trial) - 1 / (epoch + 1), "other": epoch})
        return {"accuracy": -distance(trial), "loss": 5}

    high, low = small(score, metric="accuracy", mode="max", range_test="auto"), small(formula, range_test="auto")
    assert [t.setting for t in high.searched] == [t.setting for t in low.searched]
    assert [t.status for t in high.searched] == [t.status for t in low.searched]
    np.testing.assert_array_equal(high.range_test.losses, low.range_test.losses)
    first = high.searched[0]
    assert first.metrics["other"] == list(range(EPOCHS))
    assert first.metrics["accuracy"][-1] == first.value("accuracy") > max(first.metrics["accuracy"][:-1])
    assert len(first.metrics["accuracy"]) == len(first.metrics["loss"]) == EPOCHS + 1
    assert first.value("loss") == 5
    assert high.ranking[0].value("accuracy") == max(t.value("accuracy") for t in high.ranking)


def test_exceptions_and_nan_are_failed_trials_and_the_search_goes_on(tmp_path):
    calls = []

    def fails(optimizer, trial):
        calls.append(trial.number)
        if trial.number == 1:
            raise MemoryError("out of memory")
        if trial.number in (2, 3):
            raise ArithmeticError
        if trial.number == 4:
            trial.report(0, 1.0)
            trial.report(7, math.nan)
            return math.nan
        if trial.number == 5:
            return math.inf
        if trial.number == 6:
            return {"accuracy": 1.0}
        if trial.number == 7:
            return "good"
        return distance(trial)

    found = small(fails, out=tmp_path)
    assert calls[:12] == list(range(12))
    assert [t.status for t in found.searched] == ["complete"] + ["failed"] * 7 + ["complete"] * 4
    errors = [t.error for t in found.searched[1:8]]
    assert errors[:5] == [
        "MemoryError: out of memory", "ArithmeticError", "ArithmeticError", "the metric is NaN", "the metric is inf",
    ]  # fmt: skip
    assert errors[5].startswith("ValueError: the value that the objective returned has accuracy, but not 'loss'")
    assert errors[6].startswith("TypeError: the value that the objective returned has 'good' for 'loss'")
    assert any("58% of the trials failed, most often with: ArithmeticError" in w for w in found.warnings)
    assert all(math.isnan(t.value("loss")) for t in found.searched[1:8])
    loaded = Report.load(tmp_path)
    assert loaded.to_json() == found.to_json()
    assert "ArithmeticError" in (tmp_path / "report.html").read_text()


def test_a_metric_that_is_undefined_at_first_is_judged_at_the_end():
    def objective(optimizer, trial):
        for step in range(1, 11):
            trial.report(step, math.nan if step < 3 else distance(trial))
        return distance(trial)

    found = small(objective, range_test="auto")
    assert {t.status for t in found.searched} <= {"complete", "pruned"}
    assert found.range_test is not None
    assert np.isfinite(found.range_test.losses).any()


@pytest.mark.parametrize(
    ("ends", "error", "message"),
    [
        (lambda trial: 1 / 0, ZeroDivisionError, "division by zero"),
        (lambda trial: math.nan, ValueError, "first trial.*failed: the metric is NaN. Give defaults that train"),
        (lambda trial: None, TypeError, "the value that the objective returned has None for 'loss'"),
        (lambda trial: trial.report(-1, 0.0), ValueError, "Invalid step value: -1"),
        (lambda trial: (trial.report(1, 0.0), trial.report(1, 0.0)), ValueError, "above that of the last report, 1"),
        (lambda trial: trial.report(1.5, 0.0), TypeError, "Invalid step value: 1.5; step must be an int"),
        (lambda trial: trial.report(1, {"f1": 1.0}), ValueError, "the report has f1, but not 'loss': add it"),
        (lambda trial: trial.report(1, "low"), TypeError, "the report has 'low' for 'loss', expected a number"),
    ],
)  # fmt: skip
def test_errors_of_the_first_trial_are_raised_at_once(ends, error, message):
    calls = []

    def fails(optimizer, trial):
        calls.append(trial.number)
        return ends(trial)

    with pytest.raises(error, match=message) as caught:
        small(fails)
    assert calls == [0]
    if error is ZeroDivisionError:  # the traceback leads to the user's line
        assert caught.traceback[-1].name == "<lambda>"


def test_ctrl_c_and_what_raises_it_pass():
    def stops(optimizer, trial):
        if trial.number == 3:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        small(stops)


def test_what_is_no_objective_is_refused():
    def one(optimizer):
        return 0.0

    with pytest.raises(TypeError, match=r"one\(optimizer\) is not an objective .*called as objective\(optimizer, tri"):
        tune(one)
    with pytest.raises(TypeError, match="dict is a class, and no objective: an objective is a function"):
        tune(dict)
    with pytest.raises(TypeError, match="object is not a problem"):
        tune(object())
    for name, value in (("execution", "vmap"), ("mesh", 3), ("memory", 1e9)):
        with pytest.raises(ValueError, match=f"Invalid {name} value: .*{name} is for problems"):
            tune(formula, **{name: value})
    with pytest.raises(TypeError, match="Invalid executor value: 3; executor must have a submit"):
        tune(formula, executor=3)
    with pytest.raises(TypeError, match="Invalid range_test value: 3; range_test must be an LrRange, or None"):
        tune(formula, range_test=3)
    with pytest.raises(ValueError, match="Invalid range_test value: 'ramp'"):
        tune(formula, range_test="ramp")


def test_a_course_is_for_those_who_name_it():
    # The steps of an objective may be epochs, and a rate that falls within so many updates would stop training.
    assert "end_fraction" not in small(objective, steps=9, trials=2).defaults
    named = small(objective, steps=9, schedule="linear", trials=2)
    assert named.defaults["end_fraction"] == 1.0
    assert {t.setting["end_fraction"] for t in named.searched[1:]} != {1.0}
    with pytest.raises(ValueError, match="Invalid schedule value: 'linear'; the number of steps is unknown"):
        small(objective, schedule="linear", trials=2)


def test_budgets_and_seeds():
    seen = []

    def objective(optimizer, trial):
        seen.append((trial.budget, trial.number, trial.seed, trial.stage))
        return distance(trial)

    small(objective, trials=2, seed=5)
    assert seen[0] == (None, 0, 5, "defaults")
    assert {(n, s) for _, n, s, stage in seen if stage == "confirm"} == {(n, s) for n in (0, 1) for s in (6, 7)}
    seen.clear()
    assert small(objective, trials=2, steps=np.int64(9), confirm=None).question["steps"] == 9
    assert [budget for budget, *_ in seen] == [9, 9]


def test_choices_are_searched_where_they_are_named():
    structures = set()

    def objective(optimizer, trial):
        structures.add(jax.tree.structure(optimizer))
        return distance(trial)

    small(objective, trials=20)
    assert len(structures) == 1
    space = Space(learning_rate=Log(1e-3, 1.0), eps=Log(1e-9, 1e-3), amsgrad=Choice(False, True))
    assert "eps" in small(objective, trials=20, space=space).best.arguments
    assert len(structures) == 2
    assert "amsgrad" in small(objective, stages=["learning_rate", "amsgrad"]).best.arguments


@pytest.mark.slow
def test_a_crash_in_the_middle_changes_nothing(tmp_path):
    again = partial(tune, trials=20, sampler="halton")
    expected = again(formula, out=tmp_path / "whole")
    assert any(t.status == "pruned" for t in expected.trials)
    ran = []

    def crashes(optimizer, trial, at):
        ran.append(trial.number)
        if len(ran) == at:
            raise KeyboardInterrupt
        return formula(optimizer, trial)

    for at in (1, 8, 16, 25, 33):  # in the range test, the search and the confirmation
        out = tmp_path / str(at)
        ran.clear()

        def once(optimizer, trial, at=at):
            return crashes(optimizer, trial, at)

        once.__module__, once.__qualname__ = formula.__module__, formula.__qualname__
        with pytest.raises(KeyboardInterrupt):
            again(once, out=out)
        assert again(once, out=out).to_json() == expected.to_json()
    total = len(ran)
    assert again(formula, out=out).to_json() == expected.to_json()
    assert len(ran) == total
    with pytest.raises(ValueError, match="holds another tuning: its problem is"):
        tune(objective, trials=20, out=out)


def test_old_journals_load(tmp_path):
    small(formula, trials=2, confirm=None, out=tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "trials.jsonl").read_text().splitlines()]
    (tmp_path / "trials.jsonl").write_text(
        "".join(json.dumps({k: x for k, x in line.items() if k != "error"}) + "\n" for line in lines)
    )
    assert [t.error for t in Report.load(tmp_path).trials] == ["", ""]


class TestRangeTests:
    def test_of_objectives(self):
        calls = []

        def counted(optimizer, trial):
            calls.append((trial.number, trial.stage))
            return objective(optimizer, trial)

        found = lr_range_test(counted, max_lr=10.0)
        assert calls == [(-1, "range test")] * 12
        assert found.mode == "constant"
        assert 0.01 < found.suggestion() < 1
        assert found.learning_rates[[0, -1]] == pytest.approx([1e-6, 10])
        with pytest.raises(ValueError, match="Invalid mode value: 'ramp'; mode must be one of 'constant', None"):
            lr_range_test(counted, mode="ramp")
        with pytest.raises(TypeError, match="is not an objective"):
            lr_range_test(lambda optimizer: 0.0)
        with pytest.raises(ZeroDivisionError):
            lr_range_test(lambda optimizer, trial: 1 / 0)
        with pytest.raises(TypeError, match="Invalid problem value: 'loop'; problem must be"):
            lr_range_test("loop")

    def test_trials_end_at_the_first_report_and_may_fail(self):
        reports = []

        def objective(optimizer, trial):
            if trial.arguments["learning_rate"] > 0.2:
                raise FloatingPointError
            for epoch in range(EPOCHS):
                try:
                    trial.report(epoch, abs(math.log10(trial.arguments["learning_rate"]) + 2))
                finally:
                    reports.append(epoch)

        found = lr_range_test(objective, num_rates=25)
        assert set(reports) == {0}
        assert np.isnan(found.losses[-2:]).all()
        assert not np.isnan(found.losses[:-3]).any()

    def test_the_search_goes_around_the_band(self):
        found = tune(formula, trials=6, confirm=None, sampler="halton")
        low, high = found.range_test.band
        rates = [t.setting["learning_rate"] for t in found.searched[1:]]
        assert low / 4 < min(rates) < max(rates) < high * 4
        given = tune(formula, trials=6, confirm=None, sampler="halton", range_test=found.range_test)
        assert [t.setting for t in given.searched] == [t.setting for t in found.searched]
        assert given.to_json() == found.to_json()

    def test_objectives_that_report_seldom_have_none(self):
        found = tune(lambda optimizer, trial: distance(trial), trials=4, confirm=None)
        assert found.range_test is None
        assert any("the objective reports fewer than 8 times" in w for w in found.warnings)
        assert "range_test" not in found.figures()

    def test_as_a_schedule(self):
        ramp = schedules.range_test(1e-5, 10.0, 50)
        rates = [float(ramp(i)) for i in range(50)]
        np.testing.assert_allclose(rates, np.geomspace(1e-5, 10, 50), rtol=1e-5)
        found = LrRange(rates, [1 + abs(math.log10(x) + 1) for x in rates])
        assert 0.003 < found.suggestion() < 0.1
        for arguments, message in (
            ((0.0, 1.0), "Invalid min_lr value: 0.0; min_lr must be above 0"),
            ((1.0, 0.1), "Invalid min_lr value: 1.0; min_lr must be below max_lr, which is 0.1"),
            ((1e-6, 1.0, 1), "Invalid steps value: 1; steps must be at least 2"),
        ):
            with pytest.raises(ValueError, match=message):
                schedules.range_test(*arguments)


def test_pruned_is_an_exception_to_let_pass():
    def prunes(optimizer, trial):
        if trial.number == 2:
            raise Pruned
        return distance(trial)

    found = small(prunes, trials=4)
    assert [t.status for t in found.searched] == ["complete", "complete", "pruned", "complete"]
    assert math.isnan(found.searched[2].value("loss"))
    assert "pruned" in found.to_json()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(4, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout, self.last = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def squared_error(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def bare_step(model, optimizer, state, x, y):
    """A step that takes the optimizer as an argument."""
    TRACES.append(x)
    loss, grads = nnx.value_and_grad(squared_error)(model, x, y)
    params, state = optimizer.step(grads, state, nnx.state(model, nnx.Param))
    nnx.update(model, params)
    return loss, state


@nnx.jit
def step_of_nnx(model, optimizer, x, y):
    """A step that takes an `nnx.Optimizer`."""
    TRACES.append(x)
    loss, grads = nnx.value_and_grad(squared_error)(model, x, y)
    optimizer.update(model, grads)
    return loss


def bare(optimizer, model, batches):
    state = optimizer.init(nnx.state(model, nnx.Param))
    while True:
        for x, y in batches():
            loss, state = bare_step(model, optimizer, state, x, y)
        yield loss


def of_nnx(optimizer, model, batches):
    tx = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    while True:
        for x, y in batches():
            loss = step_of_nnx(model, tx, x, y)
        yield loss


TRACES: list[object] = []


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("epochs", [bare, of_nnx])
def test_a_script_of_flax_compiles_once_and_draws_each_batch_once(epochs):
    """NNX with BatchNorm and dropout, on a generator of NumPy batches."""
    drawn = []
    TRACES.clear()

    def batches(seed):
        rng = np.random.default_rng(seed)
        for i in range(5):
            drawn.append((seed, i))
            x = rng.normal(size=(32, 4)).astype(np.float32)
            yield x, x.sum(axis=1, keepdims=True)

    def objective(optimizer, trial):
        losses = epochs(optimizer, Net(nnx.Rngs(trial.seed)), lambda: batches(trial.seed))
        for epoch, loss in zip(range(8), losses, strict=False):
            trial.report(epoch, loss)
        return loss

    space = Space(
        learning_rate=Log(1e-4, 1.0), one_minus_b1=Log(0.01, 0.5), one_minus_b2=Log(1e-4, 0.3), eps=Log(1e-9, 1e-3),
        weight_decay=Log(1e-5, 1.0),
    )  # fmt: skip
    found = tune(objective, space=space, trials=16, confirm=(1, 1))
    assert len(TRACES) == 1
    assert len(found.searched) == 16
    reports = sum(len(t.steps) for t in found.trials) + len(found.range_test.losses)
    assert len(drawn) == 5 * reports
    assert found.best.arguments.keys() == {"learning_rate", "b1", "b2", "eps", "weight_decay"}


@pytest.mark.usefixtures("lenient")
def test_eqx_filter_jit_compiles_once():
    """It takes Python numbers for constants. The optimizer is still equal to another one, and can be pickled."""
    traces, x = [], jnp.ones((8, 4))

    @eqx.filter_jit
    def step(optimizer, params, state):
        traces.append(params)
        return optimizer.step(jax.grad(lambda p: jnp.mean((x @ p - 1) ** 2))(params), state, params)

    def objective(optimizer, trial):
        assert optimizer == adamjax.adamw(**trial.arguments) == pickle.loads(pickle.dumps(optimizer))
        assert hash(optimizer) == hash(adamjax.adamw(**trial.arguments))
        params = jnp.zeros((4, 2))
        state = optimizer.init(params)
        for _ in range(5):
            params, state = step(optimizer, params, state)
        return jnp.mean((x @ params - 1) ** 2)

    space = Space(learning_rate=Log(1e-3, 1e-1), one_minus_b1=Log(0.01, 0.5))
    found = tune(objective, space=space, trials=8, confirm=(1, 2))
    assert len(traces) == 1
    assert len({t.value("loss") for t in found.searched}) == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_machines_share_a_storage_of_optuna(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    for machine in range(2):
        found = small(formula, sampler="optuna", storage=url, confirm=None, out=tmp_path / str(machine))
        assert {t.stage for t in found.searched} == {"defaults", "optuna"}
    (summary,) = optuna.get_all_study_summaries(url)
    assert summary.n_trials == 22


def test_progress(capsys):
    small(formula, trials=2, progress=True)
    assert " trials after " in capsys.readouterr().err
