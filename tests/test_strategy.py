"""The staged search, on scores that are formulas."""

import math
from collections import Counter
from functools import partial

import pytest

import adamjax
from adamjax.tuning import Choice, Linear, Log, Space
from adamjax.tuning._ranges import WHEN_ASKED, default_ranges
from adamjax.tuning._spec import search_space
from adamjax.tuning._strategy import RANGES, Result, plan_stages, staged_search

DEFAULTS = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-4, "amsgrad": False}
ADAM = Space.of({name: RANGES[name] for name in DEFAULTS})


def search(score, *, space=ADAM, defaults=DEFAULTS, stages="adam", trials=64, valid=lambda setting: True, seed=0):
    """Every result, and the stage of each, of a search whose trials have the given scores."""
    planned = plan_stages(space, stages, trials - 1)
    strategy = staged_search(space, defaults, planned, start=defaults, method="halton", seed=seed, valid=valid)
    done, of = [], []
    try:
        batch = next(strategy)
        while True:
            results = [Result(x, score(**x), score(**x), None) for x in batch.settings]
            done += results
            of += [batch.stage] * len(results)
            batch = strategy.send(done)
    except StopIteration:
        return done, of


def test_ranges_are_those_of_the_arguments_that_an_optimizer_takes():
    adam = {"learning_rate", "b1", "b2", "weight_decay"}
    own = {
        adamjax.adam_atan2: adam,
        adamjax.schedule_free_adamw: adam | {"eps"},
        adamjax.ademamix: adam | {"eps", "b3", "alpha"},
        adamjax.simplified_ademamix: adam | {"eps", "alpha"},
        adamjax.interop.optax.muon: adam | {"eps", "beta"},
        partial(adamjax.ademamix, alpha=2.0): adam | {"eps", "b3"},
    }
    for optimizer, names in own.items():
        assert default_ranges(optimizer).keys() - WHEN_ASKED.keys() == names
    # Those of the names that all optimizers share are Adam's, but for another scale.
    for optimizer in own.keys() - {adamjax.simplified_ademamix}:
        assert {n: RANGES[n] for n in adam} == {n: default_ranges(optimizer)[n] for n in adam}
    # Whatever alpha is to somebody else; and what takes any name takes those of Adam.
    assert default_ranges(lambda learning_rate, alpha: None).keys() == {"learning_rate"}
    assert default_ranges(lambda **numbers: None) == RANGES


def test_cautious_steps_are_searched_where_a_stage_names_them():
    def space(optimizer, stages="adam"):
        return search_space(optimizer, None, stages, half=False).ranges

    choice = Choice(False, True)
    assert space(adamjax.adamw) == {name: r for name, r in RANGES.items() if name in DEFAULTS and name != "eps"}
    assert space(adamjax.adamw, ["learning_rate", "cautious"])["cautious"] == choice
    assert space(adamjax.adopt, ["cautious_decay"]) == {"cautious_decay": choice}
    with pytest.raises(ValueError, match="'cautious' has no range"):
        space(adamjax.adopt, ["cautious"])
    with pytest.raises(ValueError, match="'cautious' has no range"):
        space(partial(adamjax.adamw, cautious=True), ["cautious"])


def distance(x, good):
    """Decades between x and what is good."""
    return abs(math.log10(x / good))


@pytest.mark.parametrize("trials", [1, 2, 5, 17, 32, 48, 64, 200])
def test_trials_are_all_used_and_the_defaults_come_first(trials):
    done, _ = search(lambda **s: distance(s["learning_rate"], 1e-2), trials=trials)
    assert done[0].setting == DEFAULTS
    # Choices are tried on what is best so far, and there are only so many of those.
    assert trials - 4 <= len(done) <= trials
    assert len({repr(r.setting) for r in done}) == len(done)


def test_stages_are_those_that_the_trials_are_enough_for():
    names = {n: [stage.name for stage in plan_stages(ADAM, "adam", n)] for n in (0, 8, 16, 63)}
    assert names[0] == []
    assert names[8] == ["learning_rate"] * 2
    assert names[16] == ["learning_rate"] * 2 + ["b1", "amsgrad"]
    assert names[63] == ["learning_rate"] * 2 + ["b1, b2", "eps", "weight_decay", "all", "amsgrad"]
    sizes = Counter(stage.trials for stage in plan_stages(ADAM, "adam", 63)[:-1])
    assert max(sizes) - min(sizes) <= 1
    own = Space(learning_rate=Log(1e-4, 1.0), max_norm=Log(0.1, 10.0), nesterov=Choice(True, False))
    assert [s.arguments for s in plan_stages(own, "adam", 40)][2:] == [
        ("learning_rate", "max_norm"),
        ("learning_rate", "max_norm"),
        ("nesterov",),
    ]
    assert [(s.arguments, s.trials) for s in plan_stages(ADAM, ["eps", ("b1", "b2")], 10)] == [
        (("eps",), 5),
        (("b1", "b2"), 5),
    ]


