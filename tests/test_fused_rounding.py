"""Fused steps of half precision parameters, which land as the wrapper around them says."""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, decoded, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from same_step import assert_in_place, assert_near, assert_near_moments, units
from tolerances import FUSED, FUSED_ROUNDED, RECOMPILED

import adamjax
import adamjax.interop.torch as optim
from adamjax import sharding
from adamjax._transforms.param_rounding import join_bits
from adamjax.kernels import _fused, _library

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
pytestmark = [COMPILER, pytest.mark.numbers]

LR = 1e-3
# Larger than the crossover, with a rest that fills no vector; one that XLA steps; and one in float32.
SHAPES = {"matrix": (131, 257), "short": (7,), "wide": (128, 256)}
WRAPPERS = {
    "stochastic_rounding": lambda opt: adamjax.stochastic_rounding(opt, seed=5),
    "kahan": adamjax.kahan,
    "master_weights": adamjax.master_weights,
    "low_bits": lambda opt: adamjax.master_weights(opt, low_bits=True),
    "low_bits=8": lambda opt: adamjax.master_weights(opt, low_bits=8),
}
INT8 = adamjax.quantized("int8")
FORMATS = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "int8": {"mu_dtype": INT8, "nu_dtype": INT8},
    "amsgrad": {"amsgrad": "torch"},
}


def draw(seed, dtype="bfloat16", size=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(size * rng.normal(size=shape), "float32" if name == "wide" else dtype)
        for name, shape in SHAPES.items()
    }


def adamw(wrap, **options):
    return wrap(adamjax.adamw(LR, weight_decay=0.1, **options))


def pair(wrap, **options):
    return adamw(wrap, fused=True, **options), adamw(wrap, **options)


def in_double(x):
    return np.asarray(x, np.float64)


