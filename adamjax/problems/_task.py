"""One interface to problems of every kind."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import trees
from adamjax._core.typing import PyTree
from adamjax.problems._batches import BatchStream


class Model(NamedTuple):
    """A model: its parameters, and its state, which is None if it has none."""

    params: PyTree
    state: PyTree


class Task:
    """A problem as training sees it: each model has a state, maybe None, and batches may come from the host.

    Args:
      problem: A problem that `check` has accepted.
      stream: Its batches of one seed from the start, of which one was drawn to see the shapes; None if it has `batch`.
    """

    def __init__(self, problem: Any, stream: BatchStream | None = None) -> None:
        self.problem = problem
        self.is_stateful: bool = getattr(problem, "stateful", False)
        self.evaluates_on_host: bool = getattr(problem, "on_host", False)
        self._stream = stream
        self.batch_like: PyTree = None  # of a batch from the host, abstract
        if stream is not None:
            self.batch_like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stream.example())

    @property
    def is_fed(self) -> bool:
        """Whether batches come from the host."""
        return self.batch_like is not None

    def stream(self, seed: int, first: int = 0) -> BatchStream:
        """The batches of a seed from the host, without those of the first steps."""
        opened, self._stream = self._stream, None
        if opened is not None and first == 0 and opened.seed == seed:
            return opened
        if opened is not None:
            opened.close()
        return BatchStream(self.problem, seed, first)

    def init(self, key: Array) -> Model:
        return Model(*self.problem.init(key)) if self.is_stateful else Model(self.problem.init(key), None)

    def batch(self, step: Array, key: Array, fed: PyTree) -> PyTree:
        """The batch of a step; `fed` is that from the host, if it comes from there."""
        return fed if self.is_fed else self.problem.batch(step, key)

    def place(self, batch: PyTree, *, blocked: bool = False) -> PyTree:
        """Copy a batch from the host to the device, or a block of batches, along a first axis."""
        return jax.tree.map(jnp.asarray, batch)

    def loss(self, params: PyTree, state: PyTree, batch: PyTree, key: Array) -> tuple[Array, PyTree]:
        """Return the loss, and the state of the model after it, in the dtypes that it had."""
        if not self.is_stateful:
            return self.problem.loss(params, batch, key), None
        loss, after = self.problem.loss(params, state, batch, key)
        return loss, jax.tree.map(_in_dtype_of, state, after)

    def evaluate(self, model: Model) -> Mapping[str, Any]:
        """Return the metrics; if they are computed on the host, as floats."""
        arguments: tuple[PyTree, ...] = tuple(model) if self.is_stateful else (model.params,)
        if self.evaluates_on_host:
            metrics: Mapping[str, Any] = self.problem.evaluate(*map(_on_host, arguments))
            check_metrics(self.problem, metrics, (int, float, np.number, np.ndarray, Array))
            return {name: float(x) for name, x in metrics.items()}
        return dict(self.problem.evaluate(*arguments))


def check_metrics(problem: Any, metrics: Any, kind: type | tuple[type, ...]) -> None:
    """Check what `evaluate` returned: a dict of scalars of this kind, "loss" among them."""
    name = type(problem).__name__
    if not (isinstance(metrics, Mapping) and "loss" in metrics):
        raise TypeError(f'{name}.evaluate returns {metrics}, expected a dict with "loss" in it')
    for metric, x in metrics.items():
        if not (isinstance(x, kind) and getattr(x, "shape", ()) == ()):
            raise TypeError(f"{name}.evaluate returns {x} for {metric!r}, expected a scalar")


def _in_dtype_of(before: Array, after: Array) -> Array:
    """Keep the dtype that a state began with: statistics may come in that of half precision parameters."""
    return after.astype(before.dtype) if jnp.issubdtype(before.dtype, jnp.inexact) else after


def _on_host(tree: PyTree) -> PyTree:
    """Return a tree of NumPy arrays, but for the keys, which NumPy does not have."""
    return jax.tree.map(lambda x: x if trees.is_key(x) else np.asarray(x), tree)
