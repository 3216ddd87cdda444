"""Maps of one plane side by side: colours with a scale, lines of equal density, atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import SettingsError
from gpurho.plotplanes import Cut, atoms_of
from gpurho.plotstyle import SMALL, UNIT, column_width, new_figure, unit_label
from gpurho.structure import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATOM_SIZE = 0.2
"""Radius of the discs, in covalent radii: an atom is seen, and what the density does at it."""

DISC = 0.5
"""Atoms whose centres lie so little outside of the picture, angstrom, may still be seen in it."""

SMALLEST = 1.5
"""Points of print that `DISC` takes at least where atoms are drawn."""

SMOOTH = 400
"""Sections of fewer points along their edges are shaded between the points, not as squares."""

MOST, FAR = 0.995, 1.5
"""Where the largest value is `FAR` times what `MOST` of the points are below, a scale ends there."""

LINE_POINTS = 200
"""Points along an edge that lines of equal density are found on."""

_Mesh = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Map:
    """One panel.

    Parameters
    ----------
    values : (n1, n2) array
    label : str
        What it is; stands over the scale with `unit`.
    colors : str
        Name of a colour map.
    low, high : float
        Ends of the scale; values beyond have the colours of its ends, and the scale pointed ends.
    unit : str
        Empty for a number without unit.
    line_color : str
        Of the lines of equal density.
    """

    values: NDArray[Any]
    label: str
    colors: str
    low: float
    high: float
    unit: str = UNIT
    line_color: str = "white"

    @property
    def extend(self) -> str:
        """Which ends of the scale are pointed."""
        known = np.ma.masked_invalid(self.values)
        below, above = bool((known < self.low).any()), bool((known > self.high).any())
        return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
            below, above
        ]


def scale_top(values: NDArray[Any]) -> float:
    """Upper end of a scale from zero: the largest value, or where a few points stand far out, what 99.5 % are below.

    Scales whose ends are passed are pointed there.
    """
    known = np.asarray(values)[np.isfinite(values)]
    if not known.size:
        return 1.0
    largest, most = float(known.max()), float(np.quantile(known, MOST))
    return most if 0 < most < largest / FAR else largest


def draw_maps(
    cut: Cut,
    maps: Sequence[Map],
    structure: Structure,
    *,
    density: NDArray[np.float32],
    contours: int | Sequence[float] = 6,
    atoms_within: float = 0.5,
    line: tuple[ArrayLike, ArrayLike] | None = None,
    column: str | float | None = None,
    title: str = "",
) -> Figure:
    """The panels of one plane, in one row, or one below the other where the plane is flat. Call it inside `style`.

    Parameters
    ----------
    cut : Cut
    maps : sequence of Map
    structure : Structure
    density : (n1, n2) array, e/angstrom^3
        What the lines are lines of.
    contours : int or sequence of float
        About how many lines, or the densities that they are drawn at (e/angstrom^3).
    atoms_within : float, angstrom
        Atoms this close to the plane are drawn. Planes of more than some 50 angstrom in an inch or two show none, nor
        lines, unless their densities are given.
    line : two (3,) arrays, optional
        Ends of a line to mark, angstrom; its projection on the plane is drawn.
    column : "single", "double" or inches
        Width; by default single for one panel, else double.
    title : str
    """
    if not any(np.isfinite(m.values).any() for m in maps):
        raise SettingsError("the plane leaves the field everywhere; give a point inside of it, or another position")
    mesh = cut.section.coordinates()
    across, up = (float(np.ptp(values)) for values in mesh)
    if not (across > 0 and up > 0):
        raise SettingsError(f"a plane of {density.shape} points has no area; give another axis or plane")
    flat = len(maps) > 1 and up / across < FLAT
    width = column_width(column if column is not None else ("single" if len(maps) == 1 else "double"))
    figure, panels, bars = _laid_out(width, len(maps), up / across, flat)
    atoms = atoms_of(structure, cut.section, atoms_within, margin=DISC)
    # Of hundreds of atoms across, discs and lines would only darken the picture.
    crowded = 72 * width * panels[0].get_position().width / across * DISC < SMALLEST
    shown = len(atoms[1]) > 0 and not crowded
    if crowded and isinstance(contours, int):
        contours = 0
    for panel, bar, one in zip(panels, bars, maps, strict=True):
        _draw(figure, panel, bar, one, mesh, density, contours, "right" if flat else "top")
        if shown:
            draw_atoms(panel, structure, atoms)
        if line is not None:
            ends = (np.asarray(line, dtype=float) - cut.section.origin) @ cut.section.axes.T
            panel.plot(*ends.T, color="white", linewidth=1.4, zorder=4)
            panel.plot(*ends.T, color="black", linewidth=1.0, linestyle=(0, (1, 1.5)), zorder=5)
        panel.set_xlim(float(mesh[0].min()), float(mesh[0].max()))
        panel.set_ylim(float(mesh[1].min()), float(mesh[1].max()))
    x, y = ((f"{name} (\u00c5)" if name else "distance (\u00c5)") for name in cut.labels)
    for i, panel in enumerate(panels):
        panel.tick_params(labelbottom=not flat or i == len(maps) - 1, labelleft=flat or i == 0)
        if not flat or i == len(maps) - 1:
            panel.set_xlabel(x)
        if flat or i == 0:
            panel.set_ylabel(y)
    top = 1 - 0.04 / figure.get_figheight()
    figure.suptitle(title, x=0.01, y=top, ha="left", va="top")
    if shown:
        _legend(figure, structure, atoms[1], top)
    return figure


LEFT, RIGHT, BOTTOM, TITLE, GAP = 0.44, 0.13, 0.37, 0.22, 0.20
"""Inches around the panels: numbers and labels to the left and below, the title above, and between panels."""

BAR, BAR_GAP, BAR_ABOVE, BAR_BESIDE = 0.075, 0.06, 0.33, 0.50
"""Inches of a scale: thickness, distance from its panel, and what its numbers and label take over it or beside it."""

FLAT, HIGHEST = 0.4, 9.5
"""Height of a plane in its width below which panels stand one below the other; most inches of a page."""


def _laid_out(width: float, n: int, spread: float, flat: bool) -> tuple[Figure, list[Axes], list[Axes]]:
    """A figure of `width` inches, its panels and their scales: every panel as wide as its scale, none cut off."""
    if flat:
        room = HIGHEST - TITLE - BOTTOM - (n - 1) * GAP
        w = min(width - LEFT - BAR_GAP - BAR - BAR_BESIDE, room / (n * spread))
    else:
        room = HIGHEST - TITLE - BOTTOM - BAR_GAP - BAR - BAR_ABOVE
        w = min((width - LEFT - RIGHT - (n - 1) * GAP) / n, room / spread)
    h = w * spread
    high = TITLE + BOTTOM + (n * h + (n - 1) * GAP if flat else h + BAR_GAP + BAR + BAR_ABOVE)
    figure = new_figure(width, high, layout="none")
    panels: list[Axes] = []
    bars: list[Axes] = []
    for i in range(n):
        x, y = (LEFT, BOTTOM + (n - 1 - i) * (h + GAP)) if flat else (LEFT + i * (w + GAP), BOTTOM)
        box = (x + w + BAR_GAP, y, BAR, h) if flat else (x, y + h + BAR_GAP, w, BAR)
        first = panels[0] if panels else None
        panels.append(figure.add_axes((x / width, y / high, w / width, h / high), sharex=first, sharey=first))
        bars.append(figure.add_axes((box[0] / width, box[1] / high, box[2] / width, box[3] / high)))
    return figure, panels, bars


def _draw(
    figure: Figure,
    panel: Axes,
    scale: Axes,
    one: Map,
    mesh: _Mesh,
    density: NDArray[np.float32],
    contours: int | Sequence[float],
    side: str,
) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    values: Any = np.ma.masked_invalid(one.values)
    norm = Normalize(one.low, one.high if one.high > one.low else one.low + 1e-12)
    # The sampled points are the corners of what is shaded, or the pixels' centres, whatever the angle of the axes.
    smooth = max(values.shape) <= SMOOTH and not np.ma.is_masked(values)
    shading: Any = "gouraud" if smooth else "nearest"
    picture = panel.pcolormesh(*mesh, values, cmap=one.colors, norm=norm, shading=shading, rasterized=True)
    panel.set_aspect("equal")
    panel.tick_params(labelsize=SMALL)
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    along: Any = "horizontal" if side == "top" else "vertical"
    place: Any = side
    bar = figure.colorbar(picture, cax=scale, orientation=along, ticklocation=place, extend=one.extend)
    bar.outline.set_linewidth(0.5)
    axis = bar.ax.xaxis if side == "top" else bar.ax.yaxis
    bar.locator = MaxNLocator(4 if side == "top" else 5, steps=[1, 2, 2.5, 5, 10])
    bar.update_ticks()
    label = unit_label(axis, max(abs(one.low), abs(one.high)), one.label, one.unit)
    bar.set_label(label)
    bar.ax.tick_params(labelsize=SMALL)
    lines = _lines(panel, mesh, density, contours, one.line_color)
    if lines is not None and one.values is density:
        bar.add_lines(lines)


def _lines(
    panel: Axes, mesh: _Mesh, density: NDArray[np.float32], contours: int | Sequence[float], color: str
) -> Any | None:
    """Lines of equal density; None where there are none."""
    from matplotlib.ticker import MaxNLocator

    values: Any = np.ma.masked_invalid(density)
    if min(values.shape) < 2 or values.count() < 4:
        return None
    low, high = float(values.min()), float(values.max())
    if isinstance(contours, int):
        levels = MaxNLocator(contours, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if contours > 0 else []
    else:
        levels = sorted(float(level) for level in contours)
    inside = [float(level) for level in levels if low < level < high]
    if not inside:
        return None
    x, y = mesh
    if not np.ma.is_masked(values):
        x, y, values = (_finer(array) for array in (*mesh, np.asarray(density, dtype=float)))
    return panel.contour(x, y, values, levels=inside, colors=color, linewidths=0.4, alpha=0.75)


def _finer(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A coarse section on a finer mesh, by splines, so that lines across it are no polygons."""
    from scipy.interpolate import RectBivariateSpline

    n1, n2 = values.shape
    factors = [max(1, -(-LINE_POINTS // n)) for n in (n1, n2)]
    if factors == [1, 1] or min(n1, n2) < 4:
        return values
    i, j = (np.linspace(0, n - 1, (n - 1) * f + 1) for n, f in zip((n1, n2), factors, strict=True))
    finer: NDArray[np.float64] = RectBivariateSpline(np.arange(n1), np.arange(n2), values)(i, j)
    return finer


def draw_atoms(
    panel: Axes, structure: Structure, atoms: tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]
) -> None:
    """Discs in the colours and, scaled, the radii of the elements."""
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors
    from matplotlib.collections import EllipseCollection

    places, which, heights = atoms
    # The nearest to the plane over the others.
    order = np.argsort(-np.abs(heights), kind="stable")
    numbers = structure.numbers[which[order]]
    size = 2 * ATOM_SIZE * covalent_radii[numbers]
    discs = EllipseCollection(
        size,
        size,
        np.zeros(len(size)),
        units="xy",
        offsets=places[order],
        offset_transform=panel.transData,
        facecolors=jmol_colors[numbers],
        edgecolors="black",
        linewidths=0.5,
        zorder=3,
        clip_on=True,
    )
    discs.set_gid("atoms")
    panel.add_collection(discs, autolim=False)


def _legend(figure: Figure, structure: Structure, which: NDArray[np.int64], top: float) -> None:
    """Which disc is which element, where there are several."""
    from ase.data import chemical_symbols, covalent_radii
    from ase.data.colors import jmol_colors
    from matplotlib.lines import Line2D

    numbers = np.unique(structure.numbers[which])
    if len(numbers) < 2:
        return
    largest = covalent_radii[numbers].max()
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            markersize=6 * covalent_radii[z] / largest,
            markerfacecolor=tuple(jmol_colors[z]),
            markeredgecolor="black",
            markeredgewidth=0.5,
            label=chemical_symbols[z],
        )
        for z in numbers
    ]
    # In the line of the title, which has made room.
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1.0, top),
        ncols=len(handles),
        handletextpad=0.0,
        columnspacing=0.8,
        borderpad=0.0,
    )
