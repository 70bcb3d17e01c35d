"""Sphinx settings."""

import re
from typing import Any

project = "involution"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "involution"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
myst_heading_anchors = 3
nitpicky = True
# Not checked: names of other packages, names without a package, and types that only tasks use inside.
nitpick_ignore_regex = [("py:.*", r"(?!involution\.(nn|ops|zoo|rewrite|cost)\.).*")]


def escape_asterisks(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Shapes such as [N, C, *S] and patterns such as *.jpg are text in our docstrings, never emphasis."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "..")):
            parts = line.split("``")
            parts[::2] = [re.sub(r"(?<!\\)\*(?=\S)", r"\*", part) for part in parts[::2]]
            lines[number] = "``".join(parts)


def setup(app: Any) -> None:
    """Connects the above, after napoleon has made sections of the docstrings."""
    app.connect("autodoc-process-docstring", escape_asterisks, priority=900)
