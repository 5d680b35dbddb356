"""`adamjax completion`."""

import argparse

from adamjax._core.optional import require
from adamjax.cli._flags import Options, Subparsers, errors_for_users
from adamjax.cli._subject import PROBLEMS

_SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_parser(commands: Subparsers, root: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and flags in a shell",
        description="Print a script by which a shell completes commands, flags, their values, files and folders. "
        "It needs  pip install 'adamjax[completion]'. Print it again after an upgrade.",
    )
    parser.add_argument("shell", choices=_SHELLS, help="shell that is to run the script")
    parser.set_defaults(root=root, parsers=commands.choices)


def run(options: Options) -> int:
    with errors_for_users():
        shtab = require("shtab", "completion", "a script for a shell")
    by_metavar = {
        "FILE": shtab.FILE,
        "FOLDER": shtab.DIRECTORY,
        "PROBLEM": shtab.cmd("; ".join(f"echo {name}" for name in PROBLEMS)),  # a line each, and no quotes
    }
    for parser in options["parsers"].values():
        for action in parser._actions:
            if action.metavar in by_metavar:
                action.complete = by_metavar[action.metavar]
    print(shtab.complete(options["root"], options["shell"]))
    return 0
