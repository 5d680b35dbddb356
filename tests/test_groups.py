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


def test_layerwise_rates_times_no_decay():
    """Each parameter steps as by one optimizer with the product of its rates, and the decay that was set."""
    schedule = adamjax.schedules.cosine(1e-2, 100)
    patterns = {
        "layers/0": {"learning_rate": adamjax.scale(0.1)},
        "layers": {"learning_rate": adamjax.scale(0.5), "b1": 0.8},
        "bias": {"weight_decay": 0.0},
        "bias|embedding": {"weight_decay": 0},  # the same value twice is no contradiction
        "embedding": {"learning_rate": 0.2},
        "^emb": {"learning_rate": adamjax.scale(0.5)},
    }
    expected = {
        ("embedding",): (0.2 * 0.5, 0.9, 0.0),
        ("layers", 0, "kernel"): (0.05, 0.8, 0.1),
        ("layers", 0, "bias"): (0.05, 0.8, 0.0),
        ("layers", 1, "kernel"): (0.5, 0.8, 0.1),
    }
    for rate in (1e-2, schedule):
        found = stepped(adamjax.groups(patterns, default=adamjax.adamw(rate, weight_decay=0.1)))
        for path, (factor, b1, decay) in expected.items():
            absolute = path == ("embedding",)
            scaled = factor if absolute else adamjax.schedules.scaled(factor, rate)
            alone, together = stepped(adamjax.adamw(scaled, b1, weight_decay=decay)), found
            for key in path:
                alone, together = alone[key], together[key]
            assert_close(together, alone, RECOMPILED)


def overlapping(default=DEFAULT, factor=0.1, decay=0.0):
    return adamjax.groups(
        {"layers/0": {"learning_rate": adamjax.scale(factor)}, "bias": {"weight_decay": decay}}, default=default
    )


def test_combinations_come_after_the_default():
    opt = overlapping()
    zero, bias, rest, both = opt.init(PARAMS)
    assert [len(jax.tree.leaves(part[0].mu)) for part in (zero, bias, rest, both)] == [1, 0, 2, 1]
    assert both[0].mu["layers"][0]["bias"].shape == (2,)
    assert [row.split()[2:5] for row in opt.describe(PARAMS).splitlines()[2:3]] == [["layers/0", "+", "bias"]]
    assert repr(opt.members_for(PARAMS)[3].transforms[2]) == (
        "ScaleByLearningRate(learning_rate=Scaled(factor=0.1, schedule=0.01))"
    )
    # Where nothing overlaps, the state is what it was.
    alone = {"embedding": PARAMS["embedding"], "layers": [PARAMS["layers"][0]["kernel"]], "bias": jnp.ones(1)}
    assert len(opt.init(alone)) == 3


def test_the_numbers_of_combinations_are_leaves():
    """A population of factors and decays, and derivatives with respect to them."""

    def after(factor, decay):
        opt = overlapping(factor=factor, decay=decay)
        return opt.step(GRADS, opt.init(PARAMS), PARAMS)[0]["layers"][0]["bias"]

    factors, decays = jnp.array([0.1, 0.5]), jnp.array([0.0, 10.0])
    population = jax.vmap(lambda factor, decay: overlapping(factor=factor, decay=decay))(factors, decays)
    found = jax.jit(jax.vmap(lambda opt: opt.step(GRADS, opt.init(PARAMS), PARAMS)[0]))(population)
    for i in range(2):
        assert_close(found["layers"][0]["bias"][i], after(float(factors[i]), float(decays[i])), RECOMPILED)
    slope = jax.jit(jax.grad(lambda factor: after(factor, 0.0).sum()))(0.1)
    assert_close(slope, -2 * 1e-2, RECOMPILED)


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


def test_a_gradient_of_none_freezes_a_subtree_of_several_groups():
    opt = overlapping()
    grads = GRADS | {"layers": [None, GRADS["layers"][1]]}
    found, state = jax.jit(opt.step)(grads, opt.init(PARAMS), PARAMS)
    expected, _ = jax.jit(opt.step)(GRADS, opt.init(PARAMS), PARAMS)
    assert_equal(found["layers"][0], PARAMS["layers"][0])
    assert_equal([found["embedding"], found["layers"][1]], [expected["embedding"], expected["layers"][1]])
    assert_same_types(state, opt.init(PARAMS))


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
            lambda: adamjax.groups({"bias": {}, "layers/0": adamjax.adam()}, default=DEFAULT).init(PARAMS),
            r"^layers/0/bias is matched by 'layers/0' and 'bias': a parameter whose group is an optimizer",
        ),
        (
            lambda: adamjax.groups({"bias": optax.sgd(0.1), "0": adamjax.adam()}, default=DEFAULT).init(PARAMS),
            r"^layers/0/bias is matched by 'bias' and '0': a parameter whose group is an optimizer",
        ),
        (
            lambda: adamjax.groups(
                {"bias": {"weight_decay": 0.0}, "0": {"b1": 0.5}, "layers": {"weight_decay": 0.1}}, default=DEFAULT
            ).init(PARAMS),
            r"^layers/0/bias is matched by 'bias' and 'layers', which do not set weight_decay to one number",
        ),
        (
            lambda: adamjax.groups({"bias": {"b1": adamjax.scale(0.5)}}, default=DEFAULT),
            r"^the group 'bias' scales b1, and only learning_rate and weight_decay can be scaled",
        ),
        (lambda: adamjax.scale(-1.0), r"^Invalid factor value: -1\.0"),
        (
            lambda: adamjax.groups({"head": {}}, default=DEFAULT).init({f"layer_{i}": PARAMS for i in range(99)}),
            r"^'head' matches no parameter; those are (layer\S+, ){6}layer\S+ and 389 more$",
        ),
        (
            lambda: adamjax.groups({"norm": {}}, default=DEFAULT).init(PARAMS),
            r"^'norm' matches no parameter; those are embedding, layers/0/bias",
        ),
        (
            lambda: adamjax.groups({"bias": {"lr": 1.0}}, default=DEFAULT),
            r"overrides lr, which .* it has amsgrad, .*b1, .*learning_rate",
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
