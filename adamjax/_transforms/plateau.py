"""Lower the learning rate when the loss stops falling: a transformation, because it has a state."""

from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.numerics import scale
from adamjax._core.typing import Extra, PyTree, Scalar
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Transformation
from adamjax._transforms.rates import Factor, as_rate


class PlateauState(NamedTuple):
    """The state of `reduce_on_plateau`: scalars. Floating point ones are float32 (float64 in x64 mode).

    Fields:
      scale: The factor that updates are multiplied by.
      best: The best mean so far; of the negated values if the mode is "max".
      mean: The mean of the values since the last comparison.
      count: int32, the number of these values.
      plateau: int32, comparisons without improvement since the best, or since the last reduction.
      cooldown: int32, comparisons still to ignore.
    """

    scale: Array
    best: Array
    mean: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count
    plateau: Array
    cooldown: Array


jax.export.register_namedtuple_serialization(PlateauState, serialized_name="adamjax.PlateauState")


@value
class ReduceOnPlateau(Transformation):
    """See `reduce_on_plateau`."""

    factor: Scalar
    patience: Scalar
    rtol: Scalar
    atol: Scalar
    cooldown: Scalar
    accumulation_size: Scalar
    min_scale: Scalar
    mode: Literal["min", "max"] = static_field(default="min")
    variant: Literal["optax", "torch"] = static_field(default="optax")

    def __post_init__(self) -> None:
        checks.choice("variant", self.variant, ("optax", "torch"))
        self._check_numbers("factor", below=1.0)
        self._check_whole("patience", below=2**31)
        known = self.patience if isinstance(self.patience, (float, np.ndarray)) else 1
        if self.variant == "optax" and np.any(np.less(known, 1)):
            raise ValueError(
                f"Invalid patience value: {self.patience}; patience must be at least 1, which reduces at the first "
                "comparison without improvement; so does patience=0 with variant='torch'"
            )
        self._check_whole("accumulation_size", low=1.0, below=2**31)
        self._check_whole("cooldown", below=2**31)
        self._check_numbers("rtol", "atol", "min_scale")
        checks.choice("mode", self.mode, ("min", "max"))

    def _init(self, params: PyTree) -> PlateauState:
        def real(x: float) -> Array:
            return jnp.full((), x, jnp.result_type(float))

        def zero() -> Array:  # a buffer for each field, so that all can be donated
            return jnp.zeros((), jnp.int32)

        def make() -> PlateauState:
            return PlateauState(real(1.0), real(jnp.inf), real(0.0), zero(), zero(), zero())

        return trees.make_on_mesh_of(make, params)

    def _update(
        self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra
    ) -> tuple[PyTree, PlateauState]:
        state = checks.state(state, PlateauState, type(self).__name__)
        if "value" not in extra:
            raise ValueError(
                "ReduceOnPlateau needs the value that it watches: call update(grads, state, params, value=loss). "
                "Any transformation or training loop around it has to pass it on"
            )
        state = self._judge(state, checks.as_scalar("value", extra["value"], state.mean.dtype))
        factor = cache(lambda dtype: state.scale.astype(dtype))
        return trees.map_leaves(lambda u: scale(u, factor(trees.compute_dtype(trees.dtype_of(u)))), updates), state

    def _learning_rate(self, state: PyTree) -> Any:
        return Factor(as_rate(checks.state(state, PlateauState, type(self).__name__).scale))

    def _judge(self, state: PlateauState, x: Array) -> PlateauState:
        """Return the state after one more value. Compare their mean once `accumulation_size` values are there."""

        def number(name: str, dtype: np.dtype) -> Array:
            return checks.as_scalar(name, getattr(self, name), dtype)

        real, whole = state.mean.dtype, jnp.dtype(jnp.int32)
        count = state.count + 1
        mean = state.mean + ((x if self.mode == "min" else -x) - state.mean) / count.astype(real)
        as_torch = self.variant == "torch"
        # Use |best|: if best is negative, subtracting a share of it makes the goal easier, as it does in torch.
        size = state.best if as_torch and self.mode == "min" else -state.best if as_torch else jnp.abs(state.best)
        goal = state.best - (number("rtol", real) * size + number("atol", real))
        improved = mean < jnp.where(jnp.isinf(state.best), state.best, goal)
        cooling = state.cooldown > 0
        plateau = jnp.where(improved | cooling, 0, state.plateau + 1)
        patience = number("patience", whole)
        falls = plateau > patience if as_torch else plateau >= patience
        lower = jnp.maximum(state.scale * number("factor", real), number("min_scale", real))
        judged = PlateauState(
            jnp.where(falls, jnp.minimum(lower, state.scale), state.scale),
            jnp.where(improved, mean, state.best),
            jnp.zeros_like(mean),
            jnp.zeros_like(count),
            jnp.where(falls, 0, plateau),
            jnp.where(falls, number("cooldown", whole), jnp.maximum(state.cooldown - 1, 0)),
        )
        due = count >= number("accumulation_size", whole)
        waiting = state._replace(mean=mean, count=count)
        return jax.tree.map(lambda a, b: jnp.where(due, a, b), judged, waiting)


def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: Scalar = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: Scalar = 0,
    accumulation_size: Scalar = 1,
    min_scale: Scalar = 0.0,
    *,
    mode: Literal["min", "max"] = "min",
    variant: Literal["optax", "torch"] = "optax",
) -> ReduceOnPlateau:
    """Scale the updates down whenever a watched value has stopped improving.

    Put this transformation at the end of a chain: `update` and `step` then take the value as an extra
    argument, `value=loss`. A value is an improvement if it is below the best by more than
    rtol * |best| + atol, whatever its sign. NaN is not an improvement.

    Args:
      factor: The factor of each reduction, in [0, 1).
      patience: The number of comparisons without improvement that make a reduction, at least 1; with
        `variant="torch"`, the number that are let pass before it, at least 0.
      rtol, atol: Relative and absolute thresholds of an improvement; at least 0.
      cooldown: The number of comparisons to ignore after each reduction.
      accumulation_size: The number of values to average before each comparison; use more than 1 for
        the losses of minibatches.
      min_scale: The smallest scale; at least 0.
      mode: "min", or "max" for a value that should grow.
      variant: "optax": patience counts as in `optax.contrib.reduce_on_plateau`. "torch": as in torch's
        `ReduceLROnPlateau`, which reduces one comparison later, and whose relative threshold takes every
        value for an improvement while the best is negative. Its threshold is `rtol`, or `atol` with
        `rtol=0` for `threshold_mode="abs"`; its `min_lr` is `min_scale` times the learning rate; its `eps` is 0.

    Returns:
      A transformation with state `PlateauState`.

    Raises:
      ValueError, TypeError: An argument is out of range; at `update`, if `value` is missing.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.chain(adamjax.adam(0.1), adamjax.schedules.reduce_on_plateau(0.5, patience=1))
    >>> params = jnp.zeros(1)
    >>> state = opt.init(params)
    >>> for loss in (-1.0, -2.0, -2.0):
    ...     params, state = opt.step(jnp.ones(1), state, params, value=loss)
    ...     print(state[1].scale)
    1.0
    1.0
    0.5
    """
    return ReduceOnPlateau(factor, patience, rtol, atol, cooldown, accumulation_size, min_scale, mode, variant)
