"""The types that annotations share."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike as DTypeLike

PyTree = Any  # as in JAX itself: any nesting of registered nodes
Extra = Mapping[str, Any]  # keyword arguments of `update`, such as optax's `value`
Scalar = float | np.ndarray | jax.Array  # a hyperparameter: a number, a 0-d array or a tracer
ScheduleLike = Callable[[jax.Array], jax.typing.ArrayLike]  # from the step count to a hyperparameter
ScalarOrSchedule = Scalar | ScheduleLike
Mask = PyTree | Callable[[PyTree], PyTree] | None  # a tree of bools, a function that makes one, or None for all leaves
AxisName = str | tuple[str, ...] | None
Path = tuple[Any, ...]  # JAX's keys from the root of a tree to a leaf

AMSGrad = Literal["torch", "corrected", "paper"]
DecaySchedule = Literal["lr", "independent"]
FusedMode = Literal["auto"] | bool


class GradientTransformation(Protocol):
    """Any pair of `init` and `update`: one of adamjax's transformations, optax's, or another library's."""

    @property
    def init(self) -> Callable[..., PyTree]:
        """Called as `init(params)`; returns the state."""

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """Called as `update(updates, state, params, **extra)`; returns the updates and the new state."""
