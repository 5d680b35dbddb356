"""Steps to a target loss, by optimizer and search:  python -m benchmarks.bench_race [--quick] [--write]

The question is that of the optimization track of modded-nanogpt: how many steps does an optimizer take to reach what
optax.adamw, tuned by Optuna's TPE sampler, reaches in 300? Model and data are fixed: a small character transformer, or
a convolutional network on the digits.

Each row of a table is an optimizer and a search, which tunes it once, for 300 steps. All searches have the same number
of trials, none of which ends early, and the same confirmation. They tune the peak of the learning rate, b1, b2, weight
decay, the warmup as a fraction of the steps, and the end of the cosine after it as a fraction of the peak. All begin
with the same ranges of these. Optimizers that have other numbers are tuned in those, too, and not in what they lack.
The learning rate of the schedule-free one is constant after its warmup. It and averages of parameters are evaluated at
`eval_params`.

The setting that a search chooses then trains for each of 13 horizons, from 90 to 450 steps. The schedule stretches to
the horizon, and nothing is tuned again. All rows share 8 seeds, which no search has seen.

The target is the mean validation loss of the first row at 300 steps. The steps of a row are the smallest number at
which its mean loss is at most the target, interpolated between horizons; this needs no assumption that more steps are
better, as bisection would. In parentheses are 95 % bootstrap intervals over the seeds, in which the target is resampled
with the row. They do not contain the luck of a search, which shows in the difference between rows of one optimizer
whose searches differ only in their seed.

optax.adamw and adamjax.adamw make the same updates, so the difference between their rows is that of the searches.

`--rows adamjax.adopt adamjax.ademamix` measures some rows, besides the first. `--write` adds each row, as soon as it is
measured, to `benchmarks/results/race.json`, and prints the tables of all that the file has: rows that it has are only
measured again if `--rows` names them. `--raw FILE` does so with another file.
"""

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import adamjax
from adamjax._core.typing import Extra, GradientTransformation, PyTree, Scalar, ScalarOrSchedule
from adamjax._core.value import static_field, value
from adamjax.problems import Problem
from adamjax.tuning import Linear, Log, Space, sweep, tune
from benchmarks._measure import cores
from benchmarks._report import Curves, Table, command, show

RANGES = {
    "learning_rate": Log(1e-4, 1.0),
    "one_minus_b1": Log(0.02, 0.5),
    "one_minus_b2": Log(3e-4, 0.3),
    "weight_decay": Log(1e-5, 1.0),
    "warmup_fraction": Linear(0.0, 0.3),
    "end_fraction": Linear(0.0, 0.3),
}
SPACE = Space(**RANGES)
# The first trial, where an optimizer has no defaults of its own.
DEFAULTS = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "weight_decay": 1e-4,
    "warmup_fraction": 0.05,
    "end_fraction": 0.0,
}
SEARCHES: Mapping[str, Mapping[str, str]] = {"tune": {}, "TPE": {"sampler": "optuna"}}
PROBLEMS: Mapping[str, Problem] = {
    "text": adamjax.problems.characters(width=32, depth=1, heads=2, batch_size=8),
    "digits": adamjax.problems.digits_convnet(channels=(4, 8), batch_size=32),
}
TENTHS = range(3, 16)  # the horizons, in tenths of the steps of the reference
FRESH = 1000  # the first of the seeds that all rows share; searches use seeds below
RESAMPLES = 2000
RESULTS = Path(__file__).parent / "results" / "race.json"

Factory = Callable[..., GradientTransformation]


def scheduled(
    make: Factory,
    learning_rate: float,
    *,
    warmup_fraction: float,
    end_fraction: float,
    steps: int,
    **numbers: float,
) -> GradientTransformation:
    """Make an optimizer whose learning rate rises to a peak and falls by half a cosine, in so many steps."""
    warmup, end = round(warmup_fraction * steps), end_fraction * learning_rate
    schedule = adamjax.schedules.warmup_cosine(learning_rate, warmup_steps=warmup, total_steps=steps, end=end)
    return make(learning_rate=schedule, **numbers)


