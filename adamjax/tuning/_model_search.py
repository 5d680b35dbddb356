"""The model-based search: a Gaussian process of the scores so far proposes the settings to try next.

The process is over all numeric arguments at once, with a Matérn kernel (5/2). Its length scales were chosen on the
problems of `benchmarks/learn_list.py`; only its noise, its height and its mean are fitted. Settings are chosen by
expected improvement (Jones et al., 1998), each of a round as if those before it had the scores that the process
expects.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from adamjax._core.optional import require
from adamjax.tuning._learned import TABLE, learned_settings
from adamjax.tuning._space import Choice, Log, OneMinus, Range, Setting, Space
from adamjax.tuning._strategy import MIN_STAGE_TRIALS, Result, Round, Stage, Strategy, rounded, with_other_choices

# Length scales of Adam's hyperparameters, in decades; of any other argument, in parts of its range.
DECADES = {"learning_rate": 1.6, "b1": 1.0, "b2": 2.5, "weight_decay": 5.6, "warmup_fraction": 3.0}
PART = 1.0
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0)  # variances relative to the process's, the likeliest of which is taken
CANDIDATES, NEIGHBOURS, LEADERS = 1024, 128, 4
NEAR = 0.25  # of a length scale: how far neighbours of a leader lie from it
MANY = 32  # trials
UNKNOWN = -1  # a seed without an effect
SEED_EFFECT = 0.3  # its variance, relative to the process's
FLAT = 0.05  # a difference of scores, of their logarithms if all are positive, that is taken for none


def model_search(
    space: Space,
    defaults: Setting,
    *,
    trials: int,
    at_once: int,
    seed: int,
    valid: Callable[[Setting], bool],
    table: Sequence[tuple[float, ...]] = TABLE,
    from_adam: Callable[[Setting], Setting] = dict,
    second_seed_from: int = MANY,
) -> Strategy:
    """Try the defaults, the first of the learned list, and then what the model proposes, `at_once` in each round.

    From `second_seed_from` trials on, every second round of the model runs with a second seed. With one seed for all,
    the model would take its luck for the merit of a region, and all that is confirmed could lie there.

    At the end, other options of choices are tried on the best settings: they can change the program to compile, so
    they do not mix. Proposals near the best settings may leave the space while they are `valid`. `from_adam` makes
    settings for the optimizer of those of the list.
    """
    rng = np.random.default_rng(seed)
    choices = [name for name in space.free if isinstance(space.ranges[name], Choice)]
    has_numbers = len(choices) < len(space.free)
    for_choices = _share_of_choices(trials, len(choices), has_numbers=has_numbers)
    done = list[Result]()
    settings = [defaults]
    rest = trials - for_choices
    if has_numbers:
        numbers = Space.of({n: Choice(defaults[n]) if n in choices else r for n, r in space.ranges.items()})
        fill = numbers.points(len(table) + rest, method="halton", seed=seed)
        first = (learned_settings(numbers, fill, table, from_adam) + fill[len(table) :])[: min(at_once, rest)]
        done = yield Round("list", settings + [_with_few_digits(numbers, x, inside=True) for x in first], numbers)
        settings, rest, seed_of_round = [], rest - len(first), 0
        while rest:
            seed_of_round = 1 - seed_of_round if trials + 1 >= second_seed_from else 0
            proposed = _proposals(numbers, done, min(at_once, rest), rng, valid)
            done = yield Round("model", proposed, _hull(numbers, proposed), seed_of_round)
            rest -= len(proposed)
    stage = Stage(", ".join(choices), tuple(choices), for_choices)
    if for_choices:
        ranked = sorted((r for r in done if not math.isnan(r.score)), key=lambda r: r.score)
        best = ranked[0].setting if ranked else defaults
        settings += with_other_choices(space, stage, ranked, [r.setting for r in done] or settings, best)
    if settings:
        yield Round(stage.name or "defaults", settings, space)


def round_size(trials: int) -> int:
    """Return the number of trials to propose at once: an eighth of all, at least four."""
    return max(MIN_STAGE_TRIALS, trials // 8)


def _share_of_choices(trials: int, choices: int, *, has_numbers: bool) -> int:
    """Return the number of trials of other choices: few, as most choices matter little."""
    return choices * min(4, trials // 16) if has_numbers else trials * (choices > 0)


def _proposals(
    space: Space, done: Sequence[Result], count: int, rng: np.random.Generator, valid: Callable[[Setting], bool]
) -> list[Setting]:
    """Return the settings to try next, from all results so far; those that are not known count as expected."""
    scales = np.array([_length_scale(name, space.ranges[name]) for name in space.free])
    places = np.array([_place(space, r.setting) for r in done])
    scores = np.array([r.score for r in done])
    known = ~np.isnan(scores)
    tried, heights = places[known], _heights(scores[known])
    seeds = np.array([r.seed for r in done])[known]
    if not np.isfinite(scores[known]).any():
        return _smaller_rates(space, count, rng, valid)
    leaders = tried[np.argsort(heights, kind="stable")[:LEADERS]]
    near = leaders[:, None] + NEAR * scales * rng.normal(size=(len(leaders), NEIGHBOURS, len(scales)))
    candidates = np.concatenate([rng.random((CANDIDATES, len(scales))), near.reshape(-1, len(scales))])
    settings = [_with_few_digits(space, _setting(space, u), inside=i < CANDIDATES) for i, u in enumerate(candidates)]
    usable = np.array([i < CANDIDATES or valid(x) for i, x in enumerate(settings)])
    chosen = list[int]()
    process = _Process(tried / scales, heights, seeds)
    for place in places[~known]:
        process = process.expecting(place / scales)
    for _ in range(count):
        gain = np.where(usable, process.expected_improvement(candidates / scales), -1)
        chosen.append(int(gain.argmax()))
        usable[chosen[-1]] = False
        process = process.expecting(candidates[chosen[-1]] / scales)
    return [settings[i] for i in chosen]


def _smaller_rates(
    space: Space, count: int, rng: np.random.Generator, valid: Callable[[Setting], bool]
) -> list[Setting]:
    """Return settings for when nothing is known, or everything diverged: most likely because of the learning rate."""
    r = space.ranges.get("learning_rate")
    lower = Space.of(space.ranges | {"learning_rate": r.between(-0.5, 0.5)}) if isinstance(r, Log) else space
    found = [lower.at(dict(zip(lower.free, map(float, u), strict=True))) for u in rng.random((count, len(lower.free)))]
    return [_with_few_digits(lower, x, inside=True) for x in found if valid(x)]


def _hull(space: Space, settings: Sequence[Setting]) -> Space:
    """Return the space, widened to hold the settings."""
    ranges = dict(space.ranges)
    for name in space.free:
        r, us = ranges[name], [space.ranges[name].fraction(x[name]) for x in settings]
        if not isinstance(r, Choice):
            ranges[name] = r.between(min(0.0, *us), max(1.0, *us))
    return Space.of(ranges)


class _Process:
    """A Gaussian process, conditioned on the heights of some points; lower is better.

    Each seed adds a constant of its own to its heights.
    """

    def __init__(self, points: np.ndarray, heights: np.ndarray, seeds: np.ndarray, noise: float | None = None) -> None:
        self._points, self._heights, self._seeds = points, heights, seeds
        noises = NOISES if noise is None else (noise,)
        fits = [self._fit(x) for x in noises]
        self._noise, (_, self._root, self._mean, self._residuals, self._variance) = max(
            zip(noises, fits, strict=True), key=lambda pair: pair[1][0]
        )

    def _fit(self, noise: float) -> tuple[float, np.ndarray, float, np.ndarray, float]:
        """Return the log likelihood under a relative noise, and what predictions need."""
        count = len(self._heights)
        root = np.linalg.cholesky(_matern(self._points, self._points) + noise * np.eye(count))
        of_seeds = self._seeds[:, None] == np.arange(self._seeds.max() + 1)
        basis = np.linalg.solve(root, np.column_stack([np.ones(count), of_seeds]))
        heights = np.linalg.solve(root, self._heights)
        prior = np.diag([0.0] + [1 / SEED_EFFECT] * of_seeds.shape[1])
        mean, *effects = np.linalg.solve(basis.T @ basis + prior, basis.T @ heights).tolist()
        residuals = heights - basis @ [mean, *effects]
        variance = float((residuals @ residuals + 0.1) / (count + 1))
        likelihood = -0.5 * count * math.log(variance) - np.log(np.diag(root)).sum()
        return float(likelihood), root, mean, residuals, variance

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the standard deviation at points."""
        weights = np.linalg.solve(self._root, _matern(self._points, points))
        left = np.maximum(1 - (weights**2).sum(0), 1e-9)
        return self._mean + weights.T @ self._residuals, np.sqrt(self._variance * left)

    def expecting(self, point: np.ndarray) -> "_Process":
        """Return the process after a height at a point that is just what it expects."""
        expected, _ = self.predict(point[None])
        seeds = np.append(self._seeds, UNKNOWN)
        return _Process(np.vstack([self._points, point]), np.append(self._heights, expected), seeds, self._noise)

    def expected_improvement(self, points: np.ndarray) -> np.ndarray:
        """Return by how much points are expected to lie below the lowest mean of those that are known."""
        normal = require("scipy.stats", "tune", "the model of the search").norm
        mean, deviation = self.predict(points)
        gain = (self.predict(self._points)[0].min() - mean) / deviation
        return np.asarray(deviation * (gain * normal.cdf(gain) + normal.pdf(gain)))


