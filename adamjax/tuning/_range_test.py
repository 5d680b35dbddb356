"""Range tests: they find the learning rates that train, by one ramped run or by a short run for each."""

import dataclasses
import itertools
from collections.abc import Generator, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax._core.typing import PyTree
from adamjax._transforms.base import Transformation, as_transformation
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.problems._check import checked
from adamjax.problems._task import Model, Task
from adamjax.schedules import range_test
from adamjax.training import ShardedTask, TrainStep, data_mesh, initial, keys_of, update_model
from adamjax.tuning._blocks import BatchSource
from adamjax.tuning._journal import Json, nan_to_null, null_to_nan
from adamjax.tuning._objective import Objective, Outcome, RunTrials, check_objective, first_losses, run_here
from adamjax.tuning._space import OptimizerFactory
from adamjax.tuning._spec import is_problem
from adamjax.tuning._sweep import sweep
from adamjax.tuning._trial import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With constant learning rates, "steep" would depend on the length of the runs: the loss falls fastest against the
# learning rate where training is half done, and longer runs get there with smaller learning rates.
METHODS = {"ramp": ("valley", "steep", "minimum/10"), "constant": ("valley", "minimum/10")}
MIN_POINTS = 10  # of a curve
OBJECTIVE_RATES = 12  # that a range test of an objective tries


