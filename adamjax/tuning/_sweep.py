"""Sweeps: many settings of an optimizer, compared by validation performance."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adamjax._core import checks
from adamjax._core.progress import progress_bar
from adamjax._transforms.base import Transformation, as_transformation
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning import _limits
from adamjax.tuning._mesh_runner import Runner, make_runner
from adamjax.tuning._population import Results, structure_of
from adamjax.tuning._space import OptimizerFactory, Setting, Space


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The results of a sweep.

    Fields:
      settings: The keyword arguments of each optimizer.
      steps: int[points], the numbers of updates after which the runs were evaluated.
      losses: float[settings, seeds, points], the mean training loss since the point before.
      metrics: float[settings, seeds, points] for each validation metric, by name.
      diverged_at: int[settings, seeds], the first step (counted from 1) whose training loss was not finite; 0 for none.
      metric, mode: The metric that settings are judged by, and whether its "min" or its "max" is best.
      execution: How the program ran, in words.
      probe: Measured seconds of a step of the whole sweep by execution; empty if the execution was given.
      seconds: Duration of the sweep, compilation included.
    """

    settings: list[Setting]
    steps: np.ndarray
    losses: np.ndarray
    metrics: dict[str, np.ndarray]
    diverged_at: np.ndarray
    metric: str
    mode: str
    execution: str
    probe: dict[str, float]
    seconds: float

    @property
    def infeasible(self) -> np.ndarray:
        """bool[settings]: whether a run of the setting diverged, or its metric is not finite at the end."""
        return np.asarray(~np.isfinite(self.last).all(axis=1))

    @property
    def last(self) -> np.ndarray:
        """float[settings, seeds]: the metric at the end; NaN for runs that diverged."""
        return np.where(self.diverged_at > 0, np.nan, self.metrics[self.metric][:, :, -1])

    @property
    def best(self) -> np.ndarray:
        """float[settings, seeds]: the best value of the metric where it is defined; NaN for runs that diverged."""
        values = self.metrics[self.metric]
        best = np.fmin.reduce(values, axis=2) if self.mode == "min" else np.fmax.reduce(values, axis=2)
        return np.where(self.diverged_at > 0, np.nan, best)

    @property
    def ranking(self) -> list[int]:
        """Indices of the feasible settings, best first, by the mean over the seeds of `last`."""
        score = self.last.mean(axis=1) * (1 if self.mode == "min" else -1)
        return [int(i) for i in np.argsort(score, kind="stable") if not self.infeasible[i]]

    @property
    def winner(self) -> Setting:
        """The best setting.

        Raises:
          ValueError: Every setting is infeasible.
        """
        if not self.ranking and not (self.diverged_at > 0).any(axis=1).all():
            raise ValueError(f"no setting has a result: {undefined(self.metric, math.nan)}")
        if not self.ranking:
            earliest = self.diverged_at[self.diverged_at > 0].min()
            raise ValueError(
                f"all {len(self.settings)} settings diverged, the first at step {earliest}: "
                "sweep smaller learning rates, or look at the problem"
            )
        return self.settings[self.ranking[0]]

    def __repr__(self) -> str:
        count = int((self.diverged_at > 0).any(axis=1).sum())
        diverged = f", {count} diverged" if count else ""
        if others := self.infeasible.sum() - count:
            diverged += f", {others} without a finite {self.metric}"
        best = f"; best {self.metric} {self.last[self.ranking[0]].mean():.4g} of {self.winner}" if self.ranking else ""
        return f"Sweep({len(self.settings)} settings x {self.diverged_at.shape[1]} seeds{diverged}{best})"


