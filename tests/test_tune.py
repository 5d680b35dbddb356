"""Tuning: the strategy on real runs, what it writes, and how it goes on after an end."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from functools import partial

import jax
import numpy as np
import optax
import optuna
import pytest
from bowl import BOWL, CLOSED, Bowl
from tolerances import SWEEP

import adamjax
from adamjax import cli, optimizers
from adamjax.training import train
from adamjax.tuning import Choice, Linear, Log, Report, Space, tune
from adamjax.tuning._courses import Scheduled
from adamjax.tuning._journal import Journal, TrialRecord
from adamjax.tuning._population import PopulationRunner
from adamjax.tuning._report import _optimizer_named
from adamjax.tuning._spec import optimizer_name

pytestmark = pytest.mark.numbers

STEPS = 40
# Without what would be decided by measured times, and so differ from run to run.
small = partial(tune, BOWL, steps=STEPS, trials=12, execution="vmap", halving=False, confirm=(2, 2))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A tuning as a user would do it, kept in a folder."""
    out = tmp_path_factory.mktemp("tune")
    return tune(BOWL, steps=STEPS, trials=20, execution="vmap", halving=False, confirm=(5, 3), out=out, resume=False)


@pytest.fixture(scope="module")
def halved():
    return small(halving=True, confirm=None, sampler="halton")


def test_it_finds_better_hyperparameters_than_the_defaults(report):
    searched = report.searched
    assert [t.number for t in searched] == list(range(20))
    assert searched[0].setting == report.defaults
    adam = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4, "amsgrad": False}
    assert report.defaults == adam | {"warmup_fraction": 0.0, "end_fraction": 1.0}  # a constant rate
    assert {t.stage for t in searched} == {"defaults", "list", "model", "amsgrad"}
    best = report.best
    assert eval(str(best), {"adamjax": adamjax}) == best.optimizer
    assert 0.05 < best.arguments["learning_rate"] < 2
    by_setting = {str(c.setting): c for c in report.confirmed}
    assert report.confirmed[0].mean < 0.05 * by_setting[str(report.defaults)].mean
    assert not by_setting[str(report.defaults)].tied
    assert all("lies on the edge" in warning for warning in report.warnings)


def test_what_is_confirmed_are_the_best_and_the_defaults_with_fresh_seeds(report):
    confirmed = [t for t in report.trials if t.stage == "confirm"]
    top = {t.number for t in report.ranking[:5]} | {0}
    constant = {20, 21, 22}  # the best setting at constant rates
    assert {(t.number, t.seed) for t in confirmed} == {(n, seed) for n in top | constant for seed in (1, 2, 3)}
    assert {t.seed for t in report.searched} == {0}
    assert [c.mean for c in report.confirmed] == sorted(c.mean for c in report.confirmed)
    # Each is what a run of that setting with that seed gives.
    winner = report.confirmed[0]
    for seed, value in enumerate(winner.values, start=1):
        *_, last = train(BOWL, report.make(**winner.setting), steps=STEPS, seed=seed)
        np.testing.assert_allclose(value, last.metrics["loss"], rtol=SWEEP)
    assert winner.spread == pytest.approx(np.std(winner.values, ddof=1))


