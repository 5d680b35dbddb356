"""A report as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

TITLES = {
    "hyperparameters": "Each hyperparameter",
    "curves": "Learning curves",
    "heat_map": "Learning rate and weight decay",
    "parallel": "All hyperparameters together: the darker, the better",
    "importance": "Importance of each hyperparameter",
    "range_test": "Range test of the learning rate",
}
STYLE = """
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; }
  pre.code { white-space: pre-wrap; }
  img { max-width: 100%; }
  figure { margin: 2rem 0; }
  figcaption { font-weight: 600; margin-bottom: .5rem; }
  th { text-align: left; padding-right: 1rem; vertical-align: top; }
  td { overflow-wrap: anywhere; }
"""


def page(
    best: str, table: str, warnings: Sequence[str], pictures: Mapping[str, bytes], question: Mapping[str, object]
) -> str:
    """Return the page: the best setting, the table, the warnings, PNG pictures by name, and what was tuned."""
    title = f"Tuning of {question['problem']}"
    notes = "".join(f"<li>{escape(x)}</li>\n" for x in warnings)
    figures = "".join(
        f'<figure><figcaption>{TITLES[name]}</figcaption><img alt="{TITLES[name]}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>\n'
        for name, png in pictures.items()
    )
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(x))}</td></tr>\n" for name, x in question.items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
<h2>Best setting</h2>
<pre class="code">{escape(best)}</pre>
<pre>{escape(table)}</pre>
{f"<h2>Warnings</h2><ul>{notes}</ul>" if notes else ""}
<h2>Results</h2>
{figures}
<h2>Specification</h2>
<table>
{rows}</table>
</html>
"""
