"""Problems of users' models: their training is that of a plain loop in the model's framework."""

import importlib.util
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_same_types, free_port
from jax.sharding import PartitionSpec

import adamjax
from adamjax import problems
from adamjax.problems import _losses, _supervised

hk: Any = importlib.import_module("haiku") if importlib.util.find_spec("haiku") else None
needs_haiku = pytest.mark.skipif(hk is None, reason="haiku is not installed")

pytestmark = pytest.mark.usefixtures("lenient")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 4))
Y = (X[:, 0] > 0) + (X[:, 1] > 0.5).astype(int)
DATA = {"train": (X[:50], Y[:50]), "valid": (X[50:], Y[50:]), "batch_size": 8}  # 20 rows are no multiple of 8
STEPS = 6
OPT = adamjax.adamw(1e-2)
KEYS = jax.random.split(jax.random.key(7), STEPS)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# No bias before the normalization: its gradient is zero but for rounding, which Adam would make a step of.
class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, use_bias=False, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        first, last = self.layers
        return last(self.dropout(nnx.relu(self.norm(first(x)))))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class EquinoxModel(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(4, 8, use_bias=False, key=key)
        self.norm = eqx.nn.BatchNorm(8, "batch", momentum=0.9, mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(8, 3, key=jax.random.fold_in(key, 1))

    def __call__(self, x, state, key=None):
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(jax.nn.relu(x), key=key)), state


def haiku_model(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(8, with_bias=False)(x), is_training)
    x = hk.dropout(hk.next_rng_key(), 0.5, jax.nn.relu(x)) if is_training else jax.nn.relu(x)
    return hk.Linear(3)(x)


def nnx_loop(batches, x):
    model = NnxModel(nnx.Rngs(jax.random.key(0)))
    optimizer = nnx.Optimizer(model, OPT, wrt=nnx.Param)
    model.train()

    @nnx.jit
    def step(model, optimizer, inputs, labels):
        grads = nnx.grad(lambda model: cross_entropy(model(inputs), labels))(model)
        optimizer.update(model, grads)

    for (inputs, labels), _ in zip(batches, KEYS, strict=False):
        step(model, optimizer, inputs, labels)
    statistics, counts = nnx.state(model, nnx.BatchStat), nnx.state(model, nnx.RngCount)
    model.eval()
    return model(x), [*jax.tree.leaves(statistics), *jax.tree.leaves(counts)]


def functional_loop(params, state, apply, batches):
    """For a framework whose `apply(params, state, inputs, key)` returns outputs and the next state."""
    moments = OPT.init(params)

    @jax.jit
    def step(params, state, moments, inputs, labels, key):
        def loss(params):
            outputs, after = apply(params, state, inputs, key)
            return cross_entropy(outputs, labels), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, moments = OPT.update(grads, moments, params)
        return optax.apply_updates(params, updates), after, moments

    for (inputs, labels), key in zip(batches, KEYS, strict=False):
        params, state, moments = step(params, state, moments, inputs, labels, key)
    return params, state


def linen_loop(batches, x):
    model = LinenModel()
    variables = model.init(jax.random.key(0), x, train=False)

    def apply(params, stats, inputs, key):
        given = {"params": params, "batch_stats": stats}
        outputs, after = model.apply(given, inputs, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return outputs, after["batch_stats"]

    params, stats = functional_loop(variables["params"], variables["batch_stats"], apply, batches)
    return model.apply({"params": params, "batch_stats": stats}, x, train=False), jax.tree.leaves(stats)


def equinox_loop(batches, x):
    model, state = eqx.nn.make_with_state(EquinoxModel)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, state, inputs, key):
        forward = jax.vmap(eqx.combine(params, static), (0, None, 0), (0, None), axis_name="batch")
        return forward(inputs, state, jax.random.split(key, len(inputs)))

    params, state = functional_loop(params, state, apply, batches)
    model = eqx.nn.inference_mode(eqx.combine(params, static))
    outputs, _ = jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)
    return outputs, jax.tree.leaves(state)


