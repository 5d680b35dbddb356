"""The tuning strategy: stage after stage, then the best few and the defaults again with fresh seeds."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning import _question, _range_test
from adamjax.tuning._optuna import by_optuna, study_of
from adamjax.tuning._population import Runner
from adamjax.tuning._range_test import LrRange, lr_range_test
from adamjax.tuning._report import Report
from adamjax.tuning._runs import Runs
from adamjax.tuning._space import Log, Setting, Space, printed
from adamjax.tuning._strategy import FEWEST, RANGES, Strategy, plan, staged
from adamjax.tuning._sweep import bar_of, direction, make, marks_of
from adamjax.tuning._trial import Journal, plain

POINTS = 20  # of a learning curve
MARGIN = 3.0  # beyond the band of a range test, how far the learning rate is searched
SAMPLERS = ("halton", "sobol", "random")


def tune(
    problem: Problem,
    *,
    trials: int = 64,
    steps: int = 300,
    optimizer: Callable[..., Any] = adamw,
    space: Space | None = None,
    stages: _question.Stages = "adam",
    sampler: Any = "halton",
    storage: Any = None,
    confirm: Sequence[int] | None = (5, 3),
    halving: bool | str = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    metric: str = "loss",
    mode: str | None = None,
    seed: int = 0,
    execution: str = "auto",
    mesh: Mesh | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Report:
    """Find good hyperparameters of Adam by validation performance, and say how sure that is.

    The defaults are tried first. A range test says where to look for the learning rate; then come
    stages of trials, each of which varies a few arguments around the best so far, the learning
    rate always among them, since the best one depends on all others: the learning rate, twice; b1
    (and b2, from 48 trials on); eps, of problems in half precision; weight decay; all together;
    AMSGrad, on the best settings. After a stage its ranges narrow to where the best lie, or, where
    the very best lies on the edge of a logarithmic range, move beyond it. At the end the best few
    and the defaults are trained again with fresh seeds, and that decides.

    Args:
      problem: What to train.
      trials: Settings to try, the defaults included; runs that confirm come on top.
      steps: Updates of each run.
      optimizer: Called with a setting, returns the optimizer; see `sweep`.
      space: What to search instead: ranges by the names of the optimizer's arguments. All others
        keep the defaults that `optimizer` has for them. None for those of Adam's hyperparameters
        that `optimizer` has.
      stages: "adam", as above; arguments of `space` that Adam has not get stages of their own. Or
        the arguments to vary in each stage, one name or several: ["learning_rate", ("b1", "eps")].
      sampler: "halton", "sobol" or "random" points in each stage. Or Optuna: "optuna" for its TPE
        sampler, "optuna:CmaEsSampler" for another, an `optuna.Study`; it searches all arguments at
        once.
      storage: Where Optuna keeps its study: a URL or one of its storages, for several machines to
        share. None for memory.
      confirm: How many of the best to confirm, with how many fresh seeds each; None not to.
      halving: Whether half of each batch ends after a quarter of its steps, and half of the rest
        after half of them, those that go on in smaller programs. "auto": where the time of a few
        steps says that it saves more than it costs to compile those, which a busy machine may see
        otherwise the next time.
      out: Folder for the report, and for each trial as soon as it ends; None to write nothing.
      resume: Whether to go on where the folder ends; the result is that of a run that was never
        interrupted (unless other machines share the study). Else a folder that holds a tuning is
        refused.
      metric: Which of the problem's metrics settings are judged by, at the end of a run.
      mode: "min" or "max": which is better. None for "min" of the loss; of other metrics it must be given.
      seed: Of the search; the fresh seeds are those after it.
      execution, mesh, memory, progress: See `sweep`.

    Returns:
      A `Report`; where `out` is given, it is saved there.

    Raises:
      ValueError: An argument is out of range, the problem does not return `metric`, `mode` does not say
        which of it is better, Optuna refuses the storage, or the folder holds another tuning.
      TypeError: `problem` is not a `Problem`, `mesh` no mesh, or `optimizer` does not take a setting.
      FileExistsError: The folder holds a tuning, and `resume` is False.
      ImportError: Something that the extra `tune` brings is not installed.

    References:
      Godbole et al., 2023, Deep Learning Tuning Playbook; Jamieson & Talwalkar, 2016,
      https://arxiv.org/abs/1502.07943 (successive halving).

    >>> import adamjax
    >>> from adamjax.tuning import tune
    >>> report = tune(adamjax.problems.digits(), trials=8, steps=50, confirm=None)
    >>> report.best.optimizer == adamjax.adamw(**report.best.arguments)
    True
    """
    trials, steps, seed = checks.count("trials", trials), checks.count("steps", steps), checks.count("seed", seed, 0)
    checks.choice("halving", halving, (True, False, "auto"))
    checks.choice("resume", resume, (False, True))
    checks.choice("progress", progress, (False, True))
    checks.function("optimizer", optimizer)
    confirm = _confirm(confirm)
    if seed + (confirm[1] if confirm else 0) >= 2**31:
        raise ValueError(f"Invalid seed value: {seed}; seed, and those after it that confirm, must be below 2**31")
    _check_sampler(sampler, storage)
    if out is not None:
        for module in ("matplotlib", "sklearn"):
            require(module, "tune", "the report")
    runner = Runner(problem, metric, execution=execution, mesh=mesh, memory=memory)
    mode = direction(metric, mode)
    searched = _question.space_of(optimizer, space, stages, half=_question.is_half(problem))
    defaults = _question.defaults_of(optimizer, searched)
    make(optimizer, defaults, 0)
    question = {
        "problem": _question.name_of_problem(problem),
        "parameters": _question.parameters_of(problem),
        "optimizer": _question.name_of(optimizer),
        "space": printed(searched),
        "stages": stages if isinstance(stages, str) else [[s] if isinstance(s, str) else list(s) for s in stages],
        "sampler": sampler if isinstance(sampler, str) else type(sampler).__name__,
        "trials": trials,
        "steps": steps,
        "confirm": confirm and list(confirm),
        "metric": metric,
        "mode": mode,
        "seed": seed,
    }
    ours = isinstance(sampler, str) and sampler in SAMPLERS
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]
    study = None if ours else study_of(sampler, storage, f"adamjax-{digest}", mode=mode, seed=seed)
    journal = Journal(None if out is None else Path(out), question, resume=resume)
    journal.decide(defaults=plain(defaults))
    range_test = _range_test_of(problem, optimizer, defaults, steps, seed, journal)
    if space is None and range_test is not None and range_test.suggestions:
        low, high = range_test.band[0] / MARGIN, range_test.band[1] * MARGIN
        if not ours:  # Optuna's stay where they are told to look
            low, high = min(low, RANGES["learning_rate"].at(0)), max(high, RANGES["learning_rate"].at(1))
        near = Log(float(f"{low:.2g}"), float(f"{high:.2g}"))
        searched = Space.of(searched.ranges | {"learning_rate": near})
    with contextlib.ExitStack() as stack:
        total = steps * (trials + (0 if confirm is None else (confirm[0] + 1) * confirm[1]))
        bar = stack.enter_context(bar_of(total)) if progress else None
        runs = Runs(runner, optimizer, journal, marks_of(steps, POINTS), mode, bar)
        if ours:
            todo = plan(searched, stages, trials - 1)
            largest, batches = max((s.trials for s in todo), default=0), len(todo)
            strategy = staged(searched, defaults, todo, method=sampler, seed=seed, valid=runs.valid)
        else:
            largest = max(FEWEST, trials // 8)
            batches = math.ceil((trials - 1) / largest)
            strategy = by_optuna(searched, defaults, study, trials=trials - 1, batch=largest)
        runs.prepare(defaults, room=largest + 1, batches=batches, seed=seed, halving=halving)
        _search(runs, strategy, seed)
        found = journal.found
        report = Report(
            question, runs.ended, defaults, optimizer, range_test, found["explored"], runner.execution, found["notes"]
        )
        if confirm is not None and report.ranking:
            runs.confirm(report.ranking[: confirm[0]], defaults, range(seed + 1, seed + 1 + confirm[1]))
            report = dataclasses.replace(report, trials=runs.ended)
    if out is not None:
        report.save(out)
    return report


def _search(runs: Runs, strategy: Strategy, seed: int) -> None:
    """Run each batch of the strategy, and tell it what came of it."""
    with contextlib.suppress(StopIteration):
        batch = next(strategy)
        while True:
            batch = strategy.send(runs.search(batch, seed))


def _range_test_of(
    problem: Problem, optimizer: Callable[..., Any], defaults: Setting, steps: int, seed: int, journal: Journal
) -> LrRange | None:
    """A range test with the defaults; None where the optimizer takes no schedule."""
    if "range_test" not in journal.found:
        found = None
        if "learning_rate" in defaults:
            given = {name: x for name, x in defaults.items() if name != "learning_rate"}
            steps = min(max(steps, _range_test.FEWEST), 200)
            try:
                found = lr_range_test(problem, num_steps=steps, optimizer=partial(optimizer, **given), seed=seed)
            except (TypeError, ValueError) as error:
                journal.note(f"no range test of the learning rate: {error}")
        journal.decide(range_test=found and found.to_json())
    content = journal.found["range_test"]
    return content and LrRange.from_json(content)


def _confirm(confirm: Any) -> tuple[int, int] | None:
    if confirm is None:
        return None
    if not isinstance(confirm, Sequence) or len(confirm) != 2:
        raise ValueError(f"Invalid confirm value: {confirm!r}; confirm must be two ints, or None")
    best, seeds = (checks.count(f"confirm[{i}]", x) for i, x in enumerate(confirm))
    return best, seeds


def _check_sampler(sampler: Any, storage: Any) -> None:
    named = isinstance(sampler, str)
    if named and sampler not in SAMPLERS and sampler.split(":")[0] != "optuna":
        names = ", ".join(map(repr, SAMPLERS))
        raise ValueError(f"Invalid sampler value: {sampler!r}; sampler must be one of {names}, 'optuna', or a study")
    if storage is not None and named and sampler in SAMPLERS:
        raise ValueError(f"Invalid storage value: {storage!r}; only Optuna's samplers have a storage")
    if (storage is not None or not named) and jax.process_count() > 1:
        raise ValueError("Invalid storage value: the processes of one program would each ask for other settings")
