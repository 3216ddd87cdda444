"""How pictures look: sizes of journal columns, legible type, colours for any vision, units; and how they are saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.errors import FormatError, SettingsError, StoreError
from gpurho.structure import Structure

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PICTURES = (".png", ".pdf", ".svg", ".jpg")

COLUMNS = {"single": 3.5, "double": 7.2}
"""Widths of a column and of a page, inches: 89 and 183 mm, as Nature and the journals of the APS and ACS have them."""

DPI = 300
"""Of png and jpg, and of colour maps inside pdf and svg."""

TEXT, SMALL = 8.0, 7.0
"""Size of labels, and of numbers at axes, points."""

UNIT = "e/\u00c5$^3$"

# Perceptually uniform and told apart by readers with any colour vision.
COLORS = {"mean": "viridis", "aleatoric": "cividis", "epistemic": "magma", "std": "magma"}
TITLES = {
    "mean": "density",
    "aleatoric": "aleatoric sigma (noise of the labels)",
    "epistemic": "epistemic sigma (what the network does not know)",
    "std": "total sigma",
}
LABELS = {"mean": "density", "aleatoric": "aleatoric $\\sigma$", "epistemic": "epistemic $\\sigma$"}
LABELS |= {"std": "total $\\sigma$", "reference": "reference", "error": "error"}
"""Short names, for panels and legends."""

# Okabe and Ito.
LINES = {"mean": "#0072B2", "std": "#56B4E9", "epistemic": "#AA4499", "aleatoric": "#009E73", "reference": "#D55E00"}
GREY = "0.55"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": TEXT,
    "mathtext.fontset": "dejavusans",
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "axes.linewidth": 0.6,
    "axes.labelpad": 2.0,
    "axes.titlepad": 4.0,
    "axes.unicode_minus": True,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.3,
    "legend.labelspacing": 0.3,
    "figure.titlesize": TEXT,
    "lines.linewidth": 1.1,
    # Text of a pdf stays text (journals refuse type 3 fonts); the same picture gives the same svg.
    "pdf.fonttype": 42,
    "svg.hashsalt": "gpurho",
}
for _axis in ("xtick", "ytick"):
    _STYLE |= {f"{_axis}.labelsize": SMALL, f"{_axis}.direction": "out"}
    _STYLE |= {f"{_axis}.major.width": 0.6, f"{_axis}.major.size": 2.5, f"{_axis}.major.pad": 2.0}
    _STYLE |= {f"{_axis}.minor.width": 0.4, f"{_axis}.minor.size": 1.5}


@contextmanager
def style() -> Iterator[None]:
    """The look of all pictures while they are made and saved; the reader's own settings are as before after it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def column_width(column: str | float) -> float:
    """Width of a picture in inches, from "single", "double" or a number.

    Raises
    ------
    SettingsError
    """
    if isinstance(column, str) and column in COLUMNS:
        return COLUMNS[column]
    try:
        width = float(column)
    except (TypeError, ValueError):
        width = float("nan")
    if not 1.5 <= width <= 40:
        raise SettingsError(f"column {column!r} is no width; give 'single', 'double', or 1.5 to 40 inches")
    return width


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure of so many inches, made without pyplot: no window, no global state, any back end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    how: Any = layout
    figure = Figure(figsize=(width, height), layout=how)
    if layout == "constrained":
        pads: Any = figure.get_layout_engine()
        pads.set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    FigureCanvasAgg(figure)
    return figure


def check_picture_name(path: str | Path) -> None:
    """Raise `FormatError` unless the name says a format that can be written."""
    if Path(path).suffix.lower() not in PICTURES:
        raise FormatError(f"picture {path}: the name does not say the format; give one of {', '.join(PICTURES)}")


def save(figure: Figure, path: str | Path | None, dpi: int = DPI) -> Figure:
    """Write a picture, whole or not at all and without a date; None writes nothing. Call it inside `style`.

    Raises
    ------
    FormatError, SettingsError, StoreError
    """
    if path is None:
        return figure
    check_picture_name(path)
    if not 20 <= dpi <= 2400:
        raise SettingsError(f"dpi {dpi!r} is out of range; give 20 to 2400")
    target = Path(path)
    kind = target.suffix.lower()[1:]
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    try:
        figure.savefig(temporary, dpi=dpi, format=kind, metadata=dates.get(kind))
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"picture {path} cannot be written: {reason}; check the folder") from None
    finally:
        temporary.unlink(missing_ok=True)
    return figure


def unit_label(axis: Axis, top: float, name: str = "", unit: str = UNIT) -> str:
    """Ticks of `axis` in a power of ten that suits values up to `top`, and the label that names it and the unit.

    The values drawn stay in the unit itself.
    """
    from matplotlib.ticker import FuncFormatter

    power = 0
    if np.isfinite(top) and top > 0 and not 0.01 <= top < 1e4:
        power = 3 * int(np.floor((np.log10(top) + 1) / 3 + 1e-9))
        scale = 10.0**power
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}".replace("-", "\u2212")))
    else:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\u2212")))
    whole = f"10$^{{{power}}}$ {unit}".strip() if power else unit
    return f"{name} ({whole})" if name and whole else name or whole


def formula(structure: Structure) -> str:
    """The chemical formula with subscripts."""
    from ase.data import chemical_symbols

    kinds, counts = np.unique(structure.numbers, return_counts=True)
    parts = sorted((chemical_symbols[z], int(n)) for z, n in zip(kinds, counts, strict=True))
    return "".join(f"{name}$_{{{n}}}$" if n > 1 else name for name, n in parts)
