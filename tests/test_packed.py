"""Packed moments: the numbers of the optimizer inside, in fewer arrays, wherever JAX and other parts take it."""

import shutil
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, by_step, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import FORMATS, KINDS, LR, ROUNDED, SPECS
from tolerances import FUSED, RECOMPILED

import adamjax
from adamjax import checkpoint, interop, schedules, sharding
from adamjax._core.schema import tree_schema
from adamjax._transforms import delivery
from adamjax._transforms.adam import AdamRule
from adamjax.kernels import _library
from adamjax.storage import PackedTree, QuantizedArray

pytestmark = pytest.mark.numbers

BELOW = 100
# Small ones of several shapes, one of no elements, and one that stays as it is: every leaf makes programs longer.
SHAPES = {"layers": [(6, 5)] * 3, "biases": [(4,)] * 2, "scale": (), "empty": (0, 2), "large": (12, 10)}
# With more of one shape than a group takes.
DEEP = SHAPES | {"layers": [(6, 5)] * 20}
MODES = [AxisType.Auto, AxisType.Explicit]


def numbers(seed=0, dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def unpacked(state):
    return jax.tree.map(
        lambda x: x.unpack() if isinstance(x, PackedTree) else x, state, is_leaf=lambda x: isinstance(x, PackedTree)
    )


def assert_same_run(packed, plain, params=None, grads=(1, 2, 3), tolerance=RECOMPILED, shapes=SHAPES):
    """Parameters, and all of the state but for how it is laid out, after some steps."""
    params = numbers(shapes=shapes) if params is None else params
    grads = [numbers(g, shapes=shapes) if isinstance(g, int) else g for g in grads]
    found, expected = (params, packed.init(params)), (params, plain.init(params))
    assert_equal(unpacked(found[1]), expected[1])
    steps = [jax.jit(by_step(opt)) for opt in (packed, plain)]
    for g in grads:
        found, expected = steps[0](*found, g), steps[1](*expected, g)
    # One compile for each pattern of gradients that are None.
    assert steps[0]._cache_size() == len({jax.tree.structure(g) for g in grads})
    assert_close((found[0], unpacked(found[1])), expected, tolerance)
    return found


# Schedule-free optimizers keep no first moment.
KINDS_WITH_MOMENTS = [name for name in KINDS if name != "schedule free"]


# Packing sees whether there is a maximum, and what is before and after the moments in the chain; the rule that steps
# them is elementwise, of whatever optimizer.
@pytest.mark.parametrize("name", [*KINDS_WITH_MOMENTS, "amsgrad paper nesterov", "adamw cautious", "ademamix"])
def test_the_numbers_are_those_of_the_optimizer_inside(name):
    opt = SPECS[name].make()
    assert_same_run(adamjax.packed(opt, BELOW), opt)


def test_the_numbers_of_several_groups():
    opt = adamjax.amsgrad(schedules.cosine(LR, 9))
    assert_same_run(adamjax.packed(opt, BELOW), opt, shapes=DEEP)


@pytest.mark.parametrize("dtype", ["float16", "complex64"])
def test_other_dtypes(dtype):
    opt = adamjax.amsgrad(LR)
    grads = [numbers(i, dtype) for i in range(3)]
    assert_same_run(adamjax.packed(opt, BELOW), opt, numbers(0, dtype), grads)


def test_a_group_has_one_dtype_and_groups_are_alike():
    shapes = SHAPES | {"layers": [(6, 5)] * 35, "biases": [(4,)] * 3}
    params = numbers(shapes=shapes) | {"half": numbers(0, "bfloat16", [(6, 5)] * 2)}
    state = adamjax.packed(adamjax.adam(), BELOW).init(params)[0]
    leaves = jax.tree.leaves(params)
    assert [len(places) for places in state.mu.layout] == [16, 16, 8, 2]
    for places in state.mu.layout:
        assert all(leaves[number].shape == shape and leaves[number].size < BELOW for number, shape in places)
        assert len({leaves[number].dtype for number, _ in places}) == 1
    assert [x.shape for x in state.mu.groups] == [(480,), (480,), (103,), (60,)]
    assert state.mu.shapes[0] == state.mu.shapes[1]  # and compiled once
    assert jax.tree.leaves(state.mu.rest) == [state.mu.rest["large"]]
    assert adamjax.packed(adamjax.adam(), 1).init(params)[0].mu.shapes == (((0, 2),),)


def test_moments_of_groups_have_the_dtypes_of_others():
    params = numbers(dtype="bfloat16")
    for mu_dtype, nu_dtype in ((None, None), (jnp.bfloat16, None), (jnp.float16, jnp.bfloat16)):
        opt = adamjax.amsgrad(mu_dtype=mu_dtype, nu_dtype=nu_dtype)
        plain, packed = opt.init(params)[0], adamjax.packed(opt, BELOW).init(params)[0]
        assert {x.dtype for x in packed.mu.groups} == {plain.mu["scale"].dtype}
        assert {x.dtype for x in packed.nu.groups + packed.nu_max.groups} == {plain.nu["scale"].dtype}


def test_gradients_of_several_dtypes():
    opt, grads = adamjax.adamw(LR), numbers(1)
    grads["layers"] = [g.astype("bfloat16" if i % 2 else "float16") for i, g in enumerate(grads["layers"])]
    assert_same_run(adamjax.packed(opt, BELOW), opt, grads=[grads])


def test_what_is_quantised_stays():
    def keep(path):
        return path == "layers/3"

    int8 = adamjax.quantized("int8", block_size=8, min_size=30, keep=keep)
    opt, shapes = adamjax.adam(LR, mu_dtype=int8), SHAPES | {"layers": [(6, 5)] * 4}
    found = adamjax.packed(opt, BELOW).init(numbers(shapes=shapes))[0].mu
    # The biases, the empty one, the layer that is kept, and the scale: in the order of the tree.
    assert {number for places in found.layout for number, _ in places} == {0, 1, 2, 7, 8}
    rest = jax.tree.leaves(found.rest, is_leaf=lambda x: isinstance(x, QuantizedArray))
    assert sum(isinstance(x, QuantizedArray) for x in rest) == 4
    assert_same_run(adamjax.packed(opt, BELOW), opt, shapes=shapes)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_moments_are_right_on_average(name):
    mu_dtype, nu_dtype = FORMATS[name]
    opt = adamjax.packed(adamjax.adam(1.0, mu_dtype=mu_dtype, nu_dtype=nu_dtype))
    params, grads = [jnp.zeros(500)] * 20, [jnp.full(500, 0.3)] * 20
    _, (adam, _) = jax.lax.fori_loop(0, 100, lambda _, c: opt.step(grads, c[1], c[0]), (params, opt.init(params)))
    nu = np.asarray(adam.nu.unpack(), np.float64)
    np.testing.assert_allclose(np.mean(nu), 0.09 * (1 - 0.999**100), rtol=2e-3)
    assert len(np.unique(nu[0])) > 1
    assert not np.array_equal(nu[0], nu[1])


DEEP_GRADS = numbers(5, shapes=DEEP)
FROZEN = {
    "one": {"scale": None},
    "some": {"layers": [None if i % 3 else g for i, g in enumerate(DEEP_GRADS["layers"])], "large": None},
    "a group": {"layers": [None if i < 16 else g for i, g in enumerate(DEEP_GRADS["layers"])]},
    "all": jax.tree.map(lambda _: None, DEEP_GRADS),
}


# What is frozen is decided by the gradients, and what is kept of it is the same whatever its dtype.
@pytest.mark.parametrize(("which", "moments"), [*((which, None) for which in FROZEN), ("some", jnp.bfloat16)])
def test_none_freezes(which, moments):
    shapes = SHAPES if which == "one" else DEEP
    opt = adamjax.packed(adamjax.amsgrad(LR, mu_dtype=moments, nu_dtype=moments), BELOW)
    params, grads = numbers(shapes=shapes), numbers(1, shapes=shapes) | FROZEN[which]
    params, state = jax.jit(by_step(opt))(params, opt.init(params), numbers(2, shapes=shapes))
    new_params, new = jax.jit(by_step(opt))(params, state, grads)
    flat, structure = jax.tree.flatten(grads, is_leaf=lambda x: x is None)
    kept = zip(unpacked(state[0][1:]), unpacked(new[0][1:]), strict=True)
    for before, after in ((params, new_params), *kept):
        for g, a, b in zip(flat, structure.flatten_up_to(before), structure.flatten_up_to(after), strict=True):
            if g is None:
                assert_equal(b, a)
            else:
                assert g.size == 0 or not np.array_equal(a, b)
    assert new[0].count == 2
    if moments is None:
        plain = adamjax.amsgrad(LR)
        assert_same_run(opt, plain, params, [numbers(2, shapes=shapes), grads])


def kernels_only(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMIZERS = {
    "mask": adamjax.adamw(LR, weight_decay=0.1, mask=kernels_only),
    "coupled mask": adamjax.adam(LR, weight_decay=schedules.linear(0.1, 0.0, 9), mask=kernels_only, maximize=True),
    "groups": adamjax.groups({"biases": {"weight_decay": 0.0}}, default=adamjax.adamw(LR, weight_decay=0.1)),
    "groups that overlap": adamjax.groups(
        {"biases": {"weight_decay": 0.0}, "0": {"learning_rate": adamjax.scale(0.1)}},
        default=adamjax.adamw(LR, weight_decay=0.1),
    ),
    "clipped": adamjax.chain(adamjax.clip_by_global_norm(0.1), adamjax.adamw(LR)),
    "optax around": adamjax.chain(optax.clip(0.1), adamjax.scale_by_adam(), optax.scale_by_learning_rate(LR)),
    "two in a chain": adamjax.chain(adamjax.scale_by_radam(), adamjax.adam(1.0), adamjax.scale_by_learning_rate(LR)),
    "skip": adamjax.skip_nonfinite(adamjax.adamw(LR)),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_chains_groups_and_wrappers(name):
    opt = OPTIMIZERS[name]
    assert_same_run(adamjax.packed(opt, BELOW), opt)


WRAPPERS = {
    **ROUNDED,
    "skip": adamjax.skip_nonfinite,
    "loss scale": adamjax.dynamic_loss_scale,
    "zero1": lambda opt: sharding.zero1(opt, axis="data"),
    "chain": lambda opt: adamjax.chain(adamjax.clip_by_global_norm(1.0), opt),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_and_around_is_the_same(name):
    opt = WRAPPERS[name](adamjax.adamw(LR))
    packed = adamjax.packed(opt, BELOW)
    assert packed == WRAPPERS[name](adamjax.packed(adamjax.adamw(LR), BELOW)) != opt
    if name != "zero1":
        params = numbers(dtype="bfloat16")
        found, _ = assert_same_run(packed, opt, params)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))


def test_where_jax_takes_it():
    plain, opt, params = adamjax.adamw(LR), adamjax.packed(adamjax.adamw(LR), BELOW), numbers()
    grads = numbers(1)

    def scanned(opt):
        return jax.lax.scan(lambda c, _: (opt.step(grads, c[1], c[0]), None), (params, opt.init(params)), length=3)[0]

    found, expected = scanned(opt), scanned(plain)
    assert_close((found[0], unpacked(found[1])), expected, RECOMPILED)

    def population(pack):
        opts = jax.vmap(lambda rate: pack(adamjax.adamw(rate)))(jnp.asarray([0.1, 0.01]))
        return jax.vmap(lambda opt: opt.step(grads, opt.init(params), params))(opts)

    found, expected = population(lambda opt: adamjax.packed(opt, BELOW)), population(lambda opt: opt)
    assert_close((found[0], unpacked(found[1])), expected, RECOMPILED)

    def after(pack, rate, params):
        opt = pack(adamjax.adamw(rate))
        new, _ = opt.step(grads, opt.init(params), params)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(new))

    slopes = [
        jax.jit(jax.grad(lambda *x, pack=pack: after(pack, *x), argnums=(0, 1)))(0.1, params)
        for pack in (lambda opt: adamjax.packed(opt, BELOW), lambda opt: opt)
    ]
    assert_close(*slopes, 4 * RECOMPILED)


def test_an_abstract_state_is_like_a_real_one():
    opt, params = adamjax.packed(adamjax.amsgrad(), BELOW), numbers()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    real, abstract = opt.init(params), opt.init(shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(real) == jax.tree.structure(jax.jit(opt.init)(params))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(real)
    ]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))


