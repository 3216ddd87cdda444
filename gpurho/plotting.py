"""Pictures of a density: planes, lines, histograms, and errors where a reference is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.calibrationplot import plot_calibration, plot_field_calibration
from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.ploterrors import plot_error
from gpurho.plothistograms import plot_histogram
from gpurho.plotlines import plot_line
from gpurho.plotmaps import Map, draw_maps, scale_top
from gpurho.plotplanes import MAX_PIXELS, atoms_of, choose_cut, miller_normal
from gpurho.plotstyle import (
    COLORS,
    COLUMNS,
    DPI,
    LABELS,
    LINES,
    PICTURES,
    TITLES,
    check_picture_name,
    formula,
    save,
    style,
)
from gpurho.sections import Section
from gpurho.structure import Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_density(
    density: Density,
    path: str | Path | None = None,
    *,
    axis: int | None = None,
    position: float | None = None,
    plane: Sequence[int] | None = None,
    crystal: ArrayLike | None = None,
    normal: ArrayLike | None = None,
    point: ArrayLike | None = None,
    atom: int | None = None,
    width: float | None = None,
    fields: tuple[str, ...] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    same_scale: bool = False,
    atoms_within: float = 0.5,
    contours: int | Sequence[float] = 6,
    line: tuple[ArrayLike, ArrayLike] | None = None,
    column: str | float | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Figure:
    """A plane through a density, one panel for each field, in real coordinates.

    Scales are linear and begin at zero (at the lowest density where it is negative). They end at the largest value, or
    for sigmas of which a few stand far out below these, and then they are pointed (`gpurho.plotmaps.scale_top`).

    Parameters
    ----------
    density : Density
    path : path, optional
        Picture to write; the name says the format (png, pdf, svg, jpg).
    axis, position
        The plane of grid points at this fraction of this cell vector (by default half of the last), unless `plane` or
        `normal` is given.
    plane : 3 ints
        Miller indices (hkl) of the plane instead. It goes through `point`, `atom`, or the cell's centre; or where
        ``h x + k y + l z = position`` in fractional coordinates of the crystal's cell.
    crystal : 3 ints or (3, 3) array
        The cell that `plane` refers to, where it is not that of the structure: how many crystal cells the structure's
        holds along each vector, or the crystal's cell vectors as rows (angstrom).
    normal : (3,) array
        Any plane instead: a Cartesian vector across it.
    point : (3,) array, angstrom
        A point in the plane; for `plane` and `normal` the centre of the picture.
    atom : int
        Instead of `point`: this atom, counted from 0.
    width : float, angstrom
        Edge of the square that `plane` and `normal` show; by default the cube root of the grid's volume.
    fields : tuple of str, optional
        "mean", "aleatoric", "epistemic", "std"; by default the mean and both sigmas where there are any.
    limits : mapping of field to (low, high), e/angstrom^3
        Ends of scales, for pictures that are to be compared.
    same_scale : bool
        One scale for all sigmas.
    atoms_within : float, angstrom
        Atoms this close to the plane are drawn, in the colours of their elements; not on planes hundreds of atoms wide.
    contours : int or sequence of float
        About how many lines of equal density over every panel, or at which densities; 0 for none.
    line : two (3,) arrays, angstrom
        A line to mark, as `plot_line` draws it.
    column : "single", "double" or inches
        Width of the picture: 3.5 and 7.2 inches, columns of journals.
    title : str, optional
        By default the formula and the plane; "" for none.
    dpi : int

    Returns
    -------
    matplotlib Figure
        Made without pyplot: no window, no global state, any back end.

    Raises
    ------
    SettingsError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    wanted = fields or (("mean", "aleatoric", "epistemic") if density.uncertain else ("mean",))
    _check_fields(density, (*wanted, *(limits or ())))
    cut = choose_cut(
        density,
        axis,
        position,
        plane=plane,
        crystal=crystal,
        normal=normal,
        point=point,
        atom=atom,
        width=width,
    )
    ends = _scales(cut.section, wanted, dict(limits or {}), same_scale)
    # One array for the density, so that its lines stand on its own scale.
    values = {name: getattr(cut.section, name) for name in {"mean", *wanted}}
    maps = [
        Map(values[n], LABELS[n], COLORS[n], *ends[n], line_color="white" if n == "mean" else "0.8") for n in wanted
    ]
    text = f"{formula(density.structure)}, {cut.caption}" if title is None else title
    with style():
        figure = draw_maps(
            cut,
            maps,
            density.structure,
            density=values["mean"],
            contours=contours,
            atoms_within=atoms_within,
            line=line,
            column=column,
            title=text,
        )
        return save(figure, path, dpi)


KINDS: dict[str, Callable[..., Figure]] = {
    "slice": plot_density,
    "line": plot_line,
    "histogram": plot_histogram,
    "error": plot_error,
    "calibration": plot_field_calibration,
}
"""Functions of `plot`."""


def plot(density: Density, path: str | Path | None = None, kind: str = "slice", **options: Any) -> Figure:
    """A picture of a density: "slice", "line", "histogram", "error" or "calibration".

    See `plot_density`, `plot_line`, `plot_histogram`, `plot_error` and `plot_field_calibration` for their options.

    Raises
    ------
    SettingsError, GridError, FormatError, StoreError
    """
    if kind not in KINDS:
        raise SettingsError(f"picture {kind!r} is not known; give one of {', '.join(KINDS)}")
    _, *parameters = inspect.signature(KINDS[kind]).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing := [name for name in needed if name not in options]:
        given = ", ".join(f"{name}=..." for name in missing)
        raise SettingsError(f"picture {kind!r} needs {' and '.join(missing)}; give plot(..., {given})")
    return KINDS[kind](density, path=path, **options)


def atoms_near(structure: Structure, section: Section, within: float) -> NDArray[np.float64]:
    """In-plane coordinates of the atoms and periodic images close to the parallelogram, (n, 2), angstrom."""
    return atoms_of(structure, section, within)[0]


def _check_fields(density: Density, names: Sequence[str]) -> None:
    for name in names:
        if name not in TITLES or (name != "mean" and not density.uncertain):
            known = ", ".join(TITLES) if density.uncertain else "mean"
            raise SettingsError(f"field {name!r} cannot be drawn; give some of {known}")


def _scales(
    section: Section, wanted: Sequence[str], limits: dict[str, tuple[float, float]], same: bool
) -> dict[str, tuple[float, float]]:
    """Ends of the scale of each field."""
    ends = {}
    for name in wanted:
        values = getattr(section, name)
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        ends[name] = (min(0.0, low), high if name == "mean" else scale_top(known))
    sigmas = [name for name in wanted if name != "mean"]
    if same and sigmas:
        ends |= dict.fromkeys(sigmas, (0.0, max(ends[name][1] for name in sigmas)))
    for name, pair in limits.items():
        low, high = (float(x) for x in pair)
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise SettingsError(f"limits {pair!r} of {name} are no scale; give its lower and upper end, e/angstrom^3")
        if name in ends:
            ends[name] = (low, high)
    return ends


__all__ = [
    "COLORS",
    "COLUMNS",
    "DPI",
    "KINDS",
    "LABELS",
    "LINES",
    "MAX_PIXELS",
    "PICTURES",
    "TITLES",
    "atoms_near",
    "check_picture_name",
    "miller_normal",
    "plot",
    "plot_calibration",
    "plot_density",
    "plot_error",
    "plot_field_calibration",
    "plot_histogram",
    "plot_line",
]
