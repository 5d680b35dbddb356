"""Building blocks of the problems: layers, random choices, cross-entropy."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core.typing import PyTree


def check_size(name: str, x: object) -> None:
    if not _is_size(x):
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be a positive int")


def check_sizes(name: str, x: object) -> tuple[int, ...]:
    """Check an argument that must list positive ints; return it as a tuple."""
    if not isinstance(x, (tuple, list)) or not all(map(_is_size, x)):
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be a tuple of positive ints")
    return tuple(x)


def _is_size(x: object) -> bool:
    return isinstance(x, int) and x > 0


def init_layers(key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> dict[str, dict[str, jax.Array]]:
    """Return layers of kernels with `shapes` (the last axis is the output's) and biases."""
    params = {}
    for i, (shape, draws) in enumerate(zip(shapes, draw_uniform(key, shapes), strict=True)):
        kernel = draws * np.float32(np.sqrt(6 / math.prod(shape[:-1])))
        params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(shape[-1], jnp.float32)}
    return params


def in_order(params: dict[str, PyTree]) -> list[PyTree]:
    """Return the values of `params`, sorted by the number at the end of their names."""
    return [params[name] for name in sorted(params, key=lambda name: int(name.rpartition("_")[2]))]


def draw_uniform(key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Return float32 arrays of `shapes`, uniform in [-1, 1)."""
    sizes = [math.prod(shape) for shape in shapes]
    # One draw for all arrays compiles in a third of the time.
    draws = jax.random.uniform(key, (sum(sizes),), jnp.float32, -1, 1)
    ends = itertools.accumulate(sizes)
    return [draws[end - size : end].reshape(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True)]


def random_indices(step: jax.Array, key: jax.Array, count: int, below: int) -> jax.Array:
    """Return int32[count], random numbers from 0 to `below` - 1 that change at each step."""
    # Cheaper to compile than jax.random.randint, and uniform enough for so few values.
    fraction = jax.random.uniform(jax.random.fold_in(key, step), (count,), jnp.float32)
    return (fraction * np.float32(below)).astype(jnp.int32)


def classification_metrics(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    predicted = jnp.argmax(logits, axis=-1).astype(labels.dtype)  # argmax gives int64 in x64 mode
    accuracy = jnp.mean((predicted == labels).astype(jnp.float32))
    return {"loss": cross_entropy(logits, labels), "accuracy": accuracy}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean negative log-probability of labels (int32[...]) under logits (float[..., classes])."""
    # Select by a mask: the gradient of indexing is a scatter, which is slow.
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return -jnp.mean(jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits), 0), axis=-1))
