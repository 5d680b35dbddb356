"""The search by an Optuna sampler: all arguments at once, in batches of ask and tell."""

import math
import warnings
from typing import Any

from adamjax._core.optional import require
from adamjax.tuning._space import Choice, Linear, OneMinus, Range, Setting, Space
from adamjax.tuning._strategy import Batch, Strategy


def study_of(sampler: Any, storage: Any, name: str, *, mode: str, seed: int) -> Any:
    """The study that `sampler` stands for: itself, or that of a sampler, or of the name of one.

    Raises:
      ImportError: Optuna is not installed.
      ValueError: Optuna has no sampler of that name or cannot open the storage, or a study is of the other
        direction or comes with a storage.
    """
    optuna = require("optuna", "tune", "searching by Optuna's samplers")
    direction = optuna.study.StudyDirection.MINIMIZE if mode == "min" else optuna.study.StudyDirection.MAXIMIZE
    if isinstance(sampler, optuna.study.Study):
        if sampler.directions != [direction]:
            raise ValueError(
                f"Invalid sampler value: the study's directions are {sampler.directions}, mode is {mode!r}"
            )
        if storage is not None:
            raise ValueError("Invalid storage value: a study has its own storage; leave storage out")
        return sampler
    if isinstance(sampler, str):
        _, _, kind = sampler.partition(":")
        make = getattr(optuna.samplers, kind or "TPESampler", None)
        if not (isinstance(make, type) and issubclass(make, optuna.samplers.BaseSampler)):
            raise ValueError(f"Invalid sampler value: {sampler!r}; Optuna has no sampler {kind}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Within a batch, each point should know of those that were asked for before it.
            sampler = make(seed=seed, **{"constant_liar": True} if kind in ("", "TPESampler") else {})
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        raise ValueError(
            f"Invalid sampler value: {sampler!r}; sampler must be a name, or a sampler or study of Optuna's"
        )
    try:
        return optuna.create_study(
            sampler=sampler, storage=storage, study_name=name, direction=direction, load_if_exists=True
        )
    except Exception as error:  # of the database's driver
        reason, *_ = str(error).split("\n")
        raise ValueError(f"Invalid storage value: {storage!r}; {reason}") from error


def by_optuna(space: Space, defaults: Setting, study: Any, *, trials: int, batch: int) -> Strategy:
    """The defaults, then `trials` settings that the study asks for, `batch` at a time.

    A trial that diverged is told as failed, NaN or infinite alike; one that was ended early as
    pruned. The defaults are not told: they may lie outside the space.
    """
    optuna = require("optuna", "tune", "searching by Optuna's samplers")
    states = optuna.trial.TrialState
    distributions = {name: _distribution(optuna, space.ranges[name]) for name in space.free}
    first = [defaults]
    while trials or first:
        asked = [study.ask(distributions) for _ in range(min(trials, batch))]
        trials -= len(asked)
        settings = [_setting(space, trial.params) for trial in asked]
        results = yield Batch("optuna", [*first, *settings], space)
        for trial, result in zip(asked, results[len(first) :], strict=True):
            if math.isfinite(result.score):
                study.tell(trial, result.value)
            elif result.pruned_at:
                trial.report(result.value, result.pruned_at)
                study.tell(trial, state=states.PRUNED)
            else:
                study.tell(trial, state=states.FAIL)
        first = []


def _distribution(optuna: Any, r: Range) -> Any:
    if isinstance(r, OneMinus):
        return _distribution(optuna, r.complement)
    if isinstance(r, Choice):
        return optuna.distributions.CategoricalDistribution([repr(x) for x in r.options])
    return optuna.distributions.FloatDistribution(r.low, r.high, log=not isinstance(r, Linear))


def _setting(space: Space, params: dict[str, Any]) -> Setting:
    """What Optuna chose: complements and names of options, as the arguments they stand for."""
    setting = space.at({})
    for name, x in params.items():
        r = space.ranges[name]
        if isinstance(r, Choice):
            setting[name] = next(option for option in r.options if repr(option) == x)
        else:
            setting[name] = 1 - x if isinstance(r, OneMinus) else x
    return setting
