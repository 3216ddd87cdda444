"""Files of Quantum ESPRESSO's ``pw.x``: its input, its XML results, and its binary charge density."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.base import KMesh
from gpurho.errors import FormatError, reason_of
from gpurho.structure import Structure
from gpurho.units import BOHR, HARTREE

MAX_GRID = 4096
LARGEST = 1e30
"""Largest coefficient of a plane wave that is taken, e/Bohr^3: their sum must not overflow."""

SPARSEST = 1000
"""Most points of the smallest grid for each plane wave: a ball in a box has 2, and half of it 4; thin cells more."""
"""Largest Miller index that a charge density is believed to have."""

Value = str | int | float | bool


def input_text(
    structure: Structure, kmesh: KMesh, pseudos: Mapping[str, str], sections: Mapping[str, Mapping[str, Value]]
) -> str:
    """The input of ``pw.x``: namelists as given, then species, cell (angstrom), atoms, and the k-points one by one."""
    from ase.data import atomic_masses, atomic_numbers, chemical_symbols

    lines = []
    for name, values in sections.items():
        lines += [f"&{name}", *(f"  {key} = {_fortran(value)}" for key, value in values.items()), "/"]
    lines.append("ATOMIC_SPECIES")
    lines += [f"{s} {atomic_masses[atomic_numbers[s]]:.4f} {pseudos[s]}" for s in structure.symbols]
    lines.append("CELL_PARAMETERS angstrom")
    lines += [" ".join(f"{x:.14f}" for x in row) for row in structure.cell]
    lines.append("ATOMIC_POSITIONS angstrom")
    for number, position in zip(structure.numbers, structure.positions, strict=True):
        lines.append(f"{chemical_symbols[number]} " + " ".join(f"{x:.14f}" for x in position))
    if kmesh.is_gamma:
        lines.append("K_POINTS gamma")
    else:
        points, weights = kmesh.points()
        lines += ["K_POINTS crystal", str(len(points))]
        lines += [f"{p[0]:.14f} {p[1]:.14f} {p[2]:.14f} {w:.14f}" for p, w in zip(points, weights, strict=True)]
    return "\n".join(lines) + "\n"


def _fortran(value: Value) -> str:
    if isinstance(value, bool):
        return ".true." if value else ".false."
    if isinstance(value, str):
        return f"'{value}'"
    return f"{value:.12e}".replace("e", "d") if isinstance(value, float) else str(value)


# -- results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PwResult:
    """What the XML file of a run says; eV and angstrom.

    Attributes
    ----------
    converged : bool
    iterations : int
    terms : dict
        Parts of the energy, eV: etot, eband, ehart, vtxc, etxc, ewald, demet.
    fermi_level : float, eV
    eigenvalues : (n_kpoints, n_bands) array, eV
    occupations : (n_kpoints, n_bands) array
        0 to 1.
    forces : (n_atoms, 3) array, eV/angstrom, or None
    version : str
    """

    converged: bool
    iterations: int
    terms: dict[str, float]
    fermi_level: float
    eigenvalues: NDArray[np.float64]
    occupations: NDArray[np.float64]
    forces: NDArray[np.float64] | None
    version: str


def read_result(path: Path) -> PwResult:
    """Read ``data-file-schema.xml``; raises `FormatError` where it is missing, cut short or of another kind."""
    try:
        root = ET.parse(path).getroot()
        output = _find(root, "output")
        band = _find(output, "band_structure")
        energies = [_numbers(_find(k, "eigenvalues")) for k in band.findall("ks_energies")]
        occupations = [_numbers(_find(k, "occupations")) for k in band.findall("ks_energies")]
        convergence = output.find("convergence_info/scf_conv")
        forces = output.find("forces")
        creator = root.find("general_info/creator")
        result = PwResult(
            converged=convergence is not None and convergence.findtext("convergence_achieved", "").strip() == "true",
            iterations=int(convergence.findtext("n_scf_steps", "0")) if convergence is not None else 0,
            terms={e.tag: float(e.text or "nan") * HARTREE for e in _find(output, "total_energy")},
            fermi_level=float(band.findtext("fermi_energy", "nan")) * HARTREE,
            eigenvalues=np.array(energies) * HARTREE,
            occupations=np.array(occupations),
            forces=None if forces is None else _numbers(forces).reshape(-1, 3) * (HARTREE / BOHR),
            version="unknown" if creator is None else creator.get("VERSION", "unknown"),
        )
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise FormatError(
            f"{path} is no whole result of pw.x: {reason_of(error)}; look at the output of the run"
        ) from None
    return result


def _find(element: ET.Element, name: str) -> ET.Element:
    found = element.find(name)
    if found is None:
        raise ValueError(f"no <{name}> in <{element.tag}>")
    return found


def _numbers(element: ET.Element) -> NDArray[np.float64]:
    values = np.array((element.text or "").split(), dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"<{element.tag}> has values that are not finite")
    return values


# -- charge density -----------------------------------------------------------------------------------------------


def read_charge(path: Path, shape: Sequence[int] | None = None) -> NDArray[np.float64]:
    """The density of ``charge-density.dat`` on a grid, e/angstrom^3.

    Parameters
    ----------
    path : Path
    shape : 3 ints, optional
        Points of the grid; by default the smallest that holds every plane wave. A coarser grid leaves plane waves out.

    Raises
    ------
    FormatError
        Where the file is cut short, of another kind, or spin-polarised.
    """
    gamma, millers, values = _read_records(path)
    needed = 2 * np.abs(millers).max(axis=0) + 1
    if shape is None and math.prod(needed.tolist()) > SPARSEST * len(millers):
        raise FormatError(
            f"{path} has {len(millers)} plane waves and Miller indices up to {needed.tolist()}; the file is damaged"
        )
    grid = tuple(int(n) for n in (needed if shape is None else shape))
    kept = (2 * np.abs(millers) < np.array(grid)).all(axis=1)
    millers, values = millers[kept], values[kept]
    waves = np.zeros(grid, dtype=np.complex128)
    waves[tuple((millers % grid).T)] = values
    if gamma:
        # Half of the plane waves stand for all: those of -G are the complex conjugates.
        waves[tuple((-millers % grid).T)] = values.conj()
    return np.fft.ifftn(waves).real * (math.prod(grid) / BOHR**3)


def replace_charge(path: Path, density: NDArray[np.float64]) -> None:
    """Put another density (e/angstrom^3) into an existing ``charge-density.dat``, whose plane waves it keeps."""
    _, millers, values = _read_records(path)
    shape = density.shape
    waves = np.fft.fftn(density) * (BOHR**3 / density.size)
    inside = (2 * np.abs(millers) < np.array(shape)).all(axis=1)
    values = np.where(inside, waves[tuple((millers % shape).T)], 0.0)
    raw = path.read_bytes()
    body = np.ascontiguousarray(values, dtype="<c16").tobytes()
    if raw[-4 - len(body) - 4 : -4 - len(body)] != raw[-4:]:
        raise FormatError(f"{path} ends with another record than its plane waves; use Quantum ESPRESSO 6.4 or newer")
    path.write_bytes(raw[: -4 - len(body)] + body + raw[-4:])


def _read_records(path: Path) -> tuple[bool, NDArray[np.int64], NDArray[np.complex128]]:
    """Whether half of the plane waves stand for all, Miller indices (n, 3), and coefficients (n,), e/Bohr^3."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    records: list[bytes] = []
    at = 0
    while at < len(raw) and len(records) < 5:
        size = int.from_bytes(raw[at : at + 4], "little")
        end = at + 8 + size
        if end > len(raw) or raw[at : at + 4] != raw[end - 4 : end]:
            raise FormatError(f"{path} is cut short or no charge density of pw.x (record {len(records)})")
        records.append(raw[at + 4 : end - 4])
        at = end
    if len(records) < 4 or len(records[0]) != 12:
        raise FormatError(f"{path} is no charge density of pw.x: {len(records)} records, where four or more are due")
    gamma, count, spins = np.frombuffer(records[0], dtype="<i4")
    if spins != 1:
        raise FormatError(f"{path} has {spins} spin components; give an unpolarised density")
    if count <= 0 or len(records[2]) != 12 * count or len(records[3]) != 16 * count:
        raise FormatError(f"{path} names {count} plane waves but does not hold as many")
    millers = np.frombuffer(records[2], dtype="<i4").reshape(-1, 3).astype(np.int64)
    if np.abs(millers).max() > MAX_GRID:
        raise FormatError(f"{path} has Miller index {np.abs(millers).max()}; at most {MAX_GRID} is believed")
    parts = np.frombuffer(records[3], dtype="<f8")  # real, imaginary, real, ...
    if not (np.abs(parts) < LARGEST).all():
        raise FormatError(f"{path} has plane waves that are not finite; the file is damaged")
    return bool(gamma), millers, parts.view("<c16")
