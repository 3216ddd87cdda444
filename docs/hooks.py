"""What the site needs beyond Markdown: formulas as MathML, so that no script is fetched, and the commands' help."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

MARK = "<!-- commands -->"
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with formulas and the help of every command in their places."""
    pieces = CODE.split(markdown)
    # Every other piece is code, where a dollar is a dollar.
    pieces[::2] = [FORMULA.sub(_formula, piece) for piece in pieces[::2]]
    page = "".join(pieces)
    return page.replace(MARK, commands()) if MARK in page else page


def _formula(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    block, inline = found.groups()
    text = convert((block or inline).strip(), display="block" if block else "inline")
    # In a span, so that a formula at the start of a line is not taken for a block of HTML.
    return f"<span>{text}</span>" if inline else text


def commands() -> str:
    """The help of every command, as Markdown."""
    # The width that argparse wraps at.
    os.environ["COLUMNS"] = "100"
    from gpurho.cli import _build_parser

    parser = _build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = []
    for name, child in subparsers.choices.items():
        parts.append(f"## gpurho {name}\n\n```text\n{child.format_help().rstrip()}\n```\n")
    return "\n".join(parts)
