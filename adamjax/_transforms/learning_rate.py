"""The learning rate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.numerics import scale
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree, ScalarOrSchedule
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Transformation
from adamjax._transforms.chain import chain
from adamjax._transforms.leafwise import LeafOp, LeafTransform, as_constants
from adamjax._transforms.rates import as_rate
from adamjax._transforms.schedule import Scheduled, number_or_schedule


@dataclass(frozen=True)
class ScaleLeaves(LeafTransform):
    """Multiply each leaf by a factor."""

    factor: Callable[[np.dtype], Any]  # from a dtype, the factor in it
    state: PyTree  # the transformation's state after the step

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        dtype = trees.compute_dtype(dtype)
        return (LeafOp(scale_update, self.factor(dtype), dtype),)


def scale_update(u: Array, p: Any, state: Any, factor: Array) -> tuple[Array, Any]:
    """A `LeafFunction`: the update times the factor."""
    return scale(u, factor), state


@value
class ScaleByLearningRate(Scheduled):
    """See `scale_by_learning_rate`."""

    learning_rate: ScalarOrSchedule
    flip_sign: bool = static_field(default=True)

    def __post_init__(self) -> None:
        self._replace_field("learning_rate", number_or_schedule("learning_rate", self.learning_rate))
        checks.choice("flip_sign", self.flip_sign, (False, True))

    @property
    def _schedule(self) -> ScalarOrSchedule:
        return self.learning_rate

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        rate, state = self._current_value(state)
        factor = signed_factor("learning_rate", rate, -1 if self.flip_sign else 1, updates)
        return [ScaleLeaves(factor, state)]

    def _learning_rate(self, state: PyTree) -> Any:
        return as_rate(self._current_value(state)[0])


def signed_factor(name: str, x: Any, sign: int, updates: Leaves) -> Callable[[np.dtype], Any]:
    """The hyperparameter `x`, with a sign, as a function of the dtype that it is wanted in."""
    # One array for all leaves of a dtype, a constant of the program where the updates are traced.
    traced = next((u for u in updates.leaves if isinstance(u, jax.core.Tracer)), None)
    return cache(lambda dtype: as_constants(sign * checks.as_scalar(name, x, dtype), traced))


def scale_by_learning_rate(learning_rate: ScalarOrSchedule | None, *, flip_sign: bool = True) -> Transformation:
    """Multiply by the learning rate, and turn the direction of ascent into one of descent.

    Args:
      learning_rate: At least 0; or a schedule: any callable of the step count, which is 0 for the
        first update. None for no scaling (and no change of sign), as in optax.
      flip_sign: False to go on uphill.

    Returns:
      A transformation; its state counts the steps where the learning rate is a schedule.

    Raises:
      ValueError, TypeError: `learning_rate` is not such a number.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.scale_by_learning_rate(0.5)
    >>> opt.update(jnp.array([2.0, -4.0]), opt.init(jnp.zeros(2)))[0]
    Array([-1.,  2.], dtype=float32)
    """
    return chain() if learning_rate is None else ScaleByLearningRate(learning_rate, flip_sign)
