"""The frameworks people train with take our optimizers as they take optax's."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_close
from tolerances import OPTAX, RECOMPILED

import adamjax

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
Y = jnp.sin(X.sum(axis=1, keepdims=True))
STEPS = 20

OURS = [
    adamjax.adamw(1e-2),
    adamjax.adam(adamjax.schedules.warmup_cosine(1e-2, 5, 40), amsgrad=True),
    adamjax.adamw(jnp.float32(1e-2), mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    adamjax.chain(optax.clip_by_global_norm(1.0), adamjax.radam(1e-2)),
]

pytestmark = pytest.mark.usefixtures("lenient")


def train_linen(tx):
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=tx)

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


@pytest.mark.parametrize("train", [train_linen, train_nnx, train_equinox])
@pytest.mark.parametrize("tx", OURS, ids=["adamw", "schedule", "array", "chain"])
def test_training(train, tx):
    losses = train(tx)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    if tx is OURS[0]:
        assert_close(losses, train(optax.adamw(1e-2)), STEPS * OPTAX["float32"])


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


def test_equinox_ensemble():
    """A vmapped population of models, each with its own learning rate."""
    keys, rates = jax.random.split(jax.random.key(0)), jnp.array([1e-3, 1e-2])
    models = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 1, 8, 1, key=key))(keys)
    population = jax.vmap(adamjax.adamw)(rates)

    @eqx.filter_vmap
    def one_step(model, tx):
        params = eqx.filter(model, eqx.is_inexact_array)
        grads = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        return eqx.apply_updates(model, tx.update(grads, tx.init(params), params)[0])

    stepped = one_step(models, population)
    for i, rate in enumerate(rates):
        model = jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, models)
        grads = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        tx = adamjax.adamw(rate)
        alone = eqx.apply_updates(model, tx.update(grads, tx.init(params), params)[0])
        found = eqx.filter(jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, stepped), eqx.is_array)
        assert_close(found, eqx.filter(alone, eqx.is_array), 10 * RECOMPILED)
