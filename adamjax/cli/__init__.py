"""The command line: `adamjax train`, `tune`, `lr-range`, `report` and `kernels`."""

import argparse
import json
from collections.abc import Sequence

from adamjax._core.version import __version__
from adamjax.cli import _kernels, _train, _tune
from adamjax.cli._distributed import DISTRIBUTED_FLAGS
from adamjax.cli._flags import HYPERPARAMETERS as HYPERPARAMETERS
from adamjax.cli._flags import OPTIMIZERS as OPTIMIZERS
from adamjax.cli._flags import SCHEDULES as SCHEDULES
from adamjax.cli._flags import CommandError, Options, flag
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
    command could not start. 130: Ctrl-C stopped it.
    """
    try:
        options = _parse(arguments)
        return int(COMMANDS[options.pop("command")](options))
    except CommandError as error:
        return error.show()


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
        train.set_defaults(**_flags_of_run(options, train))
        options = _merged(parser.parse_args(arguments))
        if "resume" in options:
            _refuse_changes(options, train)
    return options


def _merged(parsed: argparse.Namespace) -> Options:
    """Return the values of the flags, with each value that has two spellings under one name."""
    options = vars(parsed)
    if "problem_flag" in options:
        options["problem"] = options.pop("problem_flag")
    return options | dict(options.pop("fix", ()))


def _flags_of_run(options: Options, train: argparse.ArgumentParser) -> Options:
    """Return the checked flags of the run that `--resume` or `--config` names: a user may have edited them."""
    path = options["resume"] / "config.json" if "resume" in options else options["config"]
    source = f"--resume {options['resume']}: {path}" if "resume" in options else f"--config {path}"
    try:
        flags = dict(json.loads(path.read_text())["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{source} is not the config.json of a run ({error!r})") from error
    known = {action.dest: action for action in train._actions}
    for name, x in flags.items():
        if name not in known:
            raise CommandError(f"{source} has a flag {name}, which train does not know: remove it")
        choices = known[name].choices  # argparse does not check defaults against them
        if choices and x not in choices:
            raise CommandError(f"{source}: {flag(name)} is {x!r}, expected one of {', '.join(choices)}")
    return flags


def _refuse_changes(options: Options, train: argparse.ArgumentParser) -> None:
    """Refuse flags of a resumed run that differ from those it began with, now the defaults of `train`."""
    for name, here in options.items():
        before = train.get_default(name)
        if name not in ("command", "resume", "checkpoint_every", *DISTRIBUTED_FLAGS) and here != before:
            written, config = flag(name), options["resume"] / "config.json"
            new = f"{written} {here}"
            if name == "problem":
                written, new = "the problem", here
            was = "not given" if before == argparse.SUPPRESS else before
            raise CommandError(
                f"{written} was {was}, here it is {here}: a run that is resumed goes on as it began; "
                f"for another one, train --config {config} {new}"
            )
