"""The density along a line with its error bars, beside a reference where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.ploterrors import check_reference
from gpurho.plotstyle import (
    DPI,
    GREY,
    LABELS,
    LINES,
    SMALL,
    check_picture_name,
    column_width,
    formula,
    new_figure,
    save,
    style,
    unit_label,
)
from gpurho.sections import Line
from gpurho.structure import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LINE = 100_000
"""Most points of a line."""


def plot_line(
    density: Density,
    a: ArrayLike,
    b: ArrayLike,
    path: str | Path | None = None,
    *,
    n: int | None = None,
    reference: Density | None = None,
    bound: float = 3.0,
    atoms_within: float = 0.5,
    column: str | float | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Figure:
    """The density along a line within ``bound`` sigmas, as in Figs. 8-10 of the paper.

    Above, the mean in its band; marks at the top are atoms near the line. Below, on a scale of its own, what the band
    consists of: ``bound`` times the total sigma and its epistemic part, and the reference's distance from the mean.

    Parameters
    ----------
    density : Density
    a, b : (3,) arrays, angstrom
        Ends of the line, Cartesian.
    path : path, optional
        Picture to write; the name says the format.
    n : int, optional
        Points; by default four for each of the grid's smallest step, 200 or more.
    reference : Density, optional
        On the same grid, of the same atoms.
    bound : float
        Half-width of the bands in sigmas.
    atoms_within : float, angstrom
        Atoms this close to the line are marked; 0 for none.
    column : "single", "double" or inches
    title : str, optional
        By default the formula and the ends; "" for none.
    dpi : int

    Raises
    ------
    SettingsError, GridError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    if not (np.isfinite(bound) and bound > 0):
        raise SettingsError(f"bound {bound!r} is no number of sigmas; give e.g. 3")
    if reference is not None:
        check_reference(density, reference)
    found = density.line(a, b, _points(density, a, b) if n is None else n)
    length = float(found.distance[-1])
    if not length > 0:
        raise SettingsError(
            f"line from {np.asarray(a).tolist()} to {np.asarray(b).tolist()} has no length; give two ends"
        )
    if not np.isfinite(found.mean).any():
        raise SettingsError("the line leaves the field everywhere; give ends inside of it")
    other = None if reference is None else reference.line(a, b, len(found.mean)).mean
    from matplotlib.ticker import MaxNLocator

    with style():
        lower = found.std is not None or other is not None
        width = column_width("single" if column is None else column)
        figure = new_figure(width, width * (0.95 if lower else 0.65))
        panels: Any = figure.subplots(
            2 if lower else 1, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [1.7, 1] if lower else [1]}
        )[:, 0]
        _density(panels[0], found, other, bound)
        _marks(panels[0], density.structure, found, atoms_within)
        if lower:
            _spread(panels[1], found, other, bound)
        panels[-1].set_xlabel("distance along the line (\u00c5)")
        panels[-1].set_xlim(0.0, length)
        panels[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        figure.align_ylabels()
        ends = [f"({', '.join(f'{x:.4g}' for x in np.asarray(e, dtype=float))})" for e in (a, b)]
        ends = [end.replace("-", "\u2212") for end in ends]
        text = f"{formula(density.structure)}, {ends[0]} to {ends[1]} \u00c5" if title is None else title
        if text:
            figure.suptitle(text, x=0.01, ha="left")
        return save(figure, path, dpi)


def _points(density: Density, a: ArrayLike, b: ArrayLike) -> int:
    ends = [np.asarray(end, dtype=float) for end in (a, b)]
    if any(end.shape != (3,) or not np.isfinite(end).all() for end in ends):
        return 200  # `Density.line` names what is wrong
    step = float(np.linalg.norm(density.grid.steps, axis=1).min())
    return int(np.clip(4 * np.linalg.norm(ends[1] - ends[0]) / step, 200, MAX_LINE))


def _density(panel: Axes, line: Line, reference: NDArray[np.float32] | None, bound: float) -> None:
    if line.std is not None and line.epistemic is not None:
        _bands(panel, line, line.mean, bound)
    panel.plot(line.distance, line.mean, color=LINES["mean"], label="predicted", zorder=3)
    if reference is not None:
        panel.plot(
            line.distance, reference, color=LINES["reference"], linestyle=(0, (4, 2)), label="reference", zorder=4
        )
    panel.set_ylabel(unit_label(panel.yaxis, float(np.nanmax(line.mean)), "density"))
    panel.tick_params(labelsize=SMALL)
    panel.margins(y=0.1)
    panel.legend(ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, columnspacing=1.0)


def _spread(panel: Axes, line: Line, reference: NDArray[np.float32] | None, bound: float) -> None:
    panel.axhline(0.0, color=LINES["mean"], linewidth=0.8, zorder=3)
    top = 0.0
    if line.std is not None:
        _bands(panel, line, np.zeros_like(line.mean), bound)
        top = bound * float(np.nanmax(line.std))
    if reference is not None:
        error = reference - line.mean
        panel.plot(line.distance, error, color=LINES["reference"], linestyle=(0, (4, 2)), zorder=4)
        top = max(top, float(np.nanmax(np.abs(error))))
    if top > 0:
        panel.set_ylim(-1.15 * top, 1.15 * top)
    name = "from the mean"
    panel.set_ylabel(unit_label(panel.yaxis, top, name).replace(" (", "\n("))
    panel.tick_params(labelsize=SMALL)


def _bands(panel: Axes, line: Line, middle: NDArray[np.float32], bound: float) -> None:
    """Total band, and inside it the part that the network's own ignorance makes."""
    for name, sigma, alpha in (("std", line.std, 0.45), ("epistemic", line.epistemic, 0.55)):
        assert sigma is not None  # both or neither
        band = panel.fill_between(
            line.distance,
            middle - bound * sigma,
            middle + bound * sigma,
            color=LINES[name],
            alpha=alpha,
            linewidth=0,
            label=f"$\\pm${bound:g} {LABELS[name]}",
        )
        band.set_gid(name)


def _marks(panel: Axes, structure: Structure, line: Line, within: float) -> None:
    """A mark at the top where an atom is near."""
    if within <= 0:
        return
    places = atoms_along(structure, line.points[0], line.points[-1], within)
    if len(places):
        panel.plot(
            places,
            np.full(len(places), 0.97),
            linestyle="none",
            marker="v",
            markersize=4,
            color=GREY,
            transform=panel.get_xaxis_transform(),
            label=f"atoms within {within:g} \u00c5",
            zorder=2,
        )
        panel.legend(ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, columnspacing=1.0)


def atoms_along(
    structure: Structure, a: NDArray[np.float64], b: NDArray[np.float64], within: float
) -> NDArray[np.float64]:
    """Distances from `a` at which atoms and periodic images lie near the segment, (n,), angstrom, sorted."""
    from itertools import product

    inverse = np.linalg.inv(structure.cell)
    ends = np.stack([a, b]) @ inverse
    reach = within * np.linalg.norm(inverse, axis=0)
    own = structure.positions @ inverse
    own = np.where(structure.pbc, own - np.floor(own), own)
    low = np.where(structure.pbc, np.floor(ends.min(axis=0) - reach) - 1, 0).astype(int)
    high = np.where(structure.pbc, np.floor(ends.max(axis=0) + reach) + 1, 0).astype(int)
    length = float(np.linalg.norm(b - a))
    direction = (b - a) / length
    found = []
    for shift in product(*(range(p, q + 1) for p, q in zip(low, high, strict=True))):
        relative = (own + np.array(shift, dtype=float)) @ structure.cell - a
        along = relative @ direction
        off = np.linalg.norm(relative - along[:, None] * direction, axis=1)
        found.append(along[(off <= within) & (along >= -1e-6) & (along <= length + 1e-6)])
    return np.sort(np.concatenate(found))
