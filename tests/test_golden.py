"""Live comparison with optax, and with torch and what is made for it where they are installed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import gradients
from tolerances import OPTAX, TORCH

import adamjax
from adamjax import schedules

pytestmark = pytest.mark.numbers

STEPS = 60
SHAPE = (5, 7)
START = np.random.default_rng(3).normal(size=SHAPE)
LR = 1e-2


def trajectory(opt, grads, dtype):
    """The parameters after each step, in double."""
    params = jnp.asarray(START, dtype)
    state, update = opt.init(params), jax.jit(opt.update)
    for g in grads:
        updates, state = update(jnp.asarray(g, dtype), state, params)
        params = optax.apply_updates(params, updates)
        yield np.asarray(params, np.complex128 if dtype.startswith("complex") else np.float64)


def assert_same_course(found, expected, tolerance, dtype):
    """Within `tolerance` learning rates, and one rounding of the parameters, per step done."""
    rounding = np.finfo(dtype).eps
    for t, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        error = np.abs(a - b) - t * rounding * np.abs(b)
        assert np.max(error) <= tolerance * LR * t, f"step {t}: {np.max(error) / LR:.2g} learning rates"


OPTAX_PAIRS = {
    "adam": (adamjax.adam(LR), optax.adam(LR)),
    "adam eps": (adamjax.adam(LR, 0.8, 0.95, 1e-3, 1e-4), optax.adam(LR, 0.8, 0.95, 1e-3, 1e-4)),
    "adam nesterov": (adamjax.adam(LR, nesterov=True), optax.adam(LR, nesterov=True)),
    "adam schedule": (adamjax.adam(schedules.cosine(LR, 50)), optax.adam(optax.cosine_decay_schedule(LR, 50))),
    "adam coupled": (
        adamjax.adam(LR, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam(), optax.scale_by_learning_rate(LR)),
    ),
    "adamw": (adamjax.adamw(LR), optax.adamw(LR)),
    "adamw decay": (adamjax.adamw(LR, weight_decay=0.3), optax.adamw(LR, weight_decay=0.3)),
    "adamw mask": (adamjax.adamw(LR, weight_decay=0.3, mask=False), optax.adamw(LR, weight_decay=0.3, mask=False)),
    "adamw positional": tuple(
        adamw(LR, 0.8, 0.9, 1e-6, 1e-7, None, 0.2, True) for adamw in (adamjax.adamw, optax.adamw)
    ),
    "amsgrad": (adamjax.amsgrad(LR, variant="corrected"), optax.amsgrad(LR)),
    "amsgrad paper": (
        adamjax.amsgrad(LR, variant="paper"),
        optax.amsgrad(LR, bias_correction_mu=False, bias_correction_nu=False),
    ),
    "nadam": (adamjax.nadam(LR), optax.nadam(LR)),
    "nadamw": (adamjax.nadamw(LR, weight_decay=0.1), optax.nadamw(LR, weight_decay=0.1)),
    "radam": (adamjax.radam(LR), optax.radam(LR)),
    "radam short": (adamjax.radam(LR, b2=0.9, threshold=6.0), optax.radam(LR, b2=0.9, threshold=6.0)),
    "radam nesterov": (adamjax.radam(LR, nesterov=True), optax.radam(LR, nesterov=True)),
    "adamax": (adamjax.adamax(LR), optax.adamax(LR)),
    "adamaxw": (adamjax.adamaxw(LR, weight_decay=0.1), optax.adamaxw(LR, weight_decay=0.1)),
}


def ramp(count, steps):
    """From 0 to 1, in the precision of the run."""
    return jnp.minimum(count.astype(jnp.result_type(float)) / steps, 1)


def half_life(init, end, steps):
    first, last = (math.log(0.5) / math.log(b) for b in (init, end))
    return lambda count: 0.5 ** (1 / (first + (last - first) * ramp(count, steps)))


CONTRIB_PAIRS = {
    "ademamix": (
        adamjax.ademamix(LR, 0.9, 0.99, 0.999, 8.0, 1e-6, 1e-9, None, 0.1),
        optax.contrib.ademamix(LR, 0.9, 0.99, 0.999, 8.0, 1e-6, 1e-9, None, 0.1),
    ),
    "ademamix schedules": (
        adamjax.ademamix(LR, b3=schedules.half_life(0.9, 0.9999, 40), alpha=schedules.linear(0.0, 8.0, 40)),
        optax.contrib.ademamix(LR, b3=half_life(0.9, 0.9999, 40), alpha=lambda count: 8 * ramp(count, 40)),
    ),
    "simplified_ademamix": (
        adamjax.simplified_ademamix(LR / 100, 0.99, 0.95, 2.0, 1e-6, 1e-9, 0.1),
        optax.contrib.simplified_ademamix(LR / 100, 0.99, 0.95, 2.0, 1e-6, 1e-9, 0.1),
    ),
    "adopt": (adamjax.adopt(LR, b2=0.99), optax.contrib.adopt(LR, b2=0.99)),
    "adopt not clipped": (adamjax.adopt(LR, use_clipping=False), optax.contrib.adopt(LR, use_clipping=False)),
}
OPTAX_PAIRS |= CONTRIB_PAIRS


# optax's rectification cancels in float32, by 20 times our error; in double it does not matter. The oracle looks at
# all dtypes of all our optimizers: here, one of each rule suffices.
RULES = ["adam", "amsgrad", "adamw decay", "nadam", "adamax"]
IN_DOUBLE = {"radam", "radam short", "radam nesterov", *CONTRIB_PAIRS}
DTYPES = [(name, "float64" if name in IN_DOUBLE else "float32") for name in OPTAX_PAIRS]
DTYPES += [(name, dtype) for name in RULES for dtype in ("complex64", "float64")]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_optax(name, dtype):
    ours, theirs = OPTAX_PAIRS[name]
    grads = gradients(SHAPE, STEPS, dtype=np.dtype(dtype))
    with jax.enable_x64(dtype == "float64"):
        found, expected = (list(trajectory(opt, grads, dtype)) for opt in (ours, theirs))
    assert_same_course(found, expected, OPTAX[dtype], dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_where_optax_fails_in_half_precision(dtype):
    """The deliberate differences: a bfloat16 nu freezes there, a float16 epsilon is 0."""
    one = jnp.ones(4, dtype)
    theirs, ours = optax.scale_by_adam(), adamjax.scale_by_adam()
    their_state, our_state = theirs.init(one), ours.init(one)
    assert their_state.nu.dtype == dtype
    their_update, our_update = jax.jit(theirs.update), jax.jit(ours.update)
    for _ in range(1000):
        _, their_state = their_update(one, their_state)
        _, our_state = our_update(one, our_state)
    exact = 1 - 0.999**1000
    assert abs(float(our_state.nu[0]) - exact) < 1e-4
    assert abs(float(their_state.nu[0]) - exact) > 0.004
    direction, _ = their_update(jnp.zeros_like(one), theirs.init(one))
    assert np.isnan(direction[0]) == (dtype == "float16")
    direction, _ = our_update(jnp.zeros_like(one), ours.init(one))
    assert direction[0] == 0


def torch_trajectory(torch, make, grads, dtype, module=None):
    p = torch.nn.Parameter(torch.tensor(START, dtype=getattr(torch, dtype)))
    opt = make(torch.optim if module is None else module, [p])
    for g in grads:
        p.grad = torch.tensor(g, dtype=getattr(torch, dtype))
        opt.step()
        yield p.detach().double().numpy()


TORCH_PAIRS = {
    "adam": (adamjax.adam(LR), lambda o, p: o.Adam(p, LR)),
    "adam eps": (adamjax.adam(LR, 0.8, 0.95, 1e-3), lambda o, p: o.Adam(p, LR, (0.8, 0.95), 1e-3)),
    "adam coupled": (adamjax.adam(LR, weight_decay=0.1), lambda o, p: o.Adam(p, LR, weight_decay=0.1)),
    "adam maximize": (adamjax.adam(LR, maximize=True), lambda o, p: o.Adam(p, LR, maximize=True)),
    "adam coupled maximize": (
        adamjax.adam(LR, weight_decay=0.1, maximize=True),
        lambda o, p: o.Adam(p, LR, weight_decay=0.1, maximize=True),
    ),
    "amsgrad": (adamjax.adam(LR, amsgrad=True), lambda o, p: o.Adam(p, LR, amsgrad=True)),
    "adamw": (adamjax.adamw(LR, weight_decay=0.1), lambda o, p: o.AdamW(p, LR, weight_decay=0.1)),
    "adamw amsgrad": (
        adamjax.adamw(LR, b2=0.99, weight_decay=0.1, amsgrad=True),
        lambda o, p: o.AdamW(p, LR, (0.9, 0.99), weight_decay=0.1, amsgrad=True),
    ),
    "adamw maximize": (
        adamjax.adamw(LR, weight_decay=0.1, maximize=True),
        lambda o, p: o.AdamW(p, LR, weight_decay=0.1, maximize=True),
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in TORCH_PAIRS), *((name, "float64") for name in ("adam", "amsgrad", "adamw"))],
)
def test_torch(name, dtype):
    torch = pytest.importorskip("torch")
    ours, theirs = TORCH_PAIRS[name]
    grads = gradients(SHAPE, STEPS, dtype=np.dtype(dtype))
    with jax.enable_x64(dtype == "float64"):
        found = list(trajectory(ours, grads, dtype))
    assert_same_course(found, torch_trajectory(torch, theirs, grads, dtype), TORCH[dtype], dtype)


def shifted(schedule):
    """One step later, for those whose first step is step 1 of their schedules."""
    return lambda count: schedule(count + 1)


# (package, ours, theirs, dtype); optimi corrects biases in float32, and adam-atan2-pytorch masks the decay in it.
PEERS = {
    "cautious": (
        "pytorch_optimizer",
        adamjax.adamw(LR, weight_decay=0.1, cautious=True),
        lambda o, p: o.AdEMAMix(p, LR, alpha=0.0, weight_decay=0.1, weight_decouple=True, cautious=True),
        "float64",
    ),
    "ademamix": (
        "pytorch_optimizer",
        adamjax.ademamix(
            LR,
            b3=shifted(schedules.half_life(0.9, 0.999, 40)),
            alpha=shifted(schedules.linear(0.0, 8.0, 40)),
            weight_decay=0.1,
        ),
        lambda o, p: o.AdEMAMix(
            p, LR, (0.9, 0.999, 0.999), alpha=8.0, t_alpha_beta3=40, weight_decay=0.1, weight_decouple=True
        ),
        "float64",
    ),
    "stable": (
        "pytorch_optimizer",
        adamjax.stable_adamw(LR, weight_decay=0.1),
        lambda o, p: o.StableAdamW(p, LR, (0.9, 0.99), weight_decay=0.1, eps=1e-6),
        "float64",
    ),
    "stable of optimi": (
        "optimi",
        adamjax.stable_adamw(LR, weight_decay=0.1),
        lambda o, p: o.StableAdamW(p, LR, weight_decay=0.1),
        "float32",
    ),
    "atan2": (
        "adam_atan2_pytorch",
        adamjax.adam_atan2(LR, a=1.0, b=2.0, weight_decay=0.1),
        lambda o, p: o.AdamAtan2(p, LR, a=1.0, b=2.0, weight_decay=0.1),
        "float64",
    ),
    "cautious decay": (
        "adam_atan2_pytorch",
        adamjax.adam_atan2(LR, weight_decay=0.1, cautious_decay=True),
        lambda o, p: o.AdamAtan2(p, LR, weight_decay=0.1, cautious_wd=True),
        "float32",
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_packages_for_torch(name):
    package, ours, theirs, dtype = PEERS[name]
    torch, module = pytest.importorskip("torch"), pytest.importorskip(package)
    grads = gradients(SHAPE, STEPS, dtype=np.dtype(dtype))
    with jax.enable_x64(dtype == "float64"):
        found = list(trajectory(ours, grads, dtype))
    assert_same_course(found, torch_trajectory(torch, theirs, grads, dtype, module), TORCH[dtype], dtype)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: adamjax.adam(-1.0), lambda o, p: o.Adam(p, -1.0)),
        (lambda: adamjax.adam(eps=-1.0), lambda o, p: o.Adam(p, eps=-1.0)),
        (lambda: adamjax.adam(b1=1.5), lambda o, p: o.Adam(p, betas=(1.5, 0.9))),
        (lambda: adamjax.adam(b2=1.0), lambda o, p: o.Adam(p, betas=(0.9, 1.0))),
        (lambda: adamjax.adamw(weight_decay=-1), lambda o, p: o.AdamW(p, weight_decay=-1)),
    ],
)
def test_errors_start_with_the_words_of_torch(ours, theirs):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="Invalid") as their_error:
        theirs(torch.optim, [torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="Invalid") as our_error:
        ours()
    assert str(our_error.value).startswith(str(their_error.value))