def test_all_buffers_are_used_again_and_little_more_is_needed():
    opt = adamjax.packed(adamjax.adamw(LR))
    params = [jnp.ones(4000) for _ in range(64)] + [jnp.ones((256, 256))]
    state = opt.init(params)
    memory = jax.jit(by_step(opt), donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves((params, state)))
    small = 64 * 4000 * 4
    assert memory.temp_size_in_bytes < 2.1 * small


def test_traced_once_per_distinct_group_and_leaf(monkeypatch):
    steps, leaves = [], []
    accumulate, add = AdamRule.accumulate, delivery._add
    monkeypatch.setattr(AdamRule, "accumulate", lambda *a: steps.append(a) or accumulate(*a))
    monkeypatch.setattr(delivery, "_add", lambda *a: leaves.append(a) or add(*a))
    opt = adamjax.packed(adamjax.adamw(LR))
    params = [jnp.ones(50 + i % 4) for i in range(1000)]
    jax.jit(opt.step).lower(params, opt.init(params), params)
    assert len(steps) <= 4 + 3  # of one shape, and what is left of all
    assert len(leaves) == 4


def test_moments_go_in_and_out(lenient):
    params, plain, packed = numbers(), adamjax.adam(LR), adamjax.packed(adamjax.adam(LR), BELOW)
    step = jax.jit(by_step(plain))
    params, (adam, _) = step(params, plain.init(params), numbers(1))
    start = packed.init(params)[0]
    taken = adamjax.AdamState(adam.count, start.mu.pack(adam.mu), start.nu.pack(adam.nu))
    assert_equal(unpacked(taken), adam)
    expected = step(params, (adam, ()), numbers(2))
    found = jax.jit(by_step(packed))(params, (taken, ()), numbers(2))
    assert_close((found[0], unpacked(found[1])), expected, RECOMPILED)
    theirs = optax.adam(LR)
    _, state = jax.jit(theirs.update)(numbers(1), theirs.init(params), params)
    imported = interop.optax.import_state(packed, params, state)
    assert_equal(interop.optax.export_state(packed, imported)[0], state[0])
    assert_equal(optax.tree_utils.tree_get(imported, "mu").unpack(), state[0].mu)


