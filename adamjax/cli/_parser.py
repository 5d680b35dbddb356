"""A parser of the command line whose errors are one line, with a hint."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from adamjax.cli._flags import CommandError


class Parser(argparse.ArgumentParser):
    """Raises `CommandError` where argparse prints the usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        nearest = _nearest(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else []
        raise CommandError(f"{message}; {_hint(nearest, self)}")


def refuse_unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse what the parser of a command has left over."""
    shown = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    known = [flag for action in shown for flag in action.option_strings]
    if flags := [word.partition("=")[0] for word in words if word.startswith("-")]:
        raise CommandError(f"there is no flag {flags[0]}; {_hint(_nearest(flags[0], known), parser)}")
    if words:
        raise CommandError(f"{words[0]} is one argument too many; {_hint([], parser)}")


def _nearest(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(known), 1, cutoff=0.7)


def _hint(nearest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    return f"did you mean {nearest[0]}?" if nearest else f"see {parser.prog} --help"
