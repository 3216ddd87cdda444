"""Run the code blocks of a Markdown page in order: ``python run_page.py PAGE``, in an empty folder.

Blocks marked ``python`` share one namespace; blocks marked ``bash`` run in a shell that stops at the first failure. A
block below ``<!-- not run: REASON -->`` is not run but checked: its Python compiles and names only what gpurho has, and
its ``gpurho`` command lines are ones that the parser takes. A block below ``<!-- hidden ... -->`` is not there; the
comment itself may hold a hidden block, which runs: it sets up what a user would bring along.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(.*)$")
LANGUAGES = {"python", "bash", "text", "json", "toml", "yaml"}


@dataclass(frozen=True)
class Block:
    """Code of a page: its language, the number of its first line, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, hidden ones included."""
    found, lines = [], text.splitlines()
    reason: str | None = None
    i = 0
    while i < len(lines):
        if mark := re.match(r"<!-- not run: (.+?) -->$", lines[i]):
            reason = mark.group(1)
        elif mark := FENCE.match(lines[i]):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            found.append(Block(mark.group(1).strip(), "\n".join(lines[i + 1 : end]) + "\n", i + 2, reason))
            i, reason = end, None
        elif lines[i].strip():
            reason = None
        i += 1
    return found


def commands_of(code: str) -> list[list[str]]:
    """The words of each ``gpurho`` command line in shell code, without what is piped or redirected from it."""
    joined = code.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["gpurho"]:
            stop = next((i for i, word in enumerate(words) if word in ("|", ">", "&", "&&", ";")), len(words))
            found.append(words[1:stop])
    return found


def check(block: Block, page: str) -> None:
    """What can be said of a block without running it."""
    if block.language == "python":
        import gpurho

        tree = ast.parse(block.code, f"{page}:{block.line}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gpurho":
                getattr(gpurho, node.attr)
    elif block.language == "bash":
        from gpurho.cli import _build_parser

        for words in commands_of(block.code):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    _build_parser().parse_args(words)
                except SystemExit as error:
                    if error.code:
                        raise SystemExit(f"{page}:{block.line}: gpurho {' '.join(words)}: {said.getvalue()}") from None


def main() -> None:
    """Run the page."""
    page = Path(sys.argv[1])
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text()):
        where = f"{page.name}:{block.line}"
        if block.language not in LANGUAGES:
            raise SystemExit(f"{where}: a block marked {block.language!r}; mark it as one of {', '.join(LANGUAGES)}")
        if block.reason is not None:
            check(block, page.name)
        elif block.language == "python":
            print(f"-- {where}", flush=True)
            exec(compile(block.code, where, "exec"), namespace)
        elif block.language == "bash":
            print(f"-- {where}", flush=True)
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=False)
            if done.returncode:
                raise SystemExit(f"{where}: exit code {done.returncode}")


if __name__ == "__main__":
    main()
