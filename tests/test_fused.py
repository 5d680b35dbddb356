"""Fused steps: the plain ones in one pass over memory, whatever JAX does with them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, by_step, decoded, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from same_step import assert_in_place, assert_near_steps, assert_same_steps
from tolerances import FUSED_ROUNDED, RECOMPILED

import adamjax
from adamjax import checkpoint, schedules, sharding
from adamjax._transforms.adam import AdamRule, adam_scalars
from adamjax.interop import torch as optim
from adamjax.kernels import _backend, _blocks, _library

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")

LR = 1e-2
# Larger than the crossover, with a rest that fills no vector; and two that XLA steps.
SHAPES = {"matrix": (131, 257), "cube": (16, 8, 256), "short": (7,), "scalar": ()}


def numbers(seed=0, dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def gradients(seed, dtype="float32"):
    """Of all sizes, with zeros."""
    rng = np.random.default_rng(seed)
    scales = {name: 10.0 ** rng.integers(-7, 3, shape) * rng.integers(0, 5, shape) for name, shape in SHAPES.items()}
    return jax.tree.map(lambda g, s: (g * s).astype(dtype), numbers(seed), scales)


FORMS = {
    "adam": lambda **kw: adamjax.adam(LR, **kw),
    "adamw": lambda **kw: adamjax.adamw(LR, weight_decay=0.1, **kw),
    "nesterov": lambda **kw: adamjax.adam(LR, nesterov=True, **kw),
    "amsgrad": lambda **kw: adamjax.amsgrad(LR, **kw),
    "corrected": lambda **kw: adamjax.amsgrad(LR, variant="corrected", nesterov=True, **kw),
    "paper": lambda **kw: adamjax.adamw(LR, amsgrad="paper", **kw),
    # Gradient and decay may cancel: without eps_root, what is left of both would be the whole direction.
    "coupled": lambda **kw: adamjax.adam(LR, weight_decay=0.1, maximize=True, eps_root=1e-4, **kw),
    "fast": lambda **kw: adamjax.adam(LR, b1=0.0, b2=0.3, **kw),
}
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")
FORMATS = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "float16": {"mu_dtype": "float16", "nu_dtype": "bfloat16"},
    "mixed": {"mu_dtype": "bfloat16"},
    "int8": {"mu_dtype": INT8, "nu_dtype": INT8},
    "int4": {"mu_dtype": INT4, "nu_dtype": INT4},
    "int4 and int8": {"mu_dtype": INT4, "nu_dtype": INT8},
    "bfloat16 and int8": {"mu_dtype": "bfloat16", "nu_dtype": adamjax.quantized("int8", 256)},
}


def three_steps(make, dtype="float32", grad_dtype=None, coupled=0.0, added=None, **kw):
    fused, plain = make(fused=True, **kw), make(**kw)
    params = numbers(dtype=dtype)
    states = jax.jit(lambda params: (fused.init(params), plain.init(params)))(params)
    assert_equal(*states)
    all_grads = [gradients(i, grad_dtype or dtype) for i in range(3)]
    assert_same_steps(fused, plain, states[1], params, all_grads, LR, coupled, added)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    three_steps(FORMS[form], coupled=0.1 if form == "coupled" else 0.0)


# The slow mean has rates and weights that make it count within three steps. A b2 of 0.99 would give all blocks of codes
# a first ratio of 0.1 / sqrt(0.01), which the last digit rounds to one scale or to another.
RULES = {
    "cautious": lambda **kw: adamjax.adamw(LR, weight_decay=0.1, cautious=True, **kw),
    "cautious nesterov": lambda **kw: adamjax.adam(LR, amsgrad=True, nesterov=True, cautious=True, **kw),
    "ademamix": lambda **kw: adamjax.ademamix(LR, b3=0.99, alpha=8.0, **kw),
    "ademamix schedules": lambda **kw: adamjax.ademamix(
        LR, b3=schedules.half_life(0.9, 0.9999, 9), alpha=schedules.linear(5.0, 8.0, 9), weight_decay=0.1, **kw
    ),
    "simplified ademamix": lambda **kw: adamjax.simplified_ademamix(LR / 100, alpha=2.0, **kw),
    "adopt": lambda **kw: adamjax.adopt(LR, b2=0.99, weight_decay=0.1, cautious_decay=True, **kw),
    "atan2": lambda **kw: adamjax.adam_atan2(LR, b2=0.98, weight_decay=0.1, **kw),
    "atan2 nesterov": lambda **kw: adamjax.adam_atan2(LR, a=1.0, b=2.0, nesterov=True, **kw),
    "stable": lambda **kw: adamjax.stable_adamw(LR, b2=0.98, **kw),
}


def added_by(form):
    """What a gradient adds to the first moment, if not itself; see `assert_same_steps`."""
    return (lambda g, v: np.minimum(g / np.maximum(np.sqrt(v), 1e-6), 2.0)) if form == "adopt" else None


ALL_SLOW = {"int8": INT8, "bfloat16": "bfloat16", "float32": None}


@pytest.mark.parametrize(
    ("form", "dtype", "format"),
    [
        *((form, "float32", "float32") for form in RULES),
        ("cautious nesterov", "float32", "bfloat16"),
        ("ademamix", "float32", "bfloat16"),
        ("ademamix", "float32", "int8"),
        ("ademamix", "bfloat16", "mixed"),
        ("stable", "bfloat16", "int8"),
        ("atan2", "float32", "int4 and int8"),
    ],
)
def test_rules_since_adam(form, dtype, format):
    slow = {"mu_slow_dtype": ALL_SLOW[format]} if form == "ademamix" and format in ALL_SLOW else {}
    three_steps(RULES[form], dtype, added=added_by(form), **FORMATS[format], **slow)


def sums_in(function, *args):
    """How often a lowered program has the kernel sum what a factor is made of."""
    return jax.jit(function).lower(*args).as_text().count(f'custom_call @"{_library.target()}-sum"')


@pytest.mark.parametrize(
    ("form", "format"),
    [
        ("cautious", "float16"),
        ("cautious nesterov", "float32"),
        ("cautious nesterov", "bfloat16"),
        ("cautious", "int4 and int8"),
        ("stable", "float32"),
        ("stable", "mixed and bfloat16"),
        ("stable", "int8"),
    ],
)
def test_factors_by_the_kernel(form, format, one_device):
    """Where it sees whole arrays, it sums what their factors are made of."""
    moments = {"nu_dtype": "bfloat16"} if format == "mixed and bfloat16" else FORMATS[format]
    opt = RULES[form](fused=True, **moments)
    assert sums_in(opt.step, PARAMS, opt.init(PARAMS), PARAMS) == 2
    three_steps(RULES[form], **moments)


@pytest.mark.parametrize("form", ["cautious", "stable"])
def test_factors_by_the_kernel_do_not_depend_on_who_sums(form, one_device):
    """Of many arrays, they are those of each, bit by bit: the sums of tiles are added in order."""
    opt = RULES[form](fused=True)
    large = {name: PARAMS[name] for name in ("matrix", "cube")}
    params, grads = stacked(large), jax.tree.map(lambda x: jnp.stack([x, -x, jnp.roll(x, 1)]), large)
    state, step, of_all = jax.vmap(opt.init)(params), jax.jit(opt.step), jax.jit(jax.vmap(opt.step))
    assert sums_in(of_all, grads, state, params) == 2
    for _ in range(2):
        found = of_all(grads, state, params)
        for i in range(3):
            each = jax.tree.map(lambda x, i=i: x[i], (found, (grads, state, params)))
            assert_equal(each[0], step(*each[1]))
        params, state = found
        grads = jax.tree.map(lambda g: -0.5 * g, grads)


@pytest.mark.parametrize("form", ["cautious", "stable"])
def test_factors_of_parts_inside_shard_map(form):
    """The kernel sums over the part of a device, and JAX over devices."""
    mesh = make_mesh(AxisType.Auto, (2,))
    params = {"parts": PARAMS["cube"].reshape(256, 128), "whole": PARAMS["matrix"]}
    # The second gradient opposes the first moment, or outgrows the second, in the first part alone.
    change = -0.3 if form == "cautious" else 9.0
    all_grads = [params, params | {"parts": params["parts"].at[:128].multiply(change)}]
    specs = {"parts": P("data"), "whole": P()}

    def two_steps(opt):
        def run(params, all_grads):
            state = opt.init(params)
            for grads in all_grads:
                params, state = opt.step(grads, state, params)
            return params

        return run

    rule = {"cautious": adamjax.adam, "stable": adamjax.stable_adamw}[form]
    options = {"b1": 0.5} | ({"cautious": True} if form == "cautious" else {})
    expected = jax.jit(two_steps(rule(LR, **options)))(params, all_grads)
    fused = two_steps(rule(LR, fused=True, axis_name="data", **options))
    mapped = jax.shard_map(fused, mesh=mesh, in_specs=(specs, [specs] * 2), out_specs=specs)
    assert sums_in(mapped, params, all_grads) == 4
    assert_close(jax.jit(mapped)(params, all_grads), expected, 4 * RECOMPILED)


def test_adopt_with_a_second_moment_in_8_bits():
    three_steps(RULES["adopt"], added=added_by("adopt"), mu_dtype="bfloat16", nu_dtype=INT8)


def test_rules_since_adam_in_place():
    assert_in_place(RULES["ademamix"](fused=True), PARAMS, GRADS)


@pytest.mark.parametrize("form", ["cautious", "ademamix", "atan2", "stable"])
def test_many_learning_rates(form):
    """Each with its own row of scalars."""
    rates = jnp.asarray([0.1, 0.0, -0.01])
    fused, plain = (RULES[form](**kw) for kw in ({"fused": True}, {}))

    def steps(opt):
        def one(rate):
            chain = jax.tree.unflatten(jax.tree.structure(opt), [*jax.tree.leaves(opt)[:-1], rate])
            return chain.step(GRADS, chain.init(PARAMS), PARAMS)

        return jax.jit(jax.vmap(one))

    assert steps(fused).lower(rates).as_text().count(f'custom_call @"{_library.target()}"') == 2
    assert_close(steps(fused)(rates), steps(plain)(rates), 4 * RECOMPILED)


# The kernel reads and writes each operand by its own type: every format of float32 parameters, and each half precision
# one beside moments that are floats, halves and codes.
HALVES = [("bfloat16", format) for format in ("float32", "mixed", "int4 and int8")]
HALVES += [("float16", format) for format in ("float32", "float16", "bfloat16 and int8")]


@pytest.mark.parametrize(
    ("dtype", "format"),
    [*(("float32", format) for format in FORMATS), *(pytest.param(*half, marks=pytest.mark.slow) for half in HALVES)],
)
def test_formats(dtype, format):
    three_steps(FORMS["amsgrad"], dtype, **FORMATS[format])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_another_dtype(dtype):
    three_steps(FORMS["adamw"], grad_dtype=dtype)


def halves(tree):
    return {name: i % 2 == 0 for i, name in enumerate(tree)}


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": schedules.cosine(LR, 9), "weight_decay": schedules.linear(0.1, 0.0, 9)},
        {"learning_rate": schedules.cosine(LR, 9), "decay_schedule": "independent", "mask": halves},
        {"mask": halves, "maximize": True, "eps": 1e-3},
        {"mask": halves, "cautious_decay": True, "weight_decay": 0.1},
        {"learning_rate": schedules.cosine(LR, 9), "cautious_decay": True, "decay_schedule": "independent"},
    ],
)
def test_schedules_and_masks(options):
    three_steps(lambda **kw: adamjax.adamw(**{"learning_rate": LR} | options | kw))


def test_coupled_decay_by_a_schedule_where_a_mask_says():
    decay = schedules.linear(0.1, 0.0, 9)
    three_steps(lambda **kw: adamjax.adam(LR, weight_decay=decay, mask=halves, **kw), coupled=0.1)


def of_all(step):
    """A step of a torch optimizer, with the moments in one state for all parameters."""
    params, (own, *others) = step
    columns = ({name: s[i] for name, s in own.items() if s is not None} for i in range(4))
    count, mu, nu, nu_max = columns
    return params, (adamjax.AdamState(count, mu, nu, None if nu_max["cube"] is None else nu_max), *others)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": LR},
        {"lr": schedules.cosine(LR, 9), "weight_decay": 0.1, "amsgrad": True},
        {"lr": LR, "weight_decay": 0.1, "maximize": True, "decoupled_weight_decay": True},
    ],
)
def test_torchs_whose_parameters_count_their_own_steps(options):
    fused, plain = optim.adam(fused=True, **options), optim.adam(**options)
    coupled = 0.0 if "decoupled_weight_decay" in options else options.get("weight_decay", 0.0)
    params = numbers() | {"absent": None}
    state = plain.init(params)
    assert_equal(fused.init(params), state)
    text = jax.jit(fused.step).lower(params, state, params).as_text()
    assert text.count(f'custom_call @"{_library.target()}"') == 2
    steps = jax.jit(fused.step), jax.jit(plain.step)
    for i in range(3):
        grads = gradients(i) | {"absent": None} | ({"matrix": None, "short": None} if i == 1 else {})
        found, expected = (step(grads, state, params) for step in steps)
        before = of_all((params, state))[1]
        seen = {name: g for name, g in grads.items() if name != "absent"}
        assert_near_steps(of_all(found), of_all(expected), seen, before, params, LR, coupled)
        params, state = expected
    assert state[0]["matrix"].count == 2


def test_torchs_that_cannot_be_fused():
    params = {"complex": jnp.ones((200, 200), jnp.complex64)}
    opt = optim.adamw(fused=True)
    with pytest.raises(ValueError, match=r"fused=True cannot step params\['complex'\]: .*complex64"):
        opt.step(params, opt.init(params), params)
    with pytest.raises(ValueError, match="Invalid fused value: 'yes'"):
        optim.adamw(fused="yes")


def test_parameters_that_are_frozen_or_absent():
    fused, plain = FORMS["adamw"](fused=True), FORMS["adamw"]()
    params = numbers() | {"absent": None}
    grads, state = gradients(0) | {"matrix": None, "absent": None}, plain.init(params)
    found, expected = (jax.jit(opt.step)(grads, state, params) for opt in (fused, plain))
    assert_close(found, expected, RECOMPILED)
    assert_equal(found[0]["matrix"], params["matrix"])


def test_parameters_that_are_numbers():
    fused, plain = FORMS["adamw"](fused=True), FORMS["adamw"]()
    params = {"scale": 2.0, "shift": np.float32(3)}
    assert_equal(fused.step(params, fused.init(params), params), plain.step(params, plain.init(params), params))


# AMSGrad stores what AdamW does, and one moment more.
@pytest.mark.parametrize(
    ("form", "format"),
    [
        *(("amsgrad", format) for format in FORMATS),
        ("adamw", "float32"),
        ("adamw", "int4"),
        *((form, "float32") for form in ("cautious", "ademamix", "adopt", "atan2 nesterov", "stable")),
    ],
)
def test_numbers_at_the_edges(form, format, request):
    """What is not finite, not normal, or has no square stays what it is in the plain step."""
    if form in ("cautious", "stable"):
        request.getfixturevalue("one_device")
    edges = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 1e-38, -1e-30, 1e-23, 1e-19, 1e19, -1e20, 3e38]
    g = jnp.asarray(np.resize(edges, 16 * 1040), jnp.float32)
    p = jnp.asarray(np.repeat(np.resize(edges[:2] + edges[5:], 16), 1040), jnp.float32)
    fused, plain = ((FORMS | RULES)[form](**kw, **FORMATS[format]) for kw in ({"fused": True}, {}))
    params, state = {"w": p}, plain.init({"w": p})
    steps = jax.jit(fused.step), jax.jit(plain.step)
    for _ in range(3):
        found, expected = (step({"w": g}, state, params) for step in steps)
        assert_equal(found[1][0].count, expected[1][0].count)
        for a, b in zip(numbers_of(found), numbers_of(expected), strict=True):
            fine = np.isfinite(a)
            np.testing.assert_array_equal(fine, np.isfinite(b))
            if not np.any(fine):
                continue
            apart = np.abs(a[fine] - b[fine]) / (np.abs(b[fine]) + 1e-37)
            assert np.mean(apart > (RECOMPILED if format == "float32" else 0.02)) <= FUSED_ROUNDED
            if "int" not in format:
                np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
                np.testing.assert_array_equal(np.sign(a), np.sign(b))
        params, state = expected


def numbers_of(step):
    """The parameter, and its moments as they are decoded."""
    params, (state, *_) = step
    state = decoded(state)
    return [np.asarray(x["w"], np.float64) for x in (params, *state[1:]) if x is not None]


PARAMS, GRADS = numbers(), gradients(0)
FUSED_OPT, PLAIN_OPT = FORMS["adamw"](fused=True), FORMS["adamw"]()


def stacked(tree):
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), tree)


def in_scan(opt):
    def body(carry, _):
        return opt.step(GRADS, carry[1], carry[0]), None

    return jax.jit(lambda p, s: jax.lax.scan(body, (p, s), None, length=3)[0])(PARAMS, opt.init(PARAMS))


def in_cond(opt):
    def either(take, p, s):
        return jax.lax.cond(take, lambda p, s: opt.step(GRADS, s, p), lambda p, s: (p, s), p, s)

    return [jax.jit(either)(take, PARAMS, opt.init(PARAMS)) for take in (True, False)]


def over_states(opt):
    params = stacked(PARAMS)
    return jax.jit(jax.vmap(opt.step, in_axes=(None, 0, 0)))(GRADS, jax.vmap(opt.init)(params), params)


def over_both(opt):
    def one(rate, params):
        chain = jax.tree.unflatten(jax.tree.structure(opt), [*jax.tree.leaves(opt)[:-1], rate])
        return chain.step(GRADS, chain.init(params), params)

    inner = jax.vmap(one, in_axes=(None, 0))
    return jax.jit(jax.vmap(inner, in_axes=(0, None)))(jnp.asarray([0.1, 0.01]), stacked(PARAMS))


def in_a_chain(opt):
    opt = adamjax.chain(adamjax.clip_by_global_norm(0.1), opt)
    return jax.jit(opt.step)(GRADS, opt.init(PARAMS), PARAMS)


def grouped(opt):
    combined = {"short|cube": {"weight_decay": 0.0}, "cube|matrix": {"learning_rate": adamjax.scale(0.5)}}
    return adamjax.groups(combined, default=opt)


def in_groups(opt):
    opt = grouped(opt)
    return jax.jit(opt.step)(GRADS | {"matrix": None}, opt.init(PARAMS), PARAMS)


def guarded(opt):
    opt = adamjax.skip_nonfinite(opt)
    state = opt.init(PARAMS)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    params, state = jax.jit(opt.step)(bad, state, PARAMS)
    assert_equal(params, PARAMS)
    return jax.jit(opt.step)(GRADS, state, params)


@pytest.mark.parametrize("use", [in_scan, in_cond, over_states, over_both, in_a_chain, in_groups, guarded])
def test_wherever_a_step_goes(use):
    assert_close(use(FUSED_OPT), use(PLAIN_OPT), 4 * RECOMPILED)


@pytest.mark.parametrize("around", [lambda opt: adamjax.chain(adamjax.clip_by_global_norm(0.1), opt), grouped])
def test_steps_around_are_one_pass_too(around):
    opt = around(FUSED_OPT)
    text = jax.jit(opt.step).lower(GRADS, opt.init(PARAMS), PARAMS).as_text()
    assert text.count(_library.target()) == 2  # parameters above the crossover


def test_derivatives_are_those_of_the_plain_step():
    def loss(rate, params, **kw):
        opt = adamjax.adamw(rate, weight_decay=0.1, **kw)
        new, _ = opt.step(GRADS, opt.init(params), params)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(new))

    found = jax.jit(jax.value_and_grad(lambda *x: loss(*x, fused=True), argnums=(0, 1)))(0.1, PARAMS)
    assert_close(found, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(0.1, PARAMS), 4 * RECOMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int4 and int8"])
def test_derivatives_beside_codes(format):
    """The codes of the first step do not depend on the learning rate."""

    def loss(rate, **kw):
        opt = adamjax.adamw(rate, weight_decay=0.1, **FORMATS[format], **kw)
        new, _ = opt.step(GRADS, opt.init(PARAMS), PARAMS)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(new))

    expected = jax.jit(jax.value_and_grad(loss))(0.1)
    for compiled in (jax.jit, *([lambda f: f] if format == "int8" else [])):
        assert_close(compiled(jax.value_and_grad(lambda x: loss(x, fused=True)))(0.1), expected, 4 * RECOMPILED)


def test_in_place_and_compiled_once():
    assert_in_place(FUSED_OPT, PARAMS, GRADS)


SPECS = {"matrix": P(), "cube": P("data", "model"), "short": P(), "scalar": P()}


def place(tree, mesh, specs=SPECS):
    return {name: jax.device_put(jnp.copy(x), NamedSharding(mesh, specs[name])) for name, x in tree.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cube", "format", "kind"),
    [
        (P("data", "model"), "bfloat16", AxisType.Auto),
        (P(None, ("data", "model")), "bfloat16", AxisType.Explicit),
        (P("model", None, "data"), "bfloat16", AxisType.Auto),
        (P("model", None, "data"), "int8", AxisType.Explicit),
        (P("data", "model"), "int4", AxisType.Auto),
    ],
)
def test_each_device_steps_its_part(cube, format, kind):
    """With the random numbers that those have in the whole."""
    mesh = make_mesh(kind, (2, 4), ("data", "model"))
    specs = SPECS | {"cube": cube}
    opt = FORMS["amsgrad"](fused=True, **FORMATS[format])
    with jax.set_mesh(mesh):
        params = place(PARAMS, mesh, specs)
        state, grads = opt.init(params), place(GRADS, mesh, specs)
        where = [x.sharding for x in jax.tree.leaves((params, state))]
        advance = jax.jit(by_step(opt), donate_argnums=(0, 1))
        text = advance.lower(params, state, grads).compile().as_text()
        found = advance(params, state, grads)
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert all(x.sharding.is_equivalent_to(w, x.ndim) for x, w in zip(jax.tree.leaves(found), where, strict=True))
    expected = jax.jit(by_step(opt))(PARAMS, opt.init(PARAMS), GRADS)
    assert_close(jax.device_get(found[0]), expected[0], RECOMPILED)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) <= FUSED_ROUNDED


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_codes_of_which_devices_would_have_parts_of_blocks(kind):
    """Their last axis is in one piece, for the step too; parameters stay as they were. No mesh need be set."""
    mesh = make_mesh(kind)
    opt = FORMS["adamw"](fused=True, **FORMATS["int8"])
    params, grads = {"cube": PARAMS["cube"]}, {"cube": GRADS["cube"]}
    placed = place(params, mesh, {"cube": P(None, None, "data")})
    state = opt.init(placed)
    found = jax.jit(opt.step)(place(grads, mesh, {"cube": P(None, None, "data")}), state, placed)
    assert found[0]["cube"].sharding.is_equivalent_to(placed["cube"].sharding, 3)
    assert found[1][0].mu["cube"].codes.sharding.is_equivalent_to(state[0].mu["cube"].codes.sharding, 3)
    expected = jax.jit(opt.step)(grads, opt.init(params), params)
    assert_close(jax.device_get(found[0]), expected[0], RECOMPILED)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) <= FUSED_ROUNDED


def test_many_states_of_codes():
    """Each with its own scales, by the plain step's numbers."""
    fused, plain = (FORMS["adamw"](**kw, **FORMATS["int8"]) for kw in ({"fused": True}, {}))
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (GRADS, plain.init(PARAMS), PARAMS))
    found, expected = (jax.jit(jax.vmap(opt.step))(*many) for opt in (fused, plain))
    assert_close(found[0], expected[0], RECOMPILED)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.mean(np.abs(a - b) > RECOMPILED * np.abs(b)) <= FUSED_ROUNDED


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_many_states_on_many_devices(kind):
    """A few on each."""
    mesh = make_mesh(kind, (2,), ("many",))
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x, 4 * x]), (GRADS, PLAIN_OPT.init(PARAMS), PARAMS))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("many"))), many)
        advance = jax.jit(jax.vmap(FUSED_OPT.step))
        assert "all-gather" not in advance.lower(*placed).compile().as_text()
        found = advance(*placed)
    assert_close(jax.device_get(found), jax.jit(jax.vmap(PLAIN_OPT.step))(*many), RECOMPILED)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_with_zero1(kind):
    mesh = make_mesh(kind)
    everywhere = dict.fromkeys(SHAPES, P())
    params, grads = place(PARAMS, mesh, everywhere), place(GRADS, mesh, everywhere)
    spread = [sharding.zero1(opt, axis="data") for opt in (FUSED_OPT, PLAIN_OPT)]
    state = spread[0].init(params)
    found, expected = (jax.jit(opt.step)(grads, state, params) for opt in spread)
    assert found[1].inner[0].mu["cube"].sharding.spec[0] == "data"
    assert_close(jax.device_get(found), jax.device_get(expected), RECOMPILED)