def _matern(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    distance = np.sqrt(5 * ((a[:, None] - b[None]) ** 2).sum(-1))
    return np.asarray((1 + distance + distance**2 / 3) * np.exp(-distance))


def _heights(scores: np.ndarray) -> np.ndarray:
    """Squash scores: nearly straight among the better half, flat for the worst, which may be infinite."""
    finite = np.isfinite(scores)
    if not finite.any():
        return np.zeros(len(scores))
    positive = scores[finite].min() > 0
    x = np.log(scores, where=finite, out=np.full(len(scores), np.inf)) if positive else scores
    above = np.where(finite, x - x[finite].min(), np.inf)
    better = np.sort(above[finite])[: max(len(scores) // 2, 3)]
    # Positive scores more than 3 above the best, in logarithms, are all alike.
    spread = max(np.minimum(better, 3).mean(), FLAT) if positive else max(better.mean(), np.finfo(float).tiny)
    return np.asarray(2 * np.tanh(np.minimum(above / spread / 2, 50)))


def _length_scale(name: str, r: Range) -> float:
    """Return a length scale as a part of a range."""
    inner = r.complement if isinstance(r, OneMinus) else r
    if name in DECADES and isinstance(inner, Log):
        return DECADES[name] / math.log10(inner.high / inner.low)
    return PART


def _place(space: Space, setting: Setting) -> list[float]:
    """Return the fractions of the ranges at which a setting lies, not far outside of them."""
    return [min(max(space.ranges[name].fraction(setting[name]), -0.5), 1.5) for name in space.free]


def _setting(space: Space, place: np.ndarray) -> Setting:
    """Return the setting at fractions, also outside of logarithmic ranges."""
    setting = space.at({})
    for name, u in zip(space.free, map(float, place), strict=True):
        r = space.ranges[name]
        if isinstance(r, Log) or (isinstance(r, OneMinus) and isinstance(r.complement, Log)):
            r, u = r.between(u, u + 1), 0.0
        setting[name] = r.at(min(max(u, 0.0), 1.0))
    return setting


def _with_few_digits(space: Space, setting: Setting, *, inside: bool) -> Setting:
    return {name: rounded(space.ranges[name], x, inside=inside) for name, x in setting.items()}
