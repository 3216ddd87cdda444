"""Energies of a density and equations of state: ``gpurho energy al.xyz rho.h5``, ``gpurho eos Al --a 3.9 4.2``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.dft.base import DFTSettings, Engine
from gpurho.dft.engines import ENGINES, make_engine
from gpurho.energyjournal import EnergyJournal
from gpurho.eos import FORMS, EquationOfState, fit_eos
from gpurho.errors import DatasetError, GpurhoError, SettingsError, StructureError
from gpurho.labelstore import engine_identity, label_key
from gpurho.structure import Structure, as_structure
from gpurho.units import HARTREE

if TYPE_CHECKING:
    from ase import Atoms

CELL_ATOMS = {"fcc": 4, "bcc": 2, "diamond": 8, "sc": 1}
"""Atoms of the cubic cell whose edge is the lattice parameter."""

SPAN = (0.96, 1.04)
"""Lattice parameters of a scan, in tabulated ones or those of the structure."""


@dataclass(frozen=True)
class EosRow:
    """A fitted equation of state and where its energies come from.

    Attributes
    ----------
    source : str
    fit : EquationOfState
    cell_atoms : int or None
        Atoms of the cubic cell; None where the structure has no such cell.
    """

    source: str
    fit: EquationOfState
    cell_atoms: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        a = None if self.cell_atoms is None else self.fit.lattice_parameter(self.cell_atoms)
        return {"source": self.source, "lattice_parameter": a, **self.fit.to_dict()}


def eos_table(rows: Sequence[EosRow]) -> str:
    """The fits as a table; differences are left to the reader."""
    width = max([len(row.source) for row in rows] + [6])
    lines = [f"{'source':{width}}  a angstrom  V angstrom^3/atom   B GPa     E eV/atom  fit RMS meV/atom  points"]
    for row in rows:
        f = row.fit
        a = "-" if row.cell_atoms is None else f"{f.lattice_parameter(row.cell_atoms):.4f}"
        lines.append(
            f"{row.source:{width}}  {a:>10}  {f.volume:17.4f}  {f.bulk_modulus:6.2f}  {f.energy:12.6f}"
            f"  {1000 * f.residual:16.4f}  {len(f.volumes):6d}"
        )
    return "\n".join(lines)


def eos_scan(
    atoms: Atoms | Structure,
    scales: Sequence[float],
    *,
    engine: str | Engine = "qe",
    settings: DFTSettings | None = None,
    model: Any = None,
    self_consistent: bool = True,
    form: str = "birchmurnaghan",
    cell_atoms: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[], Any] | None = None,
) -> list[EosRow]:
    """Equations of state of a structure scaled in all directions: self-consistent, and of a model's densities.

    Parameters
    ----------
    atoms : ase.Atoms or Structure
    scales : sequence of float
        Factors of its lengths.
    engine : str or Engine
    settings : DFTSettings, optional
        Cutoff and k-mesh are those of the smallest cell for all, so that the curve has no steps.
    model : name, path or DensityModel, optional
        Also the Harris-Foulkes free energies of its predictions.
    self_consistent : bool
        False leaves the SCF out.
    form : str
        See `gpurho.eos.fit_eos`.
    cell_atoms : int, optional
        Atoms of the cubic cell whose edge is the lattice parameter.
    out : path, optional
        Where each energy is kept the moment it is known. One that the file has, of the same structure, settings, engine
        and prediction, is not computed again.
    progress : callable, optional
        Called after each calculation.

    Returns
    -------
    list of EosRow
        "SCF" and "model", as asked for. The energies are free energies, which the density's error enters in second
        order.

    Raises
    ------
    SettingsError, StructureError, EngineError
    StoreError
        Where another run writes to `out`, it is a file of another kind, or it cannot be written.
    """
    structure = as_structure(atoms)
    if model is None and not self_consistent:
        raise SettingsError("neither a model nor self-consistency is asked for; give a model or leave --no-scf out")
    if len(set(scales)) < 4 or not all(0.5 < s < 2 for s in scales):
        raise SettingsError(f"scales {list(scales)} cannot be used; give four or more, from 0.5 to 2")
    solver = make_engine(engine) if isinstance(engine, str) else engine
    cells = [scaled(structure, s) for s in sorted(scales)]
    first = (settings or DFTSettings()).at(cells[0])
    fixed = replace(first, grid=None if settings is None else settings.grid, forces=False)
    sources: dict[str, Callable[[Structure], float]] = {}
    if self_consistent:
        sources["SCF"] = lambda cell: solver.ground_state(cell, fixed).energies.free_energy
    if model is not None:
        sources["model"] = lambda cell: _harris(cell, model, solver, fixed)
    found: dict[str, list[float]] = {source: [] for source in sources}
    with EnergyJournal(out) if out is not None else nullcontext() as kept:
        for cell in cells:
            for source, energy in sources.items():
                if kept is None:
                    value = energy(cell)
                else:
                    key = _energy_key(cell, None if source == "SCF" else model, solver, fixed)
                    about = {"source": source, "volume": cell.volume, "atoms": len(cell), "engine": solver.name}
                    value = kept.make(key, partial(energy, cell), **about)
                found[source].append(value)
                if progress is not None:
                    progress()
    n = len(structure)
    volumes = [cell.volume / n for cell in cells]
    return [
        EosRow(source, fit_eos(volumes, np.array(values) / n, form), cell_atoms or cubic_cell(structure))
        for source, values in found.items()
    ]


def _harris(cell: Structure, model: Any, engine: Engine, settings: DFTSettings) -> float:
    """Free energy of a model's density, eV."""
    from gpurho.pipelines.predict import predict

    rho = predict(cell, model, progress=False, **_prediction(cell, settings))
    return engine.one_shot(cell, np.asarray(rho.mean, dtype=np.float64), settings).free_energy


