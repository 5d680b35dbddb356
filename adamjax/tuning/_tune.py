"""The tuning itself: a range test, the search, then the best few and the defaults again with fresh seeds."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning._journal import Journal, json_setting
from adamjax.tuning._mesh_runner import make_runner
from adamjax.tuning._optuna import Sampler, Storage, Study, open_study, optuna_search
from adamjax.tuning._range_test import MIN_POINTS, LrRange, lr_range_test
from adamjax.tuning._report import Report
from adamjax.tuning._scheduler import TrialScheduler
from adamjax.tuning._space import Log, OptimizerFactory, Space
from adamjax.tuning._spec import Spec, check_sampler, has_half_precision, search_space
from adamjax.tuning._strategy import MIN_STAGE_TRIALS, RANGES, Stages, plan_stages, staged_search
from adamjax.tuning._sweep import progress_bar, resolve_mode

MARGIN = 3.0  # factor by which the search of the learning rate exceeds the band of the range test


def tune(
    problem: Problem,
    *,
    trials: int = 64,
    steps: int = 300,
    optimizer: OptimizerFactory = adamw,
    space: Space | None = None,
    stages: Stages = "adam",
    sampler: Sampler = "halton",
    storage: Storage = None,
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
    """Find good hyperparameters of Adam by validation performance, and report how certain that is.

    The defaults are tried first, and a range test determines where to search the learning rate. Then come
    stages of trials. Each stage varies a few arguments around the best setting so far, and always the
    learning rate, since the best one depends on all other arguments: the learning rate, twice; b1
    (and b2, from 48 trials on); eps, if the problem has half precision parameters; weight decay; all of
    them together; AMSGrad, on the best settings. After a stage, its ranges narrow to where the best settings
    lie; if the very best lies on the edge of a logarithmic range, the range moves beyond it instead. At the
    end, the best few and the defaults are trained again with fresh seeds, which decides the winner.

    Args:
      problem: The problem to train.
      trials: Number of settings to try, the defaults included; the runs that confirm are extra.
      steps: Number of updates of each run.
      optimizer: Called with a setting, returns the optimizer; see `sweep`.
      space: The ranges to search, by the names of the optimizer's arguments. All others keep the
        defaults of `optimizer`. None for those of Adam's hyperparameters that `optimizer` takes.
      stages: "adam", as above; arguments of `space` that Adam does not have get stages of their own. Or
        the arguments to vary in each stage, one name or several: ["learning_rate", ("b1", "eps")].
      sampler: "halton", "sobol" or "random" points in each stage. Or Optuna, which searches all arguments at once:
        "optuna" for its TPE sampler, "optuna:CmaEsSampler" for another one, an Optuna sampler, or an `optuna.Study`.
      storage: Storage of Optuna's study, a URL or an Optuna storage, which several machines can share. None for memory.
      confirm: How many of the best settings to confirm, and with how many fresh seeds each; None for no confirmation.
      halving: Whether the worse half of each round of trials ends after a quarter of the steps, and half of
        the rest after half of the steps; the others go on in smaller programs. "auto" halves if the
        measured time of a few steps says that this saves more than it costs to compile the smaller
        programs. On a busy machine, that decision can differ between runs.
      out: Folder for the report, and for each trial as soon as it ends; None to write nothing.
      resume: Whether to continue a tuning that the folder holds. The result is that of an uninterrupted
        run, unless other machines share the study. If False, such a folder is refused.
      metric: The metric of the problem, at the end of a run, that settings are judged by.
      mode: "min" or "max", whichever value is better. None means "min" for the loss; other metrics need it.
      seed: Seed of the search; the seeds after it are those that confirm.
      execution, mesh, memory, progress: See `sweep`.

    Returns:
      A `Report`; if `out` is given, it is saved there.

    Raises:
      ValueError: An argument is out of range, the problem does not return `metric`, `mode` is missing or unknown,
        Optuna refuses the storage, or the folder holds another tuning.
      TypeError: `problem` is not a `Problem`, `mesh` is not a mesh, or `optimizer` does not take a setting.
      FileExistsError: The folder holds a tuning, and `resume` is False.
      ImportError: A package of the extra `tune` is not installed.

    References:
      Godbole et al., 2023, Deep Learning Tuning Playbook; Jamieson & Talwalkar, 2016,
      https://arxiv.org/abs/1502.07943 (successive halving).

    >>> import adamjax
    >>> from adamjax.tuning import tune
    >>> report = tune(adamjax.problems.digits(), trials=8, steps=50, confirm=None)
    >>> report.best.optimizer == adamjax.adamw(**report.best.arguments)
    True
    """
    checks.choice("halving", halving, (True, False, "auto"))
    checks.choice("resume", resume, (False, True))
    checks.choice("progress", progress, (False, True))
    checks.function("optimizer", optimizer)
    check_sampler(sampler, storage)
    if out is not None:
        for module in ("matplotlib", "sklearn"):
            require(module, "tune", "the report")
    runner = make_runner(problem, metric, seed=seed, execution=execution, mesh=mesh, memory=memory)
    searched = search_space(optimizer, space, stages, half=has_half_precision(problem))
    mode = resolve_mode(metric, mode)
    spec = Spec(problem, optimizer, searched, stages, sampler, trials, steps, confirm, metric, mode, seed)
    study = None if spec.is_staged else open_study(sampler, storage, f"adamjax-{spec.digest}", mode=mode, seed=seed)
    journal = Journal(None if out is None else Path(out), spec.question, resume=resume)
    journal.decide(defaults=json_setting(spec.defaults))
    range_test = _range_test(spec, journal)
    if space is None and range_test is not None and range_test.suggestions:
        searched = _around_band(range_test, spec)
    runs = spec.trials + (0 if spec.confirm is None else (spec.confirm[0] + 1) * spec.confirm[1])
    with progress_bar(spec.steps * runs, shown=progress) as bar:
        scheduler = TrialScheduler(spec, runner, journal, bar)
        _search(spec, searched, study, scheduler, halving)
        explored, notes = journal.decisions["explored"], journal.decisions["notes"]
        facts = (spec.defaults, optimizer, range_test, explored, runner.execution, notes)
        report = Report(spec.question, scheduler.ended, *facts)
        if spec.confirm is not None and report.ranking:
            scheduler.confirm(report.ranking[: spec.confirm[0]], spec.confirm[1])
            report = dataclasses.replace(report, trials=scheduler.ended)
    if out is not None:
        report.save(out)
    return report


def _search(spec: Spec, space: Space, study: Study, scheduler: TrialScheduler, halving: bool | str) -> None:
    """Run the search round by round: by stages, or by a study of Optuna's."""
    trials = spec.trials - 1
    if study is None:
        stages = plan_stages(space, spec.stages, trials)
        largest, rounds = max((s.trials for s in stages), default=0), len(stages)
        method, seed, valid = spec.sampler, spec.seed, scheduler.is_valid
        strategy = staged_search(space, spec.defaults, stages, method=method, seed=seed, valid=valid)
    else:
        largest = max(MIN_STAGE_TRIALS, spec.trials // 8)
        rounds = math.ceil(trials / largest)
        strategy = optuna_search(space, spec.defaults, study, trials=trials, at_once=largest)
    scheduler.prepare(capacity=largest + 1, rounds=rounds, halving=halving)
    with contextlib.suppress(StopIteration):
        proposed = next(strategy)
        while True:
            proposed = strategy.send(scheduler.search(proposed))


def _around_band(range_test: LrRange, spec: Spec) -> Space:
    """Return the space to search, with learning rates around the band of a range test."""
    low, high = range_test.band[0] / MARGIN, range_test.band[1] * MARGIN
    if not spec.is_staged:  # Optuna's samplers do not leave their range, so the range is only widened
        low, high = min(low, RANGES["learning_rate"].at(0)), max(high, RANGES["learning_rate"].at(1))
    near = Log(float(f"{low:.2g}"), float(f"{high:.2g}"))
    return Space.of(spec.space.ranges | {"learning_rate": near})


def _range_test(spec: Spec, journal: Journal) -> LrRange | None:
    """Return the journal's range test, or make one with the defaults; None if the optimizer takes no schedule."""
    if "range_test" not in journal.decisions:
        result = None
        if "learning_rate" in spec.defaults:
            others = {name: x for name, x in spec.defaults.items() if name != "learning_rate"}
            steps, make = min(max(spec.steps, MIN_POINTS), 200), partial(spec.optimizer, **others)
            try:
                result = lr_range_test(spec.problem, num_steps=steps, optimizer=make, seed=spec.seed)
            except (TypeError, ValueError) as error:
                journal.note(f"no range test of the learning rate: {error}")
        journal.decide(range_test=result and result.to_json())
    content = journal.decisions["range_test"]
    return content and LrRange.from_json(content)
