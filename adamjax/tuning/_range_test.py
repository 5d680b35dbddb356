"""Range tests: they find the learning rates that train, by one ramped run or by a short run for each."""

import bisect
import contextlib
import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Generator, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from adamjax._core import checks, trees
from adamjax._core.figures import AMBER, BLUE, PURPLE, RED, TEAL, label_log_axes, styled, subplots
from adamjax._core.typing import Extra, PyTree
from adamjax._core.value import value
from adamjax._transforms.base import Transformation, as_transformation, may_skip
from adamjax._transforms.chain import chain
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.problems._check import checked
from adamjax.problems._task import Model, Task
from adamjax.schedules import range_test
from adamjax.training import ShardedTask, TrainStep, data_mesh, initial, keys_of, update_model
from adamjax.tuning import _limits
from adamjax.tuning._blocks import BLOCK_STEPS, BatchSource, Block
from adamjax.tuning._journal import Json, nan_to_null, null_to_nan
from adamjax.tuning._mesh_runner import make_runner
from adamjax.tuning._objective import Objective, Outcome, RunTrials, check_objective, first_losses, run_here
from adamjax.tuning._space import OptimizerFactory
from adamjax.tuning._spec import is_problem
from adamjax.tuning._stored import is_range_test
from adamjax.tuning._sweep import Curves, evenly_spaced, make_optimizer
from adamjax.tuning._trial import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With constant learning rates, "steep" would depend on the length of the runs: the loss falls fastest against the
# learning rate where training is half done, and longer runs get there with smaller learning rates.
METHODS = {"ramp": ("valley", "steep", "minimum/10"), "constant": ("valley", "minimum/10")}
MIN_POINTS = 10  # that a range test makes
FEWEST = {"ramp": 10, "constant": 5}  # points before a blow-up that a curve is read from
OBJECTIVE_RATES = 12  # that a range test of an objective tries
CLEAR = 5.0  # standard errors that a loss must fall to be more than noise; or, of the number of pairs that fall:
CLEAR_TREND = 3.25
_ROUNDING = 4  # units in the last place of float32, by which losses that are equal may differ
# Where a range lies by default, and how far it is widened if that is not enough.
USUAL, WIDEST = (1e-6, 1.0), (1e-9, 1e3)


