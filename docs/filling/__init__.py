"""A Sphinx extension: what stands somewhere else already is put into the pages when they are read, not copied by hand.

<!-- filled with file SECURITY.md -->                   a file of the repository, without its title
<!-- filled with section README.md: Quickstart -->      one section of such a file, without its heading
<!-- filled with results benchmarks/results -->         tables of all measurements in that folder
<!-- filled with commands -->                           the command line, from the commands themselves
<!-- filled with commands benchmarks -->                that of the benchmarks
"""

from __future__ import annotations

from typing import Any

from filling.docstrings import keep_sentence, show_examples
from filling.pages import fill_page


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill_page)
    app.connect("autodoc-process-docstring", show_examples, priority=400)  # before Google style becomes reST
    app.connect("autodoc-process-docstring", keep_sentence, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