def haiku_loop(batches, x):
    model = hk.transform_with_state(haiku_model)
    first, _ = next(problems_of["haiku"]().batches(0))
    params, state = model.init(jax.random.key(0), first, is_training=True)
    params, state = functional_loop(params, state, lambda p, s, i, key: model.apply(p, s, key, i, True), batches)
    return model.apply(params, state, None, x, False)[0], jax.tree.leaves(state)


def supervised(model, **arguments):
    return problems.supervised(model, **{"loss": "cross_entropy", **DATA, **arguments})


problems_of = {
    "nnx": partial(supervised, NnxModel),
    "linen": partial(supervised, LinenModel()),
    "equinox": partial(supervised, eqx.nn.make_with_state(EquinoxModel)),
    "haiku": lambda: supervised(hk.transform_with_state(haiku_model)),
}
LOOPS = {"nnx": nnx_loop, "linen": linen_loop, "equinox": equinox_loop, "haiku": haiku_loop}
each_framework = pytest.mark.parametrize(
    "framework", ["nnx", "linen", "equinox", pytest.param("haiku", marks=needs_haiku)]
)


def trained(problem, seed=0, steps=STEPS):
    """Parameters and the state of the model after a plain loop over a problem."""
    params, state = jax.jit(problem.init)(jax.random.key(seed))
    return functional_problem_loop(problem, params, state, problem.batches(0), steps)


@partial(jax.jit, static_argnums=0)
def problem_step(problem, params, state, moments, batch, key):
    (_, state), grads = jax.value_and_grad(problem.loss, has_aux=True)(params, state, batch, key)
    params, moments = OPT.step(grads, moments, params)
    return params, state, moments


def functional_problem_loop(problem, params, state, batches, steps):
    moments = OPT.init(params)
    for _, batch, key in zip(range(steps), batches, KEYS, strict=False):
        params, state, moments = problem_step(problem, params, state, moments, batch, key)
    return params, state


def arrays(state):
    """The leaves of a state that are no keys, sorted by shape and value: frameworks order them in other ways."""
    found = [np.asarray(x) for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sorted(found, key=lambda x: (x.shape, float(np.sum(x))))


@each_framework
def test_batch_statistics_and_dropout_are_those_of_a_plain_loop(framework):
    problem = problems_of[framework]()
    assert problem.stateful
    assert not problem.on_host
    params, state = trained(problem)
    x = np.float32(X[50:])
    logits, expected = LOOPS[framework](problem.batches(0), x)
    assert_close(arrays(state), arrays(expected), 1e-5)
    metrics = jax.jit(problem.evaluate)(params, state)
    right = np.mean(np.argmax(logits, axis=1) == Y[50:])
    assert_close(dict(metrics), {"loss": cross_entropy(logits, Y[50:]), "accuracy": right}, 1e-5)


def test_members_in_vmap_are_those_alone():
    problem = problems_of["nnx"]()
    batch = next(problem.batches(0))

    def run(key):
        params, state = problem.init(key)
        loss, state = problem.loss(params, state, batch, key)
        return loss, arrays_of(state), problem.evaluate(params, state)

    def arrays_of(state):
        return state["norm"], state["dropout"]["rngs"]["count"]

    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(run))(keys)
    for i, key in enumerate(keys):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), jax.jit(run)(key), 1e-5)


@each_framework
def test_parameters_are_floats_by_readable_names(framework):
    params, state = jax.eval_shape(problems_of[framework]().init, jax.random.key(0))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    expected = {
        "nnx": ["layers/0/kernel", "layers/1/bias", "layers/1/kernel", "norm/bias", "norm/scale"],
        "linen": ["BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"],
        "equinox": ["first/weight", "last/bias", "last/weight", "norm/bias", "norm/weight"],
        "haiku": ["batch_norm/offset", "batch_norm/scale", "linear/w", "linear_1/b", "linear_1/w"],
    }
    assert names == expected[framework]
    assert jax.tree.leaves(state)


