"""An optimizer is a value."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal
from specs import KINDS, SPECS
from tolerances import RECOMPILED

import adamjax
from adamjax import schedules

pytestmark = pytest.mark.numbers

PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, 0.0])}
GRADS = {"w": jnp.array([[0.1, -0.2], [0.3, 1e-3]]), "b": jnp.array([2.0, 0.0])}


@pytest.mark.parametrize("name", SPECS)
def test_equality_and_hash(name):
    opt, twin = SPECS[name].make(), SPECS[name].make()
    assert opt == twin
    assert hash(opt) == hash(twin)
    others = [SPECS[other].make() for other in SPECS if other != name]
    assert sum(opt == other for other in others) == (name in ("adam nesterov", "nadam"))  # two names of one


@pytest.mark.parametrize("name", [n for n in SPECS if n != "adam coupled schedule"])
def test_pickle_and_deepcopy(name):
    opt = SPECS[name].make()
    for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), copy.copy(opt)):
        assert twin == opt
        assert hash(twin) == hash(opt)
        if name in KINDS:
            assert_equal(*(jax.jit(x.step)(GRADS, x.init(PARAMS), PARAMS) for x in (twin, opt)))


def test_masks_are_part_of_the_value():
    masked = adamjax.adamw(0.1, mask={"w": True, "b": False})
    assert masked == adamjax.adamw(0.1, mask={"b": np.bool_(False), "w": True})
    assert masked != adamjax.adamw(0.1, mask={"w": True, "b": True})
    assert pickle.loads(pickle.dumps(masked)) == masked == copy.deepcopy(masked)
    assert hash(masked) == hash(copy.deepcopy(masked))


def test_arrays_compare_by_identity():
    rate = jnp.array([0.1])
    assert adamjax.adam(rate) == adamjax.adam(rate)
    assert hash(adamjax.adam(rate)) == hash(adamjax.adam(rate))
    assert adamjax.adam(rate) != adamjax.adam(jnp.array([0.1]))
    assert adamjax.adam(0.1) != 0.1


def test_int_and_float_hyperparameters_are_equal_leaves():
    for one in (1, np.float32(1), np.int64(1), np.array(1.0)):
        assert adamjax.adam(one, weight_decay=one) == adamjax.adam(1.0, weight_decay=1.0)
        assert all(type(leaf) is float for leaf in jax.tree.leaves(adamjax.adam(one)))


def test_repr():
    assert repr(adamjax.adamw(3e-4, weight_decay=0.1, mu_dtype=jnp.bfloat16, mask={"b": False})) == (
        "Chain((ScaleByAdam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, mu_dtype=bfloat16), "
        "AddDecayedWeights(weight_decay=0.1, mask={'b': False}), ScaleByLearningRate(learning_rate=0.0003)))"
    )
    assert repr(adamjax.scale_by_learning_rate(schedules.constant(0.1), flip_sign=False)) == (
        "ScaleByLearningRate(learning_rate=Constant(value=0.1), flip_sign=False)"
    )
    population = jax.vmap(adamjax.adam)(jnp.array([0.1, 0.2]))
    assert "learning_rate=float32[2]" in repr(population)
    assert repr(adamjax.scale_by_learning_rate(jnp.float32(0.1))) == "ScaleByLearningRate(learning_rate=float32(0.1))"
    assert repr(adamjax.chain()) == "Chain(())"
    assert repr(adamjax.chain(adamjax.scale_by_learning_rate(0.1))).endswith(",))")


def test_leaves_are_the_hyperparameters():
    leaves = jax.tree.leaves(adamjax.adamw(1e-3, b1=0.8, weight_decay=0.1))
    low_parts = [b - float(np.float32(b)) for b in (0.8, 0.999)]  # of decay rates, whose distance to 1 matters
    assert leaves == [0.8, 0.999, 1e-8, 0.0, *low_parts, 0.1, 1e-3]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(adamjax.adam(1e-3))]
    assert paths[0] == ".transforms[0].b1"
    assert paths[-1] == ".transforms[1].learning_rate"
    placeholders = jax.tree.map(lambda _: object(), adamjax.adamw(schedules.one_cycle(0.1, 100)))
    assert "object" in repr(placeholders)  # unflattening does not validate


def test_unpacks_into_a_pair():
    opt = adamjax.adam(0.1)
    init, update = opt
    assert_equal(update(GRADS, init(PARAMS)), opt.update(GRADS, opt.init(PARAMS)))


def test_one_compile_for_all_numeric_hyperparameters():
    @jax.jit
    def step(opt, grads, state, params):
        return opt.step(grads, state, params)

    makers = [
        lambda x: adamjax.adamw(x, b1=x, b2=x, eps=x, eps_root=x, weight_decay=x),
        lambda x: adamjax.adam(x, b1=x, weight_decay=x),
        lambda x: adamjax.adam(schedules.warmup_cosine(x, warmup_steps=round(8 * x), total_steps=10, end=x / 2)),
        lambda x: adamjax.radam(x, threshold=4 + x),
        lambda x: adamjax.adamax(x, b2=x, eps=x),
        lambda x: adamjax.chain(adamjax.clip_by_global_norm(x), adamjax.nadam(x)),
    ]
    for compiled, make in enumerate(makers, start=1):
        for x in (0.25, 0.5, 0.75):
            opt = make(x)
            traced = step(opt, GRADS, opt.init(PARAMS), PARAMS)
            if x == 0.5:  # not the one that was there when it was compiled
                assert_close(traced, jax.jit(opt.step)(GRADS, opt.init(PARAMS), PARAMS), RECOMPILED)
        assert step._cache_size() == compiled


def test_equal_optimizers_as_static_arguments_compile_once():
    traces = []

    def step(opt, grads, state, params):
        traces.append(opt)
        return opt.step(grads, state, params)

    step = jax.jit(step, static_argnums=0)
    for _ in range(3):
        opt = adamjax.adamw(schedules.cosine(0.1, 100), mask={"w": True, "b": False})
        step(opt, GRADS, opt.init(PARAMS), PARAMS)
    assert len(traces) == 1


@pytest.mark.parametrize("name", KINDS)
def test_vmapped_members_equal_single_ones(name):
    opt = SPECS[name].make()
    factors = jnp.array([1.0, 0.5, 0.25])
    population = jax.vmap(lambda f: jax.tree.map(lambda x: f * x, opt))(factors)

    @jax.jit
    def two_steps(opt):
        params, state = opt.step(GRADS, opt.init(PARAMS), PARAMS)
        return opt.step(GRADS, state, params)

    together = jax.vmap(two_steps)(population)
    for i in range(len(factors)):
        alone = two_steps(jax.tree.map(lambda x, i=i: x[i], population))
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, RECOMPILED)


def loss_after_steps(opt, params):
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p, g: p * g.astype(p.dtype), params, GRADS)
        return opt.step(grads, state, params), None

    (params, _), _ = jax.lax.scan(step, (params, opt.init(params)), length=8)
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


# The others are differentiated below.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["amsgrad torch", "radam intractable", "adamaxw"])
def test_hypergradients_are_finite(name):
    opt = SPECS[name].make()
    slopes = jax.jit(jax.grad(loss_after_steps))(opt, PARAMS)
    assert type(slopes) is type(opt)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slopes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "opt",
    [
        adamjax.adamw(schedules.cosine(0.01, 20, end=1e-3), weight_decay=schedules.linear(0.2, 0.0, 20), nesterov=True),
        adamjax.adam(
            schedules.warmup_stable_decay(0.01, 3, 7, 3), amsgrad="corrected", weight_decay=0.1, eps_root=1e-3
        ),
        adamjax.radam(schedules.inverse_sqrt(0.01, 3), b2=0.9),
        adamjax.adamax(schedules.one_cycle(0.01, 9)),
    ],
)
def test_hypergradients_are_right(opt):
    """Against a difference quotient in double, scaling by one factor what is not a number of steps."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)

        @jax.jit
        def loss(f):
            scaled = jax.tree.map_with_path(lambda path, x: x if path[-1].name.endswith("_steps") else x * f, opt)
            return loss_after_steps(scaled, params)

        numeric = (loss(1 + 1e-6) - loss(1 - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.0), numeric, rtol=1e-6)