def constant_after_warmup(
    make: Factory, *, warmup_fraction: float, steps: int, **numbers: float
) -> GradientTransformation:
    """Make an optimizer with a warmup of its own."""
    return make(warmup_steps=round(warmup_fraction * steps), **numbers)


class Contestant(NamedTuple):
    """An optimizer and the search that tunes it.

    Fields:
      optimizer: Its name.
      make: Called with `learning_rate`, a schedule, and the other arguments in `space`, returns the optimizer.
      search: The name of the search.
      seed: The seed of the search.
      space: The ranges to search.
      course: Makes the optimizer of a setting: `scheduled` or `constant_after_warmup`.
    """

    optimizer: str
    make: Factory
    search: str = "tune"
    seed: int = 0
    space: Space = SPACE
    course: Factory = scheduled

    @property
    def name(self) -> str:
        return f"{self.optimizer}: {self.search}" + f", seed {self.seed}" * (self.seed > 0)

    @property
    def defaults(self) -> dict[str, Any]:
        """The default setting: that of the optimizer, as far as it has one."""
        own = {p.name: p.default for p in inspect.signature(self.make).parameters.values()}
        found = {name: own.get(name, inspect.Parameter.empty) for name in self.space.free}
        return {name: DEFAULTS[name] if x is inspect.Parameter.empty else x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Stretched:
    """Makes the optimizer of a contestant from a setting and a number of steps, to which its schedule stretches."""

    contestant: Contestant

    @property
    def __signature__(self) -> inspect.Signature:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, kind, default=x) for name, x in self.contestant.defaults.items()]
        return inspect.Signature([*parameters, inspect.Parameter("steps", kind)])

    @property
    def __wrapped__(self) -> Factory:
        # Tells `tune` the scale of the learning rates.
        return self.contestant.make

    def __call__(self, **setting: Any) -> GradientTransformation:
        made: GradientTransformation = self.contestant.course(self.contestant.make, **setting)
        return made


class Result(NamedTuple):
    """The race of one contestant.

    Fields:
      name: The name of the contestant.
      setting: What the search chose.
      losses: float[horizons, seeds], the validation loss at the end of each run.
    """

    name: str
    setting: Mapping[str, float]
    losses: np.ndarray


@value
class OptaxRule(adamjax.Transformation):
    """An optimizer of optax whose numbers are leaves, so that a population of them compiles once."""

    make: Factory = static_field()
    arguments: Mapping[str, Any]

    def _init(self, params: PyTree) -> PyTree:
        return self.make(**self.arguments).init(params)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        return self.make(**self.arguments).update(updates, state, params)


def by_optax(make: Factory, **arguments: ScalarOrSchedule) -> OptaxRule:
    return OptaxRule(make, arguments)


def radamw(learning_rate: ScalarOrSchedule, b1: Scalar, b2: Scalar, weight_decay: Scalar) -> GradientTransformation:
    decay = adamjax.add_decayed_weights(weight_decay)
    return adamjax.chain(adamjax.scale_by_radam(b1, b2), decay, adamjax.scale_by_learning_rate(learning_rate))


def muon(learning_rate: Any, b1: Scalar, b2: Scalar, weight_decay: Scalar) -> GradientTransformation:
    """Muon for matrices, and AdamW for the rest; `consistent_rms` makes one learning rate fit both."""
    numbers = {"beta": b1, "adam_b1": b1, "adam_b2": b2, "weight_decay": weight_decay}
    return optax.contrib.muon(learning_rate, **numbers, adam_weight_decay=weight_decay, consistent_rms=0.2)


