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
from adamjax._transforms import moment_storage
from adamjax.training import keys_of, train_step

pytestmark = pytest.mark.numbers

RATIO, SECOND = 0.5, 0  # the powers of a first moment, which is stored as a ratio, and of a second one
LEVELS = {(8, RATIO): 127, (4, RATIO): 7, (8, SECOND): 255, (4, SECOND): 15}
kinds = pytest.mark.parametrize(("bits", "power"), LEVELS)
both_bits = pytest.mark.parametrize("bits", [8, 4])
TINY, LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max
BLOCK = 32


# Eager, each of its operations would be compiled alone.
encode = jax.jit(quantization.encode, static_argnums=(1, 2, 3))


def of(code):
    """The numbers of codes; of ratios, those themselves."""
    return code.decode(jnp.ones(code.shape)) if code.signed else code.decode()


def draw(shape, power, seed=0, decades=6):
    """Numbers spread evenly over some decades; ratios of either sign, with zeros."""
    rng = np.random.default_rng(seed)
    x = 10.0 ** (2 - rng.uniform(0, decades, shape)) * (rng.choice([-1, 0, 1], shape, p=[0.45, 0.1, 0.45]))
    return (x if power else np.abs(x)).astype(np.float32)


def decoded(x, bits, power, nearest=False, seeds=1):
    """The numbers after encoding with many seeds, in double: [seeds, *x.shape]."""

    def trip(seed):
        return of(encode(jnp.asarray(x), bits, power, BLOCK, None if nearest else Dither(seed, jnp.uint32(0))))

    return np.asarray(jax.jit(jax.vmap(trip))(jnp.arange(seeds, dtype=jnp.uint32)), np.float64)


def magnitudes(block, bits, power):
    """All magnitudes that the codes of a block stand for, in float64, from small to large."""
    levels, size = LEVELS[bits, power], np.abs(block)
    if power == RATIO:
        upper_half = size.max().view(np.uint32) + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)
        t = np.arange(levels + 1) / levels
        return float(upper_half.view(np.float32)) * t * (2 + t) / 3
    if not np.any(size):
        return np.zeros(1)
    # Floats from the smallest number, without its last mantissa bits, in the finest steps that reach the largest.
    first, last = (int(x.view(np.uint32)) for x in (size[size > 0].min(), size.max()))
    first = first >> 19 << 19
    step = next((1 << k for k in range(10, 25) if (last >> k) - (first >> k) <= levels - 2), 1 << 25)
    first = max(first // step, last // step - (levels - 2), 1)
    numbers = np.array([min((first + i) * step, 0x7F800000) for i in range(levels)], np.uint32)
    return np.concatenate([[0.0], numbers.view(np.float32).astype(np.float64)])


def neighbours(x, bits, power):
    """The two magnitudes around each |x|; both are the smallest above 0 for numbers below that."""
    low, high = np.zeros(x.shape), np.zeros(x.shape)
    for *row, start in np.ndindex(*x.shape[:-1], -(-x.shape[-1] // BLOCK)):
        at = (*row, slice(start * BLOCK, (start + 1) * BLOCK))
        size, every = np.abs(x[at]), magnitudes(x[at], bits, power)
        if power == SECOND:
            size = np.where(size > 0, np.maximum(size, every[min(1, len(every) - 1)]), 0)
        above = np.minimum(np.searchsorted(every, size, side="right"), len(every) - 1)
        below = np.maximum(above - 1, 0)
        low[at] = np.where(every[above] <= size, every[above], every[below])
        high[at] = np.where((power == SECOND) & (size == 0), 0, every[above])
    return low, high


@kinds
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 33), (70,), (1, 1), (5, 7)])
def test_decodes_to_one_of_the_neighbours(bits, power, shape):
    x = draw(shape, power)
    found = decoded(x, bits, power, seeds=30)
    low, high = neighbours(x, bits, power)
    near = np.minimum(np.abs(np.abs(found) - low), np.abs(np.abs(found) - high))
    assert np.all(near <= (2e-6 * np.abs(x).max() if power else 0))
    assert np.all(found * x >= 0)


