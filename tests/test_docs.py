"""The documentation site: the code in its guides runs, and its reference has every public name once."""

import importlib.util
import inspect
import re
import sys
import types
from operator import attrgetter
from pathlib import Path

import calls
import pytest

import adamjax

pytestmark = pytest.mark.numbers

DOCS = Path(__file__).parent.parent / ".docs"
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