@dataclasses.dataclass(frozen=True, eq=False)
class LrRange:
    """The result of a range test: the training loss against the learning rate.

    Fields:
      learning_rates: float[points], rising.
      losses: float[points], not smoothed. Losses that are not finite are left out of the curve; where only such losses
        follow, it ends.
      mode: "ramp" or "constant"; see `lr_range_test`.

    Raises:
      ValueError: The arrays have other shapes, the learning rates are not positive and rising, or `mode` is unknown.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    mode: str = "ramp"

    def __post_init__(self) -> None:
        checks.choice("mode", self.mode, tuple(METHODS))
        rates, losses = (np.asarray(x, np.float64) for x in (self.learning_rates, self.losses))
        if rates.ndim != 1 or not rates.size or not (rates > 0).all() or not (np.diff(rates) > 0).all():
            raise ValueError("Invalid learning_rates value: learning_rates must be one row of positive, rising numbers")
        if losses.shape != rates.shape:
            raise ValueError(f"Invalid losses value: shape {losses.shape}; losses must be one for each learning rate")
        object.__setattr__(self, "learning_rates", rates)
        object.__setattr__(self, "losses", losses)

    @cached_property
    def diverged_at(self) -> int | None:
        """The point at which the curve ends; None if it does not.

        It ends where losses cease to be finite, but for a few, or where the smoothed loss is 4 times the lowest so far.
        A loss with negative values must instead rise 3 times as far above its start as it fell below.
        """
        end = _end(self.losses)
        x = _average(_median(_bridged(self.losses[:end]), len(self.losses)), len(self.losses))
        if not x.size:
            return end
        limit = 4 * np.minimum.accumulate(x) if x.min() > 0 else 4 * x[0] - 3 * x.min()
        blown = _first(x > limit)
        return end if blown is None else blown

    @cached_property
    def smoothed(self) -> np.ndarray:
        """float[points]: a running median, then an exponential moving average; NaN from `diverged_at` on.

        It is the mean of a forward and a backward average: one alone would lag behind.
        """
        points = len(self.losses)
        x = _median(self._curve, points)
        both = (_average(x, points) + _average(x[::-1], points)[::-1]) / 2
        return np.concatenate([both, np.full(points - len(x), np.nan)])

    @property
    def _curve(self) -> np.ndarray:
        """The losses up to the end of the curve, with those that are not finite replaced by their neighbours'."""
        return _bridged(self.losses[: self.diverged_at])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems of the range, and what to do about them; never empty if the curve determines no learning rate."""
        gaps = np.flatnonzero(~np.isfinite(self.losses[: self.diverged_at]))
        found = []
        if obstacle := self._obstacle():
            found.append(f"the range test determines no learning rate: {obstacle}")
        elif self._begins_late():
            found.append(
                f"the range test begins too late: the loss falls from the smallest learning rate on: {self._lower}"
            )
        if gaps.size:
            where = f"the first at a learning rate of {self.learning_rates[gaps[0]]:.2g}, point {gaps[0] + 1}"
            found.append(
                f"{gaps.size} of {len(self.losses)} losses are not finite amid finite ones, {where}: they were left "
                "out; look for bad rows in the data, or a division by 0 or a logarithm of it in the loss"
            )
        return tuple(found)

    @property
    def band(self) -> tuple[float, float]:
        """The usable learning rates: from that at a tenth of the fall of the loss to half of that at the minimum.

        Raises:
          ValueError: The curve does not determine them; see `suggestion`.
        """
        low, best = self._valley()
        return low, max(best / 2, (low * best) ** 0.5)

    def suggestion(self, method: str = "valley") -> float:
        """Return a learning rate to train with, derived from the smoothed loss by one of fastai's methods.

        Args:
          method: "valley": two thirds of the way, on a logarithmic scale, from the learning rate at a tenth of the fall
            of the loss to that at its minimum. "minimum/10": a tenth of the learning rate at the minimum. "steep" (for
            a ramp only): the learning rate at which the loss falls fastest against the logarithm of the learning rate.

        Raises:
          ValueError: The curve determines no learning rate, since the loss does not fall, has no minimum inside
            the range, or blows up at once; or the mode has no such method.
        """
        checks.choice("method", method, METHODS[self.mode])
        low, best = self._valley()
        if method == "valley":
            return float(low ** (1 / 3) * best ** (2 / 3))
        if method == "minimum/10":
            return best / 10
        # Take slopes over a twentieth of the curve: between neighbours they are mostly noise.
        half, end = max(len(self.losses) // 40, 1), int(np.nanargmin(self.smoothed))
        i = np.arange(self._begin(), end + 1)
        before, after = np.maximum(i - half, 0), np.minimum(i + half, end)
        x = np.log(self.learning_rates)
        slope = (self.smoothed[after] - self.smoothed[before]) / (x[after] - x[before])
        return float(self.learning_rates[i[slope.argmin()]])

    @property
    def suggestions(self) -> dict[str, float]:
        """The suggestion of each method; empty if the curve determines none."""
        return {} if self._obstacle() else {method: self.suggestion(method) for method in METHODS[self.mode]}

    @styled("tune", "plotting a range test")
    def plot(self, path: str | Path | None = None) -> "Figure":
        """Plot the curve, the suggestions and the band; return a matplotlib figure.

        Args:
          path: File to save the figure to; None not to save it.

        Raises:
          ImportError: matplotlib is not installed.
        """
        figure, ((axis,),) = subplots((8, 4))
        axis.plot(self.learning_rates, self.losses, color="0.75", linewidth=1, label="loss")
        axis.plot(self.learning_rates, self.smoothed, color=BLUE, label="smoothed")
        if self.suggestions:
            axis.axvspan(*self.band, color=TEAL, alpha=0.15, label="band")
            for color, (method, lr) in zip((RED, PURPLE, AMBER), self.suggestions.items(), strict=False):
                axis.axvline(lr, color=color, linestyle="--", linewidth=1.5, label=f"{method}: {lr:.2g}")
            low, high = np.nanmin(self.smoothed), np.nanmax(self.smoothed)
            # Losses after a blow-up would flatten the rest of the curve.
            axis.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
        axis.set(
            xscale="log",
            xlabel="learning rate",
            ylabel="training loss",
            title="\n".join(textwrap.wrap(" ".join(self.warnings), 64)),
        )
        label_log_axes(axis)
        axis.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_json(self) -> Json:
        """Return the fields in JSON's types; losses that are not finite become null."""
        rates, losses = self.learning_rates.tolist(), nan_to_null(self.losses.tolist())
        return {"learning_rates": rates, "losses": losses, "mode": self.mode}

    @classmethod
    def from_json(cls, content: Json) -> "LrRange":
        """Return the `LrRange` that `to_json` wrote.

        Raises:
          ValueError: It is none.
        """
        if not is_range_test(content):
            raise ValueError(f"Invalid content value: {checks.shown(content)}; content must be what to_json returns")
        return cls(np.asarray(content["learning_rates"]), np.asarray(null_to_nan(content["losses"])), content["mode"])

    def __repr__(self) -> str:
        rates, end = self.learning_rates, self.diverged_at
        facts = [f"{len(rates)} points from {rates[0]:.3g} to {rates[-1]:.3g}"]
        if end is not None:
            facts.append(f"diverged at {rates[end]:.3g}")
        if self.suggestions:
            facts += [f"{method} {lr:.3g}" for method, lr in self.suggestions.items()]
            facts.append(f"band {self.band[0]:.3g} to {self.band[1]:.3g}")
        return f"LrRange({self.mode}: {', '.join([*facts, *self.warnings])})"

    def _begins_late(self) -> bool:
        """Return whether the loss falls or blows up from the smallest learning rate on."""
        x, end = self.smoothed[: self.diverged_at], self.diverged_at
        if end is not None and (len(x) < FEWEST[self.mode] or x.argmin() <= self._margin):
            return True
        return not self._obstacle(clearly=False) and bool(x[0] - _start(x) > 0.2 * (_start(x) - x.min()))

    def _obstacle(self, *, clearly: bool = True) -> str:
        """Return the reason why the curve determines no learning rate; empty if it does.

        If not `clearly`, its fall may be one that noise could make, too.
        """
        x, end = self.smoothed[: self.diverged_at], self.diverged_at
        if len(x) < FEWEST[self.mode]:
            if end is None:
                return f"the curve has only {len(x)} points: take more steps"
            where = f"after {end} points, at a learning rate of {self.learning_rates[end]:.2g}"
            if not np.isfinite(self.losses).any():
                otherwise = "look for what makes it NaN or infinite whatever the learning rate is"
            else:
                otherwise = "take larger batches if it is noisy"
            return f"the loss blows up {where}: {self._lower}, or {otherwise}"
        if np.ptp(self._curve) <= _ROUNDING * _ulp(self._curve):
            wider = ", or raise max_lr" if self.learning_rates[-1] < WIDEST[1] / 2 else ""
            return (
                f"the loss does not move from {self._curve[0]:.6g}: check that it depends on the parameters, and that "
                f"they get gradients{wider}"
            )
        if x.argmin() <= self._margin:
            return f"the loss does not fall, unless it begins at its minimum: {self._lower}, or take more steps"
        if not self._falls(x) or (clearly and not self._falls_clearly):
            otherwise = ', or a range test with mode="constant"' if self.mode == "ramp" else ""
            return f"the loss falls by no more than its noise: take more steps or larger batches{otherwise}"
        if end is None and x.argmin() >= len(x) - 1 - self._margin:
            if self.learning_rates[-1] < WIDEST[1] / 2:
                return "the minimum lies on the edge of the range: raise max_lr"
            return f"the loss still falls at a learning rate of {self.learning_rates[-1]:.2g}: take more steps"
        return ""

    def _falls(self, x: np.ndarray) -> bool:
        """Return whether the smoothed loss `x` falls by more than the noise of one point and its rounding."""
        noise = 2 * np.median(np.abs(self._curve - x))
        return bool(_start(x) - x.min() > max(noise, _ROUNDING * _ulp(self._curve)))

    @cached_property
    def _falls_clearly(self) -> bool:
        """Whether the smoothed loss falls by more than noise around a constant does."""
        x = self.smoothed[: self.diverged_at]
        fall, best = _start(x) - x.min(), int(x.argmin())
        near = max(len(self.losses) // 40, 1)  # points on either side of the minimum
        losses = self._curve[: best + near + 1]
        if _has_trend(losses)[max(best - 2 * near, 2) :].any():
            return True
        # A short, steep fall has few of the pairs, but is far larger than the noise.
        losses = np.clip(losses, x.min() - fall, _start(x) + fall)  # or a few spikes would be all of the noise
        lowest = losses[max(best - near, 0) :]
        noise = np.sqrt(np.mean(np.diff(losses, 2) ** 2) / 6)  # a slope does not change second differences
        error = noise * np.sqrt(1 / (best // 4 + 1) + 1 / len(lowest))
        few = 1 + 4 / (len(losses) - 2)  # the noise of few points is known less well
        return bool(_start(x) - lowest.mean() > CLEAR * few * error)

    @property
    def _margin(self) -> int:
        """Number of points on either edge at which a minimum does not count."""
        return len(self.losses) // 50

    @property
    def _lower(self) -> str:
        """The remedy if the range begins too late."""
        return "lower min_lr" if self.learning_rates[0] > 2 * WIDEST[0] else "scale the inputs down"

    def _valley(self) -> tuple[float, float]:
        """Return the learning rates at a tenth of the fall of the loss and at its minimum."""
        if obstacle := self._obstacle():
            raise ValueError(f"no learning rate can be suggested: {obstacle}")
        return float(self.learning_rates[self._begin()]), float(self.learning_rates[np.nanargmin(self.smoothed)])

    def _begin(self) -> int:
        """Return the first point from which, up to the minimum, a tenth of the fall of the loss is done."""
        x = self.smoothed[: int(np.nanargmin(self.smoothed)) + 1]
        start = _start(self.smoothed[: self.diverged_at])
        return int(np.flatnonzero(x >= start - 0.1 * (start - x[-1])).max(initial=-1)) + 1


def range_test_steps(steps: int) -> int:
    """Return the number of steps of a range test before runs of so many steps."""
    return min(max(steps, MIN_POINTS), 200)


def lr_range_test(
    problem: Problem | Objective,
    *,
    min_lr: float | None = None,
    max_lr: float | None = None,
    num_steps: int = 200,
    mode: str | None = None,
    num_rates: int | None = None,
    optimizer: OptimizerFactory = adamw,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> LrRange:
    """Train with learning rates from far too small to far too large, and record the training loss.

    An objective is called with each of a few constant learning rates, until it reports a value for the first time. An
    exception with the smallest one is raised; with others, it counts as a loss that is not finite.

    Args:
      problem: The problem to train, or an objective whose values are losses; see `tune`.
      min_lr: The smallest learning rate, small enough that the loss hardly changes. None for 1e-6, or for 1e-9 if the
        loss falls or blows up from 1e-6 on.
      max_lr: The largest learning rate, large enough that the loss blows up. None for 1.0, and then for as many times
        10 as it takes until the curve determines a learning rate or the loss blows up, at most 1e3.
      num_steps: Number of updates of each run, at least 10; without meaning for an objective. A ramp that goes beyond
        1.0 or begins below 1e-6 grows by the same factor at each step, so it makes more steps.
      mode: "ramp": one run, whose learning rate grows exponentially from `min_lr` to `max_lr`; the curve is its losses
        up to where they cease to be finite. At single steps at which gradients are not finite, they count as zeros.
        "constant": a run for each of `num_rates` learning rates, from the same parameters and with the same batches;
        the curve is the mean loss of the last quarter of each, NaN if it diverged. It costs `num_rates` times as much,
        and is less noisy. None for "ramp", or for "constant", the only one there is, if it is an objective; the curve
        is then the first value that it reports.
      num_rates: Number of learning rates that "constant" tries, at least 10. None for 32, or 12 for an objective. A
        range that is widened gets more, spaced alike.
      optimizer: Called with `learning_rate` (a schedule for "ramp", a number for "constant"), returns the optimizer.
      seed: Seed of the parameters, the data order and the keys of the loss.
      mesh: Devices that train one model together, as in `adamjax.training.train`. None: one device; all of them if
        several processes each have a part of the batches from the host.

    Returns:
      An `LrRange`. If it determines no learning rate, its `warnings` say why; so they do of losses that are not finite
      amid finite ones.

    Raises:
      ValueError: A number is out of range, or `mode` is unknown.
      TypeError: `problem` is neither a `Problem` nor an objective, or an argument that should be a number is not.

    References:
      Smith, 2017, https://arxiv.org/abs/1506.01186, section 3.3.

    >>> import adamjax
    >>> from adamjax.tuning import lr_range_test
    >>> result = lr_range_test(adamjax.problems.digits())
    >>> 1e-3 < result.suggestion() < 1e-1
    True
    """
    modes, rates_by_default = (tuple(METHODS), 32) if is_problem(problem) else (("constant",), OBJECTIVE_RATES)
    mode = checks.choice("mode", mode, (*modes, None)) or modes[0]
    num_rates = rates_by_default if num_rates is None else num_rates
    for name, x in (("num_steps", num_steps), ("num_rates", num_rates)):
        checks.count(name, x, MIN_POINTS)
    if mode == "ramp":
        _limits.points("num_steps", num_steps)
    else:
        _limits.points("num_rates", num_rates)
    if is_problem(problem):
        _limits.steps("num_steps", num_steps)
    checks.function("optimizer", optimizer)
    checks.integer("seed", seed)
    spacing = _Spacing.of(min_lr, max_lr, num_steps if mode == "ramp" else num_rates)
    if not is_problem(problem):
        check_objective(problem)
        run = partial(_run_smallest_strictly, problem, float(spacing.usual[0]))
        return _widened(partial(_first_losses, run, optimizer, {}, seed), spacing, "constant")
    if mode == "ramp":
        task = checked(problem, seed)
        if mesh is None and task.is_fed and jax.process_count() > 1:
            mesh = data_mesh()
        task = task if mesh is None else ShardedTask(task, mesh)
        return _widened(_ramps(task, optimizer, sum(map(len, spacing[:3])), seed), spacing, mode)
    return _widened(_constant_rates(problem, optimizer, num_steps, seed, mesh), spacing, mode)


def objective_range_test(
    run: RunTrials,
    optimizer: OptimizerFactory,
    rates: tuple[float | None, float | None, int],
    facts: dict[str, Any],
    seed: int,
) -> LrRange:
    """Run a range test of an objective.

    Args:
      run: Runs trials of the objective.
      rates: `min_lr`, `max_lr` and `num_rates` of `lr_range_test`.
      facts: Arguments of `Trial`.
    """
    return _widened(partial(_first_losses, run, optimizer, facts, seed), _Spacing.of(*rates), "constant")


# Yields the losses with learning rates up to each of some indices.
Measure = Callable[[np.ndarray, list[int]], Generator[np.ndarray, None, None]]


class _Spacing(NamedTuple):
    """The learning rates of a range, and those by which it may be widened, spaced alike."""

    below: np.ndarray
    usual: np.ndarray
    above: np.ndarray
    decade: int  # how many there are in one

    @classmethod
    def of(cls, min_lr: float | None, max_lr: float | None, points: int) -> "_Spacing":
        ramp = range_test(USUAL[0] if min_lr is None else min_lr, USUAL[1] if max_lr is None else max_lr, points)
        low, high = float(ramp.init), float(ramp.peak)
        step = np.log(high / low) / (points - 1)
        below = 0 if min_lr is not None else int(np.log(low / WIDEST[0]) / step + 1e-6)
        above = 0 if max_lr is not None else int(np.log(WIDEST[1] / high) / step + 1e-6)
        return cls(
            low * np.exp(-step * np.arange(below, 0, -1)),
            np.geomspace(low, high, points),
            high * np.exp(step * np.arange(1, above + 1)),
            max(round(np.log(10) / step), 1),
        )

    def ends(self, first: int, last: int) -> list[int]:
        """Return the indices at which the losses are read: `first`, one after each further decade, and `last`."""
        return [*range(first, last, self.decade), last]


def _widened(measure: Measure, spacing: _Spacing, mode: str) -> LrRange:
    """Measure the usual range; widen it until it determines a learning rate or the loss blows up."""
    rates, (below, usual, above) = np.concatenate(spacing[:3]), map(len, spacing[:3])
    found = _raised(measure, rates[below:], spacing.ends(usual, usual + above), mode)
    if not below or not found._begins_late():
        return found
    if mode == "ramp":
        return _raised(measure, rates, spacing.ends(below + usual, len(rates)), mode)
    smaller = np.concatenate([*measure(spacing.below, spacing.ends(spacing.decade, below))])
    return LrRange(rates[: below + len(found.losses)], np.concatenate([smaller, found.losses]), mode)


def _raised(measure: Measure, rates: np.ndarray, ends: list[int], mode: str) -> LrRange:
    losses = np.empty(0)
    with contextlib.closing(measure(rates, ends)) as parts:
        for part in parts:
            losses = np.concatenate([losses, part])
            found = LrRange(rates[: len(losses)], losses, mode)
            if found.suggestions or found.diverged_at is not None:
                break
    return found


def _first_losses(
    run: RunTrials, optimizer: OptimizerFactory, facts: dict[str, Any], seed: int, rates: np.ndarray, ends: list[int]
) -> Generator[np.ndarray, None, None]:
    for first, last in itertools.pairwise([0, *ends]):
        yield np.asarray(first_losses(run, optimizer, rates[first:last], facts=facts, seed=seed))


def _constant_rates(problem: Problem, optimizer: OptimizerFactory, steps: int, seed: int, mesh: Mesh | None) -> Measure:
    """Measure by a run with each learning rate."""
    order = "auto" if mesh is None else "mesh"
    runner = make_runner(problem, "loss", seed=seed, execution=order, mesh=mesh, memory=None)
    seeds, eval_steps = np.asarray([seed], np.int32), evenly_spaced(steps, 4)

    def measure(rates: np.ndarray, ends: list[int]) -> Generator[np.ndarray, None, None]:
        opts = [make_optimizer(optimizer, {"learning_rate": float(lr)}, i) for i, lr in enumerate(rates)]
        curves = Curves(runner, len(rates), 1, eval_steps)
        parts = list(itertools.pairwise([0, *ends]))
        for first, last in parts:
            # A program for the first part, and one for all others, of which only the last may be smaller.
            capacity = max(last - x for x, last in parts[min(first, 1) :])
            for chunk, point, results in runner.run(opts[first:last], seeds, eval_steps, capacity=capacity):
                curves.record(first + chunk, point, results)
            diverged = curves.diverged_at(slice(first, last))[:, 0] > 0
            yield np.where(diverged, np.nan, curves.losses[first:last, 0, -1])

    return measure


@value
class _ZeroNonfinite(Transformation):
    """Makes all gradients zero where one of them is not finite.

    Unlike a skipped step, such a step counts, so that the learning rate goes on with the ramp.
    """

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        finite = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates)]
        ok = jnp.all(jnp.stack(finite)) if finite else True
        return trees.map_leaves(lambda g: jnp.where(ok, g, jnp.zeros_like(g)), updates), state


def _ramps(task: Task, optimizer: OptimizerFactory, longest: int, seed: int) -> Measure:
    """Measure by a run up to where losses cease to be finite; runs of up to `longest` steps share a program."""
    keys = keys_of(seed)
    if task.is_fed:
        longest = min(longest, BLOCK_STEPS)

    def run(model: Model, state: PyTree, inputs: tuple[PyTree, Block]) -> tuple[Model, PyTree, jax.Array]:
        opt, (first, last, batches) = inputs

        def body(i: jax.Array, carry: tuple[Model, PyTree, jax.Array]) -> tuple[Model, PyTree, jax.Array]:
            model, state, losses = carry
            fed = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
            (params, after), state, loss = update_model(task, opt, keys, model, state, (first + i, fed))
            after = jax.tree.map(lambda old, new: jnp.where(jnp.isfinite(loss), new, old), model.state, after)
            model = Model(params, after)
            return model, state, losses.at[i].set(loss.astype(losses.dtype))

        return lax.fori_loop(0, last - first, body, (model, state, jnp.zeros(longest, jnp.result_type(float))))

    advance = TrainStep(run, 1)

    def measure(rates: np.ndarray, ends: list[int]) -> Generator[np.ndarray, None, None]:
        made = optimizer(learning_rate=range_test(float(rates[0]), float(rates[-1]), len(rates)))
        opt = as_transformation(made, "what the optimizer returns")
        if not may_skip(opt):
            opt = chain(_ZeroNonfinite(), opt)  # one bad batch would be the end of the run
        numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), opt)
        model, state = initial(task, opt, None, keys)
        for blocks in BatchSource(task, np.asarray([seed]), np.asarray(ends)).blocks():
            losses = list[np.ndarray]()
            for first, last, batches in blocks:
                fed = task.place(jax.tree.map(lambda x: x[0], batches), blocked=True)
                model, state, found = advance(model, state, (numbers, (np.int32(first), np.int32(last), fed)))
                losses.append(np.asarray(found, np.float64)[: last - first])
            part = np.concatenate(losses)
            end = _end(part)
            yield part if end is None else part[: end + 1]

    return measure


