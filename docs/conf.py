"""The site: `make docs` builds it into build/site, and every warning is an error."""

import sys
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "wellcond"
author = "The wellcond authors"
project_copyright = "The wellcond authors"
version = release = version_of("wellcond")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    # Our own, in docs/_extensions.
    "frameworks",
    "docstrings",
    "external",
    "command_line",
    "schemas",
]

nitpicky = True  # a reference without a target is a warning, and therefore an error
# Types in signatures that have no page: types of extras, and internal types of base classes.
nitpick_ignore_regex = [
    ("py:class", "(.*[.])?(Axes|DataFrame|NDArray|Watch|Geometry|GramDecomposition|WeightState)")
]
exclude_patterns = ["_*"]
smartquotes = False  # --json is an option, not a dash
highlight_language = "none"  # indented text is output, not Python

# Docstrings are plain text with code in `backticks`; see _extensions/docstrings.py.
default_role = "code_or_name"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # overrides do not repeat the docstring
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = False
python_use_unqualified_type_names = True

# Headings have the same anchors as on GitHub, where the same pages can be read.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

# The site serves its own MathJax file, because no page may depend on another site.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg.js"
mathjax_path = MATHJAX.name

html_theme = "furo"
html_title = f"wellcond {version}"
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["wellcond.css"]
html_favicon = "_static/favicon.svg"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False

# The copy button copies a program completely, but only the commands of a console session.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = (  # output and diffs have no copy button
    "div:not(.highlight-none):not(.highlight-diff) > div.highlight pre"
)
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Any) -> None:
    """Adds the style of results to the pages that have them."""

    def style(app: Any, name: str, template: str, context: Any, tree: Any) -> None:
        if name.startswith("evidence/"):
            app.add_css_file("evidence.css")

    app.connect("html-page-context", style)
