"""Decay rates near 1: as numbers, as leaves, as arrays of any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal
from tolerances import ONE_STEP, RECOMPILED

import adamjax
from adamjax import interop

pytestmark = pytest.mark.numbers

G, P = jnp.full(2, 0.5), jnp.ones(2)
MAKERS = {
    "adam": adamjax.adam,
    "adamw": lambda rate, **kw: adamjax.adamw(rate, weight_decay=0.0, **kw),
    "nadam": adamjax.nadam,
    "radam": adamjax.radam,
    "adamax": adamjax.adamax,
    "amsgrad": adamjax.amsgrad,
    "torch's adam": lambda rate, b1=0.9, b2=0.999: interop.torch.adam(rate, betas=(b1, b2)),
    "torch's nadam": lambda rate, b1=0.9, b2=0.999: interop.torch.nadam(rate, betas=(b1, b2)),
}


@jax.jit
def two_steps(opt):
    params, state = P, opt.init(P)
    for g in (G, 2 * G):
        params, state = opt.step(g, state, params)
    return params


@pytest.mark.parametrize("name", MAKERS)
def test_no_number_below_1_acts_as_1(name):
    rates = {"b1": 0.9999, "b2": 0.99999999}
    exact = two_steps.__wrapped__(MAKERS[name](0.1, **rates))
    assert_close(two_steps(MAKERS[name](0.1, **rates)), exact, 10 * ONE_STEP)
    assert np.all(exact < 1)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_array_that_is_1_counts_as_the_number_below(name, dtype):
    below = float(1 - jnp.finfo(dtype).epsneg)
    for which in ("b1", "b2"):
        found = two_steps(MAKERS[name](0.1, **{which: jnp.ones((), dtype)}))
        assert_close(found, two_steps(MAKERS[name](0.1, **{which: below})), 1e2 * RECOMPILED)


def test_hyperparameters_in_the_dtype_of_bfloat16_parameters():
    """inject_hyperparams rounds 0.999 to 1."""
    p = jnp.ones(3, jnp.bfloat16)
    opt = optax.inject_hyperparams(adamjax.adamw)(learning_rate=0.1)
    updates, _ = opt.update(p, opt.init(p), p)
    np.testing.assert_allclose(np.asarray(updates, np.float32), -0.1, rtol=5e-3)


@pytest.mark.parametrize("b2", [0.3, 0.999, 0.9999, 0.999999])
def test_leaves_are_as_exact_as_numbers(b2):
    def second_moment(opt):
        return opt.update(G, opt.init(P), P)[1].nu

    exact = second_moment(adamjax.scale_by_adam(b2=b2))
    for found in (
        jax.jit(second_moment)(adamjax.scale_by_adam(b2=b2)),
        jax.vmap(second_moment)(stacked(adamjax.scale_by_adam(b2=b2), adamjax.scale_by_adam(b2=0.9)))[0],
    ):
        assert_close(found, exact, RECOMPILED)


def stacked(*opts):
    return jax.tree.map(lambda *x: jnp.stack(x), *opts)


def test_values_stay_natural():
    opt = adamjax.scale_by_adam(b2=0.9999)
    same = jax.tree.map(lambda x: x, opt)
    assert (same, hash(same), repr(same)) == (opt, hash(opt), repr(opt))
    assert same.b2 == 0.9999
    given = jnp.float32(0.9999)
    assert jax.tree.map(lambda x: x, adamjax.scale_by_adam(b2=given)) == adamjax.scale_by_adam(b2=given)
    assert repr(jax.jit(lambda x: x)(opt)).startswith("ScaleByAdam(b1=float32(0.9), b2=float32(0.9999)")
    rates = jnp.array([0.9, 0.99])
    assert_equal(jax.vmap(lambda b: adamjax.scale_by_adam(b2=b))(rates).b2, rates)


def test_under_64_bits_a_leaf_leaves_nothing_out():
    with jax.enable_x64(True):
        p = jnp.ones(2)
        nu = jax.jit(lambda opt: opt.update(p, opt.init(p), p)[1].nu)(adamjax.scale_by_adam(b2=0.999999))
        np.testing.assert_allclose(nu, 1 - 0.999999, rtol=1e-12)


def test_the_derivative_is_that_by_the_rate():
    opt = adamjax.adam(0.1, b2=0.99)
    slope = jax.grad(lambda opt: jnp.sum(two_steps(opt)))(opt).transforms[0].b2
    with jax.enable_x64(True):
        g, p = G.astype(jnp.float64), P.astype(jnp.float64)
        ends = []
        for b2 in (0.99 + 1e-6, 0.99 - 1e-6):
            params, state = p, opt.init(p)
            for factor in (1, 2):
                params, state = adamjax.adam(0.1, b2=b2).step(factor * g, state, params)
            ends.append(float(jnp.sum(params)))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-3)


def test_steps_of_leaves_are_steps_of_the_rate():
    opt = adamjax.scale_by_adam(b2=0.9999)
    half = jax.jit(lambda opt: jax.tree.map(lambda x: x / 2, opt))(opt)
    nu = half.update(G, half.init(P), P)[1].nu
    np.testing.assert_allclose(nu, (1 - 0.9999 / 2) * G**2, rtol=RECOMPILED)


def test_groups_made_of_leaves_keep_the_digits():
    def second_moment(opt):
        opt = adamjax.groups({".*": {"eps": 1e-6}}, default=opt)
        return opt.update({"a": G}, opt.init({"a": P}), {"a": P})[1][0][0].nu["a"]

    opt = adamjax.adam(b2=0.99999)
    assert_close(jax.jit(second_moment)(opt), second_moment(opt), RECOMPILED)
