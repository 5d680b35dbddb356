"""One program, and the faults that it can meet: each is injected at random, and checked at once."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter

from adamjax import DamagedFileError
from faults import damage, disk, shim
from faults.programs import Died, LostError, Outcome

# Seconds after which a program is said to hang.
PATIENCE = 60
OF_COMMANDS = ("sigkill", "signal")


class Bench:
    """A program, and the faults that it can meet.

    Each public method but `campaign` is called with a source of chance and the path of a new folder. It describes the
    fault in `self.fault`, lets the program do its work there, and returns what it promised until then. Its docstring
    is its name in the table.
    """

    def __init__(self, program, scratch):
        self.program, self.scratch, self.root = program, scratch, scratch / "root"
        self.shim, self.fault, self.damaged, self.code = shim.Shim(), "", None, 0
        begun = time.monotonic()
        whole = self._record(lambda folder, mark: program.run(folder, mark))
        self.seconds = time.monotonic() - begun
        self.count = sum(change.op is not disk.Op.MARK for change in whole)
        self.records = [whole]
        if program.is_command:
            self.records.append(self._record(self._stop_and_go_on))

    def _record(self, work):
        """Return the changes that some work makes; their replay is the folder itself, so the record lacks nothing."""
        record, folder, again = self.scratch / "record", self.root / "recorded", self.scratch / "replayed"
        record.unlink(missing_ok=True)
        with self.shim.recorded(record):
            work(folder, lambda promise: self.shim.mark(json.dumps(promise)))
        changes = disk.read_record(record, self.root)
        self.disk_after(changes).write(again)
        found, expected = _contents(again), _contents(self.root)
        assert found == expected, f"the record lacks {sorted(name for name, _ in expected ^ found)}"
        shutil.rmtree(folder)
        shutil.rmtree(again)
        return changes

    def _stop_and_go_on(self, folder, mark):
        with self.shim.armed(shim.Kind.SIGNAL, self.count // 2, signal.SIGINT):
            assert self.program.run(folder, mark) == 130
        assert self.program.go_on(folder, mark) == 0

    def disk_after(self, changes):
        made = disk.Disk()
        for change in changes:
            made.apply(change)
        return made

    # Faults while the program runs.

    def _run(self, folder, kind, at, value=0, *, lasting=False):
        promised = []
        with self.shim.armed(kind, at, value, lasting=lasting):
            try:
                self.code = self.program.run(folder, promised.append)
            except OSError:
                self.code = 1
        return promised

    def error(self, rng, folder):
        """Changes are refused with an error"""
        value = rng.choice([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
        at, lasting = rng.randint(1, self.count), rng.random() < 0.5
        self.fault = f"{errno.errorcode[value]} at change {at}{' and all later ones' if lasting else ''}"
        return self._run(folder, shim.Kind.FAIL, at, value, lasting=lasting)

    def full(self, rng, folder):
        """The disk is full within a write"""
        at = rng.randint(1, self.count)
        self.fault = f"disk full at change {at}"
        return self._run(folder, shim.Kind.FULL, at, lasting=True)

    def short(self, rng, folder):
        """Writes write only a part"""
        at, lasting = rng.randint(1, self.count), rng.random() < 0.5
        self.fault = f"short write at change {at}{' and all later ones' if lasting else ''}"
        return self._run(folder, shim.Kind.SHORT, at, lasting=lasting)

    def signal(self, rng, folder):
        """SIGINT, SIGTERM and SIGHUP"""
        number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        at, after = rng.randint(1, self.count), rng.uniform(0, self.seconds)
        if rng.random() < 0.5:
            self.fault = f"{number.name} at change {at}"
            return self._run(folder, shim.Kind.SIGNAL, at, number)
        self.fault = f"{number.name} after {after:.3f} s"
        timer = threading.Timer(after, os.kill, (os.getpid(), number))
        promised = []
        timer.start()
        try:
            self.code = self.program.run(folder, promised.append)
        finally:
            timer.cancel()
            timer.join()
        return promised

    def sigkill(self, rng, folder):
        """SIGKILL of a process, also within a write"""
        kind = rng.choice([shim.Kind.TEAR, shim.Kind.KILL_BEFORE, shim.Kind.KILL_AFTER])
        at = rng.randint(1, self.count)
        self.fault = f"{kind.name} at change {at}"
        variables = {"LD_PRELOAD": str(self.scratch / "shim.so"), shim.VARIABLE: str(self.root)}
        variables |= {"ADAMJAX_FAULTS_KIND": str(int(kind)), "ADAMJAX_FAULTS_AT": str(at)}
        ended = subprocess.run(
            [sys.executable, "-m", "adamjax", *self.program.command(folder)],
            env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        return []

    # Faults after which the folder is made from the record.

    def _until_a_moment(self, rng):
        changes = rng.choice(self.records)
        return changes[: rng.randint(1, len(changes))]

    def kill(self, rng, folder):
        """Kills at any change, replayed"""
        changes = self._until_a_moment(rng)
        self.fault = f"killed after change {len(changes)}, {changes[-1].op.name} {changes[-1].path}"
        if changes[-1].op is disk.Op.WRITE and rng.random() < 0.5:
            size = rng.randrange(len(changes[-1].data))
            changes[-1] = changes[-1]._replace(data=changes[-1].data[:size])
            self.fault += f", of which {size} bytes were written"
        made = self.disk_after(changes)
        return self._replay(folder, made, made.write)

    def power(self, rng, folder):
        """Power losses, replayed"""
        changes = self._until_a_moment(rng)
        journal = rng.choice(list(disk.Journal))
        last = f"{changes[-1].op.name} {changes[-1].path}"
        self.fault = f"power lost after change {len(changes)}, {last}; of names that were not synced: {journal.value}"
        made = self.disk_after(changes)
        return self._replay(folder, made, lambda target: made.write_after_power_loss(target, rng, journal))

    def _replay(self, folder, made, write):
        target = self.scratch / "replayed"
        write(target)
        if (target / "recorded").exists():
            (target / "recorded").rename(folder)
        shutil.rmtree(target)
        return list(map(json.loads, made.marks))

    def _killed(self, rng, folder):
        """Make the folder of a run that ended, or was killed after something was promised."""
        changes = rng.choice(self.records)
        if rng.random() < 0.5:
            marks = [i for i, change in enumerate(changes) if change.op is disk.Op.MARK]
            changes = changes[: rng.choice(marks[len(marks) // 2 :]) + 1]
        made = self.disk_after(changes)
        return self._replay(folder, made, made.write)

    def read(self, rng, folder):
        """Reads that fail"""
        promised = self._killed(rng, folder)
        at, lasting = rng.randint(1, 30), rng.random() < 0.5
        self.fault = f"EIO at read {at}{' and all later ones' if lasting else ''}"
        with self.shim.armed(shim.Kind.FAIL_READ, at, errno.EIO, lasting=lasting):
            try:
                self.code = self.program.go_on(folder, lambda _: None)
            except (OSError, DamagedFileError):
                self.code = 1
        return promised

    def damage(self, rng, folder):
        """Files that are damaged on disk"""
        promised = self._killed(rng, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        # Most files are those of arrays; folders are hit alike, however many files they have.
        parent = rng.choice(sorted({path.parent for path in files}))
        chosen, damage_file = rng.choice([path for path in files if path.parent == parent]), rng.choice(damage.KINDS)
        self.damaged = str(chosen.relative_to(folder))
        self.fault = f"{damage_file.__name__} {self.damaged}"
        damage_file(chosen, [path for path in files if path != chosen], rng)
        return promised

    def campaign(self, fault, times, seed):
        """Inject faults of one kind; return how many ended how. None counts those by which something was lost."""
        signal.signal(signal.SIGALRM, _hangs)
        for number in (signal.SIGTERM, signal.SIGHUP):  # a program that handles them does so before they come here
            signal.signal(number, _ends)
        ended = Counter()
        for number in range(times):
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 10)  # again, if the program takes no notice
            try:
                ended[self._inject(fault, random.Random(f"{seed} {fault} {number}"))] += 1
            except LostError as error:
                ended[None] += 1
                print(f"LOST: {self.program.name}, {fault} {number} of seed {seed}, {self.fault}: {error}", flush=True)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        return ended

    def _inject(self, fault, rng):
        """Inject a fault; return how it ended."""
        folder = self.root / "faulty"
        self.fault, self.damaged, self.code = "", None, 0
        try:
            promised = getattr(self, fault)(rng, folder)
            if not folder.exists():
                if promised and promised[-1]:
                    raise LostError(f"{promised[-1]} was saved, now there is no folder")
                return Outcome.SURVIVED
            outcome = self.program.check(folder, promised[-1] if promised else None, self.damaged)
            if fault == "signal" and not (self.code in (0, 130) and outcome is Outcome.SURVIVED):
                raise LostError(f"after the signal it ends with {self.code}, and is not resumed: {outcome.name}")
            return Outcome.SAID if self.code in (1, 2) and outcome is Outcome.SURVIVED else outcome
        except (KeyboardInterrupt, Died) as error:
            if folder.exists():
                raise LostError(f"it dies of the signal in {_last_line(error)}") from error
            return Outcome.SURVIVED  # it had not begun
        finally:
            if folder.exists():
                shutil.rmtree(folder)


def _contents(folder):
    """Return the paths and contents of files, and the paths of folders."""
    found = ((path, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*"))
    return {(str(path.relative_to(folder)), content) for path, content in found}


def _last_line(error):
    """Return where an exception was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{where.filename.rpartition('site-packages/')[2]}, line {where.lineno}"


def _hangs(*_):
    raise LostError(f"it hangs for {PATIENCE} s")


def _ends(number, _):
    raise Died(signal.Signals(number).name)
