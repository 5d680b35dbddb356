"""Half precision parameters: where they land, what is kept, and what is refused."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import assert_close, assert_equal, assert_same_types
from specs import ROUNDED
from tolerances import RECOMPILED

import adamjax
from adamjax import storage
from adamjax._core.value import value
from adamjax.rounding import RoundingState

pytestmark = pytest.mark.numbers

INNERS = {"ours": adamjax.scale_by_learning_rate(1e-5), "optax's": optax.sgd(1e-5)}
wrappers = pytest.mark.parametrize("name", ROUNDED)


def after(opt, p, grads, apply=adamjax.apply_updates):
    """The parameter and the state after a step along each of `grads`."""

    @jax.jit
    def run(p, state):
        def body(carry, g):
            p, state = carry
            updates, state = opt.update(g, state, p)
            return (apply(p, updates), state), None

        return jax.lax.scan(body, (p, state), grads)[0]

    return run(p, opt.init(p))


def in_double(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@wrappers
@pytest.mark.parametrize("inner", INNERS)
def test_small_steps_add_up(name, inner):
    """2000 steps of -1e-5 from 1: to nearest, not one would be taken."""
    grads = jnp.ones((2000, 4096), jnp.bfloat16)
    p, _ = after(ROUNDED[name](INNERS[inner]), grads[0], grads)
    assert p.dtype == "bfloat16"
    assert abs(in_double(p).mean() - 0.98) <= 1.5e-3
    plain, _ = after(INNERS[inner], grads[0], grads)
    assert np.all(in_double(plain) == 1)


@pytest.mark.parametrize("name", ["stochastic_rounding", "kahan", "master_weights"])
def test_small_steps_add_up_in_float16(name):
    grads = jnp.ones((2000, 4096), jnp.float16)
    p, _ = after(ROUNDED[name](INNERS["ours"]), grads[0], grads)
    assert abs(in_double(p).mean() - 0.98) <= 3e-4


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["stochastic_rounding", "kahan", "master_weights"])
def test_small_steps_add_up_in_float8(name, dtype):
    """200 steps of -1e-3 from 1, below which the numbers lie 1/16 and 1/8 apart."""
    grads = jnp.ones((200, 4096), dtype)
    p, _ = after(ROUNDED[name](adamjax.adam(1e-3)), grads[0], grads)
    assert p.dtype == dtype
    assert abs(in_double(p).mean() - 0.8) <= float(jnp.finfo(dtype).eps) / 4
    plain, _ = after(adamjax.adam(1e-3), grads[0], grads)
    assert np.all(in_double(plain) == 1)


def random_walk(dtype, steps=200, size=300):
    """Parameters of all sizes, and updates that are tiny, ordinary, or lead across 0."""
    rng = np.random.default_rng(0)
    p = (10.0 ** rng.uniform(-6, 1, size) * rng.choice([-1, 1], size)).astype(np.float32)
    grads = 10.0 ** rng.uniform(-9, 0, (steps, size)) * rng.choice([-1, 1], (steps, size))
    grads[steps // 2] = p  # almost back to 0
    return jnp.asarray(p).astype(dtype), jnp.asarray(grads, jnp.float32)


def apply_flax(p, updates):
    """What flax's TrainState does."""
    state = TrainState.create(apply_fn=None, params={"p": p}, tx=optax.stateless(lambda u, _: u))
    return state.apply_gradients(grads={"p": updates}).params["p"]


@cache
def landed(name):
    return after(ROUNDED[name](adamjax.scale_by_learning_rate(1.0)), *random_walk("bfloat16"))


@wrappers
@pytest.mark.parametrize("apply", [optax.apply_updates, apply_flax])
@pytest.mark.usefixtures("lenient")
def test_parameters_land_where_they_are_meant_to(name, apply):
    """Whoever adds the updates; for the masters, that is the master rounded."""
    p, grads = random_walk("bfloat16")
    opt = ROUNDED[name](adamjax.scale_by_learning_rate(1.0))
    found, state = after(opt, p, grads, apply)
    assert_equal((found, state), landed(name))
    if "master" in name or "low_bits" in name:
        weights = opt.weights(found, state)
        if name == "master_weights":
            assert_equal(weights.astype(jnp.bfloat16), found)
        else:  # halves are rounded away from 0
            assert np.all(np.abs(in_double(weights) - in_double(found)) <= 2**-8 * np.abs(in_double(weights)))


