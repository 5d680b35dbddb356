"""What several tests need."""

import socket

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax import storage


def aval(x):
    """Shape, dtype and weak type of each leaf: what decides about a recompilation."""

    def of_leaf(y):
        y = y if isinstance(y, jax.ShapeDtypeStruct) else jnp.asarray(y)
        return y.shape, y.dtype.name, y.weak_type

    return jax.tree.map(of_leaf, x)


def assert_same_types(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.leaves(aval(a)) == jax.tree.leaves(aval(b))


def assert_close(actual, expected, tolerance):
    """Structures equal and leaves within `tolerance`, both absolute and relative."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=tolerance, atol=tolerance)


def assert_equal(actual, expected):
    """Structures equal and leaves bit-identical (NaN included)."""
    assert_same_types(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def decoded(adam):
    """An `AdamState` whose moments are NumPy arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), storage.decode(adam))


def by_step(opt):
    """A training step's part: parameters, state and gradients to parameters and state."""
    return lambda params, state, grads: opt.step(grads, state, params)


def by_update(opt, apply=adamjax.apply_updates):
    """The same in optax's two calls."""

    def run(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return apply(params, updates), state

    return run


def gradients(shape, steps, seed=0, dtype=np.float32):
    """Gradients over four decades, of either sign, as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def draw():
        return rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-3, 1, shape)

    if np.issubdtype(dtype, np.complexfloating):
        return [(draw() + 1j * draw()).astype(dtype) for _ in range(steps)]
    return [draw().astype(dtype) for _ in range(steps)]


def make_mesh(kind, shape=(8,), names=("data",)):
    """Of the first devices, with axes of one kind."""
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def free_port():
    """One of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
