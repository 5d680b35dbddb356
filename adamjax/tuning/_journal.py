"""The record of one run of a tuning, and the folder that keeps all of them."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from adamjax._core import files
from adamjax.run_folder import broadcast
from adamjax.tuning._space import Setting, stable_repr

# Names of stages: of the first trial, and of the runs with fresh seeds.
DEFAULTS, CONFIRM = "defaults", "confirm"

Json = dict[str, Any]


class Candidate(NamedTuple):
    """A run to make: the setting of that number, with a seed."""

    number: int
    stage: str
    setting: Setting
    seed: int


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """What became of one run of a setting.

    Fields:
      number: Number of the setting, in the order in which settings were tried.
      stage: Name of the stage it belongs to.
      setting: Keyword arguments of the optimizer.
      seed: Seed of the parameters, the data order and the loss.
      status: "complete"; "pruned", ended early because others were better; "infeasible", diverged; "failed", for the
        reason that `error` says.
      steps: The numbers of updates after which it was evaluated; the steps that an objective reported.
      losses: Mean training loss since the evaluation before; empty for an objective.
      metrics: The validation metrics, by name: a value for each of `steps`, NaN where there is none. If an objective
        returned another value than it reported last, that value follows.
      diverged_at: The first step (counted from 1) whose training loss was not finite; 0 for none.
      error: The reason why the trial failed, such as the type and the text of an exception; empty if it did not.
    """

    number: int
    stage: str
    setting: Setting
    seed: int
    status: str
    steps: list[int]
    losses: list[float]
    metrics: dict[str, list[float]]
    diverged_at: int
    error: str = ""

    def value(self, metric: str) -> float:
        """Return the last value of a metric; NaN if the run diverged or failed, or has none."""
        values = () if self.status in ("infeasible", "failed") else self.metrics.get(metric, ())
        return values[-1] if values else math.nan

    def curve(self, metric: str) -> list[float]:
        """Return the values of a metric at `steps`; empty if it was not evaluated."""
        return self.metrics.get(metric, [])[: len(self.steps)]


class Journal:
    """The folder in which a tuning keeps its decisions, and each trial as soon as it ends.

    `tune.json` holds the specification and what was decided before the first trial; `trials.jsonl` a
    line for each trial. Both stay readable however the process ends: an unfinished line is dropped
    when the next one is written. With several processes, the first one reads and writes. Without a `path`,
    nothing is kept. A folder that holds a tuning is refused unless `resume`, or if its question is another.
    """

    def __init__(self, path: Path | None, question: Json, *, resume: bool) -> None:
        self.path = path
        self.decisions: Json = {"question": question, "notes": []}
        self._trials: dict[tuple[int, int], TrialRecord] = {}
        self._finished_bytes = 0  # of trials.jsonl, up to the end of the last finished line
        if path is None:
            return
        decisions, lines = map(broadcast, read_files(path) if jax.process_index() == 0 else ("", ""))
        if not decisions:
            self._write_decisions()
            return
        if not resume:
            raise FileExistsError(f"{path} already holds a tuning: resume it, or choose another folder")
        self.decisions = parse_decisions(decisions, path)
        for name, here in question.items():
            there = self.decisions["question"].get(name)
            if there != here:
                raise ValueError(
                    f"{path} holds another tuning: its {name} is {there!r}, here it is {here!r}; choose another folder"
                )
        for trial in parse_trials(lines, path):
            self._trials[trial.number, trial.seed] = trial
        self._finished_bytes = len(lines.encode())

    def get(self, candidate: Candidate) -> TrialRecord | None:
        """Return the record of a run that has ended already, else None."""
        number, stage, setting, seed = candidate
        trial = self._trials.get((number, seed))
        if trial is None:
            return None
        if (trial.stage, trial.setting) != (stage, json_setting(setting)):
            raise ValueError(
                f"{self.path} holds another tuning: its trial {number} is {trial.setting} for {trial.stage!r}, "
                f"here it is {json_setting(setting)} for {stage!r}; choose another folder"
            )
        return dataclasses.replace(trial, setting=setting)

    def decide(self, **decisions: object) -> None:
        """Keep decisions that later trials depend on; do not touch a file that holds them already."""
        if self.decisions != self.decisions | decisions:
            self.decisions |= decisions
            self._write_decisions()

    def note(self, text: str) -> None:
        self.decide(notes=[*self.decisions["notes"], text])

    def write(self, trials: Iterable[TrialRecord]) -> None:
        """Keep trials that have ended; leave those that are kept already as they are."""
        new = {(t.number, t.seed): t for t in trials if (t.number, t.seed) not in self._trials}
        self._trials |= new
        if self.path is not None and new and jax.process_index() == 0:
            self._finished_bytes = append_trials(self.path / "trials.jsonl", self._finished_bytes, new.values())

    def _write_decisions(self) -> None:
        if self.path is not None and jax.process_index() == 0:
            files.replace(self.path / "tune.json", json.dumps(self.decisions, indent=2, allow_nan=False) + "\n")


def parse_decisions(text: str, path: Path) -> Json:
    try:
        decisions = dict(json.loads(text))
        decisions["question"]["optimizer"], decisions["notes"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / 'tune.json'} is damaged ({error!r}): choose another folder") from error
    return decisions


def parse_trials(lines: str, path: Path) -> list[TrialRecord]:
    trials = []
    for i, line in enumerate(lines.splitlines(), start=1):
        try:
            fields = json.loads(line)
            curves = {k: null_to_nan(x) for k, x in fields["metrics"].items()}
            trials.append(TrialRecord(**fields | {"losses": null_to_nan(fields["losses"]), "metrics": curves}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {i} of {path / 'trials.jsonl'} is not a trial ({error!r}): remove it") from error
    return trials


def append_trials(path: Path, finished_bytes: int, trials: Iterable[TrialRecord]) -> int:
    """Write a line for each trial after the first `finished_bytes`, and sync the file; return its new size."""
    lines = "".join(json.dumps(json_trial(t), allow_nan=False) + "\n" for t in trials).encode()
    with open(path, "ab") as file:
        file.truncate(finished_bytes)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    return finished_bytes + len(lines)


def json_trial(trial: TrialRecord) -> Json:
    """Return the fields of a trial in JSON's types; numbers that are not finite become null."""
    curves = {k: nan_to_null(x) for k, x in trial.metrics.items()}
    fields = dataclasses.asdict(dataclasses.replace(trial, setting={}))
    return fields | {"setting": json_setting(trial.setting), "losses": nan_to_null(trial.losses), "metrics": curves}


def json_setting(setting: Setting) -> Setting:
    """Return a setting in JSON's types: values other than finite numbers, strings, bools and None become text."""

    def is_json(x: object) -> bool:
        return math.isfinite(x) if isinstance(x, (int, float)) else isinstance(x, (str, type(None)))

    return {k: x if is_json(x) else stable_repr(x) for k, x in setting.items()}


def nan_to_null(curve: Iterable[float]) -> list[float | None]:
    """Replace numbers that are not finite by None: JSON has no NaN."""
    return [x if math.isfinite(x) else None for x in curve]


def null_to_nan(curve: Iterable[float | None]) -> list[float]:
    """Replace None by NaN: the inverse of `nan_to_null`, but for infinities."""
    return [math.nan if x is None else x for x in curve]


def read_files(path: Path) -> tuple[str, str]:
    """Return the text of `tune.json` and the finished lines of `trials.jsonl`; empty if there is no such file."""
    decisions, trials = path / "tune.json", path / "trials.jsonl"
    if not decisions.exists() and trials.exists():
        raise ValueError(f"{trials} has no tune.json beside it: choose another folder")
    lines = trials.read_text() if trials.exists() else ""
    return decisions.read_text() if decisions.exists() else "", lines[: lines.rfind("\n") + 1]
