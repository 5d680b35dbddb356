"""Results of a tuning, by search method:  python -m benchmarks.bench_tune [--quick]

Each method gets as many trials on the digits classifier, from several seeds: the stages of `tune`, Optuna's TPE
sampler, and random settings from the same ranges. The figure is the validation loss of the chosen setting over three
fresh seeds, divided by that of the defaults, so it does not depend on the luck of the search.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from adamjax.optimizers import adamw
from adamjax.problems import digits
from adamjax.tuning import tune
from adamjax.tuning._spec import search_space
from benchmarks._report import Table, command, show

PROBLEM = digits()
# With a given space, no range test narrows it: all methods start alike.
SPACE = search_space(adamw, None, "adam", half=False)
SEARCHES: dict[str, dict[str, Any]] = {
    "stages, after a range test": {},
    "stages": {"space": SPACE},
    "optuna, TPE": {"space": SPACE, "sampler": "optuna"},
    "random": {"space": SPACE, "sampler": "random", "stages": [tuple(SPACE.free)]},
}


def tables(quick: bool, trials: int = 64) -> Iterator[Table]:
    run = partial(tune, PROBLEM, trials=6 if quick else trials, steps=20 if quick else 300)
    ratios: dict[str, list[float]] = {name: [] for name in SEARCHES}
    # Far apart, so that no search uses the seeds that confirm another.
    for seed in range(0, 100 if quick else 500, 100):
        for name, how in SEARCHES.items():
            report = run(seed=seed, confirm=(5, 3), **how)
            means = {repr(c.setting): c.mean for c in report.confirmed}
            ratios[name].append(means[repr(report.best.arguments)] / means[repr(report.defaults)])
    yield Table(
        "tune",
        "Validation loss of the chosen setting / of the defaults",
        ["", "median", "worst of the searches"],
        [[name, float(np.median(found)), max(found)] for name, found in ratios.items()],
    )


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--trials", type=int, default=64)
    given = parser.parse_args()
    show(tables(given.quick, given.trials))
