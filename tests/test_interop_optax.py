"""States to and from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_equal, assert_same_types, gradients
from tolerances import OPTAX

import adamjax
from adamjax.interop import optax as interop

pytestmark = pytest.mark.usefixtures("lenient")

LR = 1e-2
OURS_OVER = adamjax.schedules.linear(LR, 0.0, 100)
THEIRS_OVER = optax.linear_schedule(LR, 0.0, 100)
PAIRS = {
    "adam": (adamjax.adam(LR), optax.adam(LR)),
    "adam schedule": (adamjax.adam(OURS_OVER), optax.adam(THEIRS_OVER)),
    "adamw": (adamjax.adamw(LR, weight_decay=0.1), optax.adamw(LR, weight_decay=0.1)),
    "amsgrad": (adamjax.amsgrad(LR, variant="corrected"), optax.amsgrad(LR)),
    "nadam": (adamjax.nadam(LR), optax.nadam(LR)),
    "nadamw": (adamjax.nadamw(LR), optax.nadamw(LR)),
    "radam": (adamjax.radam(LR), optax.radam(LR)),
    "adamax": (adamjax.adamax(LR), optax.adamax(LR)),
    "adamaxw": (adamjax.adamaxw(OURS_OVER), optax.adamaxw(THEIRS_OVER)),
    "adopt": (adamjax.adopt(LR), optax.contrib.adopt(LR)),
    "ademamix": (adamjax.ademamix(LR, b3=0.99), optax.contrib.ademamix(LR, b3=0.99)),
    "ademamix with decay": (
        adamjax.ademamix(OURS_OVER, weight_decay=0.1),
        optax.contrib.ademamix(THEIRS_OVER, weight_decay=0.1),
    ),
}
SCHEDULE_FREE: dict[str, Any] = {"warmup_steps": 3, "b1": 0.95, "weight_decay": 0.1, "weight_lr_power": 1.5}
AROUND = {
    "chain": (
        adamjax.chain(adamjax.clip_by_global_norm(10.0), adamjax.adamw(OURS_OVER)),
        optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(THEIRS_OVER)),
    ),
    "optax's chain": (
        optax.chain(optax.clip_by_global_norm(10.0), adamjax.adam(LR)),
        optax.chain(optax.clip_by_global_norm(10.0), optax.adam(LR)),
    ),
    "from inject_hyperparams": (adamjax.adamw(LR), optax.inject_hyperparams(optax.adamw)(LR)),
    "inject_hyperparams": (
        optax.inject_hyperparams(adamjax.adam)(learning_rate=LR),
        optax.inject_hyperparams(optax.adam)(learning_rate=LR),
    ),
    "from MultiSteps": (adamjax.adam(LR), optax.MultiSteps(optax.adam(LR), 2)),
    "MultiSteps": (optax.MultiSteps(adamjax.adam(OURS_OVER), 3), optax.MultiSteps(optax.adam(THEIRS_OVER), 3)),
    "schedule-free": (
        adamjax.chain(adamjax.clip_by_global_norm(10.0), adamjax.schedule_free_adamw(LR, **SCHEDULE_FREE)),
        optax.chain(optax.clip_by_global_norm(10.0), optax.contrib.schedule_free_adamw(LR, **SCHEDULE_FREE)),
    ),
}
PARAMS = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(4)}
GRADS = [{"a": a, "b": b} for a, b in zip(gradients((2, 3), 20), gradients((4,), 20, seed=1), strict=True)]


def run(opt, params, state, grads):
    update = jax.jit(opt.update)
    for g in grads:
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_near(found, expected, steps):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=OPTAX["float32"] * LR * steps)


@pytest.mark.parametrize("name", [*PAIRS, *AROUND])
def test_a_run_of_optax_continues_here(name):
    ours, theirs = (PAIRS | AROUND)[name]
    params, state = run(theirs, PARAMS, theirs.init(PARAMS), GRADS[:10])
    imported = interop.import_state(ours, params, state)
    if name in PAIRS:
        assert_same_types(imported, ours.init(params))
    expected, _ = run(theirs, params, state, GRADS[10:])
    if name == "from MultiSteps":
        # One gradient in place of the mean of two.
        pairs = zip(GRADS[10::2], GRADS[11::2], strict=True)
        found, _ = run(ours, params, imported, [jax.tree.map(lambda x, y: (x + y) / 2, a, b) for a, b in pairs])
    else:
        found, _ = run(ours, params, imported, GRADS[10:])
    assert_near(found, expected, 20)


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_of_ours_continues_in_optax(name):
    ours, theirs = PAIRS[name]
    params, state = run(ours, PARAMS, ours.init(PARAMS), GRADS[:10])
    exported = interop.export_state(ours, state)
    assert jax.tree.structure(exported) == jax.tree.structure(theirs.init(params))
    expected, _ = run(ours, params, state, GRADS[10:])
    found, _ = run(theirs, params, exported, GRADS[10:])
    assert_near(found, expected, 20)
    back = interop.import_state(ours, params, exported)
    assert_same_types(back, state)
    assert_near(back, state, 0)


INT8 = adamjax.quantized("int8", min_size=1)
ADAM = optax.adam(LR)
BAD = {
    "another tree": (
        adamjax.adam(),
        ADAM.init({"a": PARAMS["a"]}),
        r"^the arrays of state\[0\]\.mu lack state\[0\]\.mu\['b'\] .*of other parameters",
    ),
    "shape": (
        adamjax.adam(),
        ADAM.init(PARAMS | {"b": jnp.ones(5)}),
        r"^state\[0\]\.mu\['b'\] has shape \(5,\), expected",
    ),
    "dtype": (
        adamjax.adam(),
        optax.adam(LR, mu_dtype=jnp.complex64).init(PARAMS),
        r"^state\[0\]\.mu\['a'\] is complex64, and opt keeps float32",
    ),
    "no amsgrad": (adamjax.amsgrad(variant="corrected"), ADAM.init(PARAMS), r"^state\[0\] is without nu_max, and opt"),
    "amsgrad": (adamjax.adam(), optax.amsgrad(LR).init(PARAMS), r"^state\[0\] is with nu_max, and opt is not"),
    "torch's amsgrad": (adamjax.amsgrad(), optax.amsgrad(LR).init(PARAMS), r"use variant='corrected'"),
    "no Adam": (adamjax.adam(), optax.sgd(LR).init(PARAMS), r"^state has no states of Adam"),
    "two": (
        adamjax.adam(),
        optax.chain(ADAM, ADAM).init(PARAMS),
        r"^state has 2 states of Adam: state\[0\]\[0\], state",
    ),
    "AdEMAMix": (adamjax.ademamix(), ADAM.init(PARAMS), r"^state has no states of AdEMAMix"),
    "Adam of AdEMAMix": (adamjax.adam(), optax.contrib.ademamix(LR).init(PARAMS), r"^state has no states of Adam"),
    "Schedule-Free": (adamjax.schedule_free_adamw(LR), ADAM.init(PARAMS), r"^state has no states of Schedule-Free"),
    "Schedule-Free SGD": (
        adamjax.schedule_free_adamw(LR),
        optax.contrib.schedule_free_sgd(LR).init(PARAMS),
        r"^state\.base_optimizer_state has no states of schedule_free_adamw",
    ),
    "Schedule-Free inside": (
        optax.MultiSteps(adamjax.schedule_free_adamw(LR), 2),
        optax.MultiSteps(optax.contrib.schedule_free_adamw(LR), 2).init(PARAMS),
        r"^opt has no schedule_free_adamw where one is expected, perhaps inside an optimizer of optax",
    ),
    "codes": (adamjax.adam(mu_dtype=INT8), ADAM.init({"w": jnp.ones((8, 8))}), r"of other parameters, or opt stores"),
    "accumulated": (
        adamjax.adam(),
        optax.MultiSteps(ADAM, 3).init(PARAMS)._replace(mini_step=jnp.int32(2)),
        r"^state has accumulated 2 gradients that this optimizer has no place for",
    ),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"nu": 0.0},
            r"^state\[0\]\.nu\['a'\] is 0 at \[0, 0\] and at 5 more where state\[0\]\.mu is not, .*half precision",
        ),
        ({"nu": -1.0}, r"^state\[0\]\.nu\['a'\] is -\S+ at .*none can be below 0"),
        ({"mu": np.nan}, r"^state\[0\]\.mu\['a'\] is nan at .*the run had diverged"),
        ({"count": -3}, r"^state\[0\]\.count is -3, expected a whole number of steps"),
        ({"count": 7.5}, r"^state\[0\]\.count is 7\.5"),
        ({"count": "3"}, r"^state\[0\]\.count is '3'"),
        ({"count": np.ones(1, np.int32)}, r"^state\[0\]\.count is int32 of shape \(1,\)"),
        ({"mu": np.int32(1)}, r"^state\[0\]\.mu\['a'\] is int32, and moments are floats"),
    ],
)
@pytest.mark.parametrize("opt", [adamjax.adam(LR), adamjax.packed(adamjax.adam(LR))], ids=["adam", "packed"])
def test_numbers_that_no_run_leaves(opt, changes, message):
    _, (adam, *rest) = ADAM.update(PARAMS, ADAM.init(PARAMS), PARAMS)
    (field, factor), *_ = changes.items()

    def changed(x):
        return (x * factor).astype(factor.dtype if isinstance(factor, np.int32) else x.dtype)

    found = factor if field == "count" else jax.tree.map(changed, getattr(adam, field))
    with pytest.raises((ValueError, TypeError), match=message):
        interop.import_state(opt, PARAMS, (adam._replace(**{field: found}), *rest))


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    opt, state, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        interop.import_state(opt, {"w": jnp.ones((8, 8))} if name == "codes" else PARAMS, state)


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (adamjax.amsgrad(), r"^optax has nothing like ScaleByAdam"),
        (adamjax.simplified_ademamix(LR), r"^optax has nothing like ScaleBySimplifiedAdEMAMix"),
        (adamjax.schedule_free_adamw(LR), r"^optax has nothing like ScheduleFreeAdamW"),
        (adamjax.adam(maximize=True), r"^optax has nothing like CoupledDecay"),
        (adamjax.scale_by_adam(), r"is not one of adamjax's optimizers"),
        (adamjax.adam(mu_dtype=INT8), r"quantised cannot be exported"),
    ],
)
def test_what_optax_has_not(opt, message):
    with pytest.raises(TypeError, match=message):
        interop.export_state(opt, opt.init({"w": jnp.ones((8, 8))}))


def watching(learning_rate=1.0):
    plateau = adamjax.schedules.reduce_on_plateau(0.5, patience=1)
    return adamjax.chain(adamjax.scale_by_learning_rate(learning_rate), plateau)


COMBINATORS = {
    "chain": lambda opt: optax.chain(optax.identity(), opt),
    "wrapped in a chain": lambda opt: optax.chain(optax.identity(), interop.wrap(opt)),
    "named_chain": lambda opt: optax.named_chain(("first", optax.identity()), ("last", opt)),
    "masked": lambda opt: optax.masked(opt, True),
    "partition": lambda opt: optax.partition({0: opt}, 0),
    "MultiSteps": lambda opt: optax.MultiSteps(opt, 1),
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 2),
    "flatten": optax.flatten,
    "inject_hyperparams": lambda opt: optax.inject_hyperparams(watching)(learning_rate=1.0),
    "ours around": lambda opt: adamjax.skip_nonfinite(optax.chain(optax.identity(), opt)),
}


@pytest.mark.parametrize("name", COMBINATORS)
def test_extra_arguments_reach_ours_inside_optax(name):
    opt, g = COMBINATORS[name](watching()), jnp.ones(2)
    state, sizes = opt.init(g), []
    for _ in range(4):
        updates, state = opt.update(g, state, g, value=jnp.float32(1.0))
        sizes.append(float(-updates[0]))
    assert sizes[0] == 1
    assert sizes[-1] < 1
    with pytest.raises(ValueError, match=r"needs the value that it watches: call update\(.*, value=loss\).*pass it on"):
        opt.update(g, state, g)


def test_wrapped_it_is_a_tuple():
    init, update = pair = interop.wrap(adamjax.adam())
    assert isinstance(pair, tuple)
    assert pair[0] is init
    assert pair._replace(update=None) == (init, None)
    assert update is pair.update
    with pytest.raises(TypeError, match=r"^argument opt of wrap is 3, expected a transformation"):
        interop.wrap(3)


@pytest.mark.parametrize("name", PAIRS)
def test_with_the_state_of_optax(name):
    ours, theirs = PAIRS[name]
    wrapped = interop.wrap(ours, optax_state=True)
    start = wrapped.init(PARAMS)
    assert jax.tree.structure(start) == jax.tree.structure(theirs.init(PARAMS))
    params, state = run(wrapped, PARAMS, start, GRADS[:10])
    assert_same_types(state, start)
    plain, plain_state = run(ours, PARAMS, ours.init(PARAMS), GRADS[:10])
    assert_equal((params, state), (plain, interop.export_state(ours, plain_state)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interop.wrap(adamjax.kahan(adamjax.adam()), optax_state=True), r"is not one of adamjax's optimizers"),
        (
            lambda: interop.wrap(adamjax.packed(adamjax.adam()), optax_state=True),
            r"packs its moments, .*without packed",
        ),
        (
            lambda: interop.wrap(adamjax.amsgrad(), optax_state=True).init(PARAMS),
            r"^optax has nothing like ScaleByAdam",
        ),
    ],
)
def test_without_a_state_of_optax(make, message):
    with pytest.raises(TypeError, match=message):
        make()
