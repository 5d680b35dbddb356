"""The staged search: it chooses the settings to try next from the results so far."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adamjax.tuning._space import Choice, Linear, Log, OneMinus, Range, Setting, Space

# Initial ranges of Adam's hyperparameters. The search leaves a range whose edge is best.
RANGES: Mapping[str, Range] = {
    "learning_rate": Log(1e-4, 3.0),
    "b1": OneMinus(Log(0.02, 0.6)),
    "b2": OneMinus(Log(3e-4, 0.3)),
    "eps": Log(1e-9, 1e-3),
    "weight_decay": Log(1e-5, 1.0),
    "warmup_fraction": Log(0.01, 0.3),
    "end_fraction": Linear(0.0, 1.0),
    "amsgrad": Choice(False, True),
}
MIN_STAGE_TRIALS = 4
TRIALS_FOR_B2 = 48
EDGE = 0.1  # fraction of a range


class Stage(NamedTuple):
    """A stage of the search: the arguments it varies, and its number of trials."""

    name: str
    arguments: tuple[str, ...]
    trials: int


class Round(NamedTuple):
    """A round of trials: settings of one stage to try at once, and the space they were drawn from."""

    stage: str
    settings: list[Setting]
    space: Space
    seed: int = 0  # which of the two seeds of the search to run with


class Result(NamedTuple):
    setting: Setting
    score: float  # lower is better; inf if the trial diverged, failed or was pruned; NaN if it is not known yet
    value: float  # of the metric, the last
    pruned_at: int | None  # the step at which the trial was pruned; None if it was not
    seed: int = 0  # which of the two seeds of the search it ran with


Stages = str | Sequence[str | Sequence[str]]  # "adam", or the arguments of each stage
# It proposes rounds, and is sent the results of all settings that it has proposed, in order.
Strategy = Generator[Round, list[Result], None]


def stage_groups(stages: Stages) -> list[tuple[str, ...]]:
    """Return the arguments of each stage that a user lists: none for "adam"."""
    return [] if isinstance(stages, str) else [(s,) if isinstance(s, str) else tuple(s) for s in stages]


def plan_stages(space: Space, stages: Stages, trials: int) -> list[Stage]:
    """Divide `trials` trials (besides the defaults) among as many stages as they suffice for, as evenly as possible."""
    if not isinstance(stages, str):
        wanted = [(", ".join(group), group) for group in stage_groups(stages)]
        choices: list[str] = []
    else:
        wanted, choices = _adam_stages(space, trials), [n for n in space.free if isinstance(space.ranges[n], Choice)]
    share = min(MIN_STAGE_TRIALS, trials // (4 * MIN_STAGE_TRIALS)) if wanted else trials // max(len(choices), 1)
    rest = trials - share * len(choices)
    count = min(len(wanted), max(rest // MIN_STAGE_TRIALS, 1))
    sizes = [rest // count + (i < rest % count) for i in range(count)]
    planned = [Stage(*stage, size) for stage, size in zip(wanted, sizes, strict=False)]
    planned += [Stage(name, (name,), share) for name in choices]
    return [stage for stage in planned if stage.trials]


def _adam_stages(space: Space, trials: int) -> list[tuple[str, tuple[str, ...]]]:
    """Return the name and the arguments of each stage of "adam", as `tune` describes them, but the choices."""
    numbers = [name for name in space.free if not isinstance(space.ranges[name], Choice)]
    betas = [n for n in numbers if n == "b1" or (n == "b2" and (trials >= TRIALS_FOR_B2 or "b1" not in numbers))]
    first = [n for n in ("eps", "weight_decay") if n in numbers]
    others = [n for n in numbers if n not in ("learning_rate", "b1", "b2", *first)]
    groups = [tuple(betas)] * bool(betas) + [(name,) for name in (*first, *others)]
    rate = ("learning_rate",) if "learning_rate" in numbers else ()
    stages = [(", ".join(group), (*rate, *group)) for group in groups]
    if len(groups) > 1 or (rate and groups):
        stages.append(("all", tuple(n for n in numbers if n in (*rate, *betas, *first, *others))))
    return [("learning_rate", rate)] * 2 * len(rate) + stages


def staged_search(
    space: Space,
    defaults: Setting,
    stages: Sequence[Stage],
    *,
    start: Setting,
    method: str,
    seed: int,
    valid: Callable[[Setting], bool],
) -> Strategy:
    """Try the defaults and then stage after stage, each around the best setting so far.

    Arguments that a stage does not vary keep their values of the best setting so far, at first those of `start`. A
    range narrows to where the best quarter lies, or moves as `tune` describes while settings remain `valid`.
    """
    region, done = space, list[Result]()
    settings = [defaults]
    for i, stage in enumerate(stages):
        ranked = sorted((r for r in done if not math.isnan(r.score)), key=lambda r: r.score)
        best = ranked[0].setting if ranked else start
        if all(isinstance(region.ranges[name], Choice) for name in stage.arguments):
            searched = Space.of({name: region.ranges[name] for name in stage.arguments})
            tried = [r.setting for r in done]
            settings += with_other_choices(region, stage, ranked, tried, best)
        else:
            fixed = [n for n in space.free if n not in stage.arguments]
            ranges = {n: Choice(best[n]) if n in fixed else r for n, r in region.ranges.items()}
            searched = Space.of(ranges)
            points = searched.points(stage.trials, method=method, seed=seed + i)
            settings += [{n: rounded(ranges[n], x) for n, x in point.items()} for point in points]
        if settings:
            done = yield Round(stage.name, settings, searched)
        settings = []
        region = _region_after(region, stage, done, valid)
    if settings:
        yield Round("defaults", settings, region)


def with_other_choices(
    region: Space, stage: Stage, ranked: Sequence[Result], tried: Sequence[Setting], best: Setting
) -> list[Setting]:
    """Return the best settings so far with each of the other choices."""
    bases = [r.setting for r in ranked if math.isfinite(r.score)] or [best]
    choices = [r.options for name in stage.arguments if isinstance(r := region.ranges[name], Choice)]
    untried: list[Setting] = []
    for base, options in itertools.product(bases, itertools.product(*choices)):
        setting = base | dict(zip(stage.arguments, options, strict=True))
        if setting not in tried and setting not in untried:
            untried.append(setting)
    return untried[: stage.trials]


def _region_after(region: Space, stage: Stage, done: Sequence[Result], valid: Callable[[Setting], bool]) -> Space:
    """Return the space to search after a stage; only the ranges of its arguments change."""
    known = [r for r in done if not math.isnan(r.score)]
    if not known:
        return region
    feasible = sorted((r for r in known if math.isfinite(r.score)), key=lambda r: r.score)
    top = [r.setting for r in feasible[: max(3, stage.trials // 4)]]
    best = top[0] if top else known[0].setting
    ranges = dict(region.ranges)
    for name in stage.arguments:
        r = ranges[name]
        if isinstance(r, Choice):
            continue
        if not top:
            # All trials diverged, most likely because of the learning rate.
            moved: Range = r.between(-1.0, 0.0) if name == "learning_rate" and isinstance(r, Log) else r
        else:
            moved = _narrowed_or_moved(r, [r.fraction(setting[name]) for setting in top])
        if all(valid(best | {name: moved.at(u)}) for u in (0.0, 1.0)):
            ranges[name] = moved
    return Space.of(ranges)


def _narrowed_or_moved(r: Log | Linear | OneMinus, fractions: Sequence[float]) -> Range:
    """Return the part of a range with the best values, or the range moved if the first of them lies on its edge."""
    inside = np.clip(fractions, 0, 1)
    logarithmic = isinstance(r.complement if isinstance(r, OneMinus) else r, Log)
    if logarithmic and not EDGE <= fractions[0] <= 1 - EDGE:
        low, high = (-0.5, 0.5) if fractions[0] < EDGE else (0.5, 1.5)
    else:
        middle, half = float(inside.min() + inside.max()) / 2, max(float(np.ptp(inside)) / 2 + EDGE, 1.5 * EDGE)
        low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    moved = r.between(low, high)
    if isinstance(moved, OneMinus) and moved.complement.high > 1:
        return OneMinus(dataclasses.replace(moved.complement, high=1.0))
    return moved


def rounded(r: Range, x: float, *, inside: bool = True) -> float:
    """Round a value to significant digits: a ten-thousandth of itself, or of a linear range, which it does not leave.

    A value outside of a logarithmic range stays there unless it is to be `inside`.
    """
    if isinstance(r, Choice):
        return x
    if isinstance(r, OneMinus):
        return round(1 - rounded(r.complement, 1 - x, inside=inside), 15)
    step = x if isinstance(r, Log) else r.high - r.low
    x = round(x, 4 - math.ceil(math.log10(step)))
    return min(max(x, r.low), r.high) if inside or not isinstance(r, Log) else x
