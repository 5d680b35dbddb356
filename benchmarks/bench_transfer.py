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
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax._core.typing import PyTree
from adamjax._transforms.base import Transformation
from adamjax.problems import Problem
from adamjax.problems._digits import Digits
from adamjax.problems._text import Characters
from adamjax.tuning import sweep
from benchmarks._machine import machine
from benchmarks._report import Curves, Table, command, show

RESULTS = Path(__file__).parent / "results" / "transfer.json"


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
        return Digits(hidden=(width, width), batch_size=64)


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
    "digits": Perceptrons("perceptron, digits", (32, 64, 128, 256, 512, 1024), tuple(2.0**-k for k in range(12, 2, -1)), 200, 3, "rate"),
    "characters": Transformers("transformer, characters", (32, 64, 128, 256), tuple(2.0**-k for k in range(11, 3, -1)), 200, 2, "multiplier"),
}  # fmt: skip
QUICK = {"widths": (8, 16), "steps": 8, "seeds": 1}


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


def best_rate(rates: np.ndarray, found: np.ndarray) -> float | None:
    """The minimum of a parabola through the losses within a factor of 4 of the best rate; None if that is at an end."""
    with np.errstate(over="ignore", invalid="ignore"):
        logs = np.log(found).mean(axis=1)
    best = int(np.nanargmin(np.where(np.isfinite(logs), logs, np.nan)))
    near = [i for i in range(best - 2, best + 3) if 0 <= i < len(rates) and np.isfinite(logs[i])]
    if best in (0, len(rates) - 1) or len(near) < 3:
        return None
    a, b, _ = np.polyfit(np.log2(rates[near]), logs[near], 2)
    return float(2 ** np.clip(-b / (2 * a), *np.log2(rates[[best - 1, best + 1]]))) if a > 0 else float(rates[best])


def tables(quick: bool, out: Path | None = None) -> Iterator[Table]:
    results: dict[str, Any] = {"machine": machine()}
    for name, study in STUDIES.items():
        if quick:
            study = dataclasses.replace(study, **QUICK, rates=study.rates[::3])
        rates = np.array(study.rates)
        best: dict[str, dict[int, float | None]] = {"with transfer": {}, "without": {}}
        curves: dict[str, dict[float, float]] = {}
        raw: dict[str, Any] = {"rates": study.rates, "steps": study.steps, "losses": {}}
        for how, by_width in best.items():
            for width in study.widths:
                found = losses(study, width, how == "with transfer")
                print(name, how, width, np.exp(np.log(found).mean(1)).round(4).tolist(), file=sys.stderr, flush=True)
                by_width[width] = best_rate(rates, found)
                curves[f"width {width}: {how}"] = dict(zip(study.rates, found.mean(axis=1).tolist(), strict=True))
                raw["losses"].setdefault(how, {})[width] = found.tolist()
        raw["best"] = best
        results[name] = raw
        rows = [
            [how, *(_ratio(by_width, width, study.widths[0]) for width in study.widths)]
            for how, by_width in best.items()
        ]
        smallest = best["with transfer"][study.widths[0]]
        shown = "none inside of the grid" if smallest is None else f"{smallest:.2g}"
        title = f"{study.title}: best learning rate over that of width {study.widths[0]} ({shown})"
        columns = ["", *(f"width {width}" for width in study.widths)]
        finite = {line: {x: y for x, y in points.items() if np.isfinite(y)} for line, points in curves.items()}
        yield Table(f"transfer-{name}", title, columns, rows, picture=Curves("learning rate", "training loss", finite))
        rows = [
            [how, *(_cost(study, raw["losses"][how], width) for width in study.widths)] for how in best
        ]  # fmt: skip
        title = f"{study.title}: loss at the best rate of width {study.widths[0]}, over that at the best of each width"
        yield Table(f"transfer-{name}-loss", title, columns, rows)
    if out is not None:
        out.write_text(json.dumps(results, indent=None) + "\n")


def _ratio(by_width: dict[int, float | None], width: int, first: int) -> float | None:
    a, b = by_width[first], by_width[width]
    return None if a is None or b is None else b / a


def _cost(study: Study, found: dict[int, Any], width: int) -> float:
    """The loss at the grid's best rate of the smallest width, over the least one."""
    with np.errstate(over="ignore", invalid="ignore"):
        small, large = (np.log(np.array(found[w])).mean(axis=1) for w in (study.widths[0], width))
    return float(np.exp(large[np.argmin(small)] - large.min()))


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--write", action="store_true", help=f"write all losses to {RESULTS.name}")
    given = parser.parse_args()
    show(tables(given.quick, RESULTS if given.write else None))
