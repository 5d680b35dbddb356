"""Text from files and strangers, made safe to print and to draw."""

import codecs

REPLACE = "adamjax"  # name of the error handler below
_ASCII = {
    "±": "+-", "×": "x", "·": "*", "µ": "u", "²": "^2", "≤": "<=", "≥": ">=", "≈": "~", "−": "-",  # noqa: RUF001
    "…": "...", "–": "-", "—": "--", "‘": "'", "’": "'", "“": '"', "”": '"', "→": "->", "←": "<-",  # noqa: RUF001
}  # fmt: skip


def printable(text: str) -> str:
    """Return text without what a terminal would obey: control characters become escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def drawable(text: str) -> str:
    """Return text that matplotlib draws as it is, without reading formulas between dollar signs."""
    return printable(text).replace("$", r"\$")


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks: an error handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        return codecs.backslashreplace_errors(error)
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error(REPLACE, _replacement)
