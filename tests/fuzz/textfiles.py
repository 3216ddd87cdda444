"""Densities and results in text: files of this library and of DFT codes, rewritten and damaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from predict_tools import triclinic_structure, wave

from fuzz.cases import WrongError, finite, whole_density
from fuzz.mutations import cut, damaged, equal_rewrite

DATA = Path(__file__).resolve().parents[1] / "data"
FILES = {"cube": "a.cube", "chgcar": "CHGCAR", "xsf": "a.xsf", "dens": "a.dens", "vti": "a.vti"}


@cache
def sources(kind: str) -> tuple[bytes, ...]:
    """Whole files of a format, of a cell along the axes and of a triclinic one."""
    import tempfile

    from gpurho.density import Density
    from gpurho.grid import Grid
    from gpurho.structure import Structure

    found = []
    for structure in (triclinic_structure(), Structure([[0, 0, 0], [2, 2, 2]], [13, 13], 4 * np.eye(3), [True] * 3)):
        grid = Grid((3, 4, 5), structure.cell)
        density = Density(grid, structure, wave(grid, structure).astype(np.float32))
        with tempfile.TemporaryDirectory() as folder:
            path = density.write(Path(folder) / FILES[kind])
            found.append(path.read_bytes())
    return tuple(found)


def _read(path: Path) -> tuple[Any, Any, Any]:
    from gpurho.formats import read_density

    with read_density(path) as density:
        whole_density(density)
        return np.asarray(density.mean[:, :, :]), density.grid.cell, density.structure.positions


def density_case(kind: str) -> Callable[[np.random.Generator, Path], str]:
    """Cases of a format of densities."""

    def case(rng: np.random.Generator, folder: Path) -> str:
        text = sources(kind)[int(rng.integers(2))]
        path = folder / FILES[kind]
        what = rng.random()
        if what < 0.15 and kind != "vti":
            path.write_bytes(text)
            want = _read(path)
            path.write_bytes(equal_rewrite(text, rng))
            for a, b in zip(_read(path), want, strict=True):
                if not np.array_equal(a, b):
                    raise WrongError("another way to write the same numbers gives others")
            return "right"
        if what < 0.3:
            path.write_bytes(text)
            want = _read(path)
            path.write_bytes(cut(text, rng))
            for a, b in zip(_read(path), want, strict=True):
                if not np.array_equal(a, b):
                    raise WrongError("a file that is cut off is read, with other values")
            return "right"
        path.write_bytes(damaged(text, rng))
        _read(path)
        return "accepted"

    return case


def _out(path: Path) -> list[Any]:
    from gpurho.dft.sparc_files import read_out

    found = read_out(path)
    return [found.cell, found.electrons]


def _static(path: Path) -> list[Any]:
    from gpurho.dft.sparc_files import read_static

    found = read_static(path)
    return [found.fractions, found.free_energy, 0.0 if found.forces is None else found.forces]


def _eigen(path: Path) -> list[Any]:
    from gpurho.dft.sparc_files import read_eigen

    found = read_eigen(path)
    return [found.kpoints, found.weights, found.eigenvalues, found.occupations]


def _aimd(path: Path) -> list[Any]:
    from gpurho.dft.sparc_files import read_aimd

    (path.with_suffix(".ion")).write_bytes((DATA / "sparc/al32_m040_md.ion").read_bytes())
    (path.with_suffix(".inpt")).write_bytes((DATA / "sparc/al32_m040_md.inpt").read_bytes())
    steps = read_aimd(path)
    return [step.structure.positions for step in steps] + [step.free_energy for step in steps]


def _psp8(path: Path) -> list[Any]:
    from gpurho.dft.sparc_inputs import read_psp8

    return list(read_psp8(path))


def _upf(path: Path) -> list[Any]:
    from gpurho.dft.qe import _read_upf

    return [_read_upf(path)[1]]


def _pw(path: Path) -> list[Any]:
    from gpurho.dft.qe_files import read_result

    result = read_result(path)
    return [result.eigenvalues, result.occupations]


def _charge(path: Path) -> list[Any]:
    from gpurho.dft.qe_files import read_charge

    return [read_charge(path)]


@cache
def result_file(kind: str) -> bytes:
    """A whole file of a DFT code."""
    import lzma

    if kind == "aimd":
        text = lzma.decompress((DATA / "sparc/al32_m040_md.aimd.xz").read_bytes())
        parts = text.split(b":MDSTEP:")
        return b":MDSTEP:".join(parts[:3])
    if kind == "psp8":
        return b"Al ONCVPSP\n 13.0 3.0 170510 zatom,zion,pspd\n 8 11 1 4 600 0 pspcod\n 5.99 0.0 0.0 rchrg\n"
    if kind == "upf":
        from gpurho.dft.upf import upf_text

        return upf_text("Al").encode()[:6000]
    if kind == "pw":
        return (DATA / "qe/gamma.xml").read_bytes()
    if kind == "charge":
        return (DATA / "qe/gamma.dat").read_bytes()
    return (DATA / f"sparc/al32_m030.{kind}").read_bytes()


def result_case(kind: str, read: Callable[[Path], list[Any]]) -> Callable[[np.random.Generator, Path], str]:
    """Cases of a file that a DFT code leaves."""

    def case(rng: np.random.Generator, folder: Path) -> str:
        path = folder / f"a.{kind}"
        path.write_bytes(damaged(result_file(kind), rng))
        for value in read(path):
            finite(value, "a value")
        return "accepted"

    return case


READERS = {
    "out": _out,
    "static": _static,
    "eigen": _eigen,
    "aimd": _aimd,
    "psp8": _psp8,
    "upf": _upf,
    "pw": _pw,
    "charge": _charge,
}
KINDS = {kind: density_case(kind) for kind in FILES} | {kind: result_case(kind, read) for kind, read in READERS.items()}
