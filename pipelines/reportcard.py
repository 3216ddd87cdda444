"""Cards of models as HTML: the little Markdown that they use, everything in it escaped."""

from __future__ import annotations

import re
from html import escape

LEVEL_SHIFT = 2
"""Headings of a card stand this many levels below their own in the page."""


def card_html(text: str) -> str:
    """Headings, paragraphs, lists, tables, code blocks, bold and code; anything else is plain text."""
    parts: list[str] = []
    block: list[str] = []
    fenced: list[str] | None = None
    for line in [*text.splitlines(), ""]:
        if fenced is not None or line.startswith("```"):
            fenced, block = _fence(line, fenced, block, parts)
        elif line.strip():
            block.append(line)
        elif block:
            parts.append(_block(block))
            block = []
    if fenced:
        parts.append(_code(fenced))
    return "\n".join(parts)


def _fence(
    line: str, fenced: list[str] | None, block: list[str], parts: list[str]
) -> tuple[list[str] | None, list[str]]:
    if fenced is None:
        if block:
            parts.append(_block(block))
        return [], []
    if line.startswith("```"):
        parts.append(_code(fenced))
        return None, []
    return [*fenced, line], block


def _code(lines: list[str]) -> str:
    return f'<pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre>'


def _block(lines: list[str]) -> str:
    if all(line.startswith("    ") for line in lines):
        return _code([line[4:] for line in lines])
    if heading := re.match(r"(#{1,4}) +(.*)", lines[0]):
        level = min(6, len(heading[1]) + LEVEL_SHIFT)
        rest = _block(lines[1:]) if len(lines) > 1 else ""
        return f"<h{level}>{_inline(heading[2])}</h{level}>{rest}"
    if len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"[|:\- ]+", lines[1]):
        head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in _cells(lines[0]))
        body = "".join(
            "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in _cells(line)) + "</tr>" for line in lines[2:]
        )
        table = f"<table class='card'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="scroll" tabindex="0" role="region" aria-label="table of the card">{table}</div>'
    if all(line.startswith(("- ", "* ", "  ")) for line in lines) and lines[0][:2] in ("- ", "* "):
        items = re.split(r"\n[-*] ", "\n".join(lines)[2:])
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(chr(10).join(lines))}</p>"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _inline(text: str) -> str:
    safe = escape(text)
    # What lies between backticks is left alone by the rule for bold.
    pieces = re.split(r"(`[^`]+`)", safe)
    return "".join(
        f"<code>{piece[1:-1]}</code>" if piece.startswith("`") and len(piece) > 2 else _bold(piece) for piece in pieces
    )


def _bold(text: str) -> str:
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


__all__ = ["card_html"]
