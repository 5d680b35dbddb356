"""The frameworks people train with take our optimizers as they take optax's."""

import copy
import importlib.util
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax
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
from tolerances import OPTAX, RECOMPILED, SWEEP

import adamjax
from adamjax._core import flax_nodes
from adamjax._transforms.chain import Chain
from adamjax._transforms.moments import find_moments
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
    adamjax.schedule_free_adamw(1e-2, nu_dtype=INT8),
    adamjax.average_params(adamjax.adamw(1e-2)),
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


AVERAGING = [adamjax.schedule_free_adamw(1e-2, 3), adamjax.average_params(adamjax.adamw(1e-2), 0.9)]


@pytest.mark.parametrize("tx", AVERAGING)
def test_frameworks_evaluate_at_the_average(tx):
    """The same numbers from flax's TrainState and from its Optimizer of an nnx model."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
            self.drop = nnx.Dropout(0.0, rngs=rngs)  # with state that is no parameter

        def __call__(self, x):
            return self.last(self.drop(jnp.tanh(self.first(x))))

    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)  # or the steps of the model would change them

    def predict(params, x):
        return nnx.merge(graph, params, rest)(x)

    state = TrainState.create(apply_fn=predict, params=params, tx=tx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(X) - Y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    @jax.jit
    def advance(state):
        return state.apply_gradients(grads=jax.grad(lambda p: jnp.mean((state.apply_fn(p, X) - Y) ** 2))(state.params))

    for _ in range(STEPS):
        step(model, optimizer)
        state = advance(state)
    # An NNX model to evaluate: the trained one's graph and other state, with the averaged parameters.
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    averaged = nnx.merge(graph, adamjax.eval_params(optimizer.opt_state, params), rest)
    expected = adamjax.eval_params(state.opt_state, state.params)
    assert_close(averaged(X), predict(expected, X), SWEEP)
    assert not np.allclose(averaged(X), model(X), rtol=0.01)


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


@jax.custom_vjp
def identity(x):
    return x


identity.defvjp(lambda x: (x, None), lambda _, g: (g,))


class Unfiltered(eqx.Module):
    """A model with leaves of every kind that is no parameter."""

    layer: eqx.nn.Linear
    before: Callable = identity
    drop: eqx.nn.Dropout = eqx.nn.Dropout(0.3)  # holds its rate as a number
    name: Any = "unfiltered"
    steps: Any = 3
    shift: Any = 1j
    is_deep: Any = False
    unit: str = eqx.field(static=True, default="m")
    calls: Any = eqx.field(default_factory=lambda: jnp.full((), 2**24 + 1))
    mask: Any = eqx.field(default_factory=lambda: jnp.array([True]))
    key: Any = eqx.field(default_factory=lambda: jax.random.key(1))

    def __call__(self, x):
        return jnp.sum(self.layer(self.before(x)))


OF_UNFILTERED = [
    adamjax.adam(0.1),
    adamjax.adamw(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    adamjax.groups({"weight": adamjax.radam(0.1), "bias": adamjax.adamax(0.1)}),
    adamjax.dynamic_loss_scale(adamjax.packed(adamjax.adam(0.1, mu_dtype=INT8), below=4)),
    adamjax.kahan(adamjax.chain(adamjax.clip_by_global_norm(1.0), optax.adam(0.1))),
    torch_forms.nadam(0.1),
]


@pytest.mark.parametrize("opt", OF_UNFILTERED)
def test_updates_of_an_equinox_model_unfiltered(opt):
    """Leaves that have no gradient and cannot have one are no parameters, as in optax."""
    model = Unfiltered(eqx.nn.Linear(4, 2, key=jax.random.key(0)))
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = eqx.filter_grad(lambda m: m(jnp.ones(4)))(model)
    state = opt.init(params)
    expected, expected_state = opt.update(grads, state, params)
    updates, new = opt.update(grads, state, model)
    assert_equal(new, expected_state)
    added = eqx.apply_updates(params, expected)
    for after, right in (
        (eqx.apply_updates(model, updates), added),
        (adamjax.apply_updates(model, updates), added),
        (opt.step(grads, state, model)[0], opt.step(grads, state, params)[0]),
    ):
        assert_equal(eqx.filter(after, eqx.is_inexact_array), right)
        assert jax.tree.structure(after) == jax.tree.structure(model)
        for path, x in jax.tree.leaves_with_path(eqx.filter(after, eqx.is_inexact_array, inverse=True)):
            before = dict(jax.tree.leaves_with_path(model))[path]
            assert type(x) is type(before)
            assert np.all(x == before)


def test_a_dict_of_gradients_for_a_frozen_dict():
    params = flax.core.freeze({f"layer_{i}": {"kernel": jnp.ones((4, 300))} for i in range(50)})
    with pytest.raises(ValueError, match=r"^the gradients have a dict at params, expected a FrozenDict;") as caught:
        adamjax.adam().update(params.unfreeze(), adamjax.adam().init(params), params)
    assert len(str(caught.value)) < 300


def test_a_none_for_a_subtree_freezes_all_of_it():
    params = {"a": {"x": jnp.ones(3), "f": jnp.tanh, "y": jnp.ones(2)}, "b": jnp.ones(4), "c": jnp.ones(5)}
    grads = {"a": None, "b": jnp.ones(4), "c": jnp.full(5, 2.0)}
    for opt in (adamjax.skip_nonfinite(adamjax.adamw(0.1)), adamjax.kahan(adamjax.packed(adamjax.adam(0.1)))):
        state = opt.init({**params, "a": {**params["a"], "f": None}})
        each = {**grads, "a": {"x": None, "f": None, "y": None}}
        assert_equal(opt.step(grads, state, params)[1], opt.step(each, state, params)[1])
        assert opt.step(grads, state, params)[0]["a"] == params["a"]
    with pytest.raises(ValueError, match="a None in the gradients stands for several parameters"):
        adamjax.packed(adamjax.adam()).update(grads, state.inner)


def decaying(params, **options):
    mask = adamjax.decay_mask(params, **options)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, x in jax.tree.leaves_with_path(mask) if x}


def test_decay_mask_knows_the_names_of_flax_and_equinox():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(4, 4, name="embed")(x)
            x = nn.LayerNorm()(nn.MultiHeadDotProductAttention(2, name="attend")(x, x))
            return nn.Dense(3, name="value")(nn.RMSNorm()(nn.GroupNorm(2)(x)))

    params = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((2, 2), int))["params"]
    kernels = {f"attend/{name}/kernel" for name in ("query", "key", "value", "out")} | {"value/kernel"}
    assert decaying(params) == kernels | {"embed/embedding"}  # biases of heads have two axes
    assert decaying(params, exclude="embed|^value") == kernels - {"value/kernel"}

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
            self.embed = nnx.Embed(3, 4, rngs=rngs)

        def __call__(self, i):
            return self.norm(self.dense(self.embed(i)))

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layers(rngs):
        return Layer(rngs)

    for model in (Layer(nnx.Rngs(0)), layers(nnx.Rngs(0))):
        assert decaying(nnx.state(model, nnx.Param)) == {"dense/kernel/value", "embed/embedding/value"}

    class Block(eqx.Module):
        ln_1: eqx.nn.LayerNorm
        norms: list[eqx.nn.RMSNorm]
        attend: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

    def block(key):
        attend = eqx.nn.MultiheadAttention(2, 4, use_key_bias=True, key=key)
        return Block(eqx.nn.LayerNorm(4), [eqx.nn.RMSNorm(4)], attend, eqx.nn.MLP(4, 4, 8, 1, key=key))

    weights = {f"attend/{name}_proj/weight" for name in ("query", "key", "value", "output")}
    weights |= {"mlp/layers/0/weight", "mlp/layers/1/weight"}
    key = jax.random.key(0)
    for model in (block(key), eqx.filter_vmap(block)(jax.random.split(key, 3))):
        assert decaying(eqx.filter(model, eqx.is_inexact_array)) == weights


def test_decay_mask_knows_the_names_of_haiku():
    hk = pytest.importorskip("haiku")

    def model(x):
        x = hk.LayerNorm(-1, True, True, name="ln")(hk.Embed(4, 4)(x))
        return hk.Linear(4)(x)

    params = hk.transform(model).init(jax.random.key(0), jnp.zeros(2, int))
    for stacked in (params, jax.tree.map(lambda p: jnp.stack([p, p]), params)):
        assert decaying(stacked) == {"embed/embeddings", "linear/w"}
    assert decaying({"lora": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}) == {"lora/a", "lora/b"}
    with pytest.raises(ValueError, match=r"^Invalid exclude value: '\(' is not a regular expression"):
        adamjax.decay_mask(params, exclude="(")


def test_decay_mask_as_the_mask_of_a_step():
    """Alone, inside groups and by optax: without gradients, only what decays changes."""
    model = nnx.Linear(4, 4, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    ours = adamjax.adamw(0.1, weight_decay=0.5, mask=adamjax.decay_mask)
    half = adamjax.groups({"kernel": {"learning_rate": adamjax.scale(0.5)}}, default=ours)
    theirs = optax.adamw(0.1, weight_decay=0.5, mask=adamjax.decay_mask)
    for tx, kept in ((ours, 0.95), (half, 0.975), (adamjax.kahan(half), 0.975), (theirs, 0.95)):
        params = nnx.state(nnx.clone(model), nnx.Param)
        optimizer = nnx.Optimizer(trained := nnx.clone(model), tx, wrt=nnx.Param)
        optimizer.update(trained, jax.tree.map(jnp.zeros_like, params))
        assert_close(trained.kernel[...], kept * model.kernel[...], RECOMPILED)
        assert_equal(trained.bias[...], model.bias[...])


# The nodes that states are made of, all of them.
PARAMS = {"w": jnp.full((8, 32), 0.5, jnp.bfloat16), "b": [jnp.ones(8), jnp.ones((4, 16))]}
STATES = {
    "adam": adamjax.adam(0.1),
    "quantised": adamjax.amsgrad(0.1, mu_dtype=INT8, nu_dtype=adamjax.quantized("int4", min_size=1)),
    "skip": adamjax.skip_nonfinite(adamjax.adamw(0.1)),
    "spikes": adamjax.skip_spikes(adamjax.adamw(0.1)),
    "hyperball": adamjax.kahan(adamjax.hyperball(adamjax.adam(0.1))),
    "loss scale": adamjax.dynamic_loss_scale(adamjax.master_weights(adamjax.adam(0.1))),
    "packed": adamjax.kahan(adamjax.packed(adamjax.adamw(0.1, mu_dtype=adamjax.quantized("int8", min_size=100)))),
    "groups": adamjax.groups({"b": adamjax.adamax(0.1)}, default=adamjax.adam(0.1, nu_dtype=jnp.bfloat16)),
    "stochastic": adamjax.stochastic_rounding(adamjax.adam(adamjax.schedules.cosine(0.1, 10)), seed=3),
    "plateau": adamjax.chain(optax.adam(0.1), adamjax.schedules.reduce_on_plateau()),
    "torch": torch_forms.nadam(0.1),
    "schedule free": adamjax.kahan(adamjax.schedule_free_adamw(0.1, nu_dtype=INT8)),
    "average": adamjax.average_params(adamjax.stochastic_rounding(adamjax.adam(0.1)), dtype=jnp.bfloat16),
}


def stepped(opt, state, steps=1):
    params, value = PARAMS, {"value": 1.0} if isinstance(opt, Chain) and len(opt.transforms) > 1 else {}
    for _ in range(steps):
        grads = jax.tree.map(lambda p: (jnp.arange(p.size) % 7 - 3.0).reshape(p.shape).astype(p.dtype), params)
        params, state = opt.step(grads, state, params, **value)
    return params, state


def flax_fresh():
    """Flax's module of serialisation as it is when somebody imports it after adamjax."""
    spec = flax_nodes._Finder().find_spec("flax.serialization", flax.__path__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not isinstance(module.__loader__, flax_nodes._Loader)
    return module


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("late", [False, True])
def test_flax_serialises_states(name, late):
    serialization = flax_fresh() if late else flax.serialization
    opt = STATES[name]
    _, state = stepped(opt, opt.init(PARAMS))
    saved = serialization.to_bytes(state)
    found = serialization.from_bytes(opt.init(PARAMS), saved)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert_equal(found, state)
    assert_equal(stepped(opt, found), stepped(opt, state))
    assert_equal(serialization.from_state_dict(state, serialization.to_state_dict(state)), state)
    # Without a target there are only dicts of arrays: a step finds the nodes again.
    assert_equal(stepped(opt, serialization.msgpack_restore(saved)), stepped(opt, state))


def test_flax_says_where_a_target_does_not_fit():
    plain, quantised = adamjax.adam(), adamjax.adam(mu_dtype=INT8)
    saved = flax.serialization.to_bytes(plain.init(PARAMS))
    with pytest.raises(ValueError, match=r"QuantizedArray of codes, scales at path .*mu/.*where .*\[.* was saved"):
        flax.serialization.from_bytes(quantised.init(PARAMS), saved)


def by_path(state):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}


