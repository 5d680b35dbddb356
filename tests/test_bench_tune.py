"""The comparison of searches: what it makes of the losses that it is told."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bowl import BOWL
from tolerances import SWEEP

from adamjax.training import train
from adamjax.tuning import tune
from benchmarks import _searches, bench_horizon, bench_tune
from benchmarks._searches import ABLATIONS, METHODS, Method, Question
from benchmarks.bench_tune import Losses, Result, Runs, contest, interval, missing, ratio_text


def finish(contest, loss):
    """Answer a contest by a function of the learning rate and the seed; return what it chose, and its runs."""
    runs, losses = [], None
    try:
        while True:
            asked = next(contest) if losses is None else contest.send(losses)
            runs.append([(setting["learning_rate"], seed) for setting, seed in asked])
            losses = np.array([[math.nan, math.nan, loss(*run)] for run in runs[-1]]).reshape(-1, 3)
    except StopIteration as end:
        return end.value, runs


def proposing(rates):
    def propose(question):
        yield [({"learning_rate": rate}, question.seed) for rate in rates]

    return propose


def test_a_race_decides_among_the_best_of_the_first_trials():
    # The search is lucky with 0.3: fresh seeds show that 0.2 is better.
    def loss(rate, seed):
        return rate - 0.2 * (rate == 0.3 and seed == 70)

    method = Method(proposing([0.5, 0.4, 0.3, 0.2, 0.1]), ((3, 1), (2, 3)))
    chosen, runs = finish(contest(method, Question(BOWL, 10, 70, 5), (4, 5)), loss)
    assert [(trials, setting["learning_rate"], score) for trials, setting, score in chosen] == [
        (4, 0.2, 0.2),
        (5, 0.1, 0.1),
    ]
    assert runs[1] == [(0.3, 71), (0.2, 71), (0.4, 71)]
    assert sorted(runs[2]) == [(0.2, 72), (0.2, 73), (0.3, 72), (0.3, 73)]


def test_a_run_that_diverges_counts_as_ten_times_the_defaults():
    found = [
        Result("p", "defaults", 0, 1, {}, 2.0, [1.0, 3.0]),
        Result("p", "tune", 0, 16, {}, 1.0, [1.0, None]),
        Result("p", "random", 0, 16, {}, 1.0, [1.5, 2.5]),
    ]
    losses = Losses(found)
    np.testing.assert_allclose(np.exp(losses.ratios("tune", "random", 16)), [[10.5 / 2]])
    np.testing.assert_allclose(np.exp(losses.ratios("tune", "defaults", 16)), [[10.5 / 2]])
    jobs = missing(["p", "q"], ["defaults", "tune", "random"], 1, (16, 64), found)
    assert jobs["p"] == [("tune", 0, [64]), ("random", 0, [64])]
    assert jobs["q"] == [("defaults", 0, [1]), ("tune", 0, [16]), ("tune", 0, [64]), ("random", 0, [16, 64])]


def test_the_interval_is_over_problems():
    same = np.log([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(interval(same), 0.5)
    low, high = interval(np.log([[0.25], [1.0], [0.5]]))
    assert 0.25 <= low < 0.4
    assert 0.6 < high <= 1
    # Seeds of the search that differ within problems do not widen it.
    np.testing.assert_allclose(interval(np.log([[0.25, 1.0], [0.25, 1.0]])), 0.5)


@pytest.mark.numbers
def test_runs_are_those_of_training():
    setting = {"learning_rate": 0.05, "b1": 0.8, "warmup_fraction": 0.1, "end_fraction": 0.2}
    runs = Runs(BOWL, 20)
    (first,), (again, worse) = runs.losses([(setting, 3)]), runs.losses([(setting, 3), (setting | {"b1": 0.0}, 4)])
    np.testing.assert_array_equal(first, again)
    assert (worse != first).any()
    opt = bench_tune.Scheduled(_searches.OPTIMIZER, "cosine", 20)(**_searches.DEFAULTS | setting)
    for loss, steps in zip(first, (5, 10, 20), strict=True):
        *_, last = train(BOWL, opt, steps=steps, seed=3)
        np.testing.assert_allclose(loss, last.metrics["loss"], rtol=SWEEP)


@pytest.mark.numbers
def test_the_benchmark_searches_as_tune_does():
    """With the same seed, without a range test, and with nothing to confirm: trial by trial."""
    report = tune(BOWL, optimizer=_searches.OPTIMIZER, steps=20, trials=16, range_test=None, seed=70)
    expected = [t.setting["learning_rate"] for t in report.searched]
    runs = Runs(BOWL, 20)
    search = partial(_searches.tuned, tests=False, how={})
    asked, losses = [], None
    proposals = search(Question(BOWL, 20, 70, 16))
    while True:
        try:
            wanted = next(proposals) if losses is None else proposals.send(losses)
        except StopIteration:
            break
        asked += [setting["learning_rate"] for setting, _ in wanted]
        losses = runs.losses(wanted)
    # Rounding of losses may move a proposal of a late round.
    np.testing.assert_allclose(asked[:9], expected[:9], rtol=1e-3)
    assert len(asked) == len(expected)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "google-vizier"])
def test_every_method_proposes_as_many_settings_as_it_has_trials(name):
    if name == "Optuna, GP":
        pytest.importorskip("torch")
    method, trials = METHODS[name], 6

    def loss(rate, seed):
        return abs(math.log(rate)) + 0.1

    _, runs = finish(contest(method._replace(confirm=()), Question(BOWL, 20, 0, trials), (trials,)), loss)
    count = sum(map(len, runs))
    shorter = {"defaults": 1, "AlgoPerf's list": 4, "halving, twice the trials": 10}
    tests_range = name in ("tune", "constant rate", "5 best, 3 seeds", "not confirmed") or name.startswith("stages")
    assert count == shorter.get(name, trials - tests_range)


def test_the_guide_has_the_figures_of_the_results():
    root = Path(__file__).parent.parent
    results = [Result(**row) for row in json.loads((root / "benchmarks/results/tune.json").read_text())["results"]]
    losses, guide = Losses(results), (root / ".docs/guides/tuning.md").read_text()
    assert len(losses.problems) == 14
    labels = {"random": "random settings"}
    for name in ("random", "Halton", "Optuna, TPE", "Optuna, GP", "OptList", "defaults"):
        ratios = [losses.ratios("tune", name, trials) for trials in (16, 64)]
        cells = [*map(ratio_text, ratios), ", ".join(str((x < 0).sum()) for x in ratios)]
        assert f"| {' | '.join([labels.get(name, name), *cells])} |" in guide
    assert f"| google-vizier | {ratio_text(losses.ratios('tune', 'google-vizier', 16))} |" in guide
    for name in ABLATIONS:
        cells = [ratio_text(losses.ratios(name, "tune", trials)) for trials in (16, 64)]
        assert f"| {' | '.join(cells)} |" in guide or name.startswith("stages")


@pytest.mark.numbers
def test_longer_runs_are_compared_with_unchanged_settings():
    setting = {"learning_rate": 0.1, "b1": 0.5, "b2": 0.9, "weight_decay": 0.01, "warmup_fraction": 0.1}
    assert bench_horizon.changed(setting, 0.5, 0.25, 0.25) == {
        "learning_rate": 0.05,
        "b1": 0.5,
        "b2": pytest.approx(0.975),
        "weight_decay": 0.0025,
        "warmup_fraction": 0.1,
    }
    logs = bench_horizon.logs(BOWL, 10, 8)
    assert logs.shape == (3, 4)
    assert logs[0, bench_horizon.PEAKS.index(1.0)] == 0
    assert np.isfinite(logs).all()
    assert len(np.unique(logs.round(6))) > 6
