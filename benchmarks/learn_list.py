"""Learn the list of settings that `tune` begins with:  python -m benchmarks.learn_list [--quick] [--tables FOLDER]

Every problem of `_list_problems.py` is trained with the same settings, each with two seeds, at a learning rate with a
warmup and half a cosine: settings spread over Adam's hyperparameters by Sobol's points, and those of the published
lists of `_lists.py` that lie among them. The list is chosen greedily: each entry
lowers most the mean over the problems of the loss of the best entry so far, as a logarithm above the best loss of the
problem, clipped at a factor of 4. The result is the table in `adamjax/tuning/_learned.py`. It takes about a quarter of
an hour on two cores.
"""

from pathlib import Path

import numpy as np

from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning import Linear, Log, Space, sweep
from adamjax.tuning._courses import Scheduled
from adamjax.tuning._space import Setting
from benchmarks._list_problems import problems
from benchmarks._lists import ALGOPERF, OPT_LIST
from benchmarks._report import command

SPACE = Space(
    learning_rate=Log(1e-4, 3.0),
    one_minus_b1=Log(0.02, 0.6),
    one_minus_b2=Log(3e-4, 0.3),
    weight_decay=Log(1e-5, 1.0),
    warmup_fraction=Log(0.01, 0.3),
    end_fraction=Linear(0.0, 1.0),  # of a scale on which two fifths are 0
)
SETTINGS, SEEDS, ENTRIES = 1024, 2, 32
WORST = np.log(4)
SMALL_EPS = 1e-6
FLOOR = 1e-5  # of losses: some problems are learned to the last digit


def candidates(count: int) -> list[Setting]:
    """Return the settings that are trained: so many points, and the published ones."""
    found = SPACE.points(count, method="sobol", seed=0)
    points = [x | {"end_fraction": 0.5 * max(0.0, (x["end_fraction"] - 0.4) / 0.6) ** 2} for x in found]
    return points + published()


def published() -> list[Setting]:
    """Return the published settings that lie in the space, with its shortest warmup or a longer one.

    Their eps is left out, and those whose eps is large enough to matter.
    """
    shortest = SPACE.ranges["warmup_fraction"].at(0.0)
    found = []
    for x in ALGOPERF + OPT_LIST:
        if x["eps"] <= SMALL_EPS:
            setting = {name: x[name] for name in SPACE.ranges}
            setting["warmup_fraction"] = max(setting["warmup_fraction"], shortest)
            if all(0 <= SPACE.ranges[name].fraction(value) <= 1 for name, value in setting.items()):
                found.append(setting)
    return found


def losses(problem: Problem, steps: int, settings: list[Setting]) -> np.ndarray:
    """float[settings]: the mean logarithm of the validation loss over the seeds; infinite where a run diverged."""
    optimizer = Scheduled(adamw, "cosine", steps)
    found = sweep(problem, settings, optimizer=optimizer, steps=steps, seeds=SEEDS, points=1)
    values = found.metrics["loss"][:, :, -1]
    return np.log(np.where(np.isfinite(values), np.maximum(values, FLOOR), np.inf)).mean(1)


def greedy(table: np.ndarray, entries: int) -> list[int]:
    """Return which settings (columns) are best for the problems (rows) together, the most useful first."""
    best = np.sort(table, axis=1)[:, : min(3, table.shape[1])].mean(1, keepdims=True)
    above = np.minimum(table - best, WORST)
    left, chosen = np.full(len(table), WORST), list[int]()
    for _ in range(entries):
        chosen.append(int(np.minimum(left[:, None], above).mean(0).argmin()))
        left = np.minimum(left, above[:, chosen[-1]])
    return chosen


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--tables", type=Path, help="folder that keeps the losses of each problem (default: none)")
    given = parser.parse_args()
    settings = candidates(16 if given.quick else SETTINGS)
    table = []
    for name, (problem, steps) in list(problems().items())[: 3 if given.quick else None]:
        table.append(losses(problem, steps, settings))
        print(f"{name}: the best loss is {np.exp(table[-1].min()):.3g}", flush=True)
        if given.tables is not None:
            given.tables.mkdir(parents=True, exist_ok=True)
            np.savetxt(given.tables / "losses.csv", np.asarray(table), "%.4g", delimiter=",")
    for i in greedy(np.asarray(table), 4 if given.quick else ENTRIES):
        x = settings[i]
        rates = ", ".join(f"{x[name]:.2g}" for name in ("weight_decay", "warmup_fraction", "end_fraction"))
        print(f"    ({x['learning_rate']:.3g}, {1 - x['b1']:.2g}, {1 - x['b2']:.2g}, {rates}),")


if __name__ == "__main__":
    main()
