"""Objectives run side by side: by processes, by threads, by dask; and workers that die."""

import concurrent.futures
import functools
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from adamjax.tuning import process_pool, tune
from adamjax.tuning._executors import _take_part_of_the_cores

pytestmark = pytest.mark.numbers

SPAWN = multiprocessing.get_context("spawn")
small = functools.partial(tune, trials=6, confirm=(1, 2), range_test=None)


def loss(trial):
    return abs(math.log10(trial.arguments["learning_rate"] / 0.01)) + 0.01 * trial.seed


def objective(optimizer, trial):
    for epoch in range(8):
        trial.report(epoch, loss(trial) + 1 / (1 + epoch))
    return loss(trial)


class UnpicklableError(Exception):
    """An exception that pickle cannot make again."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def trains(optimizer, trial):
    """A loop that needs JAX's threads."""
    x = jnp.ones((300, 300))
    state, step = optimizer.init(x), jax.jit(optimizer.step)
    for epoch in range(8):
        x, state = step(x @ x.T / 300, state, x)
        trial.report(epoch, jnp.mean(x**2))
    return jnp.mean(x**2)


def dies(optimizer, trial, *, folder, number=2, times=99):
    """End the process in a trial, so many times; wait a little in the others, so that they share its end."""
    with open(f"{folder}/{trial.number}-{trial.seed}", "a") as file:
        file.write("x")
    with open(f"{folder}/{trial.number}-{trial.seed}") as file:
        begun = len(file.read())
    if trial.number == number and trial.seed == 0 and begun <= times:
        if number % 2:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return loss(trial)


def raises(optimizer, trial, *, number=2):
    if trial.number == number:
        raise UnpicklableError("this", "that")
    if trial.number == number + 1:
        raise ValueError("too large")
    if trial.number == number + 2:
        raise SystemExit(3)
    return loss(trial)


def stuck(optimizer, trial, *, barrier):
    barrier.wait(20)
    return loss(trial)


