"""How well the suggestions of range tests train the digits:  python -m benchmarks.bench_range_test

For each mode, method and seed: the learning rate suggested, and the validation accuracy that adamw
reaches with it, kept constant, from the same seed.
"""

import numpy as np

import adamjax
from adamjax.tuning import lr_range_test, sweep
from adamjax.tuning._range_test import METHODS

SEEDS = range(5)
POINTS = {"300 steps": 2, "500 steps": 4}  # of five
REQUIRED = 0.96


def main() -> None:
    problem = adamjax.problems.digits()
    print(f"{'mode':10}{'method':12}{'seed':6}{'lr':10}" + "".join(f"{name:11}" for name in POINTS))
    worst: dict[tuple[str, str], float] = {}
    for mode, methods in METHODS.items():
        for seed in SEEDS:
            found = lr_range_test(problem, mode=mode, seed=seed)
            rates = [found.suggestion(method) for method in methods]
            settings = [{"learning_rate": lr} for lr in rates]
            trained = sweep(problem, settings, steps=500, seeds=[seed], points=5)
            for method, lr, accuracy in zip(methods, rates, trained.metrics["accuracy"][:, 0], strict=True):
                reached = [float(accuracy[point]) for point in POINTS.values()]
                worst[mode, method] = min(worst.get((mode, method), np.inf), *reached)
                print(f"{mode:10}{method:12}{seed:<6}{lr:<10.2e}" + "".join(f"{x:<11.3f}" for x in reached))
    for (mode, method), accuracy in worst.items():
        verdict = "ok" if accuracy >= REQUIRED else f"BELOW {REQUIRED}"
        print(f"worst of {mode} {method}: {accuracy:.3f} {verdict}")


if __name__ == "__main__":
    main()
