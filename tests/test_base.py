"""Chains, foreign members, and applying updates."""

import copy
import dataclasses
import pickle
import sys
from collections.abc import Sequence
from functools import singledispatch
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, assert_same_types
from tolerances import OPTAX, RECOMPILED

import adamjax

PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, 0.0])}
GRADS = {"w": jnp.array([[0.1, -0.2], [0.3, 1e-3]]), "b": jnp.array([2.0, 0.0])}


def run(opt, steps=3, params=PARAMS, **extra):
    """Through optax's own protocol, whatever the optimizer is."""
    init, update = opt
    state = init(params)
    for _ in range(steps):
        grads = jax.tree.map(lambda p, g: p * g.astype(p.dtype), params, GRADS)
        updates, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


class Recorder:
    """A transformation from elsewhere, by duck typing: no optax type, and one extra argument."""

    def __init__(self):
        self.seen = []

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, updates, state, params=None, *, value=None):
        self.seen.append((jax.tree.map(lambda u: u.dtype.name, updates), value))
        return updates, jax.tree.map(jnp.add, state, updates)


def test_a_chain_of_none_is_the_identity():
    opt = adamjax.chain()
    assert opt.update(GRADS, opt.init(PARAMS)) == (GRADS, ())


def test_chains_nest():
    inner = adamjax.adamw(0.1)
    opt = adamjax.chain(adamjax.clip_by_global_norm(1.0), inner)
    state = opt.init(PARAMS)
    assert state[0] == ()
    assert isinstance(state[1][0], adamjax.AdamState)
    clip = adamjax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(GRADS, ())
    assert_close(opt.update(GRADS, state, PARAMS)[0], inner.update(clipped, inner.init(PARAMS), PARAMS)[0], RECOMPILED)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "around",
    [
        lambda opt: optax.chain(optax.clip_by_global_norm(1.0), opt),
        lambda opt: optax.named_chain(("adam", opt)),
        lambda opt: optax.MultiSteps(opt, every_k_schedule=2),
        lambda opt: optax.masked(opt, {"w": True, "b": False}),
        lambda opt: optax.partition({"x": opt, "y": optax.set_to_zero()}, {"w": "x", "b": "y"}),
        lambda opt: optax.apply_if_finite(opt, 3),
        lambda opt: optax.flatten(opt),
        lambda opt: optax.contrib.schedule_free(opt, 0.1),
        lambda opt: optax.contrib.sam(opt, optax.sgd(0.05)),
        optax.contrib.mechanize,
    ],
    ids=[
        "chain",
        "named_chain",
        "multi_steps",
        "masked",
        "partition",
        "if_finite",
        "flatten",
        "schedule_free",
        "sam",
        "mechanize",
    ],
)
def test_ours_inside_optax(around):
    """Each of optax's combinators does with ours what it does with its own."""

    def run_with(opt):
        wrapped, params = around(opt), PARAMS
        state = wrapped.init(params)
        update = jax.jit(wrapped.update)
        for _ in range(4):
            updates, state = update(jax.tree.map(jnp.multiply, params, GRADS), state, params)
            params = optax.apply_updates(params, updates)
        return params

    assert_close(run_with(adamjax.adamw(0.1)), run_with(optax.adamw(0.1)), OPTAX["float32"])


OF_ALL_KINDS = [
    adamjax.adamw(0.1),
    adamjax.adam(jnp.float32(0.1), fused="auto"),
    adamjax.scale_by_learning_rate(0.1),
    adamjax.skip_nonfinite(adamjax.kahan(adamjax.adam())),
    adamjax.groups({"w": {"learning_rate": 0.2}}, default=adamjax.interop.torch.adam()),
    adamjax.schedules.reduce_on_plateau(),
]