def sweep(
    problem: Problem,
    space: Space | Sequence[Mapping[str, object]],
    *,
    optimizer: OptimizerFactory = adamw,
    steps: int,
    trials: int = 64,
    method: str = "halton",
    seeds: int | Sequence[int] = 1,
    points: int = 20,
    execution: str = "auto",
    mesh: Mesh | None = None,
    metric: str = "loss",
    mode: str | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Sweep:
    """Train a problem with many settings of an optimizer, in one compiled program.

    The settings are stacked into one optimizer whose hyperparameters are arrays. Settings that differ in
    more than numbers, for example in `amsgrad`, need a program for each variant. Every setting starts from
    the same parameters and sees the same batches, those of `adamjax.training.train` with the same seed. A
    setting that diverges is marked and does not change the others.

    Args:
      problem: The problem to train.
      space: A `Space`, or a list of settings: dicts of keyword arguments of `optimizer`.
      optimizer: Called with a setting, returns the optimizer: one of this package's, or a function
        that makes a chain of them. Optimizers of other libraries compile once for each setting.
      steps: Number of updates of each run.
      trials: Number of settings to take from the space.
      method: How to choose them; see `Space.points`.
      seeds: The number of seeds (0, 1, ...), or a list of seeds: each setting is trained once with each.
      points: How often each run is evaluated.
      execution: How the program runs the settings. "map": one after another. "vmap": all at once. "sharded":
        divided among the devices of `mesh`, and on each device as a probe decides. "auto": "sharded"
        if there are several devices; else as the probe decides, which times a few steps of "vmap" and
        "map", unless the whole sweep takes less time than compiling the second one. "mesh": one after another, each
        over all devices of `mesh` as in `train`: for models that fill the devices. They are compiled once for all.
      mesh: The devices for "sharded", of one process or many; None for all devices. With "map" or "vmap",
        settings are divided among its devices too, and each device runs its part in that way.
      metric: The metric of the problem that settings are judged by.
      mode: "min" or "max", whichever value is better. None means "min" for the loss; other metrics need it.
      memory: Bytes that a device may use; None for 80 % of its free memory. A sweep that needs more runs in chunks.
      progress: Whether to show a progress bar; where stderr is no terminal, it is a line for each tenth.

    Returns:
      A `Sweep`.

    Raises:
      ValueError: A number is out of range, `metric` or `mode` is missing or unknown, or there are no settings.
      TypeError: `problem` is not a `Problem`, `mesh` is not a mesh, or `optimizer` does not take a setting.

    >>> import adamjax
    >>> from adamjax.tuning import Log, Space, sweep
    >>> space = Space(learning_rate=Log(1e-4, 1e-1))
    >>> result = sweep(adamjax.problems.digits(), space, steps=50, trials=8)
    >>> 1e-3 < result.winner["learning_rate"] < 1e-1
    True
    """
    begin = time.perf_counter()
    _limits.steps("steps", steps)
    _limits.runs("trials", trials)
    checks.count("points", points)
    seed_array = np.asarray(seeds) if np.ndim(seeds) else np.arange(_limits.runs("seeds", seeds))
    if seed_array.ndim != 1 or not seed_array.size or not np.issubdtype(seed_array.dtype, np.integer):
        expected = "a number of seeds, or a list of at least one int"
        raise ValueError(f"Invalid seeds value: {seeds!r}; seeds must be {expected}")
    checks.choice("progress", progress, (False, True))
    checks.function("optimizer", optimizer)
    settings = space.points(trials, method=method) if isinstance(space, Space) else _as_settings(space)
    if not settings:
        raise ValueError("there are no settings: give a Space, or at least one dict of the optimizer's arguments")
    first = int(seed_array[0])
    runner = make_runner(problem, metric, seed=first, execution=execution, mesh=mesh, memory=memory)
    mode = resolve_mode(metric, mode)
    eval_steps = evenly_spaced(steps, points)
    opts = [make_optimizer(optimizer, setting, i) for i, setting in enumerate(settings)]
    curves = _run_all(runner, opts, seed_array.astype(np.int32), eval_steps, progress)
    diverged_at, execution = curves.diverged_at(slice(None)), runner.execution
    results = (settings, eval_steps, curves.losses, curves.metrics, diverged_at)
    return Sweep(*results, metric, mode, execution, runner.probe, time.perf_counter() - begin)


def _as_settings(space: object) -> list[Setting]:
    if not isinstance(space, Sequence) or not all(isinstance(s, Mapping) for s in space):
        raise TypeError(
            f"Invalid space value: {space!r}; space must be a Space, or a list of dicts of the optimizer's arguments"
        )
    return [dict(s) for s in space]


def resolve_mode(metric: str, mode: str | None) -> str:
    """Return "min" or "max", whichever value of the metric is better."""
    if mode is None and metric != "loss":
        raise ValueError(
            f"Invalid mode value: None; say whether the lowest {metric} is the best ('min'), or the highest ('max')"
        )
    chosen: str = checks.choice("mode", mode, ("min", "max", None))
    return chosen or "min"


def evenly_spaced(steps: int, count: int) -> np.ndarray:
    """Return `count` evenly spaced steps, the last one `steps`; fewer if there are not as many steps."""
    count = min(count, steps)
    return np.unique(np.round(np.linspace(0, steps, count + 1)[1:]).astype(int).clip(1))


class Curves:
    """The `losses` and `metrics` of runs so far, as in a `Sweep`; NaN at points that they have not reached."""

    def __init__(self, runner: Runner, settings: int, seeds: int, eval_steps: np.ndarray) -> None:
        self.losses = np.full((settings, seeds, len(eval_steps)), np.nan)
        self.metrics = {name: self.losses.copy() for name in runner.metrics}
        self._diverged_at = np.zeros((settings, seeds), int)

    def record(self, settings: np.ndarray, point: int, results: Results) -> None:
        losses, metrics, diverged_at = results
        self.losses[settings, :, point] = losses.T
        for name, curve in self.metrics.items():
            curve[settings, :, point] = metrics[name].T
        self._diverged_at[settings] = diverged_at.T

    def diverged_at(self, settings: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """int[settings, seeds]: the first step so far whose training loss was not finite; 0 for none."""
        return np.asarray(self._diverged_at[settings])


def undefined(metric: str, value: float) -> str:
    """Return the reason why a run has no result whose training losses are all finite, and what to do about it."""
    return (
        f"{metric} is {value} at the end, though the training losses are finite: look at how evaluate computes it "
        "(a division by 0, a class without rows), or judge by another metric"
    )


def _run_all(
    runner: Runner,
    opts: Sequence[Transformation],
    seeds: np.ndarray,
    eval_steps: np.ndarray,
    progress: bool,
) -> Curves:
    curves = Curves(runner, len(opts), len(seeds), eval_steps)
    durations = np.diff(eval_steps, prepend=0)
    with shown_progress(len(opts) * len(seeds) * int(eval_steps[-1]), "step", progress) as bar:
        for group in group_by_structure(opts):
            for chunk, point, results in runner.run([opts[i] for i in group], seeds, eval_steps):
                curves.record(np.asarray(group)[chunk], point, results)
                if bar is not None:
                    bar.update(len(chunk) * len(seeds) * int(durations[point]))
    return curves


def group_by_structure(opts: Sequence[Transformation]) -> list[list[int]]:
    """Return the indices of optimizers that differ only in numbers, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for i, opt in enumerate(opts):
        groups.setdefault(structure_of(opt), []).append(i)
    return list(groups.values())


def make_optimizer(optimizer: OptimizerFactory, setting: Setting, number: int) -> Transformation:
    """Return the optimizer of a setting as a `Transformation`; errors name the setting and its number."""
    try:
        return as_transformation(optimizer(**setting), "what the optimizer returns")
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"setting {number}, {setting}: {error}") from error


def shown_progress(total: int, unit: str, shown: bool) -> Any:
    """Return the context of a progress bar, which is None unless it is to be shown, here."""
    return progress_bar(total, unit, "tune") if shown and jax.process_index() == 0 else contextlib.nullcontext()
