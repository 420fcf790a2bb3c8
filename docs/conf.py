"""Settings of the documentation: ``sphinx-build -W -n docs docs/_build/html``."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))

project = "geneformer-fast"
author = "the authors of geneformer-fast"
project_copyright = author
release = version_of("geneformer-fast")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "command_options",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "_templates", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

# Signatures and docstrings are those of the installed package; public names are loaded on first use.
autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say it in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_validation_checks: set[str] = set()

# Notebooks are committed without outputs and executed by every build, in a folder of their own.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress, and warnings of libraries with paths of the machine

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3

# Names in docstrings that lead to internal modules, which have no page here, and to other libraries.
nitpick_ignore_regex = [
    (r"py:.*", r"PRESETS|RECIPES|SCHEMA_VERSION|Schedule|fit|labels\..*|(Handle|Run)\..*|geneformer_fast\.config\..*"),
    (r"py:.*", r"(geneformer_fast\.)?(data|extract|files|finetuning|perturbation|profiling|quantization)\..*"),
    (r"py:.*", r"(geneformer_fast\.)?(families|tokenization|training)\..*"),
    (r"py:.*", r"(numpy|np|torch|nn|anndata|pandas|pathlib|transformers|optuna)\..*"),
]

html_theme = "sphinx_book_theme"
html_title = f"geneformer-fast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search already
}
