"""Supervised problems, of the models and loaders that users have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks
from adamjax._core.trees import abstract_key, compute_dtype
from adamjax._core.typing import PyTree
from adamjax.problems._loaders import Arrays, Batch, Loader, as_source, describe, row_shapes
from adamjax.problems._losses import LOSSES, METRICS, BatchFunction, is_labels, mean
from adamjax.problems._models import as_model

_TRACER_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)

_LARGEST_CONSTANTS = 2**28  # bytes of data that become part of a compiled program: it takes 16 s for each GB


class Supervised:
    """A model, its data, a loss and metrics, as a problem; see `supervised`."""

    def __init__(
        self,
        model: Any,
        loss: str | BatchFunction,
        train: Arrays | Loader,
        valid: Arrays,
        batch_size: int,
        rows_at_once: int,
        metrics: Mapping[str, str | BatchFunction],
        param_shardings: Callable[..., PyTree] | None,
        batch_axes: tuple[str, ...] | None,
    ) -> None:
        sharded = (param_shardings, batch_axes)
        self._arguments = (model, loss, train, valid, batch_size, rows_at_once, metrics, *sharded)
        self._train, self._batch_size = train, batch_size
        self._loss_of_batch = LOSSES[loss] if isinstance(loss, str) else loss
        self._rows, self._targets = valid.rows, valid.targets
        self._chunks = jax.tree.map(lambda x: _chunks(x, min(rows_at_once, valid.rows)), valid.inputs)
        self._model = as_model(model, jax.eval_shape(lambda chunks: jax.tree.map(lambda x: x[0], chunks), self._chunks))
        if param_shardings is not None:
            self.param_shardings = param_shardings
        if batch_axes is not None:
            self.batch_axes = batch_axes
        params, state = jax.eval_shape(self._model.init, abstract_key())
        self.stateful: bool = bool(jax.tree.leaves(state))
        checks.parameters(params)
        outputs = jax.eval_shape(self._outputs, params, state, self._chunks)
        jax.eval_shape(self._loss, outputs, self._targets)
        found = {name: METRICS[f] if isinstance(f, str) else f for name, f in metrics.items()}
        if loss == "cross_entropy" and is_labels(outputs, self._targets):
            found = {"accuracy": METRICS["accuracy"]} | found
        on_host = {name for name, f in found.items() if not _is_traceable(name, f, outputs, self._targets)}
        self._host_metrics = {name: f for name, f in found.items() if name in on_host}
        self._device_metrics = {name: f for name, f in found.items() if name not in on_host}
        held_out = sum(x.nbytes for x in jax.tree.leaves((self._chunks, self._targets)))
        self.on_host: bool = bool(on_host) or held_out > _LARGEST_CONSTANTS
        self._measured_by_device = jax.jit(self._measured)

    def __reduce__(self) -> Any:
        return type(self), self._arguments

    def __repr__(self) -> str:
        model, loss, train, valid, batch_size, _, metrics, *_ = self._arguments
        size = f"batch_size={batch_size}, " if isinstance(train, Arrays) else ""
        named = ", ".join(f"{name!r}: {_name(f)}" for name, f in metrics.items())
        return (
            f"supervised({_name(model)}, loss={_name(loss)}, train={train!r}, valid={valid!r}, "
            f"{size}metrics={{{named}}})"
        )

    def init(self, key: jax.Array) -> PyTree:
        """Return the initial parameters; if the model is stateful, the pair of them and its state."""
        made = jax.tree.map(_strong, self._model.init(key))
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
        value, after = self._loss(outputs, targets), jax.tree.map(_strong, after)
        return (value, after) if self.stateful else value

    def evaluate(self, params: PyTree, model_state: PyTree = None) -> dict[str, Any]:
        """Return the loss and the metrics on the validation data, in evaluation mode."""
        state = model_state if self.stateful else {}
        if not self.on_host:
            return self._measured(params, state, *jax.tree.map(jnp.asarray, (self._chunks, self._targets)))[0]
        found, outputs = self._measured_by_device(params, state, self._chunks, self._targets)
        if self._host_metrics:
            outputs = jax.tree.map(_for_host, outputs)
            # scikit-learn refuses NaN, and one run that diverged must not end the others.
            finite = all(np.isfinite(x).all() for x in jax.tree.leaves(outputs))
            for name, f in self._host_metrics.items():
                found[name] = _on_host(name, f, outputs, self._targets) if finite else np.nan
        return {name: float(x) for name, x in found.items()}

    def _loss(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        value = self._loss_of_batch(outputs, targets)
        if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)):
            raise TypeError(f"the loss is {value!r}, expected a real floating point scalar, or an array of them")
        return mean(value)

    def _outputs(self, params: PyTree, state: PyTree, chunks: PyTree) -> PyTree:
        """Return the outputs for all rows of the validation data."""
        rows = jax.tree.leaves(chunks)[0].shape[1]

        def predict(inputs: PyTree) -> PyTree:
            outputs = self._model.predict(params, state, inputs)
            for x in jax.tree.leaves(outputs):
                if jnp.shape(x)[:1] != (rows,):
                    raise TypeError(
                        f"the model returns an array of shape {jnp.shape(x)} for {rows} rows of inputs, expected one "
                        "with a row for each"
                    )
            return outputs

        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: self._rows], jax.lax.map(predict, chunks))

    def _measured(self, params: PyTree, state: PyTree, chunks: PyTree, targets: PyTree) -> tuple[Any, PyTree]:
        """Return the metrics that are computed on the device, and the outputs."""
        outputs = self._outputs(params, state, chunks)
        found = {name: mean(f(outputs, targets)) for name, f in self._device_metrics.items()}
        return {"loss": self._loss(outputs, targets)} | found, outputs


def _strong(x: Any) -> Any:
    """Return `x` with the dtype it has for good: the state of a model has the same types after each step."""
    return x.astype(x.dtype) if getattr(x, "weak_type", False) else x


def _chunks(x: np.ndarray, size: int) -> np.ndarray:
    """Divide the rows of `x` into chunks; the last row is repeated at the end of the last."""
    missing = -len(x) % size
    if missing:
        x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    return x.reshape(-1, size, *x.shape[1:])


def _for_host(x: jax.Array) -> np.ndarray:
    """Return `x` as a NumPy array, in a dtype that NumPy itself has."""
    return np.asarray(x.astype(compute_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x)


def _on_host(name: str, f: BatchFunction, outputs: PyTree, targets: PyTree) -> float:
    try:
        return float(np.mean(f(outputs, targets)))
    except Exception as error:
        error.add_note(f"This is the metric {name!r} of the problem, called with NumPy arrays.")
        raise


def _is_traceable(name: str, f: BatchFunction, outputs: PyTree, targets: PyTree) -> bool:
    """Return whether a metric can be computed on the device: not if it needs the values in NumPy arrays."""
    try:
        found = jax.eval_shape(lambda *x: f(*x), outputs, targets)  # NumPy's functions take no weak references
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
    if isinstance(x, partial):
        return f"partial({_name(x.func)})"
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
    batch_axes: Sequence[str] | None = None,
) -> Supervised:
    """Return a supervised problem of a model as its framework makes it, and of data as they are.

    In training a model is in training mode, its random layers draw anew at each step, and running statistics (as of
    BatchNorm) are updated. In evaluation it is in evaluation mode. Parameters and states are nested dicts with the
    framework's names. Frameworks are told apart so:

    - A function or class with an argument `rngs`, and no other that it needs, makes a Flax NNX module; it is called
      with `nnx.Rngs(key)`. Each `nnx.Param` is a parameter, all other Variables are state. The module's `train()` and
      `eval()` set its mode. Values that the module writes to a `nnx.Param` when it is called, as `nnx.SpectralNorm`
      does, hold for that call only.
    - A function or class with an argument `key`, and no other that it needs, makes an Equinox module, or the pair of
      one and its `eqx.nn.State`; a function of `eqx.nn.make_with_state` makes such a pair. The module is applied to one
      example and vmapped with the axis name "batch". Its floating point arrays are the parameters, all other arrays are
      state. `eqx.nn.inference_mode` is for evaluation.
    - A Flax Linen module: the collection "params" has the parameters, all others are state, but for those that only
      `sow` fills. The key of a step is that of "dropout".
    - A transform of Haiku, with state or without.
    - A tuple of two functions, `init(key)` or `init(key, inputs)`, and `apply(params, inputs)`.

    A model that has an argument `train`, `training`, `is_training`, `deterministic`, `use_running_average` or
    `inference` where it is called is told its mode by it. An argument `key` there gets the key of the step; in
    evaluation only if it has no default. An argument `rngs` of an NNX module gets `nnx.Rngs` of that key if it has no
    default; else the module draws from its own. Inputs that are a tree are one argument.

    Args:
      model: The model, one of these.
      loss: A function of the outputs and targets of a batch, whose mean is taken if it is an array, such as one value
        per row. Or its name: "cross_entropy" (logits, and targets that are integer labels or probabilities), "mse",
        "mae", or "binary_cross_entropy" (logits); these are computed in float32 or wider.
      train: The data of training. Either a tuple (inputs, targets) of arrays, each with a row per example; inputs may
        be a tree of arrays. Each epoch, a pass over them, shuffles them anew by the seed of the run; the rows at its
        end that fill no batch are left out. Or a loader: an iterable of such tuples, one per batch, for example a
        PyTorch `DataLoader`, a grain or tf.data dataset, or a list; or a function from the seed of a run to one. An
        iterable is taken again at its end; then the next epoch begins, and an iterator that a function returned is
        replaced by a new one. The seed decides about the order only if there is a function that uses it. A last batch
        of an epoch with fewer rows is left out. Instead of a tuple, a dict may have the targets as "label", "labels",
        "target", "targets" or "y" and the inputs under other names: one array, or several, which are passed as a dict.
        In several processes arrays are divided among them, while a loader must yield its process's rows.
      valid: The data of evaluation, likewise; a function is called with seed 0. A loader is read once, now, to its end;
        its rows stay in memory. Loss and metrics are those of all rows at once. Data of up to 256 MiB become a constant
        of each compiled evaluation; larger ones are copied to the device at each, as for metrics on the host.
      batch_size: Rows per update if `train` holds arrays, and rows at a time in evaluation if `valid` does; None for
        32. A loader has its own.
      metrics: More to measure on the validation data besides "loss", by name: functions of all outputs and targets, or
        "accuracy" or the name of a loss. Those that JAX cannot trace, such as scikit-learn's, are called with NumPy
        arrays, outside of what is compiled, once a member of a population; they are NaN where an output is not finite.
        If the loss is "cross_entropy" and the targets are labels, "accuracy" is measured, too.
      param_shardings: For training on a mesh: a function of it and the parameters' shapes and dtypes that returns a
        tree of `PartitionSpec`; None to replicate the parameters.
      batch_axes: The axes of that mesh that divide a batch, such as ("data",) if another one divides the model. None:
        all of them.

    Returns:
      A problem for `train`, `sweep`, `tune` and `lr_range_test`. It is stateful if its model has a state.

    Raises:
      TypeError, ValueError: An argument is not as described, the model's parameters are not floating point, or outputs
        and targets do not fit the loss or a metric. Errors of the model, the loss or a metric itself are not changed.

    >>> import adamjax, jax, numpy as np
    >>> def init(key):
    ...     return {"w": jax.random.normal(key, (3,)), "b": np.zeros((), np.float32)}
    >>> def apply(params, inputs):
    ...     return inputs @ params["w"] + params["b"][None]
    >>> inputs = np.random.default_rng(0).normal(size=(100, 3))
    >>> targets = inputs.sum(axis=1)
    >>> adamjax.problems.supervised(
    ...     (init, apply), loss="mse", train=(inputs, targets), valid=(inputs[:20], targets[:20]), batch_size=16
    ... )
    supervised((init, apply), loss='mse', train=[float32[100,3], float32[100]], valid=[float32[20,3], float32[20]],
    batch_size=16, metrics={})
    """
    batches, held_out = as_source("train", train), as_source("valid", valid)
    if batch_size is not None and isinstance(batches, Loader) and isinstance(held_out, Loader):
        raise ValueError(f"Invalid batch_size value: {batch_size!r}; leave it out, the loaders have their own")
    size = 32 if batch_size is None else checks.count("batch_size", batch_size)
    if isinstance(batches, Arrays) and size > batches.rows:
        raise ValueError(f"Invalid batch_size value: {size}; train has {batches.rows} rows only, choose a smaller one")
    rows_at_once = size
    if isinstance(held_out, Loader):
        held_out, rows_at_once = held_out.read()
    if isinstance(batches, Arrays) and row_shapes(batches.inputs) != row_shapes(held_out.inputs):
        raise ValueError(
            f"the inputs of valid are {describe(held_out.inputs)}, and those of train {describe(batches.inputs)}: "
            "their rows must have the same shapes"
        )
    if isinstance(loss, str):
        checks.choice("loss", loss, tuple(LOSSES))
    else:
        checks.function("loss", loss)
    if param_shardings is not None:
        checks.function("param_shardings", param_shardings)
    if batch_axes is not None and not (
        isinstance(batch_axes, (tuple, list)) and all(isinstance(a, str) for a in batch_axes)
    ):
        raise TypeError(f"Invalid batch_axes value: {batch_axes!r}; batch_axes must be names of axes, or None")
    axes = None if batch_axes is None else tuple(batch_axes)
    return Supervised(model, loss, batches, held_out, size, rows_at_once, _checked(metrics), param_shardings, axes)


def _checked(metrics: Any) -> dict[str, str | BatchFunction]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"Invalid metrics value: {metrics!r}; metrics must be a dict of functions or names")
    for name, f in (metrics or {}).items():
        if not isinstance(name, str) or name == "loss":
            raise ValueError(f'Invalid name of a metric: {name!r}; names are strings, and "loss" is always measured')
        if isinstance(f, str):
            checks.choice(f"metrics[{name!r}]", f, tuple(METRICS))
        else:
            checks.function(f"metrics[{name!r}]", f)
    return dict(metrics or {})