@kinds
def test_right_on_average(bits, power):
    """A second moment in powers of 2 or finer steps: coarser ones are rounded by their exponents."""
    x = draw((4, 32), power, seed=1, decades=3.5)
    found = decoded(x, bits, power, seeds=4000)
    low, high = neighbours(x, bits, power)
    error = np.abs(found.mean(axis=0) - x)
    assert np.all(error <= 5 / 2 / np.sqrt(4000) * (high - low) + 2e-6 * np.abs(x))


@kinds
def test_what_was_decoded_is_encoded_as_itself(bits, power):
    x = draw((8, 64), power)
    x[:, ::BLOCK] = 200
    x = decoded(x, bits, power)[0].astype(np.float32)
    if power == RATIO:
        x[:, ::BLOCK] = 200  # the scale of ratios follows their largest one
    again = decoded(x, bits, power, seeds=20)
    if power == SECOND:
        np.testing.assert_array_equal(again, np.broadcast_to(x, again.shape))
    else:  # but for the last digit
        assert np.mean(np.abs(again - x) <= 1e-6 * np.abs(x)) > 0.999


@both_bits
def test_without_a_dither_second_moments_are_rounded_to_nearest(bits):
    x = draw((8, 64), SECOND, decades=3.5)
    found = decoded(x, bits, SECOND, nearest=True, seeds=3)
    assert np.all(found == found[0])
    low, high = neighbours(x, bits, SECOND)
    up = 0.5 if bits == 8 else 0.75  # a maximum keeps each rounding up for ever
    np.testing.assert_array_equal(found[0], np.where(x - low >= up * (high - low), high, low))
    np.testing.assert_array_equal(decoded(found[0].astype(np.float32), bits, SECOND, nearest=True)[0], found[0])


@both_bits
def test_a_second_moment_does_not_follow_its_scale(bits):
    """While the largest number of a block grows a thousandfold in small steps, the others stay."""
    x = jnp.asarray(np.geomspace(0.02, 1, 32), jnp.float32)

    def body(stored, largest):
        return encode(stored.decode().at[-1].set(largest), bits, SECOND, 32, None), None

    first = encode(x, bits, SECOND, 32, None)
    last, _ = jax.lax.scan(body, first, jnp.geomspace(1, 1000 if bits == 8 else 60, 2000))
    ratio = np.asarray(last.decode() / x)[:-1]
    least, most = (0.95, 1.05) if bits == 8 else (0.5, 1.2)  # powers of 2, most often rounded down
    assert np.all((ratio > least) & (ratio < most))


@kinds
def test_zeros_are_exact(bits, power):
    assert np.all(decoded(np.zeros((2, 40), np.float32), bits, power) == 0)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 5
    found = decoded(x, bits, power)[0, 0]
    np.testing.assert_allclose(found[3], 5, rtol=1e-6)
    assert np.all(np.delete(found, 3) == 0)


@both_bits
def test_a_positive_second_moment_never_becomes_zero(bits):
    x = np.geomspace(10.0 ** -np.array([80, 30, 18, 8, 2]), 1, 32).T
    x = np.concatenate([x * largest for largest in (LARGEST, 1e20, 1.0, 1e-10, 1e-19, 1e-25, 1e-30, 3e-38)])
    for nearest in (False, True):
        found = decoded(np.maximum(x, TINY).astype(np.float32), bits, SECOND, nearest, seeds=50)
        assert np.all(found > 0)
        assert np.all(np.isfinite(found))


def test_eight_bits_hold_all_second_moments_at_once():
    x = np.geomspace(TINY, LARGEST, 32).astype(np.float32)
    ratio = decoded(x, 8, SECOND, seeds=200) / x
    assert np.all((ratio >= 0.5) & (ratio <= 2))


@pytest.mark.parametrize(("step", "decades"), [(2, 3.6), (4, 7.2), (16, 14.4)])
def test_second_moments_in_four_bits_are_powers(step, decades):
    x = np.geomspace(10.0**-decades, 1, 32).astype(np.float32)
    found = decoded(x, 4, SECOND, seeds=50)
    np.testing.assert_array_equal(np.log2(found), np.round(np.log2(found)))
    ratio = found / x
    assert np.all((ratio > 1 / step) & (ratio < step))


def test_in_four_bits_what_is_too_small_becomes_the_smallest_of_its_block():
    x = np.geomspace(1e-30, 1, 32).astype(np.float32)
    found = decoded(x, 4, SECOND, seeds=50)
    smallest = 2.0**-55  # 13 powers of 16 below 2**-3, the largest that a float of these bits has up to 1
    assert found.min() == smallest
    assert np.all(found[:, x < smallest] == smallest)
    assert np.all((found / np.maximum(x, smallest) > 1 / 16) & (found / np.maximum(x, smallest) < 16))


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_poisons_its_block(bits, power, bad):
    """And no other, whatever is compiled with it."""
    x = np.ones((1, 64), np.float32)
    x[0, 3] = bad
    update = jax.jit(lambda x: encode(0.5 * x + 0.5, bits, power, 32, Dither(jnp.uint32(0), jnp.uint32(0))))
    for code in (update(x), encode(x, bits, power, 32, Dither(jnp.uint32(0), jnp.uint32(0)))):
        assert not np.any(np.isfinite(of(code)[0, :32]))
        assert np.all(of(code)[0, 32:] == 1)
        again = encode(of(code), bits, power, 32, Dither(jnp.uint32(1), jnp.uint32(0)))
        assert not np.any(np.isfinite(of(again)[0, :32]))


@kinds
@pytest.mark.parametrize("n", [1, 2, 7, 64, 65])
def test_shapes_of_codes(bits, power, n):
    found = encode(jnp.ones((3, n)), bits, power, 16, Dither(jnp.uint32(0), jnp.uint32(0)))
    blocks = -(-n // 16)
    assert found.codes.shape == (3, -(-n * bits // 8))
    assert found.codes.dtype == ("int8" if (bits, power) == (8, RATIO) else "uint8")
    assert found.scales.shape == (3, blocks)
    assert found.scales.dtype == "uint16"
    assert found.shape == (3, n)
    assert found.nbytes == 3 * (-(-n * bits // 8) + 2 * blocks)
    np.testing.assert_allclose(of(found), 1, rtol=1e-6)
    found.check()


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


def loaded(m, v, mu_bits, nu_bits, number):
    """Both moments of a parameter as a step stores and the next one loads them."""
    likes = [
        moment_storage.init_moments(m, name, adamjax.quantized(f"int{bits}", min_size=1), power=power)
        for name, bits, power in (("mu", mu_bits, RATIO), ("nu", nu_bits, SECOND))
    ]
    dither = Dither(jnp.uint32(number), jnp.uint32(0))
    stored = moment_storage.store(v, likes[1], dither.second_array())
    kept = moment_storage.storable(v, stored)
    first = moment_storage.store_first(m, kept, likes[0], dither, jnp.float32(0.1))
    return first.decode(stored.decode()), stored.decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", DIRECTION)
def test_directions_from_real_moments(captured, name):
    """One storing and loading of both moments changes Adam's direction by no more than the table says."""
    (mu_bits, nu_bits), bounds = DIRECTION[name]
    correction = np.sqrt(1 - 0.999**60) / (1 - 0.9**60)

    @jax.jit
    def stored(moments):
        return [loaded(m, v, mu_bits, nu_bits, i) for i, (m, v) in enumerate(moments)]

    def directions(moments):
        return np.concatenate([np.ravel(correction * np.asarray(m, np.float64) / np.sqrt(v)) for m, v in moments])

    exact, found = directions(captured), directions(stored(captured))
    error = np.abs(found - exact)
    assert np.median(error / np.abs(exact)) <= bounds.median
    assert np.quantile(error, 0.99) <= bounds.p99 * np.sqrt(np.mean(exact**2))
    assert np.linalg.norm(error) / np.linalg.norm(exact) <= bounds.norm
    assert not np.any((np.abs(found) > 3 * np.abs(exact)) & (np.abs(found) > bounds.outlier))
    assert abs(found @ exact / (exact @ exact) - 1) <= bounds.bias
