"""The search: it says which settings to try, is told the results, and reports."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Self

from adamjax._core import checks
from adamjax._core.processes import broadcast, is_first
from adamjax.optimizers import adamw
from adamjax.tuning._courses import OWN, TYPICAL, Scheduled, is_scheduled, with_course
from adamjax.tuning._journal import CONFIRM, DEFAULTS, Candidate, Journal, TrialRecord, json_setting
from adamjax.tuning._model_search import model_search, round_size
from adamjax.tuning._optuna import Sampler, Storage, open_study, optuna_search
from adamjax.tuning._range_test import LrRange
from adamjax.tuning._ranges import from_adam
from adamjax.tuning._report import Report, run_facts
from adamjax.tuning._space import Choice, Log, OptimizerFactory, Setting, Space
from adamjax.tuning._spec import (
    RACE,
    Confirm,
    Spec,
    Subject,
    check_sampler,
    has_half_precision,
    is_problem,
    search_space,
)
from adamjax.tuning._strategy import (
    Result,
    Round,
    Stages,
    Strategy,
    plan_stages,
    staged_search,
)
from adamjax.tuning._sweep import make_optimizer, resolve_mode
from adamjax.tuning._trial import NO_MEDIANS, Medians, Trial, Value

MARGIN = 3.0  # factor by which the search of the learning rate exceeds the band of the range test
CONSTANT_RATES = (0.03, 0.1, 0.3)  # relative to the peak of a schedule: what to confirm beside it

Run = tuple[int, int]  # number of the setting, and seed
Folder = str | Path | None | Callable[[], Path]


class Search:
    """A search to ask for trials and to tell their results: `tune`, for those who own the loop over trials.

    The first trial is that of the defaults. Then come the rounds that `tune` describes, and at the end the trials that
    confirm the best settings with fresh seeds. Any number of trials may be asked before they are told, and they may be
    told in any order. A round is chosen by the results known when its first trial is asked: those that are missing
    count as unknown.

    Args:
      space, optimizer, trials, stages, sampler, storage, confirm, schedule, metric, mode, seed: See `tune`.
      steps: A number that each trial finds as its `budget`; None for no such number.
      halving: "auto" or True: `Trial.report` ends trials that are worse than the others. False: none end early.
      range_test: A range test of the learning rate, to search around its band unless a `space` is given; see `narrow`.
      problem: A problem or an objective that the trials train, or a name for it, which the report has.
      out: Folder that keeps each trial as soon as it is told, or a function that makes it; None to keep nothing.
      resume: Whether to continue a search that the folder holds. Trials that it was told are not asked again; others
        are, with the same number, arguments and seed. If False, such a folder is refused.

    Raises:
      ValueError: An argument is out of range, `mode` is missing or unknown, Optuna refuses the storage, or the folder
        holds another search.
      TypeError: An argument has a wrong type, or `optimizer` does not take a setting.
      FileExistsError: The folder holds a search, and `resume` is False; or it is not a folder.
      DamagedFileError: A file of the folder is damaged; the message names it, and the line.
      FolderInUseError: Another process has a search or a tuning with this folder.
      ImportError: A package of the extra `tune` is not installed.

    >>> import math
    >>> from adamjax.tuning import Search
    >>> search = Search(trials=16, confirm=None)
    >>> for trial in search:  # the same as: while (trial := search.ask()) is not None
    ...     search.tell(trial, abs(math.log10(trial.arguments["learning_rate"] / 0.01)))
    >>> 0.005 < search.report().best.arguments["learning_rate"] < 0.02
    True
    """

    def __init__(
        self,
        space: Space | None = None,
        *,
        optimizer: OptimizerFactory = adamw,
        trials: int = 64,
        steps: int | None = None,
        stages: Stages = "adam",
        sampler: Sampler = "auto",
        storage: Storage = None,
        confirm: Confirm = RACE,
        halving: bool | str = "auto",
        schedule: str = "auto",
        range_test: LrRange | None = None,
        problem: Subject = "search",
        out: Folder = None,
        resume: bool = True,
        metric: str = "loss",
        mode: str | None = None,
        seed: int = 0,
    ) -> None:
        checks.choice("halving", halving, (True, False, "auto"))
        checks.choice("resume", resume, (False, True))
        checks.function("optimizer", optimizer)
        check_sampler(sampler, storage)
        _check_range_test(range_test)
        if is_problem(problem) and not callable(getattr(problem, "init", None)):
            kinds = "problem must be a problem, an objective, or a name for what is trained"
            raise TypeError(f"Invalid problem value: {problem!r}; {kinds}")
        if not isinstance(metric, str):
            raise TypeError(f"Invalid metric value: {metric!r}; metric must be the name of a metric")
        half = is_problem(problem) and has_half_precision(problem)
        steps = None if steps is None else checks.count("steps", steps)
        # The steps of an objective may be epochs: only those who name a course say that they are updates.
        is_known = is_problem(problem) or schedule != "auto"
        scheduled = with_course(optimizer, schedule, steps if is_known else None)
        rules = {"half": half, "structures": is_problem(problem)}
        searched = search_space(scheduled, space, stages, **rules)
        if isinstance(scheduled, Scheduled) and "learning_rate" in searched.free:
            optimizer = scheduled
            typical = {n: Choice(x) for n, x in TYPICAL.items() if n not in searched.ranges}
            searched = Space.of(searched.ranges | typical)
        elif isinstance(scheduled, Scheduled):
            searched = search_space(optimizer, space, stages, **rules)
        mode = resolve_mode(metric, mode)
        spec = Spec(problem, optimizer, searched, stages, sampler, trials, steps, confirm, metric, mode, seed)
        self.spec: Spec = spec
        name = f"adamjax-{spec.digest}"
        self._study = (
            None if spec.is_staged or spec.has_model else open_study(sampler, storage, name, mode=mode, seed=seed)
        )
        self.journal: Journal = Journal(_made(out), spec.question, resume=resume)
        self._prunes, self._narrows = halving is not False, space is None
        self._strategy: Strategy | None = None
        self._exhausted = False
        self._rounds = 0  # that the strategy has proposed
        self._proposed: list[Candidate] = []  # by it, in order
        self._confirming: list[Candidate] = []
        self._raced = 0  # rounds of the confirmation
        self._queue = deque[Candidate]()  # what is to be asked next
        self._asked: dict[Run, Candidate] = {}
        self._ended: dict[Run, TrialRecord] = {}
        try:
            self._decide_defaults(json_setting(spec.defaults))
            if range_test is not None:
                self.narrow(range_test)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write to the folder, as the end of a with block does.

        No trial can be told after that. The same happens once nothing refers to the search any more.
        """
        self.journal.close()

    def _decide_defaults(self, defaults: Setting) -> None:
        before = self.journal.decisions.get("defaults", defaults)
        if self.journal.has_trials and before != defaults:
            raise ValueError(
                f"{self.journal.path} holds another tuning: its defaults are {before}, here they are {defaults}; "
                "choose another folder"
            )
        self.journal.decide(defaults=defaults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The number of trials, those that confirm included; fewer are asked if the best include the defaults."""
        spec, before = self.spec, [0, *(seeds for _, seeds in self.spec.race)]
        extra = [1 + (_constant_rates(i) if spec.has_constant_rates else 0) for i in range(len(spec.race))]
        counts = zip(spec.race, extra, before, strict=False)
        return spec.trials + sum((n + x) * (seeds - b) for (n, seeds), x, b in counts)

    def ask(self) -> Trial | None:
        """Return the next trial to run; None if the search and its confirmation have been handed out.

        Raises:
          RuntimeError: Only the trials that confirm are left, and trials of the search have not been told.
        """
        if (defaults := self.ask_defaults()) is not None:
            return defaults
        while (asked := self._from_queue(1)) == [] and (fresh := self.next_round()):
            self._queue.extend(fresh)
        return asked[0] if asked else None

    def ask_defaults(self) -> Trial | None:
        """Return the trial of the defaults, the first; None if any trial has been asked, or it has ended before."""
        if self._proposed:
            return None
        self._queue.extend(self._propose([self.spec.defaults], DEFAULTS, self.spec.seed))
        asked = self._from_queue(1)
        return asked[0] if asked else None

    def ask_round(self) -> list[Trial]:
        """Return all trials that can be asked before results are needed; none if all have been handed out.

        Results of some decide nothing about the others, so that they can run side by side.

        Raises:
          RuntimeError: Only the trials that confirm are left, and trials of the search have not been told.
        """
        while (asked := self._from_queue(len(self._queue))) == [] and (fresh := self.next_round()):
            self._queue.extend(fresh)
        return asked

    def __iter__(self) -> Iterator[Trial]:
        while (trial := self.ask()) is not None:
            yield trial

    def tell(self, trial: Trial, value: Value, *, error: str = "") -> None:
        """Tell the result of a trial, which is kept at once.

        Args:
          trial: The trial, or a copy of it that another process has pickled with what it reported.
          value: The metric at the end, a number; a dict of metrics, the one that settings are judged by among them;
            None for a trial that failed; or "pruned". A metric that is NaN or infinite makes it a failed trial.
          error: The reason why a trial failed, for the report.

        Raises:
          ValueError: The trial is not one of this search, or has been told before; or the metric is missing.
          TypeError: `trial` is not a `Trial`, or a value is not a number.
        """
        if not isinstance(trial, Trial):
            raise TypeError(f"Invalid trial value: {trial!r}; trial must be one that ask() returned")
        run = (trial.number, trial.seed)
        asked = self._asked.get(run)
        if asked is None or (trial._search, trial.stage) != (self.spec.digest, asked.stage):
            raise ValueError(f"{trial} is not a trial of this search: tell the search that asked for it")
        if run in self._ended:
            raise ValueError(f"{trial} has been told before: a trial has one result")
        if not isinstance(error, str):
            raise TypeError(f"Invalid error value: {error!r}; error must be a text")
        if isinstance(value, str) and value != "pruned":
            raise ValueError(f'Invalid value value: {value!r}; value must be a number, a dict, None or "pruned"')
        # Not the trial's own arguments: objectives may have changed them.
        self.record(dataclasses.replace(trial.record(value, error), setting=asked.setting))

    def record(self, *records: TrialRecord) -> None:
        """Keep the records of runs that have ended."""
        self.journal.write(records)
        self._ended |= {(record.number, record.seed): record for record in records}

    def ended(self, number: int, seed: int) -> TrialRecord | None:
        """Return the record of a run, also one that the folder held; None if it has not ended."""
        return self._ended.get((number, seed))

    def narrow(self, range_test: LrRange | None) -> None:
        """Search learning rates around the band of a range test, unless a `space` was given.

        It can be called until the second trial is asked. None decides that there is no range test.

        Raises:
          RuntimeError: The second trial has been asked.
          ValueError: The folder holds the search with another range test.
          TypeError: `range_test` is not an `LrRange`.
        """
        _check_range_test(range_test)
        if self._strategy is not None:
            raise RuntimeError("the search goes on without a range test: call narrow before the second trial is asked")
        content = range_test and range_test.to_json()
        if self.journal.decisions.get("range_test", content) != content:
            raise ValueError("Invalid range_test value: the search has another one already; choose another folder")
        self.journal.decide(range_test=content)

    @property
    def ended_count(self) -> int:
        """The number of trials that have ended."""
        return len(self._ended)

    def report(self) -> Report:
        """Return the report of the trials told so far."""
        return self._report(self.journal.decisions.get("facts") or run_facts())

    def _report(self, facts: dict[str, str]) -> Report:
        decisions = self.journal.decisions
        runs = [(c.number, c.seed) for c in (*self._proposed, *self._confirming)]
        ended = [self._ended[run] for run in runs if run in self._ended]
        known = (decisions.get("explored", {}), decisions.get("execution", ""), decisions["notes"])
        place = (self.spec.question, ended, self.spec.defaults, self.spec.optimizer, self._range_test)
        return Report(*place, *known, facts)

    def plan(self) -> tuple[int, int]:
        """Return the number of trials of the largest round, besides the defaults, and the number of rounds."""
        trials = self.spec.trials - 1
        if not self.spec.is_staged:
            largest = round_size(self.spec.trials)
            return largest, math.ceil(trials / largest)
        stages = plan_stages(self._searched_space(), self.spec.stages, trials)
        return max((s.trials for s in stages), default=0), len(stages)

    def next_round(self) -> list[Candidate]:
        """Return the runs of the next round, those that the folder holds included; none after the last round."""
        while not self._exhausted:
            try:
                proposed = self._strategy.send(self._results()) if self._strategy else next(self._begin())
            except StopIteration:
                self._exhausted = True
                break
            self._rounds += 1
            if fresh := self._propose_round(proposed):
                return fresh
            if self._untold():
                break
        return self._confirmation()

    def _begin(self) -> Strategy:
        """Begin the search of all but the defaults."""
        spec, space = self.spec, self._searched_space()
        self.journal.decide(range_test=self.journal.decisions.get("range_test"))
        trials, at_once = spec.trials - 1, self.plan()[0]
        if self._study is not None:
            self._strategy = optuna_search(space, spec.defaults, self._study, trials=trials, at_once=at_once)
        elif spec.has_model:
            self._strategy = model_search(
                space,
                spec.defaults,
                trials=trials,
                at_once=at_once,
                seed=spec.seed,
                valid=self._is_valid,
                from_adam=from_adam(spec.optimizer),
            )
        else:
            stages, method = plan_stages(space, spec.stages, trials), spec.sampler
            method = "halton" if method == "auto" else method
            place = (space, spec.defaults, stages)
            start = spec.defaults | {name: x for name, x in TYPICAL.items() if name in space.free}
            self._strategy = staged_search(*place, start=start, method=method, seed=spec.seed, valid=self._is_valid)
        return self._strategy

    @property
    def _range_test(self) -> LrRange | None:
        content = self.journal.decisions.get("range_test")
        return content and LrRange.from_json(content)

    def _searched_space(self) -> Space:
        """Return the space to search, with learning rates around the band of the range test."""
        spec, range_test = self.spec, self._range_test
        if not self._narrows or range_test is None or not range_test.suggestions:
            return spec.space
        low, high = range_test.band[0] / MARGIN, range_test.band[1] * MARGIN
        if not spec.is_staged:  # all of the range is searched at once, so it is only widened
            least, most = spec.space.bounds.get("learning_rate", (low, high))
            low, high = min(low, least), max(high, most)
        near = Log(float(f"{low:.2g}"), float(f"{high:.2g}"))
        return Space.of(spec.space.ranges | {"learning_rate": near})

    def _is_valid(self, setting: Setting) -> bool:
        try:
            make_optimizer(self.spec.optimizer, setting, 0)
        except (TypeError, ValueError):
            return False
        return True

    def _propose_round(self, proposed: Round) -> list[Candidate]:
        explored = dict(self.journal.decisions.get("explored", {}))
        for name, (low, high) in proposed.space.bounds.items():
            before = explored.get(name, (low, high))
            explored[name] = [min(low, before[0]), max(high, before[1])]
        self.journal.decide(explored=explored)
        settings = proposed.settings
        if self._rounds == 1 and self._proposed:  # the defaults, which were asked alone
            settings = settings[1:]
        return self._propose(settings, proposed.stage, self.spec.seeds[proposed.seed])

    def _propose(self, settings: Sequence[Setting], stage: str, seed: int) -> list[Candidate]:
        numbered = enumerate(settings, start=len(self._proposed))
        fresh = [Candidate(i, stage if i else DEFAULTS, setting, seed) for i, setting in numbered]
        self._proposed += fresh
        return self._recalled(fresh)

    def _confirmation(self) -> list[Candidate]:
        """Return the runs of the next round of the race, with more fresh seeds.

        Besides the best settings, the defaults run, and the best at constant rates.
        """
        spec, rounds = self.spec, self._raced
        if rounds == len(spec.race):
            return []
        if untold := self._untold():
            numbers = ", ".join(map(str, untold))
            raise RuntimeError(
                f"the search is over but for its confirmation, which needs the results of trials {numbers}: tell them; "
                "tell(trial, None) gives one up"
            )
        settings = self._racing()
        before = spec.race[rounds - 1][1] if rounds else 0
        seeds = range(spec.seed + 1 + before, spec.seed + 1 + spec.race[rounds][1])
        fresh = [Candidate(n, CONFIRM, x, seed) for n, x in settings.items() for seed in seeds]
        self._confirming += fresh
        self._raced += 1
        return self._recalled(fresh)

    def _racing(self) -> dict[int, Setting]:
        """Return the settings of the next round of the race by number; none if no trial of the search is complete."""
        spec, standing = self.spec, self._standing()
        best = [(n, x) for n, x in standing if n < spec.trials][: spec.race[self._raced][0]]
        if not best:
            return {}
        _, first = best[0]
        if self._raced:
            constant = [(n, x) for n, x in standing if n >= spec.trials][: _constant_rates(self._raced)]
        elif spec.has_constant_rates and is_scheduled(first):
            rates = [float(f"{first['learning_rate'] * factor:.4g}") for factor in CONSTANT_RATES]
            at_rates = [first | OWN | {"learning_rate": rate} for rate in rates]
            constant = list(enumerate(at_rates, start=spec.trials))
        else:
            constant = []
        # The defaults run in every round, also where they are not among the best.
        return {**dict(best), 0: spec.defaults, **dict(constant)}

    def _standing(self) -> list[tuple[int, Setting]]:
        """Return settings with their numbers, best first: by the search, or by the means of those still in the race."""
        if not self._raced:
            # Without facts: those of the device would start JAX here, while workers may need it.
            return [(t.number, t.setting) for t in self._report({}).ranking]
        before = self.spec.race[self._raced - 1][1]
        sign = 1 if self.spec.mode == "min" else -1
        seeds = range(self.spec.seed + 1, self.spec.seed + 1 + before)
        last = {c.number: c.setting for c in self._confirming if c.seed == seeds[-1]}
        values = {n: [self._ended[n, seed].value(self.spec.metric) for seed in seeds] for n in last}
        means = {n: sign * math.fsum(x) if all(map(math.isfinite, x)) else math.inf for n, x in values.items()}
        return [(n, last[n]) for n in sorted(last, key=lambda n: (means[n], n))]

    def _recalled(self, candidates: list[Candidate]) -> list[Candidate]:
        """Take the results that the folder holds; return all of the candidates."""
        for candidate in candidates:
            record = self.journal.get(candidate)
            if record is not None:
                self._ended[candidate.number, candidate.seed] = record
        return candidates

    def _untold(self) -> list[int]:
        runs = (*self._proposed, *self._confirming)
        return list(dict.fromkeys(c.number for c in runs if (c.number, c.seed) not in self._ended))

    def _results(self) -> list[Result]:
        """Return the result of each setting so far.

        What was not known when a round was chosen is kept, and is not known again when the search is resumed.
        """
        unknown = dict(self.journal.decisions.get("unknown", {}))
        key = str(self._rounds)
        hidden = unknown.get(key, []) + [n for n in self._untold() if n not in unknown.get(key, [])]
        if hidden:
            self.journal.decide(unknown=unknown | {key: hidden})
        return [self._result(c, hidden=c.number in hidden) for c in self._proposed]

    def _result(self, candidate: Candidate, *, hidden: bool) -> Result:
        seed = self.spec.seeds.index(candidate.seed)
        if hidden:
            return Result(candidate.setting, math.nan, math.nan, None, seed)
        record = self._ended[candidate.number, candidate.seed]
        value = record.value(self.spec.metric)
        sign = 1 if self.spec.mode == "min" else -1
        score = sign * value if record.status == "complete" else math.inf
        pruned_at = [0, *record.steps][-1] if record.status == "pruned" else None
        return Result(candidate.setting, score, value, pruned_at, seed)

    def _from_queue(self, count: int) -> list[Trial]:
        """Return up to so many trials of the queue, without those that have ended."""
        asked = list[Trial]()
        # If all of a round is asked at once, those of it that ended before a resumption do not count, as they did not.
        beside = {(c.number, c.seed) for c in self._queue} if count > 1 else set()
        medians = self._medians(beside) if self._queue else NO_MEDIANS
        while self._queue and len(asked) < count:
            candidate = self._queue.popleft()
            run = (candidate.number, candidate.seed)
            if run not in self._ended:
                self._asked[run] = candidate
                asked.append(self._trial(candidate, medians))
        return asked

    def _trial(self, candidate: Candidate, medians: Medians) -> Trial:
        spec = self.spec
        optimizer = make_optimizer(spec.optimizer, candidate.setting, candidate.number)
        return Trial(
            candidate,
            optimizer,
            budget=spec.steps,
            metric=spec.metric,
            mode=spec.mode,
            medians=NO_MEDIANS if candidate.stage in (DEFAULTS, CONFIRM) else medians,
            search=spec.digest,
        )

    def _medians(self, beside: Collection[Run]) -> Medians:
        """Return the medians of the trials of the search that have ended, without those `beside` which others run."""
        if not self._prunes:
            return NO_MEDIANS
        runs = [run for c in self._proposed if (run := (c.number, c.seed)) not in beside]
        return Medians.of([self._ended[run] for run in runs if run in self._ended], self.spec.metric)


def _made(out: Folder) -> Path | None:
    """Return the path of a folder; the first process makes it, if it is to be made."""
    if callable(out):
        return Path(broadcast(str(out()) if is_first() else ""))
    return None if out is None else Path(out)


def _check_range_test(range_test: object) -> None:
    if not isinstance(range_test, LrRange | None):
        raise TypeError(f"Invalid range_test value: {range_test!r}; range_test must be an LrRange, or None")


def _constant_rates(rounds: int) -> int:
    """Return how many settings at constant rates are in the race after so many rounds."""
    return max(len(CONSTANT_RATES) - rounds, 1)
