"""Ask and tell."""

import inspect
import json
import math
import pickle
import random
from functools import partial

import numpy as np
import optuna
import pytest
from bowl import BOWL

import adamjax
from adamjax.tuning import Choice, Log, LrRange, Pruned, Report, Search, Space, tune
from adamjax.tuning._population import structure_of

search_of = partial(Search, trials=16, confirm=(2, 2))


def loss(trial):
    return abs(math.log10(trial.arguments["learning_rate"] / 0.01)) + 0.01 * trial.seed


def finish(search):
    for trial in search:
        search.tell(trial, loss(trial))
    return search.report()


def test_it_is_what_tune_does():
    def objective(optimizer, trial):
        return loss(trial)

    asked = finish(search_of(problem=objective, range_test=None))
    tuned = tune(objective, trials=16, confirm=(2, 2), range_test=None)
    content, expected = ({**x, "execution": ""} for x in (json.loads(r.to_json()) for r in (asked, tuned)))
    assert content == expected


def test_trials_say_what_to_run():
    search = search_of(steps=7, schedule="cosine")
    trials = search.ask_round()
    assert [t.number for t in trials] == list(range(len(trials)))
    first = trials[0]
    assert (first.stage, first.seed, first.budget) == ("defaults", 0, 7)
    assert first.arguments["learning_rate"] == 1e-3
    make = search.spec.optimizer
    assert all(t.optimizer == make(**t.arguments) for t in trials)
    assert str(first).startswith("Trial(0, 'defaults', seed 0, {'learning_rate': 0.001")
    copies = pickle.loads(pickle.dumps(trials))
    for copy, trial in zip(copies, trials, strict=True):
        assert (copy.number, copy.arguments, copy.optimizer) == (trial.number, trial.arguments, trial.optimizer)
    copies[1].arguments.clear()  # as some do with keywords
    search.tell(copies[1], 1.0)
    (record,) = search.report().trials
    assert (record.number, record.setting) == (1, trials[1].arguments)


SINCE_ADAM = {
    name: getattr(adamjax, name)
    for name in ("ademamix", "simplified_ademamix", "adopt", "adam_atan2", "stable_adamw", "schedule_free_adamw")
} | {
    "adamw, cautious": partial(adamjax.adamw, cautious=True),
    "adamw, cautious decay": partial(adamjax.adamw, cautious_decay=True),
    "nadamw, both": partial(adamjax.nadamw, cautious=True, cautious_decay=True),
    "muon": adamjax.interop.optax.muon,
    "hyperball": lambda learning_rate=0.01, b1=0.9, b2=0.999: adamjax.hyperball(adamjax.adam(learning_rate, b1, b2)),
    "averaged": lambda learning_rate=1e-3, b1=0.9, b2=0.999: adamjax.average_params(
        adamjax.adam(learning_rate, b1, b2)
    ),
}


@pytest.mark.parametrize("make", SINCE_ADAM.values(), ids=SINCE_ADAM)
@pytest.mark.parametrize("sampler", ["auto", "halton"])
def test_each_optimizer_is_searched_in_its_own_arguments(make, sampler):
    search = search_of(problem=BOWL, optimizer=make, steps=40, sampler=sampler, trials=16, confirm=None)
    space, trials = search.spec.space, []
    while asked := search.ask_round():
        trials += asked
        for trial in asked:
            assert trial.arguments.keys() == set(space.ranges)
            if trial.stage == "list":
                assert all(0 <= space.ranges[name].fraction(trial.arguments[name]) <= 1 for name in space.free)
            search.tell(trial, loss(trial))
    defaults = {p.name: p.default for p in inspect.signature(make).parameters.values()}
    course = {"warmup_fraction": 0.0, "end_fraction": 1.0}
    assert trials[0].arguments == {name: (course | defaults)[name] for name in space.ranges}
    assert space.ranges.keys() - course.keys() <= defaults.keys()
    # One compiled program serves all; but an optimizer without any weight decay does not have that part.
    structures = [structure_of(trial.optimizer) for trial in trials]
    assert len(set(structures[1:])) == 1
    assert structures[0] == structures[1] or defaults["weight_decay"] == 0
    # The model varies all numbers at once.
    if sampler == "auto":
        assert all(len({trial.arguments[name] for trial in trials}) > 3 for name in space.bounds)


@pytest.mark.slow
@pytest.mark.parametrize("make", SINCE_ADAM.values(), ids=SINCE_ADAM)
def test_each_optimizer_is_tuned(make):
    report = tune(BOWL, optimizer=make, steps=40, trials=16, confirm=None)
    losses = [trial.value("loss") for trial in report.trials]
    assert np.nanmin(losses) < 0.1 * losses[0]


