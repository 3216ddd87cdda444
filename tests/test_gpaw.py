"""The GPAW engine, its pseudopotentials, and fields on periodic grids."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from scipy.signal import resample
from scipy.special import erf

from gpurho.dft.base import DFTSettings, KMesh, check_structure
from gpurho.dft.engines import make_engine
from gpurho.dft.grids import atomic_superposition, fourier_resample
from gpurho.dft.gth import free_atom, gth
from gpurho.errors import (
    ConvergenceError,
    EngineError,
    GridError,
    MissingDependencyError,
    SettingsError,
    StructureError,
    UnknownSpeciesError,
)
from gpurho.structure import Structure
from gpurho.units import BOHR, HARTREE

GAMMA = DFTSettings(cutoff=250.0, kmesh=KMesh(), tolerance=1e-8)


def rattled(atoms, std=0.08, seed=1):
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, std, atoms.positions.shape)
    return Structure.from_ase(atoms)


@pytest.fixture(scope="module")
def al():
    return rattled(bulk("Al", "fcc", a=4.05, cubic=True))


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("gpaw.dft")
    return make_engine("gpaw")


@pytest.fixture(scope="module")
def label(engine, al):
    """Tightly converged, on the grid that the engine computes on, so that no resampling hides anything."""
    return engine.ground_state(al, replace(GAMMA, grid=GAMMA.fft_shape(al)))


# -- fields on grids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [6, 7, 8])
@pytest.mark.parametrize("new", [4, 5, 6, 7, 8, 9, 12])
def test_resampling_is_scipys(old, new):
    values = np.random.default_rng(0).normal(size=(old, 5, old + 1))
    expected = values
    for axis, n in enumerate((new, 6, new)):
        expected = resample(expected, n, axis=axis)
    assert np.allclose(fourier_resample(values, (new, 6, new)), expected, atol=1e-12)


def test_resampling_is_exact_for_waves_and_keeps_the_integral():
    def wave(shape):
        x, y, z = (np.arange(n) / n for n in shape)
        return 1.3 + np.cos(2 * np.pi * (2 * x[:, None, None] - y[None, :, None] + z)) + np.sin(4 * np.pi * z)

    coarse, fine = wave((6, 5, 8)), wave((9, 12, 7))
    assert np.allclose(fourier_resample(coarse, fine.shape), fine, atol=1e-13)
    assert np.allclose(fourier_resample(fine, coarse.shape), coarse, atol=1e-13)
    noise = np.random.default_rng(1).normal(size=(8, 6, 6))
    assert fourier_resample(noise, (5, 4, 9)).mean() == pytest.approx(noise.mean(), abs=1e-14)


def test_resampling_refuses_other_shapes():
    with pytest.raises(GridError, match="three axes"):
        fourier_resample(np.zeros((4, 4)), (4, 4, 4))


def test_superposition_is_the_free_atom_and_its_electrons(al):
    alone = Structure([[0.2, -0.1, 7.9]], [13], np.diag([8.0, 9.0, 8.5]), [True] * 3)
    grid = (48, 54, 50)
    density = atomic_superposition(alone, grid)
    assert density.mean() * alone.volume == pytest.approx(3.0, abs=1e-9)
    atom = free_atom("Al")
    points = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"), -1)
    step = points - alone.positions[0] @ np.linalg.inv(alone.cell)
    distance = np.linalg.norm((step - np.round(step)) @ alone.cell, axis=-1)
    near = (distance > 0.3) & (distance < 2.0)
    expected = np.interp(distance / BOHR, atom.r, atom.density) / BOHR**3
    assert np.abs(density - expected)[near].max() < 2e-3 * expected.max()
    skewed = Structure(al.positions, al.numbers, al.cell + 0.3 * np.eye(3, k=1), al.pbc)
    assert atomic_superposition(skewed, (20, 20, 20)).mean() * skewed.volume == pytest.approx(12.0, abs=1e-9)


# -- pseudopotentials and meshes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", ["Al", "Ge", "O", "Ti"])
def test_setups_are_the_published_functions(symbol):
    pytest.importorskip("gpaw.dft")
    from gpurho.dft._gpaw_setups import GTHSetupData

    data, p = GTHSetupData(symbol), gth(symbol)
    for r in (0.05, 0.31, 0.9, 1.7):
        coulomb = -p.valence / r * erf(r / (np.sqrt(2) * p.r_local))
        short = data.get_local_potential()
        short = short(r) / np.sqrt(4 * np.pi) if r < short.get_cutoff() else 0.0
        assert short + coulomb == pytest.approx(float(p.local(np.array(r))), abs=1e-7)
    for (channel, i), spline in zip(data.projectors, data.get_projectors(), strict=True):
        for r in (0.1, 0.8):
            expected = float(p.projector(channel, i, np.array(r))) / r**channel.l
            assert spline(r) == pytest.approx(expected, abs=1e-6)
    r, _, (g,) = data.get_compensation_charge_functions()
    assert np.trapezoid(g * r**2, r) == pytest.approx(1.0, abs=1e-9)
    # A Gaussian charge in its own field: half the integral of charge times potential.
    charge = data.Nv * g / (4 * np.pi)
    r[0] = 1e-9
    field = data.Nv * erf(r / data.rcgauss) / r
    assert 2 * np.pi * np.trapezoid(charge * field * r**2, r) == pytest.approx(data.Eh_compcharge, rel=1e-5)


def test_every_element_of_the_table_makes_a_setup():
    pytest.importorskip("gpaw.dft")
    from gpurho.dft._gpaw_setups import gth_setup

    for symbol in ("H", "He", "Li", "O", "Ti", "Zn", "Ge", "Cs", "Gd", "Au", "Rn"):
        setup = gth_setup(symbol).build(None, None, None)
        assert setup.Nv == gth(symbol).valence


@pytest.mark.parametrize("mesh", [KMesh((3, 2, 1)), KMesh((2, 2, 2), (0.25,) * 3), KMesh((2, 2, 3), (0.5, 0.5, 0))])
def test_weights_are_those_of_the_mesh(engine, mesh):
    atoms = Structure.from_ase(bulk("Al", "fcc", a=4.05))
    found = engine.one_shot(atoms, atomic_superposition(atoms, (12, 12, 12)), DFTSettings(cutoff=150.0, kmesh=mesh))
    points, weights = mesh.points()
    assert found.weights.sum() == pytest.approx(1.0)
    assert len(found.kpoints) == len(points) == len(found.eigenvalues)
    for k, w in zip(found.kpoints, found.weights, strict=True):
        off = np.minimum(
            np.abs((points - k) - np.round(points - k)).max(1), np.abs((points + k) - np.round(points + k)).max(1)
        )
        assert off.min() < 1e-9
        assert w == pytest.approx(weights[np.argmin(off)])


# -- ground states ------------------------------------------------------------------------------------------------


def test_density_integrates_to_the_electrons(label, al, engine):
    assert label.electrons == 12.0
    assert abs(label.density.mean() * al.volume - 12.0) < 1e-6
    assert label.density.shape == GAMMA.fft_shape(al)
    assert label.density.min() > -1e-4
    assert label.engine.startswith("gpaw 2")
    odd = engine.ground_state(al, replace(GAMMA, grid=(15, 16, 21), tolerance=1e-4))
    assert odd.density.shape == (15, 16, 21)
    assert abs(odd.density.mean() * al.volume - 12.0) < 1e-6


def test_forces_are_the_gradient_of_the_free_energy(label, al, engine):
    assert label.forces[1, 0] > 0.1, "the atom is not displaced"
    step, atom, axis = 0.02, 1, 0
    energies = []
    for sign in (1, -1):
        moved = al.positions.copy()
        moved[atom, axis] += sign * step
        s = Structure(moved, al.numbers, al.cell, al.pbc)
        tight = replace(label.settings, tolerance=1e-7, forces=False)
        found = engine.ground_state(s, tight, density=label.density)
        assert found.forces is None
        energies.append(found.energies.free_energy)
    slope = (energies[0] - energies[1]) / (2 * step)
    assert -slope == pytest.approx(label.forces[atom, axis], abs=1e-3)


def test_energies_are_consistent(label):
    e = label.energies
    assert e.energy == pytest.approx(e.free_energy - e.entropy_term / 2, abs=1e-9)
    assert e.entropy_term <= 0
    f = 1 / (1 + np.exp((e.eigenvalues - e.fermi_level) / (0.002 * HARTREE)))
    assert 2 * e.weights @ f.sum(1) == pytest.approx(12.0, abs=1e-5)
    assert 2 * e.weights @ (f * e.eigenvalues).sum(1) == pytest.approx(e.band, abs=1e-4)
    assert f[:, -1].max() < 1e-6


def test_a_start_density_is_used(label, al, engine):
    loose = replace(label.settings, tolerance=1e-5, forces=False)
    again = engine.ground_state(al, loose, density=fourier_resample(label.density, (16, 16, 16)) * 1.03)
    cold = engine.ground_state(al, loose)
    assert again.iterations < cold.iterations
    assert again.energies.free_energy == pytest.approx(label.energies.free_energy, abs=1e-5)


@pytest.mark.parametrize("kind", ["Al", "SiGe"])
def test_default_cutoff_is_converged_to_600_ev(engine, kind):
    """Issue: two labels of a structure differ by under 0.3 % L1 per electron."""
    if kind == "Al":
        s = rattled(bulk("Al", "fcc", a=4.05))
    else:
        atoms = bulk("Si", "diamond", a=5.54)
        atoms.symbols[1] = "Ge"
        s = rattled(atoms)
    settings = DFTSettings(kmesh=KMesh((2, 1, 1), (0.25,) * 3), forces=False)
    settings = replace(settings, grid=settings.fft_shape(s))
    usual = engine.ground_state(s, settings)
    assert usual.settings.cutoff == {"Al": 400.0, "SiGe": 500.0}[kind]
    fine = engine.ground_state(s, replace(settings, cutoff=600.0), density=usual.density)
    l1 = np.abs(usual.density - fine.density).mean() * s.volume / usual.electrons
    assert 1e-5 < l1 < 3e-3


@pytest.mark.skipif(shutil.which("pw.x") is None, reason="Quantum ESPRESSO is not there")
def test_another_code_agrees(al, engine):
    """The same potentials by other code: absolute energies, forces, density, and our energy of its density."""
    settings = DFTSettings(cutoff=400.0, kmesh=KMesh(), tolerance=1e-6)
    settings = replace(settings, grid=settings.fft_shape(al))
    theirs, ours = (make_engine(name).ground_state(al, settings) for name in ("qe", "gpaw"))
    close = 2e-5 * HARTREE * len(al)
    assert ours.energies.free_energy == pytest.approx(theirs.energies.free_energy, abs=close)
    assert ours.energies.xc == pytest.approx(theirs.energies.xc, abs=close)
    assert ours.energies.entropy_term == pytest.approx(theirs.energies.entropy_term, abs=1e-4)
    assert np.abs(ours.forces).max() > 0.1
    assert np.abs(ours.forces - theirs.forces).max() < 2e-3
    assert np.abs(ours.density - theirs.density).mean() * al.volume / 12 < 1e-4
    crossed = engine.one_shot(al, theirs.density, settings)
    assert crossed.free_energy == pytest.approx(ours.energies.free_energy, abs=1e-6 * HARTREE * len(al))


# -- Harris-Foulkes -----------------------------------------------------------------------------------------------


def test_harris_at_the_self_consistent_density(label, al, engine):
    """Issue: equal to the SCF free energy to 1e-6 Ha/atom; also from the smaller grid that labels are kept on."""
    for shape in (label.density.shape, GAMMA.shape(al)):
        found = engine.one_shot(al, fourier_resample(label.density, shape), label.settings)
        assert abs(found.free_energy - label.energies.free_energy) / HARTREE / len(al) < 1e-6
        assert found.fermi_level == pytest.approx(label.energies.fermi_level, abs=1e-4)
    bands = min(found.eigenvalues.shape[1], 6)
    assert np.allclose(found.eigenvalues[:, :bands], label.energies.eigenvalues[:, :bands], atol=1e-4)


def test_harris_error_is_of_second_order_and_that_of_xc_of_first(label, al, engine):
    change = atomic_superposition(al, label.density.shape) - label.density
    exact = engine.one_shot(al, label.density, label.settings)
    errors = []
    for part in (0.02, 0.05, 0.125):
        found = engine.one_shot(al, label.density + part * change, label.settings)
        l1 = part * np.abs(change).mean() * al.volume / 12
        errors.append((l1, found.free_energy - exact.free_energy, found.xc - exact.xc))
    l1, free, xc = np.log(np.abs(np.array(errors))).T
    assert np.exp(l1[-1]) > 2e-3, "the perturbation is too small to show an order"
    assert 1.8 < np.polyfit(l1, free, 1)[0] < 2.2
    assert 0.9 < np.polyfit(l1, xc, 1)[0] < 1.1


def test_harris_rescales_the_density(label, al, engine):
    exact = engine.one_shot(al, label.density, label.settings)
    scaled = engine.one_shot(al, 1.02 * label.density, label.settings)
    assert exact.electrons_given == pytest.approx(12.0, abs=1e-6)
    assert scaled.electrons_given == pytest.approx(12.24, abs=1e-6)
    assert scaled.free_energy == pytest.approx(exact.free_energy, abs=1e-6)


# -- what cannot be done ------------------------------------------------------------------------------------------


def test_no_convergence_is_an_error(al, engine):
    with pytest.raises(ConvergenceError, match="in 2 steps; raise max_iterations"):
        engine.ground_state(al, replace(GAMMA, max_iterations=2))


def test_structures_that_cannot_be_done(al, engine):
    open_cell = Structure(al.positions, al.numbers, al.cell, [True, True, False])
    with pytest.raises(StructureError, match="three periods"):
        engine.ground_state(open_cell, GAMMA)
    with pytest.raises(UnknownSpeciesError, match="'Pu'"):
        engine.ground_state(Structure(al.positions, [94] * 4, al.cell, al.pbc), GAMMA)
    close = al.positions.copy()
    close[1] = close[0] + 0.3
    with pytest.raises(StructureError, match="angstrom apart"):
        engine.ground_state(Structure(close, al.numbers, al.cell, al.pbc), GAMMA)
    with pytest.raises(StructureError, match="integrates to"):
        engine.one_shot(al, np.full((8, 8, 8), 5.0), GAMMA)
    sheared = al.cell.copy()
    sheared[1] += 2.0 * sheared[0]
    skewed = Structure(al.positions, al.numbers, sheared, al.pbc)
    check_structure(skewed)
    with pytest.raises(EngineError, match="The angles between your unit-cell vectors"):
        engine.ground_state(skewed, GAMMA)


def test_without_gpaw_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpaw.dft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gpurho\[dft\]'.*libxc-dev and libopenblas-dev"):
        make_engine("gpaw")


def test_engines_by_name():
    with pytest.raises(SettingsError, match="'vasp' is not known; give 'gpaw', 'qe', 'sparc'"):
        make_engine("vasp")
    pytest.importorskip("gpaw.dft")
    with pytest.raises(SettingsError, match="engine 'gpaw' has other options"):
        make_engine("gpaw", colour="red")


def test_no_files_are_left_and_the_log_goes_where_it_is_asked(al, tmp_path, monkeypatch, capfd, engine):
    monkeypatch.chdir(tmp_path)
    loose = replace(GAMMA, cutoff=150.0, tolerance=1e-3)
    engine.ground_state(al, loose)
    engine.one_shot(al, atomic_superposition(al, (16, 16, 16)), loose)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    make_engine("gpaw", txt=tmp_path / "log.txt").ground_state(al, loose)
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]
    assert "SCF iterations" in (tmp_path / "log.txt").read_text()
