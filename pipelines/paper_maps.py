"""Planes of densities beside their references, errors and sigmas, in the units of the paper (e/Bohr^3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.pipelines.paper_work import section_of
from gpurho.plotting import COLORS
from gpurho.units import PER_ANGSTROM3

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arrays = dict[str, NDArray[Any]]
Box = tuple[float, float, float, float]
"""Lowest and highest x, lowest and highest y, angstrom."""

UNIT = "e/Bohr$^3$"
ZOOM = 1 / 3
"""Edge of the magnified part, in that of the plane."""

OURS, DFT, PAPER = "#0072B2", "#D55E00", "#767676"
"""Colours that readers with any colour vision tell apart (Okabe and Ito)."""

PANELS = {
    "reference": ("DFT", COLORS["mean"]),
    "mean": ("predicted", COLORS["mean"]),
    "error": ("|error|", COLORS["std"]),
    "std": ("total sigma", COLORS["std"]),
    "epistemic": ("epistemic sigma", COLORS["epistemic"]),
    "aleatoric": ("aleatoric sigma", COLORS["aleatoric"]),
}


def new_figure(width: float, height: float) -> Figure:
    """A figure made without pyplot, inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def field_of(arrays: Arrays, name: str) -> NDArray[np.float64]:
    """A field of a stored plane in e/Bohr^3; "error" is the absolute one, "std" the total sigma."""
    if name == "error":
        values = np.abs(arrays["mean"].astype(np.float64) - arrays["reference"])
    elif name == "std":
        values = np.hypot(arrays["aleatoric"].astype(np.float64), arrays["epistemic"])
    else:
        values = arrays[name].astype(np.float64)
    return values * PER_ANGSTROM3


def draw_maps(rows: Sequence[tuple[str, Arrays, Sequence[str]]], zoomed: bool = False) -> Figure:
    """Rows of maps: a title, the plane, and the names of its panels; `zoomed` adds the part of the largest error.

    Reference and prediction share their scale, the two sigmas another, error and total sigma a third.
    """
    columns = max(len(names) for _, _, names in rows)
    lines: list[tuple[str, Arrays, Sequence[str], Box | None]] = [(*row, None) for row in rows]
    if zoomed:
        lines += [("magnified", arrays, names, _zoom(arrays)) for _, arrays, names in rows]
    heights = [_height(arrays) for _, arrays, _, _ in lines]
    figure = new_figure(3.9 * columns, sum(0.75 + 3.0 * h for h in heights))
    grid = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for k, (title, arrays, names, box) in enumerate(lines):
        for panel in grid[k][len(names) :]:
            panel.set_visible(False)
        for panel, name in zip(grid[k], names, strict=False):
            _map(figure, panel, arrays, name, box, names)
        grid[k][0].set_ylabel(f"{title}\nangstrom" if title else "angstrom")
        if zoomed and box is None:
            for panel in grid[k][: len(names)]:
                _outline(panel, _zoom(arrays))
    return figure


def draw_uncertainty(rows: Sequence[tuple[str, Arrays, int]], bound: float = 3.0) -> Figure:
    """Rows of prediction, epistemic and aleatoric sigma, and the density along a line with `bound` sigmas around it.

    Each row is a title, the plane, and the index of the line along the second edge of the plane.
    """
    heights = [_height(arrays) for _, arrays, _ in rows]
    figure = new_figure(16.5, sum(0.9 + 3.1 * max(h, 0.8) for h in heights))
    grid = figure.subplots(len(rows), 4, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1, 1.25]})
    names = ("mean", "epistemic", "aleatoric")
    for (title, arrays, row), panels in zip(rows, grid, strict=True):
        for panel, name in zip(panels, names, strict=False):
            _map(figure, panel, arrays, name, None, names)
        x, y = section_of(arrays).coordinates()
        panels[0].plot(x[:, row], y[:, row], color="white", linestyle=":", linewidth=1.4)
        panels[0].set_ylabel(f"{title}\nangstrom" if title else "angstrom")
        _line(panels[3], arrays, row, bound)
    return figure


