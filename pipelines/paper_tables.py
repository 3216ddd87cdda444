"""Tables IV, V and VI of the paper from our results: ours, the paper's and the target beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpurho.eos import EquationOfState, fit_eos
from gpurho.errors import SettingsError
from gpurho.metrics import COVERAGE_GAUSSIAN
from gpurho.pipelines.paper_plan import Part
from gpurho.pipelines.paper_sets import PAPER_ROWS, SETS
from gpurho.pipelines.paper_store import Results
from gpurho.units import BOHR

DENSITY = (("l1", "L1 per electron"), ("rmse", "RMSE, e/Bohr^3"), ("nrmse", "NRMSE"))
ENERGY = (
    ("energy", "ground-state energy, Ha/atom"),
    ("xc", "exchange-correlation energy, Ha/atom"),
    ("fermi_level", "Fermi level, Ha"),
    ("eigenvalue", "largest eigenvalue error, Ha"),
)


@dataclass(frozen=True)
class Cell:
    """A figure: ours, the paper's, and the project's target, each None where there is none."""

    ours: float | None = None
    paper: float | None = None
    target: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether ours is within the target; None where one of the two is missing."""
        return None if self.ours is None or self.target is None else bool(self.ours <= self.target)


@dataclass(frozen=True)
class Row:
    """A line of a table: the paper's case, ours, how many snapshots (densities, energies), and the figures by name."""

    name: str
    paper_case: str
    our_case: str
    snapshots: int
    energies: int
    cells: dict[str, Cell]


@dataclass(frozen=True)
class LatticeRow:
    """Table VI for one supercell; lattice parameters in Bohr, bulk moduli in GPa, differences as shares."""

    repeat: int
    our_case: str
    points: int
    ours: dict[str, tuple[float, float]]
    paper: dict[str, tuple[float, float]]
    differences: tuple[float, float] | None
    paper_differences: tuple[float, float]
    targets: tuple[float, float]
    curves: dict[str, EquationOfState] = field(default_factory=dict)


def measured_values(part: Part, results: Results, name: str) -> list[dict[str, Any]]:
    """The finished metrics of a data set."""
    return [v for task in part.measured.get(name, []) if (v := results.get(task.key)) is not None]


def energy_values(part: Part, results: Results, name: str) -> list[dict[str, Any]]:
    """The finished energies of a data set."""
    return [v for task in part.energies.get(name, []) if (v := results.get(task.key)) is not None]


