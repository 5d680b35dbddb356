"""The best learning rate by width, with and without `adamjax.transfer`:  python -m benchmarks.bench_transfer [--quick]

A perceptron on digits and a transformer on characters train at growing widths, with Adam, a warmup and a linear decay,
at learning rates that grow by factors of 2. The loss is that of training, over the last quarter of the updates. The
best learning rate is the minimum of a parabola through the logarithms of the losses around the best one. With
`transfer`, the learning rate is that of the smallest model, and the others follow from the shapes; without, it is that
of all parameters, and the model is initialised as it does by itself. A figure is a best learning rate over that of the
smallest width. All losses are in `benchmarks/results/transfer.json`, which `--write` renews.
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax._core.figures import shades, styled, subplots
from adamjax._core.typing import PyTree
from adamjax._transforms.base import Transformation
from adamjax.problems import Problem
from adamjax.problems._digits import Digits
from adamjax.problems._text import Characters
from adamjax.tuning import sweep
from benchmarks._machine import machine
from benchmarks._measure import pool_of_cores
from benchmarks._report import Curves, Table, command, show

HOW = ("with transfer", "without")
RESULTS = Path(__file__).parent / "results" / "transfer.json"


def powers(low: int, high: int) -> tuple[float, ...]:
    """Return 2**low, ..., 2**high."""
    return tuple(2.0**k for k in range(low, high + 1))


@dataclasses.dataclass(frozen=True)
class Study:
    """A model at several widths.

    Fields:
      title: Its name in tables.
      widths: The widths; the first is the small model.
      rates: Learning rates, each twice the one before.
      output: See `adamjax.transfer`.
    """

    title: str
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    seeds: int
    output: str

    def problem(self, width: int, divisor: int = 1) -> Problem:
        """Return the model of a width, with its logits divided by a number."""
        raise NotImplementedError


class Perceptrons(Study):
    def problem(self, width: int, divisor: int = 1) -> Problem:
        return Digits(hidden=(width, width, width), batch_size=32)


class Transformers(Study):
    def problem(self, width: int, divisor: int = 1) -> Problem:
        # Heads of one size need no other scale of their scores in a wider model.
        return Divided(width, depth=2, heads=width // 8, context=32, batch_size=8, divisor=divisor)


@dataclasses.dataclass(frozen=True)
class Divided(Characters):
    """A transformer with its logits divided by a number: its last layer is the embedding."""

    divisor: int = 1

    def _logits(self, params: PyTree, characters: jax.Array) -> jax.Array:
        return super()._logits(params, characters) / self.divisor


class Rescaled:
    """A problem whose initial parameters are multiplied by constants."""

    def __init__(self, problem: Any, factors: PyTree) -> None:
        self._problem, self._factors = problem, factors
        self.batch, self.loss, self.evaluate = problem.batch, problem.loss, problem.evaluate

    def init(self, key: jax.Array) -> PyTree:
        return jax.tree.map(lambda p, factor: p * np.float32(factor), self._problem.init(key), self._factors)


STUDIES = {
    "digits": Perceptrons(
        "perceptron, digits", (32, 64, 128, 256, 512, 1024), powers(-11, -2), steps=120, seeds=4, output="rate"
    ),
    "characters": Transformers(
        "transformer, characters", (32, 64, 128, 256), powers(-10, -4), steps=80, seeds=2, output="multiplier"
    ),
}


def losses(study: Study, width: int, transferred: bool) -> np.ndarray:
    """float[rates, seeds]: training losses over the last quarter of the updates."""
    small, large = (study.problem(w).init(jax.random.key(0)) for w in (study.widths[0], width))
    scaled = partial(adamjax.transfer, small=small, large=large, output=study.output)
    schedule = partial(adamjax.schedules.warmup_stable_decay, warmup_steps=study.steps // 10, total_steps=study.steps)

    def optimizer(learning_rate: float) -> Transformation:
        rest = study.steps - study.steps // 10
        opt = adamjax.adam(schedule(learning_rate, decay_steps=rest), b2=0.99)
        return scaled(opt) if transferred else opt

    problem: Any = study.problem(width)
    if transferred:
        opt = scaled(adamjax.adam())
        start = opt.rescale(small, large)
        factors = jax.tree.map(lambda a, b: float(jnp.std(b) / jnp.std(a)) if jnp.std(a) > 0 else 1.0, large, start)
        problem = Rescaled(study.problem(width, width // study.widths[0]), factors)
    settings = [{"learning_rate": rate} for rate in study.rates]
    found = sweep(
        problem, settings, optimizer=optimizer, steps=study.steps, seeds=study.seeds, points=4, execution="map"
    )
    return np.where(found.diverged_at > 0, np.inf, found.losses[:, :, -1])


def best_rate(rates: np.ndarray, found: np.ndarray) -> float:
    """The minimum of a parabola through the losses within a factor of 4 of the best rate; NaN if that is at an end."""
    logs = np.log(geometric_mean(found))
    best = int(logs.argmin())
    near = [i for i in range(best - 2, best + 3) if 0 <= i < len(rates) and np.isfinite(logs[i])]
    if best in (0, len(rates) - 1) or len(near) < 3:
        return float("nan")
    a, b, _ = np.polyfit(np.log2(rates[near]), logs[near], 2)
    lowest = -b / (2 * a) if a > 0 else np.log2(rates[best])
    return float(2 ** np.clip(lowest, *np.log2(rates[[best - 1, best + 1]])))


def tables(quick: bool, out: Path | None = None) -> Iterator[Table]:
    studies = STUDIES
    if quick:
        sizes: dict[str, Any] = {"widths": (8, 16), "steps": 8, "seeds": 1}
        studies = {name: dataclasses.replace(x, **sizes, rates=x.rates[::3]) for name, x in STUDIES.items()}
    # The smallest model is the same in both ways.
    asked = [(name, how, w) for name, x in studies.items() for how in HOW for w in x.widths[how == HOW[1] :]]
    with pool_of_cores() as pool:
        jobs = {
            (name, how, width): pool.submit(losses, studies[name], width, how == HOW[0])
            for name, how, width in sorted(asked, key=lambda x: -x[2])  # the longest first
        }
        found = {job: jobs[job].result() for job in asked}
    for name, study in studies.items():
        found[name, HOW[1], study.widths[0]] = found[name, HOW[0], study.widths[0]]
    yield from tables_of_all(studies, found)
    if out is not None:
        out.write_text(json.dumps(raw(studies, found), indent=1) + "\n")


def tables_of_all(studies: dict[str, Study], found: dict[tuple[str, str, int], np.ndarray]) -> Iterator[Table]:
    for name, study in studies.items():
        yield from tables_of(name, study, {how: {w: found[name, how, w] for w in study.widths} for how in HOW})


def tables_of(name: str, study: Study, found: dict[str, dict[int, np.ndarray]]) -> Iterator[Table]:
    rates, first = np.array(study.rates), study.widths[0]
    best = {how: {width: best_rate(rates, x) for width, x in by_width.items()} for how, by_width in found.items()}
    rows = [[how, *(_ratio(by_width[first], x) for x in by_width.values())] for how, by_width in best.items()]
    columns = ["", *(f"width {width}" for width in study.widths)]
    lines = {}
    for how, by_width in found.items():
        for width, x in by_width.items():
            means = zip(study.rates, x.mean(axis=1).tolist(), strict=True)
            lines[f"width {width}: {how}"] = {rate: loss for rate, loss in means if np.isfinite(loss)}
    title = f"{study.title}: best learning rate over that of width {first} ({best[HOW[0]][first]:.2g})"
    yield Table(f"transfer-{name}", title, columns, rows, picture=Curves("learning rate", "training loss", lines))
    rows = [[how, *(_cost(by_width[first], x) for x in by_width.values())] for how, by_width in found.items()]
    title = f"{study.title}: loss at the best learning rate of width {first}, over the least loss"
    yield Table(f"transfer-{name}-cost", title, columns, rows)
    rows = [[how, *(float(geometric_mean(x).min()) for x in by_width.values())] for how, by_width in found.items()]
    yield Table(f"transfer-{name}-loss", f"{study.title}: least loss", columns, rows)


def raw(studies: dict[str, Study], found: dict[tuple[str, str, int], np.ndarray]) -> dict[str, Any]:
    """All losses, for a file."""
    facts: dict[str, Any] = {"machine": machine()}
    for name, study in studies.items():
        by_width = {how: {w: found[name, how, w].round(5).tolist() for w in study.widths} for how in HOW}
        facts[name] = {"steps": study.steps, "rates": study.rates, "losses": by_width}
    return facts


def geometric_mean(found: np.ndarray) -> np.ndarray:
    """float[rates], over seeds; infinite where one diverged."""
    return np.asarray(np.exp(np.log(found).mean(axis=1)))


def _ratio(a: float, b: float) -> float:
    return b / a


def _cost(small: np.ndarray, large: np.ndarray) -> float:
    means = geometric_mean(large)
    return float(means[geometric_mean(small).argmin()] / means.min())


def read(path: Path) -> tuple[dict[str, Study], dict[tuple[str, str, int], np.ndarray]]:
    """Return the studies and their losses from a file."""
    content = json.loads(path.read_text())
    studies = dict[str, Study]()
    found = dict[tuple[str, str, int], np.ndarray]()
    for name, study in STUDIES.items():
        facts = content[name]
        widths = tuple(int(width) for width in facts["losses"][HOW[0]])
        studies[name] = dataclasses.replace(study, widths=widths, steps=facts["steps"], rates=tuple(facts["rates"]))
        for how, by_width in facts["losses"].items():
            found |= {(name, how, int(width)): np.array(losses) for width, losses in by_width.items()}
    return studies, found


@styled("demo", "plotting losses")
def draw(studies: dict[str, Study], found: dict[tuple[str, str, int], np.ndarray], path: Path) -> None:
    """Plot the losses by learning rate: a row for each study, a column for each way, a line for each width."""
    figure, axes = subplots((10, 7), len(studies), 2, sharey="row")
    for row, (name, study) in zip(axes, studies.items(), strict=True):
        for axis, how in zip(row, reversed(HOW), strict=True):
            for width, color in zip(study.widths, shades(len(study.widths)), strict=True):
                means = geometric_mean(found[name, how, width])
                axis.plot(study.rates, means, marker="o", markersize=3, color=color, label=f"width {width}")
                best = best_rate(np.array(study.rates), found[name, how, width])
                axis.plot(best, means.min() * 0.9, marker="v", color=color)
            axis.set(xscale="log", yscale="log", title=f"{study.title}: {how}", xlabel="learning rate")
        row[0].set_ylabel("training loss")
        row[1].legend(loc="upper center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--write", action="store_true", help=f"write all losses to {RESULTS.name}")
    parser.add_argument("--raw", type=Path, help="print the tables from a file that --write wrote, and train nothing")
    parser.add_argument("--plot", type=Path, help="with --raw: the picture to draw")
    given = parser.parse_args()
    if given.raw is None:
        show(tables(given.quick, RESULTS if given.write else None))
    else:
        of_file = read(given.raw)
        show(tables_of_all(*of_file))
        if given.plot is not None:
            draw(*of_file, given.plot)