def _prediction(cell: Structure, settings: DFTSettings) -> dict[str, Any]:
    return {"grid": settings.shape(cell), "uncertainty": None}


def _energy_key(cell: Structure, model: Any, engine: Engine, settings: DFTSettings) -> str:
    """A hash of all that decides an energy: the ground state's, or that of a model's density."""
    words = engine_identity(engine, cell)
    if model is not None:
        from gpurho.pipelines.settings import settle

        density = settle(cell, model, **_prediction(cell, settings)).settings()
        words += f", one shot at {json.dumps(density, sort_keys=True)}"
    return label_key(cell, settings, words)


def eos_of_dataset(path: Path, form: str = "birchmurnaghan") -> list[EosRow]:
    """Equations of state of the labels in a data set: one for each family, composition, k-mesh, cutoff and engine.

    Groups of fewer than four volumes, or without a minimum (thermal snapshots, for instance), are left out.

    Raises
    ------
    DatasetError
        Where no group is left, or a label has no energy.
    """
    from gpurho.datasets import open_dataset

    groups: dict[str, list[tuple[float, float, Structure]]] = {}
    for i, snapshot in enumerate(open_dataset(path)):
        meta, s = snapshot.meta, snapshot.structure
        energy = meta.get("free_energy_ev")
        if energy is None and "energy_free_hartree" in meta:
            energy = meta["energy_free_hartree"] * HARTREE
        if energy is None or not np.isfinite(energy):
            raise DatasetError(f"{path}: snapshot {i} has no free energy; label it with gpurho label")
        groups.setdefault(_kind(s, meta), []).append((s.volume / len(s), energy / len(s), s))
    rows, reasons = [], ["no four labels of one kind at different volumes"]
    for name, points in groups.items():
        if len({round(v, 8) for v, _, _ in points}) < 4:
            continue
        try:
            fit = fit_eos([v for v, _, _ in points], [e for _, e, _ in points], form)
        except SettingsError as error:
            reasons.append(f"{name}: {error}")
            continue
        rows.append(EosRow(name, fit, cubic_cell(points[0][2])))
    if not rows:
        raise DatasetError(f"{path}: {reasons[-1]}; label a scan of lattice parameters")
    return rows


