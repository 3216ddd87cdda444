"""The paper's tables and figures with our labels: ``gpurho paper --data benchmarks/data --models al --out FOLDER``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.dft.base import Engine
from gpurho.errors import DatasetError, SettingsError, StoreError
from gpurho.journal import Lock
from gpurho.pipelines.paper_gallery import Extras, Gallery, Picture
from gpurho.pipelines.paper_plan import Part, Task, plan_part, run_part
from gpurho.pipelines.paper_report import write_report
from gpurho.pipelines.paper_sets import NAMES, TestData, find_tests, label_seconds, paper_numbers
from gpurho.pipelines.paper_store import Results, entry_key
from gpurho.pipelines.paper_tables import (
    LatticeRow,
    Row,
    accuracy_table,
    calibration_table,
    floor_values,
    lattice_table,
)
from gpurho.pipelines.paper_work import Work

if TYPE_CHECKING:
    from gpurho.model import DensityModel

GUIDE_SETS = {"al": ("al32", "al108", "al256"), "sige": ("sige64", "sige216")}
"""Sets of bulk cells of several sizes."""

GUIDE_POINTS = 10_000

REPORT = "report.html"


@dataclass(frozen=True)
class PaperResult:
    """A finished comparison.

    Attributes
    ----------
    folder : Path
        With ``results.json``, pictures and ``report.html``.
    tables : dict
        Tables IV and V by material.
    lattice : list of LatticeRow
        Table VI.
    pictures : list of Picture
    notes : list of str
        What a reader must know: missing labels, failures, what was left out.
    computed : int
        Pieces computed in this run; the others were there.
    """

    folder: Path
    tables: dict[str, list[Row]]
    lattice: list[LatticeRow]
    pictures: list[Picture]
    notes: list[str]
    computed: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; all figures are in ``results.json``."""
        return {"report": str(self.folder / REPORT), "computed": self.computed, "notes": self.notes}

    def __str__(self) -> str:
        lines = [f"{self.folder / REPORT}: {self.computed} pieces computed in this run"]
        for material, rows in self.tables.items():
            lines.append(
                f"{NAMES[material]:28} snapshots  L1/electron     paper    target   Ha/atom     paper    target"
            )
            for row in rows:
                l1, energy = row.cells["l1"], row.cells["energy"]
                numbers = (l1.ours, l1.paper, l1.target, energy.ours, energy.paper, energy.target)
                texts = "".join(f"{'-' if v is None else f'{v:.2e}':>10}" for v in numbers)
                lines.append(f"{row.paper_case:28} {row.snapshots:9d} {texts}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def paper(
    data: str | Path,
    models: Mapping[str, Any],
    out: str | Path,
    *,
    snapshots: int | None = None,
    energies: int = 2,
    skip_energies: bool = False,
    engine: str | Engine = "qe",
    uncertainty: str = "analytic",
    device: str = "cpu",
    precision: str = "auto",
    spacing: float = 0.3,
    largest: int = 1400,
    compare: Mapping[str, Any] | None = None,
    with_defects: Any = None,
    select: str | Path | None = None,
    progress: bool = True,
) -> PaperResult:
    """Redo the paper's Tables IV, V and VI and Figures 2-10, 14 and 15, and write one report.

    Every piece is computed once and kept in ``results.json`` under a key made of the model, the data and the settings:
    a run that was killed goes on, and labels that come later are added. Only snapshots that the model was neither
    trained nor stopped on are used.

    Parameters
    ----------
    data : path
        Folder of the data sets, named as in `gpurho.pipelines.paper_sets.SETS`; those that are missing are named.
    models : mapping
        "al" and "sige": shipped names, paths or models. A material without one is left out.
    out : path
        Folder to write to.
    snapshots : int, optional
        At most so many of each set, spread over the temperatures.
    energies : int
        Snapshots of each set whose energies are computed by the engine. Scans of lattice parameters are done whole.
    skip_energies : bool
        Compute none; those of earlier runs are shown.
    engine : "qe", "gpaw", "sparc" or Engine
        The one that made the labels: Fermi levels and eigenvalues have its zero of potential.
    uncertainty : "analytic", "last-layer" or "sampled"
    device, precision : str
    spacing : float, angstrom
        Grid of built structures.
    largest : int
        Most atoms of built structures.
    compare : mapping, optional
        Models by name for Figure 14, with and without transfer learning.
    with_defects : name, path or DensityModel, optional
        A model of Al with a vacancy in its training data, for Figure 9e.
    select : path, optional
        Record of ``gpurho select`` for Figure 15.
    progress : bool

    Raises
    ------
    SettingsError, ModelError, DatasetError
        Before any work.
    StoreError
        Where the folder cannot be written to, or another run writes to it.
    """
    folder, target = Path(data), Path(out)
    if not folder.is_dir():
        raise SettingsError(f"folder {str(folder)!r} of the data sets does not exist; check the name")
    unknown = sorted(set(models) - set(NAMES))
    if unknown or not models:
        raise SettingsError(f"models {unknown} are not known; give al=FILE, sige=FILE or both")
    for name, value, low in (("snapshots", snapshots, 1), ("energies", energies, 1), ("largest", largest, 0)):
        if value is not None and value < low:
            raise SettingsError(f"{name} {value} cannot be used; give {low} or more")
    work = Work(uncertainty, device, precision, spacing)
    loaded = {material: _load(models[material]) for material in models}
    extra = {name: _load(model)[1] for name, model in (compare or {}).items()}
    defects = None if with_defects is None else _load(with_defects)[1]
    candidates = [] if select is None else _candidates(Path(select))
    results = Results(target)
    lock = Lock(target / ".results.lock", target)
    try:
        parts = {}
        for material in NAMES:
            name, model = loaded.get(material, ("", None))
            parts[material] = plan_part(
                material,
                name,
                model,
                folder,
                work,
                engine,
                snapshots=snapshots,
                energies=energies,
                largest=largest,
                with_defects=defects if material == "al" else None,
            )
        _run(parts, results, not skip_energies, progress)
        extras = Extras(_roads(extra, folder, work, results, snapshots), candidates, _guides(parts, results))
        result = _finish(target, parts, results, extras)
    finally:
        lock.release()
    return result