def adam_h(learning_rate: ScalarOrSchedule = 1e-2, b1: Scalar = 0.9, b2: Scalar = 0.999) -> GradientTransformation:
    """Adam that holds the norms of all matrices, in place of weight decay."""
    return adamjax.hyperball(adamjax.adam(learning_rate, b1, b2))


def averaged(
    learning_rate: ScalarOrSchedule, b1: Scalar, b2: Scalar, weight_decay: Scalar, decay: Scalar = 0.999
) -> GradientTransformation:
    """AdamW with a moving average of the parameters."""
    opt = adamjax.adamw(learning_rate, b1, b2, weight_decay=weight_decay)
    return adamjax.average_params(opt, decay)


def ranges_of(*lacking: str, **own: Log | Linear) -> Space:
    """Return the space of an optimizer that lacks some numbers and has others of its own."""
    return Space(**{name: r for name, r in RANGES.items() if name not in lacking} | own)


ADEMAMIX = ranges_of(one_minus_b3=Log(1e-4, 0.1), alpha=Linear(0.0, 10.0))
MUON = ranges_of(one_minus_beta=Log(0.02, 0.5))
# The momentum is a sum of gradients, so the same steps need lower learning rates, by up to 1 - b1.
SIMPLIFIED = ranges_of(learning_rate=Log(1e-6, 0.5), one_minus_b1=Log(1e-3, 0.5), alpha=Log(0.1, 200.0))

# The first is the reference.
CONTESTANTS = (
    Contestant("optax.adamw", partial(by_optax, optax.adamw), "TPE"),
    Contestant("optax.adamw", partial(by_optax, optax.adamw), "TPE", 100),
    Contestant("adamjax.adamw", adamjax.adamw),
    Contestant("adamjax.adamw", adamjax.adamw, seed=100),
    Contestant("adamjax.adamw(amsgrad=True)", partial(adamjax.adamw, amsgrad=True)),
    Contestant("adamjax.nadamw", adamjax.nadamw),
    Contestant("adamjax.nadamw", adamjax.nadamw, seed=100),
    Contestant("adamjax.radam with weight decay", radamw),
    Contestant("adamjax.adamaxw", adamjax.adamaxw),
    Contestant("optax.lion", partial(by_optax, optax.lion)),
    Contestant("optax.contrib.muon", partial(by_optax, muon)),
    Contestant("adamjax.ademamix", adamjax.ademamix, space=ADEMAMIX),
    Contestant("adamjax.simplified_ademamix", adamjax.simplified_ademamix, space=SIMPLIFIED),
    Contestant("adamjax.adopt", adamjax.adopt),
    Contestant("adamjax.adopt", adamjax.adopt, seed=100),
    Contestant("adamjax.adam_atan2", adamjax.adam_atan2),
    Contestant("adamjax.stable_adamw", adamjax.stable_adamw),
    Contestant("adamjax.adamw(cautious=True)", partial(adamjax.adamw, cautious=True)),
    Contestant("adamjax.adamw(cautious=True)", partial(adamjax.adamw, cautious=True), seed=100),
    Contestant("adamjax.adamw(cautious_decay=True)", partial(adamjax.adamw, cautious_decay=True)),
    Contestant("adamjax.nadamw, both cautious", partial(adamjax.nadamw, cautious=True, cautious_decay=True)),
    *(
        Contestant(
            "adamjax.schedule_free_adamw",
            adamjax.schedule_free_adamw,
            seed=seed,
            space=ranges_of("end_fraction"),
            course=constant_after_warmup,
        )
        for seed in (0, 100)
    ),
    Contestant("adamjax.average_params(adamw)", averaged, space=ranges_of(one_minus_decay=Log(1e-3, 0.5))),
    Contestant("adamjax.hyperball(adam)", adam_h, space=ranges_of("weight_decay")),
    *(Contestant("adamjax.interop.optax.muon", adamjax.interop.optax.muon, seed=seed, space=MUON) for seed in (0, 100)),
)


