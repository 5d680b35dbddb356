"""Pieces that the problems are made of."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_size(name: str, x: Any) -> None:
    """Check an argument that is a size."""
    if not _is_size(x):
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be a positive int")


def check_sizes(name: str, x: Any) -> tuple[int, ...]:
    """Check an argument that lists sizes."""
    if not isinstance(x, (tuple, list)) or not all(map(_is_size, x)):
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be a tuple of positive ints")
    return tuple(x)


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and x > 0


def init_layers(key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> dict[str, dict[str, jax.Array]]:
    """Layers of kernels with `shapes` (the last axis is what comes out), and of biases."""
    params = {}
    for i, (shape, draws) in enumerate(zip(shapes, draw(key, shapes), strict=True)):
        kernel = draws * np.float32(np.sqrt(6 / math.prod(shape[:-1])))
        params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(shape[-1], jnp.float32)}
    return params


def in_order(params: dict[str, Any]) -> list[Any]:
    """The values of `params`, by the number at the end of their names."""
    return [params[name] for name in sorted(params, key=lambda name: int(name.rpartition("_")[2]))]


def draw(key: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """float32 arrays of `shapes`, uniform in [-1, 1)."""
    sizes = [math.prod(shape) for shape in shapes]
    # One draw for all of them compiles in a third of the time.
    draws = jax.random.uniform(key, (sum(sizes),), jnp.float32, -1, 1)
    ends = itertools.accumulate(sizes)
    return [draws[end - size : end].reshape(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True)]


def choose(step: jax.Array, key: jax.Array, count: int, below: int) -> jax.Array:
    """int32[count], random numbers from 0 to `below` - 1: other ones at each step."""
    # Cheaper to compile than jax.random.randint, and even enough for this few.
    fraction = jax.random.uniform(jax.random.fold_in(key, step), (count,), jnp.float32)
    return (fraction * np.float32(below)).astype(jnp.int32)


def measure(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy and accuracy."""
    predicted = jnp.argmax(logits, axis=-1).astype(labels.dtype)  # int64 where JAX is told to use 64 bits
    return {
        "loss": cross_entropy(logits, labels),
        "accuracy": jnp.mean((predicted == labels).astype(jnp.float32)),
    }


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labels (int32[...]) of their negative log-probability; logits are float[..., classes]."""
    # Picked by a mask: the gradient of an index would be a scatter, which is slow.
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return -jnp.mean(jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits), 0), axis=-1))
