"""Folders of tunings: damaged ones, those in use, and those of strangers."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest

from adamjax import DamagedFileError, FolderInUseError
from adamjax.tuning import LrRange, Report, Search, tune

pytestmark = pytest.mark.numbers

FILES = ("tune.json", "trials.jsonl")
WRONG: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, 1e300, "x", "", [], [[]], [None], ["x"], {}, {"x": []}, math.nan)


def objective(optimizer, trial):
    loss = abs(math.log10(trial.arguments["learning_rate"] / 0.01)) + 0.01 * trial.seed
    for epoch in range(8):
        trial.report(epoch, {"loss": loss + 1 / (1 + epoch), "score": -loss})
    return {"loss": loss, "score": math.nan}


# Without halving, which depends on the trials that ended before: one that is made again could end otherwise.
KEYWORDS = {"trials": 5, "confirm": (1, 2), "schedule": "cosine", "steps": 20, "halving": False}


def small(*, out, objective=objective):
    return tune(objective, out=out, **KEYWORDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a tuning that has ended."""
    folder = tmp_path_factory.mktemp("whole")
    small(out=folder)
    return folder


@pytest.fixture(scope="module")
def report(whole):
    return Report.load(whole)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if "pictures" not in request.keywords:
        monkeypatch.setattr(Report, "figures", lambda self: {})


def damaged(whole, folder, **contents):
    """A copy of a folder with other contents of files; None for no file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in FILES:
        content = contents.get(name.partition(".")[0], (whole / name).read_bytes())
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def lines_of(content):
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def flips(content, rng):
    """Contents with a bit flipped, and twice so many bits flipped, all over the content."""
    for at in np.linspace(0, len(content) - 1, 100).astype(int):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.integers(8)
        yield bytes(flipped)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        yield bytes(flipped)


def cuts(content):
    """Contents without their ends, their beginnings, and a part of them; with zeros or noise instead."""
    for at in np.linspace(0, len(content), 12).astype(int):
        yield content[:at]
        yield content[at:]
        yield content[:at] + content[at + 100 :]
        yield content[:at] + bytes(100) + content[at + 100 :]
        yield content[:at] + bytes(len(content) - at)
        yield content[:at] + np.random.default_rng(at).bytes(100) + content[at + 100 :]


def moved(content):
    """Contents with lines removed, doubled, and in another order."""
    lines = lines_of(content)
    for i in range(len(lines)):
        yield b"".join(lines[:i] + lines[i + 1 :])
        yield b"".join([*lines, lines[i]])
        yield b"".join(lines[i:] + lines[:i])


def encodings(content):
    text = content.decode()
    yield b"\xef\xbb\xbf" + content
    yield content.replace(b"\n", b"\r\n")
    yield content.replace(b"\n", b"\r")
    yield content.replace(b"\n", b"\n\n  \n")
    yield from (text.encode(name) for name in ("utf-16", "utf-32", "cp037"))


FOREIGN = (
    *(
        b"",
        b"\n",
        b"x",
        b"[]\n",
        b"{}\n",
        b"null\n",
        b"NaN\n",
        b'{"question": {}, "notes": []}\n',
        b"\x00\x00",
        b"\xff\n",
    ),
    *(b"[" * 100_000 + b"\n", b'{"number": ' * 100_000, b'{"a":' * 100_000 + b"\n", b"1" * 10_000 + b"\n"),
    bytes(range(256)) * 20,
)


def use(folder):
    """Read everything in the report of a folder."""
    found = Report.load(folder)
    content = found.to_json()
    for text in (found.table(), found.verdict, found.horizon, repr(found), *found.warnings):
        assert isinstance(text, str)
    return found, json.loads(content)


def is_part(found, report):
    """Whether a report is right, as far as it has trials."""
    ours = {(t.number, t.seed): t for t in found.trials}
    theirs = {(t.number, t.seed): repr(t) for t in report.trials}
    same = [f.name for f in dataclasses.fields(Report) if f.name not in ("trials", "make", "range_test")]
    return (
        len(ours) == len(found.trials)
        and all(repr(t) == theirs.get(run) for run, t in ours.items())
        and all(getattr(found, name) == getattr(report, name) for name in same)
        and found.range_test.to_json() == report.range_test.to_json()
    )


def check(whole, report, folder, where):
    """Check the report of a damaged folder, and its resumed tuning: right, or a documented error."""
    before = (folder / "trials.jsonl").read_bytes() if (folder / "trials.jsonl").is_file() else b""
    held = [line for line in lines_of((whole / "trials.jsonl").read_bytes()) if line in before]
    outcome = []
    for call in (lambda: is_part(use(folder)[0], report), lambda: small(out=folder).to_json() == report.to_json()):
        said = refusal(call, str(folder), "holds (no|another) tuning", where)
        outcome.append("right" if said is None else "said")
    after = (folder / "trials.jsonl").read_bytes() if (folder / "trials.jsonl").is_file() else b""
    assert all(line in after for line in held), where
    return outcome


def refusal(call, of_damage, of_others, where):
    """The message of the documented error that a call raises; None if it is right."""
    try:
        assert call(), where
    except ValueError as error:
        found = error
    except Exception as error:
        raise AssertionError(where) from error
    else:
        return None
    pattern = re.escape(of_damage) if isinstance(found, DamagedFileError) else of_others
    assert re.search(pattern, str(found)), (where, found)
    assert len(str(found)) < 600, (where, found)
    return str(found)


def test_damaged_folders(whole, report, tmp_path):
    """Each gives the right report and goes on to the right end, or is said to be damaged; no finished trial is lost."""
    rng, outcomes = np.random.default_rng(0), []
    contents = {name: (whole / name).read_bytes() for name in FILES}
    for name, content in contents.items():
        kinds = {
            "flips": flips(content, rng), "cuts": cuts(content), "moved": moved(content),
            "encodings": encodings(content), "foreign": FOREIGN, "swapped": [contents[FILES[name == FILES[0]]], None],
        }  # fmt: skip
        for kind, found in kinds.items():
            for i, other in enumerate(found):
                folder = damaged(whole, tmp_path / "it", **{name.partition(".")[0]: other})
                outcomes.append(check(whole, report, folder, (name, kind, i)))
    print(f"{len(outcomes)} damaged folders: {sum('said' in x for x in outcomes)} said, the others right")
    assert len(outcomes) > 500


def fields(content, path=()):
    """The paths of all fields in JSON, lists as one."""
    for name, x in content.items():
        yield (*path, name)
        if isinstance(x, dict):
            yield from fields(x, (*path, name))


def with_field(content, path, x):
    content = json.loads(json.dumps(content))
    inner = functools.reduce(lambda c, name: c[name], path[:-1], content)
    if x is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = x
    return content


def test_fields_of_any_type(whole, report, tmp_path):
    """Without digests, as earlier versions wrote them, any field of any type is taken or refused, and never a crash."""
    tuned = {k: x for k, x in json.loads((whole / "tune.json").read_text()).items() if k != "digest"}
    lines = (whole / "trials.jsonl").read_text().splitlines()
    rows = [{k: x for k, x in json.loads(line).items() if k != "digest"} for line in lines]
    plain = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    said = tried = 0
    for path in fields(tuned):
        for x in (*WRONG, ...):
            folder = damaged(whole, tmp_path / "it", trials=plain, tune=json.dumps(with_field(tuned, path, x)).encode())
            said += takes_or_refuses(folder, (path, x))
            tried += 1
    for path in fields(rows[2]):
        for x in (*WRONG, ...):
            changed = [*rows[:2], with_field(rows[2], path, x), *rows[3:]]
            trials = b"".join(json.dumps(row).encode() + b"\n" for row in changed)
            folder = damaged(whole, tmp_path / "it", trials=trials, tune=json.dumps(tuned).encode())
            said += takes_or_refuses(folder, (path, x))
            tried += 1
    assert tried > 500
    assert tried / 2 < said < tried


def takes_or_refuses(folder, where):
    before = (folder / "trials.jsonl").read_bytes()
    said = []
    for call in (use, lambda folder: Report.load(folder).save(folder), lambda folder: small(out=folder)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of huge numbers
            said.append(refusal(lambda call=call: [call(folder)], str(folder), "holds another tuning|Invalid", where))
    assert (folder / "trials.jsonl").read_bytes().startswith(before), where
    return said != [None] * 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file(whole, tmp_path, name, kind):
    folder = damaged(whole, tmp_path / "it", **{name.partition(".")[0]: None})
    make = {"folder": os.mkdir, "pipe": os.mkfifo, "loop": lambda path: os.symlink(path, path)}[kind]
    make(folder / name)
    for call in (Report.load, lambda folder: small(out=folder)):
        with pytest.raises(DamagedFileError, match=rf"{re.escape(str(folder / name))} .*choose another folder"):
            call(folder)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileExistsError, match="in, something that is not a folder: choose another one"):
            Search(out=path)
    with pytest.raises(ValueError, match=r"Invalid content value: {'mode': 'ramp'}"):
        LrRange.from_json({"mode": "ramp"})


HOLDER = """
    import sys
    from test_tuning_folders import objective, small
    def endless(optimizer, trial):
        if trial.number == 3:
            print("running", flush=True)
            sys.stdin.read()
        return objective(optimizer, trial)
    endless.__module__ = objective.__module__
    endless.__qualname__ = objective.__qualname__
    small(out=sys.argv[1], objective=endless)