def _load(model: Any) -> tuple[str, DensityModel]:
    from gpurho.model import DensityModel, load_model

    if isinstance(model, DensityModel):
        return "given", model
    return Path(model).stem, load_model(model)


def _run(parts: dict[str, Part], results: Results, energies: bool, progress: bool) -> None:
    from tqdm import tqdm

    total = sum(1 for part in parts.values() for _ in part.tasks(energies))
    with tqdm(total=total, desc="paper", unit="piece", disable=None if progress else True) as bar:

        def tick(task: Task) -> None:
            bar.set_postfix_str(task.text, refresh=False)
            bar.update()

        for part in parts.values():
            run_part(part, results, energies, tick)


def _finish(target: Path, parts: dict[str, Part], results: Results, extras: Extras) -> PaperResult:
    """Tables, pictures and the report from what was found."""
    numbers = paper_numbers()
    tables = {m: accuracy_table(part, results, numbers) for m, part in parts.items()}
    lattice = lattice_table(parts["al"], results, numbers)
    calibration = {m: calibration_table(part, results, numbers) for m, part in parts.items()}
    floors = {m: floor_values(part, results) for m, part in parts.items()}
    pictures = Gallery(target, parts, results, tables, lattice, extras, numbers).draw()
    notes = _notes(parts)
    results.tables = {
        **{m: [asdict(row) for row in rows] for m, rows in tables.items()},
        "lattice": [{k: v for k, v in vars(row).items() if k != "curves"} for row in lattice],
        "calibration": {m: [{**r, "spearman": asdict(r["spearman"])} for r in rows] for m, rows in calibration.items()},
        "models": {m: None if p.model is None else p.model.fingerprint() for m, p in parts.items()},
        "notes": notes,
    }
    results.save()
    path = target / REPORT
    text = write_report(path, parts, tables, lattice, calibration, floors, pictures, notes, numbers["source"])
    try:
        path.write_text(text)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; the results are safe") from None
    return PaperResult(target, tables, lattice, pictures, notes, results.computed)


