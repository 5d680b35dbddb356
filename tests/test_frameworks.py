"""The frameworks people train with take our optimizers as they take optax's."""

import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_close, assert_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import OPTAX, RECOMPILED

import adamjax
from adamjax.interop import optax as optax_interop
from adamjax.interop import torch as torch_forms

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
Y = jnp.sin(X.sum(axis=1, keepdims=True))
STEPS = 20

INT8 = adamjax.quantized("int8", block_size=16, min_size=1)
OURS = [
    adamjax.adamw(1e-2),
    adamjax.adam(adamjax.schedules.warmup_cosine(1e-2, 5, 40), amsgrad=True),
    adamjax.adamw(jnp.float32(1e-2), mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    adamjax.chain(optax.clip_by_global_norm(1.0), adamjax.radam(1e-2)),
    adamjax.amsgrad(1e-2, mu_dtype=INT8, nu_dtype=INT8),
    adamjax.skip_nonfinite(adamjax.adamw(1e-2, mu_dtype=INT8)),
    adamjax.packed(adamjax.adamw(1e-2), below=32),
    torch_forms.adam(lr=1e-2, amsgrad=True),
    torch_forms.nadam(lr=1e-2),
    adamjax.skip_nonfinite(torch_forms.nadam(lr=1e-2)),
]

pytestmark = pytest.mark.usefixtures("lenient")


def train_linen(tx):
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])
    state = TrainState.create(apply_fn=model.apply, params=jax.jit(model.init)(jax.random.key(0), X)["params"], tx=tx)

    traces = []

    @jax.jit
    def step(state):
        traces.append(state)

        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(value)
    assert len(traces) == 1
    return jnp.stack(losses)


def train_nnx(tx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    model = Model(nnx.Rngs(0))
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(tx)):
        # nnx takes no static attribute with arrays in it; in a plain pair they are out of its sight.
        tx = optax.GradientTransformation(*tx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return value

    return jnp.stack([step(model, optimizer) for _ in range(STEPS)])


def train_equinox(tx):
    model = eqx.nn.MLP(4, 1, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, tx):
        value, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(STEPS):
        model, state, value = step(model, state, tx)
        losses.append(value)
    return jnp.stack(losses)


# Flax's nnx looks into states and optimizers most closely, and takes all; of the others, each kind of state suffices.
@pytest.mark.parametrize(
    ("train", "tx"),
    [pytest.param(train_nnx, tx, marks=pytest.mark.slow) for tx in OURS]
    + [(train, tx) for train in (train_linen, train_equinox) for tx in (OURS[0], OURS[2], OURS[5], OURS[7])],
)
def test_training(train, tx):
    losses = train(tx)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    if tx is OURS[0]:
        assert_close(losses, train(optax.adamw(1e-2)), STEPS * OPTAX["float32"])


def params_sharding_of(train_state):
    """MaxText's `maybe_update_params_sharding_with_opt`, by which its ZeRO-1 finds the shardings of the moments."""
    state = train_state.opt_state
    if isinstance(state, optax.ScaleByAdamState):
        return state.mu
    if isinstance(state, tuple) and isinstance(state[0], optax.ScaleByAdamState):
        return state[0].mu
    raise NotImplementedError(f"Could not find optimizer state shardings from {type(state)}")


def test_maxtext_finds_the_moments():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"params": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(8)}}

    def shardings(tx):
        def init():
            return TrainState.create(apply_fn=None, params=params, tx=tx)

        def of_array(x):
            return NamedSharding(mesh, PartitionSpec("data") if x.shape else PartitionSpec())

        return jax.tree.map(of_array, jax.eval_shape(init))

    ours = adamjax.adamw(adamjax.schedules.cosine(1e-2, 100), fused="auto")
    with pytest.raises(NotImplementedError):
        params_sharding_of(shardings(ours))
    wrapped = optax_interop.wrap(ours, optax_state=True)
    found = params_sharding_of(shardings(wrapped))
    assert jax.tree.leaves(found) == [NamedSharding(mesh, PartitionSpec("data"))] * 2
    assert jax.tree.structure(found) == jax.tree.structure(params)
    losses = train_linen(wrapped)
    assert_close(losses, train_linen(ours), STEPS * OPTAX["float32"])


def test_equal_optimizers_share_a_compiled_train_state():
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return state.apply_gradients(grads=state.params)

    for _ in range(2):
        step(TrainState.create(apply_fn=None, params={"w": X}, tx=adamjax.adamw(1e-2, mask={"w": True})))
    assert len(traces) == 1


def test_an_equinox_model_unfiltered_is_refused_by_name():
    model = eqx.nn.MLP(4, 1, 16, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"params\.activation is a function .*equinox\.filter"):
        adamjax.adam().init(model)


@pytest.mark.slow
def test_equinox_ensemble():
    """A vmapped population of models, each with its own learning rate."""
    keys, rates = jax.random.split(jax.random.key(0)), jnp.array([1e-3, 1e-2])
    models = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 1, 8, 1, key=key))(keys)
    population = jax.vmap(adamjax.adamw)(rates)

    def one_step(model, tx):
        params = eqx.filter(model, eqx.is_inexact_array)
        grads = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        return eqx.apply_updates(model, tx.update(grads, tx.init(params), params)[0])

    stepped = eqx.filter_jit(eqx.filter_vmap(one_step))(models, population)
    for i, rate in enumerate(rates):
        model = jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, models)
        alone = eqx.filter_jit(one_step)(model, adamjax.adamw(rate))
        found = eqx.filter(jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, stepped), eqx.is_array)
        assert_close(found, eqx.filter(alone, eqx.is_array), 10 * RECOMPILED)


def small_steps(tx, params, steps=6):
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    step = jax.jit(
        lambda params, state: (lambda u, s: (optax.apply_updates(params, u), s))(*tx.update(grads, state, params))
    )
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize(
    "around",
    [
        lambda opt: optax.MultiSteps(adamjax.kahan(opt), 2),
        lambda opt: adamjax.kahan(optax.MultiSteps(opt, 2).gradient_transformation()),
        lambda opt: adamjax.kahan(optax.apply_if_finite(opt, 3)),
        lambda opt: optax.chain(optax.clip_by_global_norm(100.0), adamjax.master_weights(opt)),
        lambda opt: optax.partition({0: adamjax.kahan(opt), 1: optax.sgd(0.1)}, {"w": 0, "b": 1}),
    ],
)
def test_rounding_around_optax_and_optax_around_rounding(around):
    """Steps too small for bfloat16 add up through optax's wrappers."""
    opt = adamjax.adam(1.3e-3, mu_dtype=INT8, nu_dtype=INT8)
    params = {"w": jnp.ones((8, 16), jnp.bfloat16), "b": jnp.ones(3)}
    stepped, _ = small_steps(around(opt), params)
    assert stepped["w"].dtype == "bfloat16"
    assert np.all(stepped["w"].astype(jnp.float32) < 1)
    plain, _ = small_steps(opt, params)
    assert np.all(plain["w"].astype(jnp.float32) == 1)


def test_a_state_in_codes_is_pickled_and_checkpointed(tmp_path):
    opt = adamjax.kahan(adamjax.amsgrad(1e-2, mu_dtype=INT8, nu_dtype=adamjax.quantized("int4", min_size=1)))
    _, state = small_steps(opt, {"w": jnp.ones((8, 16), jnp.bfloat16)})
    assert_equal(pickle.loads(pickle.dumps(state)), state)
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with orbax.StandardCheckpointer() as checkpointer:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        assert_equal(checkpointer.restore(tmp_path / "state", shapes), state)
