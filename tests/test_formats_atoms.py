"""Files of atoms with their electrons and sigmas against ASE, pymatgen and OVITO."""

from __future__ import annotations

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure, wave

import gpurho.formats_atoms
from gpurho.density import Density
from gpurho.errors import FormatError, SettingsError
from gpurho.fields import Correction
from gpurho.grid import Grid, region_grid
from gpurho.pipelines.convert import convert
from gpurho.structure import Structure

COLUMNS = ("electrons", "electrons_std", "electrons_aleatoric", "electrons_epistemic", "volume")
CELLS = {
    "triclinic": TRICLINIC,
    "lower": np.array([[3.1, 0, 0], [-0.9, 3.6, 0], [0.5, -1.1, 4.2]]),
    "orthogonal": np.diag([3.1, 3.6, 4.2]),
}


def density_of(cell, pbc=(True, True, True), uncertain=True, **more):
    fractions = triclinic_structure().positions @ np.linalg.inv(TRICLINIC)
    structure = Structure(fractions @ cell, np.array([14, 13, 14]), cell, np.array(pbc))
    grid = Grid((12, 10, 17), cell)
    arrays = [(scale * wave(grid, structure)).astype(np.float32) for scale in (1, 0.1, 0.05)]
    return Density(grid, structure, *(arrays if uncertain else arrays[:1]), **more)


@pytest.fixture(params=CELLS)
def density(request, monkeypatch):
    monkeypatch.setattr(gpurho.formats_atoms, "AT_ONCE", 2)
    return density_of(CELLS[request.param])


def by_hand(rho):
    """Sums over the points nearest to each atom, by all distances to all images."""
    grid, structure = rho.grid, rho.structure
    shifts = np.array(np.meshgrid(*[range(-2, 3)] * 3, indexing="ij")).reshape(3, -1).T @ structure.cell
    points = grid.points()
    away = points[:, None, None] - structure.positions[None, :, None] - shifts[None, None]
    distance = np.sqrt((away**2).sum(-1)).min(-1)
    near = distance < distance.min(axis=1, keepdims=True) + 1e-6
    share = near / near.sum(axis=1, keepdims=True)
    mean, aleatoric, epistemic = (np.asarray(f, np.float64).ravel() for f in (rho.mean, rho.aleatoric, rho.epistemic))
    noise = np.sqrt(share.T @ aleatoric**2) * grid.dv
    common = share.T @ epistemic * grid.dv
    values = (share.T @ mean * grid.dv, np.hypot(noise, common), noise, common, share.sum(axis=0) * grid.dv)
    return dict(zip(COLUMNS, values, strict=True))


def check_atoms(atoms, rho):
    np.testing.assert_allclose(atoms.positions, rho.structure.positions, atol=1e-9)
    np.testing.assert_allclose(atoms.cell.array, rho.structure.cell, atol=1e-9)
    assert atoms.numbers.tolist() == [14, 13, 14]
    assert atoms.pbc.tolist() == rho.structure.pbc.tolist()


def test_extxyz_read_by_ase(density, tmp_path):
    from ase.io import read

    atoms = read(density.write(tmp_path / "atoms.xyz"))
    check_atoms(atoms, density)
    for name, want in by_hand(density).items():
        np.testing.assert_allclose(atoms.arrays[name], want, rtol=1e-6, err_msg=name)
    assert atoms.info["total_electrons"] == pytest.approx(density.electrons, rel=1e-9)
    assert atoms.arrays["electrons"].sum() == pytest.approx(density.electrons, rel=1e-7)
    assert atoms.info["total_electrons_std"] == pytest.approx(density.electrons_std, rel=1e-5)


def test_dump_read_by_ase(density, tmp_path):
    from ase.io import read

    path = density.write(tmp_path / "atoms.dump")
    atoms = read(path, format="lammps-dump-text")
    check_atoms(atoms, density)
    for name, want in by_hand(density).items():
        np.testing.assert_allclose(atoms.arrays[f"v_{name}"], want, rtol=1e-6, err_msg=name)
    assert atoms.arrays["type"].tolist() == [2, 1, 2]
    general = np.any(density.structure.cell[np.triu_indices(3, 1)])
    assert ("abc origin" in path.read_text()) == bool(general)


def test_dump_read_by_pymatgen(density, tmp_path):
    outputs = pytest.importorskip("pymatgen.io.lammps.outputs", exc_type=ImportError)

    if np.any(density.structure.cell[np.triu_indices(3, 1)]):
        pytest.skip("pymatgen reads no general triclinic boxes")
    (dump,) = outputs.parse_lammps_dumps(str(density.write(tmp_path / "atoms.lammpstrj")))
    np.testing.assert_allclose(dump.box.to_lattice().matrix, density.structure.cell, atol=1e-9)
    np.testing.assert_allclose(dump.data[["x", "y", "z"]], density.structure.positions, atol=1e-9)
    for name, want in by_hand(density).items():
        np.testing.assert_allclose(dump.data[f"v_{name}"], want, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("name", "prefix"), [("atoms.xyz", ""), ("atoms.dump", "v_")])
