"""How far a density still moves with denser k-points or more plane waves: ``gpurho converge al32.xyz``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.dft.base import DFTSettings, Engine, KMesh, Label
from gpurho.dft.engines import make_engine
from gpurho.errors import SettingsError
from gpurho.structure import Structure, as_structure
from gpurho.units import HARTREE, PER_ANGSTROM3

if TYPE_CHECKING:
    from ase import Atoms

LIMITS = {"k-mesh": 0.5, "cutoff": 0.3}
"""Largest change of a density, L1 per electron in per cent, that passes as converged, by what varies."""


@dataclass(frozen=True)
class Row:
    """One calculation against the reference.

    Attributes
    ----------
    kmesh : str
    points : int
        k-points computed.
    reach : float, angstrom
        Length that the mesh resolves, at most 100; see `KMesh.reach`.
    cutoff : float, eV
    l1 : float
        L1 difference per electron from the reference, per cent.
    rms_per_bohr3 : float
        Root mean square difference, e/Bohr^3.
    energy : float
        Difference of the free energy, mHa per atom.
    seconds : float
    """

    kmesh: str
    points: int
    reach: float
    cutoff: float
    l1: float
    rms_per_bohr3: float
    energy: float
    seconds: float


@dataclass(frozen=True)
class Convergence:
    """The table, the last row being the reference.

    Attributes
    ----------
    rows : list of Row
    engine : str
    kind : {"k-mesh", "cutoff"}
        What varies.
    """

    rows: list[Row]
    engine: str
    kind: str = "k-mesh"

    @property
    def limit(self) -> float:
        """Largest L1 difference that passes as converged, per cent."""
        return LIMITS[self.kind]

    @property
    def finer(self) -> list[int]:
        """Rows, from 1, with a denser mesh or a higher cutoff than the reference."""
        measures = [row.cutoff if self.kind == "cutoff" else row.reach for row in self.rows]
        return [i for i, measure in enumerate(measures, 1) if measure > measures[-1] * (1 + 1e-9)]

    @property
    def converged(self) -> bool | None:
        """Whether the last row but one is within the limit; None where a row is finer than the reference."""
        return None if self.finer else self.rows[-2].l1 < self.limit

    @property
    def verdict(self) -> str:
        """`converged`, in a line."""
        if self.finer:
            lower = "has a lower cutoff" if self.kind == "cutoff" else "has coarser k-points"
            rows = ", ".join(map(str, self.finer))
            return f"no verdict: the reference, the last row, {lower} than row {rows}; give the finest last"
        word = "converged" if self.converged else "not converged"
        return f"the last step but one is {word}: {self.rows[-2].l1:.2f} % against a limit of {self.limit} %"

    def __str__(self) -> str:
        lines = [
            f"{self.engine}; differences from the last row",
            f"{'k-mesh':34} points   cutoff eV   L1 %/electron   RMS e/Bohr^3    mHa/atom    seconds",
        ]
        for r in self.rows:
            lines.append(
                f"{r.kmesh:34} {r.points:6d} {r.cutoff:11.0f} {r.l1:15.3f} {r.rms_per_bohr3:14.1e} {r.energy:11.3f}"
                f" {r.seconds:10.1f}"
            )
        return "\n".join(lines)


def converge(
    atoms: Atoms | Structure,
    meshes: Sequence[KMesh] | None = None,
    cutoffs: Sequence[float] | None = None,
    *,
    engine: str | Engine = "qe",
    settings: DFTSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> Convergence:
    """Densities of one structure with several k-meshes, or several cutoffs, against the last of them.

    Parameters
    ----------
    atoms : ase.Atoms or Structure
    meshes : sequence of KMesh, optional
        The reference last. By default Gamma, the default mesh, the one with twice as many points in each direction.
    cutoffs : sequence of float, eV, optional
        Instead of meshes; the reference last.
    engine : str or Engine
    settings : DFTSettings, optional
        All that is not varied.
    progress : callable, optional
        Told what is being computed.

    Raises
    ------
    SettingsError
        For fewer than two variants, both kinds at once, or settings that fix what is to vary.
    """
    structure = as_structure(atoms)
    solver = make_engine(engine) if isinstance(engine, str) else engine
    base = replace(settings or DFTSettings(), forces=False)
    if meshes and cutoffs:
        raise SettingsError("k-meshes and cutoffs cannot vary at once; give one of them")
    if cutoffs:
        if base.cutoff is not None:
            raise SettingsError(f"cutoff {base.cutoff:g} eV is fixed and cutoffs are to vary; leave out --cutoff")
        variants = [replace(base, cutoff=float(c)) for c in cutoffs]
    else:
        if meshes and base.kmesh is not None:
            raise SettingsError(f"k-mesh {base.kmesh} is fixed and meshes are to vary; leave out --kmesh and --gamma")
        usual = base.mesh(structure)
        double = KMesh((2 * usual.size[0], 2 * usual.size[1], 2 * usual.size[2]), usual.shift)
        variants = [replace(base, kmesh=m) for m in meshes or (KMesh(), usual, double)]
    if len(variants) < 2:
        raise SettingsError("one calculation shows no convergence; give two or more, the reference last")
    grid = variants[-1].shape(structure)
    labels: list[Label] = []
    for variant in variants:
        if progress is not None:
            progress(f"{variant.mesh(structure)}, {variant.energy_cutoff(structure):g} eV")
        labels.append(solver.ground_state(structure, replace(variant, grid=grid)))
    reference = labels[-1]
    rows = []
    for label in labels:
        difference = label.density - reference.density
        mesh, energies = label.settings.mesh(structure), label.energies.free_energy - reference.energies.free_energy
        rows.append(
            Row(
                kmesh=str(mesh),
                points=len(mesh.points()[0]),
                reach=mesh.reach(structure.cell),
                cutoff=label.settings.energy_cutoff(structure),
                l1=100 * float(np.abs(difference).sum() / reference.density.sum()),
                rms_per_bohr3=float(np.sqrt((difference**2).mean())) * PER_ANGSTROM3,
                energy=1000 * energies / HARTREE / len(structure),
                seconds=label.seconds,
            )
        )
    return Convergence(rows, reference.engine, "cutoff" if cutoffs else "k-mesh")


def add_parser(commands: Any) -> None:
    """The command ``gpurho converge``."""
    from gpurho.pipelines.label import add_settings

    parser = commands.add_parser("converge", help="change of a density with k-points or cutoff, as a table")
    parser.add_argument("structure", type=Path, help="any file that ASE reads")
    parser.add_argument(
        "--meshes", nargs="+", metavar="MESH", help="NxNxN or NxNxN:S (shift in steps); the reference last"
    )
    parser.add_argument("--cutoffs", type=float, nargs="+", metavar="EV", help="plane-wave cutoffs instead")
    parser.add_argument("--frame", type=int, default=-1, metavar="N", help="frame of the file (the last)")
    parser.add_argument("--engine", default="qe", help="qe, gpaw, sparc, or package.module:Class (%(default)s)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


def parse_mesh(text: str) -> KMesh:
    """A mesh from ``2x2x2`` or ``2x2x2:0.25`` or ``2x2x2:0.5,0,0``."""
    size, _, shift = text.partition(":")
    try:
        numbers = [int(n) for n in size.split("x")]
        steps = [float(s) for s in shift.split(",")] if shift else [0.0]
    except ValueError:
        numbers, steps = [], []
    if len(numbers) != 3 or len(steps) not in (1, 3):
        raise SettingsError(f"mesh {text!r} is not one; give for instance 2x2x2 or 2x2x2:0.25")
    steps = steps * 3 if len(steps) == 1 else steps
    return KMesh((numbers[0], numbers[1], numbers[2]), (steps[0], steps[1], steps[2]))


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho converge``."""
    import json
    import sys

    from gpurho.pipelines.label import settings_of
    from gpurho.pipelines.structures import read_structures

    frames = read_structures(options.structure)
    if not -len(frames) <= options.frame < len(frames):
        raise SettingsError(f"frame {options.frame} is not one of {len(frames)}; give 0 to {len(frames) - 1}")
    if options.meshes and (options.k_reach or options.k_density):
        raise SettingsError("--meshes says what the k-points are; leave out --k-reach and --k-density")
    table = converge(
        frames[options.frame],
        [parse_mesh(text) for text in options.meshes or ()],
        options.cutoffs,
        engine=options.engine,
        settings=settings_of(options),
        progress=(lambda text: print(f"computing {text}", file=sys.stderr)) if sys.stderr.isatty() else None,
    )
    if options.json:
        print(json.dumps({**asdict(table), "limit": table.limit, "converged": table.converged}))
        return
    print(table)
    print(table.verdict)