@pytest.mark.parametrize(
    ("kinds", "mapped", "modes"),
    [
        ((AxisType.Auto, AxisType.Auto), {"data"}, "Auto and Manual"),
        ((AxisType.Explicit, AxisType.Explicit), {"data"}, "Explicit and Manual"),
        ((AxisType.Auto, AxisType.Explicit), None, "Auto and Explicit"),
    ],
)
def test_where_axes_are_in_several_modes(kinds, mapped, modes):
    """Along some of them, arrays would have to be gathered."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    sharding = NamedSharding(mesh, P(None, None, "model"))
    params = jax.device_put(PARAMS["cube"], sharding)

    def step(opt):
        def advance(params, state):
            return opt.step(params, state, params)

        if mapped is not None:
            options = {"mesh": mesh, "in_specs": P(), "out_specs": P(), "axis_names": mapped, "check_vma": False}
            advance = jax.shard_map(advance, **options)
        return jax.jit(advance)(params, PLAIN_OPT.init(params))

    with pytest.raises(ValueError, match=f"cannot step params: the axes of its mesh are in several modes, {modes}"):
        step(FUSED_OPT)
    with pytest.warns(UserWarning, match=modes):
        found = step(FORMS["adamw"](fused="auto"))
    assert found[0].sharding.is_equivalent_to(sharding, 3)
    assert_equal(found, step(PLAIN_OPT))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = make_mesh(AxisType.Auto, (2,))
    shapes = {"matrix": (256, 256), "short": (6,)}
    params, grads = numbers(0, shapes=shapes), numbers(1, shapes=shapes)
    found, expected = (
        jax.jit(
            jax.shard_map(
                lambda g, p, opt=opt: opt.step(g, opt.init(p), p)[0],
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P("data"),
                check_vma=check_vma,
            )
        )(grads, params)
        for opt in (FUSED_OPT, PLAIN_OPT)
    )
    assert_close(found, expected, RECOMPILED)


def test_pmap():
    everywhere = jax.tree.map(lambda x: jnp.stack([x] * 2), (GRADS, PLAIN_OPT.init(PARAMS), PARAMS))
    found, expected = (jax.pmap(opt.step, devices=jax.devices()[:2])(*everywhere) for opt in (FUSED_OPT, PLAIN_OPT))
    assert_close(found, expected, RECOMPILED)


def test_a_checkpoint_of_one_is_one_of_the_other(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    state = PLAIN_OPT.init(PARAMS)
    checkpoint.save(tmp_path, PLAIN_OPT, PARAMS, state, step=0)
    assert_equal(checkpoint.restore(tmp_path, FUSED_OPT, PARAMS).state, state)


BIG = jnp.ones((128, 128))


@pytest.mark.parametrize(
    ("options", "params", "why"),
    [
        ({}, BIG.astype(jnp.complex64), "its parameter is complex64, and the kernel steps float32"),
        ({"mu_dtype": adamjax.quantized("int8", 96)}, BIG, "its first moment is quantised in blocks of 96"),
        ({"nu_dtype": adamjax.quantized("int4", 2048)}, BIG, "its second moment is quantised in blocks of 2048"),
        (
            {"make": adamjax.adopt, "mu_dtype": INT8},
            BIG,
            "its first moment is quantised, and the kernel steps ADOPT with one of floats",
        ),
        (
            {"make": adamjax.ademamix, "mu_slow_dtype": adamjax.quantized("int8", 96)},
            BIG,
            "its slow mean is quantised in blocks of 96",
        ),
    ],
)
def test_what_cannot_be_fused(options, params, why):
    params, options = {"w": params}, {"make": adamjax.adam} | options
    make = options.pop("make")
    opt = make(LR, fused=True, **options)
    with pytest.raises(ValueError, match=rf"fused=True cannot step params\['w'\]: {why}.* Take fused=False"):
        opt.step(params, opt.init(params), params)
    opt, plain = make(LR, fused="auto", **options), make(LR, **options)
    state = plain.init(params)
    with pytest.warns(UserWarning, match=rf"fused='auto' leaves params\['w'\] to XLA: {why}"):
        found = jax.jit(opt.step)(params, state, params)
    assert_equal(found, jax.jit(plain.step)(params, state, params))
    jax.eval_shape(opt.step, params, state, params)  # said once: a second warning would be an error here
    small = {"w": params["w"][:3]}
    state = plain.init(small)
    fused = make(LR, fused=True, **options)
    assert_equal(*(jax.jit(o.step)(small, state, small) for o in (fused, plain)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_pallas_kernels_read_their_numbers_where_they_were_put(nesterov):
    """Here, for with a JAX that is too old for the kernels none of their own tests would say so."""
    adam = adam_scalars(adamjax.scale_by_adam(nesterov=nesterov), jnp.float32(3))
    numbers = _backend.StepScalars(adam, *map(jnp.float32, range(5)))
    row = _blocks.scalars_of(_backend.StepVariant(AdamRule(nesterov), True, True), numbers)
    assert all(np.shape(x) == () for x in row)
    found = _blocks.step_scalars(row)
    if not nesterov:  # then nothing is looked ahead to
        found = found._replace(adam=found.adam._replace(c1_next=None))
    assert_equal(found, numbers)


def test_where_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "metal")
    opt = adamjax.adam(LR, fused=True)
    with pytest.raises(ValueError, match="on metal there is no kernel"):
        opt.step({"w": BIG}, opt.init({"w": BIG}), {"w": BIG})


def test_a_value_like_the_others():
    assert FUSED_OPT != PLAIN_OPT
    assert repr(FUSED_OPT).endswith("ScaleByLearningRate(learning_rate=0.01)), fused=True)")
    assert FORMS["adamw"](fused=True) == FUSED_OPT
    assert adamjax.adam(fused=False) == adamjax.adam()
    for bad in (None, "yes", 2):
        with pytest.raises((ValueError, TypeError), match="Invalid fused value"):
            adamjax.adamw(fused=bad)
