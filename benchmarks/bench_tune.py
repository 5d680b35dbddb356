"""Searches of Adam's hyperparameters on problems that nobody tuned for:

    python -m benchmarks.bench_tune [--quick] [--raw FILE] [--methods NAME ...] [--seeds N]

On each of 14 problems, none of which `tune` was made on, each search tries 16 or 64 settings. All have the same ranges,
which are wide and include a schedule of the learning rate, and the same confirmation: the best 8 train with 2 fresh
seeds, the best 5 of them with 2 more, and the best 3 of those with 4 more. The setting with the lowest mean is chosen.
16 other seeds judge it.

Searches are compared by the ratio of these losses. A figure is the geometric mean of the ratio over problems and the
seeds of the search. The interval holds 95 % of the means over problems drawn again with replacement. A run that
diverges counts as ten times the loss of the defaults.

The range test of `tune` counts as one of its trials. Searches by Optuna know each loss before they propose the next
setting; `tune` proposes 4 or 8 at once, to train them in one program.

The raw results are a JSON file: what each search chose, and the losses of all judging seeds. With `--raw`, the results
that the file holds are not measured again, so the tables can be printed without running.
"""

import itertools
import json
import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.problems import Problem
from adamjax.problems._task import Task
from adamjax.training import keys_of
from adamjax.tuning._courses import Scheduled
from adamjax.tuning._population import SeedInputs, advance_member, evaluate_member, init_member
from adamjax.tuning._space import Setting
from adamjax.tuning._sweep import make_optimizer
from benchmarks import _searches
from benchmarks._held_out import HELD_OUT
from benchmarks._measure import pool_of_cores
from benchmarks._report import Table, command, show
from benchmarks._searches import ABLATIONS, BUDGETS, METHODS, OPTIONAL, OURS, RIVALS, Method, Question, Run

SEEDS = 5  # of the searches
APART = 1000  # the distance between seeds of searches, so that none uses the seeds that confirm another
JUDGES = range(100_000, 100_016)
DIVERGED = 10.0  # times the loss of the defaults
RESAMPLES = 10_000
COMPARED = ("tune", "defaults", "random")  # which all tables need
QUICK = ("Optuna, TPE", "OptList", "constant rate", "halving, twice the trials")

Chosen = tuple[int, Setting, float]  # the number of trials, what was chosen, and its loss in the search
Job = tuple[str, int, Sequence[int]]  # a method, the seed of its search, and the numbers of trials to choose at


class Result(NamedTuple):
    """The setting that a search chose.

    Fields:
      trials: Number of trials of the search.
      score: The loss by which the search found it, of one seed.
      losses: The losses of the judging seeds; None for a run that diverged.
    """

    problem: str
    method: str
    seed: int
    trials: int
    setting: Setting
    score: float | None
    losses: list[float | None]


class Runs:
    """Trains a problem with any settings and seeds, many at once, and remembers the losses."""

    SIZES = (8, 64)  # of the compiled programs

    def __init__(self, problem: Problem, steps: int) -> None:
        self._factory = Scheduled(_searches.OPTIMIZER, "cosine", steps)
        self._known: dict[tuple[tuple[tuple[str, float], ...], int], np.ndarray] = {}
        task = Task(problem)
        stops = [0, *(round(fraction * steps) for fraction in _searches.POINTS)]

        def losses(opt: Any, seed: jax.Array) -> list[jax.Array]:
            keys = keys_of(seed)
            member, found = init_member(task, opt, keys, None), []
            for first, last in itertools.pairwise(stops):
                limits = jnp.int32(first), jnp.int32(last)
                member, _ = advance_member(task, *limits, opt, SeedInputs(keys, ()), member)
                found.append(evaluate_member(task, opt, keys, member)["loss"])
            return found

        self._program = jax.jit(jax.vmap(losses))

    def losses(self, runs: Sequence[Run]) -> np.ndarray:
        """float[runs, points]: the validation losses, infinite where a run has diverged."""
        keys = [(tuple(sorted(setting.items())), seed) for setting, seed in runs]
        missing = {key: run for key, run in zip(keys, runs, strict=True) if key not in self._known}
        left = list(missing.items())
        while left:
            size = next((n for n in self.SIZES if n >= len(left)), self.SIZES[-1])
            chunk, left = left[:size], left[size:]
            self._train(chunk, size)
        return np.array([self._known[key] for key in keys]).reshape(len(runs), len(_searches.POINTS))

    def _train(self, chunk: Sequence[tuple[Any, Run]], size: int) -> None:
        padded = [run for _, run in chunk] + [chunk[-1][1]] * (size - len(chunk))
        opts = [
            make_optimizer(self._factory, {**_searches.DEFAULTS, **setting}, i) for i, (setting, _) in enumerate(padded)
        ]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *opts)
        seeds = np.array([seed for _, seed in padded], np.int32)
        found = np.stack(self._program(stacked, seeds), 1).astype(float)
        found = np.where(np.isfinite(found), found, math.inf)
        self._known |= zip((key for key, _ in chunk), found, strict=False)


