"""What reports are made of: tables, plots and pages."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from rich.console import Console

from gradclip._report import style
from gradclip._report.html import render, save_png, svg_of
from gradclip._report.tables import (
    MARKS,
    ReportTable,
    markdown,
    markdown_table,
    number,
    print_table,
    readable_time,
)
from processes import output_of

_TABLE = ReportTable(
    'A <table> of "[b]cells[/b]"', ("name", "[i]"), [("<script>", "1 [red]%[/]"), ("&", "2")], ["bad", ""]
)
_PAGE = """{% extends "page.html.j2" %}{% from "macros.html.j2" import figure, key_figures, table %}
{% block title %}{{ name }}{% endblock %}
{% block head %}<style>h1 { color: red; }</style>{% endblock %}
{% block content %}{{ key_figures([("1 <x>", name)]) }}{{ table(t, "rows") }}{{ figure(plot) }}{% endblock %}
"""


def _figure() -> Figure:
    with mpl.rc_context(style.STYLE):
        figure = Figure(figsize=(3, 2), layout="constrained")
        axes = figure.subplots()
        axes.plot([1, 2, 3], [3, 1, 2], marker="o", **style.DASHED)
        axes.fill_between([1, 2, 3], [3, 1, 2], hatch="/")
        style.title(figure, "A <plot>")
    return figure


def _page(directory: Path, template: str = _PAGE, name: str = "A & B", label: str | None = None) -> str:
    path = directory / "of_mine.html.j2"
    path.write_text(template, encoding="utf-8")
    plot = {"name": "a-plot", "what": 'What "it" shows', "svg": svg_of(_figure())}
    return render(path, name=name, t=_TABLE, plot=plot | ({"label": label} if label else {}))


def _printed(table: ReportTable, left: int = 1) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="standard")
    print_table(table, console, left=left)
    return out.getvalue()


def test_the_same_figure_is_the_same_text_and_file(tmp_path: Path) -> None:
    svg = svg_of(_figure())
    assert svg == svg_of(_figure())
    assert svg.startswith("<svg ")
    assert "<dc:date>" not in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for name in ("a.png", "b.png"):
        save_png(_figure(), tmp_path / name)
    png = (tmp_path / "a.png").read_bytes()
    assert png == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in png


def test_a_figure_is_saved_in_the_style_that_it_was_drawn_in(tmp_path: Path) -> None:
    """Its ticks are made when it is saved."""
    with mpl.rc_context(style.STYLE):
        inside = svg_of(_figure())
    with mpl.rc_context({"ytick.color": "red", "svg.hashsalt": None, "font.size": 20}):
        outside = svg_of(_figure())
        save_png(_figure(), tmp_path / "outside.png")
    save_png(_figure(), tmp_path / "inside.png")
    assert inside == outside
    assert (tmp_path / "inside.png").read_bytes() == (tmp_path / "outside.png").read_bytes()


def test_a_page_escapes_and_needs_nothing_else(tmp_path: Path) -> None:
    text = _page(tmp_path)
    assert "<title>A &amp; B</title>" in text
    assert "<td>&lt;script&gt;</td><td>1 [red]%[/]</td>" in text
    assert "<strong>1 &lt;x&gt;</strong><span>A &amp; B</span>" in text
    assert "h1 { color: red; }" in text
    assert '<tr class="bad">' in text
    assert '<table class="rows">' in text
    assert not re.findall(r"<(?:script|link|img)\b|url\(\s*[\"']?http|@import", text)
    assert "{{" not in text
    assert "{%" not in text
    assert style.OURS in text


def test_a_page_is_for_the_keyboard_the_ear_and_paper(tmp_path: Path) -> None:
    text = _page(tmp_path)
    assert '<html lang="en">' in text
    assert text.count("<main>") == 1
    scroll = '<div class="scroll" tabindex="0" role="group" aria-label="{}">'
    assert scroll.format("A &lt;table&gt; of &#34;[b]cells[/b]&#34;") in text
    assert text.count('<th scope="col">') == len(_TABLE.header)
    svg = '<figure id="a-plot"><svg role="img" aria-label="{}" '
    assert svg.format("What &#34;it&#34; shows") in text
    assert svg.format("A plot") in _page(tmp_path, label="A plot")
    assert "<figcaption>What &#34;it&#34; shows</figcaption></figure>" in text
    assert "@media print" in text
    assert _figure().get_label() == "A <plot>"


@pytest.mark.parametrize(
    "expression",
    ["nothing", "t.nothing", "table({'title': '', 'header': []})", "figure({})", "style.NOTHING"],
)
def test_a_page_does_not_guess_what_it_was_not_given(expression: str, tmp_path: Path) -> None:
    template = _PAGE.replace("{{ key_figures", "{{ " + expression + " }}{{ key_figures")
    with pytest.raises(jinja2.UndefinedError, match=r"has no attribute|is undefined"):
        _page(tmp_path, template)


def test_a_page_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(jinja2.TemplateNotFound, match="none"):
        render(tmp_path / "none.html.j2")


def test_a_page_without_a_base_and_one_that_includes(tmp_path: Path) -> None:
    (tmp_path / "part.j2").write_text("<{{ x }}>", encoding="utf-8")
    path = tmp_path / "whole.j2"
    path.write_text("{% include 'part.j2' %} {{ template }}", encoding="utf-8")
    assert render(path, x="&", template=3) == "<&amp;> 3"


def test_a_terminal_shows_text_as_it_is() -> None:
    plain = re.sub(r"\x1b\[[\d;]*m", "", _printed(_TABLE))
    assert _TABLE.title in " ".join(plain.split())
    assert "1 [red]%[/]" in plain
    assert "[i]" in plain


def test_a_terminal_colours_rows_by_their_marks() -> None:
    assert "\x1b[31m" in _printed(_TABLE)  # bad
    plain = ReportTable(_TABLE.title, _TABLE.header, _TABLE.rows, ["unheard", ""])
    assert "\x1b[31m" not in _printed(plain)
    assert set(MARKS) == {"ours", "good", "bad"}


def test_names_are_on_the_left_and_figures_on_the_right() -> None:
    table = ReportTable("", ("name", "second", "figure"), [("a", "b", "c")], [""])
    cells = r"│ a    │{}│      c │"
    assert re.search(cells.format("      b "), _printed(table))
    assert re.search(cells.format(" b      "), _printed(table, left=2))


def test_a_table_needs_a_mark_for_each_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        _printed(ReportTable("", ("a",), [("b",)], []))


def test_markdown() -> None:
    table = ReportTable("Title", ("", "x"), [("a", "1"), ("b", "2")], ["", ""])
    text = "|  | x |\n| --- | --- |\n| a | 1 |\n| b | 2 |"
    assert markdown(table) == f"**Title**\n\n{text}"
    assert markdown(table, titled=False) == text
    assert markdown_table(["", "x"], (iter(row) for row in table.rows)) == text
    assert markdown_table(["x"], []) == "| x |\n| --- |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.012"),
        (0.1, "0.10"),
        (1.234, "1.23"),
        (99.99, "99.99"),
        (100, "100"),
        (12345, "12345"),
        (-1234.5, "-1234"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (1.0, "1 s"),
        (0.9999, "1000 ms"),
        (16.94e-3, "16.9 ms"),
        (2e-6, "2 µs"),
        (3.2e-7, "320 ns"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text


def test_colours_can_be_seen_and_told_apart() -> None:
    assert len(set(style.COLORS)) == len(style.COLORS) == 7
    assert {style.OURS, style.PLAN} <= set(style.COLORS)
    for color in style.COLORS:
        red, green, blue = to_rgb(color)
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75, color  # yellow is at 0.87


def test_importing_gradclip_imports_nothing_of_reports() -> None:
    wanted = "{'gradclip._report', 'jinja2', 'rich', 'matplotlib'}"
    assert output_of(f"import gradclip, gradclip.monitor, sys; print({wanted} & set(sys.modules))") == "set()"