"""


@pytest.mark.slow
def test_a_tuning_that_runs_is_left_alone(whole, tmp_path):
    """Others are refused, but for a report of the trials so far; and when it was killed, another goes on."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"running\n"
        for call in (small, lambda out: Search(out=out)):
            with pytest.raises(FolderInUseError, match=f"is in use by process {process.pid} on"):
                call(out=tmp_path)
        before = [(tmp_path / name).read_bytes() for name in FILES]
        Report.load(tmp_path).save(tmp_path)
        assert (tmp_path / "report.html").exists()
        assert [(tmp_path / name).read_bytes() for name in FILES] == before
    finally:
        process.kill()
        process.communicate()
    assert small(out=tmp_path).to_json() == Report.load(whole).to_json()


def test_an_empty_decision_beside_trials_loses_nothing(whole, tmp_path):
    trials = (whole / "trials.jsonl").read_bytes()
    for content in (b"", None):
        folder = damaged(whole, tmp_path / "it", tune=content)
        for call in (lambda f=folder: small(out=f), lambda f=folder: Search(out=f), lambda f=folder: Report.load(f)):
            with pytest.raises(DamagedFileError, match=r"has (no|a) tune.json.* beside it: restore it from a copy"):
                call()
        assert (folder / "trials.jsonl").read_bytes() == trials


def test_searches_of_one_process_share_a_folder(tmp_path):
    first, second = (Search(trials=5, confirm=None, out=tmp_path) for _ in range(2))
    trials, others = first.ask_round(), second.ask_round()
    first.tell(trials[0], 1.0)
    second.tell(others[1], 2.0)
    first.tell(trials[2], 3.0)
    assert [t.number for t in Report.load(tmp_path).trials] == [0, 1, 2]
    first.close()
    with pytest.raises(ValueError, match="was closed, so nothing can be told any more"):
        first.tell(trials[3], 1.0)
    (tmp_path / "trials.jsonl").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"trials\.jsonl was cut or removed while it was in use"):
        second.tell(others[3], 1.0)
