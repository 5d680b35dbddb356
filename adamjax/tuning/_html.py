"""The report of a tuning as one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from html import escape

from adamjax._core import html
from adamjax._core.html import Rows

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
    figures = "".join(html.figure(*CAPTIONS[name], png) for name, png in pictures.items())
    return html.document(
        title,
        f"""<p class="verdict">{escape(verdict)}</p>
<h2>Best setting</h2>
<pre>{escape(best)}</pre>
<p>{escape(horizon)}</p>
{html.table("Confirmed settings", settings)}
{f"<h2>Warnings</h2>{html.items(warnings)}" if warnings else ""}
<h2>Results</h2>
{figures}
<details>
<summary>All {len(runs) - 1} runs</summary>
{html.table("All runs", runs)}
</details>
<h2>Specification</h2>
{html.facts(question)}
<h2>Execution</h2>
{html.facts(facts)}""",
    )
