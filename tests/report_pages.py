"""Pages of densities, and what tests read of them."""

from __future__ import annotations

import re

from report_tools import Page

from gpurho.density import Density

TAGS = {
    "html",
    "head",
    "meta",
    "link",
    "title",
    "style",
    "body",
    "svg",
    "defs",
    "lineargradient",
    "stop",
    "header",
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "sub",
    "span",
    "dl",
    "div",
    "dt",
    "dd",
    "small",
    "nav",
    "ul",
    "li",
    "a",
    "main",
    "section",
    "strong",
    "figure",
    "figcaption",
    "label",
    "input",
    "output",
    "clippath",
    "polygon",
    "g",
    "image",
    "circle",
    "text",
    "rect",
    "path",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ol",
    "b",
    "details",
    "summary",
    "pre",
    "code",
    "footer",
    "script",
    "noscript",
}


def page_of(density: Density, tmp_path, **options) -> Page:
    path = density.report(tmp_path / "report.html", progress=False, **options)
    return Page(path.read_text(encoding="utf-8"))


def first_number(text: str) -> float:
    return float(re.match(r"[−\d.,]+", text)[0].replace(",", "").replace("−", "-"))
