"""The command line: `adamjax train`, `tune`, `lr-range`, `report`, `kernels`, `doctor` and `completion`."""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from adamjax._core import signals, text
from adamjax._core.version import __version__
from adamjax.cli import _completion, _config, _doctor, _kernels, _train, _tune
from adamjax.cli._flags import HYPERPARAMETERS as HYPERPARAMETERS
from adamjax.cli._flags import OPTIMIZERS as OPTIMIZERS
from adamjax.cli._flags import SCHEDULES as SCHEDULES
from adamjax.cli._flags import STOPPED, CommandError, Options
from adamjax.cli._parser import Parser, refuse_unknown
from adamjax.cli._subject import PROBLEMS as PROBLEMS

COMMANDS = {
    "train": _train.run,
    "lr-range": _tune.lr_range,
    "tune": _tune.tune,
    "report": _tune.report,
    "kernels": _kernels.run,
    "doctor": _doctor.run,
    "completion": _completion.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: success. 1: the training diverged, every trial did, no learning rate can be suggested, or the doctor found
    something wrong, or a disk was full. 2: the command could not start. 130: a signal stopped it. 141: what read its
    output, such as `head`, has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack characters that a command prints
            stream.reconfigure(errors=text.REPLACE)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _written_output():
            options = _parse(words)
            return int(COMMANDS[options.pop("command")](options))
    except CommandError as error:
        return error.show(*(word for word in words[:1] if word in COMMANDS))
    except KeyboardInterrupt as stopped:
        last_words = str(stopped) or STOPPED
        if arguments is None:  # this is the program, and nothing else is to go on
            signals.end_process(last_words)
        print(last_words, file=sys.stderr)
        return signals.STOPPED


@contextmanager
def _written_output() -> Iterator[None]:
    """Raise a `CommandError` if the output cannot be written: its reader has ended, or its disk is full."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # now, since an error at the exit of Python is printed with its traceback
    except OSError as error:
        if not _is_lost(sys.stdout):
            raise
        raise CommandError(f"the output cannot be written: {error}") from error


def _is_lost(stream: TextIO) -> bool:
    """Return whether a stream cannot be written; what follows is then dropped, at the exit of Python too."""
    try:
        print(file=stream, flush=True)
        return False
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True


class Parsers(NamedTuple):
    """The parser of the command line, and those of its commands by name."""

    root: argparse.ArgumentParser
    commands: dict[str, argparse.ArgumentParser]


def parsers() -> Parsers:
    root: argparse.ArgumentParser = Parser("adamjax", description="Adam for JAX.")
    root.add_argument("--version", action="version", version=f"adamjax {__version__}", help="print the version")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", help="see adamjax COMMAND --help for its flags")
    _train.add_parser(commands)
    _tune.add_parsers(commands)
    _kernels.add_parser(commands)
    _doctor.add_parser(commands)
    _completion.add_parser(commands, root)
    return Parsers(root, dict(commands.choices))


def _parse(words: Sequence[str]) -> Options:
    """Return the values of the flags by name; flags without a value are absent."""
    found = parsers()
    options = _given(words, found)
    if options["command"] == "train" and ("config" in options or "resume" in options):
        named, train = options["problem"], found.commands["train"]
        train.set_defaults(**_config.flags_of_run(options, train))
        options = _given(words, found)
        _config.check_import(options, named)
        if "resume" in options:
            _config.refuse_changes(options, train)
    return options


def _given(words: Sequence[str], found: Parsers) -> Options:
    """Return the values of the flags, with each value that has two spellings under one name."""
    parsed, unknown = found.root.parse_known_args(words)
    refuse_unknown(unknown, found.commands.get(parsed.command, found.root))
    if parsed.command is None:
        found.root.error("no command is given")
    options = vars(parsed)
    if "problem_flag" in options:
        options["problem"] = options.pop("problem_flag")
    return options | dict(options.pop("fix", ()))
