"""The command line: `adamjax train`, `tune`, `lr-range`, `report` and `kernels`."""

import argparse
import io
import sys
from collections.abc import Sequence

from adamjax._core import signals, text
from adamjax._core.version import __version__
from adamjax.cli import _config, _kernels, _train, _tune
from adamjax.cli._flags import HYPERPARAMETERS as HYPERPARAMETERS
from adamjax.cli._flags import OPTIMIZERS as OPTIMIZERS
from adamjax.cli._flags import SCHEDULES as SCHEDULES
from adamjax.cli._flags import STOPPED, CommandError, Options
from adamjax.cli._subject import PROBLEMS as PROBLEMS

COMMANDS = {
    "train": _train.run,
    "lr-range": _tune.lr_range,
    "tune": _tune.tune,
    "report": _tune.report,
    "kernels": _kernels.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: success. 1: the training diverged, every trial did, or no learning rate can be suggested. 2: the
    command could not start. 130: a signal stopped it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack characters that a command prints
            stream.reconfigure(errors=text.REPLACE)
    try:
        options = _parse(arguments)
        return int(COMMANDS[options.pop("command")](options))
    except CommandError as error:
        return error.show()
    except KeyboardInterrupt as stopped:
        last_words = str(stopped) or STOPPED
        if arguments is None:  # this is the program, and nothing else is to go on
            signals.end_process(last_words)
        print(last_words, file=sys.stderr)
        return signals.STOPPED


def _parse(arguments: Sequence[str] | None) -> Options:
    """Return the values of the flags by name; flags without a value are absent."""
    parser = argparse.ArgumentParser("adamjax", description="Adam for JAX.")
    parser.add_argument("--version", action="version", version=f"adamjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = _train.add_parser(commands)
    _tune.add_parsers(commands)
    _kernels.add_parser(commands)
    options = _merged(parser.parse_args(arguments))
    if options["command"] == "train" and ("config" in options or "resume" in options):
        named = options["problem"]
        train.set_defaults(**_config.flags_of_run(options, train))
        options = _merged(parser.parse_args(arguments))
        _config.check_import(options, named)
        if "resume" in options:
            _config.refuse_changes(options, train)
    return options


def _merged(parsed: argparse.Namespace) -> Options:
    """Return the values of the flags, with each value that has two spellings under one name."""
    options = vars(parsed)
    if "problem_flag" in options:
        options["problem"] = options.pop("problem_flag")
    return options | dict(options.pop("fix", ()))
