"""One way through a step: what it costs a reader and a compiler."""

import collections
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_equal

import adamjax
from adamjax._core import checks
from adamjax._core.trees import Leaves
from adamjax._transforms.adam import AdamRule
from adamjax._transforms.delivery import AddToParam, AsUpdate, add_to_param
from adamjax._transforms.leafwise import run_leafwise
from adamjax.kernels import _backend

pytestmark = pytest.mark.numbers

ROOT = os.path.dirname(adamjax.__file__)
LR = 1e-3
MAKES = {
    "adamw": lambda: adamjax.adamw(LR),
    "coupled": lambda: adamjax.adam(LR, weight_decay=0.1, maximize=True),
    "kahan": lambda: adamjax.kahan(adamjax.adamw(LR)),
    "master_weights": lambda: adamjax.master_weights(adamjax.adamw(LR, mu_dtype="bfloat16")),
}


def calls_of(opt, params):
    """The calls into the package of one eager step, by file and function, with nothing compiled before."""
    state = opt.init(params)
    jax.clear_caches()
    calls: collections.Counter[str] = collections.Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            calls[f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        opt.step(params, state, params)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(("name", "most"), [("adamw", 150), ("coupled", 150), ("kahan", 200)])
def test_a_step_is_a_short_way(name, most):
    calls = calls_of(MAKES[name](), jnp.ones((256, 128), "bfloat16" if name == "kahan" else "float32"))
    assert calls.total() <= most, calls.most_common(20)
    assert calls["_core/checks.py:updates"] == calls["_core/trees.py:Leaves.of"] == 1


@pytest.mark.parametrize("method", ["step", "update"])
@pytest.mark.parametrize("name", MAKES)
def test_a_leaf_is_one_compiled_function(name, method):
    opt = MAKES[name]()
    params = [jnp.ones(2 + i, "bfloat16") for i in range(10)]
    jaxpr = jax.make_jaxpr(getattr(opt, method))(params, opt.init(params), params).jaxpr
    compiled = collections.Counter(eqn.params["name"] for eqn in jaxpr.eqns if "name" in eqn.params)
    assert compiled == {"run_program": 10}


def test_trees_are_checked_once_whatever_is_around(monkeypatch):
    checked = []
    updates = checks.updates
    monkeypatch.setattr(checks, "updates", lambda *a: checked.append(a) or updates(*a))
    opt = adamjax.skip_nonfinite(adamjax.groups({"b": {"weight_decay": 0.0}}, default=adamjax.adamw(LR)))
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    opt.step(params, opt.init(params), params)
    assert len(checked) == 1


def program_of(opt, delivery, params):
    """The functions of the program of one leaf."""
    updates, seen = Leaves.of(params), []

    class Recorder(adamjax._transforms.leafwise.Executor):
        def run_leaf(self, leaf, program):
            seen.append(program.functions)
            return super().run_leaf(leaf, program)

    transforms = [
        t
        for m, s in zip(opt.transforms, opt.init(params), strict=True)
        for t in m._leaf_transforms(updates, s, updates)
    ]
    run_leafwise([*transforms, delivery], updates, updates, Recorder)
    return seen[0]


def test_a_kernel_recognises_the_programs_that_it_can_run():
    params = jnp.ones(4)
    adamw = program_of(adamjax.adamw(LR, nesterov=True), AddToParam(), params)
    assert adamw[-1][1] is add_to_param
    assert _backend.variant_of(adamw) == _backend.StepVariant(AdamRule(nesterov=True), coupled=False, decays=True)
    coupled = program_of(adamjax.adam(LR, weight_decay=0.1, maximize=True, amsgrad="paper"), AddToParam(), params)
    assert _backend.variant_of(coupled) == _backend.StepVariant(AdamRule(amsgrad="paper"), coupled=True, decays=False)
    update = program_of(adamjax.adamw(LR), AsUpdate([params]), params)
    assert _backend.variant_of(update) == _backend.StepVariant(AdamRule(), False, True, update=np.dtype("float32"))
    radam = program_of(adamjax.radam(LR), AddToParam(), params)
    assert _backend.split(radam) is _backend.variant_of(radam) is None


def test_a_kernel_steps_the_part_of_a_program_that_it_knows():
    """Before it, the gradient is doubled; after it, a second optimizer steps."""
    double, adam = adamjax.scale_by_learning_rate(2.0, flip_sign=False), adamjax.scale_by_adam()
    opt = adamjax.chain(double, adam, double, adam)
    params = jnp.ones(4)
    functions = program_of(opt, AddToParam(), params)
    found = _backend.split(functions)
    assert [functions[part] for part in found] == [functions[:1], functions[1:3], functions[3:]]
    assert _backend.variant_of(functions) is None
    assert _backend.variant_of(functions[found.step]).update == jnp.float32


@pytest.mark.parametrize("amsgrad", [None, "torch", "corrected", "paper"])
def test_the_parts_of_a_direction_are_the_lines_of_the_rule(amsgrad):
    member = adamjax.scale_by_adam(amsgrad=amsgrad)
    t, m, v, v_max = jnp.float32(3), jnp.float32(0.2), jnp.float32(0.5), jnp.float32(0.7)
    parts = member.parts(m, v, v_max if amsgrad else None, t)
    direction = member.rule.direction(m, m, v, v_max if amsgrad else None, member._scalars(t))
    assert_equal(parts.m_hat / (parts.root + parts.eps), direction)
    assert member.rule == AdamRule(amsgrad=amsgrad)
