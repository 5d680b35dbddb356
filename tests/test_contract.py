"""Every public optimizer through every rule that holds for all of them."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, assert_same_types, aval
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from specs import FORMATS, GRID, KINDS, LR, ROUNDED, SPECS, STORED
from tolerances import RECOMPILED

import adamjax
from adamjax._transforms.adam import AdamRule

HALVES = ("bfloat16", "float16", "float32")
PAIRS = [(p, g) for p in HALVES for g in HALVES] + [("complex64", "complex64"), ("complex64", "float32")]
PAIRS_X64 = [("float64", "float64"), ("float64", "bfloat16"), ("float32", "float64"), ("complex128", "complex64")]

STORED_KINDS = ("amsgrad int8", "adam int4", "torch's nadam", "kahan", "schedule free int8", "average bfloat16")
# What becomes of a dtype is decided where all optimizers share the code: each kind takes every pair, the others some.
PAIRED = [(name, *pair) for name in SPECS for pair in (PAIRS if name in KINDS else [PAIRS[1], PAIRS[-1]])]
PAIRED_X64 = [(name, *pair) for name in SPECS for pair in (PAIRS_X64 if name in KINDS else PAIRS_X64[:1])]


def tree(dtype, seed=0):
    """Matrices, vectors, a scalar, nothing at all, and an absent leaf."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        x = rng.normal(size=shape)
        return jnp.asarray(x + 1j * rng.normal(size=shape) if dtype.startswith("complex") else x, dtype)

    return {"kernel": draw(4, 5), "bias": (draw(5), None), "scale": draw(), "empty": draw(0, 2)}


def small_tree(dtype, seed=0):
    """A matrix and a scalar: each further shape is one more program."""
    return {name: x for name, x in tree(dtype, seed).items() if name in ("kernel", "scale")}


ALL = SPECS | STORED


def types(tree):
    """Shape, dtype and, where it is part of the type, sharding of each leaf."""
    return [jax.typeof(x) for x in jax.tree.leaves(tree)]


def half(name):
    """The dtype of parameters with which an optimizer does what is its own."""
    return "bfloat16" if name in ROUNDED else "float32"


def check_types(opt, p_dtype, g_dtype):
    """Types before and after an update are the same: one compile, stable carries. Nothing is computed."""
    params, grads = tree(p_dtype), tree(g_dtype, seed=1)
    state = opt.init(params)
    updates, new_state = jax.eval_shape(opt.update, grads, state, params)
    assert_same_types(new_state, state)
    assert_same_types(updates, params)
    assert not any(x.weak_type for x in jax.tree.leaves((updates, new_state)))
    assert_same_types(jax.eval_shape(adamjax.apply_updates, params, updates), params)
    assert_same_types(jax.eval_shape(opt.init, params), state)


@pytest.mark.parametrize(("name", "p_dtype", "g_dtype"), PAIRED)
def test_types_are_stable(name, p_dtype, g_dtype):
    check_types(SPECS[name].make(), p_dtype, g_dtype)


@pytest.mark.parametrize(("name", "p_dtype", "g_dtype"), PAIRED_X64)
def test_types_are_stable_in_x64(name, p_dtype, g_dtype):
    with jax.enable_x64(True):
        check_types(SPECS[name].make(), p_dtype, g_dtype)


