"""How the documentation is built: `make docs`. Nothing is fetched, and no GPU is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the reference imports the package, which imports transformers
sys.path.insert(0, str(Path(__file__).parent))  # for `filling`
sys.path.insert(0, str(Path(__file__).parent.parent))  # for `benchmarks`

import cake_hf

project = "cake_hf"
author = "the authors of cake_hf"
copyright = author
release = version = cake_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "filling"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "families.md"]  # families.md is shown on the page of supported models
templates_path: list[str] = []

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

smartquotes = False  # two hyphens are the begin of an option
default_role = "code"  # in our docstrings, as in Markdown, single backticks are code
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are described once, in their class
napoleon_use_rtype = False

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!cake_hf\.).*")]  # other projects' names: their documentation is not fetched

html_theme = "furo"
html_title = f"cake_hf {release}"
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = "$ "
