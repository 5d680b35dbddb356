"""Tunings that are stopped: what they return and keep, and how they go on; by a function, and by signals."""

import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
from bowl import BOWL
from test_run_folder import start, wait_for

from adamjax import cli
from adamjax.tuning import tune

pytestmark = pytest.mark.numbers

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
    """Tune, stopped after so many calls of `stop` each time; return the last report and those before."""
    stops = []
    for count in calls:
        report = tuning(out=folder, stop=after(count))
        if not report.stopped:
            return report, stops
        stops.append(report)
        assert not (folder / "report.html").exists()
        assert "facts" not in json.loads((folder / "tune.json").read_text())
        assert "the tuning was stopped" not in (folder / "tune.json").read_text()
        # Whoever looks at it meanwhile changes nothing.
        if len(stops) <= 2:
            cli.main(["report", str(folder)])
            (folder / "report.html").unlink()


def numbers(path):
    return json.loads((path / "report.json").read_text())


def test_a_tuning_of_a_problem_that_is_stopped_goes_on(tmp_path):
    tuning = partial(small, execution="vmap", halving=True)
    tuning(out=tmp_path / "whole")
    # One round needs 20 calls.
    report, stops = stopped_again_and_again(tuning, tmp_path / "stopped", itertools.repeat(33))
    assert len(stops) >= 3
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    counts = [len(r.trials) for r in stops]
    assert counts == sorted(counts)
    first = stops[1]
    assert first.warnings[0] == (
        f"the tuning was stopped with {counts[1]} of 22 trials; tune goes on with out='{tmp_path / 'stopped'}'"
    )
    assert not any("stopped" in warning for warning in report.warnings)


def test_a_tuning_of_an_objective_that_is_stopped_goes_on(tmp_path):
    tuning = partial(tune, objective, **objective_tuning)
    tuning(out=tmp_path / "whole")
    # The first is in the range test, which has 12 calls.
    _, stops = stopped_again_and_again(tuning, tmp_path / "stopped", [3, 14, *[3] * 9])
    assert len(stops) >= 4
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


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_workers_of_a_tuning_that_is_stopped_do_not_survive(tmp_path):
    endless = partial(naps, folder=tmp_path, seconds=1000)
    pool = partial(ProcessPoolExecutor, 2)  # which would fork, so an equal one is made
    report = tune(endless, executor=pool, stop=lambda: len(list(tmp_path.iterdir())) == 2, **objective_tuning)
    assert report.stopped.startswith("the tuning was stopped with 1 of 10 trials")
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_tuning_by_workers_that_is_stopped_goes_on(tmp_path):
    (tmp_path / "naps").mkdir()
    tuning = partial(tune, partial(naps, folder=tmp_path / "naps", seconds=0.05), range_test=None, **objective_tuning)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tuning(out=tmp_path / "whole", executor=pool)
        # `stop` is called whenever one worker or both have ended: at least five times for ten trials.
        _, stops = stopped_again_and_again(partial(tuning, executor=pool), tmp_path / "stopped", itertools.repeat(4))
    assert stops
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def ended(run):
    """Return what a process says that is to end soon."""
    try:
        return run.communicate(timeout=30)
    finally:
        run.kill()


MINE = """
import time
from bowl import Bowl

def endless(optimizer, trial):
    trial.report(1, 2.0)
    if trial.number:
        while True:
            time.sleep(0.1)
    return 2.0

def silent(optimizer, trial):
    open("begun", "w")
    time.sleep(1000)

def busy(optimizer, trial):
    import jax, jax.numpy as jnp
    if trial.number:
        x = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.tanh(x @ x), x))(jnp.eye(300))
        return float(x[0, 0])
    return 2.0
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("subject", [["bowl:BOWL", "--steps=20000000"], ["mine:endless"], ["mine:busy"]])
def test_signals_end_a_tuning(tmp_path, subject, number):
    (tmp_path / "mine.py").write_text(MINE)
    run = start("tune", *subject, "--trials=8", cwd=tmp_path)
    folder = tmp_path / "runs" / "tune-1"
    wait_for((folder / "tune.json").exists, run)
    if subject[0] != "bowl:BOWL":
        wait_for((folder / "trials.jsonl").exists, run)
    time.sleep(1)
    begin = time.monotonic()
    run.send_signal(number)
    said = ended(run)
    assert time.monotonic() - begin < 10
    assert run.returncode == 130, said
    assert said[1].endswith("adamjax: stopped; the same command with --out runs/tune-1 --resume goes on\n")
    assert "Traceback" not in said[1]


@pytest.mark.slow
def test_signals_end_a_range_test(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = start("lr-range", "mine:silent", cwd=tmp_path)
    wait_for((tmp_path / "begun").exists, run)
    run.send_signal(signal.SIGTERM)
    said = ended(run)
    assert run.returncode == 130, said
    assert said[1] == "adamjax: stopped\n"


@pytest.mark.slow
def test_three_tunings_at_once(tmp_path):
    runs = [
        start("tune", "bowl:BOWL", "--steps=5", "--trials=2", "--confirm", "1", "1", cwd=tmp_path) for _ in range(3)
    ]
    said = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tune-1", "tune-2", "tune-3"]
    assert all((path / "report.html").exists() for path in (tmp_path / "runs").iterdir())