# Moments are stored the same way whatever optimizer they are of: AMSGrad has all three, the others take one format.
@pytest.mark.parametrize(
    ("make", "name"),
    [(adamjax.amsgrad, name) for name in FORMATS]
    + [(make, "int4 int8") for make in (adamjax.adamw, adamjax.nadam, adamjax.radam, adamjax.adamax)],
)
@pytest.mark.parametrize("p_dtype", [*HALVES, "complex64"])
def test_types_are_stable_in_every_format(make, name, p_dtype):
    mu_dtype, nu_dtype = FORMATS[name]
    if p_dtype == "complex64" and mu_dtype in (jnp.bfloat16, jnp.float16):
        pytest.skip("a real mu_dtype is refused for complex parameters")
    opt = make(LR, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    check_types(opt, p_dtype, p_dtype)
    if make is adamjax.amsgrad:  # which stores all three moments
        with jax.enable_x64(True):
            check_types(opt, p_dtype, p_dtype)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("g_dtype", HALVES)
def test_types_are_stable_with_rounded_parameters(name, g_dtype):
    """Updates are float32 where the parameters are not, and end as the parameters were."""
    opt = ALL[name].make()
    params = tree("bfloat16") | {"wide": jnp.ones(3)}
    grads = tree(g_dtype, seed=1) | {"wide": jnp.ones(3, g_dtype)}
    state = opt.init(params)
    updates, new_state = jax.eval_shape(opt.update, grads, state, params)
    assert_same_types(new_state, state)
    assert all(x.dtype == "float32" and not x.weak_type for x in jax.tree.leaves(updates))
    assert_same_types(jax.eval_shape(adamjax.apply_updates, params, updates), params)
    assert_same_types(jax.eval_shape(opt.init, params), state)


@pytest.mark.parametrize(
    ("name", "p_dtype", "g_dtype"),
    [(name, "float16", "bfloat16") for name in GRID]
    + [(name, "complex64", "float32") for name in KINDS]
    + [(name, "bfloat16", "float16") for name in STORED],
)
def test_two_steps_compile_once_and_transfer_nothing(name, p_dtype, g_dtype):
    opt = ALL[name].make()
    params, grads = tree(p_dtype), tree(g_dtype, seed=1)
    step, state = jax.jit(opt.step), opt.init(params)
    with jax.transfer_guard("disallow"):
        first = step(grads, state, params)
        second = step(grads, first[1], first[0])
    assert step._cache_size() == 1
    assert_same_types(second, (params, state))
    assert all(np.all(np.isfinite(np.asarray(x, np.complex64))) for x in jax.tree.leaves(second))


@pytest.mark.parametrize("p_dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_default_state_dtypes(p_dtype):
    """Moments are float32 whatever the parameters; the second is real."""
    state = adamjax.scale_by_adam(amsgrad=True).init(tree(p_dtype))
    first = "complex64" if p_dtype == "complex64" else "float32"
    assert all(x.dtype == first for x in jax.tree.leaves(state.mu))
    assert all(x.dtype == "float32" for x in jax.tree.leaves((state.nu, state.nu_max)))
    assert state.count.dtype == "int32"
    assert adamjax.scale_by_adam().init(tree(p_dtype)).nu_max is None


@pytest.mark.parametrize("name", [*KINDS, *STORED_KINDS])
def test_eager_scan_and_cond_agree_with_jit(name):
    opt = ALL[name].make()
    params, grads = small_tree(half(name)), small_tree("float32", seed=1)
    state = jax.jit(opt.init)(params)

    def step(params, state):
        return opt.step(grads, state, params)

    @jax.jit
    def in_control_flow(go, carry):
        scanned, _ = jax.lax.scan(lambda c, _: (step(*c), None), carry, length=2)
        return scanned, jax.lax.cond(go, lambda c: step(*step(*c)), lambda c: c, carry)

    compiled = jax.jit(step)
    expected = compiled(*compiled(params, state))
    results = [*in_control_flow(True, (params, state))]
    if name in ("adamw schedules", "amsgrad int8", "kahan"):  # eagerly, each operation is a program
        results.append(step(*step(params, state)))
    for found in results:
        assert_close(found, expected, RECOMPILED)
        assert_same_types(found, expected)


# In bfloat16 the step adds before it rounds; in float32 there is nothing to round, whatever the optimizer.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in [*GRID, *STORED]] + [(name, "float32") for name in [*KINDS, *STORED_KINDS]],
)
def test_step_is_update_and_apply(name, dtype):
    opt = ALL[name].make()
    params, grads = small_tree(dtype), small_tree(dtype, seed=1)

    @jax.jit
    def both(params, grads):
        state = opt.init(params)
        updates, new_state = opt.update(grads, state, params)
        return (adamjax.apply_updates(params, updates), new_state), opt.step(grads, state, params)

    apart, whole = both(params, grads)
    assert_equal(apart, whole)


@pytest.mark.parametrize("name", SPECS)
def test_params_are_needed_only_by_weight_decay(name):
    opt, params, grads = SPECS[name].make(), tree("float32")["bias"], tree("float32", seed=1)["bias"]
    state = opt.init(params)
    if SPECS[name].needs_params:
        with pytest.raises(ValueError, match=r"needs the parameters: call update\(grads, state, params\)"):
            opt.update(grads, state)
    else:
        both = jax.jit(lambda grads, params: (opt.update(grads, state), opt.update(grads, state, params)))
        assert_equal(*both(grads, params))


def test_update_without_params_has_the_dtype_of_the_gradient():
    for dtype in (*HALVES, "complex64"):
        g = tree(dtype)
        state = adamjax.adam(LR).init(tree("complex64" if dtype == "complex64" else "float32"))
        updates, _ = jax.eval_shape(adamjax.adam(LR).update, g, state)
        assert_same_types(updates, g)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in [*GRID, *STORED]] + [(name, "float32") for name in KINDS],
)
def test_every_buffer_is_donated_and_aliased(name, dtype):
    opt = ALL[name].make()
    params = {k: jnp.ones((64, 64), dtype) for k in "ab"}
    state = opt.init(params)
    step = jax.jit(opt.step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    memory = step.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == held
    new_params, new_state = step(jax.tree.map(jnp.copy, params), state, params)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new_params, new_state)))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_compiles_once_and_is_aliased(name):
    """All three moments, and the parameters, are updated in place."""
    mu_dtype, nu_dtype = FORMATS[name]
    opt = adamjax.amsgrad(LR, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    params = {"a": jnp.ones((64, 72))}
    grads, state = jax.tree.map(jnp.copy, params), opt.init(params)
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    step = jax.jit(opt.step, donate_argnums=(1, 2))
    assert step.lower(grads, state, params).compile().memory_analysis().alias_size_in_bytes == held
    for _ in range(2):
        params, state = step(grads, state, params)
    assert step._cache_size() == 1


@pytest.mark.parametrize("jit", [False, True])
def test_no_buffer_is_shared_between_leaves(jit):
    for name in [*GRID, *STORED]:
        opt = ALL[name].make()
        params = {k: jnp.ones((8, 8), half(name)) for k in "ab"}
        state = (jax.jit(opt.init) if jit else opt.init)(params)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
        assert len(set(pointers)) == len(pointers), name


@pytest.mark.parametrize("name", [*GRID, *STORED])
def test_abstract_init_allocates_nothing(name):
    opt = ALL[name].make()
    real = opt.init(tree("bfloat16"))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), tree("bfloat16"))
    abstract = opt.init(shapes)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(real)
    ]
    evaluated = jax.eval_shape(opt.init, shapes)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(evaluated)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(real)
    ]


