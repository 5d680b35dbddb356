"""Trials side by side: objectives run by the workers of an executor."""

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import partial
from typing import Any

from adamjax._core import checks
from adamjax.tuning._objective import Objective, Outcome, call_remotely, describe
from adamjax.tuning._spec import optimizer_name
from adamjax.tuning._stop import Check, go_on
from adamjax.tuning._trial import Trial

Executor = Any  # a concurrent.futures.Executor, what resembles one, or a function that makes one
POLL_SECONDS = 0.1  # between looks at futures, and at whether to stop
END_SECONDS = 2  # that worker processes have to end


class Workers(contextlib.AbstractContextManager["Workers"]):
    """Runs trials of an objective by an executor, which is made again when it breaks.

    Executors that this made are shut down at the end, others are left to their owner. Trials that still run then,
    because the tuning was stopped or failed, are not waited for: processes of a pool that this made are ended. Instead
    of a process pool that would fork, an equal one that spawns is used: JAX has threads, which hang in processes that
    are forked.
    """

    def __init__(self, executor: Executor, objective: Objective, check: Check = go_on) -> None:
        self._objective, self._check = objective, check
        self._running = dict[Any, Trial]()
        is_factory = isinstance(executor, type) or not hasattr(executor, "submit")
        self._make: Callable[[], Any] | None = executor if is_factory else _maker_of_equals(executor)
        self._executor, self._own = (executor(), True) if is_factory else (executor, False)
        if _would_fork(self._executor):
            self._make = _maker_of_equals(self._executor)
            self._executor, self._own = _equal_pool(self._executor), True
        if not hasattr(self._executor, "submit"):
            raise TypeError(f"Invalid executor value: {executor!r} returned {self._executor!r}, which has no submit")
        if isinstance(self._executor, ProcessPoolExecutor):
            self._check_pickled("objective", objective)

    @property
    def name(self) -> str:
        return type(self._executor).__name__

    def __exit__(self, *_: object) -> None:
        if not self._own or not hasattr(self._executor, "shutdown"):
            return
        if all(future.done() for future in self._running):
            self._executor.shutdown()
        else:
            workers = list((getattr(self._executor, "_processes", None) or {}).values())
            self._executor.shutdown(wait=False)
            _end(workers)

    def run(self, trials: Iterable[Trial]) -> Generator[Outcome, None, None]:
        """Run trials side by side; yield their outcomes as they come.

        A trial whose worker died is tried once more after the others, alone: the death of a worker of a process pool
        takes trials with it that have no part in it. If its worker dies again, it has failed.
        """
        waiting, running, died = deque(trials), self._running, list[Trial]()
        room = getattr(self._executor, "_max_workers", None) or len(waiting)
        try:
            while waiting or running:
                self._check()
                while waiting and len(running) < room:
                    try:
                        running[self._submit(waiting[0])] = waiting[0]
                    except Exception:
                        if not running:
                            raise
                        break  # results first: they are lost if the tuning ends here
                    waiting.popleft()
                for future in self._wait_for_one(running):
                    trial = running.pop(future)
                    outcome = self._outcome(future, trial)
                    if outcome.died:
                        died.append(trial)
                    else:
                        yield outcome
            for trial in died:
                self._check()
                future = self._submit(trial)
                running[future] = trial
                self._wait_for_one(running)
                yield self._outcome(running.popitem()[0], trial)
        finally:
            for future in running:
                future.cancel()

    def _wait_for_one(self, futures: Iterable[Any]) -> list[Any]:
        """Wait until at least one of the futures is done; return those that are.

        Raises:
          Stopped: The check says so meanwhile.
        """
        while not (done := _done_soon(list(futures))):
            self._check()
        return done

    def _submit(self, trial: Trial) -> Any:
        call = call_remotely, self._objective, trial, uuid.uuid4().hex
        try:
            return self._executor.submit(*call)
        except (pickle.PicklingError, AttributeError, TypeError):
            self._check_all_pickled(trial)
            raise
        except BrokenExecutor as error:
            if self._make is None:
                raise RuntimeError(
                    f"the {self.name} is broken ({error}), and how to make another is unknown: pass a function that "
                    "makes it, executor=lambda: ...; a tuning with a folder goes on where it ended"
                ) from error
            if self._own:
                self._executor.shutdown(wait=False)
            self._executor, self._own = self._make(), True
            return self._executor.submit(*call)

    def _outcome(self, future: Any, trial: Trial) -> Outcome:
        """Return the outcome of a future; if the executor failed, one of the trial as it was."""
        try:
            outcome: Outcome = future.result()
        except (Exception, asyncio.CancelledError) as error:  # which dask raises
            if isinstance(error, (pickle.PicklingError, AttributeError, TypeError)):
                self._check_all_pickled(trial)
            return Outcome(trial, None, f"its worker gave no result: {describe(error)}", died=True)
        return outcome

    def _check_all_pickled(self, trial: Trial) -> None:
        self._check_pickled("objective", self._objective)
        self._check_pickled("optimizer", trial._optimizer)

    def _check_pickled(self, what: str, x: object) -> None:
        try:
            pickle.dumps(x)
        except Exception as error:
            name = optimizer_name(x) if callable(x) else repr(x)
            raise TypeError(
                f"the {what} {name} cannot be pickled, so no other process can run it ({describe(error)}): define it, "
                "and what it holds, at the top level of a module"
            ) from error


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Make a pool of processes for `tune`, each with its part of this machine's cores.

    JAX starts threads, so the processes are spawned, not forked: the objective has to be importable, and a script needs
    `if __name__ == "__main__":`. Where the system can bind a process to cores (Linux), XLA takes as many threads as its
    process has cores. All processes see all accelerators, and each reserves most of their memory: set
    `XLA_PYTHON_CLIENT_PREALLOCATE=false` before, or, for one accelerator each, use a `ProcessPoolExecutor` whose
    `initializer` sets `CUDA_VISIBLE_DEVICES`.

    Args:
      workers: Number of processes.

    Returns:
      An executor.

    Raises:
      ValueError: `workers` is less than 1.
      TypeError: `workers` is not an int.

    >>> from adamjax.tuning import process_pool
    >>> with process_pool(2) as executor:  # tune(objective, executor=executor)
    ...     pass
    """
    workers = checks.count("workers", workers)
    context = multiprocessing.get_context("spawn")
    arguments = (context.Value("i", 0), workers)
    return ProcessPoolExecutor(workers, context, initializer=_take_part_of_the_cores, initargs=arguments)


def _take_part_of_the_cores(started: Any, workers: int) -> None:
    """Bind this process, one of `workers`, to its part of the cores."""
    with started.get_lock():
        number = started.value % workers
        started.value += 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        # With more processes than cores, some share one.
        os.sched_setaffinity(0, cores[number % len(cores) :: workers])


def _would_fork(executor: Executor) -> bool:
    """Return whether an executor is a pool that has not started its processes, and would fork them."""
    if type(executor) is not ProcessPoolExecutor:
        return False
    pool: Any = executor
    return not pool._processes and pool._mp_context.get_start_method() == "fork"


def _maker_of_equals(executor: Executor) -> Callable[[], ProcessPoolExecutor] | None:
    """Return a function that makes a process pool like `executor`; None for other executors."""
    return partial(_equal_pool, executor) if type(executor) is ProcessPoolExecutor else None


def _equal_pool(pool: Any) -> ProcessPoolExecutor:
    """Make a process pool with the arguments of another one; it spawns its processes where that one forks them."""
    context = pool._mp_context
    if context.get_start_method() == "fork":
        context = multiprocessing.get_context("spawn")
    limit = pool._max_tasks_per_child
    return ProcessPoolExecutor(pool._max_workers, context, pool._initializer, pool._initargs, max_tasks_per_child=limit)


def _done_soon(futures: list[Any]) -> list[Any]:
    """Return the futures that are done; wait a moment for one if there are none."""
    if all(isinstance(f, Future) for f in futures):
        return list(wait(futures, POLL_SECONDS, FIRST_COMPLETED).done)
    if not (done := [f for f in futures if f.done()]):
        time.sleep(POLL_SECONDS)
    return done


def _end(workers: list[Any]) -> None:
    """End processes, and wait for them: those that do not end when asked, as some in native code, are killed."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(END_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
