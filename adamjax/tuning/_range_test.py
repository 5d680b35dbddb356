"""Range tests: which learning rates train at all, from one run or from a short one each."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax._transforms.base import as_transformation
from adamjax.optimizers import adamw
from adamjax.problems import Problem, check
from adamjax.schedules import Exponential
from adamjax.training import run_keys, train_step
from adamjax.tuning._sweep import sweep
from adamjax.tuning._trial import nulls, numbers

# A constant learning rate has no "steep": the loss of short runs falls fastest where they are half
# done, and that learning rate is smaller the longer they are.
METHODS = {"ramp": ("valley", "steep", "minimum/10"), "constant": ("valley", "minimum/10")}
FEWEST = 10  # points that make a curve


@dataclasses.dataclass(frozen=True, eq=False)
class LrRange:
    """What a range test found: the training loss against the learning rate.

    Fields:
      learning_rates: float[points], rising.
      losses: float[points], as they were; from some point on they may be NaN.
      mode: "ramp" or "constant"; see `lr_range_test`.

    Raises:
      ValueError: The arrays are not of this kind, or `mode` is not one of these.
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
        """The first point that is not considered: its loss is not finite, or its smoothed loss 4 times the best.

        None where there is none. A loss that can be negative must instead rise 3 times as far above
        the start as it fell below.
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
        """float[points]: running median, then bias-corrected exponential moving average; NaN where not considered.

        The average is that of both directions: one alone would lag behind.
        """
        points = len(self.losses)
        x = _median(self.losses[: self.diverged_at], points)
        both = (_average(x, points) + _average(x[::-1], points)[::-1]) / 2
        return np.concatenate([both, np.full(points - len(x), np.nan)])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the range, and what to do."""
        if obstacle := self._obstacle():
            return (obstacle,)
        x = self.smoothed[: self.diverged_at]
        if x[0] - _start(x) > 0.2 * (_start(x) - x.min()):
            return ("the loss falls from the smallest learning rate on: lower min_lr",)
        return ()

    @property
    def band(self) -> tuple[float, float]:
        """The usable learning rates: from where a tenth of the fall is done, to half of that of the minimum.

        Raises:
          ValueError: The curve does not say; see `suggestion`.
        """
        low, best = self._valley()
        return low, max(best / 2, (low * best) ** 0.5)

    def suggestion(self, method: str = "valley") -> float:
        """The learning rate to train with, as the smoothed loss says; methods are those of fastai.

        Args:
          method: "valley": two thirds (in the logarithm) into the stretch where the loss falls, from
            where a tenth of the fall is done to the minimum. "minimum/10": a tenth of the learning
            rate of the minimum. "steep" (of a ramp only): where the loss falls fastest against the
            logarithm of the learning rate.

        Raises:
          ValueError: The curve does not say, since the loss does not fall, has no minimum inside the
            range, or blows up at once; or the mode has no such method.
        """
        checks.choice("method", method, METHODS[self.mode])
        low, best = self._valley()
        if method == "valley":
            return float(low ** (1 / 3) * best ** (2 / 3))
        if method == "minimum/10":
            return best / 10
        # Over a twentieth of the curve: from point to point, slopes are mostly noise.
        half, end = max(len(self.losses) // 40, 1), int(np.nanargmin(self.smoothed))
        i = np.arange(self._begin(), end + 1)
        before, after = np.maximum(i - half, 0), np.minimum(i + half, end)
        x = np.log(self.learning_rates)
        slope = (self.smoothed[after] - self.smoothed[before]) / (x[after] - x[before])
        return float(self.learning_rates[i[slope.argmin()]])

    @property
    def suggestions(self) -> dict[str, float]:
        """What each method suggests; empty where the curve does not say."""
        return {} if self._obstacle() else {method: self.suggestion(method) for method in METHODS[self.mode]}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the curve, the suggestions and the band; a matplotlib figure.

        Args:
          path: Where to save it; None for nowhere.

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
            # What comes after a blow-up would flatten the rest.
            axis.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
        axis.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="\n".join(self.warnings))
        axis.legend()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON's types; losses that are not finite become null."""
        return {
            "learning_rates": self.learning_rates.tolist(),
            "losses": nulls(self.losses.tolist()),
            "mode": self.mode,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LrRange":
        """The inverse of `to_json`."""
        return cls(np.asarray(content["learning_rates"]), np.asarray(numbers(content["losses"])), content["mode"])

    def __repr__(self) -> str:
        rates, end = self.learning_rates, self.diverged_at
        found = [f"{len(rates)} points from {rates[0]:.3g} to {rates[-1]:.3g}"]
        if end is not None:
            found.append(f"diverged at {rates[end]:.3g}")
        if self.suggestions:
            found += [f"{method} {lr:.3g}" for method, lr in self.suggestions.items()]
            found.append(f"band {self.band[0]:.3g} to {self.band[1]:.3g}")
        return f"LrRange({self.mode}: {', '.join([*found, *self.warnings])})"

    def _obstacle(self) -> str:
        """Why the curve does not say which learning rate is good; empty where it does."""
        x, margin = self.smoothed[: self.diverged_at], len(self.losses) // 50
        if len(x) < FEWEST:
            return f"the loss blows up after {len(x)} points: lower min_lr and max_lr, or take more steps"
        noise = np.median(np.abs(self.losses[: self.diverged_at] - x))
        if x.argmin() <= margin or _start(x) - x.min() <= 2 * noise:
            return "the loss does not fall: widen the range (lower min_lr, raise max_lr), or take more steps"
        if self.diverged_at is None and x.argmin() >= len(x) - 1 - margin:
            return "the minimum lies on the edge of the range: raise max_lr"
        return ""

    def _valley(self) -> tuple[float, float]:
        """The learning rates where the fall has clearly begun, and of the minimum."""
        if obstacle := self._obstacle():
            raise ValueError(f"no learning rate can be suggested: {obstacle}")
        return float(self.learning_rates[self._begin()]), float(self.learning_rates[np.nanargmin(self.smoothed)])

    def _begin(self) -> int:
        """The point from which on a tenth of the fall is done, up to the minimum."""
        x = self.smoothed[: int(np.nanargmin(self.smoothed)) + 1]
        start = _start(self.smoothed[: self.diverged_at])
        return int(np.flatnonzero(x >= start - 0.1 * (start - x[-1])).max(initial=-1)) + 1


def lr_range_test(
    problem: Problem,
    *,
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
    num_steps: int = 200,
    mode: str = "ramp",
    num_rates: int = 32,
    optimizer: Callable[..., Any] = adamw,
    seed: int = 0,
) -> LrRange:
    """Train with learning rates from far too small to far too large, and watch the training loss.

    Args:
      problem: What to train.
      min_lr, max_lr: The range: wide enough that the loss stands still at one end, and blows up at
        the other.
      num_steps: Updates of each run, at least 10.
      mode: "ramp": one run, whose learning rate grows exponentially from `min_lr` to `max_lr`; its
        losses up to the first that is not finite. "constant": a run for each of `num_rates`
        learning rates, from the same start and with the same batches; the mean loss of its last
        quarter, NaN where it diverged. It costs `num_rates` times as much, and is less noisy.
      num_rates: How many learning rates "constant" tries, at least 10.
      optimizer: Called with `learning_rate` (a schedule for "ramp", a number for "constant"),
        returns the optimizer.
      seed: Of the parameters, the data order and the keys of the loss.

    Returns:
      An `LrRange`.

    Raises:
      ValueError: A number is out of range, or `mode` is not one of these.
      TypeError: `problem` is not a `Problem`, or a number is not one.

    References:
      Smith, 2017, https://arxiv.org/abs/1506.01186, section 3.3.

    >>> import adamjax
    >>> from adamjax.tuning import lr_range_test
    >>> found = lr_range_test(adamjax.problems.digits())
    >>> 1e-3 < found.suggestion() < 1e-1
    True
    """
    checks.choice("mode", mode, tuple(METHODS))
    low, high = checks.number("min_lr", min_lr), checks.number("max_lr", max_lr)
    if low <= 0:
        raise ValueError(f"Invalid min_lr value: {min_lr!r}; min_lr must be above 0, the range is logarithmic")
    if low >= high:
        raise ValueError(f"Invalid min_lr value: {min_lr!r}; min_lr must be below max_lr, which is {max_lr!r}")
    for name, x in (("num_steps", num_steps), ("num_rates", num_rates)):
        checks.count(name, x, FEWEST)
    checks.function("optimizer", optimizer)
    checks.integer("seed", seed)
    if mode == "ramp":
        check(problem)
        losses = _ramp(problem, optimizer(learning_rate=Exponential(low, high, num_steps - 1)), num_steps, seed)
        end = _first(~np.isfinite(losses))
        cut = slice(None if end is None else end + 1)
        return LrRange(np.geomspace(low, high, num_steps)[cut], losses[cut], mode)
    rates = np.geomspace(low, high, num_rates)
    settings = [{"learning_rate": float(lr)} for lr in rates]
    found = sweep(problem, settings, optimizer=optimizer, steps=num_steps, seeds=[seed], points=4)
    return LrRange(rates, np.where(found.infeasible, np.nan, found.losses[:, 0, -1]), mode)


def _ramp(problem: Problem, optimizer: Any, steps: int, seed: int) -> np.ndarray:
    """The losses of one run, in one program."""
    opt = as_transformation(optimizer, "what the optimizer returns")

    @jax.jit
    def run(keys: Any) -> jax.Array:
        def body(carry: tuple[Any, Any], step: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
            params, state, loss = train_step(problem, opt, keys, *carry, step)
            return (params, state), loss

        params = problem.init(keys.init)
        return lax.scan(body, (params, opt.init(params)), jnp.arange(steps, dtype=jnp.int32))[1]

    return np.asarray(run(run_keys(seed)), np.float64)


def _first(where: np.ndarray) -> int | None:
    return int(where.argmax()) if where.any() else None


def _median(x: np.ndarray, points: int) -> np.ndarray:
    """Running median over a fortieth of the curve, at least three points: a spike does not move it."""
    half = min(max(points // 80, 1), len(x) - 1)
    if half < 1:
        return x
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(x, half, mode="reflect"), 2 * half + 1), axis=1)


def _average(x: np.ndarray, points: int) -> np.ndarray:
    """Bias-corrected exponential moving average; it remembers a fortieth of the curve."""
    decay, total, weight, averages = 1 - 1 / (1 + points / 40), 0.0, 0.0, []
    for loss in x:
        total, weight = decay * total + loss, decay * weight + 1
        averages.append(total / weight)
    return np.asarray(averages)


def _start(x: np.ndarray) -> Any:
    """The level that a smoothed loss falls from: that of the first quarter of the way to the minimum."""
    return np.median(x[: int(x.argmin()) // 4 + 1])
