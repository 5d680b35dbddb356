"""What tuning finds, by how it searches:  python -m benchmarks.bench_tune [--quick]

As many trials for each on the digits classifier, from several seeds: the stages of `tune`, Optuna's TPE
sampler, and random settings from the same ranges. The figure is the validation loss of the setting
that is chosen, over three fresh seeds, as a multiple of that of the defaults: so it does not depend on
what luck the search had.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from adamjax.optimizers import adamw
from adamjax.problems import digits
from adamjax.tuning import tune
from adamjax.tuning._question import space_of
from benchmarks._report import Table, command, show

PROBLEM = digits()
# With a space of one's own, no range test says where to look: all start alike.
SPACE = space_of(adamw, None, "adam", half=False)
SEARCHES: dict[str, dict[str, Any]] = {
    "stages, after a range test": {},
    "stages": {"space": SPACE},
    "optuna, TPE": {"space": SPACE, "sampler": "optuna"},
    "random": {"space": SPACE, "sampler": "random", "stages": [tuple(SPACE.free)]},
}


def tables(quick: bool, trials: int = 64) -> Iterator[Table]:
    run = partial(tune, PROBLEM, trials=6 if quick else trials, steps=20 if quick else 300)
    ratios: dict[str, list[float]] = {name: [] for name in SEARCHES}
    # Far apart, so that no search sees the seeds by which another is confirmed.
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