@pytest.mark.slow
def test_halving_ends_the_worse_half_early(halved):
    assert {t.status for t in halved.searched} == {"complete", "pruned"}
    assert halved.searched[0].status == "complete"
    for batch in (halved.searched[1:7], halved.searched[7:]):
        for rung in (STEPS // 4, STEPS // 2):
            ended = [t for t in batch if t.status == "pruned" and t.steps[-1] == rung]
            stayed = [t for t in batch if t.steps[-1] > rung]
            assert len(stayed) <= len(ended) + 1
            worst = max(t.metrics["loss"][t.steps.index(rung)] for t in stayed)
            assert all(t.value("loss") >= worst for t in ended)


@pytest.mark.slow
def test_halving_changes_no_trial(halved):
    whole = small(halving=False, confirm=None, sampler="halton")
    assert all(t.status == "complete" for t in whole.searched)
    # Up to the end of the first stage, both have tried the same.
    for a, b in zip(halved.searched[:5], whole.searched[:5], strict=True):
        assert a.setting == b.setting
        np.testing.assert_allclose(a.metrics["loss"], b.metrics["loss"][: len(a.steps)], rtol=SWEEP)


@pytest.mark.slow
def test_survivors_move_to_smaller_programs(monkeypatch):
    rooms = []
    original = PopulationRunner._program

    def program(self, opts, keys, order, room):
        rooms.append(room)
        return original(self, opts, keys, order, room)

    monkeypatch.setattr(PopulationRunner, "_program", program)
    small(trials=9, stages=["learning_rate"], halving=True, confirm=None)
    assert list(dict.fromkeys(rooms)) == [9, 5, 3]


@pytest.mark.slow
def test_halving_is_for_what_takes_long(monkeypatch):
    monkeypatch.setattr(PopulationRunner, "cost", lambda self, *_: self._order(*ORDER) and (1.0, 1.0, True))
    monkeypatch.setattr(PopulationRunner, "_order", lambda self, *_: "vmap")
    constant = partial(small, halving="auto", confirm=None, schedule="constant", sampler="halton")
    assert any(t.status == "pruned" for t in constant().searched)
    assert all(t.status == "complete" for t in small(halving="auto", confirm=None).searched)
    monkeypatch.setattr(PopulationRunner, "cost", lambda self, *_: (1e-3, 10.0, True))
    assert all(t.status == "complete" for t in constant().searched)
    monkeypatch.setattr(PopulationRunner, "cost", lambda self, *_: (1.0, 1.0, False))
    found = small(confirm=None, halving=True)
    assert all(t.status == "complete" for t in found.searched)
    assert "no halving: the settings of a round do not fit in memory at once" in found.warnings


ORDER = (None, None, None, None)


class Killed(BaseException):
    """Nothing catches this."""


@pytest.mark.slow
@pytest.mark.parametrize(("halving", "ends"), [(False, (0, 3, 9, -1)), (True, (3, 9))])
def test_a_killed_tuning_goes_on_where_it_ended(tmp_path, monkeypatch, halving, ends):
    monkeypatch.setattr(Report, "save", lambda self, directory: None)
    expected = small(halving=halving, out=tmp_path / "whole")
    lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines()
    assert len({(json.loads(x)["number"], json.loads(x)["seed"]) for x in lines}) == len(lines) == len(expected.trials)
    ran = []
    original = PopulationRunner.run

    def run(self, opts, seeds, marks, **kwargs):
        ran.append(len(opts) * len(seeds) * kwargs["wanted"].any())
        return original(self, opts, seeds, marks, **kwargs)

    monkeypatch.setattr(PopulationRunner, "run", run)
    for survived in [end % len(lines) for end in ends]:
        out = tmp_path / str(survived)
        out.mkdir()
        (out / "tune.json").write_text((tmp_path / "whole" / "tune.json").read_text())
        # The line that was being written when it was killed has no end.
        (out / "trials.jsonl").write_text("\n".join([*lines[:survived], lines[survived][:50]]))
        ran.clear()
        found = small(halving=halving, out=out)
        assert found.to_json() == expected.to_json()
        assert len((out / "trials.jsonl").read_text().splitlines()) == len(lines)
        # A batch of which all trials had ended was not run again.
        assert sum(ran) == 24 - (5 * (survived >= 5) + 4 * (survived >= 9) + 3 * (survived >= 12))
    ran.clear()
    assert small(halving=halving, out=tmp_path / "whole").to_json() == expected.to_json()
    assert not any(ran)


@pytest.mark.slow
def test_trials_are_written_as_they_end(tmp_path, monkeypatch):
    counts = []
    original = Journal.write

    def write(self, trials):
        original(self, trials)
        if (tmp_path / "trials.jsonl").exists():
            counts.append(len((tmp_path / "trials.jsonl").read_text().splitlines()))
        if len(set(counts)) == 3:
            raise Killed

    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(Killed):
        small(halving=True, out=tmp_path)
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] > 0
    # What there is can be looked at.
    monkeypatch.undo()
    partly = Report.load(tmp_path)
    assert len(partly.trials) == counts[-1]
    partly.save(tmp_path)
    assert (tmp_path / "report.html").exists()
    assert any("not confirmed" in warning for warning in partly.warnings)


PROCESS = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    sys.path.insert(0, {tests!r})
    from test_tune import small
    small(out={out!r}, trials=40)
