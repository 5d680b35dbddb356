"""The tuning itself: a range test, the search, then the best few and the defaults again with fresh seeds."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from jax.sharding import Mesh

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.schedules import range_test as range_test_schedule
from adamjax.tuning._courses import Scheduled
from adamjax.tuning._executors import Executor, Workers
from adamjax.tuning._mesh_runner import MeshRunner, Runner, make_runner
from adamjax.tuning._objective import Objective, RunTrials, check_first, check_objective, run_here
from adamjax.tuning._optuna import Sampler, Storage
from adamjax.tuning._range_test import OBJECTIVE_RATES, LrRange, lr_range_test, objective_range_test, range_test_steps
from adamjax.tuning._report import Report, run_facts
from adamjax.tuning._scheduler import TrialScheduler
from adamjax.tuning._search import Folder, Search
from adamjax.tuning._space import OptimizerFactory, Space
from adamjax.tuning._spec import RACE, Confirm, is_problem
from adamjax.tuning._stop import Check, Stopped
from adamjax.tuning._strategy import Stages
from adamjax.tuning._sweep import shown_progress
from adamjax.tuning._trial import Trial

STEPS = 300  # of a run of a problem
MIN_REPORTS = 8  # of the first trial of an objective, for a range test to be worth it
HERE = "one trial after another"


def tune(
    problem: Problem | Objective,
    *,
    trials: int = 64,
    steps: int | None = None,
    optimizer: OptimizerFactory = adamw,
    space: Space | None = None,
    stages: Stages = "adam",
    sampler: Sampler = "auto",
    storage: Storage = None,
    confirm: Confirm = RACE,
    halving: bool | str = "auto",
    schedule: str = "auto",
    range_test: LrRange | str | None = "auto",
    executor: Executor = None,
    out: Folder = None,
    resume: bool = True,
    stop: Callable[[], bool] = lambda: False,
    metric: str = "loss",
    mode: str | None = None,
    seed: int = 0,
    execution: str = "auto",
    mesh: Mesh | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Report:
    """Find good hyperparameters of Adam by validation performance, and report how certain that is.

    The defaults are tried first. Then come the first settings of a list that was learned on 42 other problems, and
    rounds of settings that a Gaussian process of the results so far proposes. It varies all arguments at once: the
    learning rate, b1, b2, weight decay, eps if the problem has half precision parameters, and the course of the
    learning rate. Near the best settings, it may leave the ranges. From 32 trials on, every second of its rounds has
    another seed. From 17 trials on, AMSGrad is tried on the best settings. At the end, the best few and the defaults
    are trained again with fresh seeds, which decides the winner.

    The learning rate of a setting is the peak of a schedule: it rises for `warmup_fraction` of the steps, then
    falls to `end_fraction` of the peak. The defaults have a constant one. `Best.for_steps` stretches the schedule to
    another number of steps; in far longer runs, a lower peak is often better.

    A training loop of one's own is tuned as an objective: a function `objective(optimizer, trial)` that trains with
    `optimizer` and returns the metric at the end, a number, or a dict of metrics. See `Trial` for what it can ask and
    report. Optimizers of all trials have one structure, so a jitted step that takes the optimizer as an argument
    compiles once; hence AMSGrad, which changes the structure, is searched only if `space` or `stages` names it, and eps
    likewise, since the dtype of the parameters is unknown. An objective that raises an exception, or whose metric
    is not finite, makes a failed trial, and the search goes on; but an error in the first trial, that of the defaults,
    is raised at once. The range test follows the first trial, if that reported at least 8 times: the objective is
    called with each of 12 constant learning rates, or more if the best lies on their edge, until it first reports.

    Args:
      problem: The problem to train, or an objective.
      trials: Number of settings to try, the defaults included; the runs that confirm are extra.
      steps: Number of updates of each run, 300 unless it is given. An objective finds it as `trial.budget`, which is
        None by default.
      optimizer: Called with a setting, returns the optimizer; see `sweep`.
      space: The ranges to search, by the names of the optimizer's arguments. All others keep the
        defaults of `optimizer`. None for those of Adam's hyperparameters that `optimizer` takes.
      stages: "adam": as `sampler` says. Or the arguments to vary in each stage, one name or several:
        ["learning_rate", ("b1", "eps")]. Each stage searches around the best setting so far; then its ranges narrow to
        where the best settings lie, or move if the very best lies on the edge of a logarithmic range.
      sampler: "auto": the list and the model, as above; Halton's points in stages that are listed. Or "halton", "sobol"
        or "random" points, in stages: the learning rate, twice; then, always with the learning rate, b1 (and b2, from
        48 trials on), eps, weight decay, the others, all of them; choices, on the best settings. Until a stage varies
        them, `warmup_fraction` is 0.05 and `end_fraction` 0. Or Optuna, which searches all
        arguments at once: "optuna" for its TPE sampler, "optuna:CmaEsSampler" for another one, an Optuna sampler, or an
        `optuna.Study`.
      storage: Storage of Optuna's study, a URL or an Optuna storage, which several machines can share. None for memory.
      confirm: The race that confirms the best settings: in each round, how many of them go on, and with how many
        fresh seeds so far. The defaults run in all rounds. If the learning rate of a problem has a schedule, the best
        setting of the search also runs at constant rates, 3, 10 and 30 % of its peak, of which the worst leaves the
        race after each round but the last. Two ints are one round; None is no confirmation.
      halving: Whether the worse half of each round of trials ends after a quarter of the steps, and half of
        the rest after half of the steps; the others go on in smaller programs. "auto" halves if the learning rate is
        constant (early losses say less about a run whose rate decays), and if the measured time of a few steps says
        that this saves more than it costs to compile the smaller programs. On a busy machine, that decision can differ
        between runs. For an objective, anything but False
        ends trials as `Trial.report` describes.
      schedule: The course of the learning rate: "cosine", "linear", or "stable" (which falls along a line in the last
        fifth), each after a linear warmup; or "constant". "auto" is "cosine" for a problem, if the learning rate of
        `optimizer` is searched and can be a schedule, else "constant". For an objective, name the course, and let
        `steps` be its number of updates. Where a `space` or `stages` leave them out, `warmup_fraction` is 0.05 and
        `end_fraction` 0.
      range_test: "auto" makes a range test. Or one of your own, an `LrRange`; None for no range test. It does not
        change a `space` that is given.
      executor: An executor to run trials of an objective side by side: a `concurrent.futures.Executor` (a process pool,
        of `process_pool` for one; `mpi4py.futures.MPIPoolExecutor`; dask's `Client.get_executor(retries=0)`), or
        anything with its `submit`, such as submitit's; or a function without arguments that makes one. None runs them
        one after another in this process. The trials of a round run at once, as many as there are workers. A trial
        whose worker dies is tried once more, alone, then it has failed. An executor that broke is made again, by the
        function, or as a `ProcessPoolExecutor` with equal arguments; others end the tuning, which goes on with `out`.
        A process pool that would fork is replaced by an equal one that spawns its processes, since JAX's threads hang
        in processes that are forked: a script needs `if __name__ == "__main__":`.
      out: Folder for the report, and for each trial as soon as it ends; or a function that makes it, which is called
        once the other arguments are accepted. None to write nothing.
      resume: Whether to continue a tuning that the folder holds. The result is that of an uninterrupted
        run, unless other machines share the study. If False, such a folder is refused.
      stop: Called between trials of an objective, and while workers run them; for a problem, between the steps at which
        a round is evaluated. It must give the same result in all processes. When it returns True, the tuning ends:
        trials that run are given up, `out` keeps those that have ended, and `resume` goes on from there. The report is
        returned, not saved, and its first warning says how far the tuning came. See
        `adamjax.training.stop_on_signals`.
      metric: The metric, at the end of a run, that settings are judged by: a name in what `evaluate` of the problem or
        the objective returns.
      mode: "min" or "max", whichever value is better. None means "min" for the loss; other metrics need it.
      seed: Seed of the search. The seeds after it are those that confirm, and the one after those is the second seed
        of the search.
      execution, mesh, memory: See `sweep`; not for objectives.
      progress: See `sweep`; for objectives, the bar counts trials.

    Returns:
      A `Report`; if `out` is given, it is saved there.

    Raises:
      ValueError: An argument is out of range, the problem does not return `metric`, `mode` is missing or unknown,
        Optuna refuses the storage, the folder holds another tuning, an argument is not for objectives or not for
        problems, or the metric of the first trial of an objective is not finite.
      TypeError: `problem` is neither a `Problem` nor a function of an optimizer and a trial, `mesh` is not a mesh,
        `optimizer` does not take a setting, or an objective cannot be pickled for the executor.
      RuntimeError: The executor is broken and cannot be made again, or the worker of the first trial died twice.
      Exception: Whatever the objective raises in the first trial.
      FileExistsError: The folder holds a tuning, and `resume` is False; or it is not a folder.
      DamagedFileError: A file of the folder is damaged; the message names it, and the line.
      FolderInUseError: Another process has a tuning with this folder.
      ImportError: A package of the extra `tune` is not installed.

    References:
      Godbole et al., 2023, Deep Learning Tuning Playbook; Jamieson & Talwalkar, 2016,
      https://arxiv.org/abs/1502.07943 (successive halving).

    >>> import adamjax
    >>> from adamjax.tuning import tune
    >>> report = tune(adamjax.problems.digits(), trials=8, steps=50, confirm=None)
    >>> report.best.optimizer == eval(str(report.best))
    True

    A loop of one's own, whose step compiles once for all trials:

    >>> import jax, jax.numpy as jnp
    >>> @jax.jit
    ... def step(optimizer, state, x):
    ...     return optimizer.step(jax.grad(lambda x: (x - 3) ** 2)(x), state, x)
    >>> def objective(optimizer, trial):
    ...     x = jax.random.normal(jax.random.key(trial.seed))
    ...     state = optimizer.init(x)
    ...     for i in range(20):
    ...         x, state = step(optimizer, state, x)
    ...         trial.report(i, abs(x - 3))
    ...     return abs(x - 3)
    >>> report = tune(objective, trials=8, confirm=(2, 2))
    >>> step._cache_size()
    1
    """
    begin = time.perf_counter()
    checks.choice("progress", progress, (False, True))
    checks.function("stop", stop)
    if out is not None:
        for module in ("matplotlib", "sklearn"):
            require(module, "tune", "the report")
    given = None if isinstance(range_test, str) else range_test
    if isinstance(range_test, str):
        checks.choice("range_test", range_test, ("auto",))
    runner = None
    if is_problem(problem):
        if executor is not None:
            one = "a problem's trials are one program on all devices: only objectives have an executor"
            raise ValueError(f"Invalid executor value: {executor!r}; {one}")
        runner = make_runner(problem, metric, seed=seed, execution=execution, mesh=mesh, memory=memory)
        steps = STEPS if steps is None else steps
    else:
        _check_for_objective(problem, executor, execution=execution, mesh=mesh, memory=memory)
    search = Search(
        space, optimizer=optimizer, trials=trials, steps=steps, stages=stages, sampler=sampler, storage=storage,
        confirm=confirm, halving=halving, schedule=schedule, range_test=given, problem=problem,
        out=out, resume=resume, metric=metric, mode=mode, seed=seed,
    )  # fmt: skip
    with search:
        tests = isinstance(range_test, str) and "range_test" not in search.journal.decisions
        check = partial(_check_stop, stop)
        try:
            if runner is not None:
                _tune_problem(search, runner, check, tests=tests, halving=halving, progress=progress)
            elif not is_problem(problem):
                _tune_objective(search, problem, executor, check, tests=tests, progress=progress)
        except Stopped:
            came = f"the tuning was stopped with {search.ended_count} of {search.size} trials"
            goes_on = "" if search.journal.path is None else f"; tune goes on with out={str(search.journal.path)!r}"
            return dataclasses.replace(search.report(), stopped=came + goes_on)
        if "facts" not in search.journal.decisions:
            search.journal.decide(facts=run_facts() | {"wall time": f"{time.perf_counter() - begin:.0f} s"})
        report = search.report()
        if search.journal.path is not None:
            report.save(search.journal.path)
    return report


def _check_stop(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped


def _tune_problem(
    search: Search, runner: Runner, check: Check, *, tests: bool, halving: bool | str, progress: bool
) -> None:
    """Run the trials of a problem, a round in one program."""
    if tests:
        check()
        search.narrow(_range_test(search, runner.mesh if isinstance(runner, MeshRunner) else None))
    with shown_progress((search.spec.steps or 0) * search.size, "step", progress) as bar:
        if halving == "auto" and isinstance(search.spec.optimizer, Scheduled):
            halving = False  # before the rate has decayed, a loss says little about that at the end
        scheduler = TrialScheduler(search, runner, check, bar)
        largest, rounds = search.plan()
        scheduler.prepare(capacity=largest + 1, rounds=rounds, halving=halving)
        while candidates := search.next_round():
            scheduler.run(candidates)


def _range_test(search: Search, mesh: Mesh | None) -> LrRange | None:
    """Make a range test of a problem with the defaults; None if the optimizer takes no schedule."""
    spec = search.spec
    make = _with_defaults(search)
    if make is None or not is_problem(spec.problem):
        return None
    try:
        make(learning_rate=range_test_schedule())
    except (TypeError, ValueError) as error:
        search.journal.note(f"no range test of the learning rate: {error}")
        return None
    steps = range_test_steps(spec.steps or 0)
    return lr_range_test(spec.problem, num_steps=steps, optimizer=make, seed=spec.seed, mesh=mesh)


def _with_defaults(search: Search) -> OptimizerFactory | None:
    """Return the function that makes an optimizer from a learning rate; None if it takes none."""
    spec = search.spec
    if "learning_rate" not in spec.defaults:
        return None
    return partial(spec.optimizer, **{name: x for name, x in spec.defaults.items() if name != "learning_rate"})


def _check_for_objective(objective: Objective, executor: Executor, **others: object) -> None:
    """Check an objective, and the arguments of `tune` that depend on whether there is one."""
    check_objective(objective)
    for name, x in others.items():
        if x not in (None, "auto"):
            raise ValueError(f"Invalid {name} value: {x!r}; an objective runs as it will: {name} is for problems")
    if executor is not None and not (callable(executor) or callable(getattr(executor, "submit", None))):
        kind = "executor must have a submit as those of concurrent.futures have, or be a function that makes one"
        raise TypeError(f"Invalid executor value: {executor!r}; {kind}")


def _tune_objective(
    search: Search, objective: Objective, executor: Executor, check: Check, *, tests: bool, progress: bool
) -> None:
    """Run the trials of an objective: the defaults, a range test, and then round after round."""
    with contextlib.ExitStack() as stack:
        workers = None if executor is None else stack.enter_context(Workers(executor, objective, check))
        search.journal.decide(execution=HERE if workers is None else f"side by side by a {workers.name}")
        bar = stack.enter_context(shown_progress(search.size, "trial", progress))
        run = partial(run_here, objective, check=check) if workers is None else workers.run
        defaults = search.ask_defaults()
        if defaults is not None:
            _run_trials(search, run, [defaults], bar)
        if tests:
            search.narrow(_range_test_of_objective(search, run))
        if workers is None:
            _run_trials(search, run, search, bar)
            return
        while trials := search.ask_round():
            _run_trials(search, run, trials, bar)


def _run_trials(search: Search, run: RunTrials, trials: Iterable[Trial], bar: Any) -> None:
    """Run trials and tell their results; raise the error of the defaults."""
    with contextlib.closing(run(trials)) as outcomes:
        for outcome in outcomes:
            check_first(outcome)
            search.tell(outcome.trial, outcome.value, error=outcome.error)
            if bar is not None:
                bar.update(1)


def _range_test_of_objective(search: Search, run: RunTrials) -> LrRange | None:
    """Make a range test of an objective if it reports often enough to cost little; None if not."""
    spec, make = search.spec, _with_defaults(search)
    defaults = search.ended(0, spec.seed)
    if make is None or defaults is None:
        return None
    if len(defaults.steps) < MIN_REPORTS:
        search.journal.note(
            f"no range test of the learning rate: the objective reports fewer than {MIN_REPORTS} times; pass "
            "range_test=, an LrRange of your own (see adamjax.schedules.range_test)"
        )
        return None
    facts = {"budget": spec.steps, "metric": spec.metric, "mode": spec.mode}
    return objective_range_test(run, make, (None, None, OBJECTIVE_RATES), facts, spec.seed)