def _kind(structure: Structure, meta: dict[str, Any]) -> str:
    """What labels on one curve have in common."""
    mesh = "x".join(map(str, np.ravel(meta.get("kpts", ["?"]))))
    shift = [f"{x:g}" for x in np.ravel(meta.get("k_shift", [])) if x]
    parts = [structure.to_ase().get_chemical_formula(), mesh + (f" shifted by {shift[0]}" if shift else "")]
    if meta.get("family") not in (None, parts[0]):
        parts.insert(0, str(meta["family"]))
    if "cutoff_ev" in meta:
        parts.append(f"{meta['cutoff_ev']:g} eV")
    return ", ".join([*parts, str(meta.get("engine", "?"))])


def eos_of_frames(frames: Sequence[Atoms], form: str = "birchmurnaghan") -> list[EosRow]:
    """The equation of state of structures that carry energies (eV), as ASE reads them."""
    volumes, energies = [], []
    for i, atoms in enumerate(frames):
        try:
            energies.append(atoms.get_potential_energy() / len(atoms))
        except (RuntimeError, NotImplementedError):
            raise StructureError(f"structure {i} carries no energy; give one structure to scan, or energies") from None
        volumes.append(atoms.get_volume() / len(atoms))
    return [EosRow("file", fit_eos(volumes, energies, form), cubic_cell(as_structure(frames[0])))]


def scaled(structure: Structure, factor: float) -> Structure:
    """A structure with all lengths times a factor."""
    return Structure(structure.positions * factor, structure.numbers, structure.cell * factor, structure.pbc)


def cubic_cell(structure: Structure) -> int | None:
    """Atoms of the cubic cell of the elements' own lattice; None where they have none or differ."""
    from ase.data import reference_states

    kinds = {(reference_states[z] or {}).get("symmetry") for z in np.unique(structure.numbers)}
    return CELL_ATOMS.get(str(kinds.pop())) if len(kinds) == 1 else None


