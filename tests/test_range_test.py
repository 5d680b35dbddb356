"""Range tests: known answers of known curves, and suggestions that train."""

import dataclasses
import itertools
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bowl import BOWL, Bowl
from tolerances import SWEEP

import adamjax
from adamjax.schedules import Exponential
from adamjax.training import TrainStep, train
from adamjax.tuning import LrRange, _range_test, lr_range_test, sweep
from adamjax.tuning._range_test import METHODS

pytestmark = pytest.mark.numbers

DIGITS = adamjax.problems.digits(hidden=(8,), batch_size=16)
RATES = np.geomspace(1e-6, 1, 200)


def test_memory_grows_with_the_steps_not_with_their_square():
    rates = np.geomspace(1e-6, 1, 40_000)
    rng = np.random.default_rng(0)
    losses = 2 - 1.5 / (1 + (1e-3 / rates) ** 1.5) + 100 * rates**3 + rng.normal(0, 0.1, len(rates))
    tracemalloc.start()
    found = LrRange(rates, losses)
    suggestions = found.suggestions
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1e-3 < suggestions["valley"] < 1e-1
    assert peak < 50 * losses.nbytes


@pytest.mark.parametrize("points", [2, 3, 10, 200, 3000])
def test_statistics_of_curves_are_those_of_their_definitions(points):
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=points), rng.integers(0, 5, points).astype(float)):
        pairs = [np.sign(x[:i] - x[i]).sum() for i in range(points)]
        np.testing.assert_array_equal(_range_test._falling_pairs(x), pairs)
        half = min(max(points // 80, 1), points - 1)
        padded = np.pad(x, half, mode="reflect")
        medians = [np.median(padded[i : i + 2 * half + 1]) for i in range(points)]
        np.testing.assert_array_equal(_range_test._median(x, points), medians)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 10**7 + 1}, "num_steps must be at most 10,000,000, since the whole curve is kept in memory"),
        ({"num_rates": 10**9, "mode": "constant"}, "num_rates must be at most 10,000,000, since"),
        ({"num_steps": 2**31, "mode": "constant"}, "num_steps must be at most 2,147,483,647, since"),
    ],
)
def test_sizes_that_no_machine_has_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lr_range_test(BOWL, **arguments)


def curve(rates=RATES, scale=1.0):
    """Stands still, is steepest at 1e-3, lowest at 0.02 and blows up."""
    x = np.log10(rates / scale)
    return 0.1 + 2.3 / (1 + 10 ** (1.5 * (x + 3))) + 10 ** (2 * (x + 0.7))


# A tenth of the fall is done at BEGIN, the lowest loss is at LOWEST.
BEGIN, LOWEST = 2.29e-4, 0.0240
ANSWERS = {"valley": BEGIN ** (1 / 3) * LOWEST ** (2 / 3), "steep": 1e-3, "minimum/10": LOWEST / 10}


def within(factor, a, b):
    return 1 / factor <= a / b <= factor


def disturbed(how):
    losses, rng = curve(), np.random.default_rng(0)
    if how == "spikes":
        losses[[0, 40, 41, 90, 125, 140, 150]] *= [2, 50, 1e6, 0.01, 8, 100, 0.1]
    elif how == "nan":
        losses[180:] = np.nan
    elif how == "inf, then finite":
        losses[178] = np.inf
    elif how == "huge, then nan":
        losses[179], losses[180:] = 1e30, np.nan
    elif how == "noise":
        losses += 0.1 * rng.normal(size=len(losses))
    elif how == "proportional noise":
        losses *= np.exp(0.2 * rng.normal(size=len(losses)))
    elif how == "negative":
        losses -= 20
    return losses