@pytest.mark.parametrize("opt", OF_ALL_KINDS, ids=lambda opt: type(opt).__name__)
def test_it_is_an_instance_of_the_class_of_optax(opt):
    """As `optax.adam()` is, without being a tuple, and with all that asks for its class in another way."""
    assert isinstance(opt, optax.GradientTransformation)
    assert isinstance(opt, optax.GradientTransformationExtraArgs)
    assert isinstance(opt, (type(opt), adamjax.Transformation))
    assert not isinstance(opt, (tuple, Sequence))
    assert issubclass(opt.__class__, (type(opt), optax.GradientTransformation))
    assert opt.__class__.__name__ == type(opt).__name__
    assert optax.with_extra_args_support(opt) is opt

    @singledispatch
    def kind(x):
        return "another"

    kind.register(optax.GradientTransformation, lambda x: "theirs")
    assert kind(opt) == "theirs"
    kind.register(adamjax.Transformation, lambda x: "ours")
    assert kind(opt) == "ours"
    copies = [pickle.loads(pickle.dumps(opt, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
    copies = [dataclasses.replace(opt), copy.copy(opt), copy.deepcopy(opt), *copies]
    for x in copies:
        assert type(x) is type(opt)
        assert repr(x) == repr(opt)
        assert jax.tree.structure(x) == jax.tree.structure(opt)
    assert copies[0] == opt


def test_without_optax_its_class_is_its_type(monkeypatch):
    opt = adamjax.adam()
    monkeypatch.delitem(sys.modules, "optax")
    assert opt.__class__ is type(opt)
    monkeypatch.setitem(sys.modules, "optax", ModuleType("optax"))  # as while it is being imported
    assert opt.__class__ is type(opt)


def test_a_class_from_outside_is_an_instance_where_it_can_be():
    class Mine(adamjax.Transformation):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate

    class WithSlots(Mine):
        __slots__ = ("more",)

    opt = Mine(0.1)
    assert isinstance(opt, optax.GradientTransformation)
    assert type(copy.copy(opt)) is Mine
    assert copy.copy(opt).rate == 0.1
    assert not isinstance(WithSlots(0.1), optax.GradientTransformation)  # no tuple has slots
    assert isinstance(WithSlots(0.1), Mine)


@pytest.mark.usefixtures("lenient")
def test_ours_inside_inject_hyperparams():
    for make, theirs in ((adamjax.adam, optax.adam), (adamjax.adamw, optax.adamw), (adamjax.amsgrad, None)):
        opt = optax.inject_hyperparams(make)(learning_rate=lambda t: 0.1 / (t + 1), b1=0.8)
        params, state = run(opt)
        assert {"learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"} <= state.hyperparams.keys()
        if theirs is not None:
            expected, _ = run(optax.inject_hyperparams(theirs)(learning_rate=lambda t: 0.1 / (t + 1), b1=0.8))
            assert_close(params, expected, OPTAX["float32"])
    opt = optax.inject_hyperparams(adamjax.adam)(learning_rate=0.1)
    opt.update(GRADS, opt.init(PARAMS))  # a weight decay of 0 needs no parameters, as an array too
    with pytest.raises(ValueError, match="needs the parameters"):
        jax.jit(opt.update)(GRADS, opt.init(PARAMS))  # traced, it might be anything


@pytest.mark.usefixtures("lenient")
def test_optax_inside_ours():
    ours = adamjax.chain(
        optax.clip_by_global_norm(1.0), adamjax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1)
    )
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1)
    )
    assert_close(run(ours)[0], run(theirs)[0], OPTAX["float32"])
    scheduled = adamjax.adam(optax.cosine_decay_schedule(0.1, 10))
    assert_close(run(scheduled)[0], run(optax.adam(optax.cosine_decay_schedule(0.1, 10)))[0], OPTAX["float32"])
    ours_in_theirs = optax.adam(lambda t: adamjax.schedules.cosine(0.1, 10)(t))
    assert_close(run(ours_in_theirs)[0], run(scheduled)[0], OPTAX["float32"])
    assert "Foreign(clip_by_global_norm)" in repr(ours)
    assert ours == adamjax.chain(*ours.transforms)


@pytest.mark.usefixtures("lenient")
def test_extra_arguments_reach_those_that_take_them():
    recorder = Recorder()
    plateau = optax.contrib.reduce_on_plateau(patience=1, cooldown=0, factor=0.5, accumulation_size=1)
    opt = adamjax.chain(
        adamjax.scale_by_adam(), recorder, plateau, optax.identity(), adamjax.scale_by_learning_rate(0.1)
    )
    state = opt.init(PARAMS)
    for _ in range(4):
        _, state = opt.update(GRADS, state, PARAMS, value=1.0, unknown=2.0)
    assert [value for _, value in recorder.seen] == [1.0] * 4
    assert state[2].scale < 1
    opt.step(GRADS, state, PARAMS, value=1.0)
    with pytest.raises(TypeError, match="value"):
        opt.update(GRADS, state, PARAMS)  # optax's plateau has no default for it


def test_foreign_members_see_the_dtype_of_the_parameters():
    """They keep state in what they are given: a float32 intermediate would change its dtype."""
    recorder = Recorder()
    opt = adamjax.chain(adamjax.scale_by_adam(), recorder, adamjax.scale_by_learning_rate(0.1))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = opt.init(params)
    updates, new_state = opt.update(params, state, params)
    assert recorder.seen == [({"w": "bfloat16", "b": "bfloat16"}, None)]
    assert_same_types(new_state, state)
    assert_same_types(updates, params)


def test_apply_updates():
    params = {"a": jnp.array([1.0, 2.0], jnp.bfloat16), "b": (None, jnp.float32(3)), "c": {"d": jnp.ones(2)}}
    updates = {"a": jnp.array([0.5, -2.0]), "b": (None, jnp.float32(0.25)), "c": None}
    new = jax.jit(adamjax.apply_updates)(params, updates)
    assert_equal(
        new, {"a": jnp.array([1.5, 0.0], jnp.bfloat16), "b": (None, jnp.float32(3.25)), "c": {"d": jnp.ones(2)}}
    )


def test_apply_updates_adds_in_float32():
    """bfloat16(256) + 1.4 is 256 + 2 to the nearest; with 1.4 rounded first, too, but 1.0 + 2**-9 not."""
    p, u = jnp.array([1.0], jnp.bfloat16), jnp.array([2**-8 + 2**-16], jnp.float32)
    assert adamjax.apply_updates(p, u)[0] == jnp.bfloat16(1 + 2**-7)  # above the tie: up
    assert (p + u.astype(jnp.bfloat16))[0] == jnp.bfloat16(1)  # rounded first it is the tie: to even


def test_optax_tree_utils_find_the_state():
    opt = adamjax.adamw(adamjax.schedules.constant(0.1))
    state = opt.init(PARAMS)
    assert_equal(optax.tree_utils.tree_get(state, "mu"), jax.tree.map(jnp.zeros_like, PARAMS))
    assert optax.tree_utils.tree_get(state[0], "count") == 0
    assert optax.tree_utils.tree_set(state, mu=1.0)[0].mu == 1.0
    doubled = optax.tree_utils.tree_map_params(opt, lambda x: x + 1, state)
    assert np.all(doubled[0].nu["w"] == 1)
    assert doubled[0].count == 0
