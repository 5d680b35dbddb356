"""Objectives: training loops that are functions of an optimizer and a trial."""

import inspect
import math
import pickle
import traceback
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

from adamjax.tuning._journal import DEFAULTS, Candidate
from adamjax.tuning._space import OptimizerFactory, Setting
from adamjax.tuning._stop import Check, go_on
from adamjax.tuning._sweep import make_optimizer
from adamjax.tuning._trial import PRUNED, Pruned, Trial, Value, as_metrics

Objective = Callable[[Any, Trial], Value]  # called with the optimizer and the trial

RANGE_TEST = "range test"  # name of a stage


class Outcome(NamedTuple):
    """What became of a trial: as in `Search.tell`, and the exception that ended it, if there was one."""

    trial: Trial
    value: Value
    error: str = ""
    exception: BaseException | None = None
    traceback: str = ""
    died: bool = False  # whether its worker died, rather than the objective raised


# Calls the objective for trials, and returns their outcomes as they come.
RunTrials = Callable[[Iterable[Trial]], Generator[Outcome, None, None]]


def check_objective(objective: Objective) -> None:
    """Check that a function can be called as `objective(optimizer, trial)`."""
    if not callable(objective):
        raise TypeError(f"Invalid problem value: {objective!r}; problem must be a problem, or an objective, a function")
    if isinstance(objective, type):
        raise TypeError(f"{objective.__name__} is a class, and no objective: an objective is a function")
    try:
        signature = inspect.signature(objective)
    except ValueError:  # a builtin that does not say
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(objective, "__qualname__", repr(objective))
        raise TypeError(
            f"{name}{signature} is not an objective ({error}): it is called as objective(optimizer, trial); "
            "bind further arguments by functools.partial"
        ) from None


def call_objective(objective: Objective, trial: Trial) -> Outcome:
    """Call an objective; an exception becomes the outcome of a failed trial."""
    try:
        value = objective(trial.optimizer, trial)
        return Outcome(trial, as_metrics(value, trial.metric, "the value that the objective returned"))
    except Pruned:
        return Outcome(trial, PRUNED)
    except Exception as error:
        return Outcome(trial, None, describe(error), error)


def call_remotely(objective: Objective, trial: Trial, call: str) -> Outcome:
    """Call an objective in another process: the outcome can be pickled, even if the exception cannot.

    Each `call` has a name of its own, because dask answers a call with equal arguments by the result of the first.
    """
    try:
        outcome = call_objective(objective, trial)
    except SystemExit as error:
        outcome = Outcome(trial, None, describe(error), error)
    if outcome.exception is None:
        return outcome
    text = "".join(traceback.format_exception(outcome.exception))
    try:
        pickle.loads(pickle.dumps(outcome.exception))
    except Exception:
        outcome = outcome._replace(exception=None)
    return outcome._replace(traceback=text)


def describe(error: BaseException) -> str:
    """Return the type and the text of an exception."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def run_here(objective: Objective, trials: Iterable[Trial], *, check: Check = go_on) -> Generator[Outcome, None, None]:
    """Run trials one after another in this process."""
    for trial in trials:
        check()
        yield call_objective(objective, trial)


def check_first(outcome: Outcome) -> None:
    """Raise the error of a trial of the defaults: the others would most likely fail like it."""
    record = outcome.trial.record(outcome.value, outcome.error)
    if record.stage != DEFAULTS or record.status != "failed":
        return
    if outcome.exception is not None and outcome.traceback:
        raise outcome.exception from RuntimeError(f"in the process that ran the first trial:\n{outcome.traceback}")
    if outcome.exception is not None:
        raise outcome.exception
    if outcome.died or outcome.traceback:
        text = f"the first trial, that of the defaults, failed: {record.error}\n{outcome.traceback}"
        raise RuntimeError(text.rstrip())
    raise ValueError(
        f"the first trial, that of the defaults {record.setting}, failed: {record.error}. Give defaults that train, "
        "such as optimizer=functools.partial(adamjax.adamw, learning_rate=1e-4), or look for NaN in the loop, or "
        "(if the losses are finite) in how the metric is computed"
    )


def first_losses(
    run: RunTrials, optimizer: OptimizerFactory, rates: Iterable[float], *, facts: dict[str, Any], seed: int
) -> list[float]:
    """Return the first value that an objective reports with each learning rate, or else returns; NaN if it fails.

    If higher values are better, they are negated. `facts` are arguments of `Trial`.
    """
    losses = {}
    trials = list[Trial]()
    for rate in rates:
        setting: Setting = {"learning_rate": float(rate)}
        opt = make_optimizer(optimizer, setting, -1)
        trials.append(Trial(Candidate(-1, RANGE_TEST, setting, seed), opt, **facts, first_only=True))
    for trial, value, *_ in run(trials):
        first = trial.first_report()
        if math.isnan(first) and isinstance(value, dict):
            first = value[trial.metric]
        losses[trial.arguments["learning_rate"]] = first if trial.mode == "min" else -first
    return [losses[trial.arguments["learning_rate"]] for trial in trials]
