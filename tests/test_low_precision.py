"""What low precision does over many steps: nothing sticks, nothing drifts, and training ends as in float32."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import decoded
from specs import ROUNDED
from tolerances import CONSTANT_GRADIENT, DIGITS, LARGEST_STEP, LEAST_SQUARES

import adamjax
from adamjax import problems
from adamjax.training import keys_of, train_step

pytestmark = pytest.mark.numbers

INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")
FORMATS = {
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "int8": (INT8, INT8),
    "int4 and int8": (INT4, INT8),
    "int4": (INT4, INT4),
}
formats = pytest.mark.parametrize("name", FORMATS)
SHAPE = (32, 128)


def scale_by_adam(name, b1=0.9):
    mu_dtype, nu_dtype = FORMATS[name]
    return adamjax.scale_by_adam(b1=b1, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


def directions(opt, state, grads):
    """The last direction along `grads`, and the last state."""
    zero = jnp.zeros(SHAPE)

    def body(carry, g):
        return opt.update(g, carry[1]), None

    return jax.jit(lambda state, grads: jax.lax.scan(body, (zero, state), grads)[0])(state, grads)


def repeated(g, times):
    return jnp.broadcast_to(jnp.asarray(g, jnp.float32), (times, *SHAPE))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "b1"), [*((name, 0.9) for name in FORMATS), ("int4", 0.99)])
def test_a_constant_gradient(name, b1):
    """After 1500 steps the direction is 1, on average over elements whose gradients differ tenfold in a block."""
    opt = scale_by_adam(name, b1)
    g = 10.0 ** np.random.default_rng(0).uniform(-1, 0, SHAPE)
    found, _ = directions(opt, opt.init(jnp.zeros(SHAPE)), repeated(g, 1500))
    last = np.asarray(found, np.float64)
    assert abs(last.mean() - 1) <= CONSTANT_GRADIENT[name]
    equal, _ = directions(opt, opt.init(jnp.zeros(SHAPE)), repeated(0.3, 1500))
    assert abs(np.asarray(equal, np.float64).mean() - 1) <= CONSTANT_GRADIENT[name]


MIXTURES = [(None, INT4), (INT8, INT4), (INT4, INT8), (INT4, None)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [adamjax.adam, adamjax.amsgrad, adamjax.nadam, adamjax.radam, adamjax.adamax])
def test_no_step_is_far_larger_than_in_float32(make):
    """One element of each block has a large gradient, and the others much smaller ones."""

    def largest_steps(mu_dtype, nu_dtype):
        opt = make(1.0, mu_dtype=mu_dtype, nu_dtype=nu_dtype)

        def of_ratio(ratio):
            g, p = jnp.full((128, 64), ratio).at[:, 0].set(1.0), jnp.zeros((128, 64))

            def body(state, _):
                updates, state = opt.update(g, state, p)
                return state, jnp.max(jnp.abs(updates), 0)

            return jnp.max(jax.lax.scan(body, opt.init(p), length=20)[1], 0)

        return jax.jit(lambda: jax.lax.map(of_ratio, jnp.float32([1e-1, 1e-2, 1e-3, 1e-4, 1e-5])))()

    exact = largest_steps(None, None)
    for mixture in MIXTURES:
        assert np.max(largest_steps(*mixture) / exact) <= LARGEST_STEP, mixture


@pytest.mark.slow
@formats
def test_the_second_moment_decays(name):
    """2000 zero gradients at b2 = 0.999 leave 0.999**2000 = 0.135 of it."""
    opt = scale_by_adam(name)
    noise = jax.random.normal(jax.random.key(0), (100, *SHAPE))
    _, state = directions(opt, opt.init(jnp.zeros(SHAPE)), noise)
    before = decoded(state).nu
    _, state = directions(opt, state, repeated(0, 2000))
    np.testing.assert_allclose(decoded(state).nu.mean() / before.mean(), 0.999**2000, rtol=0.1)


@formats
def test_a_parameter_without_gradient_comes_to_rest(name):
    """Its block lives on. A first moment that stuck would be divided by a second one that decays."""
    opt = scale_by_adam(name)
    grads = jax.random.normal(jax.random.key(0), (400, *SHAPE))
    _, state = directions(opt, opt.init(jnp.zeros(SHAPE)), grads)
    found, _ = directions(opt, state, grads.at[:, :, ::2].set(0))
    assert np.abs(found[:, ::2]).max() <= 1e-3
    assert np.abs(found[:, 1::2]).mean() >= 0.1


TARGET = jax.random.normal(jax.random.key(1), SHAPE)
# With a learning rate that suits each.
OPTIMIZERS = {
    "adamw": (adamjax.adamw, 0.03),
    "amsgrad torch": (adamjax.amsgrad, 0.03),
    "amsgrad corrected": (partial(adamjax.amsgrad, variant="corrected"), 0.03),
    "amsgrad paper": (partial(adamjax.amsgrad, variant="paper"), 0.03),
    "nadam": (adamjax.nadam, 0.03),
    "radam": (adamjax.radam, 0.1),
    "adamax": (adamjax.adamax, 0.1),
}


@cache
def least_squares(optimizer, name):
    """The mean squared distance to the target after 300 noisy steps."""
    mu_dtype, nu_dtype = FORMATS[name] if name else (None, None)
    make, rate = OPTIMIZERS[optimizer]
    opt = make(adamjax.schedules.cosine(rate, 300), mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    p = jnp.zeros(SHAPE)

    def body(carry, key):
        p, state = carry
        return opt.step(p - TARGET + jax.random.normal(key, SHAPE), state, p), None

    (p, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, jax.random.split(jax.random.key(2), 300)))(
        (p, opt.init(p))
    )
    return float(jnp.mean((p - TARGET) ** 2))


# Each optimizer at the coarsest, which its own way to use the moments has to survive, and each format with one.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [*((optimizer, "int4") for optimizer in OPTIMIZERS), ("adamw", "int8"), ("amsgrad torch", "int4 and int8")],
)
def test_every_optimizer_works_with_every_format(optimizer, name):
    exact = least_squares(optimizer, None)
    assert exact < 0.1
    assert abs(least_squares(optimizer, name) / exact - 1) <= LEAST_SQUARES[name]


@cache
def digits_loss(mu_dtype=None, nu_dtype=None, rounded=None):
    """The mean validation loss of three runs."""
    problem = problems.digits(hidden=(96,))
    opt = adamjax.adam(adamjax.schedules.warmup_cosine(1e-2, 10, 200), mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    opt = ROUNDED[rounded](opt) if rounded else opt

    def run(seed):
        keys = keys_of(seed)
        params = problem.init(keys.init)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params) if rounded else params

        def body(carry, t):
            return train_step(problem, opt, keys, *carry, t)[:2], None

        (params, _), _ = jax.lax.scan(body, (params, opt.init(params)), jnp.arange(200))
        return problem.evaluate(jax.tree.map(lambda p: p.astype(jnp.float32), params))["loss"]

    return float(jnp.mean(jax.jit(lambda: jax.lax.map(run, jnp.arange(3)))()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4 and int8"])
def test_training_with_stored_moments(name):
    assert abs(digits_loss(*FORMATS[name]) / digits_loss() - 1) <= DIGITS


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_training_with_rounded_parameters(name):
    assert abs(digits_loss(rounded=name) / digits_loss() - 1) <= DIGITS
