"""Losses and metrics of outputs and targets, by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamjax._core.trees import compute_dtype

BatchFunction = Callable[[Any, Any], Any]  # of the outputs and targets of a batch


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log p of each target; targets are labels, or probabilities in the shape of the logits."""
    _check_arrays("cross_entropy", outputs, targets)
    logits = outputs.astype(compute_dtype(outputs.dtype))
    if targets.shape == outputs.shape:
        return -jnp.sum(targets.astype(logits.dtype) * jax.nn.log_softmax(logits), axis=-1)
    if not is_labels(outputs, targets):
        raise ValueError(
            f"cross_entropy was given outputs {_describe(outputs)} and targets {_describe(targets)}: it takes logits "
            "[rows, ..., classes], and targets that are integers [rows, ...], or probabilities in the logits' shape"
        )
    # As in optax, so that a loop with its loss is equalled to the last bit.
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def is_labels(outputs: Any, targets: Any) -> bool:
    """Return whether the targets are integer labels for logits."""
    arrays = all(hasattr(x, "shape") for x in (outputs, targets))  # not trees of them
    return arrays and jnp.issubdtype(targets.dtype, jnp.integer) and targets.shape == outputs.shape[:-1]


def mse(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the squared errors."""
    difference = _difference("mse", outputs, targets)
    return jnp.real(difference * jnp.conj(difference))


def mae(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the absolute errors."""
    return jnp.abs(_difference("mae", outputs, targets))


def binary_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the cross-entropy of each logit; targets are 0 or 1, or probabilities of 1."""
    _check_shapes("binary_cross_entropy", outputs, targets)
    x = outputs.astype(compute_dtype(outputs.dtype))
    return jax.nn.softplus(x) - x * targets.astype(x.dtype)


def accuracy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the fraction of right answers: the largest logit, or, for binary targets, the sign of the logit."""
    _check_arrays("accuracy", outputs, targets)
    if is_labels(outputs, targets):
        right = jnp.argmax(outputs, axis=-1).astype(targets.dtype) == targets
    else:
        _check_shapes("accuracy", outputs, targets)
        if outputs.ndim == 1 or outputs.shape[-1] == 1:
            right = (outputs > 0) == (targets > 0.5)
        else:
            right = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(right.astype(jnp.float32))


LOSSES: dict[str, BatchFunction] = {
    f.__name__: f
    for f in (cross_entropy, mse, binary_cross_entropy, mae)  # each gives a value per row, or more
}
METRICS: dict[str, BatchFunction] = LOSSES | {"accuracy": accuracy}


def mean(x: jax.Array) -> jax.Array:
    """Return the mean in float32 or wider."""
    return jnp.mean(x.astype(compute_dtype(x.dtype)))


def _difference(name: str, outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _check_shapes(name, outputs, targets)
    dtype = compute_dtype(outputs.dtype)
    return outputs.astype(dtype) - targets.astype(dtype)


def _check_arrays(name: str, outputs: Any, targets: Any) -> None:
    for kind, x in (("outputs", outputs), ("targets", targets)):
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name} was given {kind} of type {type(x).__name__}, expected one array")


def _check_shapes(name: str, outputs: jax.Array, targets: jax.Array) -> None:
    _check_arrays(name, outputs, targets)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name} was given outputs {_describe(outputs)} and targets {_describe(targets)}: they must have the same "
            "shape, reshape the targets"
        )


def _describe(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
