"""The record of one run of a tuning, and the folder that keeps all of them."""

import codecs
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from adamjax._core import checks, files
from adamjax._core.files import DamagedFileError
from adamjax._core.locks import FolderInUseError, FolderLock
from adamjax._core.processes import broadcast
from adamjax.tuning._space import Setting, stable_repr
from adamjax.tuning._stored import DIGEST, check_decisions, check_trial, with_digest

# Names of stages: of the first trial, and of the runs with fresh seeds.
DEFAULTS, CONFIRM = "defaults", "confirm"

DECISIONS, TRIALS = "tune.json", "trials.jsonl"
_FIRST_BYTES = b'{"number": '  # of a trial

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
    No other process can write to the folder until `close`.
    """

    def __init__(self, path: Path | None, question: Json, *, resume: bool) -> None:
        self.path = path
        self.decisions: Json = {"question": question, "notes": []}
        self._trials: dict[tuple[int, int], TrialRecord] = {}
        self._size = 0  # of trials.jsonl, up to the end of the last finished line
        self._lock: FolderLock | None = None
        if path is None:
            return
        try:
            self._begin(path, question, resume=resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, question: Json, *, resume: bool) -> None:
        decisions, lines = _of_first_process(path, self._open)
        if not decisions:
            self._write_decisions()
            return
        if not resume:
            raise FileExistsError(f"{path} already holds a tuning: resume it, or choose another folder")
        found = parse_decisions(decisions, path)
        check_question(found["question"], question, path)
        self.decisions = found
        self._add(lines)

    def _open(self, path: Path) -> tuple[bytes, bytes]:
        """Make the folder, keep other processes from it, and return the content of its files."""
        try:
            files.make_folder(path)
        except (FileExistsError, NotADirectoryError):
            raise FileExistsError(
                f"{path} is, or lies in, something that is not a folder: choose another one"
            ) from None
        self._lock = FolderLock(path)
        return read_files(path)

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def has_trials(self) -> bool:
        return bool(self._trials)

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
        """Keep a remark for the report, once: a tuning that was killed may make it again."""
        if text not in self.decisions["notes"]:
            self.decide(notes=[*self.decisions["notes"], text])

    def write(self, trials: Iterable[TrialRecord]) -> None:
        """Keep trials that have ended; leave those that are kept already as they are."""
        trials = list(trials)
        if jax.process_index() == 0:
            self._catch_up()
        new = {(t.number, t.seed): t for t in trials if (t.number, t.seed) not in self._trials}
        if self.path is not None and new and jax.process_index() == 0:
            lines = "".join(_line(t, self.decisions["question"]) for t in new.values())
            self._size = files.append(self.path / TRIALS, lines.encode(), self._size)
        self._trials |= new

    def _catch_up(self) -> None:
        """Read what another journal of this process has written."""
        if self.path is None:
            return
        if self._lock is None:
            raise ValueError(f"the tuning in {self.path} was closed, so nothing can be told any more: open it again")
        file = self.path / TRIALS
        size = file.stat().st_size if file.exists() else 0
        if size < self._size:
            remedy = "restore it from a copy, or choose another folder"
            raise DamagedFileError(file, f"{file} was cut or removed while it was in use: {remedy}")
        if size > self._size:
            self._add(read_files(self.path)[1])

    def _add(self, lines: bytes) -> None:
        """Take the trials of the file, of which these are the finished lines."""
        if self.path is not None and len(lines) > self._size:
            for trial in parse_trials(lines, self.path, self.decisions["question"]):
                self._trials.setdefault((trial.number, trial.seed), trial)
            self._size = len(lines)

    def _write_decisions(self) -> None:
        if self.path is not None and jax.process_index() == 0:
            content = json.dumps(with_digest(self.decisions), indent=2, allow_nan=False)
            files.replace(self.path / DECISIONS, content + "\n")


def keep(path: Path, question: Json, decisions: Json, facts: Json, trials: Sequence[TrialRecord]) -> None:
    """Write what a report knows of a tuning to a folder, which may hold the tuning.

    If the tuning runs in another process and has these trials, nothing is written: that process writes.
    """
    try:
        with contextlib.closing(Journal(path, question, resume=True)) as journal:
            if "defaults" not in journal.decisions:  # or a tuning that was stopped may go on, and decide the others
                journal.decide(**decisions)
            if facts:
                journal.decide(facts=facts)
            journal.write(trials)
    except FolderInUseError:
        there, lines = read_files(path)
        found = parse_decisions(there, path)["question"]
        check_question(found, question, path)
        held = {(t.number, t.seed) for t in parse_trials(lines, path, found)}
        if not held.issuperset((t.number, t.seed) for t in trials):
            raise


def _of_first_process(path: Path, read: Callable[[Path], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Return what the first process reads, on all; if it raises an error, raise one with the same text on all."""
    found, raised, text = (b"", b""), None, ""
    if jax.process_index() == 0:
        try:
            found = read(path)
        except (OSError, ValueError) as error:
            raised, text = error, str(error) or repr(error)
    if text := broadcast(text):
        raise raised or DamagedFileError(path, text)
    first, second = (broadcast(x.decode(errors="surrogateescape")) for x in found)
    return first.encode(errors="surrogateescape"), second.encode(errors="surrogateescape")


