"""Benchmarks: what they make of what they measure."""

import dataclasses
import inspect
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamjax.optimizers import schedule_free_adamw
from adamjax.tuning._population import structure_of
from benchmarks import __main__ as runner
from benchmarks import _measure, _report, _steps, bench_memory, bench_race, bench_step, bench_trace, learn_list
from benchmarks._measure import Ratio
from benchmarks._report import Bars, Curves, Table


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock(seconds)` moves."""
    now = [0.0]
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_seconds_are_those_of_the_rounds_after_the_first(clock):
    times = iter([9.0, 1.0, 2.0])
    seconds = _measure.interleaved({"varies": lambda: clock(next(times)), "same": lambda: clock(0.5)}, 2)
    np.testing.assert_array_equal(seconds["varies"], [1, 2])
    np.testing.assert_array_equal(seconds["same"], [0.5, 0.5])
    assert _measure.interleaved({"": lambda: clock(3)}, 0)[""] == [3]


def test_all_have_a_turn_in_each_round_in_changing_order(clock):
    order = []

    def run(name):
        order.append(name)
        clock(1)

    _measure.interleaved({name: lambda name=name: run(name) for name in "abc"}, 7)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 8
    assert all(set(each) == set("abc") for each in rounds)
    assert len(set(rounds)) > 1


def test_before_each_turn_threads_have_time_to_stop_spinning(clock, monkeypatch):
    order = []
    monkeypatch.setattr(_measure.time, "sleep", order.append)
    _measure.interleaved({"": lambda: (order.append("run"), clock(1))}, 1)
    assert order == [_measure.PAUSE, "run"] * 2


def test_the_triad_goes_over_all_of_the_memory_of_numpy_and_of_jax():
    runs = _measure.triads(5)
    if not runs:
        pytest.skip("no C compiler with OpenMP")
    assert set(runs) == {"triad", "triad in JAX's memory"}
    for run in runs.values():
        run()
        g, *others = map(np.asarray, inspect.getclosurevars(run).nonlocals["arrays"])
        assert [np.rint(x / g).tolist() for x in others] == [[times] * 5 for times in (5, 2, 2)]
    # And the processor still has subnormals.
    assert np.float64(5e-324) * np.float64(1) > 0


def test_what_is_short_is_repeated_after_a_first_time_that_does_not_count(clock):
    calls = []

    def run():  # the first of each turn takes twice as long
        clock(0.004 if len(calls) % 6 == 0 else 0.002)
        calls.append(1)

    seconds = _measure.interleaved({"": run}, 3, at_least=0.02)
    assert len(calls) == 4 * (1 + 5)
    np.testing.assert_allclose(seconds[""], 0.002)


def test_a_ratio_is_taken_round_by_round():
    # A machine that is ten times slower in one round says nothing about either.
    of, to = np.array([1.0, 20.0, 3.0]), np.array([1.0, 10.0, 1.0])
    assert _measure.ratio(of, to) == Ratio(2.0, 1.5, 2.5)


@pytest.mark.parametrize(
    ("name", "bytes_moved"),
    [
        ("adamjax", 28),
        ("adamjax, bfloat16 moments", 20),
        ("adamjax, float16 moments", 20),
        ("adamjax, int8 moments", 12 + 2 * (2 + 2 / 32 + 2 / 64)),  # scales of 16 bits
        ("adamjax, int4 moments", 12 + 4 * (1 / 2 + 2 / 64)),
    ],
)
def test_the_limit_of_a_format_is_what_it_must_move_over_the_triad(name, bytes_moved):
    grads = [jnp.ones((64, 128))] * 2
    step = _steps.of_jax(_steps.EVERY[name], grads)
    # The count, which is of no parameter, is read and written, too.
    assert step.limit == pytest.approx((bytes_moved + 2 * 4 / (2 * 64 * 128)) / 28)


def test_there_is_no_step_of_what_cannot_be_fused():
    assert _steps.of_jax(_steps.FUSED["adamjax fused"], [jnp.ones((128, 128), jnp.complex64)]) is None


def test_other_errors_are_not_taken_for_a_refusal():
    def update(grads, state, params):
        raise ValueError("the gradients do not fit")

    with pytest.raises(ValueError, match="do not fit"):
        _steps.is_refused(optax.GradientTransformation(lambda params: (), update), jnp.ones(3))


def test_the_table_of_steps():
    seconds = {
        "triad": np.array([1.0, 2.0]),
        "triad in JAX's memory": np.array([1.25, 2.5]),
        "ours": np.array([1.5, 2.0]),
        "optax": np.array([2.0, 4.0]),
    }
    steps = {name: _steps.Step(lambda: None, 0.75) for name in ("ours", "optax")}
    found = bench_step.table("name", "Title", {**steps, "refused": None}, seconds)
    assert found.columns == ["", "step / triad", "limit", "/ triad in JAX's memory", "/ optax"]
    assert found.rows == [
        ["ours", Ratio(1.25, 1.125, 1.375), 0.75, 1, 0.625],
        ["optax", Ratio(2, 2, 2), 0.75, 1.6, 1],
        ["refused", None, None, None, None],
    ]


def test_without_a_triad_steps_are_compared_with_optax():
    seconds = {"ours": np.array([3.0]), "optax": np.array([2.0])}
    steps = {name: _steps.Step(lambda: None, 0.75) for name in seconds}
    found = bench_step.table("name", "Title", steps, seconds)
    assert found.columns == ["", "step / optax"]
    assert found.column("step / optax")[0] == Ratio(1.5, 1.5, 1.5)


def test_the_table_of_stages():
    def of(unit):
        rows = {"adamjax": 0.5, "adamjax fused": 0.25, "optax": 1.0}
        return {f"{row}: {stage}": np.array([x * unit]) for row, x in rows.items() for stage in bench_trace.STAGES}

    found = bench_trace.table({"10": of(1.0), "100": of(8.0), "5, all unlike": of(3.0)})
    assert found.columns[1:] == ["10", "100", "5, all unlike"]
    assert found.rows[0] == ["adamjax: trace", 0.5, 0.5, 0.5]
    assert found.rows[-1][1:] == [None] * 3  # not measured
    # Drawn are times, in units of one; not the case that is not of the series.
    assert found.picture.lines["optax: compile"] == {10: 1, 100: 8}
    assert found.picture.lines["adamjax fused: compile"] == {10: 0.25, 100: 2}


def test_the_leaves_of_a_transformer():
    # 12 matrices of width by width a layer, 13 vectors; the embedding and the last norm.
    layers, width, tokens = 3, 64, 1000
    shapes = bench_step.transformer(layers, width, tokens)
    assert len(shapes) == 12 * layers + 3
    assert bench_step.elements(shapes) == layers * (12 * width**2 + 13 * width) + tokens * width + 2 * width


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not say")
def test_the_peak_of_a_run_is_what_it_frees():
    size = 2**26

    def run():
        np.ones(size, np.uint8)

    assert bench_memory.peak(run) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([4, 3, 2, 1], 60),
        ([4, 3, 1, 1], 50),
        ([4, 0, 3, 1], 30),  # more steps are worse
        ([2, 1, 1, 1], 20),
        ([9, 8, 7, 6], math.inf),
        ([math.nan, math.nan, 1, 1], 60),
        ([4, 3, math.nan, math.inf], math.inf),
    ],
)
def test_the_steps_to_a_target_are_interpolated_before_the_first_horizon_that_reaches_it(losses, steps):
    assert bench_race.steps_to(2.0, [20, 40, 60, 80], np.array(losses, float)) == pytest.approx(steps)


def test_a_bootstrap_interval():
    # The mean of four 0s and four 1s is binomial: P(at most 1 of 8) = 0.035 and P(0 of 8) = 0.004.
    values = np.array([0.0, 1.0] * 4)
    assert bench_race.resampled(lambda chosen: values[chosen].mean(), 8) == (1 / 8, 7 / 8)
    assert bench_race.resampled(lambda chosen: math.inf, 8) == (math.inf, math.inf)


def test_the_table_of_a_race():
    horizons = np.array(bench_race.horizons_of(100))
    assert horizons.tolist() == list(range(30, 151, 10))
    # Seeds differ by far more than rows do, but in all rows alike.
    noise = np.array([0.5, 1.0, 2.0, 4.0])
    reference = (200.0 - horizons)[:, None] * noise
    slow, fast, diverged = reference + 100 * noise, 0 * reference, np.full_like(reference, math.nan)
    results = [
        bench_race.Result(name, {}, losses)
        for name, losses in {
            "reference": reference,
            "faster": reference - 15 * noise,
            "slow": slow,
            "fast": fast,
            "diverged": diverged,
        }.items()
    ]
    race, losses = bench_race.tables_of("text", results, 100)
    assert race.title.startswith("Steps to 187.5000, the validation loss of the first row at 100 steps, on text")
    assert race.rows == [
        ["reference", "100 (100 to 100)", "1.000 (1.000 to 1.000)"],
        ["faster", "85 (85 to 85)", "0.850 (0.850 to 0.850)"],
        ["slow", "over 150 (over 150 to over 150)", "2.000 (2.000 to 2.000)"],
        ["fast", "at most 30 (at most 30 to at most 30)", "0.000 (0.000 to 0.000)"],
        ["diverged", "over 150 (over 150 to over 150)", "nan (nan to nan)"],
    ]
    assert losses.columns == ["", *map(str, horizons)]
    assert losses.rows[0] == ["reference", *(f"{x:.4f}" for x in (200 - horizons) * noise.mean())]
    assert losses.picture.lines["faster"][100] == 85 * noise.mean()


def test_the_record_of_a_race_is_valid_json():
    result = bench_race.Result("slow", {"learning_rate": 0.1}, np.array([[0.25, math.nan]]))
    text = json.dumps(bench_race.to_json(result), allow_nan=False)
    assert json.loads(text) == {"name": "slow", "setting": {"learning_rate": 0.1}, "losses": [[0.25, None]]}


def test_a_schedule_stretches_to_the_horizon():
    def rates(steps):
        made = bench_race.scheduled(dict, 0.5, warmup_fraction=0.2, end_fraction=0.1, steps=steps)
        return made["learning_rate"](np.arange(11) * steps // 10)

    np.testing.assert_allclose(rates(300)[np.array([0, 1, 2, 6, 10])], [0, 0.25, 0.5, 0.275, 0.05], rtol=1e-6)
    np.testing.assert_allclose(rates(90), rates(300), rtol=1e-6)


@pytest.mark.parametrize("contestant", bench_race.CONTESTANTS[1:], ids=lambda c: c.name)
def test_all_settings_of_a_contestant_share_a_program(contestant):
    space, make = contestant.space, bench_race.Stretched(contestant)
    low, high = (space.at(dict.fromkeys(space.free, u)) for u in (0.0, 1.0))
    opts = [make(**setting, steps=n) for setting, n in ((low, 90), (high, 450), (contestant.defaults, 300))]
    # Without any weight decay, an optimizer does not have that part.
    count = 3 if contestant.defaults.get("weight_decay") != 0 or "schedule_free" in contestant.name else 2
    assert len({structure_of(opt) for opt in opts[:count]}) == 1
    assert len(jax.tree.leaves(opts[0])) >= len(space.free)


def test_contestants_begin_at_their_defaults():
    found = {c.optimizer: c.defaults for c in bench_race.CONTESTANTS}
    # So did the search of the rows that came first.
    usual = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4}
    usual |= {"warmup_fraction": 0.05, "end_fraction": 0.0}
    assert [found[c.optimizer] for c in bench_race.CONTESTANTS[:10]] == [usual] * 10
    assert found["adamjax.stable_adamw"] == usual | {"b2": 0.99, "weight_decay": 0.01}
    own = found["adamjax.ademamix"]
    assert (own["b3"], own["alpha"]) == (0.9999, 5.0)
    assert "end_fraction" not in found["adamjax.schedule_free_adamw"]


def test_a_schedule_free_rate_is_constant_after_its_warmup():
    contestant = next(c for c in bench_race.CONTESTANTS if c.optimizer == "adamjax.schedule_free_adamw")
    opt = bench_race.Stretched(contestant)(**contestant.defaults | {"warmup_fraction": 0.2}, steps=50)
    assert opt == schedule_free_adamw(warmup_steps=10)


def test_rows_of_a_race_are_added_to_a_file(tmp_path, monkeypatch):
    ran = []

    def run(problem, contestant, *, trials, steps, seeds):
        ran.append(contestant.optimizer)
        losses = np.full((len(bench_race.TENTHS), seeds), float(len(ran)))
        losses[0, 0] = math.nan
        return bench_race.Result(contestant.name, {"learning_rate": 0.1}, losses)

    monkeypatch.setattr(bench_race, "run", run)
    raw = tmp_path / "race.json"

    def rows(*names, trials=32):
        ran.clear()
        race, _ = bench_race.tables(True, trials, raw, names)
        return [row[0].split(":")[0] for row in race.rows]

    assert rows("adamjax.stable_adamw") == ["optax.adamw", "adamjax.stable_adamw"] == ran
    # In the order of the contestants, and the first is not measured again.
    assert rows("adamjax.ademamix") == ["optax.adamw", "adamjax.ademamix", "adamjax.stable_adamw"]
    assert ran == ["adamjax.ademamix"]
    rows("adamjax.stable_adamw")
    assert ran == ["adamjax.stable_adamw"]
    rows()
    assert ran == ["adamjax.adamw"]  # what is left of the two that are quick
    written = bench_race.read(raw, {"trials": 4})["digits"]
    assert [r.name for r in written][:2] == ["optax.adamw: TPE", "adamjax.adamw: tune"]
    assert np.isnan(written[0].losses[0, 0])
    assert np.isfinite(written[0].losses[1:]).all()
    with pytest.raises(ValueError, match=r"race\.json has results of {'trials': 4}.* name another file"):
        bench_race.read(raw, {"trials": 32})


def test_the_reference_and_our_adamw_make_the_same_updates(lenient):
    assert [c.optimizer for c in bench_race.CONTESTANTS[::2][:2]] == ["optax.adamw", "adamjax.adamw"]
    params, found = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}, []
    for contestant in bench_race.CONTESTANTS[::2][:2]:
        setting = contestant.defaults | {"learning_rate": 0.1, "b1": 0.7, "b2": 0.8, "weight_decay": 0.5}
        opt = bench_race.Stretched(contestant)(**setting, steps=5)
        new, state = params, opt.init(params)
        for _ in range(5):
            updates, state = opt.update(jax.tree.map(jnp.sin, new), state, new)
            new = optax.apply_updates(new, updates)
        found.append(new["w"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert np.abs(found[0] - params["w"]).min() > 0.01


def test_markdown():
    table = Table("name", "Title", ["", "ratio", "figure"], [["a", Ratio(1.234, 0.5, 12.34), 1e-7], ["b", None, 3]])
    assert table.markdown().splitlines() == [
        "Title:",
        "",
        "|   | ratio               | figure |",
        "| - | ------------------- | ------ |",
        "| a | 1.23 (0.50 to 12.3) | 1e-07  |",
        "| b | -                   | 3      |",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (0.004, "0.004"), (0.999, "1.00"), (9.87, "9.87"), (98.7, "98.7"), (1234.5, "1234")],
)
def test_numbers(number, text):
    assert _report.shown(number) == text


def test_the_report(tmp_path):
    seconds = {"a": np.array([1.0, 2.0])}
    bars = Table("bars", "Bars", ["", "x", "limit"], [["a", Ratio(1, 1, 2), 0.5], ["b", None, None]], seconds)
    drawn = dataclasses.replace(bars, picture=Bars("x", "limit"))
    curves = Table("curves", "Curves", [""], [["a"]], picture=Curves("x", "y", {"a": {1: 2.0, 10: 3.0}}))
    runner.write(tmp_path, {"cores": "2"}, {"step": ("What it does.", [drawn, curves])}, quick=True)
    report = (tmp_path / "report.md").read_text()
    for part in (
        "| cores | 2 |",
        "say nothing",
        "## step",
        "What it does.",
        drawn.markdown(),
        "(bars.png)",
        "(curves.png)",
    ):
        assert part in report
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("bars.png", "curves.png"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["benchmarks"]["step"][0]["seconds"] == {"a": [1, 2]}
    assert results["benchmarks"]["step"][0]["rows"] == [["a", [1, 1, 2], 0.5], ["b", None, None]]


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def measured(name, quick):
        if name == "step":
            raise RuntimeError("out of memory")
        return f"About {name}.", [Table(name, "Title", [""], [["a"]])]

    monkeypatch.setattr(runner, "measured", measured)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "step", "scale", "--out", str(tmp_path)])
    assert runner.main() == 1
    said = capsys.readouterr()
    assert "failed: step" in said.out
    assert "out of memory" in said.err
    assert json.loads((tmp_path / "results.json").read_text())["benchmarks"].keys() == {"scale"}


def test_an_unknown_name_is_refused_with_those_that_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "stpe"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "no benchmark stpe: choose among step, trace" in capsys.readouterr().err


def test_every_benchmark_has_a_name():
    modules = Path(runner.__file__).parent.glob("bench_*.py")
    assert {module.stem.removeprefix("bench_") for module in modules} == {*runner.SHORT, *runner.LONG, *runner.NAMED}


def test_the_list_is_chosen_greedily():
    # Settings 1 and 3 are the best for two problems each; 0 is good for all; 2 is never good.
    table = np.log([[2.0, 1.0, 9.0, 9.0], [2.0, 1.0, 9.0, 8.0], [2.0, 9.0, 9.0, 1.0], [2.0, 9.0, np.inf, 1.0]])
    assert learn_list.greedy(table, 3) == [0, 1, 3]
