"""Text from files and strangers, made safe to print and to draw."""

import codecs

REPLACE = "adamjax"  # name of the error handler below


def printable(text: str) -> str:
    """Return text without what a terminal would obey: control characters become escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def drawable(text: str) -> str:
    """Return text that matplotlib draws as it is, without reading formulas between dollar signs."""
    return printable(text).replace("$", r"\$")


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks: an error handler for `codecs`."""
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] == "±":
        return "+-", error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(REPLACE, _replacement)
