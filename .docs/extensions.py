"""Extensions of Sphinx.

Notebooks with their pictures, names that become links, docstrings in Google's style with Markdown, `--help`, and pages
that load nothing from elsewhere.
"""

import base64
import contextlib
import inspect
import io
import json
import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

log = logging.getLogger(__name__)

# What a browser loads by itself; links to other sites may be anywhere.
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*\shref=["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
)

# Names in backticks that are neither in adamjax nor arguments: of other libraries, files, and results of functions.
OTHERS = re.compile(
    r"(jax|jnp|np|torch|optax|flax|nnx|equinox|eqx|optuna|concurrent|mpi4py)\.[\w.]+|\w+\.(json|jsonl|html|png)"
    r"|PartitionSpec|DataLoader|ProcessPoolExecutor|CUDA_VISIBLE_DEVICES|batches|stateful|batch_axes|submit|initializer"
    r"|rngs|sow|is_training|deterministic|use_running_average|inference"
    r"|warmup_fraction|end_fraction|(in|out)_shardings|jax_enable_x64|bias_correction_[mn]u|load_state_dict|aux|param_names|ReduceLROnPlateau"
)


def copy_notebooks(source: Path, target: Path) -> None:
    """Copy the notebooks, their links made those of the site, and the picture of the cell tagged as a thumbnail."""
    target.mkdir(exist_ok=True)
    for path in source.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        (target / path.name).write_text(text.replace("](../.docs/", "](../"), encoding="utf-8")
        for cell in json.loads(text)["cells"]:
            if "thumbnail" in cell["metadata"].get("tags", ()):
                picture = next(output["data"]["image/png"] for output in cell["outputs"] if "data" in output)
                (target / f"{path.stem}.png").write_bytes(base64.b64decode("".join(picture)))


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A link for a name of adamjax in single backticks; code for an argument, a field or an expression.

    Any other name stays unresolved, which is an error of the build.
    """
    if node.get("refdomain") != "py" or node["reftype"] != "obj":
        return None
    target, objects = node["reftarget"], env.get_domain("py").objects
    found = [name for name in (f"adamjax.{target}", target) if name in objects]
    found = found or [name for name, at in objects.items() if name.endswith(f".{target}") and not at.aliased]
    words = _words(tuple(objects))
    if len(found) == 1 and target not in words:
        at = objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], at.docname, at.node_id, contnode, found[0])
    is_name = re.fullmatch(r"[A-Za-z_][\w.]*", target) and not OTHERS.fullmatch(target)
    return None if is_name and not found and target.split(".")[0] not in words else contnode


@cache
def _words(objects: tuple[str, ...]) -> set[str]:
    """The names of arguments and fields of all documented objects."""
    found: set[str] = set()
    for obj in map(_find, objects):
        with contextlib.suppress(TypeError, ValueError):
            found |= inspect.signature(obj).parameters.keys()
        found |= set(getattr(obj, "__annotations__", ()))
    return found


def _find(name: str) -> Any:
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            obj = import_module(".".join(parts[:i]))
            for part in parts[i:]:
                obj = getattr(obj, part, None)
            return obj


def mend(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert Markdown in docstrings of Google's style to reST, after napoleon."""
    if not any(lines):
        log.warning("%s has no docstring", name)
    # In "The name: its description.", napoleon takes the name for a type. Put the sentence together again.
    for field, label in ((":returns: ", ":rtype: "), ("", ":type: ")):
        for i in [i for i, line in enumerate(lines) if line.startswith(label)][::-1]:
            kind = lines.pop(i).removeprefix(label)
            at = next(j for j, line in enumerate(lines) if line.startswith(field))
            lines[at] = f"{field}{kind}: {lines[at].removeprefix(field)}"
    paragraphs, verbatim = "\n".join(lines).split("\n\n"), False
    for i, paragraph in enumerate(paragraphs):
        first = paragraph.lstrip("\n")
        verbatim = first.startswith((">>>", ".. ")) or (verbatim and first.startswith("    "))
        if not verbatim:
            paragraphs[i] = _table(paragraph) if first.lstrip().startswith("|") else _inline(paragraph)
    lines[:] = "\n\n".join(paragraphs).split("\n")


def _inline(text: str) -> str:
    """Escape bars, and separate `name` from letters that follow it, such as a plural's."""
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"^(?=[a-z])", r"\\ ", part) if i else part for i, part in enumerate(parts[::2])]
    return "".join(part.replace("|", r"\|") if i % 2 == 0 else part for i, part in enumerate(parts))


def _table(text: str) -> str:
    """A table of Markdown as one of reST."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    head, _, *body = rows
    cells = [
        "\n".join(("   * - " if j == 0 else "     - ") + cell for j, cell in enumerate(row)) for row in (head, *body)
    ]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *cells])


class CommandHelp(Directive):
    """The output of `adamjax COMMAND --help`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from adamjax.cli import main

        os.environ["COLUMNS"] = "88"
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([self.arguments[0], "--help"])
        return [nodes.literal_block(text=out.getvalue(), language="text")]


def refuse_elsewhere(app: Sphinx, error: Exception | None) -> None:
    """Warn of what a page loads from another site: the documentation is complete offline, its search too."""
    for path in () if error else [*Path(app.outdir).rglob("*.html"), *Path(app.outdir).rglob("*.css")]:
        for found in ELSEWHERE.findall(path.read_text(encoding="utf-8")):
            log.warning("%s loads something from elsewhere: %s", path, found)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    app.connect("build-finished", refuse_elsewhere)
    app.connect("autodoc-process-docstring", mend)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