"""


@pytest.mark.slow
def test_kill_9(tmp_path):
    out = tmp_path / "run"
    code = textwrap.dedent(PROCESS.format(tests=os.path.dirname(__file__), out=str(out)))
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 120
    trials = out / "trials.jsonl"
    while not (trials.exists() and trials.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = trials.read_text()
    assert before
    found, expected = small(out=out, trials=40), small(trials=40)
    assert trials.read_text().startswith(before[: before.rfind("\n") + 1])
    assert found.to_json() == expected.to_json()


def test_folders_of_other_tunings_are_refused(tmp_path, report):
    small(out=tmp_path, trials=1, confirm=None)
    for change, message in (
        ({"steps": STEPS + 1}, f"its steps is {STEPS}, here it is {STEPS + 1}"),
        ({"trials": 2}, "its trials is 1, here it is 2"),
        ({"optimizer": adamjax.adam}, "its optimizer is 'adamjax.adamw', here it is 'adamjax.adam'"),
        ({"space": Space(learning_rate=Log(1e-3, 1e-1))}, "its space is .*, here it is 'Space.*'"),
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"metric": "score", "mode": "max"}, "its metric is 'loss', here it is 'score'"),
    ):
        with pytest.raises(ValueError, match=f"holds another tuning: {message}; choose another folder"):
            small(**{"out": tmp_path, "trials": 1, "confirm": None} | change)
    with pytest.raises(ValueError, match=r"its problem is .*wall=inf.*, here it is .*wall=0.001"):
        tune(CLOSED, out=tmp_path, steps=STEPS, trials=1, confirm=None)
    with pytest.raises(FileExistsError, match="already holds a tuning: resume it, or choose another folder"):
        small(out=tmp_path, trials=1, confirm=None, resume=False)
    lines = (tmp_path / "trials.jsonl").read_text()
    changed = re.sub(', "digest": "[^"]*"', "", lines).replace('"b1": 0.9', '"b1": 0.5')  # as of earlier versions
    (tmp_path / "trials.jsonl").write_text(changed)
    with pytest.raises(ValueError, match=r"its trial 0 is .*choose another folder"):
        small(out=tmp_path, trials=1, confirm=None)
    (tmp_path / "trials.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1 of .*trials.jsonl is not a trial .*: remove it"):
        small(out=tmp_path, trials=1, confirm=None)
    for damaged in ('{"question": ', "[]", "{}", '{"question": 3, "notes": []}'):
        (tmp_path / "tune.json").write_text(damaged)
        for call in (partial(small, out=tmp_path, trials=1, confirm=None), partial(Report.load, tmp_path)):
            with pytest.raises(ValueError, match=r"tune.json is damaged .*: restore it from a copy, or choose"):
                call()
    (tmp_path / "tune.json").unlink()
    with pytest.raises(ValueError, match=r"trials.jsonl has no tune.json beside it"):
        small(out=tmp_path, trials=1, confirm=None)


@pytest.mark.slow
def test_what_prints_an_address_goes_on_in_another_process(tmp_path):
    """Where functions lie in memory is no part of the question."""

    def again():
        @dataclasses.dataclass(frozen=True)
        class Problem(Bowl):
            shape: object = lambda x: x

        class Optimizer:
            def __call__(self, learning_rate=1e-3, mask=None, *, make):
                return make(learning_rate, mask=mask)

        optimizer = partial(Optimizer(), make=lambda *args, **others: adamjax.adamw(*args, **others))
        space = Space(learning_rate=Log(1e-3, 1.0), mask=Choice(None, lambda params: True))
        return tune(
            Problem(),
            optimizer=optimizer,
            space=space,
            steps=4,
            trials=20,
            execution="vmap",
            confirm=None,
            out=tmp_path,
        )

    first = again()
    assert "lambda" in (tmp_path / "trials.jsonl").read_text()
    assert again().to_json() == first.to_json()


@pytest.mark.slow
def test_epsilon_is_searched_in_half_precision_or_when_asked(report):
    assert "eps" not in report.best.arguments
    half = tune(Bowl("bfloat16"), steps=4, trials=20, execution="vmap", confirm=None)
    assert len({t.setting["eps"] for t in half.searched}) > 5
    asked = small(stages=["learning_rate", ("eps", "b2")], confirm=None)
    assert {t.stage for t in asked.searched} == {"defaults", "learning_rate", "eps, b2"}
    assert asked.best.arguments.keys() == {"learning_rate", "b2", "eps", "warmup_fraction", "end_fraction"}
    assert {t.setting["warmup_fraction"] for t in asked.searched[1:]} == {0.05}


@pytest.mark.slow
def test_spaces_and_optimizers_of_ones_own():
    def clipped(learning_rate, max_norm=1.0, nesterov=False):
        return adamjax.chain(adamjax.clip_by_global_norm(max_norm), adamjax.adam(learning_rate, nesterov=nesterov))

    space = Space(learning_rate=Log(1e-3, 1.0), max_norm=Log(0.1, 10.0), nesterov=Choice(False, True))
    found = small(optimizer=clipped, space=space, trials=20, confirm=None)
    own = {"learning_rate": 1e-3, "max_norm": 1.0, "nesterov": False}
    assert found.defaults == own | {"warmup_fraction": 0.0, "end_fraction": 1.0}
    assert {t.stage for t in found.searched} == {"defaults", "list", "model", "nesterov"}
    assert str(found.best).startswith(
        "test_tune.test_spaces_and_optimizers_of_ones_own.<locals>.clipped(learning_rate=adamjax.schedules.WarmupCosine"
    )
    constant = small(optimizer=clipped, space=space, steps=4, schedule="constant", confirm=None)
    assert constant.defaults == own
    assert constant.best.optimizer == clipped(**constant.best.arguments)


@pytest.mark.slow
def test_numbers_of_numpy(tmp_path):
    space = Space(learning_rate=Log(np.float32(1e-3), np.float64(1)), b1=Linear(np.int64(0), np.float32(0.5)))
    three, four = np.int64(3), np.int32(4)
    again = partial(tune, BOWL, space=space, trials=four, steps=four, confirm=(np.int64(1), three), seed=np.uint8(3))
    first = again(out=tmp_path, execution="vmap")
    assert eval(str(first.best), {"adamjax": adamjax}) == first.best.optimizer
    assert again(out=tmp_path, execution="vmap").to_json() == first.to_json()
    assert Report.load(tmp_path).best.arguments == first.best.arguments


def test_arguments_given_by_partial_are_kept():
    found = small(optimizer=partial(adamjax.adamw, b1=0.5, weight_decay=0.0), confirm=None)
    assert found.best.arguments.keys() == {"learning_rate", "b2", "warmup_fraction", "end_fraction", "amsgrad"}
    assert str(found.best).startswith("functools.partial(adamjax.adamw, b1=0.5, weight_decay=0.0)(learning_rate=")
    assert found.best.optimizer.transforms[0].b1 == 0.5


def test_an_optimizer_that_takes_no_schedule_has_no_range_test():
    def cosine(learning_rate=1e-3, b1=0.9):
        return adamjax.adam(adamjax.schedules.cosine(learning_rate, STEPS), b1=b1)

    found = small(optimizer=cosine, confirm=None)
    assert found.range_test is None
    assert any("no range test of the learning rate" in warning for warning in found.warnings)
    assert "range_test" not in found.figures()


@pytest.mark.slow
def test_a_higher_metric_can_be_better(report):
    # The stages look at the order of the scores only, the model also at how far they are apart.
    lowest, found = (small(sampler="halton", **by) for by in ({}, {"metric": "score", "mode": "max"}))
    values = [t.value("score") for t in found.ranking]
    assert values == sorted(values, reverse=True)
    assert found.best.arguments == lowest.best.arguments
    modelled = small(metric="score", mode="max", trials=20)
    best = min(c.mean for c in report.confirmed)
    assert 1 - modelled.confirmed[0].mean < 5 * best  # the score is 1 - loss


@pytest.mark.slow
def test_where_everything_diverges(tmp_path, capsys):
    found = tune(CLOSED, steps=STEPS, trials=8, execution="vmap", out=tmp_path / "a")
    assert {t.status for t in found.trials} == {"infeasible"}
    assert all(t.diverged_at == 1 for t in found.trials)
    assert not found.confirmed
    assert "100% of the trials diverged" in found.warnings[0] + found.warnings[1]
    with pytest.raises(ValueError, match="all 8 trials diverged: lower the range of the learning rate"):
        found.best  # noqa: B018
    assert json.loads(found.to_json())["best"] is None
    assert "every trial diverged" in (tmp_path / "a" / "report.html").read_text()
    arguments = ["tune", "bowl:CLOSED", "--trials", "2", "--steps", "4", "--out", str(tmp_path / "b")]
    assert cli.main(arguments) == 1
    assert "every trial diverged" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_that_diverge_end_at_once_and_are_counted():
    # A step of the learning rate or more leaves the walls; smaller ones stay within.
    space = Space(learning_rate=Log(1e-3, 1e2))
    run = partial(tune, Bowl(wall=5.0), space=space, steps=STEPS, schedule="constant", sampler="halton")
    found = run(trials=12, execution="vmap", confirm=None)
    diverged = [t for t in found.searched if t.status == "infeasible"]
    assert 0.1 < len(diverged) / 12 < 0.9
    assert all(t.steps[-1] < STEPS for t in diverged)
    assert all(np.isnan(t.value("loss")) for t in diverged)
    assert any(f"{len(diverged) / 12:.0%} of the trials diverged" in warning for warning in found.warnings)
    assert all(t.setting["learning_rate"] > found.best.arguments["learning_rate"] for t in diverged)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestOptuna:
    def test_asks_and_tells(self):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        space = Space(learning_rate=Log(1e-3, 1e2), one_minus_b1=Log(0.01, 1.0), amsgrad=Choice(False, True), b2=0.99)
        found = tune(
            Bowl(wall=5.0), space=space, steps=STEPS, trials=33, sampler=study, execution="vmap", confirm=None,
            halving=True,
        )  # fmt: skip
        assert len(study.trials) == 32
        told = Counter(t.state.name for t in study.trials)
        assert min(told["FAIL"], told["PRUNED"], told["COMPLETE"]) > 0
        for theirs, ours in zip(study.trials, found.searched[1:], strict=True):
            assert ours.setting["learning_rate"] == theirs.params["learning_rate"]
            assert ours.setting["b1"] == 1 - theirs.params["b1"]
            assert repr(ours.setting["amsgrad"]) == theirs.params["amsgrad"]
            assert ours.setting["b2"] == 0.99
            status = {"complete": "COMPLETE", "pruned": "PRUNED", "infeasible": "FAIL"}[ours.status]
            assert theirs.state.name == status
            if status == "COMPLETE":
                assert theirs.value == ours.value("loss")
            elif status == "PRUNED":
                assert theirs.intermediate_values == {ours.steps[-1]: ours.value("loss")}

    def test_batches_resume(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Report, "save", lambda self, directory: None)
        tuned = partial(small, sampler="optuna", out=tmp_path, stages=["learning_rate", "b1"])
        expected = tuned()
        assert {t.stage for t in expected.searched} == {"defaults", "optuna"}
        lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "trials.jsonl").write_text("".join(lines[:8]))
        assert tuned().to_json() == expected.to_json()

    def test_machines_share_a_storage(self, tmp_path):
        url = f"sqlite:///{tmp_path / 'study.db'}"
        for _ in range(2):
            small(sampler="optuna:RandomSampler", storage=url, stages=["learning_rate"], confirm=None)
        (summary,) = optuna.get_all_study_summaries(url)
        assert summary.n_trials == 22

    def test_the_learning_rate_has_room(self):
        # Optuna does not leave its range, so the range test may only widen it.
        found = small(sampler="optuna:RandomSampler", stages=["learning_rate"], trials=40, steps=4, confirm=None)
        rates = [t.setting["learning_rate"] for t in found.searched]
        assert min(rates) < 1e-3
        assert max(rates) > 5e-2


BAD = [
    ({"trials": 0}, ValueError, "Invalid trials value: 0; trials must be at least 1"),
    ({"steps": 0}, ValueError, "Invalid steps value: 0; steps must be at least 1"),
    ({"steps": 2**31}, ValueError, "steps must be at most 2,147,483,647, since the updates of a run are counted in 32"),
    ({"trials": 10**9}, ValueError, "trials must be at most 10,000,000, since the results of all are kept in memory"),
    ({"confirm": (1, 10**9)}, ValueError, r"Invalid confirm\[1\] value: 1,000,000,000; .* at most 10,000,000"),
    ({"stop": True}, TypeError, "Invalid stop value: True"),
    ({"steps": 1.5}, TypeError, "Invalid steps value: 1.5; steps must be an int"),
    ({"seed": -1}, ValueError, "Invalid seed value: -1"),
    ({"seed": 2**31 - 2, "confirm": (1, 2)}, ValueError, "Invalid seed value: 2147483646; seed, .*must be below 2"),
    ({"mode": "least"}, ValueError, "Invalid mode value: 'least'"),
    ({"metric": "score"}, ValueError, "Invalid mode value: None; say whether the lowest score is the best"),
    ({"metric": "f1"}, ValueError, "Invalid metric value: 'f1'; the problem's evaluate returns loss, score"),
    ({"halving": "yes"}, ValueError, "Invalid halving value: 'yes'"),
    ({"confirm": ((3, 2), (4, 3))}, ValueError, "with fewer settings and more seeds in each"),
    ({"confirm": 3}, ValueError, "Invalid confirm value: 3; confirm must be two ints, or pairs of them"),
    ({"confirm": (0, 3)}, ValueError, r"Invalid confirm\[0\] value: 0"),
    ({"stages": "all"}, ValueError, "Invalid stages value: 'all'; stages must be \"adam\""),
    ({"stages": []}, ValueError, r"Invalid stages value: \[\]; every stage needs at least one argument"),
    ({"stages": ["momentum"]}, ValueError, "'momentum' has no range, only learning_rate, .*add one to space"),
    ({"sampler": "tpe"}, ValueError, "Invalid sampler value: 'tpe'; sampler must be one of 'auto', 'halton', 'sobol'"),
    ({"sampler": "optuna:Oracle"}, ValueError, "Invalid sampler value: 'optuna:Oracle'; Optuna has no sampler Oracle"),
    ({"sampler": "optuna:nsgaii"}, ValueError, "Optuna has no sampler nsgaii"),  # but a module of that name
    ({"storage": "sqlite:///x.db"}, ValueError, "only Optuna's samplers have a storage"),
    ({"sampler": 3}, ValueError, "Invalid sampler value: 3"),
    ({"sampler": "optuna", "storage": "x.db"}, ValueError, "Invalid storage value: 'x.db'; Could not parse"),
    (
        {"space": {"b1": Linear(0.0, 0.9)}},
        TypeError,
        r"Invalid space value: \{'b1': .*; space must be a Space, or None",
    ),
    ({"execution": "pmap"}, ValueError, "Invalid execution value: 'pmap'"),
    ({"optimizer": lambda x: adamjax.adam(x)}, ValueError, "has none of the arguments learning_rate, b1.*give a space"),
    (
        {"space": Space(learning_rate=Log(1e-3, 1e-1), momentum=Linear(0.0, 0.9))},
        TypeError,
        r"setting 0, \{.*\}: .*momentum",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        small(**{"out": tmp_path / "out"} | arguments)
    assert not (tmp_path / "out").exists()


def test_bad_problems_and_studies():
    with pytest.raises(TypeError, match="object is not a problem: it has no method init"):
        tune(object())
    with pytest.raises(ValueError, match=r"the study's directions are .*MAXIMIZE.*, mode is 'min'"):
        small(sampler=optuna.create_study(direction="maximize"))
    with pytest.raises(ValueError, match="a study has its own storage; leave storage out"):
        small(sampler=optuna.create_study(), storage="sqlite:///x.db")


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_what_the_report_needs_is_asked_for_before_anything_runs(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"the report needs {module}: run  pip install 'adamjax\[tune\]'"):
        small(out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_extras_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ImportError, match=r"searching by Optuna's samplers needs optuna: run  pip install 'adamjax\[tune\]'"
    ):
        small(sampler="optuna")


def race(values, **schedule):
    """Make a report of settings whose runs with the seeds 1, 2, ... have these values; setting 0 is the default."""
    settings = {n: {"learning_rate": 0.1 * n} | schedule for n in values}
    settings[0] = {"learning_rate": 1e-3} | dict.fromkeys(schedule, 0.0)

    def record(n, stage, seed, value):
        return TrialRecord(n, stage, settings[n], seed, "complete", [100], [], {"loss": [float(value)]}, 0)

    searched = [record(n, "all" if n else "defaults", 0, x[0]) for n, x in values.items()]
    fresh = [record(n, "confirm", seed, x) for n, row in values.items() for seed, x in enumerate(row, start=1)]
    question = {"problem": "race", "optimizer": "adamjax.adam", "metric": "loss", "mode": "min", "steps": 100}
    question |= {"trials": len(values), "confirm": [[3, 2], [2, 4]]}
    return Report(question, searched + fresh, settings[0], adamjax.adam, None, {}, "")


class TestReport:
    def test_of_a_running_tuning_leaves_its_files_alone(self, report, tmp_path):
        report.save(tmp_path)
        # The tuning is in the middle of a line, of which the report must cut off nothing.
        with open(tmp_path / "trials.jsonl", "a") as file:
            file.write('{"number": 20, "sta')
        names = ("trials.jsonl", "tune.json")
        before = [((tmp_path / name).read_bytes(), (tmp_path / name).stat().st_mtime_ns) for name in names]
        Report.load(tmp_path).save(tmp_path)
        assert before == [((tmp_path / name).read_bytes(), (tmp_path / name).stat().st_mtime_ns) for name in names]

    def test_is_saved_and_loaded(self, report, tmp_path):
        report = dataclasses.replace(report, facts={"jax": "1.2.3", "date": "today", "wall time": "7 s"})
        report.save(tmp_path)
        names = ["confirmation", "hyperparameters", "heat_map", "parallel", "curves", "importance", "range_test"]
        names += ["schedules", "progress"]
        page = (tmp_path / "report.html").read_text()
        assert page.count("data:image/png;base64,") == len(names)
        for name in names:
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert str(report.best) in page
        assert "http" not in page  # self-contained
        assert "<script" not in page
        assert report.verdict in page
        assert page.count("\n<tr><td>") == len(report.confirmed) + len(report.trials)
        assert all(f"<td>{x}</td>" in page for x in report.facts.values())
        loaded = Report.load(tmp_path)
        assert loaded.facts == report.facts
        assert json.loads(report.to_json())["facts"] == {"jax": "1.2.3"}
        assert loaded.to_json() == report.to_json() == (tmp_path / "report.json").read_text().strip()
        assert loaded.table() == report.table()
        assert loaded.best.optimizer == report.best.optimizer
        assert loaded.warnings == report.warnings
        with pytest.raises(ValueError, match=r"holds no tuning: it has no tune.json"):
            Report.load(tmp_path / "nowhere")
        unknown = dataclasses.replace(report, question=report.question | {"optimizer": "mine.make"})
        unknown.save(tmp_path / "mine")
        with pytest.raises(ValueError, match=r"read from a folder: call mine.make with the arguments yourself"):
            Report.load(tmp_path / "mine").best.optimizer  # noqa: B018

    def test_makes_every_optimizer_of_the_package(self):
        makers = [x for name, x in vars(optimizers).items() if not name.startswith("_")]
        assert adamjax.ademamix in makers
        assert all(_optimizer_named(optimizer_name(make)) is make for make in makers)

    def test_names_where_a_function_is_public(self):
        assert optimizer_name(adamjax.interop.optax.muon) == "adamjax.interop.optax.muon"
        assert optimizer_name(optax.contrib.ademamix) == "optax.contrib.ademamix"

    def test_json_and_table_say_the_same(self, report):
        content = json.loads(report.to_json())
        assert content["best"] == report.best.arguments
        assert len(content["trials"]) == len(report.trials)
        assert [c["mean"] for c in content["confirmed"]] == [c.mean for c in report.confirmed]
        assert content["range_test"] == report.range_test.suggestions
        head, *rows = report.table().splitlines()
        assert head.split() == ["loss", *report.defaults]
        assert rows[0].split()[:4] == ["tuned", *str(report.confirmed[0]).split()]
        assert sum(row.startswith("defaults") for row in rows) == 1
        assert "20 trials of Bowl" in repr(report)

    def test_markup_in_names_is_escaped(self, report, tmp_path):
        report = dataclasses.replace(report, question=report.question | {"problem": "<script>"})
        report.save(tmp_path)
        assert "<script>" not in (tmp_path / "report.html").read_text()

    def test_names_are_drawn_and_printed_as_they_are(self, report, tmp_path, capsys):
        name = "$\\frac{$ <b> \x1b[31m"
        trials = [
            dataclasses.replace(t, stage=t.stage.replace("list", name), metrics={name: t.metrics["loss"]})
            for t in report.trials
        ]
        question = report.question | {"problem": name, "metric": name, "<b>": name, "steps": 10**18}
        named = dataclasses.replace(report, question=question, trials=trials, make=None)
        named.save(tmp_path)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "<b>" not in page.replace("<figcaption><b>", "")
        assert cli.main(["report", str(tmp_path)]) == 0
        said = capsys.readouterr()
        assert "$\\frac{$ <b> \\x1b[31m" in said.out
        assert "\x1b" not in said.out + said.err

    def test_is_printed_where_it_cannot_be_written(self, report, tmp_path, capsys):
        report.save(tmp_path)
        (tmp_path / "report.html").unlink()
        (tmp_path / "report.html").mkdir()
        assert cli.main(["report", str(tmp_path)]) == 2
        said = capsys.readouterr()
        assert said.out.strip().startswith(report.table().strip())
        assert "wrote" not in said.out
        assert "report.html" in said.err.splitlines()[-1]

    @pytest.mark.slow
    def test_is_printed_in_ascii(self, report, tmp_path):
        report.save(tmp_path)
        command = [sys.executable, "-m", "adamjax", "report", str(tmp_path)]
        said = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
        assert f" +- {report.confirmed[0].spread:.2g}".encode() in said.stdout

    def test_difference_to_the_defaults_may_be_noise(self, report):
        from scipy import stats

        best = report.confirmed[0]
        rng = np.random.default_rng(0)
        for shift, noise in ((0.0, 0.3), (0.05, 0.3), (2.0, 0.01)):
            values = {best.number: np.exp(rng.normal(0, noise, 3)), 0: np.exp(rng.normal(shift, noise, 3))}
            trials = list(report.searched)
            for number, row in values.items():
                template = next(t for t in report.trials if t.stage == "confirm" and t.number == number)
                for seed, x in enumerate(row, start=1):
                    trials.append(dataclasses.replace(template, seed=seed, metrics={"loss": [float(x)]}))
            found = dataclasses.replace(report, trials=trials)
            ours = {c.number: c for c in found.confirmed}
            assert set(ours) == {best.number, 0}
            # Where one of the two is better beyond doubt, scipy says so too.
            worse = max(ours.values(), key=lambda c: c.mean)
            better = min(ours.values(), key=lambda c: c.mean)
            p = stats.ttest_rel(np.log(worse.values), np.log(better.values)).pvalue
            assert worse.tied == (p > 0.05)
            assert better.tied
            said = any("within noise (3 seeds)" in w or "nothing that was tried is better" in w for w in found.warnings)
            assert said == (ours[0].tied or better.number == 0)

    def test_the_best_may_lie_on_the_edge(self, report):
        rate = report.best.arguments["learning_rate"]
        for low, high, warned in ((1e-3, rate, True), (rate / 1.05, 10.0, True), (1e-3, 3 * rate, False)):
            found = dataclasses.replace(report, explored=dict(report.explored) | {"learning_rate": (low, high)})
            said = (
                f"the best learning_rate, {rate:.3g}, lies on the edge of what was searched ({low:.3g} to {high:.3g})"
            )
            assert (said in found.warnings) == warned
        (b1,) = [r for n, r in report.explored.items() if n == "b1"]
        assert b1[0] < report.best.arguments["b1"] < b1[1]

    def test_a_race_ranks_its_finalists_first(self):
        # Setting 3 has the lowest mean, of the two seeds after which it was eliminated.
        values = {0: [5, 5, 5, 5], 1: [1.1, 1.0, 1.2, 1.1], 2: [2.1, 2.0, 2.2, 2.1], 3: [0.9, 1.2]}
        found = race(values)
        assert [(c.number, c.finalist) for c in found.confirmed] == [(1, True), (2, True), (0, True), (3, False)]
        assert [c.seeds for c in found.confirmed] == [(1, 2, 3, 4)] * 3 + [(1, 2)]
        assert found.best.arguments == {"learning_rate": 0.1}
        # Setting 3 is compared with the best by the two seeds that both have.
        assert [c.tied for c in found.confirmed] == [True, False, False, True]
        assert "1.05 ± 0.21 (2 seeds)" in found.table()
        assert "=" not in found.table()  # two seeds tell nothing, so only finalists are called indistinguishable
        assert found.verdict == (
            "Trial 1 has the lowest mean loss of 2 finalists, 1.1 ± 0.082 over 4 fresh seeds, against 5 ± 0 for the "
            "defaults. No other finalist is indistinguishable from it (paired t-test, 95% confidence); 1 setting left "
            "the race earlier."
        )
        assert "confirmation" in found.figures()

    def test_a_race_may_be_interrupted_anywhere(self):
        values = {0: [5, 5, 5, 5], 1: [1.1, 1.0, 1.2, 1.1], 2: [2.1, 2.0, 2.2, 2.1], 3: [0.9, 1.2]}
        whole = race(values)
        searched, fresh = whole.searched, [t for t in whole.trials if t.stage == "confirm"]
        for by in (lambda t: (t.seed > 2, t.number), lambda t: (t.seed, t.number), lambda t: (-t.number, t.seed)):
            for count in range(len(fresh) + 1):
                partly = dataclasses.replace(whole, trials=[*searched, *sorted(fresh, key=by)[:count]])
                assert partly.best.arguments != partly.defaults
                assert partly.verdict.startswith("Trial")
                assert partly.table()
                json.loads(partly.to_json())
        # Of the last round, only setting 2 has run: the round before decides.
        partly = dataclasses.replace(
            whole, trials=[t for t in whole.trials if t.stage != "confirm" or t.seed < 3 or t.number == 2]
        )
        assert partly.confirmed[0].number in (1, 3)
        assert all(c.finalist for c in partly.confirmed)

    def test_pictures_show_what_was_measured_in_one_scale_of_colours(self, report):
        figures = report.figures()
        norms = [axes.collections for axes in figures["heat_map"].axes]
        assert not any("ContourSet" in type(c).__name__ for row in norms for c in row)

        def colours(panel):
            (trials,) = [c for c in panel.collections if c.get_label() == "complete"]
            return trials.get_facecolors()

        first, second = figures["hyperparameters"].axes[0], figures["heat_map"].axes[0]
        np.testing.assert_array_equal(colours(first), colours(second))

    def test_trials_that_ended_early_are_hollow(self):
        found = race({n: [n + 1] for n in range(4)})
        early = [dataclasses.replace(t, status="pruned") if t.number == 3 else t for t in found.searched]
        for name in ("hyperparameters", "heat_map"):
            trials = [dataclasses.replace(t, setting=t.setting | {"b1": 0.1 * t.number}) for t in early]
            panel = dataclasses.replace(found, trials=trials).figures()[name].axes[0]
            faces = {c.get_label(): len(c.get_facecolors()) for c in panel.collections}
            assert (faces["complete"], faces["ended early"]) == (3, 0)

    def test_the_search_is_drawn_trial_by_trial(self):
        found = race({0: [4], 1: [3], 2: [1], 3: [np.nan], 4: [2]})
        (panel,) = found.figures()["progress"].axes
        best = next(line for line in panel.lines if line.get_label() == "best so far")
        np.testing.assert_array_equal(best.get_ydata(), [4, 3, 1, 1, 1])
        drawn = {c.get_label(): c.get_offsets().tolist() for c in panel.collections}
        assert drawn["defaults"] == [[0, 4]]
        assert [x for x, _ in drawn["all"]] == [1, 2, 4]
        assert [x for x, _ in drawn["beyond the axis, or diverged"]] == [3]

    def test_schedules_are_drawn_as_they_are(self):
        found = race({0: [5, 5], 1: [1, 2]}, warmup_fraction=0.1, end_fraction=0.25)
        assert "schedules" not in found.figures()
        for name, make in (
            ("cosine", adamjax.schedules.warmup_cosine),
            ("stable", partial(adamjax.schedules.warmup_stable_decay, decay_steps=20)),
        ):
            drawn = dataclasses.replace(found, question=found.question | {"schedule": name}).figures()["schedules"]
            lines = {line.get_label(): line for line in drawn.axes[0].lines}
            assert set(lines) == {"trial 1, the best", "defaults"}
            line = lines["trial 1, the best"]
            expected = make(0.1, warmup_steps=10, total_steps=100, end=0.025)
            at = [0, 1, 10, 20, 50, 90, 100]
            np.testing.assert_array_equal(line.get_xdata(), range(101))
            np.testing.assert_allclose(line.get_ydata()[at], [expected(i) for i in at], rtol=1e-5, atol=1e-9)

    def test_the_schedule_stretches_to_other_numbers_of_steps(self):
        found = race({0: [5, 5], 1: [1, 2]}, warmup_fraction=0.1, end_fraction=0.25)
        question = found.question | {"schedule": "cosine", "optimizer": "adamjax.adamw"}
        found = dataclasses.replace(found, question=question, make=Scheduled(adamjax.adamw, "cosine", 100))
        assert found.horizon.startswith("Tuned for 100 steps")
        long = adamjax.adamw(adamjax.schedules.warmup_cosine(0.1, warmup_steps=40, total_steps=400, end=0.025))
        assert found.best.for_steps(400).optimizer == long
        assert found.best.for_steps(100) == found.best
        with pytest.raises(ValueError, match="Invalid steps value: 0"):
            found.best.for_steps(0)
        constant = race({0: [5, 5], 1: [1, 2]})
        assert constant.horizon == ""
        with pytest.raises(ValueError, match=r"adamjax\.adam has a constant learning rate: it trains for any number"):
            constant.best.for_steps(400)

    def test_unconfirmed(self, halved):
        assert any("the luckiest of 12 trials" in warning for warning in halved.warnings)
        assert halved.table().splitlines()[1].startswith("tuned")


@pytest.mark.slow
def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["tune", "bowl:BOWL", "--steps", "8", "--confirm", "1", "2"]
    assert cli.main([*base, "--trials", "6", "--b1", "0.8", "--schedule", "cosine"]) == 0
    said = capsys.readouterr()
    assert "tuned" in said.out
    assert "defaults" in said.out
    assert "wrote report.html, its pictures and trials.jsonl to runs/tune-1" in said.out
    assert "b1=0.8" in said.out
    expression = next(line for line in said.out.splitlines() if line.startswith("functools"))
    opt = eval(expression, {"functools": functools, "adamjax": adamjax})
    assert opt.transforms[0].b1 == 0.8
    assert opt.transforms[-1].learning_rate.total_steps == 8
    assert cli.main(["report", "runs/tune-1", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"]["trials"] == 6
    more = [*base, "--trials", "5", "--stages", "learning_rate,b1", "--out", "mine", "--format", "json"]
    assert cli.main(more) == 0
    first = capsys.readouterr().out
    assert {t["stage"] for t in json.loads(first)["trials"]} == {"defaults", "learning_rate, b1", "confirm"}
    assert cli.main(more) == 2
    assert "mine already holds a tuning" in capsys.readouterr().err
    assert cli.main([*more, "--resume"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resume", "--resume needs --out, the folder to go on with"),
        ("--trials 0", "Invalid trials value: 0"),
        ("--metric f1", "Invalid metric value: 'f1'"),
        ("--metric score", "Invalid mode value: None; say whether the lowest score is the best ('min')"),
        ("--stages momentum", "'momentum' has no range"),
        ("--end 0.1", "--end means nothing to adamw without --schedule"),
        ("--optimizer adamax --amsgrad torch", "--amsgrad means nothing to adamax"),
        ("--sampler tpe", "Invalid sampler value: 'tpe'"),
    ],
)
def test_bad_commands(tmp_path, capsys, flags, message):
    assert cli.main(["tune", "bowl:BOWL", *flags.split(), *(["--out", str(tmp_path)] * ("resume" not in flags))]) == 2
    assert message in capsys.readouterr().err


def test_commands_on_what_is_not_there(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no tuning" in capsys.readouterr().err
    assert cli.main(["tune", "builtins:dict"]) == 2
    assert "problem builtins:dict made {}, expected a problem or an objective" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(self, trials):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", stop)
    assert cli.main(["tune", "bowl:BOWL", "--trials", "2", "--steps", "4", "--out", str(tmp_path)]) == 130
    assert f"--out {tmp_path} --resume goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_many_devices():
    mesh = jax.make_mesh((2,), ("settings",), devices=jax.devices()[:2])
    found = small(mesh=mesh, halving=True, confirm=(1, 2), trials=9, stages=["learning_rate"])
    assert "on each of 2 devices" in found.execution
    assert {t.status for t in found.searched} == {"complete", "pruned"}
    expected = small(halving=True, confirm=(1, 2), trials=9, stages=["learning_rate"])
    for a, b in zip(found.searched, expected.searched, strict=True):
        assert (a.setting, a.status) == (b.setting, b.status)
        np.testing.assert_allclose(a.metrics["loss"], b.metrics["loss"], rtol=SWEEP)