def test_what_a_linen_module_sows_is_no_state():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "size", jnp.mean(x**2))
            return nn.Dense(3)(x)

    assert not supervised(Sowing()).stateful


def test_an_nnx_module_draws_from_its_own_rngs():
    def make(rngs):
        return nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    problem = supervised(make)
    params, state = problem.init(jax.random.key(0))
    inputs, labels = next(problem.batches(0))
    value, after = problem.loss(params, state, (inputs, labels), jax.random.key(1))
    assert_close(value, cross_entropy(make(nnx.Rngs(jax.random.key(0)))(inputs), labels), 1e-6)
    assert after["layers"]["1"]["rngs"]["count"] == 1


class Counting(nnx.Module):
    """Counts its calls, and holds an array that is no parameter."""

    def __init__(self, *, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4,)))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.scale = jnp.full((), 2.0)

    def __call__(self, x):
        self.calls[...] += 1
        self.seen = nnx.Intermediate(x)
        return x @ self.w * self.scale


def test_all_but_floating_params_is_state_in_nnx():
    problem = supervised(Counting, loss="mse", train=(X, X[:, 0]), valid=(X, X[:, 0]))
    params, state = trained(problem, steps=3)
    assert params.keys() == {"w"}
    assert_close(state, {"calls": np.int32(3), "scale": np.float32(2)}, 0)
    assert_same_types((params, state), problem.init(jax.random.key(0)))


def test_an_integer_param_is_refused_by_its_path():
    class Bad(Counting):
        def __init__(self, rngs):
            super().__init__(rngs=rngs)
            self.inner = nnx.Dict(table=nnx.Param(jnp.arange(4)))

    with pytest.raises(TypeError, match=r"^params\['inner'\]\['table'\] is int32\[4\], expected a floating point"):
        supervised(Bad)


def test_arrays_of_an_equinox_module_that_are_no_floats_are_state():
    class Shuffled(eqx.Module):
        mlp: eqx.nn.MLP
        order: jax.Array
        constants: np.ndarray

        def __init__(self, key):
            self.mlp = eqx.nn.MLP(4, 3, 8, 1, activation=lambda x: jnp.tanh(x), key=key)
            self.order, self.constants = jax.random.permutation(key, 4), np.arange(4)

        def __call__(self, x):
            return self.mlp(x[self.order] * self.constants)

    problem = supervised(lambda key: Shuffled(key))
    params, state = trained(problem)
    assert params.keys() == {"mlp"}
    assert sorted(np.asarray(jax.tree.leaves(state)[1])) == [0, 1, 2, 3]
    # Each call of the factory makes another lambda, which is no part of these trees.
    assert jax.tree.structure(problem.init(jax.random.key(1))) == jax.tree.structure((params, state))


def init(key):
    return {"w": jax.random.normal(key, (4, 3))}


def test_a_pair_of_functions():
    def init_for(key, inputs):
        return {"w": jax.random.normal(key, (inputs.shape[-1], 3))}

    def apply(params, inputs, *, key, train):
        return inputs @ params["w"] + (jax.random.normal(key, (3,)) if train else 0.0)

    problem = supervised((init_for, apply))
    assert not problem.stateful
    params, batch = problem.init(jax.random.key(0)), next(problem.batches(0))
    assert_close(params, init(jax.random.key(0)), 0)
    noise = jax.random.normal(jax.random.key(1), (3,))
    assert_close(
        problem.loss(params, batch, jax.random.key(1)), cross_entropy(batch[0] @ params["w"] + noise, batch[1]), 1e-6
    )
    assert_close(problem.evaluate(params)["loss"], cross_entropy(np.float32(X[50:]) @ params["w"], Y[50:]), 1e-6)