def test_tools_name_leaves():
    opt, plain = adamjax.packed(adamjax.adamw(LR), BELOW), adamjax.adamw(LR)
    shapes = {"layers": [(6, 5)] * 3, "biases": [(4,)] * 3, "large": (12, 10)}
    params, grads = numbers(shapes=shapes), numbers(1, shapes=shapes)

    @partial(jax.jit, static_argnums=0)
    def measured(opt, grads):
        updates, state = opt.update(grads, opt.init(params), params)
        return adamjax.diagnostics.measure(grads, updates, state, params, opt=opt), state

    stats, state = measured(opt, grads)
    assert "layers/2" in stats.paths
    expected, _ = measured(plain, grads)
    assert_close(stats, expected, RECOMPILED)
    adamjax.check(state)
    bad = grads | {"biases": [grads["biases"][0], grads["biases"][1] * jnp.inf, grads["biases"][2]]}
    with pytest.raises(FloatingPointError, match="not finite at 0/mu/biases/1"):
        adamjax.check(measured(opt, bad)[1])


def test_a_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    opt, params = adamjax.packed(adamjax.adamw(LR), BELOW), numbers()
    params, state = jax.jit(by_step(opt))(params, opt.init(params), numbers(1))
    checkpoint.save(tmp_path, opt, params, state, step=1)
    assert_equal(checkpoint.restore(tmp_path, opt, params).state, state)
    with pytest.raises(ValueError, match="is of another optimizer"):
        checkpoint.restore(tmp_path, adamjax.adamw(LR), params)
    with pytest.raises(ValueError, match="below"):
        checkpoint.restore(tmp_path, adamjax.packed(adamjax.adamw(LR)), params)


