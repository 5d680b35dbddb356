"""The learning rate that `learning_rate_of` tells is how far the next step goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close
from jax.sharding import NamedSharding, PartitionSpec
from tolerances import RECOMPILED

import adamjax
from adamjax import interop, learning_rate_of, schedules, sharding

LAYER = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
PARAMS = {"a": LAYER, "b": LAYER}
# The same gradients at each step: Adam then moves each number by the learning rate.
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
FALLING = schedules.linear(0.1, 0.0, 10)
OPTAX = optax.linear_schedule(0.1, 0.0, 10)

HALF = adamjax.scale_by_learning_rate(0.5, flip_sign=False)

SCALARS = {
    "number": adamjax.adam(0.1),
    "schedule": adamjax.adamw(FALLING, weight_decay=0.0),
    "schedule of optax": adamjax.adam(OPTAX),
    "fused": adamjax.adam(FALLING, fused="auto"),
    "chain": adamjax.chain(optax.clip(5.0), adamjax.adam(FALLING), HALF),
    "kahan": adamjax.kahan(adamjax.packed(adamjax.adam(FALLING))),
    "skip": adamjax.skip_nonfinite(adamjax.skip_spikes(adamjax.master_weights(adamjax.adam(FALLING)))),
    "average": adamjax.dynamic_loss_scale(adamjax.average_params(adamjax.adam(FALLING)), initial=1.0),
    "torch": interop.torch.adamw(FALLING, weight_decay=0.0),
    "transferred": adamjax.transfer(adamjax.kahan(adamjax.adam(FALLING)), PARAMS, PARAMS),
    "offload": sharding.offload(adamjax.kahan(adamjax.adam(FALLING))),
    "no decay": adamjax.groups({"bias": {"weight_decay": 0}}, default=adamjax.adamw(FALLING, weight_decay=0.0)),
}


def told_by():
    """`learning_rate_of` under jit, and a list as long as the number of its traces."""
    traces = []

    @jax.jit
    def told(opt, state):
        traces.append(opt)
        return learning_rate_of(opt, state)

    return told, traces


def distances(before, after):
    return jax.tree.map(lambda old, new: jnp.max(old - new), before, after)


def steps(opt):
    """The learning rate before each of three steps, and how far they go."""
    params, state = PARAMS, opt.init(PARAMS)
    step, (told, traces) = jax.jit(opt.step), told_by()
    for _ in range(3):
        new, after = step(GRADS, state, params)
        yield told(opt, state), distances(params, new)
        params, state = new, after
    assert len(traces) == 1


@pytest.mark.parametrize("name", SCALARS)
def test_one_learning_rate(name):
    for rate, moved in steps(SCALARS[name]):
        assert rate.shape == ()
        assert rate.dtype == "float32"
        for x in jax.tree.leaves(moved):
            assert_close(x, rate, 10 * RECOMPILED)


def test_learning_rates_of_groups():
    """Those of groups that change it: a parameter of two of them has the product of their factors."""
    half = {"learning_rate": adamjax.scale(0.5)}
    groups = {"^a/": half, "kernel": {"learning_rate": adamjax.scale(0.1)}, "bias": {"weight_decay": 0.0}}
    for rates, moved in steps(adamjax.groups(groups, default=adamjax.adamw(FALLING, weight_decay=0.0))):
        assert list(rates) == ["^a/", "default", "kernel"]  # as jit sorts them
        assert_close(moved["a"]["bias"], rates["^a/"], 10 * RECOMPILED)
        assert_close(moved["b"], {"kernel": rates["kernel"], "bias": rates["default"]}, 10 * RECOMPILED)
        assert_close(moved["a"]["kernel"], rates["^a/"] * rates["kernel"] / rates["default"], 10 * RECOMPILED)

    inside = adamjax.groups({"bias": adamjax.adam(0.2)}, default=adamjax.adam(FALLING))
    opt = adamjax.chain(
        HALF,
        adamjax.groups({"^a/": inside, "^b/bias": optax.sgd(0.1)}, default=adamjax.adam(0.3)),
        adamjax.groups({"kernel": adamjax.scale_by_learning_rate(0.1, flip_sign=False)}, default=adamjax.chain()),
    )
    found = learning_rate_of(opt, opt.init(PARAMS))
    told = {"^a/ + bias": 0.2, "^a/ + default": 0.1, "default": 0.3}
    expected = {f"{name} + default": x for name, x in told.items()}
    expected |= {f"{name} + kernel": 0.1 * x for name, x in told.items()} | {
        "^b/bias + kernel": 0.1,
        "^b/bias + default": 1.0,
    }
    assert_close(found, {name: np.float32(0.5 * x) for name, x in expected.items()}, RECOMPILED)


def test_learning_rates_of_methods():
    """Those that have a rule of their own for the rate, or two of them."""
    opt = adamjax.chain(adamjax.adam(FALLING), schedules.reduce_on_plateau(0.5, patience=2))
    params, state = PARAMS, opt.init(PARAMS)
    for t, scale in enumerate((1.0, 1.0, 1.0, 0.5)):
        assert_close(learning_rate_of(opt, state), scale * FALLING(t), RECOMPILED)
        params, state = opt.step(GRADS, state, params, value=jnp.float32(1.0))

    opt = adamjax.schedule_free_adamw(FALLING, warmup_steps=4)
    params, state = PARAMS, opt.init(PARAMS)
    for t in range(2):
        rate, before = learning_rate_of(opt, state), state
        params, state = opt.step(GRADS, state, params)
        assert_close(rate, FALLING(t) * (t + 1) / 4, RECOMPILED)
        for moved in jax.tree.leaves(distances(before[0].z, state[0].z)):
            assert_close(moved, rate, 10 * RECOMPILED)

    for opt, expected in (
        (adamjax.hyperball(adamjax.adam(FALLING)), np.float32(0.1)),
        (adamjax.hyperball(adamjax.adam(0.2), learning_rate=FALLING), {"hyperball": 0.1, "default": 0.2}),
        (adamjax.hyperball(adamjax.scale_by_adam(), learning_rate=FALLING), np.float32(0.1)),
        (interop.optax.muon(FALLING, adam_learning_rate=0.2), {"muon": 0.1, "adam": 0.2}),
    ):
        found = learning_rate_of(opt, opt.init(PARAMS))
        assert_close(found, jax.tree.map(np.float32, expected), RECOMPILED)


def test_learning_rates_on_a_mesh_and_in_nnx():
    mesh = jax.make_mesh((8,), ("data",))
    params = jax.device_put({"kernel": jnp.ones((8, 8))}, NamedSharding(mesh, PartitionSpec()))
    for wrap in (sharding.zero1, sharding.zero1_mapped):
        opt = wrap(adamjax.kahan(adamjax.adamw(FALLING)), axis="data")
        assert_close(learning_rate_of(opt, opt.init(params)), np.float32(0.1), RECOMPILED)

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plateau = adamjax.chain(adamjax.adam(FALLING), schedules.reduce_on_plateau())
    for tx in (plateau, adamjax.kahan(adamjax.schedule_free_adamw(FALLING))):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for told in (learning_rate_of, nnx.jit(learning_rate_of, static_argnums=0)):
            assert_close(told(optimizer.tx, optimizer.opt_state), np.float32(0.1), RECOMPILED)


def test_hyperparameters_are_leaves_of_what_is_told():
    """A population has a rate for each member, and a changed number another rate without compiling again."""
    opt = adamjax.adamw(FALLING)
    told, traces = told_by()
    for peak in (0.1, 0.5):
        changed = adamjax.adamw(schedules.linear(peak, 0.0, 10))
        assert_close(told(changed, opt.init(PARAMS)), np.float32(peak), RECOMPILED)
    assert len(traces) == 1
    rates = jnp.array([0.1, 0.2])
    assert_close(
        jax.vmap(lambda rate: learning_rate_of(adamjax.adam(rate), adamjax.adam().init(PARAMS)))(rates), rates, 0
    )


HIDDEN = adamjax.chain(optax.adam(0.1), schedules.reduce_on_plateau())  # only a factor of it is seen


@pytest.mark.parametrize(
    ("opt", "state", "message"),
    [
        (
            optax.adam(0.1),
            (),
            r"^Foreign\(chain\) has no learning rate that can be seen: a transformation from elsewhere",
        ),
        (
            adamjax.scale_by_adam(),
            (),
            r"^ScaleByAdam\(.*\) has no learning rate that can be seen: give a whole optimizer",
        ),
        (
            HIDDEN,
            HIDDEN.init(PARAMS),
            r"^Chain\(\(Foreign\(chain\), ReduceOnPlateau\(.* has no learning rate that can be",
        ),
        (adamjax.kahan(adamjax.adam()), (), r"^Kahan was given a tuple for its state, expected one that has the state"),
        (adamjax.groups({"a": adamjax.adam()}), (), r"^groups of 1 transformations was given 0 states"),
        (
            adamjax.adam(FALLING),
            optax.adam(OPTAX).init(PARAMS),
            r"^ScaleByLearningRate was given a ScaleByScheduleState",
        ),
        (3, (), r"^argument opt of learning_rate_of is 3, expected a transformation"),
    ],
)
def test_no_learning_rate(opt, state, message):
    with pytest.raises((TypeError, ValueError), match=message):
        learning_rate_of(opt, state)
