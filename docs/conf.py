"""Settings of the site: ``make docs``, or ``python -m sphinx -W docs out/docs``."""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
warnings.filterwarnings("ignore", module="lightning")

import gradsurgery  # noqa: E402

project = "gradsurgery"
copyright = "MIT licence"
version = release = gradsurgery.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "pages"]
exclude_patterns = ["_ext", "_static"]
source_suffix = {".md": "markdown"}
nitpicky = True
# Other people's types, and those that are not public: shown, and linked to nothing. Nothing is downloaded.
nitpick_ignore_regex = [(r"py:.*", r"(?!gradsurgery\.).*"), (r"py:.*", r"gradsurgery\.(.*\.)?_.*")]

# Markdown as it is on the repository's own page: the same anchors, and links to files outside of docs/.
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3

# Docstrings: Google style, with sections of our own.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["State", ("Reference", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "gradsurgery"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f7a55", "color-brand-content": "#0f7a55"},
    "dark_css_variables": {"color-brand-primary": "#3ecf9a", "color-brand-content": "#3ecf9a"},
}
