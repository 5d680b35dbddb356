"""The kernel for TPUs, interpreted, and lowered without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_equal, decoded, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from same_step import ByUpdate, assert_near_moments, assert_same_steps
from test_fused_rounding import WRAPPERS, assert_same
from test_pallas import FORMS, LR, VARIANTS, adamw, assert_nearly, call_of, call_of_variant, gradients, numbers

import adamjax
from adamjax.kernels import _backend, _fused, _pallas_tpu

DEVICES = jax.device_count()
COMPILED = _pallas_tpu.KERNEL
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")
# The wide one takes programs side by side and above each other, the last of both in part; XLA steps the short one.
SHAPES = {"wide": (40, 4352), "cube": (2, 9, 512), "short": (7,)}
CASES = {
    "int8": (adamw, "float32", {"mu_dtype": adamjax.quantized("int8", 32), "nu_dtype": adamjax.quantized("int8", 32)}),
    "int4": (adamw, "bfloat16", {"mu_dtype": INT4, "nu_dtype": INT4}),
    "amsgrad": (FORMS["amsgrad"], "float32", {"mu_dtype": INT4, "nu_dtype": adamjax.quantized("int8", 256)}),
    "int8 and float32": (adamw, "float32", {"mu_dtype": INT8}),
}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(_fused, "MIN_KERNEL_SIZE", 4096)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_pallas_tpu, "KERNEL", _pallas_tpu.INTERPRETED)
    monkeypatch.setattr(_fused, "_platform", lambda: _pallas_tpu)


def steps_of(case, by, count):
    make, dtype, options = CASES[case]
    fused, plain = (make(**kw, **options) for kw in ({"fused": True}, {}))
    params = numbers(0, dtype, SHAPES)
    state = jax.jit(plain.init)(params)
    grads = [gradients(i + 1, dtype, SHAPES) for i in range(count)]
    assert_same_steps(by(fused), by(plain), state, params, grads, LR)


@pytest.mark.parametrize("case", ["int8", *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[1:])])
def test_the_plain_steps(case):
    steps_of(case, lambda opt: opt, 3)


@pytest.mark.parametrize("case", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_updates(case):
    steps_of(case, ByUpdate, 2)


PARAMS, GRADS = numbers(0, shapes={"w": (16, 512)}), gradients(1, shapes={"w": (16, 512)})
FUSED_OPT, PLAIN_OPT = (adamw(mu_dtype=INT4, nu_dtype=INT8, **kw) for kw in ({"fused": True}, {}))


def test_clipped_and_without_parameters():
    opts = [
        adamjax.chain(adamjax.clip_by_global_norm(0.1), adamjax.adam(LR, nu_dtype=INT8, **kw))
        for kw in ({"fused": True}, {})
    ]
    state = opts[1].init(PARAMS)
    assert_nearly(*(jax.jit(opt.update)(GRADS, state) for opt in opts))


def test_many_at_once():
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (GRADS, PLAIN_OPT.init(PARAMS), PARAMS))
    assert_nearly(*(jax.jit(jax.vmap(opt.step))(*many) for opt in (FUSED_OPT, PLAIN_OPT)))


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_parameters_that_wrappers_round(wrapper):
    fused, plain = (
        WRAPPERS[wrapper](adamjax.adamw(1e-3, mu_dtype=INT8, nu_dtype=INT8, **kw)) for kw in ({"fused": True}, {})
    )
    params, grads = numbers(0, "bfloat16", {"w": (16, 512)}), numbers(1, "bfloat16", {"w": (16, 512)})
    state = plain.init(params)
    found, expected = (jax.jit(opt.step)(grads, state, params) for opt in (fused, plain))
    assert_same(found, expected, params)
    g = np.abs(np.asarray(grads["w"], np.float64))
    assert_near_moments("w", g, found[1].inner[0], expected[1].inner[0], decoded(state.inner[0]))


def test_not_a_number_reaches_its_block():
    grads = {"w": jnp.ones((16, 512)).at[2, 70].set(jnp.nan)}
    _, (state, *_) = jax.jit(FUSED_OPT.step)(grads, PLAIN_OPT.init(PARAMS), PARAMS)
    expected = np.zeros((16, 512), bool)
    expected[2, 64:128] = True
    np.testing.assert_array_equal(np.isnan(decoded(state).nu["w"]), expected)


@pytest.mark.skipif(DEVICES < 8, reason="fewer than 8 devices")
def test_each_device_steps_its_part():
    """In Explicit mode, with the random numbers that its part has in the whole."""
    mesh = make_mesh(AxisType.Explicit, (2, 4), ("data", "model"))
    params, grads = numbers(0, shapes={"w": (4, 8, 2048)}), gradients(1, shapes={"w": (4, 8, 2048)})
    expected = jax.jit(PLAIN_OPT.step)(grads, PLAIN_OPT.init(params), params)
    sharding = NamedSharding(mesh, P(None, "data", "model"))
    with jax.set_mesh(mesh):
        placed = [{"w": jax.device_put(x["w"], sharding)} for x in (grads, params)]
        found = jax.jit(FUSED_OPT.step)(placed[0], FUSED_OPT.init(placed[1]), placed[1])
    assert found[0]["w"].sharding.is_equivalent_to(sharding, 3)
    assert_nearly(jax.device_get(found), expected)


@pytest.mark.parametrize(
    ("options", "shape", "why"),
    [
        ({"mu_dtype": INT8}, (128, 192), "its last axis, 192, is no multiple of 256 on each device"),
        ({"mu_dtype": adamjax.quantized("int8", 96)}, (64, 768), "its moments are quantised in blocks of 96"),
        ({"mu_dtype": "bfloat16", "nu_dtype": INT4}, (64, 512), "one of its moments is quantised and the other bfloat"),
    ],
)
def test_what_cannot_be_fused(options, shape, why):
    params = {"w": jnp.ones(shape)}
    opt = adamjax.adam(LR, fused=True, **options)
    with pytest.raises(ValueError, match=rf"fused=True cannot step params\['w'\]: {why}.* Take fused=False"):
        opt.step(params, opt.init(params), params)


def test_several_devices_in_auto_mode_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"cannot step params\['w'\]: on TPUs, XLA cannot spread a kernel"):
        FUSED_OPT.step(PARAMS, PLAIN_OPT.init(PARAMS), PARAMS)


def test_floats_are_left_to_xla():
    opt, plain = adamw(fused=True), adamw()
    assert_equal(*(o.step(PARAMS, plain.init(PARAMS), PARAMS) for o in (opt, plain)))


def lowered_for_tpu(*call):
    traced = jax.jit(_backend.step_leaf, static_argnums=(0, 1)).trace(COMPILED, *call)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("format", ["int8", "int4", "int4 and int8", "float32 and int4"])
def test_it_lowers_without_a_tpu(format):
    assert "tpu_custom_call" in lowered_for_tpu(*call_of((40, 8448), format))


def test_it_lowers_in_64_bits_too():
    with jax.enable_x64(True):
        text = lowered_for_tpu(*call_of((16, 512)))
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_lowers_without_a_tpu(variant):
    assert "tpu_custom_call" in lowered_for_tpu(*call_of_variant((16, 512), VARIANTS[variant]))