def test_abstract_init_keeps_shardings():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    state = adamjax.scale_by_adam().init(jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding))
    assert state.mu.sharding == state.nu.sharding == sharding


# In Explicit mode each operation says where its result is; in Auto mode, the compiler does, for all kinds alike.
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, AxisType.Explicit) for name in [*KINDS, *STORED_KINDS]]
    + [(name, AxisType.Auto) for name in ("adamw schedules", "amsgrad int8", "torch's nadam", "kahan")],
)
def test_sharded_state_follows_the_parameters(name, kind):
    """Eager and jitted; and the numbers are those of one device."""
    opt = ALL[name].make()
    params, grads = jnp.linspace(-1, 1, 128).reshape(2, 64), jnp.linspace(2, -2, 128).reshape(2, 64)
    params = params.astype(half(name))
    expected = jax.jit(lambda p, g: opt.step(g, opt.init(p), p))(params, grads)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    with jax.set_mesh(mesh):
        p, g = jax.device_put((params, grads), sharding)
        state = opt.init(p)
        assert all(x.sharding == sharding for x in jax.tree.leaves(state) if x.ndim)
        found = jax.jit(opt.step)(g, state, p)
        assert types(found[1]) == types(state)
        assert types(jax.jit(opt.init)(p)) == types(state)
        if name in ("adamw schedules", "kahan"):  # one program for each operation of the others says no more
            assert types(opt.step(g, state, p)[1]) == types(state)
        assert jax.typeof(found[0]) == jax.typeof(p)
    assert_close(jax.device_get(found), jax.device_get(expected), RECOMPILED)


# Whole blocks on each device, and blocks, of 4 bits even bytes, that devices share; floats have none.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "columns"), [("bfloat16", 20), ("int8", 64), ("int4", 20)])
def test_stochastic_rounding_does_not_depend_on_the_sharding(name, columns):
    mu_dtype, nu_dtype = FORMATS[name]
    opt = adamjax.stochastic_rounding(adamjax.amsgrad(LR, mu_dtype=mu_dtype, nu_dtype=nu_dtype))
    params = jnp.linspace(-1, 1, 8 * columns).reshape(8, columns).astype(jnp.bfloat16)
    expected = jax.device_get(jax.jit(lambda p: opt.step(p, opt.init(p), p))(params))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            p = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x", "y")))
            state = opt.init(p)
            found = jax.jit(opt.step)(p, state, p)
            assert types(found[1]) == types(state)
        assert_equal(jax.device_get(found), expected)
        abstract = opt.init(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding))
        if kind == AxisType.Explicit:
            for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
                assert not b.ndim or a.sharding == b.sharding


