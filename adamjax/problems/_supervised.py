"""Supervised problems, of the models and loaders that users have."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks
from adamjax._core.trees import compute_dtype
from adamjax._core.typing import PyTree
from adamjax.problems._loaders import Arrays, Batch, Loader, as_source
from adamjax.problems._losses import LOSSES, METRICS, BatchFunction, is_labels, mean
from adamjax.problems._models import as_model

_TRACER_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Supervised:
    """A model, its data, a loss and metrics, as a problem; see `supervised`."""

    def __init__(
        self,
        model: Any,
        loss: str | BatchFunction,
        train: Arrays | Loader,
        valid: Arrays,
        batch_size: int,
        metrics: Mapping[str, str | BatchFunction],
        param_shardings: Callable[..., PyTree] | None,
    ) -> None:
        self._arguments = (model, loss, train, valid, batch_size, metrics, param_shardings)
        self._train, self._batch_size = train, batch_size
        self._loss_of_batch = LOSSES[loss] if isinstance(loss, str) else loss
        self._rows, self._targets = valid.rows, valid.targets
        self._chunks = jax.tree.map(lambda x: _chunks(x, min(batch_size, valid.rows)), valid.inputs)
        self._model = as_model(model, jax.eval_shape(lambda x: jax.tree.map(lambda y: y[0], x), self._chunks))
        if param_shardings is not None:
            self.param_shardings = param_shardings
        params, state = jax.eval_shape(self._model.init, jax.random.key(0))
        self.stateful = bool(jax.tree.leaves(state))
        checks.parameters(params)
        outputs = jax.eval_shape(self._outputs, params, state, self._chunks)
        found = {name: METRICS[f] if isinstance(f, str) else f for name, f in metrics.items()}
        if loss == "cross_entropy" and is_labels(outputs, self._targets):
            found = {"accuracy": METRICS["accuracy"]} | found
        on_host = {name for name, f in found.items() if not _is_traceable(name, f, outputs, self._targets)}
        self._host_metrics = {name: f for name, f in found.items() if name in on_host}
        self._device_metrics = {name: f for name, f in found.items() if name not in on_host}
        self.on_host = bool(on_host)
        self._measured_by_device = jax.jit(self._measured)

    def __reduce__(self) -> Any:
        return type(self), self._arguments

    def __repr__(self) -> str:
        model, loss, train, valid, batch_size, metrics, _ = self._arguments
        named = ", ".join(f"{name!r}: {_name(f)}" for name, f in metrics.items())
        return (
            f"supervised({_name(model)}, loss={_name(loss)}, train={train!r}, valid={valid!r}, "
            f"batch_size={batch_size}, metrics={{{named}}})"
        )

    def init(self, key: jax.Array) -> PyTree:
        """Return the initial parameters; if the model is stateful, the pair of them and its state."""
        made = self._model.init(key)
        return made if self.stateful else made[0]

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of a run for ever, from that of step `start`: inputs and targets, as NumPy arrays."""
        if isinstance(self._train, Arrays):
            return self._train.batches(seed, start, self._batch_size)
        return self._train.batches(seed, start)

    def loss(self, params: PyTree, *others: Any) -> Any:
        """Return the loss on a batch in training mode.

        Args:
          params: The parameters.
          *others: The batch and a key; if the model is stateful, its state before them.

        Returns:
          The loss, a scalar; if the model is stateful, the pair of it and the state after the batch.
        """
        state, (inputs, targets), key = others if self.stateful else ({}, *others)
        outputs, after = self._model.train(params, state, inputs, key)
        value = self._loss(outputs, targets)
        return (value, after) if self.stateful else value

    def evaluate(self, params: PyTree, model_state: PyTree = None) -> dict[str, Any]:
        """Return the loss and the metrics on the validation data, in evaluation mode."""
        state = model_state if self.stateful else {}
        if not self.on_host:
            return self._measured(params, state, *jax.tree.map(jnp.asarray, (self._chunks, self._targets)))[0]
        found, outputs = self._measured_by_device(params, state, self._chunks, self._targets)
        outputs = jax.tree.map(_for_host, outputs)
        return found | {name: f(outputs, self._targets) for name, f in self._host_metrics.items()}

    def _loss(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        value = self._loss_of_batch(outputs, targets)
        if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)):
            raise TypeError(f"the loss is {value!r}, expected a real floating point scalar, or an array of them")
        return mean(value)

    def _outputs(self, params: PyTree, state: PyTree, chunks: PyTree) -> PyTree:
        """Return the outputs for all rows of the validation data."""
        outputs = jax.lax.map(lambda inputs: self._model.predict(params, state, inputs), chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: self._rows], outputs)

    def _measured(self, params: PyTree, state: PyTree, chunks: PyTree, targets: PyTree) -> tuple[Any, PyTree]:
        """Return the metrics that are computed on the device, and the outputs."""
        outputs = self._outputs(params, state, chunks)
        found = {name: mean(f(outputs, targets)) for name, f in self._device_metrics.items()}
        return {"loss": self._loss(outputs, targets)} | found, outputs


def _chunks(x: np.ndarray, size: int) -> np.ndarray:
    """Divide the rows of `x` into chunks; the last row is repeated at the end of the last."""
    missing = -len(x) % size
    if missing:
        x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    return x.reshape(-1, size, *x.shape[1:])


def _for_host(x: jax.Array) -> np.ndarray:
    """Return `x` as a NumPy array, in a dtype that NumPy itself has."""
    return np.asarray(x.astype(compute_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x)


def _is_traceable(name: str, f: BatchFunction, outputs: PyTree, targets: PyTree) -> bool:
    """Return whether a metric can be computed on the device: not if it needs the values in NumPy arrays."""
    try:
        found = jax.eval_shape(f, outputs, targets)
    except Exception as error:
        if _is_for_values(error):
            return False
        error.add_note(f"This is the metric {name!r} of the problem, with the shapes of the validation data.")
        raise
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise TypeError(f"the metric {name!r} is {found}, expected a number, or an array whose mean is taken")
    return True


def _is_for_values(error: BaseException | None) -> bool:
    """Return whether an error is JAX's, of code that needs the values of an array that is traced; or caused by it."""
    return error is not None and (
        isinstance(error, _TRACER_ERRORS) or _is_for_values(error.__cause__ or error.__context__)
    )


def _name(x: Any) -> str:
    if isinstance(x, str):
        return repr(x)
    if isinstance(x, tuple):
        return f"({', '.join(map(_name, x))})"
    return getattr(x, "__qualname__", type(x).__name__)


def supervised(
    model: Any,
    *,
    loss: str | BatchFunction,
    train: Any,
    valid: Any,
    batch_size: int | None = None,
    metrics: Mapping[str, str | BatchFunction] | None = None,
    param_shardings: Callable[..., PyTree] | None = None,
) -> Supervised:
    """Return a problem."""
    batches, found = as_source("train", train), as_source("valid", valid)
    rows = found if isinstance(found, Arrays) else found.all()
    return Supervised(model, loss, batches, rows, batch_size or 32, dict(metrics or {}), param_shardings)
