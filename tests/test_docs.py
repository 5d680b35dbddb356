"""The documentation site: the code in its guides runs, and its reference has every public name once."""

import re
import sys
import types
from operator import attrgetter
from pathlib import Path

import calls
import pytest

import adamjax

DOCS = Path(__file__).parent.parent / ".docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore:fused='auto' leaves")  # where there is no compiler
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guide(guide, tmp_path, monkeypatch):
    """The blocks of a page are one program."""
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    program = "\n".join(blocks)
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
