"""The comparison with the paper, on tiny data: seen snapshots, figures of the tables, resumption, the report."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from predict_tools import aluminium, small_model

from gpurho.datasets import Snapshot, open_dataset, write_dataset
from gpurho.dft.base import DFTSettings, Energies, KMesh
from gpurho.errors import SettingsError, StoreError
from gpurho.fieldstats import DENSITY_EDGES, LEVELS, SIGMA_EDGES, FieldCounts
from gpurho.pipelines import papercommands
from gpurho.pipelines.paper import paper
from gpurho.pipelines.paper_sets import PAPER_ROWS, SETS, find_tests, label_seconds, paper_numbers
from gpurho.pipelines.paper_store import Results, entry_key
from gpurho.pipelines.paper_tables import density_means, energy_means
from gpurho.pipelines.paper_work import Work, widest_void
from gpurho.structure import Structure
from gpurho.units import HARTREE

GRID = (8, 8, 8)


def snapshot(seed: int = 0, a: float = 4.05, drop: int = 0, **meta) -> Snapshot:
    """Four atoms of aluminium or fewer, with a made-up density and energies."""
    atoms = aluminium(seed=seed, rattle=0.05 if a == 4.05 else 0.0)
    atoms.set_cell(atoms.cell * (a / 4.05), scale_atoms=True)
    del atoms[:drop]
    structure = Structure.from_ase(atoms)
    electrons = 3.0 * len(atoms)
    values = 0.18 * (1 + 0.3 * np.random.default_rng(seed).random(GRID))
    values *= electrons / (values.mean() * structure.volume)
    mesh = KMesh((1, 1, 1))
    settings = DFTSettings(cutoff=200.0, kmesh=mesh, grid=GRID)
    info = {
        "temperature_K": 300.0 + seed,
        "trajectory": 0,
        "index": seed,
        "seconds": 10.0,
        "free_energy_ev": len(atoms) * (-56.0 + 0.5 * (a - 4.0) ** 2),
        "xc_energy_ev": -20.0,
        "fermi_level_ev": 7.0,
        "settings": json.dumps(asdict(settings)),
        **meta,
    }
    points, weights = mesh.points()
    arrays = {"eigenvalues": np.linspace(-4.0, 9.0, 6)[None], "kpoints": points, "weights": weights}
    return Snapshot(structure, values.astype(np.float32), electrons, info, arrays)


class ShiftEngine:
    """Gives energies that differ from those of the label by known amounts, and counts its calls."""

    name = "shift"

    def __init__(self):
        self.calls = 0

    def one_shot(self, structure, density, settings):
        self.calls += 1
        n = len(structure)
        a = np.cbrt(structure.volume / n * 4)
        free = n * (-56.0 + 0.5 * (a - 4.0) ** 2) + 1e-3 * HARTREE * n
        eigenvalues = np.linspace(-4.0, 9.0, 6)[None].copy()
        eigenvalues[0, 1] += 0.02
        eigenvalues[0, 5] += 5.0  # empty: must not count
        points, weights = settings.kmesh.points()
        xc = -20.0 - 2e-3 * HARTREE * n
        return Energies(free, free, xc, 0.0, None, 7.1, eigenvalues, points, weights, n, 3.0 * n, 3.0 * n)


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "data"
    where.mkdir()
    write_dataset(where / "al32.h5", [snapshot(s) for s in range(4)])
    write_dataset(where / "al_strained.h5", [snapshot(7)])
    write_dataset(where / "al_lattice.h5", [snapshot(20 + k, a) for k, a in enumerate((3.8, 3.9, 4.0, 4.1, 4.2))])
    return where


def trained(folder, train, test, name="al32.h5", **more):
    data = open_dataset(folder / name)
    keep = ("temperature_K", "trajectory", "index")
    split = {
        use: [{"snapshot": i, **{k: data.meta(i)[k] for k in keep}} for i in indices]
        for use, indices in (("train", train), ("validation", []), ("test", test))
    }
    record = {"file": name, "fingerprint": data.fingerprint(), "snapshots": len(data), "split": split}
    return small_model().with_spec(training={"datasets": [record], "dataset": record, "split": split, **more})


def run(folder, out, model, engine=None, **more):
    options = {"largest": 0, "progress": False, "precision": "fp32", "skip_energies": engine is None} | more
    return paper(folder, {"al": model}, out, engine=engine or ShiftEngine(), **options)


def test_snapshots_of_the_training_are_left_out_wherever_their_atoms_are(folder):
    model = trained(folder, [0, 2], [1, 3])
    # The same atoms under other labels, at another place of another file.
    write_dataset(folder / "al108.h5", [snapshot(5), snapshot(2, fermi_level_ev=8.0), snapshot(6)])
    tests = {t.set.name: t for t in find_tests(model, "al", folder)[0]}
    assert tests["al32"].indices == (1, 3)
    assert tests["al32"].seen == 2
    assert tests["al108"].indices == (0, 2)
    assert tests["al256"].dataset is None
    # The file has grown and its order has changed since: the record's numbers mean other snapshots now.
    write_dataset(folder / "al32.h5", [snapshot(s) for s in (9, 0, 1, 2, 3)])
    tests, seen = find_tests(model, "al", folder)
    assert tests[0].indices == (0, 2, 4)
    assert any("changed" in gap for gap in seen.gaps)


def test_data_of_the_model_that_a_training_went_on_from_counts_too(folder):
    first = trained(folder, [0], [1])
    write_dataset(folder / "al108.h5", [snapshot(5), snapshot(6)])
    start = {"file": "first.safetensors", "training": first.spec.training}
    later = trained(folder, [0], [1], "al108.h5", start=start)
    tests = {t.set.name: t.indices for t in find_tests(later, "al", folder)[0]}
    assert tests["al32"] == (1, 2, 3)
    assert tests["al108"] == (1,)
    assert label_seconds(later, folder) == pytest.approx(20.0)
    bare = trained(folder, [0], [1], "al108.h5", start={"file": "first.safetensors"})
    assert any("does not name" in gap for gap in find_tests(bare, "al", folder)[1].gaps)


def test_the_spread_takes_snapshots_over_all_temperatures(folder):
    test = find_tests(None, "al", folder)[0][0]
    assert test.spread(None) == (0, 1, 2, 3)
    assert test.spread(2) == (1, 3)


def test_tables_hold_our_figures_beside_the_papers(folder, tmp_path):
    model = trained(folder, [0, 2], [1, 3])
    result = run(folder, tmp_path / "out", model, ShiftEngine(), energies=1)
    rows = {row.name: row for row in result.tables["al"]}
    assert set(rows) == set(PAPER_ROWS["al"])
    data = open_dataset(folder / "al32.h5")
    errors = []
    for i in (1, 3):
        s = data[i]
        rho = Work(precision="fp32").on_label(model, s)
        mean = (
            np.asarray(rho.mean, np.float64) * s.electrons / (np.asarray(rho.mean, np.float64).mean() * rho.grid.volume)
        )
        errors.append(np.abs(mean - s.density).mean() * rho.grid.volume / s.electrons)
    cell = rows["32"].cells["l1"]
    assert cell.ours == pytest.approx(np.mean(errors), rel=1e-5)
    assert (cell.paper, cell.target) == (2.27e-2, 4.5e-3)
    assert cell.reached is False
    assert rows["32"].snapshots == 2
    assert rows["32"].energies == 1
    assert rows["all"].snapshots == 3
    found = {name: rows["32"].cells[name].ours for name in ("energy", "xc", "fermi_level", "eigenvalue")}
    # The label's energies are those of its lattice parameter, the structures are all at 4.05.
    assert found == pytest.approx(
        {"energy": 1e-3, "xc": 2e-3, "fermi_level": 0.1 / HARTREE, "eigenvalue": 0.02 / HARTREE}, rel=1e-6
    )
    assert rows["500"].cells["l1"].ours is None
    assert "no labels" in rows["108"].our_case
    # A constant shift of all energies moves neither the minimum nor the curvature.
    lattice = next(row for row in result.lattice if row.repeat == 2)
    assert lattice.differences == pytest.approx((0.0, 0.0), abs=1e-6)
    assert lattice.ours["dft"][0] == pytest.approx(4.0 / 0.529177210903, rel=1e-3)


def test_a_killed_run_goes_on(folder, tmp_path, monkeypatch):
    model = trained(folder, [0, 2], [1, 3])
    out = tmp_path / "out"
    engine = ShiftEngine()
    measure, calls = Work.measure, []

    def killed(self, *args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args)
        return measure(self, *args)

    monkeypatch.setattr(Work, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, model, engine)
    first = json.loads((out / "results.json").read_text())["entries"]
    assert len(first) >= 1
    monkeypatch.setattr(Work, "measure", measure)
    result = run(folder, out, model, engine)
    entries = json.loads((out / "results.json").read_text())["entries"]
    assert {k: entries[k] for k in first} == first
    assert result.computed == len(entries) - len(first)
    before = engine.calls
    again = run(folder, out, model, engine)
    assert (again.computed, engine.calls) == (0, before)
    assert again.tables == result.tables
    # A model with other weights is another one; labels that come later are added to what is there.
    write_dataset(folder / "al_strained.h5", [snapshot(7), snapshot(8)])
    assert run(folder, out, model, engine, skip_energies=True).computed == 1
    other = small_model(seed=1).with_spec(training=model.spec.training)
    assert run(folder, out, other, engine, skip_energies=True).computed > 3


def test_failures_are_named_and_stop_nothing(folder, tmp_path):
    class Broken(ShiftEngine):
        def one_shot(self, structure, density, settings):
            raise SettingsError("no such pseudopotential")

    result = run(folder, tmp_path / "out", trained(folder, [0], [1]), Broken())
    assert any("no such pseudopotential" in note for note in result.notes)
    rows = {row.name: row for row in result.tables["al"]}
    assert rows["32"].cells["energy"].ours is None
    assert rows["32"].cells["l1"].ours is not None


def test_the_report_stands_alone_and_says_what_is_missing(folder, tmp_path):
    write_dataset(folder / "al_vacancies.h5", [snapshot(11, drop=1)])
    out = tmp_path / "out"
    record = tmp_path / "select.json"
    candidate = {"series": "distances", "n_features": 10, "rmse": 1e-3}
    record.write_text(json.dumps({"candidates": {"a": candidate, "b": {**candidate, "n_features": 20}}}))
    model = trained(folder, [0], [1])
    result = run(folder, out, model, compare={"one": model, "two": small_model(seed=4)}, select=record)
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == sum(p.file is not None for p in result.pictures)
    assert "<script" not in html
    assert 'src="http' not in html
    assert "2.27e-02" in html
    assert any("no labels yet of al108, al256, al_lattice108" in note for note in result.notes)
    made = {p.number: p.file for p in result.pictures}
    assert {f"Figure {n}" for n in (2, 3, 5, 6, 7, 8, 9, 10, 14, 15)} <= set(made)
    for number in ("Figure 2", "Figure 6", "Figure 14", "Figure 15"):
        assert (out / made[number]).stat().st_size > 5000
    assert made["Figure 3"] is None
    assert "No model of SiGe" in html


def test_built_systems_are_predicted(tmp_path, folder, monkeypatch):
    from gpurho.pipelines import paper_plan

    def few(material, largest):
        return {"vacancy in 256": (lambda: paper_plan._rattled_vacancy(2, 0.05), 2, "void")} if material == "al" else {}

    monkeypatch.setattr(paper_plan, "built_systems", few)
    result = run(folder, tmp_path / "out", trained(folder, [0], [1]), spacing=0.8)
    picture = next(p for p in result.pictures if p.number == "Figure 9")
    assert picture.file is not None
    assert "31 rattled atoms" in picture.caption


def test_systems_keep_below_the_largest():
    from gpurho.pipelines.paper_plan import built_systems

    for material in ("al", "sige"):
        sizes = {name: len(build()) for name, (build, _, _) in built_systems(material, 260).items()}
        assert sizes
        assert all(n <= 260 for name, n in sizes.items() if name.startswith("crystal"))
    assert set(built_systems("al", 40)) == {"crystal of 32"}


def test_counts_add_up_over_fields():
    rng = np.random.default_rng(1)
    parts = []
    for _ in range(2):
        reference = rng.uniform(0.05, 0.6, 40_000)
        sigma = 10 ** rng.uniform(-3.5, -1.5, reference.size)
        parts.append((reference + sigma * rng.standard_normal(reference.size), sigma, reference))
    both = FieldCounts.merged(FieldCounts.of_fields(*part) for part in parts)
    whole = FieldCounts.of_fields(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    for name, value in whole.to_dict().items():
        np.testing.assert_allclose(both.to_dict()[name], value, rtol=1e-4)
    np.testing.assert_allclose(FieldCounts.from_dict(both.to_dict()).coverage(), LEVELS, atol=0.01)
    sigma, error = both.error_against_sigma(least=1000)
    assert len(sigma) > 15
    np.testing.assert_allclose(error / sigma, 1.0, atol=0.1)
    everything = np.concatenate([p[2] for p in parts])
    np.testing.assert_array_equal(both.reference, np.histogram(everything, DENSITY_EDGES)[0])
    assert both.points.sum() == both.n_points == 80_000
    assert len(SIGMA_EDGES) == len(both.points) + 1


def test_means_over_snapshots():
    values = [{"metrics": {"l1_per_electron": x, "rmse_bohr": x, "nrmse": x}} for x in (1.0, 7.0)]
    assert density_means(values) == pytest.approx({"l1": 4.0, "rmse": 5.0, "nrmse": 4.0})
    energies = [{"energy": e, "xc": 1.0, "fermi_level": 1.0, "eigenvalue": v} for e, v in ((-2.0, None), (4.0, 3.0))]
    assert energy_means(energies) == pytest.approx({"energy": 3.0, "xc": 1.0, "fermi_level": 1.0, "eigenvalue": 3.0})


def test_the_widest_void_is_the_vacancy():
    atoms = aluminium(3, rattle=0.08)
    missing = atoms.get_scaled_positions()[40]
    del atoms[40]
    step = (widest_void(Structure.from_ase(atoms)) - missing + 0.5) % 1 - 0.5
    assert np.linalg.norm(step * 12.15) < 0.6


def test_results_are_whole_or_refused(tmp_path):
    results = Results(tmp_path)
    key = entry_key("metrics", "a", 1)
    assert key != entry_key("metrics", "a", 2)
    results.make(key, lambda: ({"x": float("nan")}, {"plane": np.arange(3.0)}))
    again = Results(tmp_path)
    assert again.get(key) == {"x": None}
    np.testing.assert_array_equal(again.arrays(key)["plane"], np.arange(3.0))
    # An entry whose arrays are gone is made again.
    next((tmp_path / "arrays").iterdir()).unlink()
    assert Results(tmp_path).make(key, lambda: ({"x": 2.0}, {"plane": np.zeros(2)})) == {"x": 2.0}
    (tmp_path / "results.json").write_text('{"format": "gpurho-paper", "ent')
    with pytest.raises(StoreError, match="another folder"):
        Results(tmp_path)


def test_wrong_use_is_refused_before_any_work(folder, tmp_path):
    with pytest.raises(SettingsError, match="does not exist"):
        paper(tmp_path / "nowhere", {"al": small_model()}, tmp_path / "out")
    with pytest.raises(SettingsError, match="copper"):
        paper(folder, {"copper": small_model()}, tmp_path / "out")
    with pytest.raises(SettingsError, match="snapshots 0"):
        run(folder, tmp_path / "out", small_model(), snapshots=0)
    with pytest.raises(SettingsError, match="NAME=FILE"):
        papercommands._pairs("--models", ["al"])
    assert not (tmp_path / "out").exists()


def test_the_papers_figures_cover_every_row():
    numbers = paper_numbers()
    for material, cases in PAPER_ROWS.items():
        assert set(numbers["tables"][material]) == set(cases)
        assert set(numbers["targets"][material]) <= set(cases)
        assert {s.row for s in SETS if s.material == material and s.row} <= set(cases)
    assert all(len(v) == len(numbers["columns"]) for t in numbers["tables"].values() for v in t.values())
