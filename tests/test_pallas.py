"""The kernel for GPUs: on one, if there is one, and interpreted elsewhere."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, by_step, decoded, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from same_step import ByUpdate, assert_near_moments, assert_near_steps, assert_same_steps
from test_fused_rounding import WRAPPERS, assert_same
from tolerances import FUSED_ROUNDED, RECOMPILED

import adamjax
from adamjax._transforms.adam import AdamRule
from adamjax._transforms.moments import moment_dithers
from adamjax.kernels import _backend, _fused, _pallas

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs jax 0.11")
on_gpu = jax.default_backend() == "gpu"
DEVICES = jax.device_count()
several = pytest.mark.skipif(DEVICES < 8, reason="fewer than 8 devices")

COMPILED = _pallas.KERNEL
LR = 1e-2
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")
FORMATS = {
    "int8": {"mu_dtype": INT8, "nu_dtype": INT8},
    "int4": {"mu_dtype": INT4, "nu_dtype": INT4},
    "int4 and int8": {"mu_dtype": INT4, "nu_dtype": INT8},
    "int8 and int4": {"mu_dtype": adamjax.quantized("int8", 64), "nu_dtype": INT4},
    "blocks of 64": {"mu_dtype": adamjax.quantized("int8", 64), "nu_dtype": adamjax.quantized("int8", 64)},
    "blocks of 64 and 192": {"mu_dtype": adamjax.quantized("int8", 64), "nu_dtype": adamjax.quantized("int8", 192)},
    "int8 and float32": {"mu_dtype": INT8},
    "float32 and int4": {"nu_dtype": INT4},
}
# Above what is quantised, with a rest that fills no program; and small ones that XLA steps.
SHAPES = {"matrix": (11, 384), "cube": (2, 8, 384), "short": (7,)}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(_fused, "MIN_KERNEL_SIZE", 4096)
    if not on_gpu:
        # The interpreter has effects, which `custom_partitioning` does not take.
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(_pallas, "KERNEL", _pallas.INTERPRETED)
        monkeypatch.setattr(_fused, "_platform", lambda: _pallas)


def numbers(seed, dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def gradients(seed, dtype="float32", shapes=SHAPES):
    """Of all sizes, with zeros."""
    rng = np.random.default_rng(seed)
    scales = {name: 10.0 ** rng.integers(-7, 3, shape) * rng.integers(0, 5, shape) for name, shape in shapes.items()}
    return jax.tree.map(lambda g, s: (g * s).astype(dtype), numbers(seed, shapes=shapes), scales)


def three_steps(make, dtype="float32", coupled=0.0, by=lambda opt: opt, **kw):
    fused, plain = make(fused=True, **kw), make(**kw)
    params = numbers(0, dtype)
    state = jax.jit(plain.init)(params)
    assert_same_steps(by(fused), by(plain), state, params, [gradients(i + 1, dtype) for i in range(3)], LR, coupled)


def adamw(**kw):
    return adamjax.adamw(LR, weight_decay=0.1, **kw)


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format):
    three_steps(adamw, **FORMATS[format])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_parameters_of_bfloat16(format):
    three_steps(adamw, "bfloat16", **FORMATS[format])


FORMS = {
    "nesterov": lambda **kw: adamjax.adam(LR, nesterov=True, **kw),
    "amsgrad": lambda **kw: adamjax.amsgrad(LR, **kw),
    "corrected": lambda **kw: adamjax.amsgrad(LR, variant="corrected", **kw),
    # Gradient and decay may cancel: without eps_root, what is left of both would be the whole direction.
    "cautious": lambda **kw: adamjax.adamw(LR, weight_decay=0.1, cautious_decay=True, **kw),
    "coupled": lambda **kw: adamjax.adam(LR, weight_decay=0.1, maximize=True, eps_root=1e-4, **kw),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    three_steps(FORMS[form], coupled=0.1 if form == "coupled" else 0.0, **FORMATS["int4 and int8"])


@pytest.mark.parametrize(("format", "dtype"), [("int8", "float32"), ("int4 and int8", "bfloat16")])
def test_updates(format, dtype):
    three_steps(adamw, dtype, by=ByUpdate, **FORMATS[format])


def test_updates_without_parameters():
    fused, plain = (adamjax.adam(LR, **kw, **FORMATS["int8"]) for kw in ({"fused": True}, {}))
    state = plain.init(PARAMS)
    assert_nearly(*(jax.jit(opt.update)(GRADS, state) for opt in (fused, plain)))


@pytest.mark.parametrize("method", ["step", "update"])
def test_clipped_gradients(method):
    opts = [adamjax.chain(adamjax.clip_by_global_norm(0.1), opt) for opt in (FUSED_OPT, PLAIN_OPT)]
    state = opts[1].init(PARAMS)
    assert_nearly(*(jax.jit(getattr(opt, method))(GRADS, state, PARAMS) for opt in opts))


@pytest.mark.numbers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "by"), [*((wrapper, lambda opt: opt) for wrapper in WRAPPERS), ("kahan", ByUpdate)]
)
def test_parameters_that_wrappers_round(wrapper, by):
    rate = 1e-3
    fused, plain = (
        WRAPPERS[wrapper](adamjax.adamw(rate, weight_decay=0.1, **kw, **FORMATS["int8"]))
        for kw in ({"fused": True}, {})
    )
    params = numbers(0, "bfloat16")
    state = plain.init(params)
    steps = [jax.jit(by(opt).step) for opt in (fused, plain)]
    for i in range(2):
        grads = numbers(i + 1, "bfloat16")
        found, expected = (step(grads, state, params) for step in steps)
        assert_same(found, expected, params)
        for name, g in grads.items():
            g = np.abs(np.asarray(g, np.float64))
            assert_near_moments(name, g, found[1].inner[0], expected[1].inner[0], decoded(state.inner[0]))
        params, state = expected


@pytest.mark.skipif(not on_gpu, reason="no GPU")
@pytest.mark.parametrize("format", ["int8", "int4", "int4 and int8"])
def test_the_plain_step_is_that_of_a_cpu(format):
    plain, params = adamw(**FORMATS[format]), numbers(0)
    args = gradients(1), plain.init(params), params
    expected = jax.jit(plain.step)(*jax.device_put(args, jax.devices("cpu")[0]))
    assert_near_steps(jax.jit(plain.step)(*args), jax.device_put(expected, jax.devices()[0]), *args, LR)


@pytest.mark.skipif(not on_gpu, reason="no GPU")
@pytest.mark.parametrize("devices", [1, 2])
def test_in_place(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    opt = adamw(fused=True, **FORMATS["int8"])
    params = {"w": jnp.ones((1001, 1024 * devices))}
    advance = jax.jit(by_step(opt), donate_argnums=(0, 1))
    memory = advance.lower(params, opt.init(params), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < params["w"].nbytes / 100


PARAMS, GRADS = numbers(0), gradients(1)
FUSED_OPT, PLAIN_OPT = (adamw(**kw, **FORMATS["int8"]) for kw in ({"fused": True}, {}))


def assert_nearly(found, expected):
    """What is stored may be rounded the other way here and there."""
    assert_close(found[0], expected[0], 4 * RECOMPILED)
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.mean(np.abs(a - b) > RECOMPILED * np.abs(b)) <= FUSED_ROUNDED


def in_scan(opt):
    def body(carry, _):
        return opt.step(GRADS, carry[1], carry[0]), None

    return jax.jit(lambda p, s: jax.lax.scan(body, (p, s), None, length=2)[0])(PARAMS, opt.init(PARAMS))


def over_both(opt):
    def one(rate, params):
        chain = jax.tree.unflatten(jax.tree.structure(opt), [*jax.tree.leaves(opt)[:-1], rate])
        return chain.step(GRADS, chain.init(params), params)

    inner = jax.vmap(one, in_axes=(None, 0))
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    return jax.jit(jax.vmap(inner, in_axes=(0, None)))(jnp.asarray([0.1, 0.01]), params)


@pytest.mark.parametrize("use", [in_scan, over_both])
def test_wherever_a_step_goes(use):
    assert_nearly(use(FUSED_OPT), use(PLAIN_OPT))


def test_derivatives_do_not_pass_through_codes():
    def loss(params, opt, grads):
        return jnp.sum(opt.step(grads(params), opt.init(PARAMS), params)[0]["matrix"] ** 2)

    constant = partial(loss, grads=lambda params: GRADS)
    found, expected = (jax.jit(jax.grad(partial(constant, opt=opt)))(PARAMS) for opt in (FUSED_OPT, PLAIN_OPT))
    assert_close(found, expected, 4 * RECOMPILED)
    with pytest.raises(TypeError, match="moments that are stored as integers"):
        jax.grad(partial(loss, opt=FUSED_OPT, grads=lambda params: params))(PARAMS)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_nan_reaches_its_block(format):
    params = {"w": jnp.ones((16, 256))}
    grads = {"w": jnp.ones((16, 256)).at[2, 70].set(jnp.nan)}
    opt = adamw(fused=True, **FORMATS[format])
    _, (state, *_) = jax.jit(opt.step)(grads, opt.init(params), params)
    expected = np.zeros((16, 256), bool)
    expected[2, 64:128] = True  # of the second moment, and so of the first one
    for moment in (decoded(state).mu["w"], decoded(state).nu["w"]):
        np.testing.assert_array_equal(np.isnan(moment), expected)


def call_of(shape, format="int8", dtype="float32", residual=None, **variant):
    """What the step of one leaf is called with, but for the kernel."""
    opt = adamw(**FORMATS[format])
    variant = _backend.StepVariant(AdamRule(), coupled=False, **{"decays": True} | variant)
    params, grads = numbers(0, shapes={"w": shape}), numbers(1, shapes={"w": shape})
    state = opt.init(params)[0]
    count = state.count + 1
    scalars = opt.transforms[0]._scalars(count.astype(jnp.float32))
    limit = jnp.float32(1e19) if variant.clips else None
    numbers_ = _backend.StepScalars(scalars, limit, *map(jnp.float32, (1, 0, -LR, -LR * 0.1)))
    dithers = moment_dithers(count, 0, state.mu["w"], state.nu["w"])
    p = params["w"] if variant.reads_param else grads["w"]
    leaf = (p.astype(dtype), state.mu["w"], state.nu["w"], None, residual)
    return variant, leaf, grads["w"], numbers_, (*dithers, dithers[0])


def test_a_part_has_the_random_numbers_of_the_whole():
    """Of a cube that is cut along all axes: rows lie apart in the whole."""
    form, leaf, g, numbers_, dithers = call_of((4, 8, 1024))
    whole = _backend.step_leaf(_pallas.KERNEL, form, leaf, g, numbers_, dithers)

    def part(x):
        n = x.shape[-1]
        return x[1:, 4:, n // 4 : n // 2]

    p, m, v, *_ = leaf
    cut = jax.tree.map(part, (p, g, m, v))
    call = _backend.LeafSpec.of(form, leaf)
    places = jnp.stack([dithers[0].seed, dithers[0].phase, *map(jnp.uint32, (0, 0, 1, 4, 256))])
    scalars = jnp.stack(list(map(jnp.float32, _pallas.KERNEL.scalars(form, numbers_))))
    found = _pallas.KERNEL.run(call, scalars, places, *jax.tree.leaves(cut))
    for a, b in zip(found, jax.tree.leaves(jax.tree.map(part, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


@several
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, ("data", "model")), P("model", None, "data")])
def test_each_device_steps_its_part(spec, kind, monkeypatch):
    if kind == AxisType.Auto:
        # No programs, and all rows as those that are left over: not interpreted.
        monkeypatch.setattr(jax, "device_count", lambda: DEVICES)
        monkeypatch.setattr(_pallas, "_ROWS", 10**6)
    mesh = make_mesh(kind, (2, 4), ("data", "model"))
    shapes = {"w": (8, 8, 512)}
    params, grads = numbers(0, shapes=shapes), gradients(1, shapes=shapes)
    with jax.set_mesh(mesh):
        placed = [{"w": jax.device_put(x["w"], NamedSharding(mesh, spec))} for x in (params, grads)]
        state = FUSED_OPT.init(placed[0])
        where = [x.sharding for x in jax.tree.leaves((placed[0], state))]
        advance = jax.jit(by_step(FUSED_OPT))
        text = advance.lower(placed[0], state, placed[1]).compile().as_text()
        found = advance(placed[0], state, placed[1])
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert all(x.sharding.is_equivalent_to(w, x.ndim) for x, w in zip(jax.tree.leaves(found), where, strict=True))
    expected = jax.jit(by_step(PLAIN_OPT))(params, PLAIN_OPT.init(params), grads)
    assert_nearly(jax.device_get(found), expected)


@several
def test_inside_shard_map():
    mesh = make_mesh(AxisType.Auto, (2,))
    params, grads = (make(0, shapes={"w": (32, 384)}) for make in (numbers, gradients))

    def step(opt, check_vma):
        def of_part(g, p):
            return opt.step(g, opt.init(p), p)[0]

        specs = {"in_specs": P("data"), "out_specs": P("data")}
        return jax.jit(jax.shard_map(of_part, mesh=mesh, check_vma=check_vma, **specs))(grads, params)

    assert_close(step(FUSED_OPT, False), step(PLAIN_OPT, False), RECOMPILED)
    with pytest.raises(ValueError, match="the kernel needs check_vma=False there"):
        step(FUSED_OPT, True)


BIG = jnp.ones((128, 192))


@pytest.mark.parametrize(
    ("options", "params", "why"),
    [
        (FORMATS["int8"], BIG[:, :160], "its last axis, 160, is no multiple of the 64 numbers in a block"),
        (FORMATS["int4"], BIG.astype(jnp.float16), "its parameter is float16, and the kernel steps float32, bfloat16"),
        ({"mu_dtype": "bfloat16", "nu_dtype": INT4}, BIG, "one of its moments is quantised and the other bfloat16"),
        ({"mu_dtype": adamjax.quantized("int8", 80)}, BIG, "its moments are quantised in blocks of 80"),
        (
            {"mu_dtype": adamjax.quantized("int8", 128), "nu_dtype": adamjax.quantized("int8", 192)},
            jnp.ones((64, 384)),
            "the blocks of its moments, of 128 and of 192 numbers, do not begin together",
        ),
    ],
)
def test_what_cannot_be_fused(options, params, why):
    params = {"w": params}
    opt, plain = adamjax.adam(LR, fused=True, **options), adamjax.adam(LR, **options)
    with pytest.raises(ValueError, match=rf"fused=True cannot step params\['w'\]: {why}.* Take fused=False"):
        opt.step(params, opt.init(params), params)
    opt = adamjax.adam(LR, fused="auto", **options)
    _fused._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=rf"fused='auto' leaves params\['w'\] to XLA: {why}"):
        found = opt.step(params, opt.init(params), params)
    assert_equal(found, plain.step(params, plain.init(params), params))


@pytest.mark.parametrize(
    ("version", "capability", "why"),
    [
        ((0, 10, 2), "9.0", "the kernel needs jax 0.11, .*: pip install --upgrade jax"),
        ((0, 11, 0), "8.0", r"the kernel is for NVIDIA's Hopper and later, and this GPU is A100 \(8.0\)"),
        ((0, 11, 0), "gfx942", "the kernel is for NVIDIA's Hopper and later"),
        ((0, 11, 0), "10.3", "None"),
    ],
)
def test_where_there_is_no_kernel(version, capability, why, monkeypatch):
    class Device:
        compute_capability, device_kind = capability, "A100"

    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    _pallas._missing.cache_clear()
    found = _pallas._missing()
    _pallas._missing.cache_clear()
    assert re.match(why, str(found))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_floats_are_left_to_xla(dtype):
    options = {"mu_dtype": dtype, "nu_dtype": "bfloat16" if dtype == "float16" else dtype}
    opt, plain = adamw(fused=True, **options), adamw(**options)
    params = {"w": BIG}
    assert_equal(opt.step(params, opt.init(params), params), plain.step(params, plain.init(params), params))


def lowered_for_cuda(*call):
    traced = jax.jit(_backend.step_leaf, static_argnums=(0, 1)).trace(COMPILED, *call)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("format", "devices"),
    [*((format, 1) for format in FORMATS), ("int8", 8)],
)
def test_it_lowers_without_a_gpu(format, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    # Of a shape for each: what is traced for one number of devices is not traced again for another.
    assert "mosaic_gpu" in lowered_for_cuda(*call_of((16, 384 * devices), format))


FLOAT32 = np.dtype(np.float32)
RESIDUALS = {
    "kahan": "bfloat16",
    "master_weights": "float32",
    "low_bits": "uint16",
    "low_bits=8": "uint8",
    "stochastic_rounding": None,
}
VARIANTS = {
    "clipped": {"clips": True},
    "update": {"update": FLOAT32},
    "update of bfloat16": {"update": np.dtype(jnp.bfloat16), "dtype": "bfloat16"},
    "update without the parameter": {"update": FLOAT32, "decays": False},
    **{wrapper: {"rounding": wrapper} for wrapper in WRAPPERS},
    "update for kahan": {"rounding": "kahan", "update": FLOAT32},
}


def call_of_variant(shape, variant):
    if wrapper := variant.get("rounding"):
        residual = RESIDUALS[wrapper] and jnp.zeros(shape, RESIDUALS[wrapper])
        rounding = WRAPPERS[wrapper](adamw())._rounding
        variant = variant | {"dtype": "bfloat16", "residual": residual, "rounding": rounding}
    return call_of(shape, **variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_lowers_without_a_gpu(variant):
    assert "mosaic_gpu" in lowered_for_cuda(*call_of_variant((16, 384), VARIANTS[variant]))