def place(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(jnp.copy(x), NamedSharding(mesh, spec)), tree, specs)


def test_counts_are_on_the_mesh_where_all_is_packed():
    mesh, opt = make_mesh(AxisType.Auto), adamjax.packed(adamjax.adamw(schedules.cosine(LR, 9)))
    params = jax.device_put({"a": jnp.ones(3)}, NamedSharding(mesh, P()))
    state, step = opt.init(params), jax.jit(by_step(opt))
    step(*step(params, state, params), params)
    assert step._cache_size() == 1


@pytest.mark.parametrize(("kind", "spread"), [(AxisType.Auto, False), (AxisType.Auto, True), (AxisType.Explicit, True)])
def test_on_many_devices(kind, spread):
    """Groups are whole on each; the parameters come back where they were, and nothing compiles twice."""
    mesh = make_mesh(kind, (2, 2), ("data", "model"))
    params = numbers(shapes={"small": [(6, 4)] * 4, "large": (12, 10)})
    # As a compiled program names them: else a second one is compiled, packed or not.
    end = [None] if kind == AxisType.Explicit else []
    small = P("model", *end) if spread else P(*end, *end)
    specs = {"small": [small] * 4, "large": P(None, "model")}
    opt, plain = adamjax.packed(adamjax.adamw(LR), BELOW), adamjax.adamw(LR)
    with jax.set_mesh(mesh):
        placed = place(params, mesh, specs)
        state, step = opt.init(placed), jax.jit(by_step(opt), donate_argnums=(0, 1))
        where = [x.sharding for x in jax.tree.leaves((placed, state))]
        grads = place(params, mesh, specs)
        found = step(*step(placed, state, grads), grads)
    assert step._cache_size() == 1
    after = [x.sharding for x in jax.tree.leaves(found)]
    assert all(a.is_equivalent_to(b, x.ndim) for a, b, x in zip(after, where, jax.tree.leaves(found), strict=True))
    assert all(x.sharding.is_fully_replicated for x in found[1][0].mu.groups)
    alone = jax.jit(by_step(plain))
    expected = alone(*alone(params, plain.init(params), params), params)
    assert_close((found[0], unpacked(found[1])), expected, RECOMPILED)


