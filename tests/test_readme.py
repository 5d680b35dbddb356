"""The README's first example runs as it stands; its prompts are doctests."""

import re
from pathlib import Path

import numpy as np

import adamjax

README = Path(__file__).parent.parent / "README.md"


def test_first_example():
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    namespace = {}
    exec(example, namespace)
    np.testing.assert_allclose(namespace["params"]["w"], [1, -2, 3], atol=0.01)
    np.testing.assert_allclose(namespace["params"]["b"], 0.5, atol=0.01)


def test_the_citation_has_the_version():
    assert f"version = {{{adamjax.__version__}}}" in README.read_text()
