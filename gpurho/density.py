"""The predicted field: a density with its two standard deviations on a grid, in memory or on disk."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import GridError, SettingsError
from gpurho.fields import NAMES, Box, Correction, Field, LazyField, Totals, blocks
from gpurho.grid import Grid
from gpurho.keep import HISTOGRAM, SIGMA_EDGES, Keep, density_edges, plane_indices
from gpurho.kept import Histogram, Kept, coarse_grid
from gpurho.peratom import AtomCharges, per_atom
from gpurho.sections import Line, Section, interpolate, line_points, mesh_points, plane_mesh
from gpurho.storedatoms import StoredAtoms
from gpurho.structure import Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gpurho.model import DensityModel
    from gpurho.trust import Trust


def _upper(module: str, name: str) -> Callable[..., Any]:
    """A function of a layer above, found when it is called: files and pictures know of fields, not the reverse."""
    return cast(Callable[..., Any], getattr(importlib.import_module(module), name))


class Density:
    """An electron density with error bars on a regular grid.

    Parameters
    ----------
    grid : Grid
        Points of the field. Of a prediction for a region this is the region's own grid, without periods along the
        axes that the region cuts.
    structure : Structure, or what has a length and gives one when its `structure()` is called
    mean : (nx, ny, nz) float32 array or LazyField, e/angstrom^3; or None
        None where the prediction kept no field but what is in `kept`.
    aleatoric, epistemic : like `mean`, optional
        Standard deviations: the noise of the labels as the network learned it, and the network's own ignorance.
    errors : (k,) array, optional
        Vector whose length, times the volume per point, is the epistemic sigma of the integral (`gpurho.integrals`).
    totals : Totals, optional
        Sums of the raw fields; found by one pass over the field when they are needed and not given.
    correction : Correction, optional
        Electron conservation, applied whenever values are read.
    info : mapping, optional
        Provenance: settings, model, versions, region, what the prediction counted.
    close : callable, optional
        Releases the file behind lazy fields.
    kept : Kept, optional
        What the prediction kept beside or instead of the field: see ``keep=`` of `gpurho.predict`.

    Notes
    -----
    The field attributes are ``mean``, ``aleatoric``, ``epistemic`` and ``std``, the root of the sum of the two
    variances; the last three are None where there is no uncertainty. Of a prediction, ``trust`` says how like the atoms
    are to the training data (`gpurho.trust`); None where the model does not know.
    """

    def __init__(
        self,
        grid: Grid,
        structure: StoredAtoms,
        mean: Field | None,
        aleatoric: Field | None = None,
        epistemic: Field | None = None,
        *,
        totals: Totals | None = None,
        errors: NDArray[np.float64] | None = None,
        correction: Correction | None = None,
        info: Mapping[str, Any] | None = None,
        close: Callable[[], None] | None = None,
        kept: Kept | None = None,
    ) -> None:
        if mean is None and (kept is None or totals is None):
            raise SettingsError("a density without a field needs what was kept of it and its totals; give both")
        if (aleatoric is None) != (epistemic is None):
            raise SettingsError("one of aleatoric and epistemic is missing; give both standard deviations or neither")
        self._raw: dict[str, Field] = {} if mean is None else {"mean": mean}
        self.kept, self.trust = kept, cast("Trust | None", None)
        if aleatoric is not None and epistemic is not None:
            self._raw |= {"aleatoric": aleatoric, "epistemic": epistemic}
        for name, field in self._raw.items():
            if tuple(field.shape) != grid.shape:
                raise GridError(
                    f"{name} has shape {tuple(field.shape)} on a grid of shape {grid.shape}; give one value a point"
                )
        self.grid, self._atoms = grid, structure
        self.correction = correction or Correction()
        self.info: dict[str, Any] = dict(info or {})
        self._totals, self._errors = totals, errors
        self._close = close
        self._made: dict[str, Field] = {}

    # -- fields ---------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """The atoms. Those of a file are read when they are first asked for, where they are very many."""
        self._atoms = found = self._atoms.structure()
        return found

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self._atoms)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Points along each axis."""
        return self.grid.shape

    @property
    def mean(self) -> Field:
        """The density, (nx, ny, nz), e/angstrom^3."""
        return self._field("mean")

    @property
    def aleatoric(self) -> Field | None:
        """Standard deviation from the noise of the training labels, e/angstrom^3; None without uncertainty."""
        return self._field("aleatoric") if self.uncertain else None

    @property
    def epistemic(self) -> Field | None:
        """Standard deviation from what the network does not know, e/angstrom^3; None without uncertainty."""
        return self._field("epistemic") if self.uncertain else None

    @property
    def std(self) -> Field | None:
        """Total standard deviation, ``sqrt(aleatoric^2 + epistemic^2)``, e/angstrom^3; None without uncertainty."""
        return self._field("std") if self.uncertain else None

    @property
    def uncertain(self) -> bool:
        """Whether the field has standard deviations."""
        return len(self._raw) > 1 if self._raw else self.totals.sum_std > 0

    @property
    def has_field(self) -> bool:
        """Whether the full field was kept."""
        return bool(self._raw)

    def raw_fields(self) -> dict[str, Field]:
        """The fields as they are stored, before electron conservation, by name."""
        return dict(self._raw)

    def _field(self, name: str) -> Field:
        if self.kept is not None and not self._raw:
            raise self.kept.missing("the full field", "field")
        if name not in self._made:
            raw = self._raw["mean"]
            if name in NAMES and self.correction.trivial:
                return self._raw[name]
            if isinstance(raw, LazyField):
                self._made[name] = LazyField(lambda box: self._block(name, box), raw.shape, raw.chunks, raw.phase)
            else:
                value = np.empty(raw.shape, dtype=np.float32)
                for box in blocks(raw):
                    value[box] = self._block(name, box)
                self._made[name] = value
        return self._made[name]

    def _block(self, name: str, box: Box) -> NDArray[np.float32]:
        """One box of a corrected field."""
        if name == "std":
            return np.hypot(self._block("aleatoric", box), self._block("epistemic", box))
        raw = {key: np.asarray(self._raw[key][box]) for key in self.correction.needs(name)}
        return self.correction.apply(name, raw)

    # -- integrals ------------------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        """Sums of the raw fields, before electron conservation."""
        if self._totals is None:
            parts = []
            for box in blocks(self._raw["mean"]):
                values = {name: np.asarray(field[box]) for name, field in self._raw.items()}
                parts.append(Totals.of_block(values["mean"], values.get("aleatoric"), values.get("epistemic")))
            self._totals = Totals.merged(parts)
        return self._totals

    @property
    def electrons(self) -> float:
        """Integral of `mean` over the grid."""
        sums = self.totals
        return (self.correction.scale * sums.sum_mean + self.correction.shift * sums.sum_variance) * self.grid.dv

    @property
    def electrons_predicted(self) -> float:
        """Integral of the density as the network gave it, before electron conservation."""
        return self.totals.sum_mean * self.grid.dv

    @property
    def electrons_std(self) -> float | None:
        """Standard deviation of `electrons_predicted`; None without uncertainty.

        The epistemic errors of all points come from one set of weights: their share follows from the sum of the
        points' gradients, as `gpurho.integrals` says, where the prediction kept it (`correlated`); otherwise they
        count as fully correlated, the largest value that they can have. Aleatoric errors count as independent
        beyond the volume within which those of held-out snapshots were found to go together, `info`'s
        "correlation_volume" (angstrom^3); without one, from point to point.
        """
        if not self.uncertain:
            return None
        sums, dv = self.totals, self.grid.dv
        common = sums.sum_epistemic if self._errors is None else float(np.linalg.norm(self._errors))
        independent = sums.sum_aleatoric2 * dv * max(dv, self._correlation_volume)
        return float(np.hypot(np.sqrt(independent), common * dv))

    @property
    def correlated(self) -> bool:
        """Whether `electrons_std` follows how errors of points go together; otherwise it is an upper bound."""
        return self._errors is not None

    @property
    def _correlation_volume(self) -> float:
        """Volume in angstrom^3; 0 where it is not known."""
        return float(self.info.get("correlation_volume") or 0.0)

    @property
    def mean_std(self) -> float | None:
        """Average of `std` over the points, e/angstrom^3; None without uncertainty."""
        return self.totals.sum_std / self.totals.n_points * self.correction.scale if self.uncertain else None

    @property
    def max_std(self) -> float | None:
        """Largest `std`, e/angstrom^3; None without uncertainty."""
        return self.totals.max_std * self.correction.scale if self.uncertain else None

    @property
    def n_capped(self) -> int:
        """Points whose descriptors met the cutoff before their last atom."""
        return self.totals.n_capped

    def per_atom(self, model: DensityModel | None = None, device: str = "cpu") -> AtomCharges:
        """Electrons, standard deviation and volume of the points nearest to each atom.

        The field is read block by block. ``charges.electrons`` and ``charges.electrons_std`` go as they are into
        ``atoms.arrays`` and so into OVITO.

        With the `model` of the prediction, the epistemic part of the standard deviations follows how the errors of
        an atom's points go together, at the cost of descriptors and network for a part of the points once more, on
        `device`, and of a few hundred numbers per atom in memory. Without it they count as fully correlated within
        an atom, the largest value that they can have.
        """
        known = None
        volume = self._correlation_volume
        if model is None and self.kept is not None and self.kept.atom_sums is not None:
            return self.kept.charges(self.n_atoms, self.grid.dv, self.correction, volume)
        if self.kept is not None and not self._raw:
            raise self.kept.missing("the full field", "field" if self.kept.keep.atoms else "atoms")
        if model is not None and self.uncertain:
            known = _upper("gpurho.atomerrors", "atom_errors")(self, model, device) * self.correction.scale
        return per_atom(self.structure, self.grid, self.mean, self.aleatoric, self.epistemic, None, volume, known)

    @property
    def coarse(self) -> Density:
        """The coarse field that ``keep="coarse:4"`` kept: a density on the grid of the blocks' centres.

        Its mean is the mean over each block. Its sigmas are the roots of the blocks' mean squared sigmas: typical of a
        point in the block, and upper bounds of the sigma of the block's mean. Of the integral, ``electrons_std`` of
        this density, not of the coarse one, is the error bar.
        """
        kept = self.kept
        if kept is None or kept.keep.coarse is None:
            raise (kept or Kept(Keep())).missing("a coarse field", "coarse:4")
        grid = coarse_grid(self.grid, kept.keep.coarse)
        block = kept.keep.coarse[0] * kept.keep.coarse[1] * kept.keep.coarse[2]
        fields = [kept.coarse.get(name) for name in NAMES]
        errors = None if self._errors is None else self._errors / block
        return Density(
            grid, self._atoms, *fields, errors=errors, correction=self.correction, info=self.info, close=self._close
        )

    def histogram(self, field: str = "mean") -> Histogram:
        """How many points have which density ("mean") or total sigma ("std").

        As it was kept by ``keep="histogram"``; else counted from the field, which is read block by block.
        """
        if field not in ("mean", "std") or (field == "std" and not self.uncertain):
            known = "'mean' or 'std'" if self.uncertain else "'mean', the only one there is"
            raise SettingsError(f"a histogram of {field!r} is not known; give {known}")
        if self.kept is not None and field in self.kept.histograms:
            return self.kept.histogram(field, self.correction)
        if self.kept is not None and not self._raw:
            raise self.kept.missing("a histogram", "histogram")
        found = Histogram.of_values(np.empty(0), density_edges(*HISTOGRAM) if field == "mean" else SIGMA_EDGES)
        for box in blocks(self._raw["mean"]):
            if field == "mean":
                values = self._block("mean", box).astype(np.float64)
            else:
                a, e = (np.square(self._block(name, box), dtype=np.float64) for name in NAMES[1:])
                values = np.sqrt(a + e)
            found += Histogram.of_values(values, found.edges)
        return found

    # -- values at points -----------------------------------------------------------------------------------

    def at(self, points: ArrayLike, order: int = 3) -> tuple[NDArray[np.float32], ...]:
        """Interpolated mean, aleatoric and epistemic at Cartesian points (..., 3) in angstrom.

        Order 3 is cubic, 1 linear. Without uncertainty only the mean is returned. Points beyond an axis without
        period give NaN.
        """
        values = [interpolate(self._field(name), self.grid, points, order) for name in self._raw or ("mean",)]
        # The cubic may swing below zero beside a sharp maximum; a standard deviation must not.
        return (values[0], *(np.maximum(sigma, 0) for sigma in values[1:]))

    def line(self, a: ArrayLike, b: ArrayLike, n: int = 200, order: int = 3) -> Line:
        """The density along the straight line from `a` to `b` (Cartesian, angstrom), `n` points, ends included."""
        points, distance = line_points(a, b, n)
        mean, aleatoric, epistemic = self._three(points, order)
        return Line(points, distance, mean, aleatoric, epistemic)

    def slice(self, axis: int = 2, position: float = 0.5) -> Section:
        """The plane of grid points at the fraction `position` of cell vector `axis`.

        Between two planes of the grid the values are interpolated linearly. Of a field on disk only the chunks
        along the plane are read; without a field, the planes that ``keep="slice:z=0.5"`` kept.
        """
        if axis not in (0, 1, 2):
            raise SettingsError(f"axis {axis!r} is not a cell vector; give 0, 1 or 2")
        if not (np.isfinite(position) and 0 <= position <= 1):
            raise SettingsError(f"position {position!r} is not a fraction of the cell vector; give 0 to 1")
        low, high, part = plane_indices(self.grid, axis, position)
        kept = None if self._raw else self.kept
        if kept is not None and not kept.has_slice(self.grid, axis, position):
            raise kept.missing("this slice", f"slice:{'xyz'[axis]}={position}")

        def plane(name: str, i: int) -> NDArray[np.float32]:
            if kept is not None:
                return kept.block(name, axis, i, self.correction)
            return np.asarray(self._field(name)[tuple(i if d == axis else slice(None) for d in range(3))])

        def cut(name: str) -> NDArray[np.float32]:
            if part == 0:
                return plane(name, low)
            return ((1 - part) * plane(name, low) + part * plane(name, high)).astype(np.float32)

        names = NAMES if self.uncertain else NAMES[:1]
        values = [cut(name) for name in names] + [None] * (3 - len(names))
        first, second = (d for d in range(3) if d != axis)
        cell = self.grid.cell
        origin = self.grid.origin + float(position) * cell[axis]
        return Section(origin, cell[first], cell[second], cast(Any, values[0]), values[1], values[2])

    def plane(
        self,
        normal: ArrayLike,
        point: ArrayLike,
        width: float | None = None,
        spacing: float | None = None,
        order: int = 3,
    ) -> Section:
        """The density on a square around `point` across `normal`.

        Parameters
        ----------
        normal : (3,) array
            Any length.
        point : (3,) array, angstrom
            Centre of the square.
        width : float, optional
            Edge in angstrom; by default the cube root of the grid's volume.
        spacing : float, optional
            Distance of points in angstrom; by default the grid's smallest step.
        order : int
            3 cubic, 1 linear.
        """
        origin, u, v, shape = plane_mesh(self.grid, normal, point, width, spacing)
        mean, aleatoric, epistemic = self._three(mesh_points(origin, u, v, shape), order)
        return Section(origin, u, v, mean, aleatoric, epistemic)

    def _three(self, points: NDArray[np.float64], order: int) -> tuple[Any, Any, Any]:
        values = self.at(points, order)
        return values if len(values) == 3 else (values[0], None, None)

    # -- files and pictures ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> Density:
        """A density from a file: HDF5 and vti of this library (read on demand), or another format (read whole)."""
        return cast(Density, _upper("gpurho.formats", "read_density")(path))

    def write(self, path: str | Path, field: str = "mean") -> Path:
        """Write to a file; the name says the format: `gpurho.formats`, and ``*.xyz`` or ``*.dump`` for sums of atoms.

        `field` is "mean", "aleatoric", "epistemic" or "std"; HDF5 and vti take all of them. It is read in slabs. A file
        of that name is replaced, once the new one is whole.
        """
        return cast(Path, _upper("gpurho.formats", "write_density")(self, path, field))

    def plot(self, path: str | Path | None = None, kind: str = "slice", **options: Any) -> Figure:
        """A picture: slices of the mean and the sigmas, or of another `kind`; see `gpurho.plotting.plot`."""
        return cast("Figure", _upper("gpurho.plotting", "plot")(self, path, kind, **options))

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write one self-contained HTML page about this density; see `gpurho.report` for the options."""
        return cast(Path, _upper("gpurho.pipelines.report", "report")(self, path, **options))

    # -- life -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the file behind the field, if there is one."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Density:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self._raw:
            what = ", ".join(self.kept.keep.to_items()) if self.kept is not None else "nothing"
            return f"<Density of {self.n_atoms} atoms on {self.shape}, kept {what}>"
        where = "on disk" if isinstance(self._raw["mean"], LazyField) else "in memory"
        spread = "with" if self.uncertain else "without"
        return f"<Density of {self.n_atoms} atoms on {self.shape}, {spread} uncertainty, {where}>"
