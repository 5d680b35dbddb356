"""Rounding of stored moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamjax import _stochastic, storage

NARROW = ["bfloat16", "float16"]


def decaying(x, dtype, seeds=4000):
    """`x` rounded with many seeds, in float64."""
    store = jax.jit(jax.vmap(lambda seed: storage.store_decaying(x, jnp.dtype(dtype), seed)))
    return np.asarray(store(jnp.arange(seeds, dtype=jnp.uint32)), np.float64)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x", [1.0, 1.001, 0.9999, 3e-5, 1.7e-7, 6.2e-5, 1234.5])
def test_right_on_average(dtype, x):
    x = np.float32(x)
    found = decaying(jnp.array([x]), dtype)
    nearest = np.asarray(jnp.asarray(x).astype(dtype), np.float64)
    if nearest == x:
        assert np.all(found == x)
    spacing = max(float(jnp.finfo(dtype).eps) * float(x), 2.0**-24 if dtype == "float16" else 0)
    assert np.max(np.abs(found - x)) < spacing
    assert abs(np.mean(found) - x) < 5 * spacing / 2 / np.sqrt(len(found))


@pytest.mark.parametrize("dtype", NARROW)
def test_results_are_the_two_neighbours(dtype):
    x = np.float32(10.0) ** np.random.default_rng(0).uniform(-7, 4, 300).astype(np.float32)
    found = decaying(jnp.asarray(x), dtype, seeds=200)
    near = jnp.asarray(x).astype(dtype)
    below = jnp.where(near.astype(jnp.float32) > x, jnp.nextafter(near, jnp.zeros_like(near)), near)
    above = jnp.nextafter(below, jnp.full_like(below, jnp.inf))
    low, high = np.asarray(below, np.float64), np.asarray(above, np.float64)
    assert np.all((found == np.maximum(low, high - low)) | (found == low) | (found == high))
    assert np.mean(found == low) > 0.3
    assert np.mean(found == high) > 0.3


@pytest.mark.parametrize("dtype", NARROW)
def test_never_zero_for_what_is_not(dtype):
    tiny = jnp.array([1e-9, 1e-30, 2e-38])
    assert np.all(decaying(tiny, dtype, seeds=100) > 0)
    assert np.all(np.asarray(storage.store_growing(tiny, jnp.dtype(dtype)), np.float64) > 0)
    assert np.all(decaying(jnp.zeros(3), dtype, seeds=100) == 0)
    assert storage.store_growing(jnp.zeros(()), jnp.dtype(dtype)) == 0


def test_float16_saturates_and_shows_what_is_not_finite():
    x = jnp.array([1e6, jnp.inf, jnp.nan])
    for found in (
        storage.store_signed(x, jnp.dtype("float16")),
        storage.store_growing(x, jnp.dtype("float16")),
        storage.store_decaying(x, jnp.dtype("float16"), jnp.uint32(0)),
    ):
        assert found[0] == 65504
        assert np.isinf(found[1])
        assert np.isnan(found[2])
    assert storage.store_signed(-x, jnp.dtype("float16"))[0] == -65504
    assert np.isnan(storage.store_decaying(x, jnp.dtype("bfloat16"), jnp.uint32(0))[2])


def test_wide_moments_are_not_rounded():
    x = jnp.array([1.0000001, 1e-38, 0.0])
    for store in (storage.store_signed, storage.store_growing):
        np.testing.assert_array_equal(store(x, jnp.dtype("float32")), x)
    np.testing.assert_array_equal(storage.store_decaying(x, jnp.dtype("float32"), None), x)


def test_random_bits_are_uniform_and_independent():
    u = np.asarray(_stochastic.uniform(jnp.zeros((300, 300)), storage.seed(jnp.int32(5), 3)), np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    counts, _ = np.histogram(u, 64)
    assert np.sum((counts - u.size / 64) ** 2 / (u.size / 64)) < 110  # chi square of 63: 99.98 %
    for other in (
        np.roll(u, 1, axis=1),
        u.T,
        np.asarray(_stochastic.uniform(jnp.zeros((300, 300)), storage.seed(jnp.int32(6), 3))),
    ):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.02
    seeds = {int(storage.seed(jnp.int32(t), leaf)) for t in range(30) for leaf in range(30)}
    assert len(seeds) == 900


def test_the_derivative_goes_straight_through():
    slope = jax.grad(lambda x: storage.store_decaying(x, jnp.dtype("bfloat16"), jnp.uint32(1)).astype(jnp.float32))(
        jnp.float32(1.2345)
    )
    assert slope == 1
