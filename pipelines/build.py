"""Example structures from the command line: ``gpurho build al-screw --out screw.xyz``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gpurho import builders, defects
from gpurho.errors import FormatError, GpurhoError, OutputExistsError, SettingsError, StoreError
from gpurho.pipelines.structures import read_structures, write_structures

if TYPE_CHECKING:
    from ase import Atoms

Options: TypeAlias = argparse.Namespace

REACH = 12.0
"""Distances are looked for up to here, angstrom."""


def add_parser(commands: Any) -> None:
    """The command ``gpurho build``, with a command of its own for each kind and each preset."""
    parser = commands.add_parser("build", help="crystals, vacancies, alloys, dislocations, grain boundaries")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind, (text, _, add_options) in KINDS.items():
        one = kinds.add_parser(kind, help=text, description=text)
        if kind != "alloy":
            one.add_argument("symbol", nargs="?", default="Al", help="element (%(default)s)")
        add_options(one)
        _common(one, kind)
    for name, (kind, fixed) in PRESETS.items():
        text, _, add_options = KINDS[kind]
        one = kinds.add_parser(name, help=f"{kind} with its defaults", description=text)
        add_options(one)
        _common(one, kind, **fixed)


def _common(parser: argparse.ArgumentParser, kind: str, **fixed: Any) -> None:
    parser.add_argument("--a", type=float, metavar="ANGSTROM", help="lattice constant (tabulated ones)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="*.xyz, *.cif, POSCAR, or what else ASE writes")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run, kind=kind, **fixed)


def run(options: Options) -> None:
    """Run ``gpurho build``: make the structure, write it, and say in a line what it is."""
    if options.out is not None:
        _check_target(options.out, options.overwrite)
    atoms = KINDS[options.kind][1](options)
    out = options.out or Path(f"{atoms.info['family']}.xyz")
    if options.out is None:
        _check_target(out, options.overwrite)
    try:
        write_structures(out, [atoms], options.overwrite)
    except GpurhoError:
        raise
    except Exception as error:  # each of ASE's many writers fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(f"{out} cannot be written: {reason}; give another format, for instance *.xyz") from None
    if options.json:
        print(json.dumps({"file": str(out), "n_atoms": len(atoms), "text": describe(atoms)}))
        return
    print(f"{out}: {describe(atoms)}")


def describe(atoms: Atoms) -> str:
    """Number of atoms, composition, cell lengths and shortest distance, in one line."""
    symbols, counts = np.unique(atoms.get_chemical_symbols(), return_counts=True)
    shares = (f"{symbol} {100 * count / len(atoms):.4g} %" for symbol, count in zip(symbols, counts, strict=True))
    lengths = " x ".join(f"{length:.3f}" for length in atoms.cell.lengths())
    shortest = shortest_distance(atoms)
    near = f"shortest distance {shortest:.3f}" if np.isfinite(shortest) else f"no two atoms within {REACH:g}"
    return f"{len(atoms)} atoms ({', '.join(shares)}), cell {lengths} angstrom, {near} angstrom"


def shortest_distance(atoms: Atoms) -> float:
    """Between any two atoms, periodic images included, angstrom; infinite where none is within `REACH`."""
    from gpurho.neighbors import nearest_table
    from gpurho.structure import Structure

    distances = nearest_table(Structure.from_ase(atoms), np.zeros(len(atoms), dtype=int), 1, REACH).distances
    return float(distances.min(initial=np.inf))


def _check_target(path: Path, overwrite: bool) -> None:
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; give another name, or --overwrite to replace it")
    if not path.parent.is_dir():
        raise StoreError(f"folder {path.parent} does not exist; make it, or give another name")
    try:
        writable = ioformats[filetype(path.name, read=False)].can_write
    except (KeyError, UnknownFileTypeError):
        writable = False
    if not writable:
        raise FormatError(f"{path.name} is no name of a format that ASE writes; give for instance *.xyz, *.cif, POSCAR")


# -- kinds --------------------------------------------------------------------------------------------------------


def _crystal_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, nargs=3, metavar=("NX", "NY", "NZ"), help="cubic cells (3 3 3)")
    parser.add_argument("--lattice", metavar="NAME", help="fcc, diamond, bcc, ... (that of the element)")


def _vacancy_options(parser: argparse.ArgumentParser) -> None:
    _crystal_options(parser)
    parser.add_argument("--vacancies", type=int, default=1, choices=(1, 2), help="2: a pair of nearest neighbours")
    parser.add_argument("--index", type=int, metavar="N", help="the atom to remove (that in the middle)")
    parser.add_argument("--structure", type=Path, metavar="FILE", help="in this structure, not in a crystal")


def _strained_options(parser: argparse.ArgumentParser) -> None:
    _crystal_options(parser)
    parser.add_argument(
        "--strain", type=float, nargs="+", default=[0.05], metavar="E", help="one number, three, or nine (0.05)"
    )
    parser.add_argument("--structure", type=Path, metavar="FILE", help="of this structure, not of a crystal")


def _alloy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fractions", nargs="+", default=["Si=0.5", "Ge=0.5"], metavar="SYMBOL=X", help="sum to 1")
    parser.add_argument("--repeat", type=int, nargs=3, default=(2, 2, 2), metavar=("NX", "NY", "NZ"), help="(2 2 2)")
    parser.add_argument("--lattice", default="diamond", metavar="NAME", help="fcc, diamond, bcc (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def _screw_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=float, nargs=2, metavar=("W", "H"), help="of the periodic cell, angstrom")
    parser.add_argument("--length", type=float, metavar="ANGSTROM", help="along the line (one period)")
    parser.add_argument("--radius", type=float, metavar="ANGSTROM", help="a single one in a cylinder instead")
    parser.add_argument("--vacuum", type=float, default=10.0, metavar="ANGSTROM", help="around it (%(default)s)")


def _edge_options(parser: argparse.ArgumentParser) -> None:
    _screw_options(parser)
    parser.add_argument("--poisson", type=float, metavar="NU", help="Poisson's ratio (that of Al)")


def _tilt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plane", type=int, nargs="+", default=[2, 1, 0], metavar="H", help="boundary plane (2 1 0)")
    parser.add_argument("--grain", type=float, metavar="ANGSTROM", help="thickness of each grain")
    parser.add_argument("--width", type=float, metavar="ANGSTROM", help="along the boundary (one period)")
    parser.add_argument("--depth", type=float, metavar="ANGSTROM", help="along the tilt axis (one period)")
    parser.add_argument("--min-distance", type=float, metavar="ANGSTROM", help="closer atoms are removed")
    parser.add_argument("--gap", type=float, metavar="ANGSTROM", help="grains drawn apart (0)")
    parser.add_argument("--shift", type=float, nargs=2, metavar=("DX", "DZ"), help="of one grain along the boundary")


def _crystal(options: Options) -> Atoms:
    path = getattr(options, "structure", None)
    if path is None:
        return builders.crystal(options.symbol, options.repeat or (3, 3, 3), options.lattice, options.a)
    if options.a is not None or options.lattice is not None:
        raise SettingsError(f"--a and --lattice belong to a crystal, not to {path}; leave them out, or --structure")
    atoms = read_structures(path)[-1]
    return builders.supercell(atoms, options.repeat) if options.repeat else atoms


def _vacancy(options: Options) -> Atoms:
    make: Callable[..., Atoms] = builders.vacancy if options.vacancies == 1 else builders.divacancy
    return make(_crystal(options), options.index)


def _strained(options: Options) -> Atoms:
    shapes: dict[int, tuple[int, ...]] = {1: (), 3: (3,), 9: (3, 3)}
    n = len(options.strain)
    if n not in shapes:
        raise SettingsError(f"--strain has {n} numbers; give one, three, or nine")
    return builders.strained(_crystal(options), np.reshape(options.strain, shapes[n]))


def _alloy(options: Options) -> Atoms:
    fractions: dict[str, float] = {}
    for text in options.fractions:
        symbol, _, value = text.partition("=")
        try:
            share = float(value)
        except ValueError:
            raise SettingsError(f"--fractions {text!r} is not SYMBOL=X; give for instance Si=0.5 Ge=0.5") from None
        if symbol in fractions:
            raise SettingsError(f"--fractions names {symbol} twice; give each element once")
        fractions[symbol] = share
    return builders.alloy(fractions, options.repeat, options.lattice, options.a, options.seed)


def _given(options: Options, *names: str) -> dict[str, Any]:
    """The options that were given; what is left out keeps the builder's own default."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _edge(options: Options) -> Atoms:
    given = _given(options, "size", "length", "a", "poisson", "radius", "vacuum")
    return defects.edge_dislocation(options.symbol, **given)


