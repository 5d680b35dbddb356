"""The programs that are run on a failing disk, and what must be true of the folders that they leave.

Each program does its work in a folder and marks what it has promised: from then on, no fault may undo it. All run in
this process, the command line as well, so that a run takes a tenth of a second.
"""

import contextlib
import enum
import gc
import io
import json
import re
import traceback
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

import adamjax
from adamjax import cli, tuning
from adamjax._core import locks

MAX_MESSAGE = 600


class Outcome(enum.Enum):
    """How a fault ended, if nothing was lost."""

    SURVIVED = "all that was promised is there, and the program goes on as if there had been no fault"
    SAID = "the program says what is wrong, by a documented error of a sentence or two"
    ALTERED = "text without a digest reads well, but with another content, as if its owner had edited it"


class LostError(Exception):
    """Something promised is gone, something wrong was restored, or an error is not one that is documented."""


class Died(BaseException):
    """A signal has ended the program, which had not begun to handle it."""


@contextlib.contextmanager
def documented(*kinds):
    """Turn errors into `LostError` that are not of these kinds, or whose message is no sentence."""
    try:
        yield
    except kinds as error:
        check_message(str(error))
        raise
    except (LostError, Died, KeyboardInterrupt):
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{where.filename.rpartition('site-packages/')[2]}:{where.lineno}"
        raise LostError(f"a raw {type(error).__name__} from {at}: {str(error)[:200]!r}") from error


def check_message(text):
    if len(text) > MAX_MESSAGE or "\n" in text.strip() or not text.strip():
        raise LostError(f"a message of {len(text)} characters: {text[:200]!r}")


