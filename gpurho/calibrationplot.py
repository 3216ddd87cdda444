"""A picture of how well error bars describe errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.calibration import TARGETS, reliability
from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.fields import blocks
from gpurho.ploterrors import check_reference
from gpurho.plotstyle import (
    DPI,
    GREY,
    LINES,
    SMALL,
    UNIT,
    check_picture_name,
    column_width,
    formula,
    new_figure,
    save,
    style,
    unit_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 12

MOST_POINTS = 200_000
"""Points of a field that its calibration is drawn from, evenly spread."""

_SHADES = ("#0072B2", "#009E73", "#D55E00")
"""Of one, two and three sigmas."""


def plot_calibration(
    mean: ArrayLike,
    error: ArrayLike,
    sigma: ArrayLike,
    path: str | Path | None = None,
    title: str = "",
    dpi: int = DPI,
    column: str | float | None = None,
) -> Figure:
    """Four panels: calibration curve, scores against a Gaussian, error by sigma, coverage by density.

    Parameters
    ----------
    mean, error, sigma : (n,) arrays, e/angstrom^3
        Predicted density, its error, and total sigma.
    path : path, optional
        Picture to write; the name says the format (png, pdf, svg, jpg).
    title : str
    dpi : int
    column : "single", "double" or inches
        Width; by default double.

    Raises
    ------
    SettingsError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    m, e, s = (np.asarray(v, np.float64).ravel() for v in (mean, error, sigma))
    if not m.size == e.size == s.size or m.size < 100:
        raise SettingsError(f"{m.size} densities, {e.size} errors, {s.size} sigmas; a picture needs 100 of each")
    z = e / np.maximum(s, 1e-30)
    with style():
        width = column_width("double" if column is None else column)
        figure = new_figure(width, 0.74 * width)
        (curve, scores), (spread, bins) = figure.subplots(2, 2)
        _curve(curve, z)
        _scores(scores, z)
        _errors(spread, e, s)
        _coverage(bins, m, e, s)
        for panel in (curve, scores, spread, bins):
            panel.tick_params(labelsize=SMALL, which="both")
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        return save(figure, path, dpi)


def plot_field_calibration(
    density: Density,
    reference: Density,
    path: str | Path | None = None,
    *,
    column: str | float | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Figure:
    """`plot_calibration` of a density against its reference, on points evenly spread over the grid.

    Raises
    ------
    SettingsError, GridError, StructureError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    if not density.uncertain:
        raise SettingsError("a calibration needs error bars, and this density has none; predict it with an uncertainty")
    check_reference(density, reference)
    step = -(-density.grid.n_points // MOST_POINTS)
    parts: list[list[NDArray[np.float64]]] = []
    std = density.std
    assert std is not None  # as it is uncertain
    for box in blocks(density.mean):
        # Counted along a block: every step-th of its points.
        rows = [np.asarray(f[box], np.float64).reshape(-1)[::step] for f in (density.mean, reference.mean, std)]
        parts.append([rows[0], rows[0] - rows[1], rows[2]])
    mean, error, sigma = (np.concatenate(column_) for column_ in zip(*parts, strict=True))
    text = f"{formula(density.structure)}, {mean.size:,} points" if title is None else title
    return plot_calibration(mean, error, sigma, path, text, dpi, column)


def _curve(panel: Axes, z: NDArray[np.float64]) -> None:
    from scipy.special import erf

    level = np.linspace(0.0, 1.0, 201)
    inside = np.searchsorted(np.sort(erf(np.abs(z) / np.sqrt(2.0))), level, side="right") / z.size
    panel.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, label="exact")
    panel.plot(level, inside, color=LINES["mean"], label="observed")
    panel.set(xlabel="probability of the central interval", ylabel="share of errors inside", xlim=(0, 1), ylim=(0, 1))
    panel.legend()


def _scores(panel: Axes, z: NDArray[np.float64]) -> None:
    edges = np.linspace(-5, 5, 101)
    counts, _ = np.histogram(np.clip(z, -5, 5), edges)
    panel.stairs(
        counts / (z.size * np.diff(edges)), edges, fill=True, color=LINES["std"], alpha=0.6, label="error / $\\sigma$"
    )
    panel.plot(edges, np.exp(-0.5 * edges**2) / np.sqrt(2 * np.pi), color="black", linewidth=0.8, label="Gaussian")
    panel.set(
        yscale="log", xlim=(-5, 5), ylim=(1e-5, 2), xlabel="error / total $\\sigma$", ylabel="probability density"
    )
    panel.legend(loc="upper right")


def _errors(panel: Axes, e: NDArray[np.float64], s: NDArray[np.float64]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    parts = np.array_split(np.argsort(s), 20)
    x, y = ([float(np.sqrt(np.mean(v[rows] ** 2))) for rows in parts] for v in (s, e))
    both = [v for v in x + y if v > 0]
    if not both:
        raise SettingsError("all errors and sigmas are zero; a picture of calibration needs some that are not")
    low, high = min(both) * 0.85, max(both) * 1.15
    panel.plot([low, high], [low, high], color=GREY, linewidth=0.8)
    panel.plot(x, y, "o-", color=LINES["mean"], markersize=2.5)
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(unit_label(panel.xaxis, high, "total $\\sigma$"))
    panel.set_ylabel(unit_label(panel.yaxis, high, "rms error"))


def _coverage(panel: Axes, m: NDArray[np.float64], e: NDArray[np.float64], s: NDArray[np.float64]) -> None:
    rows = reliability(m, e, s, BINS)
    middle = [0.5 * (row.low + row.high) for row in rows]
    for k, (target, color) in enumerate(zip(TARGETS, _SHADES, strict=True)):
        panel.axhline(100 * target, color=color, linewidth=0.6, linestyle=(0, (4, 2)))
        share: Any = [100 * row.coverage[k] for row in rows]
        panel.plot(middle, share, "o-", color=color, markersize=2.5, label=f"{k + 1} $\\sigma$")
    panel.set(xlabel=f"predicted density ({UNIT})", ylabel="errors inside (%)")
    panel.set_ylim(top=102)
    panel.legend(ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1)
