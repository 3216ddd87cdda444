"""Trust: which atoms are unlike the training data, why, and whether the number follows the error."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.io import read, write
from predict_tools import settings, small_model
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr

import gpurho
from gpurho.cli import main
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import ModelError, UnknownSpeciesError
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import DensityModel, ModelSpec
from gpurho.structure import Structure
from gpurho.surroundings import AtomBatches, first_shell
from gpurho.trust import KINDS, Trust, trust_of
from gpurho.truststats import AtomInputs, fit_trust

DATA = Path(__file__).resolve().parents[1] / "benchmarks" / "data"
A = 4.05


def crystal(repeat: int = 3, rattle: float = 0.0, a: float = A, seed: int = 0) -> Atoms:
    atoms = bulk("Al", "fcc", a=a, cubic=True).repeat(repeat)
    atoms.positions += np.random.default_rng(seed).normal(scale=rattle, size=(len(atoms), 3)) if rattle else 0.0
    return atoms


def structure(atoms: Atoms) -> Structure:
    return Structure.from_ase(atoms)


def untrained(species: tuple[str, ...] = ("Al",)) -> DensityModel:
    """A model of the smooth family with random weights."""
    descriptor = DescriptorSpec(species, cutoff=5.5, family="smooth", n_radial=10, n_basis=4, l_max=3)
    spec = ModelSpec(descriptor, {"Al": 3.0, "Si": 4.0, "Ge": 4.0}, NetworkSpec(1, 1, 4), density_mean=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DensityModel.from_network(spec, DensityNetwork(spec.network, descriptor.n_features, []))


@cache
def cold() -> DensityModel:
    """Knows aluminium that was shaken by 0.03 to 0.09 angstrom, so no vacancy, strain or surface."""
    return fit_trust(untrained(), shaken(0))


def shaken(seed: int) -> list[Structure]:
    return [structure(crystal(2, (0.03, 0.06, 0.09)[i % 3], seed=seed + i)) for i in range(18)]


# -- what is inside and outside ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rattle", [0.0, 0.03, 0.06])
def test_what_was_trained_on_is_inside(rattle: float) -> None:
    found = gpurho.trust(crystal(3, rattle, seed=99), cold())
    assert found.level == "inside", found.sentence
    assert found.sentence.startswith("inside of the training data")
    assert len(found.outside) <= 0.03 * 108
    assert not found.reasons
    assert gpurho.trust(crystal(3, 0.09, seed=99), cold()).level != "outside"


def test_about_one_in_a_hundred_training_like_atoms_is_beyond_one() -> None:
    values = np.concatenate(
        [trust_of(structure(crystal(2, 0.02 + 0.008 * i, seed=50 + i)), cold()).per_atom for i in range(11)]
    )
    assert 0 < (values >= 1).mean() < 0.06


def neighbours_of(atoms: Atoms, index: int, reach: float = 3.4) -> set[int]:
    distances = atoms.get_distances(index, range(len(atoms)), mic=True)
    return set(np.flatnonzero((distances < reach) & (distances > 0.1)).tolist())


def test_neighbours_of_a_vacancy() -> None:
    atoms = crystal(4, 0.03, seed=3)
    near = {i - (i > 100) for i in neighbours_of(atoms, 100)}
    del atoms[100]
    found = gpurho.trust(atoms, cold())
    assert len(near) == 12
    assert set(found.outside[:12].tolist()) == near
    assert {found.kinds()[i] for i in near} == {"missing"}
    assert found.level in ("edge", "outside")
    assert "12 with 11 neighbours for 12: a vacancy" in found.sentence


def test_atoms_of_a_surface() -> None:
    slab = fcc111("Al", (3, 3, 7), a=A, vacuum=8.0)
    slab.pbc = True
    z = slab.positions[:, 2]
    top = set(np.flatnonzero((z < z.min() + 0.1) | (z > z.max() - 0.1)).tolist())
    found = gpurho.trust(slab, cold())
    assert set(found.outside[:18].tolist()) == top
    assert {found.kinds()[i] for i in top} == {"open"}
    assert "18 with 9 neighbours for 12: a surface or void" in found.sentence
    assert "per atom" not in found.sentence  # a slab's volume says nothing


@pytest.mark.parametrize(("strain", "word", "kind"), [(0.9, "-10.0%", "compressed"), (1.1, "+10.0%", "stretched")])
def test_strain(strain: float, word: str, kind: str) -> None:
    found = gpurho.trust(crystal(3, 0.03, a=A * strain), cold())
    assert found.level == "outside"
    assert len(found.outside) == 108
    assert f"{word} in length" in found.sentence
    assert found.kinds().count(kind) > 100


def test_slight_strain_is_at_the_edge_by_the_volume_alone() -> None:
    found = gpurho.trust(crystal(3, 0.09, a=A * 1.025), cold())
    assert found.level != "inside"
    assert found.reasons[0].kind == "volume"


def test_atoms_too_close() -> None:
    atoms = crystal(3, 0.03)
    atoms.positions[1] = atoms.positions[0] + 0.62 * (atoms.positions[1] - atoms.positions[0])
    found = gpurho.trust(atoms, cold())
    assert set(found.outside[:2].tolist()) == {0, 1}
    assert [found.kinds()[i] for i in (0, 1)] == ["close", "close"]
    assert "angstrom apart, trained down to" in found.sentence


def test_another_phase() -> None:
    found = gpurho.trust(bulk("Al", "diamond", a=6.0, cubic=True).repeat(2), cold())
    assert len(found.outside) == 64
    assert "another phase" in found.sentence


def test_composition_and_species_never_trained_on() -> None:
    rng = np.random.default_rng(0)

    def alloy(germanium: float) -> Structure:
        atoms = bulk("Si", "diamond", a=5.5, cubic=True).repeat(2)
        atoms.positions += rng.normal(scale=0.04, size=(64, 3))
        atoms.numbers[rng.permutation(64)[: round(64 * germanium)]] = 32
        return structure(atoms)

    model = fit_trust(untrained(("Ge", "Si")), [alloy(0.5) for _ in range(8)])
    assert trust_of(alloy(0.5), model).level == "inside"
    pure = trust_of(alloy(0.0), model)
    assert pure.level == "outside"
    assert "0% Ge, trained on 50%" in pure.sentence
    # Vacancies show where the alloy's disorder is looked past.
    atoms = alloy(0.5).to_ase().repeat((2, 1, 1))
    near = {i - (i > 20) for i in neighbours_of(atoms, 20, 2.8)}
    del atoms[20]
    found = trust_of(structure(atoms), model)
    assert len(near) == 4
    assert near <= set(found.outside.tolist())
    assert {i for i, kind in enumerate(found.kinds()) if kind == "open"} == near
    assert "4 with 3 neighbours for 4: a vacancy or surface" in found.sentence
    silicon = fit_trust(untrained(("Ge", "Si")), [alloy(0.0) for _ in range(3)])
    one = alloy(0.0).to_ase()
    one.numbers[5] = 32
    assert trust_of(structure(one), silicon).per_atom[5] == 1000.0
    with pytest.raises(UnknownSpeciesError, match="Al"):
        trust_of(structure(crystal()), silicon)


# -- invariance and independent figures --------------------------------------------------------------------------


def test_rotation_permutation_and_translation_change_nothing() -> None:
    atoms = crystal(2, 0.08, seed=5)
    del atoms[7]
    expected = gpurho.trust(atoms, cold()).per_atom
    rng = np.random.default_rng(1)
    order, turn = rng.permutation(len(atoms)), Rotation.random(random_state=2).as_matrix()
    moved = Atoms(
        numbers=atoms.numbers[order],
        positions=(atoms.positions[order] + 1.7) @ turn.T,
        cell=atoms.cell.array @ turn.T,
        pbc=True,
    )
    assert np.abs(turn - np.eye(3)).max() > 0.3
    found = gpurho.trust(moved, cold())
    np.testing.assert_allclose(found.per_atom, expected[order], rtol=2e-4, atol=2e-4)


def test_score_is_the_larger_distance_found_by_plain_loops() -> None:
    model, s = cold(), structure(crystal(2, 0.1, a=A * 1.01, seed=8))
    stats = model.spec.trust
    assert stats is not None
    found = trust_of(s, model).per_atom
    mean, basis, known = (model.tensors[f"trust_{k}"].double().numpy() for k in ("mean", "basis", "known"))
    x = AtomInputs(model, s).at(s.positions)
    for i in range(len(s)):
        z = (x[i] - mean[0]) @ basis
        near = min(float(np.linalg.norm(z[: stats.axes] - other)) for other in known)
        thin = float(np.linalg.norm(z[stats.axes :]))
        assert found[i] == pytest.approx(max(near, thin if thin >= 1 else thin**2), rel=1e-4)


def test_surroundings_against_all_images() -> None:
    atoms = Atoms(
        "Al5", positions=np.random.default_rng(4).uniform(0, 4, (5, 3)), cell=[[4, 0.5, 0], [0, 4.4, 1], [0.3, 0, 5]]
    )
    atoms.pbc = [True, False, True]
    batches = AtomBatches(structure(atoms))
    shifts = [np.array([i, 0, k]) @ atoms.cell.array for i in range(-4, 5) for k in range(-4, 5)]
    for index, points in batches:
        found = batches.surroundings(points, 4.2)
        for row, atom in enumerate(index):
            all_of = [np.linalg.norm(p + t - atoms.positions[atom]) for p in atoms.positions for t in shifts]
            near = sorted(d for d in all_of if 1e-6 < d <= 4.2)[:20]
            assert found.nearest[row] == pytest.approx(near[0])
            assert found.coordination[row] == len(near)
            assert found.bond[row] == pytest.approx(np.mean(near))


def test_first_shell_lies_between_the_neighbours() -> None:
    assert 2.87 < first_shell([structure(crystal(2, 0.1))]) < 4.0
    assert 2.4 < first_shell([structure(bulk("Si", "diamond", a=5.43, cubic=True).repeat(2))]) < 3.8


def test_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = crystal(3, 0.05)
    del atoms[4]
    whole = gpurho.trust(atoms, cold())
    monkeypatch.setattr("gpurho.surroundings.BATCH", 17)
    parts = gpurho.trust(atoms, cold())
    np.testing.assert_allclose(parts.per_atom, whole.per_atom, rtol=1e-5, atol=1e-6)
    assert parts.sentence == whole.sentence
    np.testing.assert_array_equal(parts.why, whole.why)


# -- models and files --------------------------------------------------------------------------------------------


def test_model_file_keeps_the_statistics_and_predictions(tmp_path: Path) -> None:
    model = cold()
    model.save(tmp_path / "m.safetensors")
    again = DensityModel.load(tmp_path / "m.safetensors")
    assert again.spec.trust == model.spec.trust
    assert again.fingerprint() == untrained().fingerprint()
    np.testing.assert_array_equal(
        gpurho.trust(crystal(2, 0.05), again).per_atom, gpurho.trust(crystal(2, 0.05), model).per_atom
    )


def test_model_without_statistics_says_not_known(tmp_path: Path) -> None:
    found = gpurho.trust(crystal(2), untrained())
    assert (found.level, found.known, found.largest) == ("unknown", False, None)
    assert "gpurho calibrate" in found.sentence
    assert np.isnan(found.per_atom).all()
    assert not len(found.outside)
    # A file of the format before.
    model = untrained()
    values = {**model.spec.to_dict(), "format_version": 2}
    del values["trust"]
    save_file(model.tensors, tmp_path / "old.safetensors", metadata={"gpurho": json.dumps(values)})
    assert DensityModel.load(tmp_path / "old.safetensors").spec.trust is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": 3}, "trust_basis|trust_known"),
        ({"atoms": [5, 5]}, "rows"),
        ({"atoms": [-1]}, "whole"),
        ({"shell": float("inf")}, "finite"),
        ({"version": 2}, "version 2"),
        ({"surprise": 1}, "surprise"),
        ({"volume": ["a", 1]}, "finite"),
        ({"bond": 3}, "bond|int"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = cold()
    values = model.spec.to_dict()
    values["trust"] = {**values["trust"], **change}
    save_file(model.tensors, tmp_path / "m.safetensors", metadata={"gpurho": json.dumps(values)})
    with pytest.raises(ModelError, match=message) as caught:
        DensityModel.load(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


def test_training_data_that_say_too_little() -> None:
    with pytest.raises(ModelError, match="too few"):
        fit_trust(untrained(), [structure(crystal(1, 0.1))])
    with pytest.raises(ModelError, match="alike"):
        fit_trust(untrained(), [structure(crystal(2)), structure(crystal(2))])


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_snapshots(count: int) -> None:
    """So few atoms that parts of them have no thin axes."""
    model = fit_trust(gpurho.load_model("al"), [structure(crystal(2, 0.1, seed=i)) for i in range(count)])
    assert all(bool(tensor.isfinite().all()) for tensor in model.tensors.values())
    assert gpurho.trust(crystal(2, 0.1, seed=77), model).known
    assert gpurho.trust(crystal(2, 0.1, a=1.1 * A), model).level == "outside"


def test_another_family_of_descriptors() -> None:
    model = fit_trust(small_model(), [structure(crystal(2, 0.05 + 0.01 * i, seed=i)) for i in range(6)])
    found = trust_of(structure(crystal(2, 0.08, seed=77)), model)
    assert found.level == "inside", found.sentence
    assert trust_of(structure(crystal(2, 0.08, a=1.1 * A)), model).level == "outside"


# -- predictions -------------------------------------------------------------------------------------------------


def test_predictions_keep_it_in_memory_and_in_files(tmp_path: Path) -> None:
    atoms = crystal(2, 0.03)
    del atoms[3]
    model, expected = cold(), gpurho.trust(atoms, cold())
    options = settings(grid=(16, 16, 16), uncertainty=None)
    rho = gpurho.predict(atoms, model, **options)
    stored = gpurho.predict(atoms, model, out=tmp_path / "rho.h5", **options)
    for found in (rho.trust, stored.trust, gpurho.Density.open(tmp_path / "rho.h5").trust):
        assert isinstance(found, Trust)
        np.testing.assert_array_equal(found.per_atom, expected.per_atom)
        np.testing.assert_array_equal(found.why, expected.why)
        assert found.summary() == expected.summary()
    stored.write(tmp_path / "copy.h5")
    copy = gpurho.Density.open(tmp_path / "copy.h5").trust
    assert copy is not None
    assert copy.sentence == expected.sentence
    write(tmp_path / "known.xyz", atoms)
    assert main(["trust", str(tmp_path / "known.xyz"), "--write", str(tmp_path / "t.cif")]) == 1
    assert not (tmp_path / "t.cif").exists()
    rho.write(tmp_path / "atoms.xyz")
    np.testing.assert_allclose(read(tmp_path / "atoms.xyz").arrays["trust"], expected.per_atom, rtol=1e-6)
    rho.write(tmp_path / "atoms.dump")
    assert " v_trust\n" in (tmp_path / "atoms.dump").read_text()
    assert gpurho.predict(atoms, untrained(), **options).trust is None


def test_bytes_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, options = crystal(2, 0.05), settings(grid=(16, 16, 16), uncertainty=None)
    gpurho.predict(atoms, cold(), out=tmp_path / "a.h5", **options).close()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gpurho.pipelines.predict.job_trust", stop)
        with pytest.raises(KeyboardInterrupt):
            gpurho.predict(atoms, cold(), out=tmp_path / "b.h5", **options)
    gpurho.predict(atoms, cold(), out=tmp_path / "b.h5", **options).close()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_of_a_region_only_its_atoms(tmp_path: Path) -> None:
    atoms = crystal(4, 0.03)
    rho = gpurho.predict(
        atoms, cold(), region=((0, 4), (0, 16), (0, 16)), **settings(grid=(16, 16, 16), uncertainty=None)
    )
    assert rho.trust is not None
    looked = np.isfinite(rho.trust.per_atom)
    x = np.mod(atoms.positions[:, 0], 4 * A)
    expected = (x <= A + 3.0) | (x >= 4 * A - 3.0)
    np.testing.assert_array_equal(looked, expected)
    whole = gpurho.trust(atoms, cold()).per_atom
    np.testing.assert_allclose(rho.trust.per_atom[looked], whole[looked], rtol=1e-5, atol=1e-6)


def test_command_line_prints_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cold().save(tmp_path / "m.safetensors")
    slab = fcc111("Al", (2, 2, 4), a=A, vacuum=6.0)
    slab.pbc, slab.info = True, {}
    write(tmp_path / "slab.xyz", slab)
    command = ["predict", str(tmp_path / "slab.xyz"), "--model", str(tmp_path / "m.safetensors"), "--device", "cpu"]
    command += ["--grid", "12", "12", "12", "--uncertainty", "none"]
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trust ")]
    assert len(lines) == 1
    assert "OUTSIDE" in lines[0]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trust"]
    assert found["level"] == "outside"
    assert found["n_outside"] == 8
    assert found["atoms"][0]["kind"] in KINDS


# -- the shipped model -------------------------------------------------------------------------------------------


def test_shipped_models_know_their_training_atoms() -> None:
    for info in gpurho.models():
        assert info.spec.trust is not None, info.name
    assert gpurho.trust(crystal(3)).level == "inside"
    assert gpurho.trust(crystal(3, 0.08)).level == "inside"
    assert gpurho.trust(fcc111("Al", (3, 3, 7), a=A, vacuum=8.0, periodic=True)).level == "outside"


def test_it_ranks_snapshots_and_atoms_by_their_error() -> None:
    from gpurho.datasets import open_dataset
    from gpurho.peratom import per_atom

    model = gpurho.load_model("al")
    errors, means, atom_errors, numbers = [], [], [], []
    for name, indices in (("al32", (1, 13, 25, 33, 45, 53)), ("al_strained", (0, 2, 3, 5)), ("al_lattice", (0, 1, 3))):
        data = open_dataset(DATA / f"{name}.h5")
        for i in indices:
            reference = data[i]
            # Every other point of the reference: a grid over the same cell.
            density = reference.density[::2, ::2, ::2]
            options = settings(grid=density.shape, uncertainty=None, tile_shape=(64, 64, 64))
            rho = gpurho.predict(reference.structure, model, **options)
            error = np.abs(np.asarray(rho.mean) - density).astype(np.float32)
            found = rho.trust
            assert found is not None
            errors.append(float(error.mean()))
            means.append(float(np.sqrt(np.mean(np.square(found.per_atom, dtype=float)))))
            atom_errors.append(per_atom(rho.structure, rho.grid, error, None, None).electrons)
            numbers.append(found.per_atom)
    assert spearmanr(errors, means)[0] > 0.6
    assert spearmanr(np.concatenate(atom_errors), np.concatenate(numbers))[0] > 0.6


def test_statistics_are_checked_when_made() -> None:
    stats = cold().spec.trust
    assert stats is not None
    with pytest.raises(ModelError, match="1 or more"):
        replace(stats, axes=0)
