"""Transfer of an optimizer from a small model to a large one."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, make_mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import CONSTANT_GRADIENT, OPTAX, RECOMPILED

import adamjax
from adamjax._core import trees
from adamjax.scaling._rules import Factors, Growth, Rules


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def perceptron(width, features=6, classes=3):
    return {
        "embed": {"kernel": shape(features, width), "bias": shape(width)},
        "hidden": {"kernel": shape(width, width), "bias": shape(width)},
        "head": {"kernel": shape(width, classes), "bias": shape(classes)},
    }


def arrays(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def transformer(width, depth):
    problem = adamjax.problems.characters(width=width, depth=depth)
    return jax.eval_shape(problem.init, jax.random.key(0))


def factors(opt):
    return {x.path: x.factors for x in opt.parameters}


# The tables of the papers, for a width that grows by M and, in residual blocks, a depth that grows by L.
M, L = 4.0, 3.0
TABLE_3 = {  # muP: of variances of initial values, and of Adam's learning rates
    Growth("input", 1, M): (1, 1),
    Growth("vector", 1, M): (1, 1),
    Growth("hidden", M, M): (1 / M, 1 / M),
    Growth("output", M, 1): (1 / M**2, 1 / M),
}
TABLE_8 = {  # the same, and multipliers
    Growth("input", 1, M): (1, 1, 1),
    Growth("vector", 1, M): (1, 1, 1),
    Growth("hidden", M, M): (1 / M, 1 / M, 1),
    Growth("output", M, 1): (1, 1, 1 / M),
}
COMPLETEP = {  # learning rate, weight decay and eps of AdamW, by alpha
    Growth("input", 1, M): lambda alpha: (1, 1, 1 / M),
    Growth("vector", 1, M): lambda alpha: (1, 1, 1 / M),
    Growth("output", M, 1): lambda alpha: (1, 1, 1 / M),
    Growth("vector", 1, M, L): lambda alpha: (L ** (alpha - 1), 1, L**-alpha / M),
    Growth("hidden", M, M, L): lambda alpha: (L ** (alpha - 1) / M, M, L**-alpha / M),
}


@pytest.mark.numbers
@pytest.mark.parametrize("growth", TABLE_3, ids=str)
def test_tables_of_mup(growth):
    found = Rules("rate").factors(growth)
    assert (found.init_std**2, found.learning_rate, found.output) == (*TABLE_3[growth], 1)
    found = Rules("multiplier").factors(growth)
    assert (found.init_std**2, found.learning_rate, found.output) == TABLE_8[growth]


@pytest.mark.numbers
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("growth", COMPLETEP, ids=str)
def test_table_of_completep(growth, alpha):
    found = Rules("multiplier", alpha=alpha).factors(growth)
    np.testing.assert_allclose(found[:3], COMPLETEP[growth](alpha), rtol=1e-15)
    assert found.residual == growth.depth**-alpha


@pytest.mark.numbers
@pytest.mark.parametrize(("decay", "power"), {"product": 0, "sqrt": -0.5, "fixed": -1}.items())
@pytest.mark.parametrize("output", ["rate", "multiplier"])
@pytest.mark.parametrize("kind", ["hidden", "output"])
def test_decay_per_step_by_width(decay, power, output, kind):
    found = Rules(output, decay).factors(Growth(kind, M, M if kind == "hidden" else 1.0))
    np.testing.assert_allclose(found.learning_rate * found.weight_decay, M**power, rtol=1e-15)


@pytest.mark.numbers
def test_output_rate_and_multiplier_are_one_model():
    """A weight that is divided by the width takes the same steps relative to it, and gives the same outputs."""
    rate, multiplier = (Rules(output).factors(Growth("output", M, 1)) for output in ("rate", "multiplier"))
    assert rate.init_std == multiplier.init_std * multiplier.output
    assert rate.learning_rate == multiplier.learning_rate * multiplier.output
    assert rate.eps * multiplier.output == multiplier.eps  # the gradient has the factor, too


def test_inference():
    opt = adamjax.transfer(adamjax.adamw(), perceptron(8), perceptron(32))
    found = {x.path: (x.kind, x.fan_in, x.fan_out) for x in opt.parameters}
    assert found == {
        "embed/bias": ("vector", 1, 4),
        "embed/kernel": ("input", 1, 4),
        "head/bias": ("fixed", 1, 1),
        "head/kernel": ("output", 4, 1),
        "hidden/bias": ("vector", 1, 4),
        "hidden/kernel": ("hidden", 4, 4),
    }
    assert factors(opt)["hidden/kernel"] == Factors(1 / 4, 4, 1 / 4, 1 / 2, 1, 1)
    rows = opt.describe().splitlines()
    assert len(rows) == 7
    assert rows[-1].split() == [
        *("hidden/kernel", "[8,8]", "->", "[32,32]", "hidden", "4", "4", "1"),
        *("0.25", "4", "0.25", "0.5", "1", "1"),
    ]


def test_blocks_and_a_tied_embedding():
    opt = adamjax.transfer(adamjax.adam(), transformer(16, 1), transformer(32, 4), blocks="block_[0-9]+")
    by_path = {x.path: x for x in opt.parameters}
    assert by_path["blocks/block_3/up"].counterpart == "blocks/block_0/up"
    assert {x.depth for path, x in by_path.items() if "block_" in path} == {4}
    assert by_path["norm/scale"].depth == by_path["embedding"].depth == 1
    assert "multiply the logits by 0.5" in opt.describe().splitlines()[-1]


@pytest.mark.parametrize(
    ("small", "large", "roles", "expected"),
    [
        ((2, 4, 4), (6, 8, 8), ("layers", "in", "out"), ("hidden", 2, 2, 3)),
        ((4, 2, 8), (8, 4, 8), ("in", "out", "out"), ("hidden", 2, 2, 1)),
        ((2, 8, 4), (4, 8, 8), ("in", "in", "out"), ("hidden", 2, 2, 1)),
        ((4, 9), (8, 9), ("out", "in"), ("input", 1, 2, 1)),
        ((10, 4), (30, 8), (None, "out"), ("input", 1, 2, 1)),
        ((4,), (8,), ("in",), ("output", 2, 1, 1)),
        ((4,), (8,), (None,), ("fixed", 1, 1, 1)),
    ],
)
def test_axes(small, large, roles, expected):
    opt = adamjax.transfer(adamjax.adam(), {"w": shape(*small)}, {"w": shape(*large)}, axes={"^w$": roles})
    (found,) = opt.parameters
    assert (found.kind, found.fan_in, found.fan_out, found.depth) == expected


AMBIGUOUS = [
    ((2, 4, 4), (4, 8, 8), r"^a/w has shape \(2, 4, 4\) in small.*axes 0, 1, 2 grow.*axes=\{'a/w': \(\.\.\.\)\}"),
    ((4, 4), (8, 12), r"^a/w .*grow by 2 and 3.*axes="),
    ((4, 4), (8,), r"^a/w .*not as many axes$"),
    ((4, 0), (8, 0), r"^a/w .*an axis is empty$"),
]


@pytest.mark.parametrize(("small", "large", "message"), AMBIGUOUS, ids=range(len(AMBIGUOUS)))
def test_ambiguous_shapes(small, large, message):
    with pytest.raises(ValueError, match=message):
        adamjax.transfer(adamjax.adam(), {"a": {"w": shape(*small)}}, {"a": {"w": shape(*large)}})


def test_weights_of_torch_and_equinox_are_ambiguous():
    small, large = {"head": {"weight": shape(10, 4)}}, {"head": {"weight": shape(10, 8)}}
    with pytest.raises(ValueError, match=r"^head/weight .*\(out, in\).*axes="):
        adamjax.transfer(adamjax.adam(), small, large)
    assert adamjax.transfer(adamjax.adam(), small, large, axes={"weight": ("out", "in")}).parameters[0].kind == "output"


WRONG = [
    ({"small": {"a": shape(2)}}, ValueError, r"^large has embed/bias, which small lacks.*blocks='block_\[0-9\]\+'"),
    (
        {"large": perceptron(8) | {"embed": {"bias": shape(8)}}},
        ValueError,
        r"^small has embed/kernel, which large lacks",
    ),
    ({"small": {}}, ValueError, r"^small has no parameters"),
    ({"small": {"a": "x"}}, TypeError, r"^small\['a'\] is 'x', expected an array"),
    ({"axes": ("in", "out")}, TypeError, r"^Invalid axes value"),
    ({"axes": {"(": ("in",)}}, ValueError, r"^Invalid axes value: '\('; it is not a regular expression"),
    ({"axes": {"kernel": ("fan_in", "out")}}, ValueError, r"^Invalid axes value: \('fan_in', 'out'\) of 'kernel'"),
    ({"axes": {"kernel": ("out",)}}, ValueError, r"^axes gives 1 roles to embed/kernel"),
    ({"axes": {"weight": ("out",)}}, ValueError, r"^axes: 'weight' is in no path; those are embed/bias"),
    ({"blocks": "layer"}, ValueError, r"^blocks='layer' is in no path of small"),
    ({"blocks": "embed|head"}, ValueError, r"^small has embed/bias of shape \(8,\) and head/bias of shape \(3,\)"),
    ({"output": "both"}, ValueError, r"^Invalid output value"),
    ({"decay": "none"}, ValueError, r"^Invalid decay value"),
    ({"batch": 0}, ValueError, r"^Invalid batch value: 0; batch must be above 0"),
    ({"steps": jnp.float32(2)}, TypeError, r"^Invalid steps value"),
    (
        {"batch": 16, "batch_rule": "sqrt"},
        ValueError,
        r"^a batch 16 times as large would make b1 -0.6: with b1=0.9, 'half_life'",
    ),
    ({"opt": adamjax.adam(weight_decay=0.1)}, ValueError, r"^weight_decay=0.1 of .* coupled.*Use adamw"),
    ({"opt": adamjax.scale_by_adam()}, ValueError, r"has no learning_rate"),
    ({"opt": adamjax.chain(optax.scale_by_adam(), adamjax.adam())}, TypeError, r"from elsewhere"),
    ({"opt": adamjax.adam(lambda t: 0.1), "steps": 2}, TypeError, r"^steps=2 cannot stretch"),
    ({"opt": adamjax.adam(b1=jnp.float32(0.9)), "batch": 2}, TypeError, r"^b1 is .* only a number"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        adamjax.transfer(**({"opt": adamjax.adamw(), "small": perceptron(8), "large": perceptron(16)} | changes))


OPTIMIZERS = {
    "adam": adamjax.adam(0.1),
    "clipped": adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(adamjax.schedules.cosine(0.1, 10))),
    "kahan": adamjax.kahan(adamjax.adamw(0.1)),
    "groups": adamjax.groups({"bias": {"weight_decay": 0.0}}, default=adamjax.adamw(0.1)),
    "adamaxw": adamjax.adamaxw(0.1),
    "radam": adamjax.radam(0.1),
    "ademamix": adamjax.ademamix(0.1, weight_decay=0.1),
    "adam_atan2": adamjax.adam_atan2(0.1),
    "stable_adamw": adamjax.stable_adamw(0.1),
    "packed": adamjax.packed(adamjax.adamw(0.1)),
    "torch": adamjax.interop.torch.nadam(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_transfer_to_itself_changes_nothing(name):
    opt, tree = OPTIMIZERS[name], perceptron(8)
    found = adamjax.transfer(opt, tree, tree)
    assert all(x.factors == Factors() for x in found.parameters)
    params = arrays(tree)
    expected, _ = opt.step(params, opt.init(params), params)
    assert_equal(found.step(params, found.init(params), params)[0], expected)
    if name != "groups":
        assert found.inner == opt
    found.check_init(params, params)
    assert_equal(found.rescale(params, params), params)


def by_hand(lr, wd, eps, clip=None):
    """The same optimizer, of optax's parts: factors of rate, decay and eps by kind, for a width that doubles."""
    scales = {"up": (1, 1, 0.5), "hidden": (0.5, 2, 0.5), "output": (0.5, 2, 1), "fixed": (1, 1, 1)}
    members = {k: optax.adamw(lr * a, eps=eps * c, weight_decay=wd * b) for k, (a, b, c) in scales.items()}
    kinds = {"embed/kernel": "up", "hidden/kernel": "hidden", "head/kernel": "output", "head/bias": "fixed"}

    def labels(params):
        return jax.tree.map_with_path(lambda key, _: kinds.get(trees.path_of(key), "up"), params)

    parted = optax.partition(members, labels)
    return parted if clip is None else optax.chain(optax.clip_by_global_norm(clip), parted)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_are_those_of_a_partition_by_hand(clip):
    params, lr, wd, eps = arrays(perceptron(16)), 0.1, 0.3, 1e-2
    plain = adamjax.adamw(lr, eps=eps, weight_decay=wd)
    chained = plain if clip is None else adamjax.chain(adamjax.clip_by_global_norm(clip), plain)
    opt = adamjax.transfer(chained, perceptron(8), params)
    theirs = by_hand(lr, wd, eps, clip)
    state, their_state, their_params = opt.init(params), theirs.init(params), params
    for seed in range(3):
        grads = arrays(params, seed)
        params, state = opt.step(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            updates, their_state = theirs.update(grads, their_state, their_params)
            their_params = optax.apply_updates(their_params, updates)
    assert_close(params, their_params, OPTAX["float32"])


def test_groups_stay_groups():
    opt = adamjax.groups({"bias": {"weight_decay": 0.0}}, default=adamjax.adamw(0.1, weight_decay=0.3))
    found = adamjax.transfer(opt, perceptron(8), perceptron(16))
    params = arrays(perceptron(16))

    def mask(tree):
        return jax.tree.map_with_path(lambda key, _: "bias" not in trees.path_of(key), tree)

    other = adamjax.transfer(adamjax.adamw(0.1, weight_decay=0.3, mask=mask), perceptron(8), perceptron(16))
    expected, _ = other.step(params, other.init(params), params)
    assert_equal(found.step(params, found.init(params), params)[0], expected)


def test_independent_decay():
    """Without the learning rate in its factor, the decay per step stays the same without a factor."""
    opts = [adamjax.adamw(0.1, weight_decay=w, decay_schedule=s) for w, s in ((0.3, "lr"), (0.03, "independent"))]
    coupled, independent = (adamjax.transfer(opt, perceptron(8), perceptron(16)) for opt in opts)
    params = arrays(perceptron(16))
    zeros = jax.tree.map(jnp.zeros_like, params)
    found = independent.step(zeros, independent.init(params), params)[0]
    expected = coupled.step(zeros, coupled.init(params), params)[0]
    assert_close(found, expected, RECOMPILED)


def test_batch_steps_and_data():
    tree = perceptron(8)
    schedule = adamjax.schedules.warmup_stable_decay(0.1, warmup_steps=3, total_steps=10, decay_steps=7)
    opt = adamjax.adamw(schedule, weight_decay=0.3)
    found = adamjax.transfer(opt, tree, tree, batch=4, steps=2.5)
    adam, decay, rate = found.inner.members[0].transforms
    assert (adam.b1, adam.b2, adam.eps) == (0.9**4, 0.999**4, 5e-9)
    assert rate.learning_rate.factor == 2
    assert rate.learning_rate.schedule == adamjax.schedules.warmup_stable_decay(0.1, 7, 25, 17)
    # lr * decay * steps is that of the small run.
    np.testing.assert_allclose(decay.weight_decay.factor * 2 * 2.5, 1, rtol=1e-15)
    # With the same data, of which a batch of 4 times the size sees 4 times as much: time scales in epochs.
    same_data = adamjax.transfer(opt, tree, tree, batch=4, data=1, batch_rule="beta2_half_life").parameters[0].factors
    assert same_data == Factors(weight_decay=4)


def test_every_decay_rate_keeps_its_half_life():
    found = adamjax.transfer(adamjax.ademamix(0.1, 0.9, 0.99, 0.999), perceptron(8), perceptron(8), batch=4).inner
    moments = found.members[0].transforms[0]
    assert (moments.b1, moments.b2, moments.b3) == (0.9**4, 0.99**4, 0.999**4)


def test_is_a_value():
    opt, other = (adamjax.transfer(adamjax.adamw(0.1), perceptron(8), perceptron(n)) for n in (16, 32))
    assert opt == adamjax.transfer(adamjax.adamw(0.1), perceptron(8), perceptron(16)) != other
    copy = pickle.loads(pickle.dumps(opt))
    assert (hash(copy), copy) == (hash(opt), opt)
    assert repr(opt).startswith("Transferred(Groups(")
    params = arrays(perceptron(16))

    def after(rate):
        opt = adamjax.transfer(adamjax.adamw(rate), perceptron(8), perceptron(16))
        return opt.step(params, opt.init(params), params)[0]

    rates = jnp.array([0.1, 0.2])
    stacked = jax.vmap(after)(rates)
    for i, rate in enumerate(rates):
        assert_close(jax.tree.map(lambda x, i=i: x[i], stacked), after(rate), RECOMPILED)


def test_a_new_learning_rate_compiles_nothing():
    params = arrays(perceptron(16))
    step = jax.jit(lambda opt, state: opt.step(params, state, params))
    opts = [adamjax.transfer(adamjax.adamw(rate), perceptron(8), perceptron(16)) for rate in (0.1, 0.2)]
    for opt in opts:
        step(opt, opt.init(params))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamjax.adamw(0.1, fused="auto"),
        lambda: adamjax.adamw(0.1, mu_dtype=adamjax.quantized("int8"), nu_dtype=adamjax.quantized("int8")),
        lambda: adamjax.skip_nonfinite(adamjax.adamw(0.1)),
        lambda: adamjax.master_weights(adamjax.adamw(0.1)),
    ],
    ids=["fused", "int8", "skip_nonfinite", "master_weights"],
)
def test_with_what_an_optimizer_can_be(make):
    small, large = perceptron(8), perceptron(128, features=128)
    small["embed"]["kernel"] = shape(128, 8)
    params = arrays(large)
    opt = adamjax.transfer(make(), small, large)
    plain = adamjax.transfer(adamjax.adamw(0.1), small, large)
    found, state = jax.jit(opt.step)(params, opt.init(params), params)
    expected, _ = jax.jit(plain.step)(params, plain.init(params), params)
    assert_close(found, expected, 0.1 * CONSTANT_GRADIENT["int8"])  # steps are 0.1
    assert jax.tree.structure(opt.init(params)) == jax.tree.structure(state)


