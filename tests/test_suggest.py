"""Suggestions of what to label next, and the files that are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from defect_tools import check_cut, density_with, fcc, from_site, known_bulk, without
from fake_sparc import read_input
from predict_tools import small_model

from gpurho.cli import main
from gpurho.datasets import Snapshot, write_dataset
from gpurho.errors import GpurhoError, OutputExistsError, SettingsError, StoreError
from gpurho.pipelines import suggest as module
from gpurho.pipelines.suggest import suggest
from gpurho.structure import Structure


@pytest.fixture(scope="module")
def known() -> list[Structure]:
    return known_bulk()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, known: list[Structure]):
    """Two vacancies far from each other and a divacancy, each uncertain; and training data: bulk, and a vacancy."""
    folder = tmp_path_factory.mktemp("scene")
    places = ([4.0, 4.0, 4.0], [16.2, 16.2, 16.2], [16.2, 4.0, 4.0], [18.2, 6.0, 4.0])
    atoms, sites = without(fcc(6, 0.08, 1), *places)
    pair = 0.5 * (sites[2] + sites[3])
    rho = density_with(atoms, [(sites[0], 4e-3), (sites[1], 3e-3), (pair, 6e-3)])
    rho.write(folder / "large.h5")
    grid = (12, 12, 12)

    def snapshot(structure: Structure) -> Snapshot:
        electrons = 3.0 * len(structure)
        return Snapshot(structure, np.full(grid, electrons / structure.volume, np.float32), electrons)

    vacancy, _ = without(fcc(3, 0.08, 50), [6.0, 6.0, 6.0])
    write_dataset(folder / "bulk.h5", [snapshot(s) for s in known])
    write_dataset(folder / "vacancy.h5", [snapshot(Structure.from_ase(vacancy))])
    return folder, rho, [sites[0], sites[1], pair]


def test_each_kind_of_defect_is_asked_for_once(scene) -> None:
    folder, rho, sites = scene
    found = suggest(rho, training=folder / "bulk.h5", max_atoms=60)
    assert len(found) == 2
    assert from_site(rho.structure, found[0].position, sites[2]) < 1.0  # the divacancy: the highest score
    assert from_site(rho.structure, found[1].position, sites[0]) < 1.0  # of two alike the more uncertain one
    assert found[0].score > found[1].score
    for s in found:
        assert s.novelty > 1
        check_cut(rho.structure, s.cut, 60)
        assert s.atoms.info["family"] == "suggested"
        assert "times as far from the training data" in s.reason
    again = suggest([rho], training=[folder / "bulk.h5"], max_atoms=60)
    assert [a.record() for a in again] == [b.record() for b in found]


def test_what_training_covers_is_not_asked_for(scene) -> None:
    folder, rho, sites = scene
    found = suggest(rho, training=[folder / "bulk.h5", folder / "vacancy.h5"], max_atoms=60)
    assert all(min(from_site(rho.structure, s.position, place) for place in sites[:2]) > 3.0 for s in found)


def test_without_training_data_the_sure_atoms_are_what_is_known(scene) -> None:
    _, rho, sites = scene
    found = suggest(rho, max_atoms=60)
    assert from_site(rho.structure, found[0].position, sites[2]) < 1.0
    assert "atoms that the model is sure of" in found[0].reason
    assert suggest(density_with(fcc(3, 0.05), []), max_atoms=60) == []


def test_files_that_programs_read(scene, tmp_path: Path) -> None:
    from ase.io.espresso import read_espresso_in

    from gpurho.dft.base import DFTSettings
    from gpurho.formats_sparc import read_structure

    folder, rho, _ = scene
    out = tmp_path / "cells"
    found = suggest(rho, training=folder / "bulk.h5", max_atoms=60, out=out, inputs=("qe", "sparc"))
    assert sorted(p.name for p in out.iterdir()) == ["000", "001", "suggestions.json", "suggestions.xyz"]
    assert json.loads((out / "suggestions.json").read_text())["suggestions"] == [s.record() for s in found]
    frames = read(out / "suggestions.xyz", ":")
    for number, (frame, s) in enumerate(zip(frames, found, strict=True)):
        assert frame.info["suggest_reason"] == s.reason
        np.testing.assert_allclose(frame.positions, s.atoms.positions, atol=1e-7)
        np.testing.assert_allclose(frame.cell.array, s.atoms.cell.array, atol=1e-12)
        with open(out / f"{number:03d}" / "qe" / "pw.in") as file:
            qe = read_espresso_in(file)
        sparc = read_structure(out / f"{number:03d}" / "sparc" / "sparc.ion").to_ase()
        for other in (qe, sparc):
            assert len(other) == len(frame)
            np.testing.assert_allclose(other.cell.array, s.atoms.cell.array, atol=1e-6)
            f = (other.positions - s.atoms.positions) @ np.linalg.inv(s.atoms.cell.array)
            assert np.abs((f - np.round(f)) @ s.atoms.cell.array).max() < 1e-6
        assert (out / f"{number:03d}" / "qe" / "Al.upf").is_file()
        mesh = DFTSettings().at(Structure.from_ase(s.atoms)).kmesh
        words = read_input(out / f"{number:03d}" / "sparc" / "sparc.inpt")
        assert tuple(map(int, words["KPOINT_GRID"])) == mesh.size
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(OutputExistsError, match="--overwrite"):
        suggest(rho, out=out)
    suggest(rho, training=folder / "bulk.h5", max_atoms=60, out=out, count=1, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["suggestions.json", "suggestions.xyz"]


def test_structures_are_predicted_and_refused(tmp_path: Path) -> None:
    model = small_model()
    atoms, _ = without(fcc(3, 0.05), [6.0, 6.0, 6.0])
    options = {"spacing": 0.8, "uncertainty": "analytic", "device": "cpu", "progress": False, "max_atoms": 40}
    found = suggest([atoms, fcc(3, 0.05, 1)], model, level=1e-9, **options)
    assert {s.source for s in found} <= {"Al107", "Al108"}
    # Any level: all atoms stand out, and what differs most is asked for.
    assert 1 <= len(found) <= 5
    single = suggest(atoms, model, level=1e-9, **options)
    assert single[0].source == "Al107"
    small_model().save(tmp_path / "m.safetensors")
    from ase.io import write

    write(tmp_path / "many.xyz", [atoms, fcc(3, 0.05, 1)])
    stored = suggest(tmp_path / "many.xyz", tmp_path / "m.safetensors", level=1e-9, out=tmp_path / "o", **options)
    assert [(s.position.round(3).tolist(), len(s.atoms)) for s in stored] == [
        (s.position.round(3).tolist(), len(s.atoms)) for s in found
    ]
    assert stored[0].source.startswith("many.xyz@")


def test_a_large_scan_goes_through_a_file_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_POINTS", 100)
    options = {"spacing": 0.8, "uncertainty": "analytic", "device": "cpu", "progress": False, "max_atoms": 40}
    atoms, model = fcc(3, 0.05), small_model()
    streamed = suggest(atoms, model, level=1e-9, out=tmp_path / "o", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    monkeypatch.setattr(module, "MEMORY_POINTS", 10**9)
    assert [s.record() for s in streamed] == [s.record() for s in suggest(atoms, model, level=1e-9, **options)]


def test_what_is_refused(scene, tmp_path: Path) -> None:
    _, rho, _ = scene
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for kind, arguments in (
        (SettingsError, {"count": 0}),
        (SettingsError, {"inputs": ("vasp",), "out": tmp_path / "a"}),
        (SettingsError, {"inputs": ("qe",)}),
        (SettingsError, {"uncertainty": "sampled"}),
        (OutputExistsError, {"out": tmp_path / "file"}),
        (OutputExistsError, {"out": tmp_path / "mine"}),
        (OutputExistsError, {"out": tmp_path / "mine", "overwrite": True}),
        (StoreError, {"out": tmp_path / "none" / "a"}),
        (GpurhoError, {"training": tmp_path / "none.h5"}),
    ):
        with pytest.raises(kind) as caught:
            suggest(rho, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError):
        suggest([])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_nothing_is_left_of_a_failed_write(scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, rho, _ = scene
    monkeypatch.setattr("gpurho.pipelines.suggestfiles.engine_input", fails)
    with pytest.raises(StoreError, match="No space left"):
        suggest(rho, max_atoms=60, out=tmp_path / "o", inputs=("qe",))
    assert list(tmp_path.iterdir()) == []


def test_command(scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = scene
    words = ["suggest", str(folder / "large.h5"), "--training", str(folder / "bulk.h5"), "--max-atoms", "60"]
    assert main([*words, "--out", str(tmp_path / "o"), "--write", "qe", "--quiet"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("0: epistemic sigma")
    assert text[1].startswith("1: epistemic sigma")
    assert text[2].startswith(f"wrote {tmp_path / 'o'}; compute with: gpurho label")
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "o" / "suggestions.json").read_text())["suggestions"]
    assert main([*words, "--level", "1"]) == 0
    assert "nothing stands out" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "o")]) == 1
    assert "--overwrite" in capsys.readouterr().err
