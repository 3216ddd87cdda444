"""Output files of SPARC. Those of structures and densities are in `gpurho.formats_sparc`.

SPARC works in Bohr, Hartree and atomic units of time; what these functions return is in angstrom, eV and fs.
Layouts as its version of December 2025 writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import floats, number, reading
from gpurho.errors import FormatError
from gpurho.formats_sparc import parse_inpt, read_structure
from gpurho.structure import Structure
from gpurho.units import BOHR, HARTREE

ATOMIC_TIME = 0.02418884326585747
"""One atomic unit of time, hbar / Hartree, in fs (CODATA 2018)."""


# -- .out -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cycle:
    """One self-consistency cycle of an ``.out`` file: that of a static run, or of one step of dynamics; eV."""

    iterations: int
    converged: bool
    residual: float
    free_energy: float
    band: float
    xc: float
    entropy_term: float
    fermi_level: float


@dataclass(frozen=True, eq=False)
class Output:
    """An ``.out`` file.

    Attributes
    ----------
    version : str
        As SPARC names it, a date.
    cell : (3, 3) array, angstrom
    shape : 3 ints
        Grid of the density.
    electrons : float
    n_atoms : int
    valence : dict
        Valence electrons of each symbol.
    cycles : tuple of Cycle
    seconds : float
        Wall time.
    values : dict
        The keywords in force, defaults included, as words.
    """

    version: str
    cell: NDArray[np.float64]
    shape: tuple[int, int, int]
    electrons: float
    n_atoms: int
    valence: dict[str, float]
    cycles: tuple[Cycle, ...]
    seconds: float
    values: dict[str, tuple[str, ...]]


_CYCLE_VALUES = {
    "free_energy": "Total free energy",
    "band": "Band structure energy",
    "xc": "Exchange correlation energy",
    "entropy_term": "-Entropy*kb*T",
    "fermi_level": "Fermi level",
}


def read_out(path: str | Path) -> Output:
    """The ``.out`` file of a run that went to its end.

    Raises
    ------
    FormatError
        For another file, or that of a run that was stopped or is still going.
    """
    target = Path(path)
    with reading(target, "out"):
        text = target.read_text(encoding="utf-8", errors="replace")
        version = re.search(r"SPARC \(version ([^)]*)\)", text)
        if version is None:
            raise FormatError(f"{target} is no output of SPARC; check the name")
        walltime = re.search(r"Total walltime\s*:\s*(\S+)\s*sec", text)
        if walltime is None:
            raise FormatError(f"{target} has no end; the run was stopped or is still going")
        head, *cycles = text.split("Self Consistent Field (SCF#")
        inputs = parse_inpt(re.split(r"\*{20,}\n", head.split("Input parameters")[1])[1].splitlines())
        rows = head.split("Lattice vectors (Bohr):\n")[1].splitlines()[:3]
        valence = re.findall(r"Atom type \d+\s*\(valence electrons\)\s*:\s*([A-Za-z]+)\d*\s+(\S+)", head)
        shape = [int(n) for n in inputs.values["FD_GRID"][:3]]
        return Output(
            version=version.group(1),
            cell=np.array([floats(row.split()[:3]) for row in rows]) * BOHR,
            shape=(shape[0], shape[1], shape[2]),
            electrons=number(_after(head, "Total number of electrons")),
            n_atoms=int(_after(head, "Total number of atoms")),
            valence={symbol: number(word) for symbol, word in valence},
            cycles=tuple(_cycle(part) for part in cycles),
            seconds=number(walltime.group(1)),
            values=inputs.values,
        )


def _after(text: str, label: str) -> str:
    """The word after a label and its colon."""
    found = re.search(rf"^{re.escape(label)}\s*:\s*(\S+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"it has no line {label!r}")
    return found.group(1)


def _cycle(text: str) -> Cycle:
    steps = re.findall(r"^\d+\s+(-?\d\.\d+E[+-]\d+)\s+(\S+)\s+\S+\s*$", text, re.MULTILINE)
    values = {name: number(_after(text, label)) * HARTREE for name, label in _CYCLE_VALUES.items()}
    return Cycle(
        iterations=int(_after(text, "Total number of SCF")),
        converged="did not converge" not in text,
        residual=number(steps[-1][1]),
        **values,
    )


# -- .static and .eigen -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Static:
    """A ``.static`` file: atoms in the order of the ``.ion``, free energy (eV), forces (n, 3) (eV/angstrom) or None."""

    symbols: tuple[str, ...]
    fractions: NDArray[np.float64]
    free_energy: float
    forces: NDArray[np.float64] | None


def _whole_lines(path: Path, text: str) -> list[str]:
    """The lines of a text; a last line without its end is cut off, and so may be its last number."""
    if text and not text.endswith("\n"):
        raise FormatError(f"{path} ends within a line; the file is not whole")
    return text.splitlines()


def read_static(path: str | Path) -> Static:
    """The result of a calculation of fixed atoms.

    Raises
    ------
    FormatError
        For a file of another kind, or one that ends too early.
    """
    target = Path(path)
    symbols: list[str] = []
    fractions: list[NDArray[np.float64]] = []
    energy: float | None = None
    forces: NDArray[np.float64] | None = None
    with reading(target, "static"), open(target, encoding="utf-8", errors="replace") as file:
        lines = iter(_whole_lines(target, file.read()))
        symbol = ""
        for line in lines:
            if found := re.match(r"Fractional coordinates of ([A-Za-z]+)\d*:", line):
                symbol = found.group(1)
            elif line.startswith("Total free energy (Ha):"):
                energy, symbol = number(line.split(":")[1].strip()) * HARTREE, ""
            elif line.startswith("Atomic forces (Ha/Bohr):"):
                rows = [floats(next(lines).split()) for _ in fractions]
                forces = np.array(rows).reshape(len(fractions), 3) * (HARTREE / BOHR)
            elif symbol and len(words := line.split()) == 3:
                symbols.append(symbol)
                fractions.append(floats(words))
        if energy is None:
            raise FormatError(f"{target} has no total free energy; give the .static file of a finished run")
        return Static(tuple(symbols), np.array(fractions).reshape(-1, 3), energy, forces)


@dataclass(frozen=True, eq=False)
class Eigen:
    """An ``.eigen`` file.

    Attributes
    ----------
    kpoints : (n_kpoints, 3) array, reciprocal vectors
    weights : (n_kpoints,) array
        Sum to 1.
    eigenvalues : (n_kpoints, n_bands) array, eV
    occupations : (n_kpoints, n_bands) array
        From 0 to 2.
    """

    kpoints: NDArray[np.float64]
    weights: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    occupations: NDArray[np.float64]

    @property
    def electrons(self) -> float:
        """Sum of the occupations."""
        return float(self.weights @ self.occupations.sum(axis=1))


def read_eigen(path: str | Path) -> Eigen:
    """Eigenvalues and occupations of a calculation without spin.

    Raises
    ------
    FormatError
        For a file of another kind or of spin polarisation, or where its k-points have different numbers of bands or,
        being several, no weights (as old versions of SPARC wrote them).
    """
    target = Path(path)
    with reading(target, "eigen"):
        text = target.read_text(encoding="utf-8", errors="replace")
        blocks = re.split(r"^kred #\d+ = ", "\n".join(_whole_lines(target, text)), flags=re.MULTILINE)[1:]
        if not blocks:
            raise FormatError(f"{target} has no k-points; give the .eigen file of a finished run")
        if "Spin-up" in text:
            raise FormatError(f"{target} is of a spin-polarised calculation; give one without spin")
        points, weights, bands = [], [], []
        for block in blocks:
            head, _, table = block.partition("occ\n")
            found = re.match(r"\((\S+),(\S+),(\S+)\)", head)
            weight = re.search(r"weight = (\S+)", head)
            if found is None or (weight is None and len(blocks) > 1):
                raise FormatError(f"{target} has k-points without their weights; give the file of a newer SPARC")
            points.append(floats(list(found.groups())))
            weights.append(number(weight.group(1)) if weight else 1.0)
            bands.append(np.array([floats(line.split()) for line in table.splitlines() if line.strip()]))
        if any(b.ndim != 2 or b.shape[1] != 3 or b.shape != bands[0].shape for b in bands):
            raise FormatError(f"{target} has different numbers of bands at its k-points; the file is not whole")
        stacked = np.array(bands)
        total = np.array(weights)
        return Eigen(np.array(points), total / total.sum(), stacked[:, :, 1] * HARTREE, stacked[:, :, 2])


# -- .aimd ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """One step of dynamics.

    Attributes
    ----------
    number : int
        From 1, as SPARC counts.
    structure : Structure
    velocities : (n, 3) array, angstrom/fs, or None
    forces : (n, 3) array, eV/angstrom, or None
    temperature : float, K
        Of the atoms.
    electron_temperature : float, K
    free_energy : float, eV
        F = U - TS of the electrons: what the forces are the derivatives of.
    internal_energy : float, eV
        U.
    kinetic_energy : float, eV
        Of the atoms.
    conserved : float, eV
        Energy of the extended system, which the equations of motion conserve.
    """

    number: int
    structure: Structure
    velocities: NDArray[np.float64] | None
    forces: NDArray[np.float64] | None
    temperature: float
    electron_temperature: float
    free_energy: float
    internal_energy: float
    kinetic_energy: float
    conserved: float


def read_aimd(path: str | Path, structure: Structure | None = None, partial: bool = False) -> list[Step]:
    """All steps of a dynamics run.

    Parameters
    ----------
    path : path
        The ``.aimd`` file.
    structure : Structure, optional
        Cell and elements, atoms in the order of the ``.ion`` file; by default from the ``.ion`` and ``.inpt`` of the
        same name beside it.
    partial : bool
        Leave out a last step that is not whole, as of a run that was stopped, instead of raising.

    Raises
    ------
    FormatError
        For another file, one that ends within a step, or one of a cell that moves (NPT).
    """
    target = Path(path)
    with reading(target, "aimd"):
        text = target.read_text(encoding="utf-8", errors="replace")
        blocks = text.split(":MDSTEP:")[1:]
        keys = [re.findall(r"^:([A-Z0-9_]+):", block, re.MULTILINE) for block in blocks]
        if not blocks:
            raise FormatError(f"{target} has no steps; give the .aimd file of a dynamics run")
        atoms = read_structure(target) if structure is None else structure
        steps: list[Step] = []
        for i, block in enumerate(blocks):
            try:
                if keys[i] != keys[0] or not block.endswith("\n"):
                    raise ValueError("it ends too early")
                steps.append(_step(block, atoms))
            except (ValueError, IndexError, KeyError) as error:
                if isinstance(error, FormatError):
                    raise FormatError(f"{target}: {error}") from None
                if partial and i == len(blocks) - 1:
                    break
                raise FormatError(
                    f"{target} is not whole in step {i + 1} of {len(blocks)}: {error}; check the file"
                ) from None
        return steps


def _sections(block: str) -> Iterator[tuple[str, str, list[str]]]:
    """Key, rest of its line, and the lines that follow, of each section of a step."""
    parts = re.split(r"^:([A-Z][A-Z0-9_]*):", block, flags=re.MULTILINE)
    for key, body in zip(parts[1::2], parts[2::2], strict=True):
        first, *rest = body.split("\n")
        yield key, first.strip(), rest


def _step(block: str, atoms: Structure) -> Step:
    n = len(atoms)
    scalars: dict[str, float] = {}
    arrays: dict[str, NDArray[np.float64]] = {}
    for key, first, rest in _sections(block):
        if key in ("CELL", "LATVEC", "LATVEC_SCALE"):
            raise FormatError("its cell moves; dynamics of a fixed cell (NVT_NH, NVE) is read")
        if key in ("R", "V", "F"):
            rows = np.array([floats(line.split()) for line in rest if line.strip()])
            if rows.shape != (n, 3):
                raise ValueError(f"{key} has {len(rows)} rows for {n} atoms")
            arrays[key] = rows
        elif first:
            scalars[key] = number(first.split()[0])
    # Without a thermostat there is no extended system.
    scalars.setdefault("TENX", scalars["TEN"])
    energy = {key: scalars[key] * HARTREE * n for key in ("FEN", "UEN", "KEN", "TENX")}
    velocities, forces = arrays.get("V"), arrays.get("F")
    return Step(
        number=int(block.split()[0]),
        structure=Structure(arrays["R"] * BOHR, atoms.numbers, atoms.cell, atoms.pbc),
        velocities=None if velocities is None else velocities * (BOHR / ATOMIC_TIME),
        forces=None if forces is None else forces * (HARTREE / BOHR),
        temperature=scalars["TIO"],
        electron_temperature=scalars["TEL"],
        free_energy=energy["FEN"],
        internal_energy=energy["UEN"],
        kinetic_energy=energy["KEN"],
        conserved=energy["TENX"],
    )