def test_results_may_come_in_any_order():
    expected = finish(search_of())
    search, rng = search_of(), random.Random(0)
    while trials := search.ask_round():
        for trial in rng.sample(trials, len(trials)):
            search.tell(trial, {"loss": loss(trial)})
    assert search.ask() is None
    assert search.report().to_json() == expected.to_json()


def test_what_is_not_told_is_unknown_not_diverged():
    search = search_of(confirm=None)
    trials = list(search)  # none of them told
    assert len(trials) == 16
    bounds = Space(learning_rate=Log(1e-4, 3.0))
    rates = [t.arguments["learning_rate"] for t in trials[1:8]]
    assert bounds.bounds["learning_rate"][0] <= min(rates) < max(rates) <= bounds.bounds["learning_rate"][1]
    # Where they are told to have failed, the range moves.
    failing = search_of(confirm=None)
    for trial in failing:
        failing.tell(trial, None)
    assert min(t.setting["learning_rate"] for t in failing.report().searched) < 1e-4
    for trial in reversed(trials):
        search.tell(trial, loss(trial))
    assert len(search.report().ranking) == 16


def test_confirmation_needs_all_results():
    search = search_of()
    waiting = []
    for _ in range(16):
        trial = search.ask()
        if trial.number in (0, 7):
            waiting.append(trial)
        else:
            search.tell(trial, loss(trial))
    with pytest.raises(RuntimeError, match=r"needs the results of trials 0, 7: tell them; tell\(trial, None\) gives"):
        search.ask()
    search.tell(waiting[0], loss(waiting[0]))
    search.tell(waiting[1], None, error="lost")
    report = finish(search)
    assert len(report.confirmed) == 3
    assert report.searched[7].error == "lost"


def test_the_best_is_confirmed_at_constant_rates():
    race = ((4, 2), (3, 3), (2, 5))
    search = search_of(problem=BOWL, steps=40, confirm=race)
    rounds = []
    while trials := search.ask_round():
        rounds.append([(t.number, t.seed) for t in trials if t.number >= 16])
        for trial in trials:
            # Better by a tenth of a decade at a rate that falls.
            search.tell(trial, loss(trial) + 0.1 * (trial.arguments["end_fraction"] == 1))
    found = search.report()
    rates = sorted(
        {t.setting["learning_rate"]: t.number for t in found.trials if t.number >= 16}.items(), key=lambda pair: pair[1]
    )
    best = found.ranking[0].setting
    np.testing.assert_allclose([rate for rate, _ in rates], np.multiply([0.03, 0.1, 0.3], best["learning_rate"]), 1e-3)
    assert [n for _, n in rates] == [16, 17, 18]
    assert [x for x in rounds if x] == [
        [(n, seed) for n in (16, 17, 18) for seed in (1, 2)],
        [(n, 3) for n in (18, 17)],
        [(18, seed) for seed in (4, 5)],
    ]
    assert len(found.trials) == search.size
    course = {"warmup_fraction": 0.0, "end_fraction": 1.0}
    assert found.constant.setting == best | course | {"learning_rate": rates[2][0]}
    assert found.constant.name.startswith("constant rate")
    assert f"and {found.constant} at a constant learning rate" in found.verdict
    assert found.best.arguments == best
    assert found.constant.name in found.table()


def test_many_trials_run_with_two_seeds_that_do_not_confirm():
    found = finish(search_of(problem=BOWL, steps=40, trials=32, confirm=(3, 2), seed=5))
    seeds = {stage: {t.seed for t in found.trials if t.stage == stage} for stage in ("list", "model", "confirm")}
    assert seeds == {"list": {5}, "model": {5, 8}, "confirm": {6, 7}}


def test_stages_begin_with_a_typical_course():
    search = search_of(problem=BOWL, steps=40, sampler="halton")
    defaults, *first = search.ask_round()
    assert {(t.arguments["warmup_fraction"], t.arguments["end_fraction"]) for t in first} == {(0.05, 0.0)}
    assert (defaults.arguments["warmup_fraction"], defaults.arguments["end_fraction"]) == (0.0, 1.0)


def test_rates_that_are_constant_anyway_are_confirmed_once():
    search = search_of(problem=BOWL, steps=40, confirm=(2, 2), schedule="constant")
    assert max(t.number for t in finish(search).trials) == 15