@pytest.mark.parametrize("name", STATES)
def test_states_are_copied_pickled_and_written(name):
    opt = STATES[name]
    _, state = stepped(opt, opt.init(PARAMS))
    assert_equal(pickle.loads(pickle.dumps(state)), state)
    assert_equal(copy.deepcopy(state), state)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    assert_equal(eqx.tree_deserialise_leaves(file, opt.init(PARAMS)), state)
    file = io.BytesIO()
    np.savez(file, **by_path(state))
    file.seek(0)
    arrays = np.load(file)
    found = jax.tree.map_with_path(lambda path, x: arrays[jax.tree_util.keystr(path)].view(x.dtype), state)
    assert_equal(stepped(opt, found), stepped(opt, state))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("name", STATES)
def test_orbax_restores_states(name, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    opt = STATES[name]
    _, state = stepped(opt, opt.init(PARAMS))
    for make in (orbax.StandardCheckpointer, orbax.PyTreeCheckpointer):
        with make() as checkpointer:
            checkpointer.save(tmp_path / make.__name__, state)
        with make() as checkpointer:
            assert_equal(checkpointer.restore(tmp_path / make.__name__, opt.init(PARAMS)), state)
            assert_equal(stepped(opt, checkpointer.restore(tmp_path / make.__name__)), stepped(opt, state))


def as_lists(x):
    return list(map(as_lists, x)) if isinstance(x, tuple) else x


CONTAINERS = {
    "lists": as_lists,
    "plain tuple": tuple,
    "frozen dict": lambda state: flax.core.freeze(flax.serialization.to_state_dict(state)),
    "any order": lambda state: OrderedDict(reversed(flax.serialization.to_state_dict(state).items())),
    "without empty ones": lambda state: jax.tree.map(lambda x: x, flax.serialization.to_state_dict(state)),
}


@pytest.mark.parametrize("name", ["adam", "quantised", "loss scale", "packed", "groups", "stochastic", "torch"])
def test_states_in_foreign_containers(name):
    opt = STATES[name]
    _, state = stepped(opt, opt.init(PARAMS))
    expected = stepped(opt, state)
    for change in CONTAINERS.values():
        params, found = stepped(opt, change(state))
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert_equal((params, found), expected)


@pytest.mark.parametrize("name", ["skip", "loss scale"])
def test_a_compiled_step_takes_a_dict(name):
    opt = STATES[name]
    state = flax.serialization.to_state_dict(jax.tree.map(np.asarray, opt.init(PARAMS)))
    _, found = jax.jit(opt.step)(PARAMS, state, PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(opt.init(PARAMS))
    step = adamjax.training.step_fn(lambda params, batch: jnp.sum(params["b"][0] * batch), opt)
    _, found, _ = step(jax.tree.map(jnp.copy, PARAMS), state, jnp.ones(8))
    assert jax.tree.structure(found) == jax.tree.structure(opt.init(PARAMS))


ADAM = adamjax.adam(0.1)
(MOMENTS, _) = ADAM.init(PARAMS)
IMPORT = r"adamjax\.interop\.optax\.import_state\(opt, params, state\)"
TARGET = r"init\(params\), which is also the target to restore a saved one into"


@pytest.mark.parametrize(
    ("opt", "state", "message"),
    [
        (ADAM, optax.adam(0.1).init(PARAMS), IMPORT),
        (adamjax.amsgrad(0.1), optax.amsgrad(0.1).init(PARAMS), IMPORT),
        (ADAM, optax.MultiSteps(optax.adam(0.1), 2).init(PARAMS), IMPORT),
        (ADAM, {"state": {}, "param_groups": []}, r"adamjax\.interop\.torch\.import_state"),
        (ADAM, jax.tree.leaves(ADAM.init(PARAMS)), TARGET),
        (ADAM, ({"count": MOMENTS.count, "mu": MOMENTS.mu}, ()), TARGET),
        (ADAM, ([*MOMENTS, 1], ()), TARGET),
        (ADAM, flax.serialization.to_state_dict(ADAM.init({"other": jnp.ones(2)})), TARGET),
        (ADAM, flax.serialization.to_state_dict(adamjax.amsgrad(0.1).init(PARAMS)), TARGET),
        (ADAM, "state", TARGET),
        (adamjax.kahan(ADAM), ADAM.init(PARAMS), TARGET),
        (ADAM, PARAMS, r"the order is update\(grads, state, params\)"),
    ],
)
def test_states_that_do_not_fit_say_the_cure(opt, state, message):
    with pytest.raises((TypeError, ValueError), match=message):
        opt.step(PARAMS, state, PARAMS)


def on_host(x):
    x = np.array(x)
    x.setflags(write=False)
    return x


NUMBERS = {
    "arrays": on_host,
    "scalars": lambda x: np.asarray(x)[()],
    "numbers": lambda x: np.asarray(x).item() if x.ndim == 0 else np.asarray(x),
    "wide": lambda x: np.asarray(x, {"float32": np.float64, "int32": np.int64}.get(x.dtype.name)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("x64", [False, True])
def test_states_of_numpy(name, x64):
    with jax.enable_x64(x64):
        opt = STATES[name]
        _, state = stepped(opt, opt.init(PARAMS))
        expected = stepped(opt, state, 2)
        for kind, change in NUMBERS.items():
            if (kind == "wide" and x64) or (kind == "numbers" and name == "plateau"):  # float64; optax's count
                continue
            found = stepped(opt, jax.tree.map(change, state), 2)
            assert_equal(found, expected)
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [np.int32(2**31 - 1), np.int64(3 * 10**9), np.uint64(2**63), 2**40, np.int8(3)])
def test_counts_of_numpy_stay_at_their_largest(count):
    opt = STATES["stochastic"]
    state = jax.tree.map_with_path(
        lambda path, x: count if getattr(path[-1], "name", None) == "count" else x, opt.init(PARAMS)
    )
    _, state = stepped(opt, state, 2)
    assert {int(state.count), int(state.inner[0].count), int(state.inner[1].count)} == {min(int(count) + 2, 2**31 - 1)}


SPECS = jax.tree.map(lambda p: jax.sharding.PartitionSpec("data", *[None] * (p.ndim - 1)), PARAMS)


def mapped(opt, state, **keywords):
    whole = jax.sharding.PartitionSpec()
    return optax.tree_utils.tree_map_params(
        opt, lambda _, spec: spec, state, SPECS, transform_non_params=lambda _: whole, **keywords
    )


@pytest.mark.parametrize("name", STATES)
def test_optax_maps_the_parameters_of_states(name):
    opt = STATES[name]
    state = opt.init(PARAMS)
    if name == "packed":  # many parameters share an array
        opt = opt.inner
        with pytest.raises(TypeError, match=r"packed moments.* take adamjax\.sharding\.state_sharding\(opt, params\)"):
            mapped(opt, state.inner)
        return
    doubled = optax.tree_utils.tree_map_params(opt, lambda x: x + x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    if name == "torch":  # the whole state of a parameter is at its place
        return
    # A parameter without an array in some tree of the state, or with several, is one leaf.
    specs = mapped(opt, state, is_leaf=lambda x: x is None or isinstance(x, adamjax.storage.QuantizedArray))
    if name == "schedule free":
        assert specs.inner[0].z["w"] == specs.inner[0].nu["w"] == SPECS["w"]
        return
    moments = next(node for _, node in find_moments(specs) if node.mu["w"] is not None)
    assert moments.mu["w"] == SPECS["w"]
    if name in ("skip", "adam"):
        assert jax.tree.structure(mapped(opt, state)) == jax.tree.structure(state)
        assert mapped(opt, state) == specs


def test_flax_boxes_around_moments():
    boxed = {"w": nn.Partitioned(jnp.ones((8, 256)), ("data", "model"))}
    for opt in (ADAM, adamjax.skip_nonfinite(adamjax.adam(0.1, mu_dtype=INT8, nu_dtype=INT8))):
        state = opt.init(boxed)
        specs = nn.get_partition_spec(state)
        assert find_moments(specs)[0][1].mu["w"] == jax.sharding.PartitionSpec("data", "model")
        params, new = opt.step(boxed, state, boxed)
        assert jax.tree.structure((params, new)) == jax.tree.structure((boxed, state))


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