HOWS = ["clean", "spikes", "nan", "inf, then finite", "huge, then nan", "noise", "proportional noise", "negative"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("method", ANSWERS)
def test_answers_of_known_curves(how, method):
    found = LrRange(RATES, disturbed(how))
    factor = 2 if "noise" in how else 1.4
    assert within(factor, found.suggestion(method), ANSWERS[method])
    low, high = found.band
    assert within(factor, low, BEGIN)
    assert within(factor, high, LOWEST / 2)
    assert found.warnings == ()


@pytest.mark.parametrize("points", [30, 60, 1000, 5000])
@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("method", ANSWERS)
def test_answers_move_with_the_curve(points, scale, method):
    rates = np.geomspace(1e-7, 10, points)
    factor = 2 if points == 30 else 1.4  # 30 points are a factor of 1.9 apart
    assert within(factor, LrRange(rates, curve(rates, scale)).suggestion(method), scale * ANSWERS[method])


def test_what_comes_after_a_divergence_is_not_considered():
    found = LrRange(RATES, curve())
    assert curve()[found.diverged_at] > 4 * curve().min()
    assert within(1.5, RATES[found.diverged_at], RATES[(RATES > LOWEST) & (curve() > 4 * curve().min())][0])
    assert np.isfinite(found.smoothed[: found.diverged_at]).all()
    assert np.isnan(found.smoothed[found.diverged_at :]).all()
    for how, at in (("nan", 180), ("inf, then finite", 178)):
        assert LrRange(RATES, disturbed(how)).diverged_at <= at
    flat_end = np.minimum(curve(), 0.3)
    assert LrRange(RATES, flat_end).diverged_at is None
    assert LrRange(RATES, np.where(RATES > 0.1, np.nan, flat_end)).diverged_at == np.flatnonzero(RATES > 0.1)[0]


NOISE = 2 + 0.1 * np.random.default_rng(1).normal(size=200)
NO_ANSWER = {
    "falling": (curve()[:140], "the minimum lies on the edge of the range: raise max_lr"),
    "rising": (curve()[145:175], "the loss does not fall, unless it begins at its minimum: lower min_lr"),
    "flat": (np.ones(200), "the loss does not move from 1: check that it depends on the parameters"),
    "flat, with rounding": (np.full(200, 2.3), "the loss does not move from 2.3"),
    "two neighbouring numbers": (
        np.where(np.random.default_rng(1).random(200) < 0.1, np.float32(2.3), np.nextafter(np.float32(2.3), np.inf)),
        "the loss does not move from 2.3",
    ),
    "two neighbouring bfloat16s": (
        2.296875 + 0.015625 * (np.random.default_rng(2).random(200) < 0.5),
        "the loss falls by no more than its noise",
    ),
    "noise alone": (NOISE, "the loss falls by no more than its noise: take more steps or larger batches, or a range"),
    "few": (curve()[::25], "the curve has only 8 points: take more steps"),
    "nan from the start": (
        np.full(200, np.nan),
        "the loss blows up after 0 points, at a learning rate of 1e-06: lower",
    ),
    "nan soon": (np.where(np.arange(200) < 2, 1.0, np.nan), "the loss blows up after 2 points"),
}


@pytest.mark.parametrize("name", NO_ANSWER)
def test_curves_without_an_answer_say_why(name):
    losses, message = NO_ANSWER[name]
    found = LrRange(np.geomspace(1e-6, 1, len(losses)), losses)
    for method in METHODS["ramp"]:
        with pytest.raises(ValueError, match=f"no learning rate can be suggested: {message}"):
            found.suggestion(method)
    with pytest.raises(ValueError, match=message):
        found.band  # noqa: B018
    (warning,) = found.warnings
    assert warning.startswith(f"the range test determines no learning rate: {message}")
    assert warning in repr(found)
    assert not found.suggestions
    assert found.plot() is not None


def noises(rng, n):
    """Losses that do not move, or only rise."""
    yield 2.3 + 0.1 * rng.normal(size=n)
    yield 2.3 + 0.1 * rng.standard_t(2, size=n)
    yield rng.exponential(size=n)
    yield 2.3 - 0.5 * (rng.random(n) < 0.05) + 0.01 * rng.normal(size=n)
    yield 2.3 + np.linspace(0, 1, n) + 0.1 * rng.normal(size=n)
    yield 2.3 * (1 + 10 ** np.linspace(-4, 2, n)) + 0.1 * rng.normal(size=n)
    yield 2.3 + np.float32(2.4e-7) * (rng.random(n) < 0.1)


@pytest.mark.parametrize(("points", "share"), [(200, 0.02), (32, 0.05), (12, 0.1)])
def test_noise_suggests_hardly_anything(points, share):
    """Few points are less certain: without a test for a trend, 30 % of these would suggest something."""
    rng = np.random.default_rng(0)
    rates = np.geomspace(1e-6, 1, points)
    found = [bool(LrRange(rates, x, "constant").suggestions) for _ in range(30) for x in noises(rng, points)]
    assert np.mean(found) <= share


@pytest.mark.parametrize("bad", [(60,), (0,), (100, 101, 102), tuple(range(3, 150, 7))])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_single_losses_that_are_not_finite_are_left_out(bad, value):
    losses = curve()
    losses[list(bad)] = value
    found = LrRange(RATES, losses)
    for method, answer in ANSWERS.items():
        assert within(1.4, found.suggestion(method), answer)
    assert found.diverged_at == LrRange(RATES, curve()).diverged_at
    (warning,) = found.warnings
    assert warning.startswith(f"{len(bad)} of 200 losses are not finite amid finite ones, the first at a learning rate")
    assert warning in repr(found)
    assert found.plot() is not None


def test_a_range_that_begins_too_late():
    found = LrRange(RATES[100:], curve()[100:])
    expected = "the range test begins too late: the loss falls from the smallest learning rate on: lower min_lr"
    assert found.warnings == (expected,)
    assert 1e-3 < found.suggestion() < 2e-2


def test_the_widest_range_cannot_be_widened():
    falling = LrRange(np.geomspace(1e-3, 1e3, 140), curve()[:140])
    assert falling.warnings[0].endswith("the loss still falls at a learning rate of 1e+03: take more steps")
    rising = LrRange(np.geomspace(1e-9, 1, 100), np.geomspace(1, 1e9, 100))
    assert "scale the inputs down" in rising.warnings[0]
    assert "lower min_lr" not in rising.warnings[0]


def test_repr_says_what_was_found():
    text = repr(LrRange(RATES, curve()))
    assert text.startswith("LrRange(ramp: 200 points from 1e-06 to 1, diverged at 0.")
    assert all(f"{method} 0.00" in text for method in METHODS["ramp"])
    assert "band 0.0002" in text


def test_the_ramp_hits_both_ends():
    schedule = Exponential(1e-6, 0.3, 49)
    rates = np.asarray(jax.jit(lambda s, t: s(t))(schedule, np.arange(60, dtype=np.int32)))
    assert rates[0] == np.float32(1e-6)
    assert (rates[49:] == np.float32(0.3)).all()
    found = lr_range_test(DIGITS, max_lr=0.3, num_steps=50)
    assert (found.learning_rates[0], found.learning_rates[-1], len(found.losses)) == (1e-6, 0.3, 50)
    np.testing.assert_allclose(found.learning_rates, rates[:50], rtol=1e-5)


def test_a_ramp_is_a_training_run():
    found = lr_range_test(DIGITS, min_lr=1e-4, max_lr=0.1, num_steps=30, seed=3)
    opt = adamjax.adamw(Exponential(1e-4, 0.1, 29))
    losses = np.concatenate([report.losses for report in train(DIGITS, opt, steps=30, seed=3)])
    np.testing.assert_allclose(found.losses, losses, rtol=SWEEP)


def test_a_ramp_is_cut_where_it_is_not_finite():
    found = lr_range_test(DIGITS, max_lr=1e30, num_steps=100)
    assert len(found.losses) == len(found.learning_rates) < 100
    assert np.isfinite(found.losses[:-1]).all()
    assert not np.isfinite(found.losses[-1])
    assert found.diverged_at < len(found.losses)


@pytest.mark.slow
def test_constant_rates_are_training_runs_and_divergence_is_marked():
    found = lr_range_test(DIGITS, mode="constant", min_lr=1e-4, max_lr=1e30, num_steps=20, num_rates=18, seed=2)
    np.testing.assert_allclose(found.learning_rates, np.logspace(-4, 30, 18))
    *_, report = train(DIGITS, adamjax.adamw(1e-2), steps=20, seed=2, report_every=5)
    np.testing.assert_allclose(found.losses[1], report.losses.mean(), rtol=SWEEP)
    assert np.isfinite(found.losses[:3]).all()
    assert np.isnan(found.losses[-1])
    assert found.diverged_at <= np.flatnonzero(np.isnan(found.losses))[0]


def measured(scale, blocks):
    """A measurement of the known curve, moved by `scale`, which keeps the learning rates of each part in `blocks`."""

    def measure(rates, ends):
        for first, last in itertools.pairwise([0, *ends]):
            blocks.append(rates[first:last])
            yield curve(rates[first:last], scale)

    return measure


@pytest.mark.parametrize("mode", METHODS)
@pytest.mark.parametrize(("scale", "ends"), [(1.0, (1e-6, 1)), (1e3, (1e-6, 100)), (1e-5, (1e-9, 1))])
def test_a_range_is_widened_as_far_as_it_has_to_be(mode, scale, ends):
    spacing, blocks = _range_test._Spacing.of(None, None, 31), []
    found = _range_test._widened(measured(scale, blocks), spacing, mode)
    assert found.suggestions
    assert within(2, found.suggestion(), scale * ANSWERS["valley"])
    np.testing.assert_allclose(found.learning_rates[[0, -1]], ends)
    np.testing.assert_allclose(np.diff(np.log10(found.learning_rates)), 0.2)
    np.testing.assert_array_equal(found.losses, curve(found.learning_rates, scale))
    # Only a ramp that begins anew repeats learning rates.
    repeats = 31 if mode == "ramp" and ends[0] < 1e-6 else 0
    assert sum(map(len, blocks)) == len(found.losses) + repeats


def test_numbers_that_are_given_are_obeyed():
    for given, ends in (((1e-3, None), (1e-3, 100)), ((None, 1.0), (1e-6, 1)), ((1e-4, 1.0), (1e-4, 1))):
        spacing = _range_test._Spacing.of(*given, 31)
        found = _range_test._widened(measured(1e3, []), spacing, "constant")
        np.testing.assert_allclose(found.learning_rates[[0, -1]], ends)


@dataclasses.dataclass(frozen=True)
class Scaled(Bowl):
    """A bowl whose best learning rate is in proportion to its width."""

    width: float = 1.0

    def init(self, key):
        return jax.tree.map(lambda x: self.width * x, super().init(key))

    def loss(self, params, batch, key):
        return jnp.mean((params["x"] / self.width - 3 - 0.01 * batch) ** 2)


WIDE = Scaled(width=30.0)


@pytest.mark.parametrize(("width", "low", "high"), [(30.0, 1e-6, 1e3), (1e-6, 1e-9, 1.0)])
def test_a_wider_ramp_is_compiled_once(width, low, high, monkeypatch):
    steps = []

    class Kept(TrainStep):
        def __init__(self, *args):
            super().__init__(*args)
            steps.append(self)

    monkeypatch.setattr(_range_test, "TrainStep", Kept)
    found = lr_range_test(Scaled(width=width))
    assert found.suggestions, found
    assert low <= found.learning_rates[0] < 2 * low
    assert (1 < found.learning_rates[-1] <= high) == (high > 1)
    (step,) = steps
    assert step._jitted._cache_size() == 1


def test_a_wider_ramp_goes_on_with_the_run():
    found = lr_range_test(WIDE, num_steps=60)
    rates, steps = found.learning_rates, len(found.losses)
    assert steps > 60
    whole = lr_range_test(WIDE, max_lr=float(rates[-1]), num_steps=steps)
    np.testing.assert_allclose(whole.learning_rates, rates)
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Spoilt(Bowl):
    """A bowl with some batches that are NaN, and a state that a NaN would stay in."""

    stateful = True

    def init(self, key):
        return super().init(key), jnp.zeros(())

    def loss(self, params, state, batch, key):
        return super().loss(params, batch, key) + 0 * state, 0.9 * state + 0.1 * jnp.mean(batch)

    def batch(self, step, key):
        return jnp.where(jnp.isin(step, jnp.array([60, 61, 90])), jnp.nan, super().batch(step, key))

    def evaluate(self, params, state):
        return super().evaluate(params)


def test_a_bad_batch_does_not_end_a_ramp():
    found, good = lr_range_test(Spoilt()), lr_range_test(BOWL)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found.losses)), [60, 61, 90])
    np.testing.assert_array_equal(found.learning_rates, good.learning_rates)
    assert within(1.1, found.suggestion(), good.suggestion())
    assert found.warnings[-1].startswith(f"3 of {len(found.losses)} losses are not finite")


