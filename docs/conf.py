"""The site: `make docs` builds it, and every warning is an error.

Sphinx, as Optax has it, because the docstrings are in its language: reStructuredText with LaTeX and
tables, in Google's sections. Nothing is fetched, neither when the site is built nor when it is
read: formulas are turned into MathML here, and links into other projects' pages are made only if
GPA_OPTAX_DOCS_INTERSPHINX is set, because the lists of what is there have to be fetched.
"""

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

import gpa_optax  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
version = release = gpa_optax.__version__
html_title = f"{project} {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "borrowed_pages",
    "mathml",
]
# Pages that stand elsewhere in the repository, where they are read on GitHub, by their place here.
borrowed_pages = {
    "benchmarks.md": "benchmarks/README.md",
    "examples.md": "examples/README.md",
    "changelog.md": "CHANGELOG.md",
}
borrowed_pages |= {
    f"benchmarks/{path.name}": f"benchmarks/pages/{path.name}"
    for path in ROOT.glob("benchmarks/pages/*.md")
}
if (ROOT / "CONTRIBUTING.md").exists():
    borrowed_pages["contributing.md"] = "CONTRIBUTING.md"
borrowed_pages |= {
    f"notebooks/{path.name}": f"notebooks/{path.name}" for path in ROOT.glob("notebooks/*.ipynb")
}
# Where links lead to files that are no pages; without it they are plain text.
borrowed_pages_repository = PROJECT.get("urls", {}).get("Repository", "")

# `gpa` is a link to gpa, as in Optax's docstrings.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(optax|jax|flax|jnp)\..*"),
    ("py:exc", r"(TypeError|ValueError)(, ValueError)?"),
]
autodoc_preserve_defaults = True  # a schedule as it is written, without its address
autodoc_typehints = "none"  # the docstrings tell them, with shapes and meaning
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

if os.environ.get("GPA_OPTAX_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
nb_ipywidgets_js = {}  # there are no widgets, and the scripts would be fetched by each reader
nb_execution_mode = "off"  # notebooks are stored with their outputs, and CI runs them elsewhere

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