def cores_of_both(folder):
    """The cores of a process, once two have come here."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.05)
    return os.sched_getaffinity(0)


@pytest.fixture(scope="module")
def pool():
    with concurrent.futures.ProcessPoolExecutor(2, SPAWN) as executor:
        yield executor


class Immediately(concurrent.futures.Executor):
    """An executor that runs what is submitted at once."""

    def submit(self, f, /, *args):
        future = concurrent.futures.Future()
        future.set_result(f(*args))
        return future


class Job:
    """A future of another family."""

    def __init__(self, result):
        self._result, self._looks = result, 0

    def done(self):
        self._looks += 1
        return self._looks > 1

    def result(self):
        return self._result

    def cancel(self):
        pass


class Scheduler:
    """What resembles an executor, as those of schedulers of clusters do."""

    def submit(self, f, /, *args):
        return Job(f(*args))


@pytest.mark.parametrize("make", [Immediately, Scheduler, lambda: Immediately()])
def test_what_has_a_submit_is_an_executor(make):
    found = small(objective, trials=20, executor=make if make is not Scheduler else make(), range_test="auto")
    assert found.execution == f"side by side by a {'Scheduler' if make is Scheduler else 'Immediately'}"
    assert len(found.searched) == 20
    assert found.range_test is not None


def test_trials_run_as_many_at_once_as_there_are_workers():
    # Of the 5 trials of the round, 5 wait for each other.
    barrier = threading.Barrier(5)

    def first_passes(optimizer, trial):
        return loss(trial) if trial.number == 0 else stuck(optimizer, trial, barrier=barrier)

    with concurrent.futures.ThreadPoolExecutor(5) as executor:
        found = small(first_passes, executor=executor, confirm=None, stages=["learning_rate"])
    assert {t.status for t in found.searched} == {"complete"}


def test_settings_do_not_depend_on_timing():
    def slow(optimizer, trial):
        time.sleep(0.02 * ((trial.number * 7) % 5))
        return objective(optimizer, trial)

    slow.__module__, slow.__qualname__ = objective.__module__, objective.__qualname__
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        found = tune(slow, trials=20, executor=executor)
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        assert tune(objective, trials=20, executor=executor).to_json() == found.to_json()
    assert any(t.status == "pruned" for t in found.searched)


class Remembers(Immediately):
    """Answers a call with equal arguments by the first result, as dask does; the worker of the first call dies."""

    def __init__(self):
        self.answers = {}

    def submit(self, function, *arguments):
        call = pickle.dumps(arguments)
        if not self.answers:
            self.answers[call] = concurrent.futures.Future()
            self.answers[call].set_exception(RuntimeError("the worker died"))
        elif call not in self.answers:
            self.answers[call] = super().submit(function, *arguments)
        return self.answers[call]


def test_a_trial_that_is_tried_again_is_another_call():
    found = small(objective, executor=Remembers)
    assert {t.status for t in found.searched} <= {"complete", "pruned"}


def test_executors_are_for_objectives():
    from bowl import BOWL

    with pytest.raises(ValueError, match=r"Invalid executor value: .* trials are one program on all devices"):
        tune(BOWL, executor=Immediately())
    with pytest.raises(TypeError, match=r"Invalid executor value: .*returned None, which has no submit"):
        tune(objective, executor=lambda: None)


def test_broken_executors_that_cannot_be_made_again_end_the_tuning(tmp_path):
    class Breaks(Immediately):
        def submit(self, f, /, *args):
            if args[1].number == 3:
                raise concurrent.futures.BrokenExecutor("all workers left")
            return super().submit(f, *args)

    with pytest.raises(RuntimeError, match=r"the Breaks is broken \(all workers left\).*executor=lambda: "):
        small(objective, executor=Breaks(), out=tmp_path)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3
    assert len(small(objective, executor=Immediately, out=tmp_path).searched) == 6


@pytest.mark.slow
def test_processes(pool):
    found = tune(objective, trials=20, executor=pool, confirm=(2, 2))
    assert found.execution == "side by side by a ProcessPoolExecutor"
    assert len(found.searched) == 20
    assert len(found.confirmed) in (2, 3)
    assert found.searched[1].steps == list(range(8))
    assert small(trains, executor=pool).best
    here = tune(objective, trials=20, executor=Immediately(), confirm=(2, 2))
    assert [(t.setting, t.status, t.metrics) for t in found.trials] == [
        (t.setting, t.status, t.metrics) for t in here.trials
    ]


@pytest.mark.slow
def test_exceptions_in_workers(pool):
    found = small(raises, executor=pool)
    assert [t.status for t in found.searched] == ["complete"] * 2 + ["failed"] * 3 + ["complete"]
    assert [t.error for t in found.searched[2:5]] == [
        "UnpicklableError: this and that",
        "ValueError: too large",
        "SystemExit: 3",
    ]
    with pytest.raises(ValueError, match="too large") as caught:
        small(functools.partial(raises, number=-1), executor=pool)
    assert "in raises" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"the first trial.* failed: UnpicklableError: this and that"):
        small(functools.partial(raises, number=0), executor=pool)


@pytest.mark.slow
def test_what_cannot_be_pickled_is_named(pool):
    with pytest.raises(TypeError, match=r"the objective test_executors\..*<lambda> cannot be pickled"):
        small(lambda optimizer, trial: 0.0, executor=pool)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["instance", "forks", "factory", "process_pool"])
def test_killed_workers_of_processes(tmp_path, kind):
    number = 3 if kind == "factory" else 2
    executor = {
        "instance": lambda: concurrent.futures.ProcessPoolExecutor(2, SPAWN),
        "forks": lambda: concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")),
        "factory": lambda: lambda: concurrent.futures.ProcessPoolExecutor(2, SPAWN),
        "process_pool": lambda: process_pool(2),
    }[kind]()
    found = small(functools.partial(dies, folder=str(tmp_path), number=number), executor=executor)
    assert [t.status for t in found.searched].count("failed") == 1
    failed = found.searched[number]
    assert failed.status == "failed"
    assert failed.error.startswith("its worker gave no result: BrokenProcessPool")
    assert (tmp_path / f"{number}-0").read_text() == "xx"  # tried once more
    assert len(found.confirmed) >= 1


@pytest.mark.slow
def test_pools_that_would_fork_spawn():
    assert jnp.ones(3).sum() == 3  # JAX has threads from now on
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
        here = small(trains)
        there = small(trains, executor=executor)
    assert [t.setting for t in here.searched] == [t.setting for t in there.searched]


@pytest.mark.slow
def test_a_worker_that_dies_once_costs_nothing(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(2, SPAWN) as executor:
        found = small(functools.partial(dies, folder=str(tmp_path), times=1), executor=executor)
    assert {t.status for t in found.searched} == {"complete"}
    assert (tmp_path / "2-0").read_text() == "xx"


@pytest.mark.slow
def test_a_worker_that_dies_in_the_first_trial_ends_the_tuning(tmp_path):
    with (
        concurrent.futures.ProcessPoolExecutor(1, SPAWN) as executor,
        pytest.raises(RuntimeError, match=r"the first trial.* failed: its worker gave no result: BrokenProcessPool"),
    ):
        small(functools.partial(dies, folder=str(tmp_path), number=0), executor=executor)


@pytest.mark.slow
def test_a_process_has_its_part_of_the_cores(tmp_path):
    with process_pool(2) as executor:
        both = [executor.submit(cores_of_both, tmp_path) for _ in range(2)]
        first, second = (future.result(timeout=120) for future in both)
    everything = os.sched_getaffinity(0)
    assert first | second == everything
    assert len(first) + len(second) == max(len(everything), 2)


def test_more_processes_than_cores_share_them(monkeypatch):
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    for workers in (1, 2, 5):
        started = SPAWN.Value("i", 0)
        for _ in range(workers):
            _take_part_of_the_cores(started, workers)
    assert bound == [[4, 5, 7], [4, 7], [5], [4], [5], [7], [4], [5]]


@pytest.mark.slow
def test_dask(tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor(retries=0)
        found = small(objective, trials=12, executor=executor)
        assert {t.status for t in found.searched} <= {"complete", "pruned"}
        found = small(functools.partial(dies, folder=str(tmp_path)), executor=executor)
        assert [t.status for t in found.searched].count("failed") == 1
        assert found.searched[2].error.startswith("its worker gave no result: KilledWorker")


@pytest.mark.slow
def test_what_dask_cannot_pickle_is_named():
    distributed = pytest.importorskip("distributed")
    lock = threading.Lock()

    def locked(optimizer, trial):
        with lock:
            return 0.0

    with (
        distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        pytest.raises(TypeError, match=r"the objective .*locked cannot be pickled"),
    ):
        small(locked, executor=client.get_executor(retries=0))