def check_question(there: Json, here: Json, path: Path) -> None:
    """Check that a folder holds the tuning that it is to hold.

    Raises:
      ValueError: It holds another one.
    """
    for name, x in here.items():
        if there.get(name) != x:
            raise ValueError(
                f"{path} holds another tuning: its {name} is {there.get(name)!r}, here it is {x!r}; "
                "choose another folder"
            )


def parse_decisions(content: bytes, path: Path) -> Json:
    """Return the checked content of `tune.json`, without its digest.

    Raises:
      DamagedFileError: It is not as a tuning wrote it.
    """
    file, remedy = path / DECISIONS, "restore it from a copy, or choose another folder"
    decisions = files.json_object(content, file, remedy)
    try:
        check_decisions(decisions)
    except ValueError as error:
        raise DamagedFileError(file, f"{file} is damaged ({error}): {remedy}") from error
    return {name: x for name, x in decisions.items() if name != DIGEST}


def parse_trials(lines: bytes, path: Path, question: Json) -> list[TrialRecord]:
    """Return the trials in the finished lines of `trials.jsonl`, each run once.

    Raises:
      DamagedFileError: A line is not as the tuning with this question wrote it, or contradicts another one.
    """
    file = path / TRIALS
    found = dict[tuple[int, int], tuple[int, Json]]()
    for i, line in enumerate(lines.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {i} of {file}"
        try:
            fields = _parse_trial(line, question)
        except ValueError as error:
            remedy = "remove it, and its run is made again; or restore the file from a copy"
            raise DamagedFileError(file, f"{where} is not a trial ({error}): {remedy}") from error
        first, before = found.setdefault((fields["number"], fields["seed"]), (i, fields))
        if before != fields:
            raise DamagedFileError(file, f"{where} contradicts line {first}, which is the same run: remove one of them")
    return [_trial(fields) for _, fields in found.values()]


def _parse_trial(line: bytes, question: Json) -> Json:
    """Return the checked fields in a line, without its digest."""
    if b"\0" in line:
        raise ValueError("it has zeros, which a crash may leave")
    try:
        fields = json.loads(line.decode())
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"it is {checks.shown(fields)}")
    check_trial(fields, question)
    return {name: x for name, x in fields.items() if name != DIGEST}


def _trial(fields: Json) -> TrialRecord:
    curves = {name: null_to_nan(x) for name, x in fields["metrics"].items()}
    return TrialRecord(**fields | {"losses": null_to_nan(fields["losses"]), "metrics": curves})


def _line(trial: TrialRecord, question: Json) -> str:
    return json.dumps(with_digest(json_trial(trial), question), allow_nan=False) + "\n"


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


def read_files(path: Path) -> tuple[bytes, bytes]:
    """Return the content of `tune.json` and the finished lines of `trials.jsonl`; empty if there is no such file.

    Raises:
      DamagedFileError: A file cannot be read, there are trials without a `tune.json`, or the end of `trials.jsonl` is
        not a line that a crash left unfinished.
    """
    decisions, trials = _read(path / DECISIONS), _read(path / TRIALS) or b""
    if trials.strip() and not decisions:
        state = "a tune.json that is empty" if decisions is not None else "no tune.json"
        raise DamagedFileError(
            path / DECISIONS,
            f"{path / TRIALS} has {state} beside it: restore it from a copy, or choose another folder",
        )
    finished = trials[: trials.rfind(b"\n") + 1]
    rest = trials[len(finished) :].rstrip(b"\0\r")  # some file systems leave zeros after a crash
    if not (_FIRST_BYTES.startswith(rest) or rest.startswith(_FIRST_BYTES)) or min(rest, default=32) < 32:
        line = f"line {finished.count(10) + 1} of {path / TRIALS}"
        raise DamagedFileError(
            path / TRIALS, f"{line} has no end, and is not a trial: remove it, or choose another folder"
        )
    return decisions or b"", finished


def _read(path: Path) -> bytes | None:
    """Return the content of a file; None if there is none."""
    try:
        return files.read(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        raise DamagedFileError(path, f"{error}: restore it from a copy, or choose another folder") from error
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}): make it readable, or choose another folder"
        raise DamagedFileError(path, reason) from error