def test_master_weights_are_float32():
    """The master, whole or in low bits, goes where a float32 parameter goes."""
    p, grads = random_walk("bfloat16")
    plain = adamjax.adam(1e-3)
    expected, _ = after(plain, p.astype(jnp.float32), grads)
    for opt in (adamjax.master_weights(plain), adamjax.master_weights(plain, low_bits=True)):
        found, state = after(opt, p, grads)
        assert_close(opt.weights(found, state), expected, RECOMPILED)


def test_eight_low_bits_follow_a_float32_master():
    """Off by some roundings to 24 bits, and not in the mean."""
    p, grads = random_walk("bfloat16", steps=100, size=2000)
    p, grads = jnp.abs(p) + 1, grads / 100
    opt = adamjax.scale_by_learning_rate(1.0)
    expected, _ = after(opt, p.astype(jnp.float32), grads)
    wrapped = adamjax.master_weights(opt, low_bits=8)
    apart = (in_double(wrapped.weights(*after(wrapped, p, grads))) - in_double(expected)) / in_double(expected)
    assert np.max(np.abs(apart)) <= 5 * 100**0.5 * 2**-16
    assert abs(apart.mean()) <= 5 * 100**0.5 * 2**-16 / 2000**0.5


def test_names_of_low_bits():
    """16 is another name for True: optimizers are equal, and so are checkpoints."""
    opt = adamjax.adam(1e-3)
    assert adamjax.master_weights(opt, low_bits=16) == adamjax.master_weights(opt, low_bits=True)
    assert repr(adamjax.master_weights(opt, low_bits=8)).endswith(", low_bits=8)")
    p = jnp.ones(3, jnp.bfloat16)
    for kept, taken in ((True, 8), (8, True), (False, 8)):
        state = adamjax.master_weights(opt, low_bits=kept).init(p)
        with pytest.raises(ValueError, match=r"^state.kept .* (uint8|uint16)"):
            adamjax.master_weights(opt, low_bits=taken).step(p, state, p)


def test_low_bits_hold_every_float32():
    """Whatever float32 a step leads to, it is there again in the next: ties, overflow to the next power, zeros."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    bits = np.concatenate([bits, (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000), bits | np.uint32(0x7FFFFF)])
    goal = bits.view(np.float32)
    goal = jnp.asarray(goal[np.isfinite(goal) & (np.abs(goal) > 1e-37) & (np.abs(goal) < 1e38)])
    opt = adamjax.master_weights(adamjax.scale_by_learning_rate(1.0), low_bits=True)
    start = jnp.zeros(goal.shape, jnp.bfloat16)
    p, state = jax.jit(opt.step)(-goal, opt.init(start), start)
    np.testing.assert_array_equal(opt.weights(p, state), goal)
    # Halves away from 0, and so never more than half a spacing off.
    assert np.all(np.abs(in_double(p) - np.asarray(goal, np.float64)) <= 2**-8 * np.abs(np.asarray(goal, np.float64)))
    for edge in (1e-39, -1e-39, 0.0, -0.0):
        p, state = opt.step(-jnp.full(3, edge, jnp.float32), opt.init(start[:3]), start[:3])
        assert np.all(np.asarray(opt.weights(p, state)) == 0)
        assert np.all(in_double(p) == 0)


@pytest.mark.parametrize("low_bits", [True, 8])
def test_low_bits_keep_a_change_from_outside(low_bits):
    opt = adamjax.master_weights(adamjax.scale_by_learning_rate(1e-5), low_bits=low_bits)
    p = jnp.ones(4, jnp.bfloat16)
    p, state = opt.step(p, opt.init(p), p)
    p, state = opt.step(jnp.zeros_like(p), state, p * 3)
    np.testing.assert_allclose(opt.weights(p, state), 3, rtol=2**-8)


@pytest.mark.parametrize("name", ["kahan", "stochastic_rounding"])
def test_right_on_average(name):
    """Over many elements, the mean follows float32's."""
    steps = 500
    walk = jnp.asarray(np.random.default_rng(0).normal(1e-5, 1e-4, steps), jnp.float32)
    grads = jnp.broadcast_to(walk[:, None], (steps, 20000))
    p, _ = after(ROUNDED[name](adamjax.scale_by_learning_rate(1.0)), jnp.ones(20000, jnp.bfloat16), grads)
    exact = 1 - np.asarray(walk, np.float64).sum()
    spread = 2**-8 * np.sqrt(steps / 20000) if name == "stochastic_rounding" else 2**-9
    assert abs(in_double(p).mean() - exact) <= 3 * spread


