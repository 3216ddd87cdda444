"""The command ``gpurho completion``: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpurho.errors import MissingDependencyError

SHELLS = {
    "bash": 'eval "$(gpurho completion bash)"   in ~/.bashrc',
    "zsh": "gpurho completion zsh > a folder of $fpath/_gpurho   once",
    "fish": "gpurho completion fish > ~/.config/fish/completions/gpurho.fish   once",
}


def add_parser(commands: Any) -> None:
    """The command ``gpurho completion``."""
    parser = commands.add_parser(
        "completion",
        help="completion of commands and options for a shell",
        description="Print a script that completes commands, options and their values.",
        epilog="; ".join(f"{shell}: {how}" for shell, how in SHELLS.items()),
    )
    parser.add_argument("shell", choices=tuple(SHELLS))
    parser.set_defaults(run=_run)


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of a parser for "bash", "zsh" or "fish"; options that take a path complete files.

    Raises
    ------
    MissingDependencyError
        Without shtab.
    """
    try:
        import shtab
    except ImportError:
        raise MissingDependencyError("completion needs shtab; install it with: pip install shtab") from None
    for action in _actions(parser):
        if action.type is Path:
            vars(action)["complete"] = shtab.FILE
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All actions of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)


def _run(options: argparse.Namespace) -> None:
    from gpurho.cli import build_parser

    print(completion(build_parser(), options.shell))
