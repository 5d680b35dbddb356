"""The staged search: which settings to try next, from what the ones before gave."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adamjax.tuning._space import Choice, Linear, Log, OneMinus, Range, Setting, Space

# Where each of Adam's hyperparameters is looked for first; a range is left where its edge is best.
RANGES: Mapping[str, Range] = {
    "learning_rate": Log(1e-4, 1e-1),
    "b1": OneMinus(Log(0.02, 0.5)),
    "b2": OneMinus(Log(3e-4, 0.1)),
    "eps": Log(1e-9, 1e-3),
    "weight_decay": Log(1e-5, 1.0),
    "amsgrad": Choice(False, True),
}
FEWEST = 4  # trials that a stage needs
TRIALS_FOR_B2 = 48
EDGE = 0.1  # of a range


class Stage(NamedTuple):
    """What a batch of trials is for: the arguments it varies."""

    name: str
    arguments: tuple[str, ...]
    trials: int


class Batch(NamedTuple):
    """Settings to try at once.

    Fields:
      stage: What for.
      settings: Which.
      within: The space they are from.
    """

    stage: str
    settings: list[Setting]
    within: Space


class Result(NamedTuple):
    """What came of one.

    Fields:
      setting: Which it was.
      score: Lower is better; inf where it diverged or was ended early.
      value: The last of the metric.
      pruned_at: The step at which it was ended early; else 0.
    """

    setting: Setting
    score: float
    value: float
    pruned_at: int


Strategy = Generator[Batch, list[Result], None]


def plan(space: Space, stages: str | Sequence[str | Sequence[str]], trials: int) -> list[Stage]:
    """The stages that `trials` trials (besides the defaults) are enough for, as equal in size as they can be.

    For "adam": the learning rate twice (wide, then where it was good); then the learning rate
    together with the betas, with epsilon, with weight decay, with each other argument of the space;
    all of them together; last the choices (AMSGrad), on the best settings. With fewer trials, the
    later stages are left out.
    """
    if not isinstance(stages, str):
        groups = [(group,) if isinstance(group, str) else tuple(group) for group in stages]
        wanted = [(", ".join(group), group) for group in groups]
        switches: list[str] = []
    else:
        wanted, switches = _of_adam(space, trials), [n for n in space.free if isinstance(space.ranges[n], Choice)]
    share = min(FEWEST, trials // (4 * FEWEST)) if wanted else trials // max(len(switches), 1)
    rest = trials - share * len(switches)
    count = min(len(wanted), max(rest // FEWEST, 1))
    sizes = [rest // count + (i < rest % count) for i in range(count)]
    found = [Stage(*stage, size) for stage, size in zip(wanted, sizes, strict=False)]
    found += [Stage(name, (name,), share) for name in switches]
    return [stage for stage in found if stage.trials]


def _of_adam(space: Space, trials: int) -> list[tuple[str, tuple[str, ...]]]:
    numbers = [name for name in space.free if not isinstance(space.ranges[name], Choice)]
    betas = [n for n in numbers if n == "b1" or (n == "b2" and (trials >= TRIALS_FOR_B2 or "b1" not in numbers))]
    first = [n for n in ("eps", "weight_decay") if n in numbers]
    others = [n for n in numbers if n not in ("learning_rate", "b1", "b2", *first)]
    groups = [tuple(betas)] if betas else []
    groups += [(name,) for name in (*first, *others)]
    rate = ("learning_rate",) if "learning_rate" in numbers else ()
    found = [(", ".join(group), (*rate, *group)) for group in groups]
    searched = [n for n in numbers if n in (*rate, *betas, *first, *others)]
    if len(groups) > 1 or (rate and groups):
        found.append(("all", tuple(searched)))
    return [("learning_rate", rate)] * 2 * len(rate) + found


def staged(
    space: Space,
    defaults: Setting,
    stages: Sequence[Stage],
    *,
    method: str,
    seed: int,
    valid: Callable[[Setting], bool],
) -> Strategy:
    """The defaults and then stage after stage, each around the best so far.

    What a stage does not vary is as in the best setting so far. After it the range of each of its
    arguments narrows to where the best quarter lies; if the best lies on the edge of a logarithmic
    range, the range moves in that direction instead, as far as settings remain `valid`.
    """
    region, done = space, list[Result]()
    batch = [defaults]
    for i, stage in enumerate(stages):
        best = min(done, key=lambda r: r.score).setting if done else defaults
        if all(isinstance(region.ranges[name], Choice) for name in stage.arguments):
            within = Space.of({name: region.ranges[name] for name in stage.arguments})
            batch += _switched(region, stage, sorted(done, key=lambda r: r.score), best)
        else:
            ranges = {n: r if n in stage.arguments else Choice(best[n]) for n, r in region.ranges.items()}
            within = Space.of(ranges)
            points = within.points(stage.trials, method=method, seed=seed + i)
            batch += [{n: _tidy(ranges[n], x) for n, x in point.items()} for point in points]
        if batch:
            done += yield Batch(stage.name, batch, within)
        batch = []
        region = _moved(region, stage, done, valid)
    if batch:
        yield Batch("defaults", batch, region)


def _switched(region: Space, stage: Stage, done: Sequence[Result], best: Setting) -> list[Setting]:
    """The best settings so far, with the other choices."""
    bases = [r.setting for r in done if math.isfinite(r.score)] or [best]
    choices: list[Any] = [region.ranges[name] for name in stage.arguments]
    tried = [r.setting for r in done]
    found: list[Setting] = []
    for base in bases:
        for options in itertools.product(*(choice.options for choice in choices)):
            setting = base | dict(zip(stage.arguments, options, strict=True))
            if setting not in tried and setting not in found and len(found) < stage.trials:
                found.append(setting)
    return found


def _moved(region: Space, stage: Stage, done: Sequence[Result], valid: Callable[[Setting], bool]) -> Space:
    """The region after a stage; only the ranges of its arguments change."""
    feasible = sorted((r for r in done if math.isfinite(r.score)), key=lambda r: r.score)
    top = [r.setting for r in feasible[: max(3, stage.trials // 4)]]
    best = top[0] if top else done[0].setting
    ranges = dict(region.ranges)
    for name in stage.arguments:
        r = ranges[name]
        if isinstance(r, Choice):
            continue
        if not top:
            # Everything diverged: of all arguments, the learning rate is the one to blame.
            moved: Range = r.between(-1.0, 0.0) if name == "learning_rate" and isinstance(r, Log) else r
        else:
            moved = _around(r, [r.fraction(setting[name]) for setting in top])
        if all(valid(best | {name: moved.at(u)}) for u in (0.0, 1.0)):
            ranges[name] = moved
    return Space.of(ranges)


def _around(r: Log | Linear | OneMinus, fractions: Sequence[float]) -> Range:
    """The part of a range where the best lie, the very best of which is the first."""
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


def _tidy(r: Range, x: Any) -> Any:
    """The value without digits that mean nothing: a ten-thousandth of a value, or of a linear range."""
    if isinstance(r, Choice):
        return x
    if isinstance(r, OneMinus):
        return round(1 - _tidy(r.complement, 1 - x), 15)
    step = x if isinstance(r, Log) else r.high - r.low
    return min(max(round(x, 4 - math.ceil(math.log10(step))), r.low), r.high)
