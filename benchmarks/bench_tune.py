"""Results of a tuning, by search method:  python -m benchmarks.bench_tune [--quick] [--trials N]

Each method gets as many trials on the digits classifier, from several seeds, over the same space, with a schedule of
the learning rate: the list and the model of `tune`, two samplers of Optuna, and random settings. The figure is the
validation loss of the chosen setting over fresh seeds, divided by that of the defaults, so it does not depend on the
luck of the search. This is one problem: it shows that a search works, not which one is best.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from adamjax.problems import digits
from adamjax.tuning import tune
from adamjax.tuning._strategy import RANGES
from benchmarks._report import Table, command, show

PROBLEM = digits()
NAMES = [name for name in RANGES if name not in ("eps", "amsgrad")]
SEARCHES: dict[str, dict[str, Any]] = {
    "list and model": {},
    "Optuna, TPE": {"sampler": "optuna"},
    "Optuna, GP": {"sampler": "optuna:GPSampler"},
    "random": {"sampler": "random", "stages": [tuple(NAMES)]},
}


def tables(quick: bool, trials: int = 16) -> Iterator[Table]:
    run = partial(tune, PROBLEM, trials=6 if quick else trials, steps=20 if quick else 300, range_test=None)
    searches = {n: how for n, how in SEARCHES.items() if not (quick and "GP" in n)}  # which needs PyTorch
    ratios: dict[str, list[float]] = {name: [] for name in searches}
    # Far apart, so that no search uses the seeds that confirm another.
    for seed in range(0, 100 if quick else 500, 100):
        for name, how in searches.items():
            report = run(seed=seed, **how)
            means = {repr(c.setting): c.mean for c in report.confirmed}
            ratios[name].append(means[repr(report.best.arguments)] / means[repr(report.defaults)])
    yield Table(
        "tune",
        f"Validation loss of the chosen setting / of the defaults ({trials} trials)",
        ["", "median", "worst of the searches"],
        [[name, float(np.median(found)), max(found)] for name, found in ratios.items()],
    )


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--trials", type=int, default=16)
    given = parser.parse_args()
    show(tables(given.quick, given.trials))
