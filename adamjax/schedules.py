"""Learning rate schedules, as values.

A schedule is a callable of the step count (0 for the first update) and a pytree of its numbers. It
can be printed, compared, stacked by `jax.vmap` and differentiated, and a change of one of its numbers
does not recompile. Every argument may be a Python number, an array or a tracer.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adamjax._core import checks
from adamjax._core.numerics import decay
from adamjax._core.typing import Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.plateau import PlateauState as PlateauState
from adamjax._transforms.plateau import reduce_on_plateau as reduce_on_plateau
from adamjax._transforms.schedule import FromFunction as FromFunction
from adamjax._transforms.schedule import Scaled as Scaled
from adamjax._transforms.schedule import Schedule as Schedule
from adamjax._transforms.schedule import as_schedule as as_schedule
from adamjax._transforms.schedule import to_float, to_steps


def _ramp(count: jax.Array, start: ArrayLike, steps: ArrayLike) -> jax.Array:
    """Rise linearly from 0 at `start` to exactly 1 `steps` later; jump if `steps` is 0."""
    elapsed = count - to_float(start)
    length = to_float(steps)
    return jnp.where(length > 0, jnp.clip(elapsed / jnp.maximum(length, 1), 0, 1), (elapsed >= 0).astype(count.dtype))


def _mix(a: ArrayLike, b: ArrayLike, weight: jax.Array) -> jax.Array:
    """Interpolate from `a` (weight 0) to `b` (weight 1). Unlike `a + w * (b - a)`, it is exact at both ends."""
    return (1 - weight) * to_float(a) + weight * to_float(b)


def _cosine(fraction: jax.Array) -> jax.Array:
    """Rise by half a cosine from 0 to 1, exact at both ends (the cosine of float(pi) rounds to -1)."""
    return (1 - jnp.cos(np.pi * fraction)) / 2


@value
class Constant(Schedule):
    """The same value at every step.

    Args:
      value: At least 0.
    """

    value: Scalar

    def __post_init__(self) -> None:
        self._check_numbers("value")

    @property
    def peak(self) -> Scalar:
        """The largest value."""
        return self.value

    def __call__(self, count: ArrayLike) -> jax.Array:
        return jnp.full(to_steps(count).shape, to_float(self.value))


@value
class Linear(Schedule):
    """A straight line from `init` to `end`, then constant.

    Args:
      init: The value at step 0.
      end: The value from step `total_steps` on.
      total_steps: The number of steps from `init` to `end`.

    >>> import adamjax
    >>> schedule = adamjax.schedules.linear(1.0, 0.5, total_steps=100)
    >>> [float(schedule(t)) for t in (0, 50, 100, 1000)]
    [1.0, 0.75, 0.5, 0.5]
    """

    init: Scalar
    end: Scalar
    total_steps: Scalar

    def __post_init__(self) -> None:
        self._check_numbers("init", "end")
        self._check_whole("total_steps", low=1)

    @property
    def peak(self) -> Scalar:
        """The largest value."""
        a, b = self.init, self.end
        return max(a, b) if isinstance(a, float) and isinstance(b, float) else jnp.maximum(to_float(a), to_float(b))

    def __call__(self, count: ArrayLike) -> jax.Array:
        return _mix(self.init, self.end, _ramp(to_steps(count), 0, self.total_steps))


@value
class Exponential(Schedule):
    """Exponential growth from `init` to `peak`, by the same factor at each step; for range tests.

    Args:
      init: The value at step 0; above 0.
      peak: The value from step `total_steps` on; above `init`.
      total_steps: The number of steps from `init` to `peak`.
    """

    init: Scalar
    peak: Scalar
    total_steps: Scalar

    def __post_init__(self) -> None:
        self._check_numbers("init", "peak")
        self._check_whole("total_steps", low=1)
        if isinstance(self.init, float) and isinstance(self.peak, float) and not 0 < self.init < self.peak:
            raise ValueError(f"Invalid init value: {self.init}; init must be above 0, and below peak ({self.peak})")

    def __call__(self, count: ArrayLike) -> jax.Array:
        fraction = _ramp(to_steps(count), 0, self.total_steps)
        init, peak = to_float(self.init), to_float(self.peak)
        return jnp.where(fraction < 1, init * jnp.exp(fraction * jnp.log(peak / init)), peak)


@value
class HalfLife(Schedule):
    """A decay rate whose half-life rises linearly, from that of `init` to that of `end`, then constant.

    The half-life of a mean with decay rate b is log(1/2) / log(b) steps. A linear rise of b itself would spend most
    of its steps at rates whose means are short.

    Args:
      init: The decay rate at step 0, in [0, 1).
      end: The decay rate from step `total_steps` on, in [0, 1).
      total_steps: The number of steps from `init` to `end`.

    References:
      Pagliardini et al., 2024, https://arxiv.org/abs/2409.03137, section 3.2.

    >>> import adamjax
    >>> schedule = adamjax.schedules.half_life(0.9, 0.9999, total_steps=100)
    >>> [round(float(schedule(t)), 5) for t in (0, 50, 100, 1000)]
    [0.9, 0.9998, 0.9999, 0.9999]
    """

    init: Scalar = precise_field()
    end: Scalar = precise_field()
    total_steps: Scalar

    def __post_init__(self) -> None:
        self._check_numbers("init", "end", below=1.0)
        self._check_whole("total_steps")

    @property
    def peak(self) -> Scalar:
        """The largest value."""
        ends = self.init, self.end
        return max(ends) if all(isinstance(x, float) for x in ends) else jnp.maximum(*map(to_float, ends))

    def __call__(self, count: ArrayLike) -> jax.Array:
        return jnp.exp(self._log(count))

    def below_one(self, count: ArrayLike) -> jax.Array:
        """Return the distance of the value to 1, with all digits that float32 has."""
        return -jnp.expm1(self._log(count))

    def _log(self, count: ArrayLike) -> jax.Array:
        """The logarithm of the value."""
        count = to_steps(count)
        init, end = (math.log(0.5) / decay(self, name, count.dtype).log_b for name in ("init", "end"))
        return math.log(0.5) / _mix(init, end, _ramp(count, 0, self.total_steps))


def range_test(min_lr: Scalar = 1e-6, max_lr: Scalar = 1.0, steps: Scalar = 200) -> Exponential:
    """Make the ramp of a range test: the learning rate grows by the same factor at each step.

    Train with it for `steps` steps, record the losses, and let `tuning.LrRange` read them.

    Args:
      min_lr: The learning rate of the first step, small enough that the loss hardly changes; above 0.
      max_lr: The learning rate of the last step, large enough that the loss blows up.
      steps: The number of steps, an int of at least 2.

    Returns:
      A schedule.

    Raises:
      ValueError: A number is out of range.
      TypeError: An argument is not a number.

    References:
      Smith, 2017, https://arxiv.org/abs/1506.01186, section 3.3.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> from adamjax.tuning import LrRange
    >>> ramp = adamjax.schedules.range_test(1e-5, 10.0, steps=100)
    >>> opt, x, losses = adamjax.adam(ramp), jnp.full(10, 3.0), []
    >>> state = opt.init(x)
    >>> step = jax.jit(lambda x, state: opt.step(2 * x, state, x))  # of the loss x ** 2
    >>> for _ in range(100):
    ...     losses.append(float(jnp.mean(x**2)))
    ...     x, state = step(x, state)
    >>> 0.01 < LrRange([ramp(i) for i in range(100)], losses).suggestion() < 1.0
    True
    """
    if isinstance(checks.integer("steps", steps), int) and steps < 2:
        raise ValueError(f"Invalid steps value: {steps}; steps must be at least 2")
    for name, x in (("min_lr", min_lr), ("max_lr", max_lr)):
        if isinstance(checks.number(name, x), float) and not x > 0:
            raise ValueError(f"Invalid {name} value: {x!r}; {name} must be above 0: the range is logarithmic")
    if isinstance(min_lr, (int, float)) and isinstance(max_lr, (int, float)) and min_lr >= max_lr:
        raise ValueError(f"Invalid min_lr value: {min_lr!r}; min_lr must be below max_lr, which is {max_lr!r}")
    return Exponential(min_lr, max_lr, steps - 1)


@value
class Cosine(Schedule):
    """Half a cosine from `peak` down to `end`, then constant (Loshchilov & Hutter, 2017).

    Args:
      peak: The value at step 0.
      total_steps: The number of steps from `peak` to `end`.
      end: The value from step `total_steps` on.
    """

    peak: Scalar
    total_steps: Scalar
    end: Scalar = 0.0

    def __post_init__(self) -> None:
        self._check_numbers("peak", "end")
        self._check_whole("total_steps", low=1)

    def __call__(self, count: ArrayLike) -> jax.Array:
        return _mix(self.peak, self.end, _cosine(_ramp(to_steps(count), 0, self.total_steps)))


@value
class WarmupCosine(Schedule):
    """A straight line from `init` up to `peak`, then half a cosine down to `end`.

    Args:
      peak: The value at step `warmup_steps`.
      warmup_steps: The length of the warmup; 0 starts at `peak`.
      total_steps: The step at which `end` is reached, counting the warmup.
      end: The value from step `total_steps` on.
      init: The value at step 0.

    >>> import adamjax
    >>> schedule = adamjax.schedules.warmup_cosine(0.5, warmup_steps=10, total_steps=110, end=0.25)
    >>> [float(schedule(t)) for t in (0, 5, 10, 60, 110)]
    [0.0, 0.25, 0.5, 0.375, 0.25]
    """

    peak: Scalar
    warmup_steps: Scalar
    total_steps: Scalar
    end: Scalar = 0.0
    init: Scalar = 0.0

    def __post_init__(self) -> None:
        self._check_numbers("peak", "end", "init")
        self._check_whole("warmup_steps")
        self._check_whole("total_steps", low=1)
        self._check_fit("warmup_steps")

    def __call__(self, count: ArrayLike) -> jax.Array:
        count = to_steps(count)
        rise = _ramp(count, 0, self.warmup_steps)
        fall = _ramp(count, self.warmup_steps, to_float(self.total_steps) - to_float(self.warmup_steps))
        return jnp.where(rise < 1, _mix(self.init, self.peak, rise), _mix(self.peak, self.end, _cosine(fall)))


@value
class WarmupStableDecay(Schedule):
    """A line up to `peak`, a constant phase, and a decay to `end` in the last `decay_steps`.

    The stable phase can be prolonged, so `total_steps` need not be fixed beforehand (Hu et al., 2024,
    MiniCPM; Hägele et al., 2024, who found the square root shape of decay better than a line).

    Args:
      peak: The value of the stable phase.
      warmup_steps: The length of the linear warmup from `init`; 0 starts at `peak`.
      total_steps: The step at which `end` is reached.
      decay_steps: The length of the decay, within `total_steps`.
      end: The value from step `total_steps` on.
      init: The value at step 0.
      shape: The shape of the decay: `"linear"`, or `"sqrt"` for 1 - sqrt(fraction).
    """

    peak: Scalar
    warmup_steps: Scalar
    total_steps: Scalar
    decay_steps: Scalar
    end: Scalar = 0.0
    init: Scalar = 0.0
    shape: Literal["linear", "sqrt"] = static_field(default="linear")

    def __post_init__(self) -> None:
        self._check_numbers("peak", "end", "init")
        self._check_whole("warmup_steps", "decay_steps")
        self._check_whole("total_steps", low=1)
        self._check_fit("warmup_steps", "decay_steps")
        checks.choice("shape", self.shape, ("linear", "sqrt"))

    def __call__(self, count: ArrayLike) -> jax.Array:
        count = to_steps(count)
        rise = _ramp(count, 0, self.warmup_steps)
        fall = _ramp(count, to_float(self.total_steps) - to_float(self.decay_steps), self.decay_steps)
        if self.shape == "sqrt":
            # Guard the root: its slope is infinite at the start of the decay, and its gradient would be NaN.
            fall = jnp.where(fall > 0, jnp.sqrt(jnp.where(fall > 0, fall, 1)), 0)
        return jnp.where(rise < 1, _mix(self.init, self.peak, rise), _mix(self.peak, self.end, fall))


@value
class InverseSqrt(Schedule):
    """A straight line up to `peak`, then `peak * sqrt(warmup_steps / count)` (Vaswani et al., 2017).

    Args:
      peak: The value at step `warmup_steps`.
      warmup_steps: The length of the warmup and the time scale of the decay; at least 1.
      init: The value at step 0.

    >>> import adamjax
    >>> schedule = adamjax.schedules.inverse_sqrt(1.0, warmup_steps=100)
    >>> [float(schedule(t)) for t in (0, 50, 100, 400)]
    [0.0, 0.5, 1.0, 0.5]
    """

    peak: Scalar
    warmup_steps: Scalar
    init: Scalar = 0.0

    def __post_init__(self) -> None:
        self._check_numbers("peak", "init")
        self._check_whole("warmup_steps", low=1)

    def __call__(self, count: ArrayLike) -> jax.Array:
        count, warmup = to_steps(count), to_float(self.warmup_steps)
        decay = jnp.sqrt(warmup / jnp.maximum(count, warmup))
        rise = _ramp(count, 0, warmup)
        return jnp.where(rise < 1, _mix(self.init, self.peak, rise), decay * to_float(self.peak))


@value
class OneCycle(Schedule):
    """Half a cosine up to `peak`, then half a cosine down to far below the start (Smith & Topin, 2019).

    Args:
      peak: The largest value, reached at step `round(pct_start * total_steps)`.
      total_steps: The step at which the end is reached.
      pct_start: The fraction of the steps spent rising, in [0, 1).
      div_factor: The ratio of `peak` to the value at step 0.
      final_div_factor: The ratio of the value at step 0 to the value from step `total_steps` on.
    """

    peak: Scalar
    total_steps: Scalar
    pct_start: Scalar = 0.3
    div_factor: Scalar = 25.0
    final_div_factor: Scalar = 1e4

    def __post_init__(self) -> None:
        self._check_numbers("peak")
        self._check_numbers("pct_start", below=1.0)
        self._check_numbers("div_factor", "final_div_factor", low=1.0)
        self._check_whole("total_steps", low=1)

    def __call__(self, count: ArrayLike) -> jax.Array:
        count, total = to_steps(count), to_float(self.total_steps)
        start = to_float(self.peak) / to_float(self.div_factor)
        top = jnp.round(to_float(self.pct_start) * total)
        rise, fall = _ramp(count, 0, top), _ramp(count, top, total - top)
        return jnp.where(
            rise < 1,
            _mix(start, self.peak, _cosine(rise)),
            _mix(self.peak, start / to_float(self.final_div_factor), _cosine(fall)),
        )


@value
class Proportional(Schedule):
    """A value proportional to another schedule: `level * schedule(count) / schedule.peak`.

    It is always 0 if the peak of the other schedule is 0.
    """

    level: Scalar | Schedule
    schedule: Schedule

    def __post_init__(self) -> None:
        if not callable(self.level):
            self._check_numbers("level")
        if not (callable(self.schedule) and hasattr(self.schedule, "peak")):
            raise TypeError(f"Invalid schedule value: {self.schedule!r}; schedule must be one that has a peak")

    @property
    def peak(self) -> Scalar:
        """The largest value."""
        return self.level.peak if callable(self.level) else self.level

    def __call__(self, count: ArrayLike) -> jax.Array:
        level = self.level(count) if callable(self.level) else self.level
        peak = to_float(self.schedule.peak)
        share = jnp.where(peak > 0, to_float(self.schedule(count)) / jnp.where(peak > 0, peak, 1), 0)
        return to_float(level) * share


constant = Constant
linear = Linear
cosine = Cosine
warmup_cosine = WarmupCosine
warmup_stable_decay = WarmupStableDecay
inverse_sqrt = InverseSqrt
one_cycle = OneCycle
half_life = HalfLife
scaled = Scaled