@pytest.mark.parametrize("kind", MODES)
def test_with_zero1(kind):
    mesh = make_mesh(kind, (2,))
    params = numbers(shapes={"small": [(8, 4)] * 4, "large": (12, 10)})
    plain = sharding.zero1(adamjax.adamw(LR), axis="data")
    opt = adamjax.packed(plain, BELOW)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P()))
        found, expected = (jax.jit(by_step(o))(placed, o.init(placed), placed) for o in (opt, plain))
    assert found[1].inner[0].mu.rest["large"].sharding.spec[0] == "data"
    assert all(x.sharding.is_fully_replicated for x in found[1].inner[0].mu.groups)
    assert_close((found[0], unpacked(found[1].inner)), (expected[0], expected[1].inner), RECOMPILED)
    assert "packed" in sharding.describe(adamjax.kahan(opt.inner), jax.tree.map(lambda p: p.astype("bfloat16"), placed),
                                         zero_axis="data")  # fmt: skip


@pytest.mark.parametrize("rounded", [False, True])
def test_inside_shard_map(rounded):
    """By itself, and spread by zero1_mapped, whatever else is kept of small parameters."""
    mesh = make_mesh(AxisType.Auto, (2,))
    params = numbers(dtype="bfloat16" if rounded else "float32", shapes={"small": [(8, 4)] * 4, "large": (12, 10)})
    plain = adamjax.kahan(adamjax.adamw(LR)) if rounded else adamjax.adamw(LR)
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    expected = jax.jit(by_step(plain))(params, plain.init(params), params)
    for opt in (adamjax.packed(plain, BELOW), sharding.zero1_mapped(adamjax.packed(plain, BELOW), axis="data")):
        state = opt.init(placed)
        specs = jax.tree.map(lambda x: x.sharding.spec, state)

        def body(params, state, opt=opt):
            return opt.step(params, state, params)

        mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs))
        found = jax.jit(mapped)(placed, state)
        assert_close((found[0], unpacked(found[1])), expected, 2**-7 if rounded else RECOMPILED)


