"""The searches that `bench_tune` compares: each proposes settings of Adam, and is told their losses.

All search the same ranges: the peak of the learning rate, b1, b2, weight decay, the warmup as a fraction of the steps,
and the end of the cosine after it as a fraction of the peak. AMSGrad stays off.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from adamjax._core.optional import require
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning import Search, Space, lr_range_test
from adamjax.tuning._courses import OWN, Scheduled
from adamjax.tuning._learned import TABLE, learned_settings
from adamjax.tuning._model_search import MANY, model_search, round_size
from adamjax.tuning._range_test import range_test_steps
from adamjax.tuning._space import Linear, Log, OneMinus, Setting
from adamjax.tuning._spec import RACE
from adamjax.tuning._strategy import RANGES, Result, Strategy
from benchmarks._lists import ALGOPERF, OPT_LIST

OPTIMIZER = partial(adamw, amsgrad=False)
SPACE = Space.of({name: r for name, r in RANGES.items() if name not in ("eps", "amsgrad")})
DEFAULTS: Setting = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4}
BUDGETS = (16, 64)
SECOND = 1 + max(seeds for _, seeds in RACE)  # the distance from the first seed of a search to the second
POINTS = (0.25, 0.5, 1.0)  # fractions of a run after which its loss is known

Run = tuple[Setting, int]  # a setting and a seed
# Proposes runs, and is sent their losses: float[runs, points], infinite from where a run diverged on.
Proposals = Generator[list[Run], np.ndarray, None]


class Question(NamedTuple):
    """A problem, the number of its steps, the seed of the search, and the number of trials."""

    problem: Problem
    steps: int
    seed: int
    trials: int


class Method(NamedTuple):
    """A way to choose a setting.

    Fields:
      propose: Makes the search of a question.
      confirm: How many of the best go on, and with how many fresh seeds so far, in each round; empty to take the best
        of the search.
      budgets: The numbers of trials to compare at.
      plans: Whether a search depends on its number of trials; else its first 16 trials are those of 64.
    """

    propose: Callable[[Question], Proposals]
    confirm: Sequence[tuple[int, int]] = RACE
    budgets: Sequence[int] = BUDGETS
    plans: bool = False


def tuned(question: Question, *, tests: bool = True, halves: bool = False, how: Mapping[str, Any]) -> Proposals:
    """Search as `tune` does. Its range test counts as a trial; a search that halves has twice the trials."""
    problem, steps, seed, trials = question
    range_test = None
    if tests:
        range_test = lr_range_test(problem, num_steps=range_test_steps(steps), optimizer=OPTIMIZER, seed=seed)
    trials = (2 if halves else 1) * (trials - tests)
    search = Search(
        problem=problem,
        optimizer=OPTIMIZER,
        trials=trials,
        steps=steps,
        range_test=range_test,
        seed=seed,
        **how,
    )
    while (asked := search.ask_round()) and asked[0].stage != "confirm":
        losses = yield [(trial.arguments, trial.seed) for trial in asked]
        ends = _halved(losses) if halves else losses[:, -1]
        for trial, loss in zip(asked, ends, strict=True):
            search.tell(trial, "pruned" if math.isnan(loss) else float(loss) if math.isfinite(loss) else None)


def _halved(losses: np.ndarray) -> np.ndarray:
    """Return the losses at the end; NaN for runs that successive halving ends after a quarter or a half."""
    left = np.arange(len(losses))
    for point in range(len(POINTS) - 1):
        left = left[np.argsort(losses[left, point], kind="stable")[: -(-len(left) // 2)]]
    return np.where(np.isin(np.arange(len(losses)), left), losses[:, -1], math.nan)


def modelled(
    question: Question, *, table: Sequence[tuple[float, ...]] = TABLE, second_seed_from: int = MANY
) -> Proposals:
    """Search by the list and the model, without a range test."""
    strategy = model_search(
        SPACE,
        DEFAULTS | OWN,
        trials=question.trials - 1,
        at_once=round_size(question.trials),
        seed=question.seed,
        valid=_is_valid,
        table=table,
        second_seed_from=second_seed_from,
    )
    return _followed(strategy, question.seed)


def _followed(strategy: Strategy, seed: int) -> Proposals:
    done = list[Result]()
    try:
        asked = next(strategy)
        while True:
            losses = (yield [(setting, seed + SECOND * asked.seed) for setting in asked.settings])[:, -1].tolist()
            done += [Result(x, y, y, None, asked.seed) for x, y in zip(asked.settings, losses, strict=True)]
            asked = strategy.send(done)
    except StopIteration:
        return


def _is_valid(setting: Setting) -> bool:
    try:
        Scheduled(OPTIMIZER, "cosine", 100)(**setting)
    except (TypeError, ValueError):
        return False
    return True


def listed(settings: Sequence[Setting]) -> Callable[[Question], Proposals]:
    """Return a search that tries settings in their order."""

    def propose(question: Question) -> Proposals:
        yield [(setting, question.seed) for setting in settings[: question.trials]]

    return propose


def points(question: Question, method: str) -> Proposals:
    """Try random or Halton's points."""
    found = SPACE.points(question.trials, method=method, seed=question.seed)
    yield [(setting, question.seed) for setting in found]


