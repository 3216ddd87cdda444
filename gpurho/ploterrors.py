"""Where a prediction errs: signed error, and error in sigmas, on a plane, against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpurho.density import Density
from gpurho.errors import GridError, SettingsError, StructureError
from gpurho.plotmaps import Map, draw_maps, scale_top
from gpurho.plotplanes import choose_cut
from gpurho.plotstyle import COLORS, DPI, UNIT, check_picture_name, formula, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED, RATIO = "RdBu_r", "YlOrRd"
"""Colours of the signed error and of the error in sigmas."""

MOST = 3.0
"""End of the scale of errors in sigmas."""

SAME_CELL, SAME_ATOMS = 1e-3, 0.02
"""Largest differences of cells and of positions that rounding in files makes, angstrom."""


def plot_error(
    density: Density,
    reference: Density,
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
    limit: float | None = None,
    atoms_within: float = 0.5,
    contours: int | Sequence[float] = 6,
    column: str | float | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Figure:
    """The error on a plane: predicted density, predicted minus reference, and the absolute error in total sigmas.

    The scale of the signed error is centred at zero. Without sigmas the last panel is left out.

    Parameters
    ----------
    density : Density
    reference : Density
        On the same grid, of the same atoms.
    path : path, optional
        Picture to write; the name says the format.
    axis, position, plane, crystal, normal, point, atom, width
        Which plane, as for `gpurho.plotting.plot_density`.
    limit : float, e/angstrom^3
        Ends of the scale of the error; by default the largest on the plane, which the title names too, or where a few
        points stand far out, what 99.5 % are below.
    atoms_within, contours, column, title, dpi
        As for `gpurho.plotting.plot_density`; the lines are those of the predicted density.

    Raises
    ------
    SettingsError, GridError, StructureError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    check_reference(density, reference)
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise SettingsError(f"limit {limit!r} is no end of a scale; give a positive error in e/angstrom^3")
    where: dict[str, Any] = {"plane": plane, "crystal": crystal, "normal": normal, "point": point}
    where |= {"atom": atom, "width": width}
    cut = choose_cut(density, axis, position, **where)
    theirs = choose_cut(reference, axis, position, **where).section.mean
    ours = cut.section.mean
    error = ours.astype(np.float64) - theirs
    if not np.isfinite(error).any():
        raise SettingsError("the plane leaves the field everywhere; give a point inside of it, or another position")
    low, high = min(0.0, float(np.nanmin(ours))), float(np.nanmax(ours))
    end = scale_top(np.abs(error)) if limit is None else float(limit)
    maps = [
        Map(ours, "predicted density", COLORS["mean"], low, high),
        Map(error, "predicted $-$ reference", SIGNED, -end, end, line_color="0.45"),
    ]
    if cut.section.std is not None:
        ratio = np.abs(error) / np.maximum(cut.section.std, 1e-30)
        maps.append(Map(ratio, "|error| / total $\\sigma$", RATIO, 0.0, MOST, "", "0.45"))
    largest = f"largest error {float(np.nanmax(np.abs(error))):.2g} {UNIT}"
    text = f"{formula(density.structure)}, {cut.caption}, {largest}" if title is None else title
    with style():
        figure = draw_maps(
            cut,
            maps,
            density.structure,
            density=ours,
            contours=contours,
            atoms_within=atoms_within,
            column=column,
            title=text,
        )
        return save(figure, path, dpi)


def check_reference(density: Density, reference: Density) -> None:
    """Raise unless a reference has the points and the atoms of a density.

    Raises
    ------
    GridError
        For other points; the message says which both have.
    StructureError
        For other atoms.
    """
    ours, theirs = density.grid, reference.grid
    if ours.shape != theirs.shape:
        sizes = ["x".join(map(str, g.shape)) for g in (theirs, ours)]
        raise GridError(
            f"reference has a grid of {sizes[0]} points, the density one of {sizes[1]}; predict on the reference's:"
            f" grid={theirs.shape} (--grid {' '.join(map(str, theirs.shape))})"
        )
    off = max(float(np.abs(ours.cell - theirs.cell).max()), float(np.abs(ours.origin - theirs.origin).max()))
    if off > SAME_CELL:
        raise GridError(
            f"reference has another cell or origin, {off:.3g} angstrom off: {np.round(theirs.cell, 3).tolist()}, not"
            f" {np.round(ours.cell, 3).tolist()}; give the density of the same cell"
        )
    one, other = density.structure, reference.structure
    if not np.array_equal(np.sort(one.numbers), np.sort(other.numbers)):
        raise StructureError(
            f"reference is of {other.to_ase().get_chemical_formula()}, the density of"
            f" {one.to_ase().get_chemical_formula()}; give the density of the same atoms"
        )
    far = _farthest(density, reference)
    if far > SAME_ATOMS:
        raise StructureError(
            f"reference has atoms elsewhere, up to {far:.3g} angstrom from those of the density; give the density of"
            " the same structure"
        )


def _farthest(density: Density, reference: Density) -> float:
    """Largest distance from an atom of the reference to the next of its species, in whatever order they are."""
    from scipy.spatial import cKDTree

    cell, pbc = density.structure.cell, density.structure.pbc
    inverse = np.linalg.inv(cell)
    sets = []
    for structure in (density.structure, reference.structure):
        fractional = structure.positions @ inverse
        sets.append((np.where(pbc, fractional - np.floor(fractional), fractional), structure.numbers))
    (here, kinds), (there, others) = sets
    # Images beyond each face, as far as positions may differ.
    reach = SAME_ATOMS * np.linalg.norm(inverse, axis=0)
    for axis in np.flatnonzero(pbc):
        low, high = here[:, axis] < reach[axis], here[:, axis] > 1 - reach[axis]
        step = np.eye(3)[axis]
        here = np.concatenate([here, here[low] + step, here[high] - step])
        kinds = np.concatenate([kinds, kinds[low], kinds[high]])
    worst = 0.0
    for number in np.unique(others):
        distance, _ = cKDTree(here[kinds == number] @ cell).query(there[others == number] @ cell)
        worst = max(worst, float(distance.max()))
    return worst
