"""What is known of one run, and the folder that keeps it."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from adamjax.run_folder import replace
from adamjax.tuning._space import Setting, printed

# Names of stages: of the first trial, and of the runs with fresh seeds.
DEFAULTS, CONFIRM = "defaults", "confirm"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a setting.

    Fields:
      number: Which setting it is, in the order in which they were tried.
      stage: What it was tried for.
      setting: Keyword arguments of the optimizer.
      seed: Of parameters, data order and loss.
      status: "complete"; "pruned", ended early because others were better; "infeasible", diverged.
      steps: After how many updates it was measured.
      losses: The mean training loss since the measurement before.
      metrics: The validation metrics, by name.
      diverged_at: The first step (counted from 1) at which something was not finite; else 0.
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

    def value(self, metric: str) -> float:
        """The last value of a metric; NaN where the run diverged."""
        return math.nan if self.status == "infeasible" else self.metrics[metric][-1]


class Journal:
    """Where a tuning writes what it decides and each trial that ends, as it does.

    `tune.json` holds what is tuned, and what was found out before the first trial; `trials.jsonl` a
    line for each trial. Whatever ends the process leaves both readable: a line that was not finished
    is dropped when another is written. Of several processes the first one reads and writes.

    Args:
      path: The folder; None to keep nothing.
      question: What is tuned, in JSON's types: a folder that has another is refused.
      resume: Whether to go on where the folder ends.

    Raises:
      FileExistsError: The folder holds trials, and is not to be resumed.
      ValueError: The folder is of another tuning, or is damaged.
    """

    def __init__(self, path: Path | None, question: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.found: dict[str, Any] = {"question": dict(question), "notes": []}
        self._trials: dict[tuple[int, int], Trial] = {}
        self._finished = 0  # bytes of trials.jsonl, up to the end of the last finished line
        if path is None:
            return
        before, lines = _same_everywhere(read(path) if jax.process_index() == 0 else ("", ""))
        if not before:
            self._write_found()
            return
        if not resume:
            raise FileExistsError(f"{path} already holds a tuning: resume it, or choose another folder")
        self.found = decided(before, path)
        for name, here in question.items():
            there = self.found["question"].get(name)
            if there != here:
                raise ValueError(
                    f"{path} holds another tuning: its {name} is {there!r}, here it is {here!r}; choose another folder"
                )
        for trial in parse(lines, path):
            self._trials[trial.number, trial.seed] = trial
        self._finished = len(lines.encode())

    def get(self, number: int, seed: int, stage: str, setting: Setting) -> Trial | None:
        """The trial of that number, if it has ended before.

        Raises:
          ValueError: It was of another setting.
        """
        trial = self._trials.get((number, seed))
        if trial is None:
            return None
        if (trial.stage, trial.setting) != (stage, plain(setting)):
            raise ValueError(
                f"{self.path} holds another tuning: its trial {number} is {trial.setting} for {trial.stage!r}, "
                f"here it is {plain(setting)} for {stage!r}; choose another folder"
            )
        return dataclasses.replace(trial, setting=setting)

    def decide(self, **found: Any) -> None:
        """Keep what later trials depend on; a file that says so already is not touched."""
        if self.found != self.found | found:
            self.found |= found
            self._write_found()

    def note(self, text: str) -> None:
        """Keep what the report should say."""
        self.decide(notes=[*self.found["notes"], text])

    def write(self, trials: Iterable[Trial]) -> None:
        """Keep trials that have ended; those that it has already are left as they are."""
        new = {(t.number, t.seed): t for t in trials if (t.number, t.seed) not in self._trials}
        self._trials |= new
        if self.path is not None and new and jax.process_index() == 0:
            self._finished = append(self.path / "trials.jsonl", self._finished, new.values())

    def _write_found(self) -> None:
        if self.path is not None and jax.process_index() == 0:
            replace(self.path / "tune.json", json.dumps(self.found, indent=2, allow_nan=False) + "\n")


def decided(text: str, path: Path) -> dict[str, Any]:
    """What a `tune.json` says.

    Raises:
      ValueError: It is none.
    """
    try:
        found = dict(json.loads(text))
        found["question"]["optimizer"], found["notes"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / 'tune.json'} is damaged ({error!r}): choose another folder") from error
    return found


def append(path: Path, finished: int, trials: Iterable[Trial]) -> int:
    """Add a line for each trial after the first `finished` bytes, and wait until they are on the disk; the new size."""
    lines = "".join(json.dumps(to_json(t), allow_nan=False) + "\n" for t in trials).encode()
    with open(path, "ab") as file:
        file.truncate(finished)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    return finished + len(lines)


def parse(lines: str, path: Path) -> list[Trial]:
    """The trials of the lines of a `trials.jsonl`.

    Raises:
      ValueError: A line is not one.
    """
    trials = []
    for i, line in enumerate(lines.splitlines(), start=1):
        try:
            fields = json.loads(line)
            curves = {k: numbers(x) for k, x in fields["metrics"].items()}
            trials.append(Trial(**fields | {"losses": numbers(fields["losses"]), "metrics": curves}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {i} of {path / 'trials.jsonl'} is not a trial ({error!r}): remove it") from error
    return trials


def to_json(trial: Trial) -> dict[str, Any]:
    """The fields in JSON's types; what is not finite becomes null."""
    curves = {k: nulls(x) for k, x in trial.metrics.items()}
    fields = dataclasses.asdict(dataclasses.replace(trial, setting={}))
    return fields | {"setting": plain(trial.setting), "losses": nulls(trial.losses), "metrics": curves}


def plain(setting: Setting) -> Setting:
    """A setting in JSON's types: what is not a number, a string, a bool or None is shown as it prints."""
    return {k: x if _is_plain(x) else printed(x) for k, x in setting.items()}


def _is_plain(x: Any) -> bool:
    return math.isfinite(x) if isinstance(x, (int, float)) else isinstance(x, (str, type(None)))


def nulls(curve: Iterable[float]) -> list[float | None]:
    """What is not finite becomes null, for JSON has no NaN."""
    return [x if math.isfinite(x) else None for x in curve]


def numbers(curve: Iterable[float | None]) -> list[float]:
    """The inverse of `nulls`, as far as there is one: null becomes NaN."""
    return [math.nan if x is None else x for x in curve]


def read(path: Path) -> tuple[str, str]:
    """`tune.json`, and the finished lines of `trials.jsonl`; empty where there are none."""
    before, trials = path / "tune.json", path / "trials.jsonl"
    if not before.exists() and trials.exists():
        raise ValueError(f"{trials} has no tune.json beside it: choose another folder")
    lines = trials.read_text() if trials.exists() else ""
    return before.read_text() if before.exists() else "", lines[: lines.rfind("\n") + 1]


def _same_everywhere(texts: tuple[str, str]) -> tuple[str, str]:
    """What the first process has."""
    if jax.process_count() == 1:
        return texts
    sizes = multihost_utils.broadcast_one_to_all(np.asarray([len(t.encode()) for t in texts]))
    buffer = np.zeros(int(sizes.sum()), np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer("".join(texts).encode(), np.uint8)
    content = bytes(multihost_utils.broadcast_one_to_all(buffer))
    return content[: sizes[0]].decode(), content[sizes[0] :].decode()
