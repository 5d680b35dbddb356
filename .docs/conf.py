"""The documentation site: `sphinx-build -W --keep-going .docs build/docs`."""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from extensions import copy_notebooks  # noqa: E402

from adamjax import __version__  # noqa: E402

project = "adamjax"
release = version = __version__
copyright = "The adamjax authors, Apache-2.0"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
    "extensions",
]

# Sphinx reads pages from this folder only, and the notebooks are at the top of the repository.
copy_notebooks(ROOT / "notebooks", HERE / "notebooks")
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Fields", "params_style"), ("References", "notes_style")]

# A name in single backticks becomes a link if it names something in adamjax; see extensions.py.
default_role = "py:obj"
nitpicky = True

# Serve MathJax from the site itself, so that pages load nothing from elsewhere.
_mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
html_static_path = ["static", str(_mathjax / "tex-svg.js")]
mathjax_path = "tex-svg.js"

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"adamjax {version}"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_css_files = ["style.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#14539a", "color-brand-content": "#14539a"},
    "dark_css_variables": {"color-brand-primary": "#7db7ff", "color-brand-content": "#7db7ff"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
