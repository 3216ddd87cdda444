"""How far to trust a model for a structure, before any prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpurho.pipelines.settings import Job, find_model
from gpurho.sources import StructureSource
from gpurho.structure import Structure, as_structure, cell_heights
from gpurho.trust import Trust, trust_of

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

REGION_MARGIN = 3.0
"""Atoms this far outside of a region, angstrom, still make its density."""


def trust(
    atoms: Atoms | Structure | StructureSource,
    model: str | Path | DensityModel = "auto",
    *,
    device: str = "cpu",
    progress: bool = False,
) -> Trust:
    """Compare a structure with the training data of a model, without a prediction.

    Parameters
    ----------
    atoms : ase.Atoms, Structure or StructureSource
    model : str, path or DensityModel
        As in `gpurho.predict`.
    device : str
        "cpu" or "cuda[:n]", where descriptors are computed.
    progress : bool
        A progress bar, if standard error is a terminal.

    Returns
    -------
    Trust
        ``trust.per_atom`` says how far each atom is from the training atoms, 1 where these end; ``trust.outside`` which
        atoms are beyond; ``trust.sentence`` all of it in a line.

    Raises
    ------
    UnknownSpeciesError, StructureError, ModelError, DeviceError

    Notes
    -----
    Descriptors at one point for each atom: some thousandth of the cost of a prediction.
    """
    structure = atoms if isinstance(atoms, StructureSource) else as_structure(atoms)
    found, _ = find_model(structure, model)
    return _shown(structure, found, device, None, progress)


def _shown(
    structure: Structure | StructureSource,
    model: DensityModel,
    device: str,
    wanted: NDArray[np.bool_] | None,
    progress: bool,
) -> Trust:
    """The trust of a structure, with a progress bar."""
    from tqdm import tqdm

    n = len(structure) if wanted is None else int(wanted.sum())
    with tqdm(
        total=n, desc="trust", unit=" atoms", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:
        return trust_of(structure, model, device, wanted, lambda done: (bar.update(done), None)[1])


def job_trust(job: Job, progress: bool = False) -> Trust | None:
    """The trust of what a job predicts: of all atoms, or those in and around its region; None where not known."""
    if job.model.spec.trust is None:
        return None
    wanted = None if job.region is None else _near_region(job)
    # With several workers this process may see no GPU, and must not take one from them.
    return _shown(job.structure, job.model, "cpu" if job.distributed else job.device, wanted, progress)


def _near_region(job: Job) -> NDArray[np.bool_]:
    """Atoms in the region or a little outside of it, periodic images counted."""
    grid, pieces = job.grid, []
    inverse, heights = np.linalg.inv(grid.cell), cell_heights(grid.cell)
    for positions, _ in job.structure.pieces():
        fractional = (positions - grid.origin) @ inverse
        inside = np.ones(len(positions), dtype=bool)
        for axis, (low, high) in enumerate(job.region or ()):
            n, margin = grid.shape[axis], REGION_MARGIN / heights[axis]
            start, length = low / n - margin, (high - low) / n + 2.0 * margin
            offset = fractional[:, axis] - start
            inside &= (np.mod(offset, 1.0) if grid.pbc[axis] else offset) <= length
            if not grid.pbc[axis]:
                inside &= offset >= 0.0
        pieces.append(inside)
    return np.concatenate(pieces)


__all__ = ["Trust", "trust"]
