"""The models that come with the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpurho.model import ModelInfo


def models() -> list[ModelInfo]:
    """The shipped models, by name: each has ``name``, ``path`` and ``spec``."""
    from gpurho.model import list_models

    return list_models()