def density_means(values: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean L1 per electron and NRMSE, root mean square RMSE (e/Bohr^3) of some snapshots."""
    metrics = [v["metrics"] for v in values]
    return {
        "l1": float(np.mean([m["l1_per_electron"] for m in metrics])),
        "rmse": float(np.sqrt(np.mean([m["rmse_bohr"] ** 2 for m in metrics]))),
        "nrmse": float(np.mean([m["nrmse"] for m in metrics])),
    }


def energy_means(values: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean absolute errors of some snapshots, by column; of eigenvalues where they are known."""
    means = {}
    for name, _ in ENERGY:
        known = [abs(v[name]) for v in values if v[name] is not None]
        if known:
            means[name] = float(np.mean(known))
    return means


def accuracy_table(part: Part, results: Results, numbers: dict[str, Any]) -> list[Row]:
    """Table IV (Al) or V (SiGe), one row for each of the paper's; snapshots have the same weight in the last."""
    material = part.material
    ours = {one.row: one for one in SETS if one.material == material and one.row is not None}
    everything: list[dict[str, Any]] = []
    all_energies: list[dict[str, Any]] = []
    rows = []
    for name, case in PAPER_ROWS[material].items():
        one = ours.get(name)
        if one is None:
            if name != "all":
                rows.append(_row(name, case, "no labels of this size", [], [], material, numbers))
            continue
        values, energies = (f(part, results, one.name) for f in (measured_values, energy_values))
        everything += values
        all_energies += energies
        rows.append(
            _row(name, case, one.label if values else _why(part, one.name), values, energies, material, numbers)
        )
    rows.append(_row("all", PAPER_ROWS[material]["all"], "all of these", everything, all_energies, material, numbers))
    return rows


def lattice_table(part: Part, results: Results, numbers: dict[str, Any]) -> list[LatticeRow]:
    """Table VI: equations of state from the labels and from the Harris-Foulkes energies of predictions."""
    rows = []
    for one in SETS:
        if one.material != part.material or one.row is not None:
            continue
        paper = {k: (v[0], v[1]) for k, v in numbers["lattice"][str(one.repeat)].items()}
        values = energy_values(part, results, one.name)
        curves = {}
        for source, name in (("dft", "label_free_energy"), ("model", "free_energy")):
            try:
                curves[source] = fit_eos([v["volume"] for v in values], [v[name] for v in values])
            except SettingsError:
                continue
        found = {k: (c.lattice_parameter(4) / BOHR, c.bulk_modulus) for k, c in curves.items()}
        wanted = numbers["targets"]["lattice"]
        rows.append(
            LatticeRow(
                one.repeat,
                f"{one.label}, {len(values)} lattice parameters" if curves else _why(part, one.name),
                len(values),
                found,
                paper,
                _shares(found) if len(found) == 2 else None,
                _shares(paper),
                (wanted["lattice_parameter"], wanted["bulk_modulus"]),
                curves,
            )
        )
    return rows


def calibration_table(part: Part, results: Results, numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Coverage of 1, 2 and 3 sigma, and rank correlation of error and sigma, by data set; the paper gives none."""
    rows = []
    for name in part.measured:
        metrics = [v["metrics"] for v in measured_values(part, results, name)]
        if not metrics:
            continue
        wanted = numbers["targets"]["spearman"]
        one = next(s for s in SETS if s.name == name)
        target = wanted["vacancies" if one.row == "vacancies" else "held-out"]
        coverage = np.mean([m["coverage"] for m in metrics], axis=0)
        ranks = [m["spearman"] for m in metrics if m["spearman"] is not None]
        rows.append(
            {
                "set": f"{name}: {one.label}",
                "snapshots": len(metrics),
                "coverage": coverage.tolist(),
                "reached": (np.abs(coverage - COVERAGE_GAUSSIAN) <= numbers["targets"]["coverage"]).tolist(),
                "miscalibration_area": float(np.mean([m["miscalibration_area"] for m in metrics])),
                "nll": float(np.mean([m["nll"] for m in metrics])),
                "spearman": Cell(float(np.mean(ranks)) if ranks else None, None, target),
            }
        )
    return rows


def floor_values(part: Part, results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Errors of the energies of the labels' own densities, which no prediction can be expected to undercut."""
    return [(name, v) for name, task in part.floors.items() if (v := results.get(task.key)) is not None]


def _row(
    name: str,
    case: str,
    label: str,
    values: Sequence[dict[str, Any]],
    energies: Sequence[dict[str, Any]],
    material: str,
    numbers: dict[str, Any],
) -> Row:
    ours = (density_means(values) if values else {}) | energy_means(energies)
    paper = dict(zip(numbers["columns"], numbers["tables"][material][name], strict=True))
    for column in ("rmse", "nrmse"):
        if name in numbers[column][material]:
            paper[column] = numbers[column][material][name]
    targets = numbers["targets"][material].get(name, {})
    columns = [c for c, _ in (*DENSITY, *ENERGY)]
    cells = {c: Cell(ours.get(c), paper.get(c), targets.get(c)) for c in columns}
    return Row(name, case, label, len(values), len(energies), cells)


def _why(part: Part, name: str) -> str:
    """Why a data set gave nothing."""
    if part.model is None:
        return "no model"
    test = next(t for t in part.tests if t.set.name == name)
    if test.dataset is None:
        return f"no labels yet ({name}.h5)"
    if not test.indices:
        return f"every snapshot of {name}.h5 was trained on"
    return "not computed"


def _shares(pair: dict[str, tuple[float, float]]) -> tuple[float, float]:
    a, b = (abs(m / d - 1) for m, d in zip(pair["model"], pair["dft"], strict=True))
    return a, b


__all__ = [
    "DENSITY",
    "ENERGY",
    "Cell",
    "LatticeRow",
    "Row",
    "accuracy_table",
    "calibration_table",
    "density_means",
    "energy_values",
    "floor_values",
    "lattice_table",
    "measured_values",
]