def command(*arguments):
    """Run the command line in this process; return its exit code and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _quick(), documented():
        try:
            code = cli.main(list(map(str, arguments)))
        except SystemExit as error:
            code = error.code
        if code:  # exceptions that nobody has looked at are said when they are collected
            gc.collect()
    said = err.getvalue()
    if "Traceback" in said:
        raise LostError(f"exit code {code} and a traceback: ... {said[said.rindex('Traceback') :][-600:]!r}")
    if code not in (0, 1, 2, 130):
        raise LostError(f"exit code {code}")
    lines = [line for line in said.splitlines() if re.match(r"adamjax( [\w-]+)?:", line)]
    if code:
        check_message(lines[-1] if lines else "")
    return code, "\n".join(lines)


@contextlib.contextmanager
def _quick():
    """Draw no pictures but write as much, and do not wait long for the owners of locks on other machines."""

    def savefig(self, file, **_):
        with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "wb") as opened:
            opened.write(b"\x89PNG\r\n\x1a\n" + bytes(5000))

    with mock.patch.object(matplotlib.figure.Figure, "savefig", savefig), mock.patch.object(locks, "STALE_SECONDS", 1):
        yield


def _filled(number, tree):
    """Return a tree of that structure with other numbers in it."""
    return jax.tree.map(lambda x: jnp.arange(number, x.size + number).astype(x.dtype).reshape(x.shape), tree)


def bits(tree):
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


class Save:
    """`adamjax.checkpoint.save`, once for each of some steps, of which it keeps a few."""

    name, is_command = "checkpoint.save", False
    text_files: tuple = ()  # those that carry no digest
    steps, keep = (1, 2, 3, 4), 2
    later = 9

    def __init__(self, scratch):
        self.opt = adamjax.adamw(1e-3)
        self.params = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(7, jnp.bfloat16)}
        state = self.opt.init(self.params)
        self.contents = {step: _filled(step, (self.params, state)) for step in (*self.steps, self.later)}

    def save(self, folder, step):
        params, state = self.contents[step]
        with documented(OSError):
            adamjax.checkpoint.save(
                folder / "checkpoints", self.opt, params, state, step=step, keep=self.keep, key=step
            )

    def run(self, folder, mark):
        for step in self.steps:
            self.save(folder, step)
            mark(step)
        return 0

    def restore(self, folder, step=None):
        """Return the step that is restored: to the last bit, or it is refused as documented."""
        with documented(OSError, adamjax.DamagedFileError):
            found = adamjax.checkpoint.restore(folder / "checkpoints", self.opt, self.params, step=step)
        if step is not None and found.step != step:
            raise LostError(f"asked for step {step}, it restores {found.step}")
        expected = self.contents[found.step]
        if bits((found.params, found.state)) != bits(expected) or found.key != found.step:
            raise LostError(f"step {found.step} is restored wrong")
        return found.step

    def check(self, folder, newest, damaged=None):
        """Check a folder after a fault. `newest` is the last mark; `damaged` is the file that the disk has changed."""
        with documented():
            there = adamjax.checkpoint.steps(folder / "checkpoints")
        refused = []
        for step in sorted({*there, newest} - {None}):
            try:
                self.restore(folder, step)
            except (OSError, adamjax.DamagedFileError) as error:
                # A fault may leave a step unfinished, but not the newest one that was saved.
                is_hit = f"/{step}/" in damaged if damaged else step != newest
                if not is_hit:
                    raise LostError(f"step {step} was saved, now {type(error).__name__}: {error}") from error
                if isinstance(error, adamjax.DamagedFileError) and error.step != step:
                    raise LostError(f"step {step} is said to be damaged as step {error.step}") from error
                refused.append(step)
        try:
            last = self.restore(folder)
        except (OSError, adamjax.DamagedFileError) as error:
            if there and there[-1] not in refused:
                raise LostError(f"step {there[-1]} is whole, but not restored by default: {error}") from error
        else:
            if newest is not None and last < newest:
                raise LostError(f"the newest step, {newest}, is passed over for {last} without a word")
        if not damaged:
            self._check_use(folder)
        return Outcome.SAID if refused else Outcome.SURVIVED

    def go_on(self, folder, mark):
        """Go on with what is in the folder; return an exit code."""
        self.restore(folder)
        return 0

    def _check_use(self, folder):
        """Check that the folder can be used as before."""
        self.save(folder, self.later)
        if self.restore(folder) != self.later:
            raise LostError(f"step {self.later} was saved afterwards, and is not there")
        with documented():
            there = adamjax.checkpoint.steps(folder / "checkpoints")
        if len(there) > self.keep:
            raise LostError(f"it keeps the steps {there}, expected {self.keep} of them")


class Train:
    """`adamjax train` with checkpoints, and its `--resume`."""

    name, is_command = "adamjax train", True
    text_files = ("config.json", "metrics.jsonl")
    arguments = (
        *("bowl:BOWL", "--steps=40", "--report-every=5", "--evaluate-every=20", "--checkpoint-every=10"),
        *("--dtype=bfloat16", "--rounding=kahan"),
    )

    def __init__(self, scratch):
        whole = scratch / "train-whole"
        self.run(whole, lambda _: None)
        self.expected = self.result(whole)
        self.restored = None

    def run(self, folder, mark):
        with self._watched(mark):
            return command(*self.command(folder))[0]

    def command(self, folder):
        return ["train", *self.arguments, "--out", str(folder)]

    @contextlib.contextmanager
    def _watched(self, mark):
        """Mark saved steps, and remember the last contents that were saved or restored, and which were restored."""
        save, restore = adamjax.checkpoint.save, adamjax.checkpoint.restore
        self.last = self.restored = None

        def save_and_mark(directory, opt, params, state, *, step, **others):
            content = bits((params, state))
            save(directory, opt, params, state, step=step, **others)
            self.last = step, content
            mark(step)

        def watched_restore(*arguments, **named):
            found = restore(*arguments, **named)
            self.last, self.restored = (found.step, bits((found.params, found.state))), found.step
            return found

        with (
            mock.patch.object(adamjax.checkpoint, "save", save_and_mark),
            mock.patch.object(adamjax.checkpoint, "restore", watched_restore),
        ):
            yield

    def result(self, folder):
        return {"metrics.jsonl": (folder / "metrics.jsonl").read_bytes(), "the last checkpoint": self.last}

    def go_on(self, folder, mark):
        with self._watched(mark):
            return command("train", "--resume", folder)[0]

    def check(self, folder, newest, damaged=None):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with self._watched(lambda _: None):
            code, said = command("train", "--resume", folder)
        if code:
            if newest and not damaged:
                raise LostError(f"step {newest} was saved, now --resume says {said!r}")
            gone = [str(path.relative_to(folder)) for path, x in before.items() if x and not path.exists()]
            if gone:
                raise LostError(f"--resume refuses the folder and removes {gone}")
            return Outcome.SAID
        # Without its checkpoint, a run that begins again would end alike.
        if newest and (self.restored or 0) < newest:
            if not damaged:
                raise LostError(f"step {newest} was saved, and --resume goes on from {self.restored}: {said!r}")
            if "damaged" not in said:
                raise LostError(f"--resume goes on from {self.restored} instead of {newest} without a word")
        found = self.result(folder)
        for name, expected in self.expected.items():
            if found[name] != expected:
                if damaged in self.text_files:
                    return Outcome.ALTERED
                raise LostError(
                    f"after --resume from {self.restored}, {name} is {found[name]!r:.300}, not {expected!r:.300}"
                )
        return Outcome.SURVIVED


def objective(optimizer, trial):
    """Train in no time; `Tune.calls` are the trials for which it was called."""
    Tune.called(trial)
    rate, b1 = trial.arguments["learning_rate"], trial.arguments.get("b1", 0.9)
    for step in range(1, 5):
        loss = abs(jnp.log10(rate) + 2).item() + (b1 - 0.8) ** 2 + 1 / step + trial.seed % 7 / 100
        trial.report(step, loss)
    return loss


class Tune:
    """`adamjax tune` of an objective, and its `--resume`."""

    name, is_command = "adamjax tune", True
    text_files = ("tune.json", "trials.jsonl", "report.json", "report.html")
    arguments = ("faults.programs:objective", "--trials=6", "--stages", "learning_rate", "b1", "--confirm", "2", "2")
    calls: list = []  # noqa: RUF012
    mark = staticmethod(lambda _: None)

    def __init__(self, scratch):
        self.run(scratch / "tune-whole", lambda _: None)
        self.expected = self.result(scratch / "tune-whole")

    @classmethod
    def called(cls, trial):
        """A trial begins: those before it are kept, but for those of a range test."""
        cls.mark(list(cls.calls))
        if trial.number >= 0:
            cls.calls.append([trial.number, trial.seed])

    def run(self, folder, mark):
        Tune.calls = []
        return self._run(self.command(folder), mark)

    def _run(self, arguments, mark):
        Tune.mark = staticmethod(mark)
        code = command(*arguments)[0]
        if code == 0:
            mark(list(self.calls))
        return code

    def command(self, folder):
        return ["tune", *self.arguments, "--out", str(folder)]

    def result(self, folder):
        return json.loads((folder / "report.json").read_text())

    def go_on(self, folder, mark):
        return self._run([*self.command(folder), "--resume"], mark)

    def check(self, folder, newest, damaged=None):
        finished = newest or []
        self._check_report(folder, finished, damaged)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        Tune.calls, Tune.mark = [], staticmethod(lambda _: None)
        code, said = command(*self.command(folder), "--resume")
        if code:
            if finished and not damaged:
                raise LostError(f"{len(finished)} trials were kept, now --resume says {said!r}")
            changed = [path.name for path, x in before.items() if not path.exists() or path.read_bytes() != x]
            if {"tune.json", "trials.jsonl"} & {*changed}:
                raise LostError(f"--resume refuses the folder and changes {changed}")
            return Outcome.SAID
        again = [trial for trial in finished if trial in self.calls]
        if again and not damaged:
            raise LostError(f"trials {again} were kept, and are run again")
        if self.result(folder) != self.expected:
            if damaged in self.text_files:
                return Outcome.ALTERED
            found = self.result(folder)
            names = [name for name in self.expected | found if self.expected.get(name) != found.get(name)]
            raise LostError(f"--resume ends with another report: {names} {[found.get(n) for n in names]!r:.300}")
        return Outcome.SURVIVED

    def _check_report(self, folder, finished, damaged):
        try:
            with documented(OSError, ValueError):
                report = tuning.Report.load(folder)
        except (OSError, ValueError) as error:
            if finished and not damaged:
                raise LostError(f"{len(finished)} trials were kept, now Report.load says {error}") from error
            return
        there = [[trial.number, trial.seed] for trial in report.trials]
        missing = [trial for trial in finished if trial not in there]
        if missing and not damaged:
            raise LostError(f"trials {missing} were kept, Report.load has {there}")