def test_read_by_ovito(density, tmp_path, name, prefix):
    io = pytest.importorskip("ovito.io", exc_type=ImportError)
    data = io.import_file(str(density.write(tmp_path / name))).compute()
    np.testing.assert_allclose(np.array(data.particles.positions), density.structure.positions, atol=1e-9)
    np.testing.assert_allclose(np.array(data.cell)[:, :3].T, density.structure.cell, atol=1e-9)
    assert tuple(data.cell.pbc) == (True, True, True)
    types = data.particles.particle_types
    assert [types.type_by_id(t).name for t in np.array(types)] == ["Si", "Al", "Si"]
    for column, want in by_hand(density).items():
        np.testing.assert_allclose(np.array(data.particles[prefix + column]), want, rtol=1e-6, err_msg=column)


@pytest.mark.parametrize("name", ["rho.cube", "CHGCAR", "rho.xsf"])
def test_densities_read_by_ovito(density, tmp_path, name):
    """Cells of any shape, with their periods: what to take for OVITO where a vti will not do."""
    io = pytest.importorskip("ovito.io", exc_type=ImportError)
    data = io.import_file(str(density.write(tmp_path / name))).compute()
    (grid,) = data.grids.values()
    (key,) = grid.keys()
    # A general grid of xsf repeats its end points.
    found = np.array(grid[key]).reshape(tuple(grid.shape), order="F")[:12, :10, :17]
    # OVITO takes a cube's values from e/Bohr^3 to e/angstrom^3.
    np.testing.assert_allclose(found, np.asarray(density.mean), rtol=5e-6)
    np.testing.assert_allclose(np.array(grid.domain)[:, :3].T, density.structure.cell, atol=1e-6)
    assert tuple(grid.domain.pbc) == (True, True, True)


def test_without_periods_and_sigmas(tmp_path):
    from ase.io import read

    rho = density_of(CELLS["orthogonal"], (True, False, True), uncertain=False)
    atoms = read(rho.write(tmp_path / "atoms.xyz"))
    check_atoms(atoms, rho)
    assert "electrons_std" not in atoms.arrays
    assert atoms.arrays["volume"].sum() == pytest.approx(rho.grid.volume, rel=1e-7)
    dump = rho.write(tmp_path / "atoms.dump")
    check_atoms(read(dump, format="lammps-dump-text"), rho)
    assert "pp ff pp" in dump.read_text()


def test_conservation_travels(tmp_path):
    from ase.io import read

    rho = density_of(TRICLINIC, correction=Correction("uniform", scale=1.25))
    atoms = read(rho.write(tmp_path / "atoms.xyz"))
    np.testing.assert_allclose(atoms.arrays["electrons"], 1.25 * by_hand(density_of(TRICLINIC))["electrons"], rtol=1e-6)


def test_parts_of_sigma_of_kept_sums(tmp_path):
    """Sums that a prediction kept have the same two parts as those of its field."""
    from predict_tools import aluminium, settings, small_model

    from gpurho.pipelines.predict import predict

    options = settings(spacing=0.5, conserve="uniform")
    rho = predict(aluminium(), small_model(), **options, keep=["field", "atoms"])
    kept = rho.per_atom()
    field = Density(rho.grid, rho.structure, rho.mean, rho.aleatoric, rho.epistemic, info=rho.info).per_atom()
    for name in ("electrons", "electrons_std", "electrons_aleatoric", "electrons_epistemic", "volumes"):
        np.testing.assert_allclose(getattr(kept, name), getattr(field, name), rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(np.hypot(kept.electrons_aleatoric, kept.electrons_epistemic), kept.electrons_std)
    alone = predict(aluminium(), small_model(), **options, keep="atoms")
    text = alone.write(tmp_path / "atoms.xyz").read_text()
    assert len(text.splitlines()) == 2 + len(rho.structure)


def test_refusals(density, tmp_path):
    region = ((2, 9), (0, 10), (3, 4))
    part = Density(region_grid(density.grid, region), density.structure, np.asarray(density.mean)[2:9, :, 3:4])
    with pytest.raises(FormatError, match="part of the cell"):
        part.write(tmp_path / "atoms.xyz")
    assert not list(tmp_path.iterdir())
    source = density.write(tmp_path / "rho.vti")
    for options in ({"coarse": 2}, {"region": region}, {"field": "std"}):
        with pytest.raises(SettingsError, match=r"atoms\.dump"):
            convert(source, tmp_path / "atoms.dump", **options)
    atoms = convert(source, tmp_path / "atoms.dump")
    with pytest.raises(FormatError, match="of atoms"):
        convert(atoms, tmp_path / "rho.cube")