@wrappers
def test_parameters_in_float32_are_left_alone(name):
    opt = ROUNDED[name](adamjax.adam(1e-2))
    params = {"wide": jnp.ones((3, 2)), "absent": None, "half": jnp.ones(2, jnp.bfloat16)}
    grads = jax.tree.map(lambda p: 3 * p.astype(jnp.bfloat16), params)
    state = opt.init(params)
    new, state = jax.jit(opt.step)(grads, state, params)
    only = {"wide": params["wide"]}
    expected, _ = jax.jit(adamjax.adam(1e-2).step)({"wide": grads["wide"]}, adamjax.adam(1e-2).init(only), only)
    assert_close(new["wide"], expected["wide"], RECOMPILED)
    if state.kept is not None:
        assert state.kept["wide"] is None


@wrappers
def test_a_none_gradient_freezes(name):
    opt = ROUNDED[name](adamjax.adam(1e-2))
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    params, state = opt.step(params, opt.init(params), params)
    new, new_state = jax.jit(opt.step)({"a": None, "b": params["b"]}, state, params)
    assert_equal(new["a"], params["a"])
    assert_same_types(new_state, state)
    assert np.all(in_double(new["b"]) != in_double(params["b"]))
    if state.kept is not None and state.kept["a"] is not None:
        assert_equal(new_state.kept["a"], state.kept["a"])


@pytest.mark.parametrize(
    ("name", "most"),
    [("stochastic_rounding", 0), ("kahan", 2), ("master_weights", 4), ("low_bits", 2), ("low_bits=8", 1)],
)
def test_bytes(name, most):
    params = {"half": jnp.zeros((100, 100), jnp.bfloat16), "wide": jnp.zeros((50, 50))}
    plain = adamjax.adam(1e-3)
    # A count and a seed, whatever the size.
    assert storage.state_bytes(ROUNDED[name](plain), params) == storage.state_bytes(plain, params) + 8 + most * 10000


@pytest.mark.parametrize(("format", "expected"), [("int8", 7.09), ("int4", 6.06)])
def test_bytes_of_a_parameter_in_training(format, expected):
    """With its gradient and all that the state keeps of it: 2 + 2 + 1, and those of the moments."""
    codes = adamjax.quantized(format)
    opt = adamjax.master_weights(adamjax.adam(1e-3, mu_dtype=codes, nu_dtype=codes), low_bits=8)
    params = {"w": jnp.ones((256, 2048), jnp.bfloat16)}
    grads = jax.grad(lambda params: jnp.sum(params["w"] ** 2))(params)
    held = grads, *jax.jit(opt.step)(grads, opt.init(params), params)
    assert sum(x.nbytes for x in jax.tree.leaves(held)) / params["w"].size == pytest.approx(expected, abs=0.005)


def test_the_wrapped_transformation_sees_float32():
    """Optax would keep moments in bfloat16, where the second one freezes."""
    p = jnp.ones(4, jnp.bfloat16)
    for wrap in ROUNDED.values():
        state = wrap(optax.adam(1e-3)).init(p)
        assert all(x.dtype == "float32" for x in jax.tree.leaves(state.inner) if x.ndim)


SEEN: list[Any] = []


@value
class Recorder(adamjax.Transformation):
    """A transformation of a user's, which looks at the dtypes of what it is given."""

    def _update(self, updates, state, params, extra):
        SEEN.append((updates.dtype, params.dtype))
        return updates, state


@pytest.mark.parametrize("method", ["step", "update"])
@pytest.mark.parametrize(
    "inside",
    [
        lambda x: x,
        lambda x: optax.chain(optax.GradientTransformation(*x)),
        lambda x: adamjax.chain(adamjax.chain(optax.GradientTransformation(*x)), adamjax.adam(1e-3)),
    ],
)
def test_transformations_of_others_see_float32_gradients(inside, method):
    p = jnp.ones(4, jnp.bfloat16)
    opt = adamjax.kahan(inside(Recorder()))
    SEEN.clear()
    getattr(opt, method)(p, opt.init(p), p)
    assert SEEN == [("float32", "float32")]


