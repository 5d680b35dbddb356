"""The search by an Optuna sampler: all arguments at once, by ask and tell."""

import math
import warnings
from typing import Any

from adamjax._core.optional import require
from adamjax.tuning._space import Choice, Linear, OneMinus, Range, Setting, Space
from adamjax.tuning._strategy import Result, Round, Strategy

# Optuna is an optional dependency, so its types are not named here.
Sampler = Any  # a name, or Optuna's sampler or study
Storage = Any  # a URL, one of Optuna's storages, or None
Study = Any
PURPOSE = "searching by Optuna's samplers"


def open_study(sampler: Sampler, storage: Storage, name: str, *, mode: str, seed: int) -> Study:
    """Return `sampler` if it is a study; else open a study with that sampler, or with the sampler of that name."""
    optuna = require("optuna", "tune", PURPOSE)
    direction = optuna.study.StudyDirection.MINIMIZE if mode == "min" else optuna.study.StudyDirection.MAXIMIZE
    if isinstance(sampler, optuna.study.Study):
        if sampler.directions != [direction]:
            directions = f"the study's directions are {sampler.directions}"
            raise ValueError(f"Invalid sampler value: {directions}, mode is {mode!r}")
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
            # The points of a round should take into account those that were asked for before them.
            sampler = make(seed=seed, **{"constant_liar": True} if kind in ("", "TPESampler") else {})
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        raise ValueError(f"Invalid sampler value: {sampler!r}; sampler must be a name, or an Optuna sampler or study")
    try:
        place = {"storage": storage, "study_name": name, "load_if_exists": True}
        return optuna.create_study(sampler=sampler, direction=direction, **place)
    except Exception as error:  # each database driver has its own
        reason, *_ = str(error).split("\n")
        raise ValueError(f"Invalid storage value: {storage!r}; {reason}") from error


def optuna_search(space: Space, defaults: Setting, study: Study, *, trials: int, at_once: int) -> Strategy:
    """Try the defaults, then `trials` settings that the study proposes, `at_once` in each round.

    The study is told that a trial failed if its value is NaN or infinite, and that a trial that ended early was
    pruned. It is not told the result of the defaults, which may lie outside the space. Rounds at the end may be empty:
    they wait for results that are not known yet.
    """
    optuna = require("optuna", "tune", PURPOSE)
    distributions = {name: _distribution(space.ranges[name]) for name in space.free}
    settings = [defaults]
    untold: dict[int, Any] = {}  # trials of the study, by the number of the setting
    asked = 0
    while True:
        for number in range(asked + 1, asked + 1 + min(trials - asked, at_once)):
            untold[number] = trial = study.ask(distributions)
            settings.append(_setting(space, trial.params))
        asked += min(trials - asked, at_once)
        results = yield Round("optuna", settings, space)
        for number in [n for n in untold if not math.isnan(results[n].score)]:
            _tell(optuna, study, untold.pop(number), results[number])
        settings = []
        if asked == trials and not untold:
            return


def _tell(optuna: Any, study: Study, trial: Any, result: Result) -> None:
    states = optuna.trial.TrialState
    if math.isfinite(result.score):
        study.tell(trial, result.value)
    elif result.pruned_at is not None:
        if not math.isnan(result.value):
            trial.report(result.value, result.pruned_at)
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, state=states.FAIL)


def _distribution(r: Range) -> Any:
    distributions = require("optuna.distributions", "tune", PURPOSE)
    if isinstance(r, OneMinus):
        return _distribution(r.complement)
    if isinstance(r, Choice):
        return distributions.CategoricalDistribution([repr(x) for x in r.options])
    return distributions.FloatDistribution(r.low, r.high, log=not isinstance(r, Linear))


def _setting(space: Space, params: Setting) -> Setting:
    """Convert Optuna's parameters, complements and names of options, to arguments of the optimizer."""
    setting = space.at({})
    for name, x in params.items():
        r = space.ranges[name]
        if isinstance(r, Choice):
            setting[name] = next(option for option in r.options if repr(option) == x)
        else:
            setting[name] = 1 - x if isinstance(r, OneMinus) else x
    return setting
