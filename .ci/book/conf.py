"""Sphinx's settings for `.ci/book.py`, which says where to read and write."""

import os
from pathlib import Path

project = "Pruning reproductions"
copyright = author = ""
html_show_copyright = html_show_sphinx = False
root_doc = "index"
if tags.has("slides"):  # noqa: F821  (Sphinx gives it)
    extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx_revealjs"]
else:
    extensions = ["myst_nb", "sphinx_external_toc", "sphinx_copybutton"]
exclude_patterns = ["**.ipynb_checkpoints"]
external_toc_path = str(Path(__file__).with_name("toc.yml"))

nb_execution_mode = "off"  # outputs are those committed
nb_merge_streams = True
nb_ipywidgets_js = {}  # no script from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-chtml-full.js"
copybutton_prompt_text = r"\$ "

revealjs_style_theme = "white"
revealjs_static_path = [os.environ["BOOK_OUT"] + "/static", "static"]
revealjs_css_files = ["slides.css"]
revealjs_script_conf = {
    "hash": True,
    "slideNumber": "c/t",
    "width": 1280,
    "height": 720,
}
revealjs_script_plugins = [
    {"name": "RevealHighlight", "src": "revealjs/plugin/highlight/highlight.js"},
    {"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"},
    {"name": "RevealZoom", "src": "revealjs/plugin/zoom/zoom.js"},
]

html_theme = "sphinx_book_theme"
html_title = project
html_context = {"default_mode": "auto"}
html_static_path = [os.environ["BOOK_OUT"] + "/static", "static"]
html_css_files = ["book.css"]
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": True,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # one field for the search is enough
    "home_page_in_toc": True,
}
if repository := os.environ.get("REPOSITORY"):
    html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": "main",
        "use_repository_button": True,
        "path_to_docs": "",
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }
