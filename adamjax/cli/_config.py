"""The flags of an earlier run, from its `config.json`: a user may have edited it, or have got it from a stranger."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from adamjax._core import files
from adamjax._core.text import printable
from adamjax.cli._flags import CommandError, Options, flag

# They say where a run takes place and what may run there, which no file decides. A resumed run may change some.
_MOVES = ("resume", "allow_import", "coordinator", "processes", "process_id", "start_timeout", "stall_timeout")
PLACES = ("config", "out", *_MOVES)
_LIMIT = 1 << 20  # bytes
# Other spellings of flags that have a name of their own, and what is none of a run.
_NOT_KEPT = ("help", "fix", "problem_flag")
_LARGEST = 1 << 53  # integer that every float can tell from its neighbours


def flags_of_run(options: Options, train: argparse.ArgumentParser) -> Options:
    """Return the checked flags of the run that `--resume` or `--config` names."""
    is_resumed = "resume" in options
    path: Path = options["resume"] / "config.json" if is_resumed else options["config"]
    source = f"--resume {options['resume']}: {path}" if is_resumed else f"--config {path}"
    try:
        content = files.json_object(files.read(path, _LIMIT), path, "restore it, or begin a new run")
        flags = content.get("flags")
        if not isinstance(flags, dict):
            raise ValueError("it has no flags")
    except (OSError, ValueError) as error:
        raise CommandError(f"{source} is not the config.json of a run ({error})") from error
    known = {action.dest: action for action in train._actions}
    checked = Options()
    for name, x in flags.items():
        if name in PLACES:
            print(printable(f"adamjax: {flag(name)} {x!r} of {path} is not obeyed: pass it yourself"), file=sys.stderr)
            continue
        if name not in known or name in _NOT_KEPT:
            raise CommandError(f"{source} has a flag {name[:80]}, which train does not know: remove it")
        if (expected := _refusal(known[name], x)) is not None:
            raise CommandError(f"{source}: {flag(name)} is {_shown(x)}, expected {expected}")
        checked[name] = x
    return checked


def _refusal(action: argparse.Action, x: Any) -> str | None:
    """Return the expected kind of a flag's value, in words, if `x` is of another one."""
    if action.choices is not None:  # argparse does not check defaults against them
        choices = list(action.choices)
        is_one = any(type(x) is type(choice) and x == choice for choice in choices)
        return None if is_one else f"one of {', '.join(map(str, choices))}"
    if action.nargs == 0:
        return None if isinstance(x, bool) else "true or false"
    if action.type is int:
        return None if type(x) is int and abs(x) <= _LARGEST else "an integer of at most 2**53"
    if action.type is float:
        is_int = type(x) is int and abs(x) <= _LARGEST
        return None if is_int or type(x) is float else "a number"
    return None if isinstance(x, str) else "a text"


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 80 else f"{text[:77]}..."


def check_import(options: Options, named: str) -> None:
    """Have a module imported only if the user has named it, or allows it, or resumes a run of his own.

    `options` are those of the run, and `named` is the problem that the command line has.
    """
    problem: str = options["problem"]
    if ":" not in problem or options.get("allow_import") or named == problem:
        return
    module = problem.partition(":")[0]
    if "resume" in options and _is_own(options["resume"] / "config.json"):
        print(printable(f"adamjax: {options['resume']} imports {module}, for its problem {problem}"), file=sys.stderr)
        return
    source = f"--resume {options['resume']}" if "resume" in options else f"--config {options['config']}"
    raise CommandError(
        f"{source} has the problem {problem}, and importing {module} runs its code: if you trust it, "
        "pass --allow-import"
    )


def _is_own(path: Path) -> bool:
    """Return whether nobody else can have written the file."""
    if os.name != "posix":
        return True
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o002


def refuse_changes(options: Options, train: argparse.ArgumentParser) -> None:
    """Refuse flags of a resumed run that differ from those it began with, now the defaults of `train`."""
    for name, here in options.items():
        before = train.get_default(name)
        if name not in ("command", "checkpoint_every", *_MOVES) and here != before:
            written, config = flag(name), options["resume"] / "config.json"
            new = f"{written} {here}"
            if name == "problem":
                written, new = "the problem", here
            was = "not given" if before == argparse.SUPPRESS else before
            raise CommandError(
                f"{written} was {was}, here it is {here}: a run that is resumed goes on as it began; "
                f"for another one, train --config {config} {new}"
            )