def _screw(options: Options) -> Atoms:
    return defects.screw_dislocation(options.symbol, **_given(options, "size", "length", "a", "radius", "vacuum"))


def _tilt(options: Options) -> Atoms:
    given = _given(options, "plane", "grain", "width", "depth", "a", "min_distance", "gap", "shift")
    return defects.tilt_grain_boundary(options.symbol, **given)


KINDS: dict[str, tuple[str, Callable[[Options], Atoms], Callable[[argparse.ArgumentParser], None]]] = {
    "crystal": ("cubic crystal", _crystal, _crystal_options),
    "vacancy": ("crystal with one or two vacancies", _vacancy, _vacancy_options),
    "strained": ("crystal under a strain", _strained, _strained_options),
    "alloy": ("random alloy, lattice constant by Vegard's law", _alloy, _alloy_options),
    "edge": ("edge dislocations a/2 [110] in fcc", _edge, _edge_options),
    "screw": ("screw dislocations a/2 [110] in fcc", _screw, _screw_options),
    "tilt-gb": ("symmetric [001] tilt grain boundaries in fcc", _tilt, _tilt_options),
}
"""Of each kind: what it is, how it is built, its options."""

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "al-crystal": ("crystal", {"symbol": "Al"}),
    "al-vacancy": ("vacancy", {"symbol": "Al"}),
    "al-divacancy": ("vacancy", {"symbol": "Al", "vacancies": 2}),
    "al-strained": ("strained", {"symbol": "Al"}),
    "al-edge": ("edge", {"symbol": "Al"}),
    "al-screw": ("screw", {"symbol": "Al"}),
    "al-tilt-gb": ("tilt-gb", {"symbol": "Al"}),
    "sige-alloy": ("alloy", {}),
}
"""A kind, and the options that are settled."""