def linear(params, inputs):
    return inputs @ params["w"]


class KeywordModel(NnxModel):
    def __init__(self, *, rngs):
        super().__init__(rngs)


class ToldModel(nnx.Module):
    """Takes its mode and a source of randomness where it is called."""

    def __init__(self, width, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, width)))

    def __call__(self, x, training, rngs):
        return x @ self.w + (jax.random.normal(rngs.noise(), (3,)) if training else 0.0)


@pytest.mark.parametrize(
    "model",
    [
        KeywordModel,
        lambda rngs: NnxModel(rngs),
        partial(ToldModel, 3),
        partial(eqx.nn.MLP, 4, 3, 8, 1),
        lambda key: eqx.nn.make_with_state(EquinoxModel)(key),
        nn.Dense(3),
        (nn.Dense(3).init, nn.Dense(3).apply),
    ],
)
def test_other_ways_to_give_a_model(model):
    problem = supervised(model)
    made, (inputs, targets) = problem.init(jax.random.key(0)), next(problem.batches(0))
    given = made if problem.stateful else (made,)
    shape = jax.eval_shape(problem.loss, *given, (inputs, targets), jax.random.key(0))
    assert (shape[0] if problem.stateful else shape).shape == ()
    assert jax.eval_shape(problem.evaluate, *given).keys() == {"loss", "accuracy"}


@needs_haiku
def test_transforms_of_haiku():
    test_other_ways_to_give_a_model(hk.transform(lambda x: hk.Linear(3)(x)))
    with pytest.raises(TypeError, match="a value of type MultiTransformed of Haiku, expected"):
        supervised(hk.multi_transform(lambda: (hk.Linear(3), hk.Linear(3))))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "a value of type int; model must be a factory"),
        (NnxModel(nnx.Rngs(0)), "a module of type NnxModel; give a factory, `lambda rngs: NnxModel"),
        (eqx.nn.Linear(4, 3, key=jax.random.key(0)), "a module of type Linear; give a factory, `lambda key: Linear"),
        (LinenModel, r"the class LinenModel; give a module, LinenModel\(\.\.\.\)"),
        (lambda x: x, r"<lambda>, which requires x; model must be"),
        (nnx.Linear, r"Linear, which requires in_features, out_features, rngs; model"),
        ((init,), "a value of type tuple; model must be"),
        (dict, "dict, which requires no argument; model must be"),
        (lambda rngs: 3, "factory .* `rngs` returned int, expected a flax.nnx.Module"),
        (lambda key: 3, "factory .* `key` returned int, expected an equinox.Module"),
    ],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(TypeError, match=message):
        supervised(model)


def test_for_functions_no_framework_is_imported_and_no_device_used():
    program = """
import jax, numpy as np, sys
from adamjax import problems
data = np.ones((4, 2)), np.ones(4)
problems.supervised((lambda key: np.ones(2), lambda p, x: x @ p), loss="mse", train=data, valid=data, batch_size=2)
print(*{"flax", "equinox", "haiku", "optax", "sklearn", "torch"} & set(sys.modules))
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 1, 0)  # refuses where a device was used
"""
    environment = os.environ | {"PYTHONPATH": str(Path(adamjax.__file__).parent.parent)}
    found = subprocess.run(
        [sys.executable, "-c", program, str(free_port())],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd="/",
    )
    assert found.stdout == "\n"


