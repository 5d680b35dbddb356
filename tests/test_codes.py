"""The codes, against their definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import DIRECTION

import adamjax
from adamjax import problems
from adamjax._core import quantization
from adamjax._core.low_precision import Dither
from adamjax.training import keys_of, train_step

pytestmark = pytest.mark.numbers

# (bits, signed): levels, power, and the magnitudes that a number greater than 0 can become
KINDS = {(8, True): (127, 2, 0), (8, False): (255, 4, 1), (4, True): (7, 2, 0), (4, False): (16, 4, 1)}
kinds = pytest.mark.parametrize(("bits", "signed"), KINDS)


# Eager, each of its operations would be compiled alone.
encode = jax.jit(quantization.encode, static_argnums=(1, 2, 3))


def draw(shape, signed, seed=0):
    rng = np.random.default_rng(seed)
    x = 10.0 ** rng.uniform(-4, 2, shape) * (rng.choice([-1, 1], shape) if signed else 1)
    return x.astype(np.float32)


def decoded(x, bits, signed, block_size=32, growing=False, seeds=1):
    """What is decoded after encoding with many seeds, in double: [seeds, *x.shape]."""

    def trip(seed):
        dither = None if growing else Dither(seed, jnp.uint32(0))
        return encode(jnp.asarray(x), bits, signed, block_size, dither).decode()

    return np.asarray(jax.jit(jax.vmap(trip))(jnp.arange(seeds, dtype=jnp.uint32)), np.float64)


def scales_of(x, block_size):
    blocks = [np.abs(x[..., i : i + block_size]).max(axis=-1) for i in range(0, x.shape[-1], block_size)]
    return np.repeat(np.stack(blocks, axis=-1), block_size, axis=-1)[..., : x.shape[-1]].astype(np.float64)


def neighbours(x, bits, signed, block_size=32):
    """The two magnitudes around each |x| that the format has."""
    levels, power, least = KINDS[bits, signed]
    s = scales_of(x, block_size)
    magnitudes = (np.arange(levels + 1) / levels) ** power
    below = np.clip(np.searchsorted(magnitudes, np.abs(x) / s, side="right") - 1, 0, levels - 1)
    low, high = magnitudes[np.maximum(below, least)], magnitudes[below + 1]
    return low * s, high * s


@kinds
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 33), (70,), (1, 1), (5, 7)])
def test_decodes_to_one_of_the_neighbours(bits, signed, shape):
    x = draw(shape, signed)
    found = decoded(x, bits, signed, seeds=30)
    low, high = neighbours(x, bits, signed)
    size = np.abs(found)
    near = np.minimum(np.abs(size - low), np.abs(size - high))
    assert np.all(near <= 1e-5 * scales_of(x, 32) * np.maximum(size / scales_of(x, 32), 1e-9))
    assert np.all(found * x >= 0)


@kinds
def test_right_on_average(bits, signed):
    x = draw((4, 32), signed, seed=1)
    x = np.where(np.abs(x) < scales_of(x, 32) / 60000, 0, x).astype(np.float32)  # nothing below the smallest code
    found = decoded(x, bits, signed, seeds=4000)
    low, high = neighbours(x, bits, signed)
    error = np.abs(found.mean(axis=0) - x)[x != 0]
    assert np.all(error <= (5 / 2 / np.sqrt(4000) * (high - low) + 1e-6 * np.abs(x))[x != 0])


@kinds
@pytest.mark.parametrize("growing", [False, True])
def test_what_was_decoded_is_encoded_as_itself(bits, signed, growing):
    x = decoded(draw((8, 64), signed), bits, signed, growing=growing)[0]
    again = decoded(x, bits, signed, growing=growing, seeds=20)
    assert np.mean(np.abs(again - x) <= 1e-6 * np.abs(x)) > 0.999


@pytest.mark.parametrize("bits", [8, 4])
def test_a_growing_array_is_rounded_to_nearest(bits):
    x = draw((8, 64), False)
    found = decoded(x, bits, False, growing=True, seeds=3)
    assert np.all(found == found[0])
    s = 2.0 ** np.ceil(np.log2(scales_of(x, 32)))
    levels = KINDS[bits, False][0]
    every = (np.arange(1, levels + 1) / levels) ** 4
    nearest = every[np.argmin(np.abs(x[..., None] / s[..., None] - every), axis=-1)] * s
    assert np.mean(np.abs(found[0] - nearest) <= 1e-5 * nearest) > 0.99


@pytest.mark.parametrize("bits", [8, 4])
def test_a_growing_array_does_not_follow_its_scale(bits):
    """While the largest number of a block grows a thousandfold in small steps, the others stay."""
    x = jnp.asarray(np.geomspace(0.02, 1, 32), jnp.float32)

    def body(stored, largest):
        now = stored.decode().at[-1].set(largest)
        return encode(now, bits, False, 32, None), None

    first = encode(x, bits, False, 32, None)
    last, _ = jax.lax.scan(body, first, jnp.geomspace(1, 1000 if bits == 8 else 8, 2000))
    ratio = np.asarray(last.decode() / x)[:-1]
    assert np.all((ratio > 0.5) & (ratio < 2)) if bits == 8 else np.all((ratio > 0.2) & (ratio < 5))


@kinds
def test_zeros(bits, signed):
    assert np.all(decoded(np.zeros((2, 40), np.float32), bits, signed) == 0)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 5
    found = decoded(x, bits, signed)[0, 0]
    np.testing.assert_array_max_ulp(np.float32(found[3]), np.float32(5), 1)  # 255**4 units are
    # Sixteen codes of a second moment have none to spare for 0.
    assert np.all(np.delete(found, 3) == (5 / 65536 if (bits, signed) == (4, False) else 0))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("largest", [1.0, 1e30, 1e-25, 1e-30, 3e-38])
def test_a_positive_second_moment_never_becomes_zero(bits, largest):
    x = (np.geomspace(1e-12, 1, 32) * largest).astype(np.float32)
    x = np.maximum(x, np.finfo(np.float32).tiny)
    for growing in (False, True):
        found = decoded(x, bits, False, growing=growing, seeds=50)
        assert np.all(found > 0)
        assert np.all(np.isfinite(found))


@kinds
def test_what_is_not_finite_shows(bits, signed):
    for bad in (np.nan, np.inf):
        x = np.ones((1, 64), np.float32)
        x[0, 3] = bad
        found = decoded(x, bits, signed)[0]
        assert not np.any(np.isfinite(found[0, 3]))
        assert np.all(found[0, 32:] == 1)


def test_shapes_of_codes():
    for n, bytes_of_4_bits in ((1, 1), (2, 1), (7, 4), (64, 32)):
        found = encode(jnp.ones((3, n)), 4, True, 16, None)
        assert found.codes.shape == (3, bytes_of_4_bits)
        assert found.scales.shape == (3, -(-n // 16))
        assert found.shape == (3, n)
        assert found.nbytes == 3 * bytes_of_4_bits + 12 * -(-n // 16)


@pytest.fixture(scope="module")
def captured():
    """The moments of a small transformer after 60 steps, embeddings included."""
    problem, opt, keys = problems.characters(width=32, depth=1, batch_size=8), adamjax.adam(3e-3), keys_of(0)

    @jax.jit
    def run(params):
        def body(carry, t):
            return train_step(problem, opt, keys, *carry, t)[:2], None

        return jax.lax.scan(body, (params, opt.init(params)), jnp.arange(60))[0]

    _, (adam, *_) = run(jax.jit(problem.init)(keys.init))
    matrices = [(m, v) for m, v in zip(jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu), strict=True) if m.ndim > 1]
    assert len(matrices) >= 6
    return matrices


@pytest.mark.slow
@pytest.mark.parametrize("name", DIRECTION)
def test_directions_from_real_moments(captured, name):
    """One storing and loading of both moments changes Adam's direction by no more than the table says."""
    (mu_bits, nu_bits), bounds = DIRECTION[name]
    correction = np.sqrt(1 - 0.999**60) / (1 - 0.9**60)

    @jax.jit
    def stored(moments):
        found = []
        for i, (m, v) in enumerate(moments):
            dithers = [Dither(jnp.uint32(2 * i + j), jnp.uint32(0)) for j in range(2)]
            m = encode(m, mu_bits, True, 128 if mu_bits == 8 else 64, dithers[0]).decode()
            v = encode(v, nu_bits, False, 128 if nu_bits == 8 else 64, dithers[1]).decode()
            found.append((m, v))
        return found

    def directions(moments):
        return np.concatenate([np.ravel(correction * np.asarray(m, np.float64) / np.sqrt(v)) for m, v in moments])

    exact, found = directions(captured), directions(stored(captured))
    error = np.abs(found - exact)
    assert np.median(error / np.abs(exact)) <= bounds.median
    assert np.quantile(error / np.abs(exact), 0.99) <= bounds.p99
    assert np.linalg.norm(error) / np.linalg.norm(exact) <= bounds.norm
    assert not np.any((np.abs(found) > 3 * np.abs(exact)) & (np.abs(found) > bounds.outlier))
    assert abs(found @ exact / (exact @ exact) - 1) <= bounds.bias


@kinds
@pytest.mark.parametrize("others", [0.0, 1.0, np.inf])
def test_what_is_no_number_is_in_the_scale(bits, signed, others):
    """Of its block alone; whatever else is compiled with it."""
    x = np.full((1, 64), 1.0, np.float32)
    x[0, :32] = others
    x[0, 3] = np.nan
    update = jax.jit(lambda x: encode(0.5 * x + 0.5, bits, signed, 32, Dither(jnp.uint32(0), jnp.uint32(0))))
    scales = update(x).scales
    assert np.isnan(scales[0, 0])
    assert scales[0, 1] == 1
