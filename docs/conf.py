"""Sphinx settings."""

project = "involution"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "involution"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
myst_heading_anchors = 3
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!involution\.).*")]  # names of other packages, and names without a package