def _run_smallest_strictly(
    objective: Objective, smallest: float, trials: Iterable[Trial]
) -> Generator[Outcome, None, None]:
    """Run trials; raise the exception of that whose learning rate is too small to be the reason."""
    for outcome in run_here(objective, trials):
        if outcome.exception is not None and outcome.trial.arguments.get("learning_rate") == smallest:
            raise outcome.exception
        yield outcome


def _first(where: np.ndarray) -> int | None:
    return int(where.argmax()) if where.any() else None


def _end(losses: np.ndarray) -> int | None:
    """Return the first point from which on at most half of the losses are finite; None if there is none."""
    finite = np.isfinite(losses)
    share = np.cumsum(finite[::-1])[::-1] / np.arange(len(losses), 0, -1)
    return _first(~finite & (share <= 0.5))


def _bridged(x: np.ndarray) -> np.ndarray:
    """Return the losses with those that are not finite on straight lines between their neighbours."""
    finite, i = np.isfinite(x), np.arange(len(x))
    return np.interp(i, i[finite], x[finite]) if finite.any() else x[:0]


def _has_trend(x: np.ndarray) -> np.ndarray:
    """Return, for each first part of a curve, whether clearly more of its pairs fall than rise.

    This is the test of Mann and Kendall, which holds for noise of any distribution. Few points cannot reach its bound:
    of those, nine tenths of the pairs must fall.
    """
    n = np.arange(1, len(x) + 1)
    falling = np.cumsum(_falling_pairs(x))
    spread, pairs = np.sqrt(n * (n - 1) * (2 * n + 5) / 18), n * (n - 1) / 2
    return np.asarray(falling - 1 > np.minimum(CLEAR_TREND * spread, 0.8 * (pairs - 1)))


