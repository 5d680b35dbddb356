"""The model-based search, on scores that are formulas, and the courses of the learning rate."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamjax
from adamjax.tuning import Choice, Linear, Log, Search, Space
from adamjax.tuning._courses import Scheduled, course_schedule
from adamjax.tuning._learned import NAMES, TABLE, learned_settings
from adamjax.tuning._model_search import MANY, SEED_EFFECT, UNKNOWN, _heights, _Process, model_search, round_size
from adamjax.tuning._ranges import from_adam
from adamjax.tuning._strategy import RANGES, Result

DEFAULTS = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4}
ADAM = Space.of({name: RANGES[name] for name in DEFAULTS})


def search(score, *, space=ADAM, defaults=DEFAULTS, trials=32, valid=lambda setting: True, seed=0):
    """Every result, and the stage of each, of a search whose trials have the given scores."""
    at_once = round_size(trials)
    strategy = model_search(space, defaults, trials=trials - 1, at_once=at_once, seed=seed, valid=valid)
    done, of = [], []
    try:
        batch = next(strategy)
        while True:
            done += [Result(x, score(**x), score(**x), None, batch.seed) for x in batch.settings]
            of += [batch.stage] * len(batch.settings)
            batch = strategy.send(done)
    except StopIteration:
        return done, of


def apart_from_a_good_rate(learning_rate, **others):
    return 1 + apart(learning_rate, 0.01)


def apart(x, good):
    """Decades between x and what is good."""
    return abs(math.log10(x / good))


def bowl(learning_rate, b1, b2, weight_decay):
    squares = apart(learning_rate, 6e-3) ** 2 + apart(1 - b1, 0.05) ** 2 + 0.1 * apart(weight_decay, 0.02) ** 2
    return math.exp(squares + 0.1 * apart(1 - b2, 0.02) ** 2)


def test_the_list_makes_the_simplified_ademamix_step_as_far_as_adam():
    adam = {"learning_rate": 0.05, "b1": 0.8, "alpha": 3.0}
    setting = from_adam(adamjax.simplified_ademamix)(adam)
    assert setting | {"learning_rate": 0.05} == adam
    opt, params = adamjax.simplified_ademamix(**setting), jnp.ones(3)

    @jax.jit
    def update(state):
        return opt.update(params, state, params)

    state = opt.init(params)
    for _ in range(100):
        u, state = update(state)
    np.testing.assert_allclose(u, -0.05, rtol=1e-4)
    # All others step as far as Adam by themselves.
    assert from_adam(adamjax.ademamix)(adam) == adam
    given = partial(adamjax.simplified_ademamix, b1=0.8, alpha=3.0)
    assert from_adam(Scheduled(given, "cosine", 10))({"learning_rate": 0.05}) == pytest.approx(
        {"learning_rate": setting["learning_rate"]}
    )
    assert from_adam(given)({"b2": 0.9}) == {"b2": 0.9}


@pytest.mark.parametrize("trials", [1, 2, 5, 16, 64])
def test_all_trials_are_used_the_defaults_first_and_then_the_list(trials):
    done, stages = search(bowl, trials=trials)
    assert len(done) == trials
    assert done[0].setting == DEFAULTS
    assert len({repr(r.setting) for r in done}) == trials
    listed = [r.setting["learning_rate"] for r in done[1:5]]
    assert listed == [row[0] for row in TABLE][: len(listed)]
    assert set(stages[5:]) <= {"list", "model"}


def test_every_argument_moves_at_16_trials():
    done, _ = search(bowl, trials=16)
    for name in DEFAULTS:
        assert len({r.setting[name] for r in done}) > 10


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_random_settings_do_not(seed):
    found = min(r.score for r in search(bowl, trials=32, seed=seed)[0])
    chance = min(bowl(**x) for x in ADAM.points(32, method="random", seed=seed))
    assert found < 1.2
    assert found < chance


def test_it_leaves_the_ranges_while_settings_are_valid():
    def score(**setting):
        return apart(setting["learning_rate"], 30.0)

    free, _ = search(score, trials=48)
    assert max(r.setting["learning_rate"] for r in free) > 3
    held, _ = search(score, trials=48, valid=lambda setting: setting["learning_rate"] <= 3)
    assert max(r.setting["learning_rate"] for r in held) <= 3


def test_where_everything_diverges_it_tries_smaller_learning_rates():
    done, _ = search(lambda **setting: math.inf if setting["learning_rate"] > 5e-5 else 1.0, trials=24)
    assert any(math.isfinite(r.score) for r in done)


def test_results_that_are_unknown_are_waited_for_by_nothing():
    done, _ = search(lambda **setting: math.nan, trials=24)
    assert len(done) == 24


def test_choices_are_tried_on_the_best_and_spaces_may_have_any_arguments():
    space = Space(learning_rate=Log(1e-4, 1.0), dropout=Linear(0.0, 0.5), kind=Choice("a", "b"))
    defaults = {"learning_rate": 1e-3, "dropout": 0.1, "kind": "a"}

    def score(learning_rate, dropout, kind):
        return apart(learning_rate, 0.05) + dropout - (kind == "b")

    done, stages = search(score, space=space, defaults=defaults, trials=48)
    best = min(done, key=lambda r: r.score).setting
    assert best["kind"] == "b"
    assert stages[-1] == "kind"
    assert min(r.setting["dropout"] for r in done) >= 0
    assert best["dropout"] < 0.1
    only, _ = search(lambda kind: kind == "a", space=Space(kind=Choice("a", "b")), defaults={"kind": "a"}, trials=4)
    assert [r.setting["kind"] for r in only] == ["a", "b"]


def test_the_process_is_a_gaussian_process():
    # Compared with the formulas, inverted instead of factorised.
    rng = np.random.default_rng(0)
    x, y, at = rng.normal(size=(6, 2)), rng.normal(size=6), rng.normal(size=(3, 2))
    seeds = np.array([0, 1, 1, 0, 0, UNKNOWN])
    process = _Process(x, y, seeds, 0.1)

    def kernel(a, b):
        d = np.sqrt(5) * np.linalg.norm(a[:, None] - b[None], axis=-1)
        return (1 + d + d * d / 3) * np.exp(-d)

    # An effect of a seed is what points of that seed have in common.
    shared = SEED_EFFECT * ((seeds[:, None] == seeds) & (seeds >= 0))
    with_effects = np.linalg.inv(kernel(x, x) + 0.1 * np.eye(6) + shared)
    mean = with_effects.sum(0) @ y / with_effects.sum()
    rest = y - mean - shared @ with_effects @ (y - mean)  # without the effects, as far as they are known
    inverse = np.linalg.inv(kernel(x, x) + 0.1 * np.eye(6))
    variance = (rest @ inverse @ rest + 0.1) / 7
    expected = mean + kernel(at, x) @ with_effects @ (y - mean)
    spread = np.sqrt(variance * (1 - np.einsum("ij,jk,ik->i", kernel(at, x), inverse, kernel(at, x))))
    np.testing.assert_allclose(process.predict(at), (expected, spread), rtol=1e-9)
    # What was expected changes no mean, and makes the place certain.
    after = process.expecting(at[0])
    np.testing.assert_allclose(after.predict(at)[0], expected, rtol=1e-6)
    assert after.predict(at)[1][0] < 0.5 * spread[0]


def test_many_trials_have_two_seeds():
    done, of = search(apart_from_a_good_rate, trials=MANY)
    rounds = [[r.seed for r in done][i : i + 4] for i in range(1, MANY, 4)]
    assert rounds[:4] == [[0] * 4, [1] * 4, [0] * 4, [1] * 4]
    assert {r.seed for r, stage in zip(done, of, strict=True) if stage != "model"} == {0}
    done, _ = search(apart_from_a_good_rate, trials=MANY - 1)
    assert {r.seed for r in done} == {0}


def test_heights_do_not_depend_on_the_scale_and_bear_infinities():
    scores = np.array([1.0, 1.1, 1.3, 2.0, 50.0, np.inf])
    heights = _heights(scores)
    np.testing.assert_allclose(_heights(1000 * scores), heights)
    assert (np.diff(heights) >= 0).all()
    assert heights[0] == 0
    assert heights[-1] == 2
    assert (_heights(np.full(3, np.inf)) == 0).all()
    np.testing.assert_allclose(_heights(np.array([-3.0, -2.0, 5.0])), _heights(np.array([-30.0, -20.0, 50.0])))


def test_the_learned_list_makes_valid_optimizers_and_fits_spaces():
    space = Space.of({n: r for n, r in RANGES.items() if n not in ("eps", "amsgrad")})
    settings = learned_settings(space, space.points(len(TABLE)))
    assert len(settings) == len(TABLE) == 32
    make = Scheduled(adamjax.adamw, "cosine", 100)
    assert all(isinstance(make(**x), adamjax.Transformation) for x in settings)
    assert settings[0].keys() == {n.removeprefix("1 - ") for n in NAMES}
    narrow = Space(learning_rate=Log(0.05, 0.5), b1=0.8)
    fill = narrow.points(len(TABLE))
    some = learned_settings(narrow, fill)
    assert 0 < len(some) < len(TABLE)
    assert {x["b1"] for x in some} == {0.8}


@pytest.mark.parametrize(
    ("course", "middle", "late"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("stable", 1.0, 0.1)]
)
def test_courses(course, middle, late):
    schedule = course_schedule(course, 200, {"learning_rate": 2.0, "warmup_fraction": 0.1, "end_fraction": 0.1})
    values = [float(schedule(t)) / 2 for t in (0, 10, 20, 110, 200, 300)]
    np.testing.assert_allclose(values, [0, 0.5, 1, middle, late, late], rtol=1e-6)
    constant = course_schedule(course, 200, {"learning_rate": 2.0})
    np.testing.assert_allclose([float(constant(t)) for t in (0, 100, 300)], 2.0, rtol=1e-6)


def cosine(learning_rate=1e-3):
    return adamjax.adamw(adamjax.schedules.cosine(learning_rate, total_steps=10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "triangle", "steps": 3}, "Invalid schedule value: 'triangle'"),
        ({"schedule": "cosine"}, "Invalid schedule value: 'cosine'; the number of steps is unknown: give steps"),
        (
            {"schedule": "linear", "steps": 3, "optimizer": cosine},
            "Invalid schedule value: 'linear'; the optimizer",
        ),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Search(trials=4, **arguments)


def test_fractions_are_checked():
    make = Scheduled(adamjax.adamw, "cosine", 100)
    with pytest.raises(ValueError, match=r"Invalid warmup_fraction value: 1.5; .* in \[0, 1\)"):
        make(learning_rate=0.1, warmup_fraction=1.5)
    with pytest.raises(ValueError, match=r"Invalid end_fraction value: -1; .* in \[0, 1\]"):
        make(learning_rate=0.1, end_fraction=-1)