def test_a_race_confirms():
    def run(search, *, told=lambda trial: loss(trial)):
        by_round = []
        while trials := search.ask_round():
            by_round.append([(t.number, t.seed) for t in trials if t.stage == "confirm"])
            for trial in trials:
                search.tell(trial, told(trial))
        return search.report(), [x for x in by_round if x]

    race = ((4, 2), (3, 3), (2, 5))
    found, rounds = run(search_of(confirm=race))
    top = [t.number for t in found.ranking[:4]]
    assert set(rounds[0]) == {(n, seed) for n in {*top, 0} for seed in (1, 2)}
    # The noise of `loss` is the same for all settings, so their order stays.
    assert set(rounds[1]) == {(n, 3) for n in {*top[:3], 0}}
    assert set(rounds[2]) == {(n, seed) for n in {*top[:2], 0} for seed in (4, 5)}
    assert sum(map(len, rounds)) + 16 == search_of(confirm=race).size
    assert [len(c.values) for c in found.confirmed if c.number in top] == [5, 5, 3, 2]
    assert found.best.arguments == found.ranking[0].setting

    def unlucky(trial):  # the best of the search is the worst with fresh seeds, and another one fails
        bad = trial.stage == "confirm" and trial.number == top[0]
        return None if trial.stage == "confirm" and trial.number == top[1] else loss(trial) + bad

    found, rounds = run(search_of(confirm=race), told=unlucky)
    assert not {top[0], top[1]} & {n for n, _ in rounds[2]}
    assert found.best.arguments == found.searched[top[2]].setting


def test_metrics_failures_and_pruned_trials():
    search = search_of(metric="accuracy", mode="max", confirm=None)
    trials = search.ask_round()
    trials[1].report(0, {"accuracy": 0.5, "loss": 1.0})
    trials[1].report(3, 0.7)
    for trial, value in zip(
        trials, [{"accuracy": 0.9, "loss": np.float32(0.5)}, "pruned", None, math.nan, np.int64(1)], strict=False
    ):
        search.tell(trial, value)
    records = search.report().searched
    assert [r.status for r in records[:5]] == ["complete", "pruned", "failed", "failed", "complete"]
    assert [r.error for r in records[2:4]] == ["no value", "the metric is NaN"]
    assert records[0].metrics == {"accuracy": [0.9], "loss": [0.5]}
    assert records[1].steps == [0, 3]
    assert records[1].metrics["accuracy"] == [0.5, 0.7]
    assert records[1].value("accuracy") == 0.7
    assert search.report().best.arguments == trials[4].arguments


def test_reports_that_are_nan_are_judged_at_the_end():
    search = search_of()
    trial = search.ask()
    for step, x in ((1, math.nan), (2, math.inf), (4, 2.0), (5, math.nan)):
        trial.report(step, x)
    search.tell(trial, 1.0)
    (record,) = search.report().trials
    assert (record.status, record.error, record.value("loss")) == ("complete", "", 1.0)


def test_reports_that_stay_nan_end_a_trial_once_others_have_values():
    search = search_of(confirm=None, trials=24)
    for _ in range(6):
        trial = search.ask()
        for step in range(8):
            trial.report(step, 0.0)
        search.tell(trial, loss(trial))
    trial = search.ask()
    for step in (0, 1):
        trial.report(step, math.nan)
    with pytest.raises(Pruned, match="the metric is NaN at step 2"):
        trial.report(2, math.nan)
    search.tell(trial, "pruned")
    assert search.report().trials[-1].error == "the metric is NaN at step 2"


def test_it_prunes():
    search, reasons = search_of(confirm=None, trials=24), []
    for trial in search:
        try:
            for epoch in range(8):
                trial.report(epoch, loss(trial) + 1 / (1 + epoch))
        except Pruned as reason:
            reasons.append(str(reason))
            search.tell(trial, "pruned")
        else:
            search.tell(trial, loss(trial))
    report = search.report()
    assert {t.status for t in report.searched} == {"complete", "pruned"}
    assert all("is worse than the median of the others" in reason for reason in reasons)
    assert report.searched[0].status == "complete"
    assert set(report.figures()) >= {"hyperparameters", "curves"}


def test_telling_what_is_wrong():
    search = search_of()
    trial = search.ask()
    for bad, error, message in (
        ((3, 1.0), TypeError, r"Invalid trial value: 3; trial must be one that ask\(\) returned"),
        ((search_of(seed=1).ask(), 1.0), ValueError, r"Trial\(0, 'defaults', seed 1, .* is not a trial of this search"),
        ((search_of(trials=8).ask(), 1.0), ValueError, "is not a trial of this search: tell the search that asked"),
        ((trial, "complete"), ValueError, "Invalid value value: 'complete'; value must be a number, a dict, None or"),
        ((trial, {"f1": 1.0}), ValueError, "the value has f1, but not 'loss': add it"),
        ((trial, [1.0, 2.0]), TypeError, r"the value has \[1.0, 2.0\] for 'loss', expected a number"),
    ):
        with pytest.raises(error, match=message):
            search.tell(*bad)
    with pytest.raises(TypeError, match="Invalid error value: 3; error must be a text"):
        search.tell(trial, None, error=3)
    search.tell(trial, 1.0)
    with pytest.raises(ValueError, match="has been told before: a trial has one result"):
        search.tell(trial, 1.0)