def _falling_pairs(x: np.ndarray) -> np.ndarray:
    """Return, for each point of a curve, how many of those before it lie above it, less those that lie below it."""
    distinct, ranks = np.unique(x, return_inverse=True)
    tree = [0] * (len(distinct) + 1)  # Fenwick's, of the points so far by rank

    def count(rank: int) -> int:
        """Return how many points so far have at most this rank, which counts from 1."""
        total = 0
        while rank:
            total += tree[rank]
            rank &= rank - 1
        return total

    pairs = []
    for i, rank in enumerate((ranks + 1).tolist()):
        pairs.append(i - count(rank) - count(rank - 1))
        while rank < len(tree):
            tree[rank] += 1
            rank += rank & -rank
    return np.asarray(pairs)


def _ulp(x: np.ndarray) -> float:
    """Return the spacing of float32 numbers as large as the largest of `x`."""
    return float(np.spacing(np.float32(np.abs(x).max())))


def _median(x: np.ndarray, points: int) -> np.ndarray:
    """Return the running median over a fortieth of the curve, at least three points: a spike does not move it."""
    half = min(max(points // 80, 1), len(x) - 1)
    if half < 1:
        return x
    padded = np.pad(x, half, mode="reflect").tolist()
    window = sorted(padded[: 2 * half])
    medians = []
    for new, old in zip(padded[2 * half :], padded, strict=False):
        bisect.insort(window, new)
        medians.append(window[half])
        del window[bisect.bisect_left(window, old)]
    return np.asarray(medians)


def _average(x: np.ndarray, points: int) -> np.ndarray:
    """Return the bias-corrected exponential moving average with the time constant of a fortieth of the curve."""
    decay, total, weight, averages = 1 - 1 / (1 + points / 40), 0.0, 0.0, []
    for loss in x:
        total, weight = decay * total + loss, decay * weight + 1
        averages.append(total / weight)
    return np.asarray(averages)


def _start(x: np.ndarray) -> float:
    """Return the level that a smoothed loss falls from: its median over the first quarter of the way to the minimum."""
    return float(np.median(x[: int(x.argmin()) // 4 + 1]))