def test_initial_values():
    small, large = arrays(perceptron(32)), arrays(perceptron(128))
    opt = adamjax.transfer(adamjax.adam(), small, large)
    with pytest.raises(ValueError, match=r"^the initial head/kernel .* times that.*expected 0.25 times: .*rescale"):
        opt.check_init(small, large)
    rescaled = opt.rescale(small, large)
    opt.check_init(small, rescaled)
    np.testing.assert_allclose(
        jnp.std(rescaled["hidden"]["kernel"]) / jnp.std(small["hidden"]["kernel"]), 0.5, rtol=1e-5
    )
    zeros = small | {"hidden": jax.tree.map(jnp.zeros_like, small["hidden"])}
    with pytest.raises(ValueError, match=r"^the initial hidden/bias .*not constant, unlike"):
        opt.check_init(zeros, rescaled)
    with pytest.raises(ValueError, match=r"^large has embed/bias of shape \(64,\), expected \(128,\)"):
        opt.check_init(small, arrays(perceptron(64)))
    with pytest.raises(TypeError, match=r"^small\['embed'\]\['bias'\] is ShapeDtypeStruct"):
        opt.rescale(perceptron(32), large)


def test_zero1():
    mesh = make_mesh(AxisType.Auto)
    params = jax.device_put(arrays(perceptron(16)), NamedSharding(mesh, PartitionSpec()))
    plain = adamjax.adamw(0.1)
    around = adamjax.sharding.zero1(adamjax.transfer(plain, perceptron(8), params), axis="data", mesh=mesh)
    inside = adamjax.transfer(adamjax.sharding.zero1(plain, axis="data", mesh=mesh), perceptron(8), params)
    opt = adamjax.transfer(plain, perceptron(8), params)
    expected, _ = jax.jit(opt.step)(params, opt.init(params), params)
    for sharded in (around, inside):
        state = sharded.init(params)
        found, _ = jax.jit(sharded.step)(params, state, params)
        assert_close(found, expected, RECOMPILED)


def test_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    params = arrays(perceptron(16))
    opt = adamjax.transfer(adamjax.adamw(0.1), perceptron(8), params)
    state = opt.step(params, opt.init(params), params)[1]
    adamjax.checkpoint.save(tmp_path, opt, params, state, step=1)
    restored = adamjax.checkpoint.restore(tmp_path, opt, params)
    assert_equal(restored.state, state)
