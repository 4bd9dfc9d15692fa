"""Pages that need no other file, and the plots in them and beside them."""

from __future__ import annotations

import io
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from gradclip._report import style

__all__ = ["render", "save_png", "svg_of"]

_DPI = 150
_SHARED = Path(__file__).resolve().parent


def svg_of(figure: Figure) -> str:
    """The same text for the same figure: from ``<svg`` on, and without a date.

    A figure makes its ticks when it is saved, so that ``STYLE`` has to hold then as well.
    """
    text = io.StringIO()
    with mpl.rc_context(style.STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def save_png(figure: Figure, path: Path) -> None:
    """The same file for the same figure: its metadata would name Matplotlib's version."""
    with mpl.rc_context(style.STYLE):
        figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def render(template: Path, /, **content: object) -> str:
    """The text of a page.

    Args:
        template: A file that may extend ``page.html.j2``, and import from ``macros.html.j2``, of this
            package, and use what stands beside it.
        **content: What the template names. Text is escaped.

    Raises:
        jinja2.UndefinedError: If the template needs what it was not given.
        jinja2.TemplateNotFound: If there is no such file.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["style"] = style
    return environment.get_template(template.name).render(**content)