def horizons_of(steps: int) -> list[int]:
    return [steps * tenths // 10 for tenths in TENTHS]


def run(problem: Problem, contestant: Contestant, *, trials: int, steps: int, seeds: int) -> Result:
    """Tune a contestant for `steps` steps, and train what was chosen for all horizons with fresh seeds."""
    jax.config.update("jax_num_cpu_devices", cores())
    make = Stretched(contestant)
    # A range test would not change the space.
    how: dict[str, Any] = {"space": contestant.space, "halving": False, "range_test": None, "seed": contestant.seed}
    how |= SEARCHES[contestant.search]
    setting = tune(problem, optimizer=partial(make, steps=steps), trials=trials, steps=steps, **how).best.arguments
    horizons = horizons_of(steps)
    # One program trains for all horizons. Runs of shorter ones go on, but only their losses at the horizon count.
    settings, fresh = [setting | {"steps": horizon} for horizon in horizons], range(FRESH, FRESH + seeds)
    trained = sweep(problem, settings, optimizer=make, steps=horizons[-1], seeds=fresh, points=TENTHS[-1])
    curves = trained.metrics["loss"]
    losses = np.stack([curves[i, :, tenths - 1] for i, tenths in enumerate(TENTHS)])
    return Result(contestant.name, setting, losses)


def steps_to(target: float, horizons: Sequence[int], losses: np.ndarray) -> float:
    """Return the smallest number of steps at which `losses`, interpolated between horizons, are at most `target`.

    It is the first horizon if the loss there is, and infinity if none is. A NaN is above every target.
    """
    reached = np.flatnonzero(losses <= target)
    if not reached.size:
        return math.inf
    i = int(reached[0])
    if i == 0 or not math.isfinite(losses[i - 1]):
        return float(horizons[i])
    return float(np.interp(-target, -losses[i - 1 : i + 1], horizons[i - 1 : i + 1]))


def resampled(figure: Callable[[np.ndarray], float], seeds: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a figure, a function of the indices of seeds."""
    draws = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    # Infinite figures cannot be interpolated.
    low, high = np.quantile([figure(draw) for draw in draws], (0.025, 0.975), method="nearest").tolist()
    return low, high


def tables_of(track: str, results: Sequence[Result], steps: int) -> Iterator[Table]:
    """Yield the table of a race, whose reference is the first of the results, and that of the losses."""
    horizons, reference = horizons_of(steps), results[0].losses
    at, seeds = horizons.index(steps), reference.shape[1]
    rows = []
    for name, _, losses in results:

        def to_target(chosen: np.ndarray, losses: np.ndarray = losses) -> float:
            return steps_to(reference[at, chosen].mean(), horizons, losses[:, chosen].mean(axis=1))

        def ratio(chosen: np.ndarray, losses: np.ndarray = losses) -> float:
            return float(losses[at, chosen].mean() / reference[at, chosen].mean())

        cells = []
        for figure, text in ((to_target, partial(steps_text, horizons=horizons)), (ratio, "{:.3f}".format)):
            low, high = resampled(figure, seeds)
            cells.append(f"{text(figure(np.arange(seeds)))} ({text(low)} to {text(high)})")
        rows.append([name, *cells])
    target = f"{reference[at].mean():.4f}"
    title = f"Steps to {target}, the validation loss of the first row at {steps} steps, on {track}"
    yield Table(f"race-{track}", title, ["", "steps", f"loss at {steps} steps / target"], rows)
    means = {name: losses.mean(axis=1) for name, _, losses in results}
    yield Table(
        f"race-{track}-losses",
        f"Mean validation loss by number of steps, on {track}",
        ["", *map(str, horizons)],
        [[name, *(f"{x:.4f}" for x in mean)] for name, mean in means.items()],
        picture=Curves(
            "steps", "mean validation loss", {n: dict(zip(horizons, x, strict=True)) for n, x in means.items()}
        ),
    )


def to_json(result: Result) -> dict[str, Any]:
    """Return a result in JSON's types; NaN, the loss of a run that diverged, is null."""
    losses = [[x if math.isfinite(x) else None for x in seeds] for seeds in result.losses.tolist()]
    return {"name": result.name, "setting": dict(result.setting), "losses": losses}


def steps_text(x: float, horizons: Sequence[int]) -> str:
    if math.isinf(x):
        return f"over {horizons[-1]}"
    return f"{x:.0f}" if x > horizons[0] else f"at most {x:.0f}"


def from_json(content: Mapping[str, Any]) -> Result:
    return Result(content["name"], content["setting"], np.array(content["losses"], float))  # None becomes NaN


def read(raw: Path | None, conditions: Mapping[str, Any]) -> dict[str, list[Result]]:
    """Return the results of each track in a file, which must be of the same conditions."""
    if raw is None or not raw.exists():
        return {}
    content = json.loads(raw.read_text())
    found = {name: content.get(name) for name in conditions}
    if found != conditions:
        raise ValueError(f"{raw} has results of {found}, these would be of {dict(conditions)}: name another file")
    return {track: [from_json(x) for x in results] for track, results in content["tracks"].items()}


def merged(results: Sequence[Result], new: Result) -> list[Result]:
    """Return the results with a new one in place of its namesake, in the order of the contestants."""
    names = [contestant.name for contestant in CONTESTANTS]
    return sorted([*(r for r in results if r.name != new.name), new], key=lambda r: names.index(r.name))


def tables(quick: bool, trials: int = 32, raw: Path | None = None, rows: Sequence[str] = ()) -> Iterator[Table]:
    """Yield two tables for each problem; add what is measured to `raw`.

    Args:
      quick: Whether to use small sizes.
      trials: Of each search.
      raw: The file, or None.
      rows: Names of optimizers to measure, also where the file has them; none for all that it lacks.
    """
    trials, steps, seeds = (4, 20, 2) if quick else (trials, 300, 8)
    tracks, usual = (["digits"], CONTESTANTS[:3:2]) if quick else (list(PROBLEMS), CONTESTANTS)
    named = [c for c in CONTESTANTS if c.optimizer in rows]
    conditions = {"trials": trials, "steps": steps, "seeds": seeds, "horizons": horizons_of(steps)}
    results = read(raw, conditions)
    for track in tracks:
        have = {result.name for result in results.setdefault(track, [])}
        chosen = [c for c in CONTESTANTS if c in named or c.name not in have]
        for contestant in (c for c in chosen if c in (named or usual) or c is CONTESTANTS[0]):
            found = run(PROBLEMS[track], contestant, trials=trials, steps=steps, seeds=seeds)
            results[track] = merged(results[track], found)
            print(track, found.name, found.setting, sep=" | ", file=sys.stderr, flush=True)
            if raw is not None:
                content = conditions | {"tracks": {name: [to_json(r) for r in rs] for name, rs in results.items()}}
                raw.write_text(json.dumps(content, indent=1) + "\n")
        yield from tables_of(track, results[track], steps)


if __name__ == "__main__":
    optimizers = list(dict.fromkeys(contestant.optimizer for contestant in CONTESTANTS))
    known = f"optimizers to measure, besides {optimizers[0]}: {'; '.join(optimizers)} (default: all)"
    parser = command(__doc__)
    parser.add_argument("--trials", type=int, default=32, help="trials of each search (default: 32)")
    parser.add_argument("--rows", nargs="+", choices=optimizers, default=[], metavar="NAME", help=known)
    parser.add_argument("--write", action="store_true", help=f"add all losses to {RESULTS.name}")
    parser.add_argument("--raw", type=Path, help="the file of --write instead: settings, and the losses of all seeds")
    given = parser.parse_args()
    show(tables(given.quick, given.trials, given.raw or (RESULTS if given.write else None), given.rows))
