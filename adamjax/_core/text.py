"""Text from files and strangers, made safe to print."""


def printable(text: str) -> str:
    """Return text without what a terminal would obey: control characters become escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