def test_the_seed_is_in_the_state():
    p = jnp.ones(1000, jnp.bfloat16)
    inner = adamjax.scale_by_learning_rate(1e-3)

    def run(seed):
        return after(adamjax.stochastic_rounding(inner, seed), p, jnp.ones((3, 1000)))[0]

    assert_equal(run(0), run(0))
    assert np.mean(in_double(run(0)) != in_double(run(1))) > 0.1
    opt = adamjax.stochastic_rounding(inner, 5)
    assert isinstance(opt.init(p), RoundingState)
    other = adamjax.stochastic_rounding(inner, 6)
    assert_equal(opt.step(p, opt.init(p), p), other.step(p, opt.init(p), p))
    several = jax.vmap(lambda seed: adamjax.stochastic_rounding(inner, seed).init(p).seed)(jnp.arange(3))
    assert several.tolist() == [0, 1, 2]


def test_in_a_chain():
    p = jnp.ones(5, jnp.bfloat16)
    inner = adamjax.adamw(1e-5)
    opt = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.kahan(inner))
    updates, _ = opt.update(p, opt.init(p), p)
    assert updates.dtype == "float32"
    with pytest.raises(ValueError, match=r"^Kahan\(.*\) must be the last of a chain"):
        adamjax.chain(adamjax.kahan(inner), adamjax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match=r"^stochastic_rounding around .*Kahan.*take one of the two"):
        adamjax.stochastic_rounding(opt)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adamjax.kahan(3), TypeError, r"^argument opt of kahan is 3, expected a transformation with init"),
        (lambda: adamjax.kahan(adamjax.adam), TypeError, r"call it, adam\(\.\.\.\)"),
        (lambda: adamjax.stochastic_rounding(adamjax.adam(), seed=-1), ValueError, r"^Invalid seed value: -1"),
        (lambda: adamjax.stochastic_rounding(adamjax.adam(), seed=2**31), ValueError, r"seed must be below 2\*\*31"),
        (lambda: adamjax.stochastic_rounding(adamjax.adam(), seed=0.5), TypeError, r"^Invalid seed value: 0\.5"),
        *(
            (
                lambda x=x: adamjax.master_weights(adamjax.adam(), low_bits=x),
                ValueError,
                rf"^Invalid low_bits value: {x}; low_bits must be one of False, True, 8, 16$",
            )
            for x in (1, 0, 4, 8.0, 24)
        ),
        (
            lambda: adamjax.master_weights(adamjax.adam(), low_bits=True).init({"a": jnp.ones(2, jnp.float16)}),
            ValueError,
            r"^params\['a'\] is float16: low_bits completes bfloat16 parameters only.*use low_bits=False$",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@wrappers
def test_params_and_state_are_checked(name):
    opt, p = ROUNDED[name](adamjax.adam()), jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(grads, state, params\)"):
        opt.update(p, opt.init(p))
    with pytest.raises(TypeError, match=r"for its state, expected RoundingState"):
        opt.update(p, adamjax.adam().init(p), p)


@pytest.mark.parametrize("make", [adamjax.kahan, adamjax.master_weights])
def test_parameters_that_something_else_made_wider(make):
    """As p + u does, where JAX promotes."""
    opt = make(adamjax.adam())
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
    state = opt.init(params)
    wider = params | {"b": params["b"].astype(jnp.float32)}
    with pytest.raises(ValueError, match=r"params\['b'\] is float32, and was half precision at init"):
        opt.update(wider, state, wider)


@pytest.mark.parametrize("method", ["step", "update"])
@wrappers
def test_an_infinite_parameter_stays_one(name, method):
    opt = ROUNDED[name](adamjax.adam(0.1))
    p = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1.0], jnp.bfloat16)
    found, _ = getattr(opt, method)(jnp.ones_like(p), opt.init(p), p)
    new = found if method == "step" else adamjax.apply_updates(p, found)
    np.testing.assert_array_equal(np.float32(new[:3]), np.float32(p[:3]))
    assert new[3] < 1
