"""Quality of the suggestions of range tests, on the digits:  python -m benchmarks.bench_range_test

For each mode, method and seed: the suggested learning rate, and the validation accuracy that adamw reaches with it as a
constant learning rate, from the same seed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

import adamjax
from adamjax.tuning import lr_range_test, sweep
from adamjax.tuning._range_test import METHODS
from benchmarks._report import Table, command, show

SEEDS = range(5)
POINTS = {"300 steps": 2, "500 steps": 4}  # indices of five points
REQUIRED = 0.96


def tables(quick: bool) -> Iterator[Table]:
    problem = adamjax.problems.digits()
    rows: list[list[Any]] = []
    worst: dict[str, float] = {}
    for mode, methods in METHODS.items():
        for seed in SEEDS[:1] if quick else SEEDS:
            found = lr_range_test(problem, mode=mode, seed=seed)
            rates = [found.suggestion(method) for method in methods]
            settings = [{"learning_rate": lr} for lr in rates]
            trained = sweep(problem, settings, steps=500, seeds=[seed], points=5)
            for method, lr, accuracy in zip(methods, rates, trained.metrics["accuracy"][:, 0], strict=True):
                name, reached = f"{mode}, {method}", [float(accuracy[point]) for point in POINTS.values()]
                worst[name] = min(worst.get(name, np.inf), *reached)
                rows.append([name, seed, f"{lr:.2e}", *(f"{x:.3f}" for x in reached)])
    title = "Validation accuracy at the suggested learning rate"
    yield Table("range-test", title, ["", "seed", "learning rate", *POINTS], rows)
    verdicts = [[name, f"{x:.3f}", "ok" if x >= REQUIRED else f"BELOW {REQUIRED}"] for name, x in worst.items()]
    yield Table(
        "range-test-worst", f"The worst accuracy, which must be at least {REQUIRED}", ["", "accuracy", ""], verdicts
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