def _notes(parts: dict[str, Part]) -> list[str]:
    """What stands in for what, what is missing and what failed, one line each."""
    notes = [
        "Labels: Quantum ESPRESSO, GTH-PBE, converged k-points; the paper's are SPARC's, its k-points are not stated.",
    ]
    for material, part in parts.items():
        name = NAMES[material]
        if part.model is None:
            notes.append(f"{name}: no model was given.")
            continue
        missing = [t.set.name for t in part.tests if t.dataset is None]
        if missing:
            notes.append(f"{name}: no labels yet of {', '.join(missing)}.")
        for test in part.tests:
            if test.dataset is not None and test.seen:
                notes.append(
                    f"{name}: {test.set.name}: {test.seen} of {len(test.dataset)} snapshots were trained or stopped on"
                    " and are left out."
                )
        if part.seen.missing:
            notes.append(
                f"{name}: the model was trained on {', '.join(part.seen.missing)}, not in the folder: whether atoms of"
                " the test sets were among them cannot be checked."
            )
        notes += [f"{name}: {gap}." for gap in part.seen.gaps]
        notes += [f"{name}: not computed: {reason}" for reason in part.failed.values()]
    notes.append(
        "Sizes: Al 108 or 256 atoms stand for the paper's 1372 with DFT, 106 and 107 for its 256 with vacancies; SiGe"
        " 216 for 512, 63 for its cells with vacancies. Al 500 and SiGe 512 have no labels here."
    )
    return notes


def _roads(
    models: dict[str, DensityModel], folder: Path, work: Work, results: Results, snapshots: int | None
) -> list[dict[str, Any]]:
    """Figure 14: every model on the largest set of bulk cells that none of them has seen, snapshot by snapshot."""
    import numpy as np

    rows = []
    for material, names in GUIDE_SETS.items():
        species = {"al": {"Al"}, "sige": {"Si", "Ge"}}[material]
        fitting = {n: m for n, m in models.items() if species <= set(m.spec.species)}
        tests: dict[str, list[TestData]] = {n: find_tests(m, material, folder)[0] for n, m in fitting.items()}
        for name in reversed(names):
            found = {n: next(t for t in ts if t.set.name == name) for n, ts in tests.items()}
            common = set.intersection(*(set(t.indices) for t in found.values())) if found else set()
            if not common:
                continue
            for label, test in found.items():
                shared = TestData(test.set, test.dataset, tuple(sorted(common)))
                part = Part(material, label, fitting[label], [shared], find_tests(fitting[label], material, folder)[1])
                values = _measured(part, shared, work, results, snapshots)
                seconds = label_seconds(fitting[label], folder)
                rows.append(
                    {
                        "name": label,
                        "set": name,
                        "rmse": float(np.sqrt(np.mean([v["metrics"]["rmse"] ** 2 for v in values]))),
                        "epistemic": float(np.sqrt(np.mean([v["metrics"]["epistemic_rms"] ** 2 for v in values]))),
                        "hours": None if seconds is None else seconds / 3600,
                    }
                )
            break
    return rows


def _measured(part: Part, test: TestData, work: Work, results: Results, snapshots: int | None) -> list[dict[str, Any]]:
    from gpurho.pipelines.paper_plan import measure_task

    if part.model is None or test.dataset is None:
        return []
    tasks = [measure_task(work, part.model, test, i) for i in test.spread(snapshots)]
    return [results.make(task.key, task.compute) for task in tasks]


def _guides(parts: dict[str, Part], results: Results) -> dict[str, list[dict[str, Any]]]:
    """Divergences between sizes, where there are labels of two or more."""
    from gpurho.transfer import size_guide

    guides = {}
    for material, names in GUIDE_SETS.items():
        part = parts[material]
        data = [t.dataset for t in part.tests if t.set.name in names and t.dataset is not None]
        if part.model is None or len(data) < 2:
            continue
        descriptor = part.model.spec.descriptor
        inputs = [[d.fingerprint() for d in data], descriptor.to_dict(), GUIDE_POINTS]
        key = entry_key("guide", material, *inputs)
        values = results.make(key, lambda d=data, s=descriptor: (size_guide(d, s, GUIDE_POINTS).to_dict(), {}))
        guides[material] = values["sizes"]
    return guides


def _candidates(path: Path) -> list[dict[str, Any]]:
    """Candidates in a record of ``gpurho select``."""
    try:
        record = json.loads(path.read_text())
        candidates = list(record["candidates"].values())
        fitting = all({"series", "n_features", "rmse"} <= set(c) for c in candidates)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fitting, candidates = False, []
    if not fitting or not candidates:
        raise DatasetError(f"{path} is no record of gpurho select; give the file of its --out")
    return candidates


__all__ = ["PaperResult", "paper"]
