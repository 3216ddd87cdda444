"""Pictures: a slice of the density beside those of its standard deviations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.density import Density
from gpurho.errors import FormatError, SettingsError, StoreError
from gpurho.sections import Section
from gpurho.structure import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PIXELS = 1200
"""Points along an edge of a picture; of larger sections every n-th is drawn."""

PICTURES = (".png", ".pdf", ".svg", ".jpg")

# Perceptually uniform and told apart by readers with any colour vision.
COLORS = {"mean": "viridis", "aleatoric": "cividis", "epistemic": "magma", "std": "magma"}
TITLES = {
    "mean": "density",
    "aleatoric": "aleatoric sigma (noise of the labels)",
    "epistemic": "epistemic sigma (what the network does not know)",
    "std": "total sigma",
}


def plot_density(
    density: Density,
    path: str | Path | None = None,
    *,
    axis: int = 2,
    position: float = 0.5,
    normal: ArrayLike | None = None,
    point: ArrayLike | None = None,
    width: float | None = None,
    fields: tuple[str, ...] | None = None,
    atoms_within: float = 0.5,
    contours: int = 8,
    dpi: int = 150,
) -> Figure:
    """A plane through a density, one panel for each field, in real coordinates.

    Parameters
    ----------
    density : Density
    path : path, optional
        Picture to write; the name says the format (png, pdf, svg).
    axis, position
        The plane of grid points at this fraction of this cell vector, unless `normal` is given.
    normal, point, width
        Any plane instead: its normal, its centre (angstrom; the cell's centre by default), its edge (angstrom).
    fields : tuple of str, optional
        "mean", "aleatoric", "epistemic", "std"; by default the mean and both sigmas where there are any.
    atoms_within : float, angstrom
        Atoms this close to the plane are marked.
    contours : int
        Lines of equal density over every panel; 0 for none.
    dpi : int

    Returns
    -------
    matplotlib Figure
        Made without pyplot: no window, no global state, any back end.

    Raises
    ------
    SettingsError, FormatError
    """
    if path is not None:
        check_picture_name(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wanted = fields or (("mean", "aleatoric", "epistemic") if density.uncertain else ("mean",))
    for name in wanted:
        if name not in TITLES or (name != "mean" and not density.uncertain):
            known = ", ".join(TITLES) if density.uncertain else "mean"
            raise SettingsError(f"field {name!r} cannot be drawn; give some of {known}")
    if normal is None:
        section = density.slice(axis, position)
        where = f"fraction {position:g} of cell vector {'abc'[axis]}"
    else:
        centre = density.grid.origin + 0.5 * density.grid.cell.sum(axis=0) if point is None else point
        section = density.plane(normal, centre, width)
        where = f"plane across ({', '.join(f'{x:g}' for x in np.asarray(normal, dtype=float))})"
    section = _thinned(section)
    x, y = section.coordinates()
    spread = float(np.ptp(y)) / max(float(np.ptp(x)), 1e-9)
    figure = Figure(figsize=(4.6 * len(wanted), 1.1 + 3.7 * min(2.5, max(0.35, spread))), layout="constrained")
    FigureCanvasAgg(figure)
    marks = atoms_near(density.structure, section, atoms_within)
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(wanted), sharey=True)), wanted, strict=True):
        _draw(figure, panel, section, name, (x, y), contours)
        if len(marks):
            panel.scatter(*marks.T, s=16, facecolors="white", edgecolors="black", linewidths=0.8, zorder=3)
        panel.set_xlabel("angstrom")
        panel.set_xlim(float(x.min()), float(x.max()))
        panel.set_ylim(float(y.min()), float(y.max()))
    figure.axes[0].set_ylabel("angstrom")
    figure.suptitle(f"{len(density.structure)} atoms, {where}", fontsize=10)
    if path is not None:
        try:
            figure.savefig(path, dpi=dpi)
        except OSError as error:
            raise StoreError(f"picture {path} cannot be written: {error.strerror}") from None
    return figure


def check_picture_name(path: str | Path) -> None:
    """Raise `FormatError` unless the name says a format that can be written."""
    if Path(path).suffix.lower() not in PICTURES:
        raise FormatError(f"picture {path}: the name does not say the format; give one of {', '.join(PICTURES)}")


def _draw(
    figure: Figure,
    panel: Axes,
    section: Section,
    name: str,
    mesh: tuple[NDArray[np.float64], NDArray[np.float64]],
    contours: int,
) -> None:
    """One field as colours, with lines of equal density and a scale in e/angstrom^3."""
    values: Any = np.ma.masked_invalid(getattr(section, name))
    # The sampled points are the pixels' centres, whatever the angle between the axes.
    picture = panel.pcolormesh(*mesh, values, cmap=COLORS[name], shading="nearest", rasterized=True)
    density = np.ma.masked_invalid(section.mean)
    if contours > 0 and density.count() and float(np.ptp(density.compressed())) > 0:
        color = "white" if name == "mean" else "0.75"
        panel.contour(*mesh, density, levels=contours, colors=color, linewidths=0.4, alpha=0.8)
    panel.set_aspect("equal")
    panel.set_title(TITLES[name], fontsize=9)
    bar = figure.colorbar(picture, ax=panel, shrink=0.85)
    bar.set_label("e/angstrom$^3$", fontsize=8)
    bar.ax.ticklabel_format(axis="y", scilimits=(-2, 3))


def _thinned(section: Section) -> Section:
    """The section with at most `MAX_PIXELS` points along each edge."""
    n1, n2 = section.mean.shape
    s1, s2 = -(-n1 // MAX_PIXELS), -(-n2 // MAX_PIXELS)
    if s1 == s2 == 1:
        return section
    # Edges shrink to the part that whole steps cover, so that every point keeps its place.
    u, v = section.u * (s1 * -(-n1 // s1) / n1), section.v * (s2 * -(-n2 // s2) / n2)
    fields = [None if f is None else f[::s1, ::s2] for f in (section.aleatoric, section.epistemic)]
    return Section(section.origin, u, v, section.mean[::s1, ::s2], *fields)


def atoms_near(structure: Structure, section: Section, within: float) -> NDArray[np.float64]:
    """In-plane coordinates of the atoms and periodic images close to the parallelogram, (n, 2), angstrom."""
    cell = structure.cell
    corners = section.origin + np.array([[0.0] * 3, section.u, section.v, section.u + section.v])
    fractional = corners @ np.linalg.inv(cell)
    positions = structure.positions @ np.linalg.inv(cell)
    positions = np.where(structure.pbc, positions - np.floor(positions), positions)
    margin = np.where(structure.pbc, 1, 0)
    low = np.where(structure.pbc, np.floor(fractional.min(axis=0)) - margin, 0).astype(int)
    high = np.where(structure.pbc, np.floor(fractional.max(axis=0)) + margin, 0).astype(int)
    found = []
    edges = np.stack([section.u, section.v, section.normal])
    for i in range(low[0], high[0] + 1):
        for j in range(low[1], high[1] + 1):
            for k in range(low[2], high[2] + 1):
                relative = (positions + np.array([i, j, k], dtype=float)) @ cell - section.origin
                along = relative @ np.linalg.inv(edges)
                inside = (np.abs(along[:, 2]) <= within) & np.all((along[:, :2] >= 0) & (along[:, :2] <= 1), axis=1)
                found.append(relative[inside] @ section.axes.T)
    return np.concatenate(found)
