"""The models that come with the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpurho.model import ModelInfo


def models() -> list[ModelInfo]:
    """The shipped models.

    Returns
    -------
    list of ModelInfo
        By name: each has ``name``, for `load_model` and `predict`, ``path``, and ``spec`` with species, descriptors,
        network and the figures of the test.
    """
    from gpurho.model import list_models

    return list_models()
