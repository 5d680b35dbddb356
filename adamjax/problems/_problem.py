"""What a problem is: everything a training run needs but the optimizer."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from adamjax._core import checks


@runtime_checkable
class Problem(Protocol):
    """A model with its data. All methods are pure and can be jitted.

    Keys come from the caller, so that one problem object serves any number of runs at once.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> class Line:  # y = 2 x + 1
    ...     def init(self, key):
    ...         return {"slope": jnp.zeros(()), "offset": jnp.zeros(())}
    ...     def batch(self, step, key):
    ...         x = jax.random.normal(jax.random.fold_in(key, step), (16,))
    ...         return x, 2 * x + 1
    ...     def loss(self, params, batch, key):
    ...         x, y = batch
    ...         return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)
    ...     def evaluate(self, params):
    ...         return {"loss": (params["slope"] - 2) ** 2 + (params["offset"] - 1) ** 2}
    >>> adamjax.problems.check(Line())
    """

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters: a pytree of floating point or complex arrays."""

    def batch(self, step: jax.Array, key: jax.Array) -> Any:
        """The data of update `step` (an int32 scalar, 0 for the first); `key` is the run's."""

    def loss(self, params: Any, batch: Any, key: jax.Array) -> jax.Array:
        """The loss on one batch, a real scalar; `key` is new at every step (for dropout)."""

    def evaluate(self, params: Any) -> Mapping[str, jax.Array]:
        """Scalars measured on validation data, one of them called "loss"."""


def check(problem: Any) -> None:
    """Check that an object is a `Problem`, by shapes alone: nothing is computed.

    Args:
      problem: The object.

    Raises:
      TypeError: A method is missing, or returns something else than the protocol says; or it is a class.
    """
    if isinstance(problem, type):
        raise TypeError(f"{problem.__name__} is a class, and no problem: make one, {problem.__name__}(...)")
    missing = [name for name in ("init", "batch", "loss", "evaluate") if not callable(getattr(problem, name, None))]
    if missing:
        raise TypeError(
            f"{type(problem).__name__} is not a problem: it has no method {', '.join(missing)} "
            "(see adamjax.problems.Problem)"
        )
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    params = jax.eval_shape(problem.init, key)
    checks.parameters(params)
    batch = jax.eval_shape(problem.batch, jax.ShapeDtypeStruct((), jnp.int32), key)
    loss = jax.eval_shape(problem.loss, params, batch, key)
    if not (isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        raise TypeError(f"{type(problem).__name__}.loss returns {loss}, expected a real floating point scalar")
    metrics = jax.eval_shape(problem.evaluate, params)
    if not (isinstance(metrics, Mapping) and "loss" in metrics):
        raise TypeError(f'{type(problem).__name__}.evaluate returns {metrics}, expected a dict with "loss" in it')
    for name, x in metrics.items():
        if not (isinstance(x, jax.ShapeDtypeStruct) and x.shape == ()):
            raise TypeError(f"{type(problem).__name__}.evaluate returns {x} for {name!r}, expected a scalar")