@pytest.mark.parametrize("kind", KINDS)
def test_none_gradients_freeze(kind):
    opt, params, grads = SPECS[kind].make(), tree("float32"), tree("float32", seed=1)
    params, state = jax.jit(opt.step)(grads, opt.init(params), params)
    frozen = grads | {"kernel": None, "bias": None}
    updates, new_state = jax.jit(opt.update)(frozen, state, params)
    assert_equal(updates["kernel"], jnp.zeros((4, 5)))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    new_params, _ = jax.jit(opt.step)(frozen, state, params)
    for name in ("kernel", "bias"):
        assert_equal(new_params[name], params[name])
    assert_same_types(new_state, state)
    whole, whole_state = jax.jit(opt.update)(grads, state, params)
    assert_equal(updates["scale"], whole["scale"])
    for before, after, moving in zip(state, new_state, whole_state, strict=True):
        if isinstance(before, adamjax.AdamState):
            assert_equal(after.mu["kernel"], before.mu["kernel"])
            assert_equal(after.nu["bias"], before.nu["bias"])
            assert_equal(after.nu["scale"], moving.nu["scale"])
            assert after.count == before.count + 1


@pytest.mark.parametrize("empty", [{}, (), None, {"a": None}, [{}, []]])
def test_empty_trees(empty):
    for name in GRID:
        opt = adamjax.chain(adamjax.clip_by_global_norm(1.0), SPECS[name].make())
        state = opt.init(empty)
        params, new_state = jax.jit(opt.step)(empty, state, empty)
        assert params == empty or params is empty
        assert_same_types(new_state, state)


def test_python_and_numpy_leaves():
    opt = adamjax.adamw(LR)
    params = {"a": 0.5, "b": np.ones(3), "c": np.float32(2)}
    state = opt.init(params)
    new, new_state = opt.step(params, state, params)
    assert aval(new) == {"a": ((), "float32", False), "b": ((3,), "float32", False), "c": ((), "float32", False)}
    assert_same_types(new_state, state)


def test_a_thousand_leaves_trace_once_per_distinct_leaf(monkeypatch):
    calls = []
    original = AdamRule.accumulate

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(AdamRule, "accumulate", counted)
    jax.clear_caches()  # of other tests
    opt = adamjax.adamw(LR)
    params = [jnp.ones((2 + i % 4,)) for i in range(200)]
    jax.jit(opt.step).lower(params, opt.init(params), params)
    assert len(calls) == 4


def test_a_leaf_is_one_call_of_a_compiled_function():
    """With its arrays and the two bias corrections: the hyperparameters are part of the function."""
    opt = adamjax.adamw(LR, weight_decay=0.1)
    params = [jnp.ones((2 + i % 4,)) for i in range(100)]
    jaxpr = jax.make_jaxpr(opt.step)(params, opt.init(params), params).jaxpr
    calls = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "run_program"]
    assert len(calls) == 100
    assert len(jaxpr.eqns) < 150
    assert {len(eqn.invars) for eqn in calls} == {6}


@pytest.mark.parametrize("kind", [*KINDS, *STORED_KINDS])
def test_states_survive_export(kind):
    """The step as StableHLO, with its state as an argument, written to bytes and read back."""
    opt, params, grads = ALL[kind].make(), small_tree("float32"), small_tree("float32", seed=1)
    state = opt.init(params)
    step = jax.jit(opt.step)
    restored = jax.export.deserialize(jax.export.export(step)(grads, state, params).serialize())
    found = restored.call(grads, state, params)
    assert_close(found, step(grads, state, params), RECOMPILED)


@pytest.mark.parametrize("kind", [*KINDS, *STORED_KINDS])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_other_platforms(kind, platform):
    opt, params = ALL[kind].make(), tree("bfloat16")
    exported = jax.export.export(jax.jit(opt.step), platforms=[platform])(params, opt.init(params), params)
    assert exported.platforms == (platform,)
    assert "stablehlo.sqrt" in exported.mlir_module() or "adamax" in kind
