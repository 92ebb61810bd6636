"""How the documentation is built: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from spallm_convert.version import __version__

project = "spallm-convert"
author = "The spallm-convert authors"
copyright = "The spallm-convert authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "every_public_name",
    "plain_docstrings",
]
exclude_patterns = ["_ext"]

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

smartquotes = False  # "auto" is a value, not a quotation

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # torch's text about `forward` is no help here
python_maximum_signature_line_length = 88

# Types in signatures are linked where this site has a page for them. The others:
nitpick_ignore_regex = [
    # of other projects, whose inventories would need the network
    ("py:.*", r"(torch|nn|np|npt|transformers)\..*"),
    ("py:.*", r"Tensor|PreTrainedModel"),
    # of the standard library, likewise
    ("py:.*", r"(os|pathlib|collections|abc|typing)\..*"),
    ("py:.*", r"Path|Any|BufferedReader|Iterable|Iterator|Mapping|Sequence"),
    # of our own, behind the public classes
    ("py:.*", r"Part|Span"),
    # aliases for NumPy arrays, in signatures of the kernels
    ("py:.*", r"(spallm_\w+\.)?.*\b(Bytes|Codes|Floats|Singles)"),
]

html_theme = "furo"
html_title = f"spallm-convert {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