def contest(
    method: Method, question: Question, budgets: Sequence[int]
) -> Generator[list[Run], np.ndarray, list[Chosen]]:
    """Search, then confirm the best of the first trials for each budget; yield the runs whose losses are needed."""
    settings, scores = list[Setting](), list[float]()
    search, losses = method.propose(question), None
    try:
        while True:
            asked = next(search) if losses is None else search.send(losses)
            losses = yield asked
            settings += [setting for setting, _ in asked]
            scores += losses[:, -1].tolist()
    except StopIteration:
        pass
    chosen = []
    for trials in budgets:
        count = len(settings) if method.plans else min(trials, len(settings))
        leaders = list(np.argsort(scores[:count], kind="stable"))
        before = 0
        means = np.zeros(len(settings))
        for keep, seeds in method.confirm:
            leaders = leaders[:keep]
            fresh = [question.seed + 1 + i for i in range(before, seeds)]
            found = yield [(settings[i], seed) for i in leaders for seed in fresh]
            means[leaders] += found[:, -1].reshape(len(leaders), -1).sum(1)
            leaders.sort(key=lambda i: means[i])
            before = seeds
        chosen.append((trials, settings[leaders[0]], scores[leaders[0]]))
    return chosen


def run(name: str, problem: Problem, steps: int, jobs: Sequence[Job]) -> list[Result]:
    """Carry out searches of one problem side by side, and judge what they choose."""
    runs = Runs(problem, steps)
    going, found = {}, list[tuple[str, int, Chosen]]()
    for method, seed, budgets in jobs:
        going[method, seed, tuple(budgets)] = contest(
            METHODS[method], Question(problem, steps, seed * APART, max(budgets)), budgets
        )
    asked = {job: next(search) for job, search in going.items()}
    while asked:
        runs.losses([x for wanted in asked.values() for x in wanted])  # all at once, to fill the programs
        for job, wanted in list(asked.items()):
            try:
                asked[job] = going[job].send(runs.losses(wanted))
            except StopIteration as end:
                del asked[job]
                found += [(*job[:2], chosen) for chosen in end.value]
    runs.losses([(setting, judge) for _, _, (_, setting, _) in found for judge in JUDGES])
    results = []
    for method, seed, (trials, setting, score) in found:
        losses = runs.losses([(setting, judge) for judge in JUDGES])[:, -1].tolist()
        shown = {argument: short(x) for argument, x in setting.items()}
        results.append(Result(name, method, seed, trials, shown, finite(score), [finite(x) for x in losses]))
    return results


def finite(x: float) -> float | None:
    return short(x) if math.isfinite(x) else None


def short(x: float) -> float:
    return float(f"{x:.4g}")


def missing(
    problems: Sequence[str], methods: Sequence[str], seeds: int, budgets: Sequence[int], known: Sequence[Result]
) -> dict[str, list[Job]]:
    """Return the searches to make on each problem: all but those whose results are known."""
    have = {(r.problem, r.method, r.seed, r.trials) for r in known}
    jobs: dict[str, list[Job]] = {}
    for problem, name, seed in itertools.product(problems, methods, range(seeds)):
        method = METHODS[name]
        wanted = [b for b in budgets_of(method, budgets) if (problem, name, seed, b) not in have]
        if wanted:
            searches = [[b] for b in wanted] if method.plans else [wanted]
            jobs.setdefault(problem, []).extend((name, seed, x) for x in searches)
    return jobs


def budgets_of(method: Method, budgets: Sequence[int]) -> Sequence[int]:
    return budgets if method.budgets == BUDGETS else method.budgets


def measure(jobs: Mapping[str, Sequence[Job]], steps: int | None) -> Iterator[list[Result]]:
    """Yield the results of each problem, as soon as they are there; each problem runs on a core of its own."""
    with pool_of_cores() as pool:
        asked = [pool.submit(run_by_name, name, steps, todo) for name, todo in jobs.items()]
        for done in as_completed(asked):
            yield done.result()


def run_by_name(name: str, steps: int | None, jobs: Sequence[Job]) -> list[Result]:
    problem, usual = HELD_OUT[name]
    return run(name, problem, steps or usual, jobs)


class Losses:
    """Logarithms of the losses of what searches chose, by problem, method, seed and number of trials."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.problems = sorted({r.problem for r in results})
        worst = {r.problem: DIVERGED * mean(r.losses, math.nan) for r in results if r.method == "defaults"}
        self._logs = {
            (r.problem, r.method, r.seed, r.trials): math.log(mean(r.losses, worst[r.problem])) for r in results
        }

    def logs(self, problem: str, method: str, trials: int) -> np.ndarray:
        """float[seeds]"""
        trials = METHODS[method].budgets[0] if METHODS[method].budgets != BUDGETS else trials
        seeds = itertools.takewhile(lambda seed: (problem, method, seed, trials) in self._logs, itertools.count())
        return np.array([self._logs[problem, method, seed, trials] for seed in seeds])

    def ratios(self, first: str, second: str, trials: int) -> np.ndarray:
        """float[problems, seeds]: logarithms of the losses of one method over those of another."""
        pairs = [(self.logs(p, first, trials), self.logs(p, second, trials)) for p in self.problems]
        count = min(min(len(a), len(b)) for a, b in pairs)
        return np.array([a[:count] - b[:count] for a, b in pairs])


def mean(losses: Sequence[float | None], diverged: float) -> float:
    return float(np.mean([diverged if x is None else x for x in losses]))


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the geometric mean, over problems drawn again with replacement."""
    means, rng = ratios.mean(1), np.random.default_rng(0)
    drawn = means[rng.integers(0, len(means), (RESAMPLES, len(means)))].mean(1)
    low, high = np.exp(np.quantile(drawn, [0.025, 0.975]))
    return float(low), float(high)


def ratio_text(ratios: np.ndarray) -> str:
    low, high = interval(ratios)
    return f"{np.exp(ratios.mean()):.2f} ({low:.2f} to {high:.2f})"


def clearly_worse(ratios: np.ndarray) -> int | None:
    """Return on how many problems the ratio is above 1 by more than twice its standard error; None for one seed."""
    if ratios.shape[1] == 1:
        return None
    errors = ratios.std(1, ddof=1) / math.sqrt(ratios.shape[1])
    return int((ratios.mean(1) > 2 * errors).sum())