def assert_same(found, expected, params):
    """Parameters, and what they lack where they are the same, but for the last digits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, p in params.items():
        terms = np.abs(np.asarray(p, np.float64)) + 10 * LR
        assert_near(found[0][name], expected[0][name], terms, name)
        a, b = (state.kept[name] for _, state in (found, expected))
        if a is None:
            continue
        same = np.asarray(found[0][name] == expected[0][name])
        last, spacing = units(10 * LR, "float32"), None  # digits of the update
        if a.dtype in (jnp.uint8, jnp.uint16):  # lower bits, which alone say nothing
            random, last = a.dtype == jnp.uint8, units(terms[same], "float32")
            a, b = (join_bits(*x) for x in ((found[0][name], a), (expected[0][name], b)))
            spacing = 2**8 * units(a[same], "float32") if random else None
        elif a.dtype == p.dtype:  # what Kahan's sum keeps
            spacing = units(np.maximum(np.abs(in_double(a)), np.abs(in_double(b)))[same], p.dtype)
        if spacing is None:
            assert_near(a[same], b[same], terms[same], f"kept of {name}")
            continue
        apart = np.abs(in_double(a) - in_double(b))[same]
        assert np.all(apart <= spacing + FUSED * last)
        # It is rounded at random: the other way as often as those digits are of the spacing.
        assert np.mean(apart > 0) <= FUSED_ROUNDED + np.mean(np.minimum(FUSED * last / spacing, 1))


# The moments are stepped before the wrapper lands the parameter: one has them in every format, others in two.
CASES: list[Any] = [("kahan", format, "bfloat16") for format in FORMATS]
CASES += [(wrapper, format, "bfloat16") for wrapper in WRAPPERS if wrapper != "kahan" for format in ("float32", "int8")]
CASES += [(wrapper, "float32", "float16") for wrapper in WRAPPERS if "low_bits" not in wrapper]


MOST = [case if case[1] == "float32" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("wrapper", "format", "dtype"), MOST)
def test_the_plain_steps(wrapper, format, dtype):
    fused, plain = pair(WRAPPERS[wrapper], **FORMATS[format])
    params = draw(0, dtype)
    state = plain.init(params)
    assert jax.tree.structure(fused.init(params)) == jax.tree.structure(state)
    steps = jax.jit(fused.step), jax.jit(plain.step)
    for i in range(3):
        grads = draw(i + 1, dtype, 1e-3)
        found, expected = (step(grads, state, params) for step in steps)
        assert_same(found, expected, params)
        for name, g in grads.items():
            g = np.abs(np.asarray(g, np.float64))
            assert_near_moments(name, g, found[1].inner[0], expected[1].inner[0], decoded(state.inner[0]))
        params, state = expected


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_steps_that_rounding_to_nearest_would_lose_count(wrapper):
    """A hundred steps of 1e-5, from 1: none of the figures comes from the code under test."""
    opt = WRAPPERS[wrapper](adamjax.adam(1e-5, fused=True))
    params = {"w": jnp.ones((128, 256), jnp.bfloat16)}
    carry = jax.jit(lambda c: jax.lax.fori_loop(0, 100, lambda _, c: opt.step(c[0], c[1], c[0]), c))(
        (params, opt.init(params))
    )
    mean = float(jnp.mean(carry[0]["w"].astype(jnp.float32)))
    if wrapper == "stochastic_rounding":
        assert abs(mean - 0.999) < 2e-5
    else:  # half of the spacing of bfloat16 below 1 is 2**-9
        assert mean == 1.0
        state, p = carry[1], carry[0]["w"].astype(jnp.float32)
        kept = state.kept["w"]
        total = p + kept.astype(jnp.float32) if wrapper == "kahan" else opt.weights(carry[0], state)["w"]
        assert abs(float(jnp.mean(total)) - 0.999) < 2e-5


EDGES = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 1e-38, -1e-30, 1e-19, 1e19, 3e38, 1.0]


def masters():
    """All masters of 24 bits that are 0, normal or infinite, as float32; and the parameter and low bits of each."""
    bits = np.arange(2**24, dtype=np.uint32)
    exponent = (bits >> 15) & 0xFF
    bits = bits[((exponent > 0) & (exponent < 0xFF)) | np.isin(bits, [0, 0x7F8000, 0xFF8000])]
    p = ((bits + 0x80) >> 8).astype(np.uint16).view(jnp.bfloat16)
    return (bits << 8).view(np.float32), jnp.asarray(p), jnp.asarray(bits.astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_low_bits_and_parameter_are_the_master(options):
    """Every master of 24 bits is what a step reads, and stores again where it does not move it."""
    expected, p, low = masters()
    opt = adamjax.master_weights(adamjax.adam(0.0, **options), low_bits=8)
    state = opt.init(p)._replace(kept=low)
    np.testing.assert_array_equal(np.asarray(opt.weights(p, state)).view(np.uint32), expected.view(np.uint32))
    new, state = jax.jit(opt.step)(jnp.ones_like(p), state, p)
    np.testing.assert_array_equal(np.asarray(new).view(np.uint16), np.asarray(p).view(np.uint16))
    np.testing.assert_array_equal(state.kept, low)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize("part", [18 / 256, 128 / 256, 231 / 256])  # numbers of float32
def test_low_bits_are_rounded_without_bias(part, options):
    """Up as often as the step is of their spacing, at each step, and as nearly on average as numbers can be."""
    spacing, size, steps = 2.0**-15, 2**16, 50
    opt = adamjax.master_weights(adamjax.adam(part * spacing, eps=0.0, maximize=True, **options), low_bits=8)
    p = jnp.ones(size, jnp.bfloat16)

    def body(carry, _):
        carry = opt.step(jnp.ones(size), carry[1], carry[0])
        return carry, (opt.weights(*carry) - 1) / spacing

    (p, _), found = jax.jit(lambda: jax.lax.scan(body, (p, opt.init(p)), length=steps))()
    found = in_double(found)
    assert np.all(found == np.round(found))
    exact = part * np.arange(1, steps + 1)[:, None]
    assert np.all(np.abs(found.mean(1, keepdims=True) - exact) <= 5 * 0.5 * size**-0.5)
    assert np.all(np.abs(found - exact) <= 3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_numbers_at_the_edges(wrapper):
    """What is not finite, not normal or 0 lands where the plain step has it."""
    fused, plain = pair(WRAPPERS[wrapper])
    params = {"w": jnp.asarray(np.repeat(EDGES, 2048), jnp.bfloat16)}
    grads = {"w": jnp.asarray(np.resize(EDGES, 2048 * len(EDGES)), jnp.bfloat16)}
    state = plain.init(params)
    steps = jax.jit(fused.step), jax.jit(plain.step)
    for _ in range(3):
        found, expected = (step(grads, state, params) for step in steps)
        # Of master weights in full precision, what is kept is the parameter, too.
        seen = [fused.weights if "low_bits" in wrapper else lambda params, state: (params, state.kept)]
        for see in [lambda params, state: params, *seen]:
            for a, b in zip(jax.tree.leaves(see(*found)), jax.tree.leaves(see(*expected)), strict=True):
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
                np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
                fine = np.isfinite(a)
                assert np.mean(np.abs(a - b)[fine] > 0.02 * np.abs(b)[fine] + 1e-37) <= FUSED_ROUNDED
                np.testing.assert_array_equal(np.sign(a), np.sign(b))
        params, state = expected


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize("wrapper", ["low_bits", "low_bits=8"])
def test_what_is_no_number_stays_none(wrapper, options):
    """Whatever its other bits are: rounding must not carry them over."""
    opt = adamw(WRAPPERS[wrapper], **options)
    params = {"w": jnp.ones((128, 256), jnp.bfloat16)}
    grads = {"w": jnp.asarray(np.full((128, 256), 0xFFFFFFFF, np.uint32).view(np.float32))}
    new, state = jax.jit(opt.step)(grads, opt.init(params), params)
    assert np.all(np.isnan(np.asarray(new["w"], np.float32)))
    assert np.all(np.isnan(opt.weights(new, state)["w"]))


PARAMS, GRADS = draw(0), draw(1, size=1e-3)


def clipped(opt):
    return adamjax.chain(adamjax.clip_by_global_norm(0.1), opt)


AROUND = {
    "it": adamjax.kahan,
    "a chain": lambda opt: adamjax.kahan(clipped(opt)),
    "chained": lambda opt: clipped(adamjax.kahan(opt)),
    "groups": lambda opt: adamjax.kahan(adamjax.groups({"short|wide": {"weight_decay": 0.0}}, default=opt)),
    "groups that overlap": lambda opt: adamjax.kahan(
        adamjax.groups(
            {"short|wide": {"weight_decay": 0.0}, "wide": {"learning_rate": adamjax.scale(0.5)}}, default=opt
        )
    ),
    "a group": lambda opt: adamjax.kahan(adamjax.groups({"short": adamjax.adam(LR)}, default=opt)),
    "packed": lambda opt: adamjax.kahan(adamjax.packed(opt)),
    "guarded": lambda opt: adamjax.dynamic_loss_scale(adamjax.skip_nonfinite(adamjax.kahan(opt))),
}


@pytest.mark.parametrize("around", AROUND)
def test_wherever_a_step_goes(around):
    fused, plain = (adamw(AROUND[around], **kw) for kw in ({"fused": True}, {}))
    state = plain.init(PARAMS)
    lowered = jax.jit(fused.step).lower(GRADS, state, PARAMS)
    assert lowered.as_text().count(_library.target()) == 2  # parameters above the crossover
    found, expected = lowered.compile()(GRADS, state, PARAMS), jax.jit(plain.step)(GRADS, state, PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.mean(np.abs(a - b) > 4 * RECOMPILED * (np.abs(b) + LR)) <= FUSED_ROUNDED


def test_frozen_and_absent():
    fused, plain = pair(adamjax.kahan)
    params = PARAMS | {"absent": None}
    grads = GRADS | {"matrix": None, "absent": None}
    state = plain.init(params)
    found, expected = (jax.jit(opt.step)(grads, state, params) for opt in (fused, plain))
    assert_close(found, expected, RECOMPILED)
    np.testing.assert_array_equal(found[0]["matrix"], params["matrix"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masks_see_what_the_plain_step_shows_them(wrapper):
    """The parameters in float32: a mask may ask for their dtype."""

    def mask(params):
        return jax.tree.map(lambda p: p.dtype == jnp.float32, params)

    params = {"w": PARAMS["matrix"]}
    fused, plain = pair(WRAPPERS[wrapper], mask=mask)
    state = plain.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)  # the decay is all that moves
    found, expected = jax.jit(fused.step)(grads, state, params), jax.jit(plain.step)(grads, state, params)
    assert_same(found, expected, params)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_many_at_once(wrapper):
    """Over parameters and their states, and over learning rates."""
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)

    def one(rate, params, kw):
        opt = WRAPPERS[wrapper](adamjax.adamw(rate, weight_decay=0.1, **kw))
        return opt.step(GRADS, opt.init(params), params)

    rates = jnp.asarray([LR, LR / 2])
    found, expected = (
        jax.jit(jax.vmap(lambda r, p, kw=kw: one(r, p, kw)))(rates, params) for kw in ({"fused": True}, {})
    )
    assert_same(found, expected, params)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_in_place(wrapper):
    assert_in_place(adamw(WRAPPERS[wrapper], fused=True), PARAMS, GRADS)


@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [
        ("stochastic_rounding", AxisType.Auto),
        ("stochastic_rounding", AxisType.Explicit),
        ("kahan", AxisType.Explicit),
        ("low_bits=8", AxisType.Auto),
    ],
)
def test_each_device_steps_its_part(wrapper, kind):
    """With the random numbers that those have in the whole."""
    mesh = make_mesh(kind, (2, 4), ("data", "model"))
    opt = adamw(WRAPPERS[wrapper], fused=True)
    params, grads = ({"w": x["wide"].astype(jnp.bfloat16)} for x in (PARAMS, GRADS))
    expected = jax.jit(opt.step)(grads, opt.init(params), params)
    params, grads = jax.device_put((params, grads), NamedSharding(mesh, P("model", "data")))
    with jax.set_mesh(mesh):
        state = opt.init(params)
        advance = jax.jit(opt.step)
        assert "all-gather" not in advance.lower(grads, state, params).compile().as_text()
        found = advance(grads, state, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_inside_zero1():
    mesh = make_mesh(AxisType.Auto)
    params, grads = jax.device_put((PARAMS, GRADS), NamedSharding(mesh, P()))
    fused, plain = (sharding.zero1(adamw(adamjax.kahan, **kw), mesh=mesh, axis="data") for kw in ({"fused": True}, {}))
    state = plain.init(params)
    advance = jax.jit(fused.step).lower(grads, state, params).compile()
    assert _library.target() in advance.as_text()
    found, expected = advance(grads, state, params), jax.jit(plain.step)(grads, state, params)
    assert_same(*((p, s.inner) for p, s in (found, expected)), PARAMS)


@pytest.mark.parametrize("wrapper", ["kahan", "master_weights", "low_bits", "low_bits=8"])
def test_derivatives_are_those_of_the_plain_step(wrapper):
    def loss(rate, **kw):
        opt = WRAPPERS[wrapper](adamjax.adamw(rate, weight_decay=0.1, **kw))
        new, state = opt.step(GRADS, opt.init(PARAMS), PARAMS)
        if wrapper != "kahan":
            new = opt.weights(new, state)
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(new))

    found, expected = (jax.jit(jax.value_and_grad(lambda x, kw=kw: loss(x, **kw)))(LR) for kw in ({"fused": True}, {}))
    assert_close(found, expected, 4 * RECOMPILED)


def test_a_platform_whose_kernel_does_not_land(monkeypatch):
    class Engine:
        KERNEL = None
        is_faster = staticmethod(lambda leaf: True)
        unsupported_reason = staticmethod(lambda variant, leaf, g: "it does not round" if variant.rounding else None)

    monkeypatch.setattr(_fused, "_platform", lambda: Engine)
    params = {"w": PARAMS["matrix"]}
    opt = adamw(adamjax.kahan, fused=True)
    with pytest.raises(ValueError, match=r"cannot step params\['w'\]: it does not round"):
        opt.step(params, opt.init(params), params)
    auto, plain = adamw(adamjax.kahan, fused="auto"), adamw(adamjax.kahan)
    with pytest.warns(UserWarning, match="to XLA: it does not round"):
        found = jax.jit(auto.step)(params, auto.init(params), params)
    expected = jax.jit(plain.step)(params, plain.init(params), params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: optim.adamw(LR, weight_decay=0.1, **kw),
        lambda **kw: sharding.offload(adamjax.adamw(LR, weight_decay=0.1, **kw)),
    ],
    ids=["torch", "offload"],
)
def test_other_forms_inside_are_one_pass_too(make):
    fused, plain = (adamjax.kahan(make(**kw)) for kw in ({"fused": True}, {}))
    state = plain.init(PARAMS)
    lowered = jax.jit(fused.step).lower(GRADS, state, PARAMS)
    assert lowered.as_text().count(_library.target()) == 2  # the parameters above the smallest size
    assert_same(lowered.compile()(GRADS, state, PARAMS), jax.jit(plain.step)(GRADS, state, PARAMS), PARAMS)