def draw_atoms(rows: Sequence[tuple[str, Arrays]]) -> Figure:
    """Rows of prediction, total sigma, and the standard deviation of each atom's electrons, seen along the line."""
    figure = new_figure(15.0, sum(0.9 + 3.6 * max(0.5, _height(arrays)) for _, arrays in rows))
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for (title, arrays), panels in zip(rows, grid, strict=True):
        for panel, name in zip(panels, ("mean", "std"), strict=False):
            _map(figure, panel, arrays, name, None, ())
        panels[0].set_ylabel(f"{title}\nangstrom")
        x, y = arrays["atoms_xy"].T
        order = np.argsort(arrays["atom_sigma"])
        dots = panels[2].scatter(
            x[order],
            y[order],
            c=1e3 * arrays["atom_sigma"][order],
            cmap="magma",
            s=26,
            edgecolors="0.6",
            linewidths=0.3,
        )
        panels[2].set_aspect("equal")
        panels[2].set_title("sigma of the electrons of each atom", fontsize=10)
        panels[2].set_xlabel("angstrom")
        figure.colorbar(dots, ax=panels[2], shrink=0.85).set_label("10$^{-3}$ e", fontsize=9)
    return figure


# -- parts ------------------------------------------------------------------------------------------------------------

_GROUPS = (("reference", "mean"), ("error", "std"), ("epistemic", "aleatoric"))


def _map(
    figure: Figure,
    panel: Axes,
    arrays: Arrays,
    name: str,
    box: Box | None,
    beside: Sequence[str],
) -> None:
    values: Any = np.ma.masked_invalid(field_of(arrays, name))
    # Fields of one kind that stand side by side share a scale.
    group = next(g for g in _GROUPS if name in g)
    shared = [field_of(arrays, other) for other in group if other in beside]
    high = float(np.nanmax([np.nanmax(v) for v in shared or [values]]))
    low = float(np.nanmin([np.nanmin(v) for v in shared or [values]])) if "mean" in group else 0.0
    x, y = section_of(arrays).coordinates()
    title, colors = PANELS[name]
    picture = panel.pcolormesh(x, y, values, cmap=colors, vmin=low, vmax=high, shading="nearest", rasterized=True)
    if len(arrays["atoms"]):
        panel.scatter(
            arrays["atoms"][:, 0], arrays["atoms"][:, 1], s=12, facecolors="none", edgecolors="white", linewidths=0.7
        )
    panel.set_aspect("equal")
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("angstrom")
    limits = (float(x.min()), float(x.max()), float(y.min()), float(y.max())) if box is None else box
    panel.set_xlim(*limits[:2])
    panel.set_ylim(*limits[2:])
    bar = figure.colorbar(picture, ax=panel, shrink=0.85)
    bar.set_label(UNIT, fontsize=9)
    bar.ax.ticklabel_format(axis="y", scilimits=(-2, 3))


def _line(panel: Axes, arrays: Arrays, row: int, bound: float) -> None:
    x, y = section_of(arrays).coordinates()
    along = np.hypot(x[:, row] - x[0, row], y[:, row] - y[0, row])
    mean, std = field_of(arrays, "mean")[:, row], field_of(arrays, "std")[:, row]
    panel.fill_between(
        along,
        mean - bound * std,
        mean + bound * std,
        color=OURS,
        alpha=0.3,
        linewidth=0,
        label=f"$\\pm${bound:g} sigma",
    )
    panel.plot(along, mean, color=OURS, linewidth=1.3, label="predicted")
    if "reference" in arrays:
        panel.plot(along, field_of(arrays, "reference")[:, row], color=DFT, linewidth=1.3, linestyle="--", label="DFT")
    panel.set_title("along the dotted line", fontsize=10)
    panel.set_xlabel("angstrom")
    panel.set_ylabel(f"density, {UNIT}")
    panel.legend(fontsize=9, frameon=False)


def _height(arrays: Arrays) -> float:
    """Height of a plane in its width, within what a page shows."""
    x, y = section_of(arrays).coordinates()
    return float(np.clip(np.ptp(y) / max(np.ptp(x), 1e-9), 0.3, 2.0))


def _zoom(arrays: Arrays) -> Box:
    """The part of the plane around its largest error: xmin, xmax, ymin, ymax."""
    x, y = section_of(arrays).coordinates()
    place = np.unravel_index(int(np.nanargmax(field_of(arrays, "error"))), x.shape)
    box = []
    for values in (x, y):
        low, high = float(values.min()), float(values.max())
        size = ZOOM * (high - low)
        start = min(max(float(values[place]) - 0.5 * size, low), high - size)
        box += [start, start + size]
    return (box[0], box[1], box[2], box[3])


def _outline(panel: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle

    x0, x1, y0, y1 = box
    panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=1.2))


__all__ = ["DFT", "OURS", "PAPER", "UNIT", "draw_atoms", "draw_maps", "draw_uncertainty", "field_of", "new_figure"]
