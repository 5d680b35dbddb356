"""A report as one self-contained HTML page."""

import base64
import struct
from collections.abc import Mapping, Sequence
from html import escape

Rows = Sequence[Sequence[str]]  # of a table; the first one is the head

CAPTIONS = {
    "progress": ("The search", "A dot is a trial, in the colour of its stage."),
    "confirmation": (
        "The runs with fresh seeds",
        "A dot is a run, a bar the mean of a setting, and a thin line joins the runs of one seed. Hollow dots are of "
        "settings that left the race early, whose means are of fewer seeds. Crosses diverged.",
    ),
    "schedules": ("The learning rate in the course of a run", ""),
    "hyperparameters": ("Each hyperparameter", "A point is a trial. Colours are those of the bar below."),
    "heat_map": (
        "The learning rate with each other hyperparameter",
        "A point is a trial: the darker, the better. The colours of all pictures are those of this bar.",
    ),
    "parallel": (
        "All hyperparameters together",
        "A line is a trial: the darker, the better. The best is black, the defaults are orange. Dotted lines ended "
        "early, red ones diverged.",
    ),
    "curves": ("Learning curves", "A dot is an evaluation."),
    "importance": ("Importance of each hyperparameter", ""),
    "range_test": ("Range test of the learning rate", ""),
}
WIDE = 900  # pixels, beyond which a picture is not shrunk to the width of a phone
STYLE = """
  :root { color-scheme: light dark; --text: #222; --page: #fff; --box: #f3f3f3; --line: #ddd; --mild: #666; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
    color: var(--text); background: var(--page); }
  h1, td { overflow-wrap: anywhere; }
  pre { background: var(--box); padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
  .verdict { font-size: 1.1rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
  .scroll th, .scroll td { white-space: nowrap; }
  figure { margin: 2rem 0; }
  figcaption { margin-bottom: .5rem; color: var(--mild); }
  figcaption b { color: var(--text); }
  img { max-width: 100%; background: #fff; }
  img.wide { min-width: 40rem; }
  summary { cursor: pointer; font-weight: 600; }
  @media screen and (prefers-color-scheme: dark) {
    :root { --text: #ddd; --page: #161616; --box: #252525; --line: #3a3a3a; --mild: #999; }
  }
  @media print {
    body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
    img.wide { min-width: 0; }
    figure, tr { break-inside: avoid; }
    h2 { break-after: avoid; }
    .scroll { overflow: visible; }
    .scroll th, .scroll td { white-space: normal; padding-right: .5rem; }
    details:not([open]) { display: none; }
  }
"""


def page(
    title: str,
    *,
    verdict: str,
    best: str,
    horizon: str,
    settings: Rows,
    warnings: Sequence[str],
    pictures: Mapping[str, bytes],
    runs: Rows,
    question: Mapping[str, object],
    facts: Mapping[str, str],
) -> str:
    """Return the page.

    Args:
      title: The heading.
      verdict: The sentences that say why the best is the best.
      best: The best setting, an expression.
      horizon: How to train for another number of steps.
      settings: The table of the confirmed settings.
      warnings: Reasons to doubt the results.
      pictures: PNG files by name.
      runs: The table of all runs.
      question: What was tuned, by name.
      facts: Where, when and with which versions, by name.
    """
    notes = "".join(f"<li>{escape(x)}</li>\n" for x in warnings)
    figures = "".join(_figure(name, png) for name, png in pictures.items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(verdict)}</p>
<h2>Best setting</h2>
<pre>{escape(best)}</pre>
<p>{escape(horizon)}</p>
{_table(settings)}
{f"<h2>Warnings</h2><ul>{notes}</ul>" if notes else ""}
<h2>Results</h2>
{figures}
<details>
<summary>All {len(runs) - 1} runs</summary>
{_table(runs)}
</details>
<h2>Specification</h2>
{_facts(question)}
<h2>Execution</h2>
{_facts(facts)}
</html>
"""


def _figure(name: str, png: bytes) -> str:
    title, note = CAPTIONS[name]
    (width,) = struct.unpack(">I", png[16:20])  # of the header
    shown = ' class="wide"' if width > WIDE else ""
    data = base64.b64encode(png).decode()
    return (
        f"<figure><figcaption><b>{title}</b> {note}</figcaption>"
        f'<div class="scroll"><img alt="{title}"{shown} src="data:image/png;base64,{data}"></div></figure>\n'
    )


def _table(rows: Rows) -> str:
    head, *body = ["".join(f"<td>{escape(x)}</td>" for x in row) for row in rows]
    lines = "".join(f"<tr>{row}</tr>\n" for row in body)
    return f'<div class="scroll"><table>\n<tr>{head.replace("td>", "th>")}</tr>\n{lines}</table></div>'


def _facts(facts: Mapping[str, object]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(x))}</td></tr>\n" for name, x in facts.items())
    return f"<table>\n{rows}</table>"
