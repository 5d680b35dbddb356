"""Sweeps: many settings of an optimizer, judged by validation performance."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax._transforms.base import as_transformation
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning._population import Runner
from adamjax.tuning._space import Setting, Space


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep found. Arrays are [settings, seeds, points], [settings, seeds] or [settings].

    Fields:
      settings: The keyword arguments of each optimizer.
      steps: int[points], after how many updates the points were taken.
      losses: The mean training loss since the point before.
      metrics: The validation metrics at the points, by name.
      diverged_at: int[settings, seeds], the first step (counted from 1) at which something was not
        finite; 0 for none.
      metric, mode: What settings are judged by: the lowest ("min") or the highest ("max").
      execution: How the program ran, in words.
      probe: Measured seconds of one step of the whole sweep, by the ways of running it that were
        tried; empty where the way was given.
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
        """bool[settings]: whether a run of the setting diverged."""
        return np.asarray((self.diverged_at > 0).any(axis=1))

    @property
    def last(self) -> np.ndarray:
        """float[settings, seeds]: the metric at the end; NaN where the run diverged."""
        return np.where(self.diverged_at > 0, np.nan, self.metrics[self.metric][:, :, -1])

    @property
    def best(self) -> np.ndarray:
        """float[settings, seeds]: the best value of the metric at any point; NaN where the run diverged."""
        values = self.metrics[self.metric]
        return np.where(self.diverged_at > 0, np.nan, values.min(axis=2) if self.mode == "min" else values.max(axis=2))

    @property
    def ranking(self) -> list[int]:
        """The feasible settings, best first, by the mean over the seeds of `last`."""
        score = self.last.mean(axis=1) * (1 if self.mode == "min" else -1)
        return [int(i) for i in np.argsort(score, kind="stable") if not self.infeasible[i]]

    @property
    def winner(self) -> Setting:
        """The best setting.

        Raises:
          ValueError: Every setting is infeasible.
        """
        if not self.ranking:
            earliest = self.diverged_at[self.diverged_at > 0].min()
            raise ValueError(
                f"all {len(self.settings)} settings diverged, the first at step {earliest}: "
                "sweep smaller learning rates, or look at the problem"
            )
        return self.settings[self.ranking[0]]

    def __repr__(self) -> str:
        diverged = f", {self.infeasible.sum()} diverged" if self.infeasible.any() else ""
        best = f"; best {self.metric} {self.last[self.ranking[0]].mean():.4g} of {self.winner}" if self.ranking else ""
        return f"Sweep({len(self.settings)} settings x {self.diverged_at.shape[1]} seeds{diverged}{best})"


def sweep(
    problem: Problem,
    space: Space | Sequence[Mapping[str, Any]],
    *,
    optimizer: Callable[..., Any] = adamw,
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

    The settings are stacked into one optimizer, whose hyperparameters are arrays; those that differ
    in more than numbers (`amsgrad`, say) go into a program each. Every setting sees the same initial
    parameters and the same batches, those of `adamjax.training.train` with the same seed. A setting
    that diverges is marked, and changes nothing for the others.

    Args:
      problem: What to train.
      space: A `Space`, or the settings themselves: keyword arguments of `optimizer`.
      optimizer: Called with a setting, returns the optimizer: one of this package's, or a function
        that makes a chain of them. Optimizers from elsewhere compile once for each setting.
      steps: Updates of each run.
      trials: How many points of the space.
      method: How they are chosen; see `Space.points`.
      seeds: How many seeds (0, 1, ...), or which: each setting is trained once with each.
      points: How often each run is evaluated on the way.
      execution: How the runs of the program follow each other. "map": one after another. "vmap":
        all at once. "sharded": spread over the devices of `mesh`, and on each of them as a probe
        says. "auto": the same, where there is more than one device; else as the probe says, which
        times a few steps of either, unless the whole takes less time than to compile the other.
      mesh: The devices to spread over, of one process or many; None for all there are. Given with
        "map" or "vmap", those are what happens on each device.
      metric: Which of the problem's metrics settings are judged by.
      mode: "min" or "max": which is better. None for "min" of the loss; of other metrics it must be given.
      memory: Bytes that a device may use, None for 80 % of what is free. What needs more is done in
        chunks.
      progress: Whether to show a progress bar.

    Returns:
      A `Sweep`.

    Raises:
      ValueError: A number is out of range, the problem does not return `metric`, `mode` does not say which of it is
        better, or there are no settings.
      TypeError: `problem` is not a `Problem`, `mesh` no mesh, or `optimizer` does not take a setting.

    >>> import adamjax
    >>> from adamjax.tuning import Log, Space, sweep
    >>> space = Space(learning_rate=Log(1e-4, 1e-1))
    >>> result = sweep(adamjax.problems.digits(), space, steps=50, trials=8)
    >>> 1e-3 < result.winner["learning_rate"] < 1e-1
    True
    """
    begin = time.perf_counter()
    for name, x in (("steps", steps), ("trials", trials), ("points", points)):
        checks.count(name, x)
    seeds_ = np.asarray(seeds) if np.ndim(seeds) else np.arange(checks.count("seeds", seeds))
    if seeds_.ndim != 1 or not seeds_.size or not np.issubdtype(seeds_.dtype, np.integer):
        raise ValueError(
            f"Invalid seeds value: {seeds!r}; seeds must be a number of them, or at least one int in a row"
        )
    checks.choice("progress", progress, (False, True))
    checks.function("optimizer", optimizer)
    settings = space.points(trials, method=method) if isinstance(space, Space) else _settings(space)
    if not settings:
        raise ValueError("there are no settings: give a Space, or at least one dict of the optimizer's arguments")
    runner = Runner(problem, metric, execution=execution, mesh=mesh, memory=memory)
    mode = direction(metric, mode)
    marks = marks_of(steps, points)
    found = run_settings(runner, settings, optimizer, seeds_.astype(np.int32), marks, progress)
    return Sweep(
        settings,
        marks,
        found.losses,
        found.metrics,
        found.diverged_at(slice(None), len(marks) - 1),
        metric,
        mode,
        runner.execution,
        runner.probe,
        time.perf_counter() - begin,
    )


