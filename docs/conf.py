"""Settings of the documentation. Build them with make docs."""

import logging
from importlib.metadata import version as installed_version

logging.getLogger("faiss").setLevel(logging.WARNING)  # which otherwise tells the build which instructions it has

project = "MiniBERT"
author = "The MiniBERT authors"
version = release = installed_version("minibert-hf")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["notebooks"]  # they are read where they are run, or on the Hub
html_theme = "furo"
html_title = f"MiniBERT {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # the anchors that GitHub gives headings, so that links work in both places

# Docstrings say what things are, annotations say their types; both are shown once.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
