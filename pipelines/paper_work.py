"""The computations behind the paper's tables and figures: fields of snapshots and of large systems, energies."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.datasets import Snapshot
from gpurho.density import Density
from gpurho.dft.base import DFTSettings, Engine, KMesh
from gpurho.errors import DatasetError
from gpurho.fieldstats import FieldCounts
from gpurho.metrics import compare_fields
from gpurho.pipelines.paper_store import Made
from gpurho.pipelines.predict import predict
from gpurho.plotting import atoms_near
from gpurho.sections import Section
from gpurho.structure import Structure
from gpurho.units import HARTREE

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

OCCUPIED = 1e-3
"""Least occupation of the states whose eigenvalues are compared."""

PLANE_ATOMS = 0.5
"""Atoms this close to a plane are marked, angstrom."""


@dataclass(frozen=True)
class Work:
    """What all computations of a comparison share.

    Parameters
    ----------
    uncertainty : "analytic", "last-layer" or "sampled"
    device, precision : str
        As for `gpurho.predict`.
    spacing : float, angstrom
        Largest step of the grid where there is no label that says one.
    """

    uncertainty: str = "analytic"
    device: str = "cpu"
    precision: str = "auto"
    spacing: float = 0.3
    _last: dict[str, Density] = field(default_factory=dict, compare=False, repr=False)

    def key(self) -> list[Any]:
        """What decides the numbers of a prediction besides model, atoms and grid."""
        return [self.uncertainty, self.device.split(":")[0], self.precision]

    def predicted(self, model: DensityModel, structure: Structure | Atoms, **grid: Any) -> Density:
        """The density of a structure with its sigmas."""
        return predict(
            structure,
            model,
            uncertainty=self.uncertainty,
            device=self.device,
            precision=self.precision,
            progress=False,
            **(grid or {"spacing": self.spacing}),
        )

    # -- snapshots with labels ------------------------------------------------------------------------------------

    def on_label(self, model: DensityModel, snapshot: Snapshot) -> Density:
        """The prediction for a snapshot on the grid of its label; the last one is kept for who asks next."""
        key = model.fingerprint() + snapshot.structure.fingerprint() + str(snapshot.density.shape)
        if key not in self._last:
            self._last.clear()
            self._last[key] = self.predicted(model, snapshot.structure, grid=snapshot.density.shape)
        return self._last[key]

    def measure(self, model: DensityModel, snapshot: Snapshot) -> Made:
        """Metrics of a snapshot over its whole grid, and counts that add up over snapshots."""
        rho = self.on_label(model, snapshot)
        mean, aleatoric, epistemic = (np.asarray(f) for f in (rho.mean, rho.aleatoric, rho.epistemic))
        metrics = compare_fields(snapshot.density, mean, snapshot.electrons, rho.grid.dv, aleatoric, epistemic)
        sigma = np.hypot(aleatoric, epistemic)
        values = {
            "n_atoms": len(snapshot.structure),
            "temperature": snapshot.meta.get("temperature_K"),
            "metrics": metrics.to_dict(),
            "mean_sigma": float(sigma.mean(dtype=np.float64)),
            "counts": FieldCounts.of_fields(mean, sigma, snapshot.density).to_dict(),
        }
        return values, {}

    def label_maps(self, model: DensityModel, snapshot: Snapshot, where: str) -> Made:
        """A plane of a snapshot with its reference: `where` is "worst" (largest mean squared error) or "void"."""
        rho = self.on_label(model, snapshot)
        error2 = (np.asarray(rho.mean, np.float64) - snapshot.density) ** 2
        if where == "void":
            place = np.rint(widest_void(snapshot.structure) * rho.shape).astype(int) % rho.shape
            axis, index, row = 2, int(place[2]), int(place[1])
        else:
            profiles = [error2.mean(axis=tuple(d for d in range(3) if d != a)) for a in range(3)]
            axis = int(np.argmax([p.max() for p in profiles]))
            index = int(profiles[axis].argmax())
            flat = np.take(error2, index, axis)
            row = int(flat.mean(axis=0).argmax())
        values, arrays = _plane(rho, axis, index, row)
        arrays["reference"] = np.take(np.asarray(snapshot.density, np.float32), index, axis)
        values["temperature"] = snapshot.meta.get("temperature_K")
        return values, arrays

    # -- systems without labels -----------------------------------------------------------------------------------

    def system(self, model: DensityModel, atoms: Atoms, axis: int = 2, where: str = "middle") -> Made:
        """A plane of a structure, the errors of its atoms, and how large its sigmas are on the average."""
        structure = Structure.from_ase(atoms)
        rho = self.predicted(model, structure)
        second = max(d for d in range(3) if d != axis)
        place = [n // 2 for n in rho.shape]
        if where == "void":
            place = [int(i) for i in np.rint(widest_void(structure) * rho.shape).astype(int) % rho.shape]
        values, arrays = _plane(rho, axis, place[axis], place[second])
        charges = rho.per_atom()
        sums = rho.totals
        values |= {
            "mean_sigma": sums.sum_std / sums.n_points,
            "rms_aleatoric": float(np.sqrt(sums.sum_aleatoric2 / sums.n_points)),
            "rms_epistemic": float(np.sqrt(sums.sum_epistemic2 / sums.n_points)),
            "n_points": sums.n_points,
            "axis": axis,
        }
        keep = [d for d in range(3) if d != axis]
        arrays["atoms_xy"] = structure.positions[:, keep].astype(np.float32)
        if charges.electrons_std is not None:
            arrays["atom_sigma"] = charges.electrons_std.astype(np.float32)
        arrays["predicted_counts"] = FieldCounts.of_fields(np.asarray(rho.mean), np.asarray(rho.std)).predicted
        return values, arrays


# -- energies ---------------------------------------------------------------------------------------------------------


def label_settings(snapshot: Snapshot) -> DFTSettings:
    """The settings that a label was made with.

    Raises
    ------
    DatasetError
        Where the label does not name them.
    """
    text = snapshot.meta.get("settings")
    if not isinstance(text, str):
        raise DatasetError("the label does not name its DFT settings; label it with gpurho label")
    values = json.loads(text)
    mesh = values.pop("kmesh", None)
    if mesh is not None:
        mesh = KMesh(tuple(mesh["size"]), tuple(mesh["shift"]))
    for name in ("k_shift", "grid"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return DFTSettings(**{**values, "kmesh": mesh, "forces": False})


def energy_errors(engine: Engine, snapshot: Snapshot, density: NDArray[np.floating]) -> dict[str, Any]:
    """Errors of a density's energies by one diagonalisation (Harris-Foulkes) against those of the label.

    Returns
    -------
    dict
        energy, xc (Ha/atom), fermi_level, eigenvalue (Ha): density less label, the last the largest difference of
        an eigenvalue with an occupation of `OCCUPIED` or more, None where the two are not on the same k-points;
        free_energy (eV per atom) of the density; volume (angstrom^3 per atom).
    """
    meta, n = snapshot.meta, len(snapshot.structure)
    missing = [name for name in ("free_energy_ev", "xc_energy_ev", "fermi_level_ev") if name not in meta]
    if missing:
        raise DatasetError(f"the label has no {', '.join(missing)}; label it with gpurho label")
    settings = label_settings(snapshot)
    found = engine.one_shot(snapshot.structure, np.asarray(density, np.float64), settings)
    return {
        "energy": (found.free_energy - meta["free_energy_ev"]) / HARTREE / n,
        "xc": (found.xc - meta["xc_energy_ev"]) / HARTREE / n,
        "fermi_level": (found.fermi_level - meta["fermi_level_ev"]) / HARTREE,
        "eigenvalue": _eigenvalue_error(snapshot, found.eigenvalues, found.kpoints, settings),
        "free_energy": found.free_energy / n,
        "label_free_energy": meta["free_energy_ev"] / n,
        "volume": snapshot.structure.volume / n,
        "n_atoms": n,
        "temperature": meta.get("temperature_K"),
    }


def _eigenvalue_error(
    snapshot: Snapshot, ours: NDArray[np.float64], kpoints: NDArray[np.float64], settings: DFTSettings
) -> float | None:
    theirs, points = snapshot.arrays.get("eigenvalues"), snapshot.arrays.get("kpoints")
    if theirs is None or points is None or points.shape != np.shape(kpoints):
        return None
    if not np.allclose(points, kpoints, atol=1e-6):
        return None
    bands = min(theirs.shape[1], ours.shape[1])
    width = settings.smearing_hartree * HARTREE
    highest = float(snapshot.meta["fermi_level_ev"]) + width * np.log(1 / OCCUPIED - 1)
    occupied = theirs[:, :bands] <= highest
    return float(np.abs(ours[:, :bands] - theirs[:, :bands])[occupied].max()) / HARTREE


# -- planes -----------------------------------------------------------------------------------------------------------


def _plane(rho: Density, axis: int, index: int, row: int) -> Made:
    """A plane of grid points: `index` along cell vector `axis`; a line in it at `row` of its second vector."""
    section = rho.slice(axis, index / rho.shape[axis])
    values = {"n_atoms": len(rho.structure), "axis": axis, "index": index, "row": row, "shape": list(rho.shape)}
    arrays = {
        "origin": section.origin,
        "u": section.u,
        "v": section.v,
        "mean": section.mean,
        "aleatoric": np.asarray(section.aleatoric),
        "epistemic": np.asarray(section.epistemic),
        "atoms": atoms_near(rho.structure, section, PLANE_ATOMS),
    }
    return values, arrays


def section_of(arrays: dict[str, NDArray[Any]]) -> Section:
    """The plane that `_plane` stored."""
    return Section(*(arrays[name] for name in ("origin", "u", "v", "mean", "aleatoric", "epistemic")))


def widest_void(structure: Structure, divisions: int = 32) -> NDArray[np.float64]:
    """Fractional coordinates of the point farthest from all atoms of a periodic cell, on a mesh of so many points.

    In a crystal with a vacancy this is the vacancy, however hot the crystal.
    """
    from scipy.spatial import cKDTree

    inverse = np.linalg.inv(structure.cell)
    home = (structure.positions @ inverse) % 1.0
    shifts = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    images = (home[None] + shifts[:, None]).reshape(-1, 3)
    images = images[np.all((images > -0.5) & (images < 1.5), axis=1)]
    axis = np.arange(divisions) / divisions
    mesh = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    distance, _ = cKDTree(images @ structure.cell).query(mesh @ structure.cell)
    best: NDArray[np.float64] = mesh[int(np.argmax(distance))]
    return best