GOOD = adamjax.packed(adamjax.adam(), BELOW)
SMALL = {"a": jnp.ones((4, 2)), "b": jnp.ones(4)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adamjax.packed(adamjax.adam), TypeError, "argument opt of packed is"),
        (lambda: adamjax.packed(optax.adam(1e-3)), TypeError, "found nothing to pack in .*optax's keep is not known"),
        (lambda: adamjax.packed(interop.torch.adam()), TypeError, "adamjax.interop.torch are kept for each parameter"),
        (lambda: adamjax.packed(adamjax.chain(GOOD, adamjax.adam())), ValueError, "is packed already"),
        (
            lambda: adamjax.packed(adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(cautious=True))),
            ValueError,
            r"cautious=True.* steps by a mean over each parameter, .*leave packed out, or the option \(cautious=False",
        ),
        (
            lambda: adamjax.packed(adamjax.stable_adamw()),
            ValueError,
            "ScaleByStableAdam.* steps by a mean over each parameter, .*adamw in place of stable_adamw",
        ),
        (lambda: adamjax.packed(adamjax.adam(), 0), ValueError, "Invalid below value: 0; below must be at least 1"),
        (
            lambda: adamjax.packed(adamjax.adam(), cast(Any, 1e4)),
            TypeError,
            "Invalid below value: 10000.0; below must be an int",
        ),
        (
            lambda: GOOD.update(SMALL, adamjax.adam().init(SMALL)),
            TypeError,
            r"state\.mu of packed is dict, expected PackedTree: call init.*state\.mu\.pack\(moments\)",
        ),
        (lambda: adamjax.adam().update(SMALL, GOOD.init(SMALL)), ValueError, r"state\.mu, expected a PackedTree"),
        (
            lambda: GOOD.update(SMALL | {"a": jnp.ones(2)}, GOOD.init(SMALL)),
            ValueError,
            r"the gradient for state\.mu\['a'\] has shape \(2,\), expected \(4, 2\)",
        ),
        (lambda: GOOD.update({"a": SMALL["a"]}, GOOD.init(SMALL)), ValueError, r"the gradients lack state\.mu\['b'\]"),
        (
            lambda: GOOD.update(SMALL, (GOOD.init(SMALL)[0]._replace(nu=GOOD.init([SMALL["b"]] * 3)[0].nu), ())),
            ValueError,
            r"state\.nu has other groups than state\.mu",
        ),
        (
            lambda: jax.shard_map(
                lambda p: GOOD.step(p, GOOD.init(p), p),
                mesh=make_mesh(AxisType.Auto, (2,)),
                in_specs=({"a": P("data"), "b": P()},),
                out_specs=P(),
            )(SMALL),
            ValueError,
            r"differ over other axes .*params\['b'\] over none and that for params\['a'\] over 'data'",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
# A group of 16 and one of what is left, larger than the crossover together; and a parameter that is, by itself.
MANY = {"layers": [(40, 50)] * 18, "biases": [(7,), ()], "large": (130, 130)}


def fused_pair(make=adamjax.adamw, **options):
    return adamjax.packed(make(LR, fused=True, **options)), adamjax.packed(make(LR, **options))


def assert_near(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b)) <= FUSED * float(jnp.finfo("float32").eps) * (np.max(np.abs(b)) + 1)


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize(
    "options",
    [
        {"make": adamjax.amsgrad, "nesterov": True, "maximize": True},
        {"mask": kernels_only},
        {"make": adamjax.adam, "weight_decay": 0.1, "mask": kernels_only, "eps_root": 1e-4},
        {"make": adamjax.amsgrad, "mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16},
    ],
)
def test_fused_groups(options, one_device):
    fused, plain = fused_pair(**options)
    params = numbers(shapes=MANY)
    found = expected = params, plain.init(params)
    assert_equal(fused.init(params), found[1])
    steps = [jax.jit(by_step(opt)) for opt in (fused, plain)]
    kernel = _library.target()
    text = steps[0].lower(*found, params).as_text()
    assert text.count(f"{kernel}-group") == 2  # one function for each group
    for i in range(3):
        g = numbers(i, shapes=MANY)
        if i == 2:
            g["layers"][17] = g["large"] = None
        found, expected = steps[0](*found, g), steps[1](*expected, g)
        assert_near(found[0], expected[0])
        if "mu_dtype" in options:  # with the same random numbers
            for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
                assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3
        else:
            assert_near(found[1], expected[1])
        found = expected


@COMPILER
def test_fused_groups_of_half_precision_in_place(one_device):
    fused, plain = fused_pair()
    params, grads = numbers(0, "bfloat16", MANY), numbers(1, "float16", MANY)
    expected = jax.jit(by_step(plain))(params, plain.init(params), grads)
    advance = jax.jit(by_step(fused), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, (params, fused.init(params)))
    memory = advance.lower(params, state, grads).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5000
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves((params, state)))
    found = advance(params, state, grads)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3 or a.dtype == jnp.float32
    assert_near(found[1], expected[1])