def test_a_search_resumes(tmp_path):
    expected = finish(search_of())
    search = search_of(out=tmp_path / "run")
    first = [search.ask() for _ in range(5)]
    for trial in (first[4], first[0], first[2]):
        search.tell(trial, loss(trial))
    again = search_of(out=tmp_path / "run")
    asked = [again.ask() for _ in range(2)]
    assert [(t.number, t.arguments, t.seed) for t in asked] == [
        (first[i].number, first[i].arguments, first[i].seed) for i in (1, 3)
    ]
    for trial in asked:
        again.tell(trial, loss(trial))
    report = finish(search_of(out=tmp_path / "run"))
    assert report.to_json() == expected.to_json()
    report.save(tmp_path / "run")
    assert Report.load(tmp_path / "run").to_json() == expected.to_json()
    with pytest.raises(ValueError, match="holds another tuning: its trials is 16, here it is 15"):
        search_of(out=tmp_path / "run", trials=15)
    with pytest.raises(FileExistsError, match="already holds a tuning"):
        search_of(out=tmp_path / "run", resume=False)


def test_what_was_unknown_stays_unknown_when_it_resumes(tmp_path):
    search = search_of(out=tmp_path, confirm=None)
    late = []
    for trial in search:
        if trial.number in (1, 2, 3):
            late.append(trial)
        else:
            search.tell(trial, loss(trial))
    for trial in late:
        search.tell(trial, 0.0)  # better than all others, but too late
    assert search_of(out=tmp_path, confirm=None).ask() is None
    again = search_of(out=tmp_path, confirm=None)
    assert again.ask() is None
    assert again.report().to_json() == search.report().to_json()


def test_reports_of_nothing_yet():
    report = search_of().report()
    assert report.searched == []
    assert report.warnings == ("no trial has ended yet: there is no best setting",)
    assert "learning_rate" in report.table()
    assert report.figures() == {}
    with pytest.raises(ValueError, match="no trial has ended yet"):
        report.best  # noqa: B018
    assert '"best": null' in report.to_json()
    assert "0 trials of search" in repr(report)


def test_where_all_fail():
    search = search_of()
    for trial in search:
        search.tell(trial, None, error="OSError: no data")
    report = search.report()
    assert not report.confirmed
    with pytest.raises(ValueError, match="all 16 trials failed, most often with: OSError: no data"):
        report.best  # noqa: B018
    assert any("100% of the trials failed" in w for w in report.warnings)
    assert set(report.figures()) >= {"hyperparameters"}


def test_a_range_test_narrows_the_search():
    rates = np.geomspace(1e-4, 10, 40)
    ramp = LrRange(rates.tolist(), (1 + np.log10(rates / 0.3) ** 2).tolist())
    report = finish(search_of(range_test=ramp))
    low, high = ramp.band
    assert all(low / 10 < t.setting["learning_rate"] < high * 10 for t in report.searched[1:8])
    search = search_of()
    search.tell(search.ask(), 1.0)
    search.narrow(ramp)
    assert [t.arguments for t in search.ask_round()] == [t.setting for t in report.searched[1:]][: search.plan()[0]]
    with pytest.raises(RuntimeError, match="call narrow before the second trial is asked"):
        search.narrow(ramp)
    with pytest.raises(ValueError, match="the search has another one already"):
        search_of(range_test=ramp).narrow(None)


def test_a_problem_gives_its_name_and_its_shapes():
    search = search_of(problem=BOWL)
    assert "amsgrad" in search.ask().arguments
    assert "Bowl" in repr(search.report())
    assert "parameters" in search.report().question
    assert "of my loop" in repr(search_of(problem="my loop").report())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optuna_learns_results_that_come_late():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = Space(learning_rate=Log(1e-3, 1.0), amsgrad=Choice(False, True))
    search = search_of(space, sampler=study, confirm=None)
    trials = list(search)
    assert len(trials) == 16
    assert {t.state.name for t in study.trials} == {"RUNNING"}
    for trial in trials:
        search.tell(trial, None if trial.number == 3 else "pruned" if trial.number == 4 else loss(trial))
    assert search.ask() is None
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED"] + ["COMPLETE"] * 11
