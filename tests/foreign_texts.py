"""Densities as other programs write them, line by line from their documentation, for tests of what reads them."""

from __future__ import annotations

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure, wave

from gpurho.grid import Grid
from gpurho.units import BOHR

SHAPE = (6, 5, 7)
VOLUME = abs(np.linalg.det(TRICLINIC))


def closed_form():
    """A known density on the grid, e/angstrom^3; its mean is 0.3 exactly."""
    field = wave(Grid(SHAPE, TRICLINIC), triclinic_structure())
    assert field.mean() == pytest.approx(0.3, abs=1e-12)
    return field


def cube_text(values, structure, unit=BOHR, outside=False, head="0.0 0.0 0.0", end="\n"):
    """A cube by the book, lengths in Bohr or (unit=1) in angstrom, as pp.x lays it out."""
    sign = 1 if unit == BOHR else -1
    positions = structure.positions + (structure.cell.T @ [1, -2, 1] if outside else 0)
    lines = ["Cubfile created from PWScf calculation", "Contains the selected quantity on a FFT grid"]
    lines += [f"{len(positions)} {head}"]
    lines += [
        f"{sign * n} " + " ".join(f"{x / n / unit:.8f}" for x in row)
        for n, row in zip(values.shape, TRICLINIC, strict=True)
    ]
    lines += [
        f"{z} {z}.0 " + " ".join(f"{x / unit:.8f}" for x in p)
        for z, p in zip(structure.numbers, positions, strict=True)
    ]
    for row in (values * BOHR**3).reshape(-1, values.shape[2]):
        lines += [" ".join(f"{v:.5E}" for v in row[i : i + 6]) for i in range(0, len(row), 6)]
    return end.join(lines) + end


def chgcar_text(values, structure, scale="1.0", cell=TRICLINIC, mode="Direct", rest="", tail="", form="{:.11E}"):
    """A CHGCAR by the book; `rest` follows the values, `tail` each line."""
    order = np.argsort(structure.numbers)
    fractions = (structure.positions @ np.linalg.inv(TRICLINIC))[order]
    rows = fractions if mode[0] in "DdS" else structure.positions[order] / float(scale.split()[0])
    lines = ["a comment", scale, *(" ".join(map(repr, map(float, row))) for row in cell), "Al Si", "1 2"]
    lines += mode.split("/")
    lines += [" ".join(map(repr, map(float, row))) + (" T T F" if "/" in mode else "") for row in rows]
    flat = (values * VOLUME).transpose(2, 1, 0).reshape(-1)
    lines += ["", " ".join(map(str, values.shape))]
    lines += [" ".join(form.format(v) for v in flat[i : i + 5]) for i in range(0, len(flat), 5)]
    return "".join(f"{line}{tail}\n" for line in lines) + rest


def xsf_text(values, structure, repeat=True, unit="", head="CRYSTAL", vectors=None):
    """An xsf file by the book: a general grid, x fastest."""
    full = np.pad(values, [(0, 1)] * 3, mode="wrap") if repeat else values
    if vectors is None:
        n = np.array(values.shape)[:, None]
        vectors = TRICLINIC if repeat else TRICLINIC * (n - 1) / n
    rows = lambda array: [" ".join(f"{x:.9f}" for x in row) for row in array]  # noqa: E731
    lines = [head, "PRIMVEC", *rows(TRICLINIC), "CONVVEC", *rows(TRICLINIC), "PRIMCOORD", f"{len(structure)} 1"]
    lines += [f"{s} {r}" for s, r in zip(("Si", "Al", "14"), rows(structure.positions), strict=True)]
    lines += ["BEGIN_BLOCK_DATAGRID_3D", f"3D_PWSCF {unit}", "DATAGRID_3D_UNKNOWN"]
    lines += [" ".join(map(str, full.shape)), "0.0 0.0 0.0", *rows(vectors)]
    lines += [" ".join(f"{v:.9E}" for v in full.T.reshape(-1)), "END_DATAGRID_3D", "END_BLOCK_DATAGRID_3D"]
    return "\n".join(lines) + "\n"


def check(found, values, structure, outside=False):
    np.testing.assert_allclose(found.mean, values, rtol=3e-5)
    np.testing.assert_allclose(found.grid.cell, TRICLINIC, atol=1e-6)
    np.testing.assert_allclose(found.structure.cell, TRICLINIC, atol=1e-6)
    off = (found.structure.positions - structure.positions) @ np.linalg.inv(TRICLINIC)
    np.testing.assert_allclose(off, np.round(off), atol=1e-6)
    assert np.any(np.round(off) != 0) == outside
    assert found.structure.numbers.tolist() == structure.numbers.tolist()
    assert found.electrons == pytest.approx(0.3 * VOLUME, rel=2e-5)


TEXTS = {"rho.cube": cube_text, "CHGCAR": chgcar_text, "rho.xsf": xsf_text, "rho.dens": cube_text}
