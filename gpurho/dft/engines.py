"""The DFT engines by name."""

from __future__ import annotations

import importlib
from typing import Any

from gpurho.dft.base import Engine
from gpurho.errors import SettingsError

ENGINES = {
    "gpaw": ("gpurho.dft.gpaw", "GpawEngine"),
    "qe": ("gpurho.dft.qe", "QeEngine"),
    "sparc": ("gpurho.dft.sparc", "SparcEngine"),
}


def make_engine(name: str, **options: Any) -> Engine:
    """An engine by its short name, or ``package.module:Class`` for one of the user's, with the options of its class.

    Raises
    ------
    SettingsError
        Where the name, or an option, is not known.
    MissingDependencyError, EngineError
        Where the engine says at once that its code is not there.
    """
    module, colon, cls = name.partition(":")
    if not colon:
        if name not in ENGINES:
            known = ", ".join(map(repr, ENGINES))
            raise SettingsError(f"engine {name!r} is not known; give {known}, or 'package.module:Class'")
        module, cls = ENGINES[name]
    try:
        kind = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"engine {name!r} cannot be imported: {error}") from None
    try:
        engine: Engine = kind(**options)
    except TypeError as error:
        raise SettingsError(f"engine {name!r} has other options: {error}") from None
    return engine