def tables_of(results: Sequence[Result], budgets: Sequence[int]) -> Iterator[Table]:
    losses, have = Losses(results), {r.method for r in results}
    rows: list[list[Any]]
    rivals = [name for name in METHODS if name in have and name not in ABLATIONS and name not in OURS]
    where = f"{len(losses.problems)} problems"
    for trials in budgets:
        compared = ["tune", *(name for name in rivals if trials in budgets_of(METHODS[name], budgets))]
        # Those that are optional may have fewer seeds.
        rank = ranks(losses, [name for name in compared if name not in OPTIONAL], trials)
        rows = [["tune", None, None, None, None, rank["tune"]]]
        for name in rivals:
            if name not in compared and min(METHODS[name].budgets) >= budgets[0]:
                continue  # it has other numbers of trials
            ratios = losses.ratios("tune", name, trials)
            won, worst = f"{(ratios < 0).sum()} of {ratios.size}", float(np.exp(ratios.mean(1).max()))
            rows.append([name, ratio_text(ratios), won, worst, clearly_worse(ratios), rank.get(name)])
        columns = ["", "loss of tune / its loss", "tune wins", "worst problem", "problems lost clearly", "mean rank"]
        yield Table(f"tune-{trials}", f"{trials} trials, {where}", columns, rows)
    variants = [name for name in ABLATIONS if name in have]
    rows = [[name, *(ratio_text(losses.ratios(name, "tune", trials)) for trials in budgets)] for name in variants]
    yield Table("tune-parts", f"Loss without a part / loss of tune, {where}", ["", *map(str, budgets)], rows)
    rows = []
    before = "stages, constant rate, 5 best, 3 seeds"
    for problem in losses.problems:
        row: list[Any] = [problem]
        for trials in budgets:
            here = {name: losses.logs(problem, name, trials).mean() for name in ("tune", "random")}
            row += [f"{math.exp(here['tune']):.3g}", math.exp(here["tune"] - here["random"])]
        if before in have:
            few, many = (losses.logs(problem, *of).mean() for of in (("tune", budgets[0]), (before, budgets[-1])))
            row.append(math.exp(few - many))
        rows.append([*row, f"{math.exp(losses.logs(problem, 'defaults', 1).mean()):.3g}"])
    heads = [f(trials) for trials in budgets for f in ("tune, {}".format, "over random, {}".format)]
    heads += [f"tune, {budgets[0]} over stages, {budgets[-1]}"] * (before in have)
    yield Table("tune-problems", "Loss by problem", ["", *heads, "defaults"], rows)


def ranks(losses: Losses, names: Sequence[str], trials: int) -> dict[str, float]:
    """Return the mean rank of each of the methods, among them, over problems and seeds."""
    logs = [np.array([losses.logs(p, name, trials) for p in losses.problems]) for name in names]
    count = min(x.shape[1] for x in logs)
    order = np.argsort(np.argsort([x[:, :count] for x in logs], axis=0, kind="stable"), axis=0) + 1
    return dict(zip(names, order.mean((1, 2)).tolist(), strict=True))


def tables(quick: bool, raw: Path | None = None, methods: Sequence[str] = (), seeds: int = SEEDS) -> Iterator[Table]:
    """Yield the tables; add what is measured to `raw`."""
    usual = QUICK if quick else (*RIVALS, *ABLATIONS)
    names = list(dict.fromkeys([*COMPARED, *(methods or usual)]))
    problems, seeds, budgets = (["iris, raw", "sets"], 1, (4,)) if quick else (list(HELD_OUT), seeds, BUDGETS)
    results = list[Result]()
    if raw is not None and raw.exists():
        results = [Result(**row) for row in json.loads(raw.read_text())["results"]]
    jobs = missing(problems, names, seeds, budgets, results)
    for found in measure(jobs, 20 if quick else None):
        results += found
        print(f"{found[0].problem}: {len(found)} results", file=sys.stderr, flush=True)
        if raw is not None:
            ordered = sorted(results, key=lambda r: r[:4])
            rows = ",\n".join(json.dumps(r._asdict(), separators=(",", ":")) for r in ordered)
            raw.write_text(f'{{"results": [\n{rows}\n]}}\n')
    yield from tables_of(results, budgets)


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--raw", type=Path, help="JSON file of raw results, to read and to add to")
    known = f"searches to make besides {', '.join(COMPARED)}: {'; '.join(METHODS)} (default: all but google-vizier)"
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[], metavar="NAME", help=known)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds of each search (default: {SEEDS})")
    given = parser.parse_args()
    show(tables(given.quick, given.raw, given.methods, given.seeds))
