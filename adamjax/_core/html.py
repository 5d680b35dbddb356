"""Self-contained HTML pages, which load nothing and run nothing."""

import base64
import struct
from collections.abc import Mapping, Sequence
from html import escape

Rows = Sequence[Sequence[str]]  # of a table; the first one is the head

WIDE = 900  # pixels, beyond which a picture is not shrunk to the width of a phone
STYLE = """
  :root { color-scheme: light dark; --text: #222; --page: #fff; --box: #f3f3f3; --line: #ddd; --mild: #666; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
    color: var(--text); background: var(--page); overflow-wrap: anywhere; }
  pre { background: var(--box); padding: 1rem; white-space: pre-wrap; }
  .verdict { font-size: 1.1rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
  th { overflow-wrap: normal; }
  .scroll td { white-space: nowrap; }
  figure { margin: 2rem 0; }
  figcaption { margin-bottom: .5rem; color: var(--mild); }
  figcaption b { color: var(--text); }
  img { max-width: 100%; background: #fff; }
  .scroll img { min-width: 40rem; }
  summary { cursor: pointer; font-weight: 600; }
  @media screen and (prefers-color-scheme: dark) {
    :root { --text: #ddd; --page: #161616; --box: #252525; --line: #3a3a3a; --mild: #999; }
  }
  @media print {
    body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
    .scroll img { min-width: 0; }
    figure, tr { break-inside: avoid; }
    h2 { break-after: avoid; }
    .scroll { overflow: visible; font-size: 7.5pt; }
    .scroll th, .scroll td { white-space: normal; overflow-wrap: anywhere; padding-right: .5rem; }
    ::details-content { content-visibility: visible; block-size: auto; }
  }
"""


def document(title: str, body: str) -> str:
    """Return a page with a heading; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</html>
"""


def figure(title: str, note: str, png: bytes) -> str:
    """Return a picture with its caption."""
    (width,) = struct.unpack(">I", png[16:20])  # of the header
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    shown = f'<img alt="{escape(title)}" src="{source}">'
    if width > WIDE:
        shown = _scrolling(title, shown)
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{shown}</figure>\n"


def items(lines: Sequence[str]) -> str:
    """Return a list of sentences."""
    shown = "".join(f"<li>{escape(x)}</li>\n" for x in lines)
    return f"<ul>{shown}</ul>"


def table(name: str, rows: Rows) -> str:
    """Return a table that scrolls where it is wider than the page."""
    head, *body = rows
    titles = "".join(f"<th>{escape(x)}</th>" if x else "<td></td>" for x in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(x)}</td>' for x in row)}</tr>\n" for row in body)
    return _scrolling(name, f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}</tbody></table>")


def _scrolling(name: str, content: str) -> str:
    """Return what scrolls by itself, by the keyboard too, and has a name for those who do not see it."""
    return f'<div class="scroll" role="group" aria-label="{escape(name)}" tabindex="0">{content}</div>'


def facts(named: Mapping[str, object]) -> str:
    """Return a table of facts by name."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(x))}</td></tr>\n" for name, x in named.items())
    return f"<table>\n{rows}</table>"
