"""Sphinx: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``, from the repository root."""

import os
import re
import sys
import warnings
from pathlib import Path

import tnadapt

sys.path.insert(0, str(Path(__file__).parents[1]))  # for paper, which is not installed
sys.path.insert(0, str(Path(__file__).parent))
import hub_cache
from sphinx_help import IsProperty

HUB = Path(__file__).parent / "_build" / "hub"
hub_cache.configure(HUB)

# What the examples print to stderr is on their pages: no progress bars, and no advice for developers of libraries.
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

project = "tnadapt"
author = "the tnadapt authors"
copyright = author
version = release = tnadapt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
# Copied examples have neither prompts nor output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "literal"
myst_heading_anchors = 2  # generated pages link to their own headings
smartquotes = False

autosummary_generate = True
autosummary_context = {
    "is_property": IsProperty(),
    # What the results of decompositions inherit: their pages list it, too.
    "of_results": {"to_vec", "to_unfolded", "entries", "entry", "part", "inner", "norm", "mode_dot", "to", "save"},
}
autodoc_typehints = "none"  # types and shapes are in the Parameters sections
numpydoc_show_class_members = False  # the templates list them

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "within_subsection_order": "sphinx_help.Order",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 0,
    "show_signature": False,
    "write_computation_times": False,
    "matplotlib_animations": False,
    "thumbnail_size": (400, 250),
}

# python -m sphinx -b linkcheck docs FOLDER -D plot_gallery=0, every night. Links inside are checked by tests/links.py.
linkcheck_timeout = 30
linkcheck_retries = 3
linkcheck_workers = 4

html_theme = "pydata_sphinx_theme"
html_title = f"tnadapt {version}"
html_static_path = ["_static"]
html_css_files = ["tnadapt.css"]
html_js_files = ["folds.js"]
html_show_copyright = False
html_show_sphinx = False
html_sidebars = {"**": ["contents"]}
html_theme_options = {
    "navbar_center": [],
    "navbar_align": "left",
    "navigation_with_keys": False,
    "footer_start": [],
    "footer_end": [],
}


def fill_hub_cache(app):
    """Fetch what the examples need that are about to run."""
    gallery = app.config.sphinx_gallery_conf
    if gallery["plot_gallery"]:
        scripts = (Path(__file__).parents[1] / "examples").glob("plot_*.py")
        run = [path for path in scripts if re.search(gallery["filename_pattern"], str(path))]
        hub_cache.fill(HUB, [path.read_text(encoding="utf-8") for path in run])


def setup(app):
    app.connect("builder-inited", fill_hub_cache, priority=100)  # before sphinx-gallery runs the examples
