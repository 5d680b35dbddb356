"""The documentation site: its code runs, its links lead somewhere, and its reference has every public name once."""

import doctest
import importlib.util
import inspect
import json
import re
import shlex
import sys
import tomllib
import types
from operator import attrgetter
from pathlib import Path

import calls
import pytest

import adamjax
from adamjax.cli import main

pytestmark = pytest.mark.numbers

ROOT = Path(__file__).parent.parent
DOCS = ROOT / ".docs"
GUIDES = [path for folder in ("guides", "recipes") for path in sorted((DOCS / folder).glob("*.md"))]
# Libraries that few tests need: where one is not installed, the blocks that import it are left out.
NOT_REQUIRED = ("jmp", "mlflow", "wandb")


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore:fused='auto' leaves")  # where there is no compiler
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's models
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guide(guide, tmp_path, monkeypatch):
    """The blocks of a page are one program."""
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    missing = [f"import {name}\n" for name in NOT_REQUIRED if importlib.util.find_spec(name) is None]
    program = "\n".join(block for block in blocks if not any(line in block for line in missing))
    if "import torch\n" in program:
        pytest.importorskip("torch")
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, guide.name, "exec"), page.__dict__)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
def test_pages_of_the_reference_begin_with_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in (DOCS / "api").glob("*.rst"):
        begin = re.split(r"^\.\. (?:auto(?:function|class)|command-help)::", page.read_text(), flags=re.MULTILINE)[0]
        if page.stem == "command_line":
            commands = re.findall("^ +adamjax (.*)", begin.split("The problem")[0], re.MULTILINE)
            assert commands
            assert not any(main(shlex.split(command, comments=True)) for command in commands)
        else:
            assert ">>>" in begin, page
            failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
            assert not failed, page


def _pages():
    """The text of each page of prose, without code."""
    found = {path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob(".github/*.md"), *DOCS.rglob("*.md"))}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        found[path] = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {path: re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE) for path, text in found.items()}


def test_links_lead_somewhere():
    """Other sites are not asked: `sphinx-build -b linkcheck` does that."""
    pages = _pages()
    for path, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub("`[^`]*`", "", text)):
            if ":" in link:
                assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", link), f"{path}: {link}"
                continue
            file, _, anchor = link.partition("#")
            to = (path.parent / file).resolve() if file else path
            if to.parent == DOCS / "notebooks":  # a copy that the build makes
                to = ROOT / "notebooks" / to.name
            assert to.is_file(), f"{path}: {link}"
            if anchor:
                headings = re.findall("^#+ (.*)", pages[to], re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{path}: {link}"


def test_every_claim_of_the_readme_has_its_evidence():
    pages = _pages()
    for path, text in pages.items():
        for name in re.findall(r"\btests/\w+\.py", text):
            assert (ROOT / name).is_file(), f"{path}: {name}"
        for names in re.findall(r"python -m benchmarks((?: +[a-z]\w*)+)", text):
            for name in names.split():
                assert (ROOT / "benchmarks" / f"bench_{name}.py").is_file(), f"{path}: {name}"
    readme, evidence = pages[ROOT / "README.md"], pages[DOCS / "evidence.md"]

    def entries(text, begin, end, pattern):
        return len(re.findall(pattern, text.split(begin)[1].split(end)[0], re.MULTILINE))

    promises = entries(readme, "<!-- docs: intro -->", "<!-- end", "^- ")
    measurements = entries(readme, "## Measurements", "## ", r"^\|") - 2  # the head and the line below it
    features = entries(readme, "## Features", "## ", "^- ")
    assert min(promises, measurements, features) > 0
    assert entries(evidence, "## Promises", "## ", r"^\|") - 2 == promises
    assert entries(evidence, "## Measurements", "## ", r"^\|") - 2 == measurements
    assert entries(evidence, "## Features", "## ", r"^\|") - 2 == features


def test_ten_lines_are_enough_to_start():
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "guides" / "start.md").read_text(), re.DOTALL | re.MULTILINE)
    assert all(len([line for line in block.splitlines() if line]) <= 10 for block in blocks)
    cards = re.findall(r"\{grid-item-card\} \[.*\]\(guides/start\.md#(.*)\)", (DOCS / "index.md").read_text())
    assert len(cards) == (DOCS / "guides" / "start.md").read_text().count("\n## ")


def test_the_page_on_versions_has_the_lowest_of_each_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {f"Python{project['requires-python']}", *project["dependencies"]}
    requirements.update(*project["optional-dependencies"].values())
    rows = re.findall(r"^\| ([\w, -]+) \| ([\d.]+) \|", (DOCS / "guides" / "versions.md").read_text(), re.MULTILINE)
    assert {"Python", "jax, jaxlib", "flax", "optax", "orbax-checkpoint"} <= dict(rows).keys()
    for names, version in rows:
        for name in names.split(", "):
            assert {x for x in requirements if x.startswith(f"{name}>=")} == {f"{name}>={version}"}


def test_notebooks_say_what_is_learnt_and_what_comes_next():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        first, *_, last = ("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        assert first.startswith("# "), path
        assert "ou will learn" in re.sub(r"\s+", " ", first), path
        assert last.startswith("## Next steps\n"), path
        assert "](" in last, path


def test_the_reference_has_every_public_name_once():
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.rst"))
    names = re.findall(r"^\.\. auto(?:function|class):: adamjax\.(\S+)", pages, re.MULTILINE)
    documented = [attrgetter(name)(adamjax) for name in names]
    assert len(documented) == len(set(documented))
    public = calls.public()
    missing = {name for name, x in public.items() if x not in documented}
    assert missing == {name for name in calls.INNER if name in public} - {"kernels.Fused"}


def test_every_public_function_says_what_it_returns_and_raises():
    """But those that are torch's, whose arguments and errors are torch's as well."""
    for name, x in calls.public().items():
        if not inspect.isfunction(x) or name in calls.INNER or name.startswith("interop.torch."):
            continue
        signature = inspect.signature(x)
        if signature.return_annotation not in (None, "None"):
            assert "\nReturns:\n" in inspect.getdoc(x), name
        if signature.parameters:
            assert "\nRaises:\n" in inspect.getdoc(x), name


def test_every_public_class_and_its_members_are_described():
    for name, x in calls.public().items():
        if inspect.isclass(x):
            assert x.__doc__, name
            for member, content in vars(x).items():
                described = inspect.isfunction(content) or isinstance(content, (property, classmethod))
                if described and not member.startswith("_"):
                    assert inspect.getdoc(content), f"{name}.{member}"
