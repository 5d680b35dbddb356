"""The protocol of problems: everything that a training run needs but the optimizer."""

from typing import Any, Protocol, runtime_checkable

import jax

from adamjax._core.typing import PyTree


@runtime_checkable
class Problem(Protocol):
    """A model and its data. All methods but `batches` are pure and can be jitted.

    The caller passes the keys, so that one problem serves any number of runs at once. Besides the methods below, a
    problem has one of these two, which give the data:

    - `batch(step, key)`: the data of update `step` (an int32 scalar, 0 for the first); `key` is the same for all of a
      run. The result is a function of both, and of nothing else. If it is always the same, because it is all the
      data, the problem says so by an attribute `full_batch = True`.
    - `batches(seed)`: an iterable of the batches of a run, on the host: pytrees of NumPy arrays, or of anything else
      that `jnp.asarray` takes. An iterator, such as a generator, has to last for the whole run. Any other iterable,
      such as a list or a DataLoader, is started again at its end: each pass is an epoch. All batches have the shapes
      of the first; a last one of an epoch with fewer rows is dropped, with a warning. With several processes,
      `batches` gives in each the rows of that process. A run that is resumed at step k skips k batches, or calls
      `batches(seed, start=k)` if that takes `start`.

    Two attributes, False unless the problem has them, change the methods:

    - `stateful = True`: the model has a state besides its parameters, such as batch statistics. `init(key)` returns
      (params, model_state), `loss(params, model_state, batch, key)` returns (loss, model_state), and
      `evaluate(params, model_state)` gets both.
    - `on_host = True`: `evaluate` is not jitted. It is called once for each model, with NumPy arrays, and returns
      numbers.

    For a run on a mesh, a method `param_shardings(mesh, params)` may give the `PartitionSpec` of each parameter, and an
    attribute `batch_axes` the names of those axes that divide the batch, if it is not all of them.

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

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of `(params, batch, key)`, a real scalar; `key` is new at every step (for dropout)."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Return scalars measured on validation data with `(params)`, as a dict; one of them is named "loss"."""