@dataclasses.dataclass(frozen=True)
class Still(Bowl):
    """A loss that does not depend on the parameters."""

    noise: float = 0.0

    def loss(self, params, batch, key):
        return 2.3 + self.noise * jax.random.normal(key) + 0 * jnp.sum(params["x"])


def test_losses_that_do_not_move():
    (warning,) = lr_range_test(Still()).warnings
    assert "the loss does not move from 2.3" in warning
    assert "max_lr" not in warning  # it was raised as far as it goes
    assert not lr_range_test(Still(noise=0.1)).suggestions
    (warning,) = lr_range_test(lambda optimizer, trial: math.nan).warnings
    assert "look for what makes it NaN or infinite whatever the learning rate is" in warning


def test_constant_rates_are_raised():
    found = lr_range_test(WIDE, mode="constant", num_steps=60, num_rates=13)
    whole = lr_range_test(WIDE, mode="constant", max_lr=1e3, num_steps=60, num_rates=19)
    np.testing.assert_allclose(found.learning_rates, whole.learning_rates)
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-4)
    assert "still falls at a learning rate of 1e+03" in found.warnings[0]  # Adam does not blow up on a bowl


def test_learning_rates_of_an_objective_are_raised_and_may_fail():
    rates = []

    def objective(optimizer, trial):
        rates.append(trial.arguments["learning_rate"])
        if rates[-1] > 500:
            raise FloatingPointError
        return float(curve(np.asarray(rates[-1]), 1e3))

    found = lr_range_test(objective)
    np.testing.assert_allclose(rates, found.learning_rates)  # none is tried twice
    assert within(4, found.suggestion(), 1e3 * ANSWERS["valley"])
    falling = lr_range_test(lambda optimizer, trial: -np.log(trial.arguments["learning_rate"]))
    assert falling.learning_rates[-1] > 500
    assert "take more steps" in falling.warnings[0]


