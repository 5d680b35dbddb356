"""Different optimizers for different parameters."""

import pickle

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import assert_close, assert_equal, assert_same_types
from tolerances import RECOMPILED

import adamjax

PARAMS = {
    "embedding": jnp.ones((5, 2)),
    "layers": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, {"kernel": jnp.ones((2, 3)), "bias": None}],
}
GRADS = jax.tree.map(lambda p: 0.3 * p, PARAMS)
DEFAULT = adamjax.adamw(1e-2, weight_decay=0.1)


def stepped(opt, steps=3, params=PARAMS):
    state, step = opt.init(params), jax.jit(opt.step)
    first = state
    for _ in range(steps):
        params, state = step(GRADS, state, params)
    assert step._cache_size() == 1
    assert_same_types(state, first)
    return params


def test_each_parameter_goes_its_groups_way():
    found = stepped(
        adamjax.groups(
            {
                "bias": {"weight_decay": 0.0},
                "^embedding$": {"learning_rate": 0.1, "b1": 0.5},
                r"layers/1": optax.sgd(0.1),
            },
            default=DEFAULT,
        )
    )
    plain = stepped(DEFAULT)
    assert_close(found["layers"][0]["kernel"], plain["layers"][0]["kernel"], RECOMPILED)
    no_decay, fast = stepped(adamjax.adamw(1e-2, weight_decay=0.0)), stepped(adamjax.adamw(0.1, 0.5, weight_decay=0.1))
    assert_close(found["layers"][0]["bias"], no_decay["layers"][0]["bias"], RECOMPILED)
    assert_close(found["embedding"], fast["embedding"], RECOMPILED)
    assert_close(found["layers"][1], stepped(adamjax.chain(optax.sgd(0.1)))["layers"][1], RECOMPILED)


def test_the_state_has_nothing_in_place_of_the_others():
    opt = adamjax.groups({"bias": {"weight_decay": 0.0}}, default=DEFAULT)
    bias, rest = opt.init(PARAMS)
    assert [x.shape for x in jax.tree.leaves(bias[0].mu)] == [(2,)]
    assert len(jax.tree.leaves(rest[0].mu)) == 3
    assert adamjax.storage.state_bytes(opt, PARAMS) == adamjax.storage.state_bytes(DEFAULT, PARAMS) + 4


def test_it_is_a_value():
    def make():
        return adamjax.groups({"bias": {"weight_decay": 0.0}}, default=DEFAULT)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert pickle.loads(pickle.dumps(make())) == make()
    assert make() != adamjax.groups({"bias": {"weight_decay": 0.1}}, default=DEFAULT)
    population = jax.vmap(lambda lr: adamjax.groups({"bias": {"learning_rate": lr}}, default=DEFAULT))(jnp.ones(2))
    assert population.members[0].transforms[2].learning_rate.shape == (2,)


def test_describe():
    opt = adamjax.groups({"bias": {"weight_decay": 0.0}}, default=DEFAULT)
    header, *rows = opt.describe(PARAMS).splitlines()
    assert header.split() == ["parameter", "shape", "group", "optimizer"]
    assert [row.split()[:3] for row in rows] == [
        ["embedding", "[5,2]", "default"],
        ["layers/0/bias", "[2]", "bias"],
        ["layers/0/kernel", "[2,2]", "default"],
        ["layers/1/kernel", "[2,3]", "default"],
    ]
    assert "AddDecayedWeights(weight_decay=0.0)" in rows[1]
    assert "AddDecayedWeights(weight_decay=0.1)" in rows[0]


def test_none_gradients_and_rounding_around():
    opt = adamjax.kahan(adamjax.groups({"bias": adamjax.adam(1e-5)}, default=DEFAULT))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(jnp.ones_like, params) | {"embedding": None}
    updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
    assert updates["layers"][0]["bias"].dtype == "float32"
    assert_equal(updates["embedding"], jnp.zeros((5, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: adamjax.groups({"bias": adamjax.adam()}).init(PARAMS),
            r"^embedding is matched by none of 'bias': give",
        ),
        (
            lambda: adamjax.groups({"bias": {}, "layers/0": {}}, default=DEFAULT).init(PARAMS),
            r"^layers/0/bias is matched by 'bias' and 'layers/0'",
        ),
        (
            lambda: adamjax.groups({"norm": {}}, default=DEFAULT).init(PARAMS),
            r"^'norm' matches no parameter; those are embedding, layers/0/bias",
        ),
        (
            lambda: adamjax.groups({"bias": {"lr": 1.0}}, default=DEFAULT),
            r"overrides lr, which .* it has amsgrad, b1, .*learning_rate",
        ),
        (lambda: adamjax.groups({"bias": {"b1": 1.5}}, default=DEFAULT), r"^Invalid beta parameter at index 0: 1\.5"),
        (lambda: adamjax.groups({"bias": {"b1": 0.5}}), r"^the group 'bias' overrides b1 of no default"),
        (lambda: adamjax.groups({"(": DEFAULT}), r"^'\(' is not a regular expression"),
        (lambda: adamjax.groups({}), r"^groups needs at least one group"),
        (lambda: adamjax.groups({"a": adamjax.kahan(DEFAULT)}), r"^the group 'a' rounds parameters .* around groups"),
    ],
)
def test_bad_groups(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_member_that_is_no_transformation():
    with pytest.raises(TypeError, match=r"^the group 'bias' is 3, expected a transformation"):
        adamjax.groups({"bias": 3})
