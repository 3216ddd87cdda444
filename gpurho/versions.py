"""Kinds of files that this library writes, and the newest version of each that it reads.

Every file says its kind and version. Older versions are read; a newer one is refused by name, since nobody knows what
is in it. What each version holds stands in ``docs/files.md``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpurho.errors import GpurhoError

NEWEST = {
    "gpurho-density": 2,
    "gpurho-shard": 1,
    "gpurho-dataset": 1,
    "gpurho-model": 3,
    "gpurho-checkpoint": 1,
    "gpurho-points": 1,
    "gpurho-journal": 1,
    "gpurho-selection": 1,
    "gpurho-suggestions": 1,
    "gpurho-paper": 1,
    "gpurho-energies": 1,
}
"""A test compares these with the modules that write the files, and with the table in the documentation."""


def check_version(found: Any, kind: str, where: object, error: type[GpurhoError]) -> int:
    """The version that a file of a kind says; raises `error` where it is none, or newer than what is read."""
    newest = NEWEST[kind]
    whole = isinstance(found, int | np.integer) and not isinstance(found, bool)
    if not whole or found < 1:
        raise error(f"{where}: format_version {found!r} of a {kind} is not a whole number from 1 up; check the file")
    if found > newest:
        raise error(
            f"{where}: format_version {found} is newer than {newest}, the newest of a {kind} that this version reads;"
            " upgrade gpurho"
        )
    return int(found)


__all__ = ["NEWEST", "check_version"]
