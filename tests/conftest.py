"""JAX at its strictest, on eight virtual devices."""

import itertools

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def lenient():
    """JAX's ordinary promotion rules, for the libraries that rely on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def getkey():
    """A function that returns a new key at each call."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))
