"""Tunings that are stopped: what they return and keep, and how they go on; by a function, and by signals."""

import json
import math
import os
import time
from functools import partial

import pytest
from bowl import BOWL

from adamjax import cli
from adamjax.tuning import tune

small = partial(tune, BOWL, steps=40, trials=10, confirm=(2, 2), range_test=None)
objective_tuning = {"trials": 6, "confirm": (1, 2), "stages": ["learning_rate"]}


def objective(optimizer, trial):
    loss = abs(math.log10(trial.arguments["learning_rate"] / 0.01)) + 0.01 * trial.seed
    for epoch in range(8):
        trial.report(epoch, loss + 1 / (1 + epoch))
    return loss


def after(calls):
    """Stop when asked that often."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def stopped_again_and_again(tuning, folder, calls):
    """Tune, stopped after so many calls of `stop` each time; return the last report and the number of the stops."""
    stops = []
    while True:
        report = tuning(out=folder, stop=after(calls))
        if not report.stopped:
            return report, stops
        stops.append(report)
        assert not (folder / "report.html").exists()
        assert "facts" not in json.loads((folder / "tune.json").read_text())
        assert "stopped" not in (folder / "tune.json").read_text()
        # Whoever looks at it meanwhile changes nothing.
        if len(stops) == 2:
            cli.main(["report", str(folder)])
            (folder / "report.html").unlink()


def numbers(path):
    return json.loads((path / "report.json").read_text())


@pytest.mark.parametrize("execution", ["vmap", pytest.param("mesh", marks=pytest.mark.slow)])
def test_a_tuning_of_a_problem_that_is_stopped_goes_on(tmp_path, execution):
    tuning = partial(small, execution=execution, halving=execution == "vmap")
    tuning(out=tmp_path / "whole")
    # One round needs 20 calls.
    report, stops = stopped_again_and_again(tuning, tmp_path / "stopped", 33)
    assert len(stops) >= 3
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    counts = [len(r.trials) for r in stops]
    assert counts == sorted(counts)
    first = stops[1]
    assert first.warnings[0] == (
        f"the tuning was stopped with {counts[1]} of 19 trials; tune goes on with out='{tmp_path / 'stopped'}'"
    )
    assert not report.warnings[0].startswith("the tuning was stopped")


def test_a_tuning_of_an_objective_that_is_stopped_goes_on(tmp_path):
    tuning = partial(tune, objective, **objective_tuning)
    tuning(out=tmp_path / "whole")
    _, stops = stopped_again_and_again(partial(tuning), tmp_path / "stopped", 16)  # a range test has 12 calls
    assert len(stops) >= 2
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_tuning_that_is_stopped_at_once_has_no_trials():
    report = tune(objective, stop=lambda: True, **objective_tuning)
    assert report.stopped == "the tuning was stopped with 0 of 10 trials"
    assert not report.trials
    assert report.warnings == (report.stopped, "no trial has ended yet: there is no best setting")


def naps(optimizer, trial, *, folder, seconds):
    if trial.number:
        (folder / str(os.getpid())).touch()
        time.sleep(seconds)
    return objective(optimizer, trial)
