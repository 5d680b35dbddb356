"""Cost of batches from the host:  python -m benchmarks.bench_host_batches [--quick]

A population trains the convolutional network for digits, all settings at once. The images are arrays on the device, of
which the program picks the rows of a batch; or they come from a generator, which picks them in NumPy. Compilation does
not count.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from adamjax import adamw
from adamjax.problems import digits_convnet
from adamjax.tuning._mesh_runner import make_runner
from adamjax.tuning._sweep import evenly_spaced
from benchmarks._measure import Run, Seconds, interleaved, ratio
from benchmarks._report import Table, command, show

PROBLEM = digits_convnet()


class FromHost:
    """The convolutional network, with batches that a generator makes."""

    def __init__(self) -> None:
        self.init, self.loss, self.evaluate = PROBLEM.init, PROBLEM.loss, PROBLEM.evaluate
        self._images, self._labels = (np.asarray(x) for x in PROBLEM._train)

    def batches(self, seed: int) -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.integers(len(self._labels), size=PROBLEM.batch_size)
            yield self._images[rows], self._labels[rows]


def trained(problem: Any, settings: int, steps: int) -> Run:
    """A population of so many settings, whose program is compiled at the first call."""
    runner = make_runner(problem, "loss", seed=0, execution="vmap", mesh=None, memory=None)
    opts = [adamw(float(lr)) for lr in np.geomspace(1e-4, 1e-1, settings)]
    seeds, eval_steps = np.zeros(1, np.int32), evenly_spaced(steps, 4)
    return lambda: [losses for *_, (losses, _, _) in runner.run(opts, seeds, eval_steps)]


def tables(quick: bool) -> Iterator[Table]:
    rows: list[list[Any]] = []
    seconds: Seconds = {}
    for settings in (1, 16):
        problems = {"from the device": PROBLEM, "from a generator": FromHost()}
        runs = {f"{name}, {settings}": trained(x, settings, 8 if quick else 100) for name, x in problems.items()}
        found = interleaved(runs, 0 if quick else 7)
        (_, device), (_, host) = found.items()
        rows.append([str(settings), ratio(host, device), f"{float(np.median(host)) / (8 if quick else 100) * 1e3:.1f}"])
        seconds |= found
    title = f"batches of {PROBLEM.batch_size} digits from a generator on the host"
    columns = ["settings", "time / from arrays on the device", "ms a step"]
    yield Table("host_batches", title, columns, rows, seconds)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