@dataclasses.dataclass(frozen=True, eq=False)
class LrRange:
    """The result of a range test: the training loss against the learning rate.

    Fields:
      learning_rates: float[points], rising.
      losses: float[points], not smoothed; after some point they may be NaN.
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
        """The first point whose loss is not finite, or whose smoothed loss is 4 times the lowest so far; None for none.

        A loss with negative values must instead rise 3 times as far above its start as it fell below.
        """
        finite = _first(~np.isfinite(self.losses))
        x = _average(_median(self.losses[:finite], len(self.losses)), len(self.losses))
        if not x.size:
            return finite
        limit = 4 * np.minimum.accumulate(x) if x.min() > 0 else 4 * x[0] - 3 * x.min()
        blown = _first(x > limit)
        return finite if blown is None else blown

    @cached_property
    def smoothed(self) -> np.ndarray:
        """float[points]: a running median, then an exponential moving average; NaN from `diverged_at` on.

        It is the mean of a forward and a backward average: one alone would lag behind.
        """
        points = len(self.losses)
        x = _median(self.losses[: self.diverged_at], points)
        both = (_average(x, points) + _average(x[::-1], points)[::-1]) / 2
        return np.concatenate([both, np.full(points - len(x), np.nan)])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems of the range, and what to do about them."""
        if obstacle := self._obstacle():
            return (obstacle,)
        x = self.smoothed[: self.diverged_at]
        if x[0] - _start(x) > 0.2 * (_start(x) - x.min()):
            return ("the loss falls from the smallest learning rate on: lower min_lr",)
        return ()

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

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Plot the curve, the suggestions and the band; return a matplotlib figure.

        Args:
          path: File to save the figure to; None not to save it.

        Raises:
          ImportError: matplotlib is not installed.
        """
        figure = require("matplotlib.figure", "tune", "plotting a range test").Figure((7, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.learning_rates, self.losses, color="0.7", linewidth=1, label="loss")
        axis.plot(self.learning_rates, self.smoothed, color="C0", label="smoothed")
        if self.suggestions:
            axis.axvspan(*self.band, color="C2", alpha=0.15, label="band")
            for i, (method, lr) in enumerate(self.suggestions.items()):
                axis.axvline(lr, color=f"C{i + 3}", linestyle="--", label=f"{method}: {lr:.2g}")
            low, high = np.nanmin(self.smoothed), np.nanmax(self.smoothed)
            # Losses after a blow-up would flatten the rest of the curve.
            axis.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
        axis.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="\n".join(self.warnings))
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
        """Return the `LrRange` that `to_json` wrote."""
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

    def _obstacle(self) -> str:
        """Return the reason why the curve determines no learning rate; empty if it does."""
        x, margin = self.smoothed[: self.diverged_at], len(self.losses) // 50
        if len(x) < MIN_POINTS:
            return f"the loss blows up after {len(x)} points: lower min_lr and max_lr, or take more steps"
        noise = np.median(np.abs(self.losses[: self.diverged_at] - x))
        if x.argmin() <= margin or _start(x) - x.min() <= 2 * noise:
            return "the loss does not fall: widen the range (lower min_lr, raise max_lr), or take more steps"
        if self.diverged_at is None and x.argmin() >= len(x) - 1 - margin:
            return "the minimum lies on the edge of the range: raise max_lr"
        return ""

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


def lr_range_test(
    problem: Problem | Objective,
    *,
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
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
      min_lr: The smallest learning rate, small enough that the loss hardly changes.
      max_lr: The largest learning rate, large enough that the loss blows up.
      num_steps: Number of updates of each run, at least 10; without meaning for an objective.
      mode: "ramp": one run, whose learning rate grows exponentially from `min_lr` to `max_lr`; the curve is its losses
        up to the first that is not finite. "constant": a run for each of `num_rates` learning rates, from the same
        parameters and with the same batches; the curve is the mean loss of the last quarter of each, NaN if it
        diverged. It costs `num_rates` times as much, and is less noisy. None for "ramp", or for "constant", the only
        one there is, if it is an objective; the curve is then the first value that it reports.
      num_rates: Number of learning rates that "constant" tries, at least 10. None for 32, or 12 for an objective.
      optimizer: Called with `learning_rate` (a schedule for "ramp", a number for "constant"), returns the optimizer.
      seed: Seed of the parameters, the data order and the keys of the loss.
      mesh: Devices that train one model together, as in `adamjax.training.train`. None: one device; all of them if
        several processes each have a part of the batches from the host.

    Returns:
      An `LrRange`.

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
    ramp = range_test(min_lr, max_lr, num_steps)
    low, high = float(ramp.init), float(ramp.peak)
    checks.function("optimizer", optimizer)
    checks.integer("seed", seed)
    if not is_problem(problem):
        check_objective(problem)
        return objective_range_test(partial(_run_first_strictly, problem), optimizer, (low, high, num_rates), {}, seed)
    if mode == "ramp":
        task = checked(problem, seed)
        if mesh is None and task.is_fed and jax.process_count() > 1:
            mesh = data_mesh()
        task = task if mesh is None else ShardedTask(task, mesh)
        opt = optimizer(learning_rate=ramp)
        losses = _ramp(task, as_transformation(opt, "what the optimizer returns"), num_steps, seed)
        end = _first(~np.isfinite(losses))
        cut = slice(None if end is None else end + 1)
        return LrRange(np.geomspace(low, high, num_steps)[cut], losses[cut], mode)
    rates = np.geomspace(low, high, num_rates)
    settings = [{"learning_rate": float(lr)} for lr in rates]
    order = "auto" if mesh is None else "mesh"
    swept = sweep(
        problem, settings, optimizer=optimizer, steps=num_steps, seeds=[seed], points=4, execution=order, mesh=mesh
    )
    return LrRange(rates, np.where(swept.infeasible, np.nan, swept.losses[:, 0, -1]), mode)


def objective_range_test(
    run: RunTrials, optimizer: OptimizerFactory, rates: tuple[float, float, int], facts: dict[str, Any], seed: int
) -> LrRange:
    """Run a range test of an objective.

    Args:
      run: Runs trials of the objective.
      rates: The smallest and the largest learning rate, and how many to try.
      facts: Arguments of `Trial`.
    """
    points = np.geomspace(*rates)
    return LrRange(points, np.asarray(first_losses(run, optimizer, points, facts=facts, seed=seed)), "constant")


def _run_first_strictly(objective: Objective, trials: Iterable[Trial]) -> Generator[Outcome, None, None]:
    """Run trials; raise the exception of the first, whose learning rate is too small to be the reason."""
    for i, outcome in enumerate(run_here(objective, trials)):
        if i == 0 and outcome.exception is not None:
            raise outcome.exception
        yield outcome


def _ramp(task: Task, opt: Transformation, steps: int, seed: int) -> np.ndarray:
    """Return the losses of a run; with batches from the host, block after block."""
    source = BatchSource(task, np.asarray([seed]), np.asarray([steps]))
    keys, length = keys_of(seed), source.size or steps

    def run(model: Model, state: PyTree, block: tuple[jax.Array, PyTree]) -> tuple[Model, PyTree, jax.Array]:
        first, batches = block

        def body(carry: tuple[Model, PyTree], i: jax.Array) -> tuple[tuple[Model, PyTree], jax.Array]:
            fed = jax.tree.map(lambda x: x[i], batches)
            model, state, loss = update_model(task, opt, keys, *carry, (first + i, fed))
            return (model, state), loss

        (model, state), found = lax.scan(body, (model, state), jnp.arange(length, dtype=jnp.int32))
        return model, state, found

    advance, losses = TrainStep(run, 1), list[np.ndarray]()
    model, state = initial(task, opt, None, keys)
    for first, last, batches in itertools.chain.from_iterable(source.blocks()):
        fed = task.place(jax.tree.map(lambda x: x[0], batches), blocked=True)
        model, state, found = advance(model, state, (np.int32(first), fed))
        # The last block may be filled up by zeros.
        losses.append(np.asarray(found, np.float64)[: last - first])
    return np.concatenate(losses)


def _first(where: np.ndarray) -> int | None:
    return int(where.argmax()) if where.any() else None


def _median(x: np.ndarray, points: int) -> np.ndarray:
    """Return the running median over a fortieth of the curve, at least three points: a spike does not move it."""
    half = min(max(points // 80, 1), len(x) - 1)
    if half < 1:
        return x
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(x, half, mode="reflect"), 2 * half + 1), axis=1)


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