def test_losses_are_their_formulas():
    logits, labels = jnp.asarray(RNG.normal(size=(6, 3)), "bfloat16"), jnp.asarray([0, 1, 2, 0, 1, 2])
    x = np.asarray(logits, np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    expected = -log_p[np.arange(6), labels]
    one_hot = jax.nn.one_hot(labels, 3)
    binary = -(one_hot * np.log(1 / (1 + np.exp(-x))) + (1 - one_hot) * np.log(1 / (1 + np.exp(x))))
    for name, targets, values in (
        ("cross_entropy", labels, expected),
        ("cross_entropy", one_hot, expected),
        ("mse", one_hot, (x - one_hot) ** 2),
        ("mae", one_hot, np.abs(x - one_hot)),
        ("binary_cross_entropy", one_hot, binary),
    ):
        found = _losses.LOSSES[name](logits, targets)
        assert found.dtype == "float32"
        assert_close(found, np.float32(values), 1e-5)
    assert _losses.accuracy(x, labels) == _losses.accuracy(x, one_hot) == np.mean(np.argmax(x, axis=1) == labels)
    assert _losses.accuracy(jnp.array([-1.0, 2.0]), jnp.array([0, 0])) == 0.5


@pytest.mark.parametrize("name", ["mse", "mae", "binary_cross_entropy", "cross_entropy", "accuracy"])
def test_targets_are_not_broadcast(name):
    with pytest.raises(ValueError, match=rf"^{name} was given outputs float32\[5,1\] and targets float32\[5\]"):
        _losses.METRICS[name](jnp.ones((5, 1)), jnp.ones(5))


def test_a_loss_per_row_is_averaged():
    def per_row(outputs, targets):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    params = init(jax.random.key(0))
    for problem in (supervised((init, linear), loss=per_row), supervised((init, linear), loss=cross_entropy)):
        metrics = problem.evaluate(params)
        assert metrics.keys() == {"loss"}
        assert_close(metrics["loss"], cross_entropy(np.float32(X[50:]) @ params["w"], Y[50:]), 1e-6)


def test_metrics_of_scikit_learn_are_computed_on_the_host():
    metrics = pytest.importorskip("sklearn.metrics")

    def f1(outputs, labels):
        return metrics.f1_score(labels, outputs.argmax(axis=1), average="macro")

    def area(outputs, labels):
        return metrics.roc_auc_score(labels > 0, -outputs[:, 0])

    problem = supervised(
        (init, linear), metrics={"f1": f1, "auc": area, "top": lambda o, t: jnp.max(o), "accuracy": quarter}
    )
    assert problem.on_host
    params = jax.device_get(init(jax.random.key(0)))
    found = problem.evaluate(params)
    logits = np.float32(X[50:]) @ params["w"]
    expected = {
        "loss": cross_entropy(logits, Y[50:]),
        "f1": f1(logits, Y[50:]),
        "auc": area(logits, Y[50:]),
        "top": logits.max(),
        "accuracy": 0.25,
    }
    assert all(type(x) is float for x in found.values())
    assert_close(found, {name: float(x) for name, x in expected.items()}, 1e-6)

    diverged = problem.evaluate({"w": params["w"] * np.nan})
    assert np.isnan([diverged["loss"], diverged["f1"], diverged["auc"]]).all()


def quarter(outputs, labels):
    return jnp.float32(0.25)


def test_an_error_of_a_metric_names_it():
    def misspelled(outputs, targets):
        return outputs.argmaxx()

    with pytest.raises(AttributeError, match="argmaxx") as traced:
        supervised((init, linear), metrics={"best": misspelled})
    assert "the metric 'best'" in traced.value.__notes__[-1]

    def late(outputs, targets):
        return 1 / 0 if outputs.max() > -np.inf else 0

    problem = supervised((init, linear), metrics={"best": late})
    with pytest.raises(ZeroDivisionError) as evaluated:
        problem.evaluate(init(jax.random.key(0)))
    assert "the metric 'best'" in evaluated.value.__notes__[-1]


def test_large_validation_data_are_no_constants_of_the_program(monkeypatch):
    params = init(jax.random.key(0))
    expected = supervised((init, linear)).evaluate(params)
    monkeypatch.setattr(_supervised, "_LARGEST_CONSTANTS", 100)
    problem = supervised((init, linear))
    assert problem.on_host
    assert_close(problem.evaluate(params), {name: float(x) for name, x in expected.items()}, 1e-6)


def test_a_problem_is_pickled_and_has_a_readable_name():
    problem = supervised((init, linear), metrics={"right": "accuracy", "quarter": quarter})
    again = pickle.loads(pickle.dumps(problem))
    assert (
        repr(again)
        == repr(problem)
        == (
            "supervised((init, linear), loss='cross_entropy', train=[float32[50,4], int32[50]], "
            "valid=[float32[20,4], int32[20]], batch_size=8, metrics={'right': 'accuracy', 'quarter': quarter})"
        )
    )
    assert repr(supervised(partial(ToldModel, 3))).startswith("supervised(partial(ToldModel), ")
    params = init(jax.random.key(0))
    assert again.evaluate(params) == problem.evaluate(params)


def test_shardings_of_parameters():
    assert not hasattr(supervised((init, linear)), "param_shardings")
    problem = supervised((init, linear), param_shardings=lambda mesh, params: jax.tree.map(lambda p: mesh, params))
    assert problem.param_shardings(PartitionSpec("data"), {"w": 0}) == {"w": PartitionSpec("data")}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "nll"}, ValueError, "^Invalid loss value: 'nll'; loss must be one of 'cross_entropy', 'mse'"),
        ({"loss": 3}, TypeError, "^Invalid loss value: 3"),
        ({"loss": "mse"}, ValueError, r"^mse was given outputs float32\[20,3\] and targets int32\[20\]"),
        ({"loss": lambda o, t: t}, TypeError, "^the loss is .*int32.*expected a real floating point"),
        ({"metrics": ["accuracy"]}, TypeError, "^Invalid metrics value"),
        ({"metrics": {"loss": "mse"}}, ValueError, "^Invalid name of a metric: 'loss'"),
        ({"metrics": {"f1": "f1"}}, ValueError, r"^Invalid metrics\['f1'\] value: 'f1'; .* 'accuracy'"),
        ({"metrics": {"f1": 3}}, TypeError, r"^Invalid metrics\['f1'\] value: 3"),
        ({"metrics": {"two": lambda o, t: (1.0, 2.0)}}, TypeError, "^the metric 'two' is "),
        ({"batch_size": 51}, ValueError, "^Invalid batch_size value: 51; train has 50 rows"),
        ({"batch_size": 0}, ValueError, "^Invalid batch_size value: 0"),
        ({"param_shardings": 3}, TypeError, "^Invalid param_shardings value: 3"),
        (
            {"model": (init, lambda p, x: p["w"])},
            TypeError,
            r"^the model returns an array of shape \(4, 3\) for 8 rows",
        ),
        ({"valid": (X[:, :3], Y)}, ValueError, r"^the inputs of valid are float32\[70,3\], and those of train"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        supervised(**{"model": (init, linear), **arguments})


def test_a_mesh_divides_the_model_and_the_batch():
    """With tensor parallelism: the numbers are those of one device."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)

    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (4, 8), jnp.float32)}

    def apply(params, inputs):
        return (inputs @ params["w"]).sum(axis=1)

    data = {"loss": "mse", "train": (x, x.sum(axis=1)), "valid": (x, x.sum(axis=1)), "batch_size": 16}
    problem = supervised(
        (init, apply), param_shardings=lambda mesh, params: {"w": jax.P(None, "model")}, batch_axes=["data"], **data
    )
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    *_, found = adamjax.training.train(problem, adamjax.adam(0.1), steps=20, mesh=mesh)
    *_, expected = adamjax.training.train(supervised((init, apply), **data), adamjax.adam(0.1), steps=20)
    assert found.params["w"].sharding.spec == jax.P(None, "model")
    np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=1e-4)
    with pytest.raises(TypeError, match="Invalid batch_axes value: 'data'"):
        supervised((init, apply), batch_axes="data", **data)