def test_a_stage_varies_what_it_is_for_around_the_best_so_far():
    done, stages = search(lambda **s: distance(s["learning_rate"], 1e-2) + distance(1 - s["b1"], 0.2))
    for stage in ("learning_rate", "b1, b2", "eps", "weight_decay"):
        first = stages.index(stage) or 1
        best = min(done[:first], key=lambda r: r.score).setting
        for result in done[first : first + stages[first:].count(stage) // (2 if stage == "learning_rate" else 1)]:
            for name in best.keys() - {"learning_rate", *stage.split(", ")}:
                assert result.setting[name] == best[name]


@pytest.mark.parametrize("weight_decay", [0.0, 1e-7])
def test_what_a_stage_does_not_vary_may_lie_outside_of_its_range(weight_decay):
    # 0 is the default of adam and amsgrad, and a logarithmic range has none.
    done, stages = search(
        lambda **s: distance(s["learning_rate"], 1e-2), defaults=DEFAULTS | {"weight_decay": weight_decay}
    )
    before = done[: stages.index("weight_decay")]
    assert len(before) > 20
    assert {r.setting["weight_decay"] for r in before} == {weight_decay}


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_is_good(seed):
    def score(learning_rate, b1, b2, eps, weight_decay, amsgrad):
        apart = distance(learning_rate, 6e-3) ** 2 + distance(1 - b1, 0.03) ** 2 + distance(weight_decay, 0.02) ** 2
        return apart + 0.1 * distance(eps, 1e-6) ** 2 - 0.01 * amsgrad

    done, _ = search(score, trials=128, seed=seed)
    best = min(done, key=lambda r: r.score)
    assert best.score < 0.15
    assert score(**DEFAULTS) > 5
    assert best.setting["amsgrad"] is True


@pytest.mark.parametrize("good", [3e-6, 2.0])
def test_it_leaves_a_range_whose_edge_is_best(good):
    done, _ = search(lambda **s: distance(s["learning_rate"], good), trials=64)
    assert min(r.score for r in done) < 0.1


def test_it_stays_where_settings_are_valid_and_in_linear_ranges():
    space = Space(one_minus_b1=Log(0.1, 0.5), dropout=Log(0.1, 0.5), weight_decay=Linear(0.0, 0.2))
    defaults = {"b1": 0.9, "dropout": 0.5, "weight_decay": 0.0}

    def valid(setting):
        return setting["dropout"] <= 0.9

    # The best lies outside of everything: b1 below 0, dropout above 0.9, negative weight decay.
    done, _ = search(
        lambda **s: s["b1"] - s["dropout"] + s["weight_decay"], space=space, defaults=defaults, valid=valid, trials=80
    )
    found = [r.setting for r in done]
    assert 0 <= min(s["b1"] for s in found) < 0.1
    assert 0.4 < max(s["dropout"] for s in found) <= 0.9
    assert min(s["weight_decay"] for s in found) >= 0


def test_where_everything_diverges_it_tries_smaller_learning_rates():
    done, _ = search(lambda **s: math.inf if s["learning_rate"] > 3e-5 else 1.0)
    assert any(math.isfinite(r.score) for r in done)
    done, _ = search(lambda **s: math.inf)
    assert len(done) >= 60


def test_choices_are_tried_on_the_best():
    space = Space(learning_rate=Log(1e-4, 1e-1), nesterov=Choice(False, True), variant=Choice("a", "b", "c"))
    defaults = {"learning_rate": 1e-3, "nesterov": False, "variant": "a"}
    done, stages = search(
        lambda **s: distance(s["learning_rate"], 1e-2) - s["nesterov"] - (s["variant"] == "c"),
        space=space,
        defaults=defaults,
        trials=64,
    )
    assert min(done, key=lambda r: r.score).setting | {"learning_rate": 0} == {
        "learning_rate": 0,
        "nesterov": True,
        "variant": "c",
    }
    only = Space(nesterov=Choice(False, True), variant=Choice("a", "b", "c"))
    done, stages = search(lambda **s: s["variant"] != "b", space=only, defaults=defaults, trials=9)
    assert stages[0] == "nesterov"
    assert {(r.setting["nesterov"], r.setting["variant"]) for r in done} >= {(True, "a"), (False, "b"), (False, "c")}


def test_values_have_few_digits_and_stay_in_their_ranges():
    space = Space(one_minus_b2=Log(1e-5, 0.1), b1=Linear(0.9, 0.99999), learning_rate=Log(0.00123456, 0.00223456))
    defaults = {"b2": 0.999, "b1": 0.9, "learning_rate": 0.002}
    done, _ = search(lambda **s: 0.0, space=space, defaults=defaults, valid=lambda setting: False)
    for result in done[1:]:
        s = result.setting
        assert 0.9 <= s["b1"] <= 0.99999
        assert 0.00123456 <= s["learning_rate"] <= 0.00223456
        assert len(repr(s["learning_rate"])) <= 10
        assert 1 - s["b2"] == pytest.approx(float(f"{1 - s['b2']:.4g}"), rel=1e-8)
