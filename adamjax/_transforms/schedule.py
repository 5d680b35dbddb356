"""The base of schedules, and of the transformations by one hyperparameter that may be a schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from adamjax._core import checks, trees
from adamjax._core.typing import PyTree, Scalar, ScalarOrSchedule, ScheduleLike
from adamjax._core.value import Value, is_static_callable, static_field, value
from adamjax._transforms.base import Leafwise


class Schedule(Value):
    """Base of all schedules.

    Call it with a step count (an int or an integer array of any shape, 0 for the first update). It
    returns the value at that step, in the shape of the count, as float32 (float64 under `jax_enable_x64`).
    `peak` is its largest value.

    Raises:
      ValueError, TypeError: At construction, a number is out of range or not a number, or phases do not fit
        into `total_steps`. At a call, the count is not a real number.
    """

    peak: Any  # a number; a field or a property

    def __call__(self, count: ArrayLike) -> Array:
        raise NotImplementedError

    def below_one(self, count: ArrayLike) -> Array:
        """Return the distance of the value to 1. A schedule of a decay rate may know more digits of it than this."""
        return 1 - self(count)

    def _check_fit(self, *phases: str) -> None:
        lengths = [getattr(self, name) for name in (*phases, "total_steps")]
        if all(isinstance(n, float) for n in lengths) and sum(lengths[:-1]) > lengths[-1]:
            raise ValueError(
                f"Invalid {phases[0]} value: {lengths[0]:g}; {' + '.join(phases)} is {sum(lengths[:-1]):g}, "
                f"it must fit into total_steps, which is {lengths[-1]:g}"
            )


@value
class FromFunction(Schedule):
    """Any callable of the step count, such as a schedule of optax. It is static and has no `peak`."""

    function: Callable[..., Any] = static_field()

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Invalid function value: {self.function!r}; function must be one of the step count")

    def __call__(self, count: ArrayLike) -> Array:
        return self.function(count)


@value
class Scaled(Schedule):
    """A number or another schedule times a factor.

    Args:
      factor: At least 0.
      schedule: A number, or any callable of the step count.

    >>> import adamjax
    >>> schedule = adamjax.schedules.scaled(0.5, adamjax.schedules.linear(1.0, 0.0, total_steps=100))
    >>> [float(schedule(t)) for t in (0, 50, 100)]
    [0.5, 0.25, 0.0]
    """

    factor: Scalar
    schedule: ScalarOrSchedule

    def __post_init__(self) -> None:
        self._check_numbers("factor")
        self._replace_field("schedule", number_or_schedule("schedule", self.schedule))

    @property
    def peak(self) -> Scalar:
        """The largest value."""
        base: Any = self.schedule
        return self.factor * (base.peak if callable(base) else base)

    def __call__(self, count: ArrayLike) -> Array:
        base = self.schedule(jnp.asarray(count)) if callable(self.schedule) else self.schedule
        return jnp.broadcast_to(to_float(self.factor) * to_float(base), to_steps(count).shape)


def as_schedule(x: ScheduleLike) -> Any:
    """Wrap a plain function as a schedule. Return schedules and other callable pytrees unchanged.

    Args:
      x: A callable of the step count.

    Returns:
      `x` if it is a pytree; else a `FromFunction`, whose function is static.

    Raises:
      TypeError: `x` is not callable.
    """
    if not callable(x):
        raise TypeError(f"Invalid schedule: {x!r}; a schedule is a function of the step count")
    return FromFunction(x) if is_static_callable(x) else x


def to_float(x: ArrayLike) -> Array:
    """Convert a count or a number to the dtype of the schedule, as a strongly typed array."""
    dtype = jnp.result_type(float)
    if isinstance(x, (int, float, np.ndarray, np.generic)):
        x = np.asarray(x, dtype)  # JAX would convert to int32 first, which some counts overflow
    return jnp.asarray(x).astype(dtype)


def to_steps(count: ArrayLike) -> Array:
    """Check a step count, and convert it to the dtype of schedules."""
    return to_float(checks.steps(count))


def number_or_schedule(name: str, x: ScalarOrSchedule, low: float = 0.0) -> ScalarOrSchedule:
    """Check a hyperparameter that may be a schedule; a plain function becomes one."""
    return as_schedule(x) if callable(x) else checks.number(name, x, low=low)


class ScheduleState(NamedTuple):
    """The position in a schedule.

    Fields:
      count: int32 scalar, the number of steps done; stays at its largest value once there.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with


jax.export.register_namedtuple_serialization(ScheduleState, serialized_name="adamjax.ScheduleState")


class Scheduled(Leafwise):
    """Base of the transformations by one hyperparameter that may be a schedule.

    The state is then a `ScheduleState`, else empty.
    """

    @property
    def _schedule(self) -> ScalarOrSchedule:
        raise NotImplementedError

    def _init(self, params: PyTree) -> PyTree:
        return ScheduleState(trees.zero_count(params)) if callable(self._schedule) else ()

    def _current_value(self, state: PyTree) -> tuple[Any, PyTree]:
        """The hyperparameter at this step, and the state after it."""
        x = self._schedule
        if not callable(x):
            return x, state
        state = checks.state(state, ScheduleState, type(self).__name__)
        return x(state.count), ScheduleState(trees.increment(state.count))
