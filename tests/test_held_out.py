"""The problems that benchmarks judge searches by, and the published lists of settings."""

import math

import jax
import pytest

from adamjax import adamw, problems, schedules
from adamjax.tuning import sweep
from benchmarks._held_out import HELD_OUT
from benchmarks._lists import _OPT_LIST, ALGOPERF, OPT_LIST

each_problem = pytest.mark.parametrize("name", HELD_OUT)


@pytest.mark.usefixtures("lenient")
@each_problem
def test_each_is_a_small_problem(name):
    problem, steps = HELD_OUT[name]
    problems.check(problem)
    assert 100 <= steps <= 250
    params = jax.eval_shape(problem.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) <= 10_000


@pytest.mark.slow
@pytest.mark.numbers
@pytest.mark.usefixtures("lenient")
@each_problem
def test_a_good_learning_rate_ends_far_below_a_bad_one(name):
    problem, steps = HELD_OUT[name]
    settings = [{"learning_rate": x} for x in (1e-4, 1e-2)]
    losses = sweep(problem, settings, steps=steps, points=1).metrics["loss"][..., -1]
    assert (losses > 0).all()
    assert losses.min() < 0.7 * losses.max()


@pytest.mark.parametrize(("settings", "count"), [(ALGOPERF, 4), (OPT_LIST, 64)])
def test_published_settings_make_optimizers_with_schedules(settings, count):
    assert len(settings) == len({tuple(setting.values()) for setting in settings}) == count
    for setting in settings:
        others = dict(setting)
        peak, warmup, end = (others.pop(name) for name in ("learning_rate", "warmup_fraction", "end_fraction"))
        warmup_steps = round(1000 * warmup)
        course = schedules.warmup_cosine(peak, warmup_steps=warmup_steps, total_steps=1000, end=end * peak)
        assert adamw(course, **others).init({}) is not None
        assert math.isclose(course(warmup_steps), peak, rel_tol=1e-5)
        assert 0 < others["b1"] < 1
        assert 0 < others["b2"] < 1


def test_warmups_of_the_list_end_before_its_decays_begin():
    """So that the two formulas of its code agree: one takes the longer of the two as the warmup, one the shorter."""
    assert all(row[5] < row[7] <= 1 for row in _OPT_LIST)