# -- command line ---------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """The commands ``gpurho energy`` and ``gpurho eos``."""
    from gpurho.pipelines.label import add_settings

    energy = commands.add_parser("energy", help="energies of a density by one diagonalisation (Harris-Foulkes)")
    energy.add_argument("structure", type=Path, help="any file that ASE reads")
    energy.add_argument("density", type=Path, help="its density: *.h5, *.cube, CHGCAR, ...")
    energy.add_argument("--engine", default="qe", choices=tuple(ENGINES), help="(%(default)s)")
    energy.add_argument("--scf", action="store_true", help="compare with the self-consistent ground state")
    energy.add_argument("--out", type=Path, metavar="FILE", help="eigenvalues and energies: *.h5 or *.npz")
    energy.add_argument("--json", action="store_true", help="as JSON")
    energy.add_argument("--quiet", action="store_true", help="do not say what is being computed")
    add_settings(energy)
    energy.set_defaults(run=run)

    eos = commands.add_parser("eos", help="lattice parameter and bulk modulus by an equation of state")
    eos.add_argument(
        "target", help="an element; a structure file to scale, or one with energies; an HDF5 data set of labels"
    )
    eos.add_argument("--a", type=float, nargs=2, metavar=("LOW", "HIGH"), help="lattice parameters, angstrom")
    eos.add_argument("--scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="factors of lengths instead")
    eos.add_argument("--n", type=int, default=7, metavar="N", help="points of the scan (%(default)s)")
    eos.add_argument("--repeat", type=int, nargs=3, default=(1, 1, 1), metavar="N", help="cells of an element")
    eos.add_argument("--engine", default="qe", choices=tuple(ENGINES), help="(%(default)s)")
    eos.add_argument("--model", help="also from the densities of this model: name or file")
    eos.add_argument("--no-scf", action="store_true", help="the model alone")
    eos.add_argument("--form", default=FORMS[0], choices=FORMS, help="(%(default)s)")
    eos.add_argument("--out", type=Path, metavar="FILE", help="energies of a scan, kept one by one; resumable")
    eos.add_argument("--json", action="store_true", help="as JSON")
    eos.add_argument("--quiet", action="store_true", help="no progress bar")
    add_settings(eos)
    eos.set_defaults(run=run_eos, kept="finished energies are safe: run the same command again to go on")


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho energy``."""
    from gpurho.energy import check_target, energies
    from gpurho.pipelines.label import settings_of
    from gpurho.pipelines.structures import read_structures

    if options.out is not None:
        check_target(options.out)
    quiet = options.quiet or not sys.stderr.isatty()
    report = energies(
        read_structures(options.structure)[-1],
        options.density,
        options.engine,
        settings_of(options),
        options.scf,
        progress=None if quiet else lambda text: print(f"computing {text}", file=sys.stderr),
    )
    print(json.dumps(report.to_dict()) if options.json else report)
    if options.out is not None:
        print(f"wrote {report.write(options.out)}", file=sys.stderr if options.json else sys.stdout)


def run_eos(options: argparse.Namespace) -> None:
    """Run ``gpurho eos``."""
    path = Path(options.target)
    if path.suffix in (".h5", ".hdf5"):
        _check_no_out(options)
        rows = eos_of_dataset(path, options.form)
    elif path.is_file():
        from gpurho.pipelines.structures import read_structures

        frames = read_structures(path)
        if len(frames) > 1:
            _check_no_out(options)
            rows = eos_of_frames(frames, options.form)
        else:
            rows = _scan(frames[0], None, options)
    else:
        from gpurho.builders import crystal

        try:
            one = crystal(options.target, (1, 1, 1))
        except GpurhoError:
            raise StructureError(
                f"{options.target!r} is neither a file nor an element with a cubic crystal; give one of them"
            ) from None
        atoms = crystal(options.target, options.repeat)
        rows = _scan(atoms, float(one.cell.lengths()[0]), options)
    print(json.dumps([row.to_dict() for row in rows]) if options.json else eos_table(rows))


def _check_no_out(options: argparse.Namespace) -> None:
    if options.out is not None:
        raise SettingsError(f"{options.target} has its energies, so there are none to keep; leave --out out")


def _scan(atoms: Atoms, a: float | None, options: argparse.Namespace) -> list[EosRow]:
    """The scan that the options ask for; `a` is the lattice parameter of the atoms where it is known."""
    from tqdm import tqdm

    from gpurho.pipelines.label import settings_of

    if options.a is not None and options.scale is not None:
        raise SettingsError("--a and --scale exclude each other; give one of them")
    if options.a is not None and a is None:
        raise SettingsError("--a is for an element; give --scale for a structure file")
    if not 4 <= options.n <= 1000:
        raise SettingsError(f"--n {options.n} cannot be used; give 4 to 1000 points")
    low, high = options.scale or SPAN
    if options.a is not None and a is not None:
        low, high = options.a[0] / a, options.a[1] / a
    if not 0 < low < high:
        raise SettingsError(f"range {low:g} to {high:g} is empty; give the smaller value first")
    per_point = (not options.no_scf) + (options.model is not None)
    with tqdm(total=options.n * per_point, desc="eos", disable=True if options.quiet else None) as bar:
        return eos_scan(
            atoms,
            np.linspace(low, high, options.n).tolist(),
            engine=options.engine,
            settings=settings_of(options),
            model=options.model,
            self_consistent=not options.no_scf,
            form=options.form,
            out=options.out,
            progress=bar.update,
        )