@COMPILER
@pytest.mark.parametrize("devices", [1, 8])
def test_fused_groups_where_jax_takes_them(devices, request):
    if devices == 1:
        request.getfixturevalue("one_device")
    fused, plain = fused_pair()
    params, grads = numbers(shapes=MANY), numbers(1, shapes=MANY)

    def many(opt):
        stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
        return jax.vmap(opt.step, in_axes=(None, 0, 0))(grads, jax.vmap(opt.init)(stacked), stacked)

    def slopes(make, rate, params):
        opt = make(rate)
        new, _ = opt.step(grads, opt.init(params), params)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(new))

    def step(opt):
        return jax.jit(lambda: (many(opt), opt.step(grads, opt.init(params), params)))()

    assert_near(step(fused), step(plain))
    found, expected = (
        jax.jit(jax.grad(lambda *x, kw=kw: slopes(lambda r: adamjax.packed(adamjax.adamw(r, **kw)), *x), (0, 1)))
        for kw in ({"fused": True}, {})
    )
    assert_close(found(0.1, params), expected(0.1, params), 1e-4)


@COMPILER
def test_fused_groups_on_many_devices():
    """By XLA, which brings parameters back where they were; in shard_map, each device by the kernel."""
    fused, plain = fused_pair()
    mesh, params = make_mesh(AxisType.Auto, (2,)), numbers(shapes=MANY)
    expected = jax.jit(by_step(plain))(params, plain.init(params), params)
    specs = jax.tree.map(lambda p: P("data") if p.ndim > 1 else P(), params)
    placed = place(params, mesh, specs)
    found = jax.jit(by_step(fused))(placed, fused.init(placed), placed)
    for x, spec in zip(jax.tree.leaves(found[0]), jax.tree.leaves(specs), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    assert_near(jax.device_get(found), expected)
    mapped = jax.jit(jax.shard_map(by_step(fused), mesh=mesh, in_specs=P(), out_specs=P()))
    operands = params, fused.init(params), params
    assert mapped.lower(*operands).as_text().count(f"{_library.target()}-group") == 2
    assert_near(jax.device_get(mapped(*operands)), expected)


@COMPILER
def test_fused_refuses_groups_that_it_cannot_step(one_device):
    params = {"a": jnp.ones(3, jnp.complex64)}
    opt = adamjax.packed(adamjax.adam(fused=True))
    with pytest.raises(ValueError, match=r"fused=True cannot step params\['a'\]: its parameter is complex64"):
        opt.step(params, opt.init(params), params)


def test_checkpoints_of_0_1_0_describe_packed_moments_alike():
    state = adamjax.packed(adamjax.adam(LR)).init({"b": jnp.zeros(3)})
    assert tree_schema("state", state)["state[0].mu"] == "PackedTree (((0, (3,)),),)"
