"""The command line: `adamjax train`, `tune`, `lr-range` and `report`."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from adamjax.cli import _train, _tune
from adamjax.cli._flags import HYPERPARAMETERS as HYPERPARAMETERS
from adamjax.cli._flags import OPTIMIZERS as OPTIMIZERS
from adamjax.cli._flags import PROBLEMS as PROBLEMS
from adamjax.cli._flags import SCHEDULES as SCHEDULES
from adamjax.cli._flags import CommandError

COMMANDS = {"train": _train.run, "lr-range": _tune.lr_range, "tune": _tune.tune, "report": _tune.report}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: the training diverged, every trial did, or no learning rate can be suggested. 2: it
    could not start. 130: stopped by Ctrl-C.
    """
    try:
        options = _parse(arguments)
        return int(COMMANDS[options.pop("command")](options))
    except CommandError as error:
        print(f"adamjax: error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    """The flags by name; those that have no value are absent."""
    parser = argparse.ArgumentParser("adamjax", description="Adam for JAX.")
    parser.add_argument("--version", action="version", version=f"adamjax {version('adamjax')}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = _train.add_parser(commands)
    _tune.add_parsers(commands)
    options = vars(parser.parse_args(arguments))
    if "config" in options:
        try:
            train.set_defaults(**json.loads(options["config"].read_text())["flags"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--config {options['config']} is not the config.json of a run ({error!r})") from error
        options = vars(parser.parse_args(arguments))
    return options
