"""The documentation site: ``sphinx-build -W -c docs . build/site`` from the root of the repository.

The source directory is the root, so that links between pages, to code and to results lead where they lead on
a host of repositories. README.md is the first page.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # keras looks for it when it is imported

import gradclip

project = "gradclip"
author = copyright = "the gradclip developers"
release = version = gradclip.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.md"]
exclude_patterns = ["docs/package.md"]

myst_heading_anchors = 4  # as hosts of repositories make them
myst_enable_extensions = ["colon_fence"]
myst_url_schemes = ("http", "https", "mailto")

autodoc_typehints = "none"  # docstrings say what is taken; the types stand in the code
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "imported-members": True, "inherited-members": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of named tuples are members already

html_theme = "furo"
html_title = f"gradclip {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_extra_path = ["site"]  # index.html, which leads to README.html
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

CONTENTS = """
```{toctree}
:hidden:
:caption: Guide
docs/start
docs/torch
docs/jax
docs/frameworks
docs/flower
docs/scaling
docs/offload
docs/policies
docs/monitor
docs/lab
docs/cookbook
```

```{toctree}
:hidden:
:caption: Reference
docs/api/gradclip
docs/api/torch
docs/api/jax
docs/api/keras
docs/api/flower
docs/api/policies
docs/api/monitor
docs/api/distributed
```

```{toctree}
:hidden:
:caption: Promises and proofs
docs/reduction-order
docs/performance
docs/performance-tables
docs/cuda
```

```{toctree}
:hidden:
:caption: The project
CONTRIBUTING
CHANGELOG
SECURITY
CODE_OF_CONDUCT
```
"""


def add_contents(_: Any, name: str, source: list[str]) -> None:
    """The site's table of contents, which README.md shall not show elsewhere."""
    if name == root_doc:
        source[0] += CONTENTS


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
