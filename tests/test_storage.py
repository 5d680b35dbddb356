"""How moments are kept: rounding to narrow dtypes, which leaves are quantised, and how many bytes that takes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_equal, assert_same_types
from tolerances import DIRECTION

import adamjax
from adamjax import storage
from adamjax._core import low_precision
from adamjax._core.low_precision import Dither
from adamjax._core.quantization import is_quantized
from adamjax._transforms import moment_storage

pytestmark = pytest.mark.numbers

NARROW = ["bfloat16", "float16"]
any_quantized: Any = adamjax.quantized  # with arguments of the wrong type
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")


ONE = Dither(jnp.uint32(1), jnp.uint32(0))


def like(dtype):
    return jnp.zeros((), dtype)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _settled(settle, x, dtype, seeds):
    store = jax.vmap(lambda seed: settle(x, like(dtype), Dither(seed, jnp.uint32(0))))
    return store(jnp.arange(seeds, dtype=jnp.uint32))


def settled(settle, x, dtype, seeds=4000):
    """`x` rounded with many seeds, in float64."""
    return np.asarray(_settled(settle, x, dtype, seeds), np.float64)


decaying = partial(settled, moment_storage.round_second_moment)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("x", [1.0, -1.003, 1.001, 0.9999, 3e-5, 1.7e-7, 6.2e-5, 1234.5])
def test_right_on_average(dtype, x):
    x = np.float32(x)
    found = settled(moment_storage.round_first_moment, jnp.array([x]), dtype)
    if x > 0:
        np.testing.assert_array_equal(found, decaying(jnp.array([x]), dtype))
    nearest = np.asarray(jnp.asarray(x).astype(dtype), np.float64)
    if nearest == x:
        assert np.all(found == x)
    spacing = max(float(jnp.finfo(dtype).eps) * abs(float(x)), 2.0**-24 if dtype == "float16" else 0)
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
    assert np.all(np.asarray(moment_storage.round_max(tiny, like(dtype)), np.float64) > 0)
    assert np.all(decaying(jnp.zeros(3), dtype, seeds=100) == 0)
    assert moment_storage.round_max(jnp.zeros(()), like(dtype)) == 0


def test_float16_saturates_and_shows_what_is_not_finite():
    x = jnp.array([1e6, jnp.inf, jnp.nan])
    for found in (
        moment_storage.round_first_moment(x, like("float16"), ONE),
        moment_storage.round_max(x, like("float16")),
        moment_storage.round_second_moment(x, like("float16"), ONE),
    ):
        assert found[0] == 65504
        assert np.isinf(found[1])
        assert np.isnan(found[2])
    assert moment_storage.round_first_moment(-x, like("float16"), ONE)[0] == -65504
    assert np.isnan(moment_storage.round_second_moment(x, like("bfloat16"), ONE)[2])


def test_wide_moments_are_not_rounded():
    x = jnp.array([1.0000001, 1e-38, 0.0])
    for store in (moment_storage.round_first_moment, moment_storage.round_second_moment):
        np.testing.assert_array_equal(store(x, like("float32"), None), x)
    np.testing.assert_array_equal(moment_storage.round_max(x, like("float32")), x)


def numbers(t, leaf, shape=(300, 300)):
    return np.asarray(
        low_precision.fraction(
            low_precision.random(low_precision.index_of(jnp.zeros(shape)), low_precision.dither(jnp.int32(t), leaf))
        ),
        np.float64,
    )


def test_random_numbers_are_uniform_and_independent():
    u = numbers(5, 3)
    assert u.min() >= 0
    assert u.max() < 1
    counts, _ = np.histogram(u, 64)
    assert np.sum((counts - u.size / 64) ** 2 / (u.size / 64)) < 110  # chi square of 63: 99.98 %
    for other in (np.roll(u, 1, axis=1), u.T, numbers(5, 4)):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.02
    assert len({float(numbers(7, leaf, (1,))[0]) for leaf in range(300)}) == 300


def test_each_element_is_rounded_evenly_over_time():
    """In any run of steps, its numbers fall below a fraction as often as they should, within two."""
    u = np.stack([numbers(t, 0, (200,)) for t in range(100)])
    for fraction in (0.01, 0.3, 0.5, 0.97):
        for start, end in ((0, 100), (17, 50), (60, 68)):
            found = np.sum(u[start:end] < fraction, axis=0)
            assert np.all(np.abs(found - fraction * (end - start)) <= 2)
            assert abs(found.mean() - fraction * (end - start)) < 0.2


def test_the_derivative_goes_straight_through():
    slope = jax.grad(lambda x: moment_storage.round_second_moment(x, like("bfloat16"), ONE).astype(jnp.float32))(
        jnp.float32(1.2345)
    )
    assert slope == 1


def state_of(params, **formats):
    return adamjax.scale_by_adam(**({"mu_dtype": INT8, "nu_dtype": INT8} | formats)).init(params)


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((64, 64), True),
        ((4096,), True),
        ((4095,), False),
        ((3, 3, 64, 64), True),
        ((5000, 4), True),
        ((5000, 3), False),
        ((5000, 1), False),
        ((100, 131), True),
        ((0, 5000), False),
        ((5000, 0), False),
        ((), False),
    ],
)
def test_which_leaves_are_quantized(shape, taken):
    state = state_of({"a": jnp.zeros(shape, jnp.bfloat16)})
    for moment in (state.mu["a"], state.nu["a"]):
        assert is_quantized(moment) == taken
        assert moment.shape == shape
        assert moment.dtype == "float32"


def test_size_and_path_decide():
    params = {"layer_0": {"kernel": jnp.zeros((80, 80)), "embedding": jnp.zeros((80, 80))}, "list": [jnp.zeros(80)]}
    seen = []

    def keep(path):
        seen.append(path)
        return "embedding" in path

    state = state_of(params, mu_dtype=adamjax.quantized("int8", keep=keep, min_size=0))
    assert sorted(seen) == ["layer_0/embedding", "layer_0/kernel", "list/0"]
    assert is_quantized(state.mu["layer_0"]["kernel"])
    assert is_quantized(state.mu["list"][0])
    assert not is_quantized(state.mu["layer_0"]["embedding"])
    assert not is_quantized(state.nu["list"][0])


def test_complex_and_wide_parameters():
    state = state_of({"z": jnp.zeros((64, 64), jnp.complex64)})
    assert state.mu["z"].dtype == "complex64"
    assert is_quantized(state.nu["z"])
    with jax.enable_x64(True):
        small = state_of({"a": jnp.zeros(3, jnp.float64)})
        assert small.mu["a"].dtype == small.nu["a"].dtype == "float64"


@pytest.mark.parametrize("format", [INT8, INT4])
def test_shapes_of_a_state_under_x64(format):
    opt = adamjax.scale_by_adam(mu_dtype=format, nu_dtype=format)
    with jax.enable_x64(True):
        found = opt.init(jax.ShapeDtypeStruct((64, 256), jnp.float32))
        assert_same_types(found, opt.init(jnp.zeros((64, 256), jnp.float32)))


@pytest.mark.parametrize(
    ("mu_dtype", "nu_dtype", "most"),
    [(jnp.bfloat16, jnp.bfloat16, 4.0), (INT8, INT8, 2.1), (INT4, INT8, 1.6), (INT4, INT4, 1.1), (None, None, 8.0)],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_of_state(mu_dtype, nu_dtype, most, dtype):
    params = {"a": jnp.zeros((512, 512), dtype), "b": jnp.zeros((2048, 300), dtype)}
    opt = adamjax.adamw(mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    counted = storage.state_bytes(opt, params)
    assert counted == sum(x.nbytes for x in jax.tree.leaves(opt.init(params)))
    assert 0.9 * most < counted / (512 * 512 + 2048 * 300) <= most + 1e-4
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert storage.state_bytes(opt, shapes) == counted


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: adamjax.ademamix(), 12.0),
        (lambda: adamjax.ademamix(mu_dtype=INT8, nu_dtype=INT8), 6.1),
        (lambda: adamjax.ademamix(mu_dtype=INT8, mu_slow_dtype=INT8, nu_dtype=INT8), 3.2),
        (lambda: adamjax.simplified_ademamix(), 8.0),
        (lambda: adamjax.adopt(), 8.0),
        (lambda: adamjax.adopt(mu_dtype=INT8, nu_dtype=INT8), 2.1),
        (lambda: adamjax.adam_atan2(), 8.0),
        (lambda: adamjax.stable_adamw(), 8.0),
        (lambda: adamjax.adamw(cautious=True), 8.0),
    ],
)
def test_bytes_of_the_rules_since_adam(make, most):
    params = {"a": jax.ShapeDtypeStruct((512, 512), jnp.float32), "b": jax.ShapeDtypeStruct((2048, 300), jnp.bfloat16)}
    counted = storage.state_bytes(make(), params) - 4  # the count
    assert 0.9 * most < counted / (512 * 512 + 2048 * 300) <= most


def test_all_three_moments_of_ademamix_are_decoded():
    rng = np.random.default_rng(0)
    p, all_grads = jnp.zeros((64, 128)), jnp.asarray(rng.normal(size=(3, 64, 128)), jnp.float32)
    formats = {"mu_dtype": INT8, "mu_slow_dtype": INT8, "nu_dtype": INT8}
    stored, plain = (adamjax.scale_by_ademamix(b3=0.99, **kw) for kw in (formats, {}))
    states = []
    for opt in (stored, plain):
        state, update = opt.init(p), jax.jit(opt.update)
        for g in all_grads:
            _, state = update(g, state)
        states.append(state)
    found, expected = storage.decode(states[0]), states[1]
    assert type(found) is type(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name in ("mu", "mu_slow", "nu"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == jnp.float32
        if name == "nu":  # its codes are of the root
            a, b = jnp.sqrt(a), jnp.sqrt(b)
        assert jnp.linalg.norm(a - b) <= DIRECTION["int8"][1].p99 * jnp.linalg.norm(b), name


def test_bytes_of_a_state_that_nobody_could_allocate():
    params = jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)
    assert storage.state_bytes(adamjax.adam(mu_dtype=INT8), params) == 10**12 + 2 * 10**6 * 31250 + 4 * 10**12 + 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: adamjax.quantized("int2"),
            ValueError,
            r"^Invalid format value: 'int2'; format must be one of",
        ),
        (lambda: adamjax.quantized("int8", block_size=0), ValueError, r"^Invalid block_size value: 0; .* at least 1"),
        (
            lambda: any_quantized("int8", block_size="64"),
            TypeError,
            r"^Invalid block_size value: '64'; .* must be an int",
        ),
        (lambda: adamjax.quantized("int8", min_size=-1), ValueError, r"^Invalid min_size value: -1"),
        (
            lambda: any_quantized("int8", keep="bias"),
            TypeError,
            r"^Invalid keep value: 'bias'; keep must be",
        ),
        (lambda: adamjax.adam(mu_dtype="int8"), ValueError, r"mu_dtype value: int8; .*adamjax\.quantized\('int8'\)"),
        (lambda: adamjax.adam(nu_dtype=jnp.uint8), ValueError, r"^Invalid nu_dtype value: uint8; .*adamjax\.quantized"),
        (
            lambda: state_of({"a": jnp.zeros((64, 64), jnp.int8)}),
            TypeError,
            r"^params\['a'\] is int8\[64,64\]",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_formats_are_values():
    assert adamjax.quantized("int8") == adamjax.quantized("int8", None)
    assert hash(adamjax.quantized("int8")) == hash(adamjax.quantized("int8", None))
    assert adamjax.quantized("int8") != adamjax.quantized("int8", 64)
    assert adamjax.adam(mu_dtype=INT8) == adamjax.adam(mu_dtype=adamjax.quantized("int8"))
    assert repr(adamjax.scale_by_adam(mu_dtype=INT4)).endswith("mu_dtype=adamjax.quantized('int4'))")
    given = adamjax.quantized("int8", 64, min_size=0, keep=len)
    assert repr(given) == "adamjax.quantized('int8', block_size=64, min_size=0, keep=len)"


def test_a_state_says_what_it_is():
    opt = adamjax.scale_by_adam(mu_dtype=INT4, nu_dtype=INT8)
    state = opt.init({"a": jnp.zeros((64, 129))})
    assert repr(state.mu["a"]) == "QuantizedArray(int4[64,129] in blocks of 64, 4544 bytes)"
    assert repr(state.nu["a"]) == "QuantizedArray(uint8[64,129] in blocks of 64, 8640 bytes)"
    assert state.mu["a"].codes.shape == (64, 65)
    assert state.mu["a"].scales.shape == (64, 3)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert paths[1:3] == [".mu['a'].codes", ".mu['a'].scales"]
    assert "QuantizedArray" in repr(jax.tree.map(lambda _: None, state))


def test_a_misfit_names_the_parameter_and_not_its_codes():
    opt = adamjax.scale_by_adam(mu_dtype=INT8, nu_dtype=INT8)
    state = opt.init({"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))})
    with pytest.raises(ValueError, match=r"^the gradients lack state\.mu\['b'\] \(float32\[64,64\]\)"):
        opt.update({"a": jnp.zeros((64, 64))}, state)
    with pytest.raises(ValueError, match=r"state\.mu\['b'\] has shape \(64,\), expected \(64, 64\)"):
        opt.update({"a": jnp.zeros((64, 64)), "b": jnp.zeros(64)}, state)


def test_a_population_of_quantized_states():
    """Stacked optimizers, each with its own state, step as they do one by one."""
    params = jax.random.normal(jax.random.key(0), (64, 64))
    rates = jnp.array([1e-3, 1e-2])

    def steps(rate):
        opt = adamjax.amsgrad(rate, mu_dtype=INT4, nu_dtype=INT8)
        p, state = opt.step(params, opt.init(params), params)
        return opt.step(p, state, p)

    stacked, (found, *_) = jax.jit(jax.vmap(steps))(rates)
    assert found.mu.shape == (2, 64, 64)
    for i, rate in enumerate(rates):
        alone, (state, *_) = jax.jit(steps)(rate)
        np.testing.assert_allclose(stacked[i], alone, rtol=1e-5)
        assert np.mean(found.mu.codes[i] != state.mu.codes) < 1e-3


def test_derivatives_through_codes_are_refused():
    opt = adamjax.adam(1e-2, mu_dtype=INT8)
    params = jnp.ones((64, 64))

    def loss(opt):
        p, state = opt.step(params, opt.init(params), params)
        return jnp.sum(opt.step(params, state, p)[0])

    with pytest.raises(TypeError, match=r"stored as integers, and cannot: .* float32 \(mu_dtype=None"):
        jax.grad(loss)(opt)


def test_steps_are_reproducible_and_differ():
    """The same state gives the same rounding; the next step another one."""
    opt = adamjax.scale_by_adam(mu_dtype=INT8, nu_dtype=INT8)
    g = jax.random.normal(jax.random.key(0), (64, 64))
    update = jax.jit(opt.update)
    once, again = update(g, opt.init(g)), update(g, opt.init(g))
    assert_equal(once, again)
    other = opt.init(g)._replace(count=jnp.int32(7))
    assert np.mean(update(g, other)[1].mu.codes != once[1].mu.codes) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_facts_of_precision(dtype):
    """They are what arithmetic in the dtype does."""
    facts = storage.precision(dtype, eps=1e-6)

    def added(x, rate=1):  # rounded once: 1 - b2 is no number of the dtype
        return np.asarray(rate * np.float64(x) ** 2, dtype)

    with np.errstate(over="ignore", under="ignore"):
        assert added(facts.smallest_gradient * 0.99, 1e-3) == 0 < added(facts.smallest_gradient * 1.01, 1e-3)
        assert np.isinf(added(facts.largest_gradient * 1.01))
        assert np.isfinite(added(facts.largest_gradient * 0.99))
    one = np.ones((), dtype)
    assert one + np.asarray(0.49 * facts.spacing, dtype) == one < one + np.asarray(0.51 * facts.spacing, dtype)
    assert facts.eps == float(np.asarray(1e-6, dtype))


@pytest.mark.usefixtures("lenient")
def test_where_optax_leaves_the_facts_of_float16_bite():
    """The step of a gradient whose second moment is 0 is as large as they say; ours is not."""
    eps = 1e-6
    facts = storage.precision("float16", eps)
    assert storage.precision("float16", 1e-8).magnified == np.inf
    g = jnp.full(3, facts.smallest_gradient * 0.9, jnp.float16)
    for opt, least, most in (
        (optax.adam(1.0, eps=eps), 0.8 * facts.magnified, facts.magnified),
        (adamjax.adam(1.0, eps=eps), 0.9, 1),
    ):
        updates, _ = opt.update(g, opt.init(g), g)
        assert least <= -float(updates[0]) <= most
    with pytest.raises(ValueError, match=r"^Invalid dtype value: int8; dtype must be one of bfloat16, "):
        storage.precision("int8")
    with pytest.raises(ValueError, match=r"^Invalid epsilon value: -1"):
        storage.precision("float16", eps=-1)