def test_optimizers_of_ones_own():
    def clipped(learning_rate):
        return adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(learning_rate))

    found = lr_range_test(DIGITS, optimizer=clipped, num_steps=20)
    assert np.isfinite(found.losses).all()
    assert (found.losses != lr_range_test(DIGITS, num_steps=20).losses).any()


@pytest.mark.parametrize("mode", METHODS)
def test_plot(tmp_path, mode):
    figure = LrRange(RATES, disturbed("noise"), mode).plot(tmp_path / "range.png")
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["loss", "smoothed", "band", *METHODS[mode]]
    assert axis.get_xscale() == "log"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "seed"), [*zip(METHODS, (0, 1), strict=True)])
def test_every_suggestion_trains(mode, seed):
    problem = adamjax.problems.digits()
    found = lr_range_test(problem, mode=mode, seed=seed)
    settings = [{"learning_rate": found.suggestion(method)} for method in METHODS[mode]]
    trained = sweep(
        problem, settings, steps=300, seeds=[seed], points=1, execution="map", metric="accuracy", mode="max"
    )
    assert (trained.last >= 0.96).all(), (settings, trained.last)


CLEAN = LrRange(RATES, curve())
BAD = [
    (lambda: lr_range_test(DIGITS, min_lr=0.0), ValueError, "Invalid min_lr value: 0.0; min_lr must be above 0"),
    (lambda: lr_range_test(DIGITS, min_lr=-1.0), ValueError, "Invalid min_lr value: -1.0; min_lr must be at least 0"),
    (lambda: lr_range_test(DIGITS, min_lr="a"), TypeError, "Invalid min_lr value: 'a'; min_lr must be a real number"),  # type: ignore[arg-type]
    (lambda: lr_range_test(DIGITS, max_lr=np.inf), ValueError, "Invalid max_lr value: inf; max_lr must be .* finite"),
    (
        lambda: lr_range_test(DIGITS, min_lr=1.0, max_lr=1.0),
        ValueError,
        r"Invalid min_lr value: 1.0; min_lr must be below max_lr, which is 1.0",
    ),
    (
        lambda: lr_range_test(DIGITS, num_steps=9),
        ValueError,
        "Invalid num_steps value: 9; num_steps must be at least 1",
    ),
    (lambda: lr_range_test(DIGITS, num_steps=1e3), TypeError, "Invalid num_steps value: 1000.0; .* must be an int"),  # type: ignore[arg-type]
    (lambda: lr_range_test(DIGITS, num_rates=3, mode="constant"), ValueError, "Invalid num_rates value: 3"),
    (
        lambda: lr_range_test(DIGITS, mode="cyclic"),
        ValueError,
        "Invalid mode value: 'cyclic'; mode must be one of 'ramp', 'constant'",
    ),
    (lambda: lr_range_test(object()), TypeError, "object is not a problem: it has no method init"),  # type: ignore[arg-type]
    (
        lambda: CLEAN.suggestion("best"),
        ValueError,
        "Invalid method value: 'best'; method must be one of 'valley', 'steep', 'minimum/10'",
    ),
    (
        lambda: LrRange(RATES, curve(), "constant").suggestion("steep"),
        ValueError,
        "Invalid method value: 'steep'; method must be one of 'valley', 'minimum/10'",
    ),
    (lambda: LrRange(RATES, curve(), "cyclic"), ValueError, "Invalid mode value: 'cyclic'"),
    (lambda: LrRange(RATES[::-1], curve()), ValueError, "Invalid learning_rates value: .* positive, rising"),
    (lambda: LrRange(RATES, curve()[1:]), ValueError, r"Invalid losses value: shape \(199,\); losses must be one"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_scale_of_the_loss():
    def plain(learning_rate):
        return adamjax.adam(learning_rate, eps=1e-3)  # which sees gradients that are not scaled back

    ramps = [
        lr_range_test(BOWL, num_steps=20, optimizer=f)
        for f in (plain, lambda learning_rate: adamjax.dynamic_loss_scale(plain(learning_rate)))
    ]
    np.testing.assert_allclose(ramps[1].losses, ramps[0].losses, rtol=SWEEP)