def _settings(space: Any) -> list[Setting]:
    if not isinstance(space, Sequence) or not all(isinstance(s, Mapping) for s in space):
        raise TypeError(
            f"Invalid space value: {space!r}; space must be a Space, or a list of dicts of the optimizer's arguments"
        )
    return [dict(s) for s in space]


def direction(metric: str, mode: Any) -> str:
    """Which of a metric is better, "min" or "max"."""
    if mode is None and metric != "loss":
        raise ValueError(
            f"Invalid mode value: None; say whether the lowest {metric} is the best ('min'), or the highest ('max')"
        )
    chosen: str = checks.choice("mode", mode, ("min", "max", None))
    return chosen or "min"


def marks_of(steps: int, points: int) -> np.ndarray:
    """`points` steps evenly up to the last; fewer where there are fewer."""
    return np.unique(np.round(np.linspace(0, steps, points + 1)[1:]).astype(int).clip(1))


class Curves:
    """What runs gave so far; what they have not reached is NaN.

    Fields:
      losses: float64[settings, seeds, points], the mean training loss since the point before.
      metrics: The validation metrics at the points, by name, of the same shape.
    """

    def __init__(self, runner: Runner, settings: int, seeds: int, marks: np.ndarray) -> None:
        self.losses = np.full((settings, seeds, len(marks)), np.nan)
        self.metrics = {name: self.losses.copy() for name in runner.metrics}
        self._judged, self._marks = self.metrics[runner.metric], marks
        self._diverged_at = np.zeros((settings, seeds), int)

    def record(self, settings: np.ndarray, point: int, results: Any) -> None:
        """Take in what `Runner.run` says of these settings."""
        losses, metrics, diverged_at = results
        self.losses[settings, :, point] = losses.T
        for name, curve in self.metrics.items():
            curve[settings, :, point] = metrics[name].T
        self._diverged_at[settings] = diverged_at.T

    def diverged_at(self, settings: Any, point: int) -> np.ndarray:
        """int[settings, seeds]: the first step up to a point at which something was not finite; 0 for none."""
        found, bad = self._diverged_at[settings], ~np.isfinite(self._judged[settings][:, :, : point + 1])
        # A run whose losses are finite may still end where the validation is not.
        return np.where((found == 0) & bad.any(axis=2), self._marks[bad.argmax(axis=2)], found)


def run_settings(
    runner: Runner,
    settings: Sequence[Setting],
    optimizer: Callable[..., Any],
    seeds: np.ndarray,
    marks: np.ndarray,
    progress: bool,
) -> Curves:
    """Train every setting with every seed."""
    opts = [make(optimizer, setting, i) for i, setting in enumerate(settings)]
    curves = Curves(runner, len(settings), len(seeds), marks)
    durations = np.diff(marks, prepend=0)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(bar_of(len(settings) * len(seeds) * int(marks[-1]))) if progress else None
        for group in alike(opts):
            for chunk, point, results in runner.run([opts[i] for i in group], seeds, marks):
                curves.record(np.asarray(group)[chunk], point, results)
                if bar is not None:
                    bar.update(len(chunk) * len(seeds) * int(durations[point]))
    return curves


def alike(opts: Sequence[Any]) -> list[list[int]]:
    """The positions of those that differ in numbers only, group by group."""
    groups: dict[Any, list[int]] = {}
    for i, opt in enumerate(opts):
        leaves, structure = jax.tree.flatten(opt)
        groups.setdefault((structure, tuple(map(np.shape, leaves))), []).append(i)
    return list(groups.values())


def make(optimizer: Callable[..., Any], setting: Setting, position: int) -> Any:
    """The optimizer, as one of ours wherever it is from."""
    try:
        return as_transformation(optimizer(**setting), "what the optimizer returns")
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"setting {position}, {setting}: {error}") from error


def bar_of(total: int) -> Any:
    tqdm = require("tqdm", "tune", "the progress bar").tqdm
    return tqdm(total=total, unit="step", unit_scale=True, dynamic_ncols=True, disable=jax.process_index() > 0)
