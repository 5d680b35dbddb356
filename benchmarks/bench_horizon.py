"""Hyperparameters for longer runs than they were tuned for:  python -m benchmarks.bench_horizon [--quick]

On each of 14 problems, 96 settings train for its usual number of steps: those of the learned list of `tune`, and
Halton's points. The best 4 then train for 4 times as many steps, with the schedule stretched, and with the peak of the
learning rate, weight decay, or the distance of b2 from 1 changed. A figure is the geometric mean, over problems and
settings, of the loss divided by that without a change; the interval holds 95 % of the means over problems drawn again
with replacement.
"""

from collections.abc import Iterator

import numpy as np

from adamjax.problems import Problem
from adamjax.tuning._learned import TABLE, learned_settings
from adamjax.tuning._space import Setting
from benchmarks._held_out import HELD_OUT
from benchmarks._measure import pool_of_cores
from benchmarks._report import Table, command, show
from benchmarks._searches import SPACE
from benchmarks.bench_tune import Runs, ratio_text

STRETCH = 4
PEAKS = (0.25, 0.5, 1.0, 2.0)
OTHERS = {"nothing else": (1.0, 1.0), "weight decay / 4": (0.25, 1.0), "(1 - b2) / 4": (1.0, 0.25)}
SETTINGS, BEST, SEEDS = 96, 4, 4


def changed(setting: Setting, peak: float, decay: float, b2: float) -> Setting:
    """Return a setting with three of its numbers multiplied; of b2, the distance from 1."""
    numbers = {"learning_rate": setting["learning_rate"] * peak, "weight_decay": setting["weight_decay"] * decay}
    return setting | numbers | {"b2": 1 - (1 - setting["b2"]) * b2}


def logs(problem: Problem, steps: int, settings: int = SETTINGS) -> np.ndarray:
    """float[others, peaks]: logarithms of the losses of long runs, over those of unchanged settings."""
    fill = SPACE.points(max(settings, len(TABLE)), method="halton", seed=0)
    tried = (learned_settings(SPACE, fill) + fill[len(TABLE) :])[:settings]
    short = Runs(problem, steps).losses([(x, seed) for x in tried for seed in (0, 1)])[:, -1]
    best = [tried[i] for i in np.argsort(short.reshape(-1, 2).mean(1), kind="stable")[:BEST]]
    changes = [(peak, *others) for others in OTHERS.values() for peak in PEAKS]
    wanted = [(changed(x, *change), 2 + seed) for change in changes for x in best for seed in range(SEEDS)]
    losses = Runs(problem, STRETCH * steps).losses(wanted)[:, -1].reshape(len(OTHERS), len(PEAKS), BEST, SEEDS)
    means = np.log(np.minimum(losses, 1e6).mean(-1))
    return np.asarray((means - means[0, PEAKS.index(1.0)]).mean(-1))


def of_problem(name: str, quick: bool) -> np.ndarray:
    problem, steps = HELD_OUT[name]
    return logs(problem, 10, 8) if quick else logs(problem, steps)


def tables(quick: bool) -> Iterator[Table]:
    names = ["iris, raw", "sets"] if quick else list(HELD_OUT)
    with pool_of_cores() as pool:
        asked = [pool.submit(of_problem, name, quick) for name in names]
        found = np.array([job.result() for job in asked])
    texts = [[ratio_text(found[:, i, j, None]) for j in range(len(PEAKS))] for i in range(len(OTHERS))]
    best = PEAKS[int(found.mean(0)[0].argmin())]
    lowest = [PEAKS[j] for j in found[:, 0].argmin(1)]
    title = f"{STRETCH} times as many steps: loss / that of unchanged settings, {len(names)} problems"
    rows = [[name, *row] for name, row in zip(OTHERS, texts, strict=True)]
    yield Table("horizon", title, ["", *(f"peak x {peak:g}" for peak in PEAKS)], rows)
    counts = [[f"x {peak:g}", lowest.count(peak)] for peak in PEAKS]
    title = f"The peak that is best for {STRETCH} times as many steps (in the mean, x {best:g})"
    yield Table("horizon-peaks", title, ["", "problems"], counts)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
