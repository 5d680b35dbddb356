"""The protocol of problems: everything that a training run needs but the optimizer."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from adamjax._core import checks
from adamjax._core.typing import PyTree


@runtime_checkable
class Problem(Protocol):
    """A model and its data. All methods are pure and can be jitted.

    The caller passes the keys, so that one problem serves any number of runs at once.

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

    def init(self, key: jax.Array) -> PyTree:
        """Return initial parameters: a pytree of floating point or complex arrays."""

    def batch(self, step: jax.Array, key: jax.Array) -> PyTree:
        """Return the data of update `step` (an int32 scalar, 0 for the first); `key` is the same for all of a run."""

    def loss(self, params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        """Return the loss on one batch, a real scalar; `key` is new at every step (for dropout)."""

    def evaluate(self, params: PyTree) -> Mapping[str, jax.Array]:
        """Return scalars measured on validation data, one of them named "loss"."""


def check(problem: Any) -> None:
    """Check that an object is a `Problem`, from shapes alone: nothing is computed.

    Args:
      problem: The object.

    Raises:
      TypeError: The object is a class, lacks a method, or a method does not return what the protocol says.
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