def list_then_random(question: Question, share: float) -> Proposals:
    """Try the learned list for a share of the trials, then random settings."""
    fill = SPACE.points(max(question.trials, len(TABLE)), method="random", seed=question.seed)
    found = (learned_settings(SPACE, fill)[: round(share * question.trials)] + fill)[: question.trials]
    yield [(setting, question.seed) for setting in found]


def by_optuna(question: Question, make: Callable[[Any, int], Any]) -> Proposals:
    """Search by a sampler of Optuna, one setting after another, by the logarithm of the loss."""
    optuna = require("optuna", "tune", "comparing with Optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=make(optuna.samplers, question.seed))
    distributions = {
        name: optuna.distributions.FloatDistribution(r.low, r.high, log=isinstance(r, Log))
        for name, r in _plain_ranges().items()
    }
    for _ in range(question.trials):
        trial = study.ask(distributions)
        losses = yield [(_setting(trial.params), question.seed)]
        loss = losses[0, -1]
        if math.isfinite(loss):
            study.tell(trial, math.log(loss))
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)


def by_vizier(question: Question) -> Proposals:
    """Search by google-vizier's Gaussian process, four settings at once, by the logarithm of the loss."""
    import jax
    from vizier import algorithms
    from vizier._src.algorithms.designers.gp_ucb_pe import VizierGPUCBPEBandit
    from vizier.service import pyvizier as vz

    statement = vz.ProblemStatement()
    for name, r in _plain_ranges().items():
        scale = vz.ScaleType.LOG if isinstance(r, Log) else vz.ScaleType.LINEAR
        statement.search_space.root.add_float_param(name, r.low, r.high, scale_type=scale)
    goal = vz.ObjectiveMetricGoal.MINIMIZE
    statement.metric_information.append(vz.MetricInformation(name="loss", goal=goal))
    designer = VizierGPUCBPEBandit(statement, rng=jax.random.PRNGKey(question.seed))
    for first in range(0, question.trials, 4):
        trials = [x.to_trial(first + i + 1) for i, x in enumerate(designer.suggest(4))]
        losses = yield [(_setting(trial.parameters.as_dict()), question.seed) for trial in trials]
        for trial, loss in zip(trials, losses[:, -1], strict=True):
            if math.isfinite(loss):
                trial.complete(vz.Measurement(metrics={"loss": math.log(loss)}))
            else:
                trial.complete(vz.Measurement(), infeasibility_reason="it diverged")
        designer.update(algorithms.CompletedTrials(trials), algorithms.ActiveTrials())


def _plain_ranges() -> dict[str, Log | Linear]:
    """Return the ranges by the names of what is varied: of 1 - b1 in place of b1."""
    ranges: dict[str, Log | Linear] = {}
    for name, r in SPACE.ranges.items():
        if isinstance(r, OneMinus):
            ranges[f"one_minus_{name}"] = r.complement
        elif isinstance(r, Log | Linear):
            ranges[name] = r
    return ranges


def _setting(values: Mapping[str, Any]) -> Setting:
    return {
        n.removeprefix("one_minus_"): 1 - float(x) if n.startswith("one_minus_") else float(x)
        for n, x in values.items()
    }


RIVALS: dict[str, Method] = {
    "defaults": Method(listed([DEFAULTS]), (), (1,)),
    "random": Method(partial(points, method="random")),
    "Halton": Method(partial(points, method="halton")),
    "Optuna, TPE": Method(partial(by_optuna, make=lambda s, seed: s.TPESampler(seed=seed))),
    "Optuna, GP": Method(partial(by_optuna, make=lambda s, seed: s.GPSampler(seed=seed))),
    "OptList": Method(listed(OPT_LIST)),
    "AlgoPerf's list": Method(listed(ALGOPERF), budgets=(4,)),
}
OURS: dict[str, Method] = {"tune": Method(partial(tuned, how={}), plans=True)}
ABLATIONS: dict[str, Method] = {
    "constant rate": Method(partial(tuned, how={"schedule": "constant"}), plans=True),
    "no range test": Method(partial(tuned, tests=False, how={}), plans=True),
    "no range test, no list": Method(partial(modelled, table=()), plans=True),
    "no range test, one seed": Method(partial(modelled, second_seed_from=1000), plans=True),
    "list alone": Method(partial(list_then_random, share=1.0), plans=True),
    "list, then random": Method(partial(list_then_random, share=0.25), plans=True),
    "halving, twice the trials": Method(partial(tuned, halves=True, how={}), plans=True),
    "5 best, 3 seeds": Method(partial(tuned, how={}), ((5, 3),), plans=True),
    "not confirmed": Method(partial(tuned, how={}), (), plans=True),
    "stages, constant rate, 5 best, 3 seeds": Method(
        partial(tuned, how={"schedule": "constant", "sampler": "halton"}), ((5, 3),), plans=True
    ),
}
OPTIONAL: dict[str, Method] = {"google-vizier": Method(by_vizier, budgets=(16,))}
METHODS = OURS | RIVALS | ABLATIONS | OPTIONAL
