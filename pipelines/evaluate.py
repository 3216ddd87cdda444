"""Evaluate a model against reference densities: metrics and calibration by snapshot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpurho.calibration import ReliabilityBin, reliability
from gpurho.datasets import Dataset, Snapshot, open_dataset
from gpurho.descriptors import Environment
from gpurho.errors import DatasetError, SettingsError
from gpurho.evaluator import Evaluator
from gpurho.metrics import FieldMetrics, compare_fields
from gpurho.model import DensityModel, load_model
from gpurho.partition import make_tiles

USES = ("train", "validation", "test")

RELIABILITY_POINTS = 20_000
"""Points of each snapshot, evenly spread, that coverage by density is counted on."""


@dataclass(frozen=True)
class SnapshotMetrics:
    """Metrics of one snapshot and its place in the data set."""

    snapshot: int
    meta: dict[str, Any]
    metrics: FieldMetrics


@dataclass(frozen=True)
class CalibrationPoints:
    """Some points of all snapshots: predicted density, error, total sigma, (n,) each, e/angstrom^3."""

    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    sigma: NDArray[np.float64]


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics of a model on some snapshots of a data set.

    Attributes
    ----------
    snapshots : list of SnapshotMetrics
    total : dict
        Over all of them: root mean square of the RMSE, means of the other figures.
    use : str
        "test", "validation", "train", "all" or "chosen".
    points : CalibrationPoints or None
        For `reliability` and `plot`; None without uncertainty.
    """

    model: str
    dataset: str
    use: str
    uncertainty: str | None
    precision: str
    snapshots: list[SnapshotMetrics]
    points: CalibrationPoints | None = field(default=None, repr=False, compare=False)

    @property
    def reliability(self) -> list[ReliabilityBin]:
        """Coverage in ranges of the predicted density; empty without uncertainty."""
        p = self.points
        return [] if p is None else reliability(p.mean, p.error, p.sigma)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the calibration; see `gpurho.calibrationplot.plot_calibration`."""
        from gpurho.calibrationplot import plot_calibration

        p = self.points
        if p is None:
            raise SettingsError("a calibration plot needs sigmas; evaluate with an uncertainty")
        title = f"{self.model} on {self.use} snapshots of {self.dataset}, uncertainty {self.uncertainty}"
        plot_calibration(p.mean, p.error, p.sigma, os.fspath(path), title)

    @property
    def total(self) -> dict[str, Any]:
        """Figures over all snapshots, each snapshot with the same weight."""
        rows = [s.metrics.to_dict() for s in self.snapshots]
        total: dict[str, Any] = {"snapshots": len(rows), "n_points": sum(r["n_points"] for r in rows)}
        for name in ("rmse", "rmse_bohr", "aleatoric_rms", "epistemic_rms"):
            if rows[0][name] is not None:
                total[name] = float(np.sqrt(np.mean([r[name] ** 2 for r in rows])))
        for name in ("nrmse", "l1_per_electron", "r2", "coverage", "miscalibration_area", "nll", "spearman"):
            if rows[0][name] is not None:
                total[name] = np.mean([r[name] for r in rows], axis=0).tolist()
        total["l1_per_electron_max"] = max(r["l1_per_electron"] for r in rows)
        total["max_error"] = max(r["max_error"] for r in rows)
        return total

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "use": self.use,
            "uncertainty": self.uncertainty,
            "precision": self.precision,
            "total": self.total,
            "reliability": [asdict(row) for row in self.reliability],
            "snapshots": [{"snapshot": s.snapshot, "meta": s.meta, **s.metrics.to_dict()} for s in self.snapshots],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.use} snapshots of {self.dataset}"
            f" ({self.precision}, uncertainty {self.uncertainty})",
            "snapshot       T/K  RMSE e/A^3  RMSE e/Bohr^3   NRMSE  L1/electron      R2  max e/A^3"
            "  in 1s/2s/3s        NLL  rank",
        ]
        rows = [(f"{s.snapshot:8d}", s.meta.get("temperature_K"), s.metrics.to_dict()) for s in self.snapshots]
        for name, temperature, m in [*rows, ("   total", None, self.total)]:
            warm = "-" if temperature is None else f"{float(temperature):.0f}"
            line = (
                f"{name} {warm:>9s}  {m['rmse']:10.3e}  {m['rmse_bohr']:13.3e}  {m['nrmse']:6.2%}"
                f"  {m['l1_per_electron']:11.3e}  {m['r2']:6.4f}  {m['max_error']:9.2e}"
            )
            if m.get("coverage") is not None:
                share = "/".join(f"{c:.3f}" for c in m["coverage"])
                line += f"  {share}  {m['nll']:7.3f}  {m['spearman']:.2f}"
            lines.append(line)
        if self.points is not None:
            lines.append("density, e/A^3      points  RMSE e/A^3  sigma e/A^3  in 1s/2s/3s (exact 0.683/0.954/0.997)")
        for row in self.reliability:
            share = "/".join(f"{c:.3f}" for c in row.coverage)
            lines.append(
                f"{row.low:7.4f} to {row.high:7.4f} {row.n_points:7d}  {row.rmse:10.3e}  {row.sigma:11.3e}  {share}"
            )
        return "\n".join(lines)


def evaluate(
    model: DensityModel | str | os.PathLike[str],
    dataset: Dataset | str | os.PathLike[str],
    *,
    snapshots: str | Sequence[int] | None = None,
    device: str = "cpu",
    precision: str = "auto",
    uncertainty: str | None = "analytic",
    samples: int = 30,
    seed: int = 0,
    progress: bool = True,
) -> EvaluationReport:
    """Predict whole snapshots of a data set and compare.

    Parameters
    ----------
    model : DensityModel, name or path
    dataset : Dataset or path
    snapshots : "test", "validation", "train", "all", or indices; optional
        By default the test snapshots that the model names when it was trained on this data set, else all of them.
    device, precision, uncertainty, samples, seed
        As for `DensityModel.evaluator`.
    progress : bool
        Show a progress bar.

    Raises
    ------
    DatasetError
        For snapshots that are not there, or a use that the model does not record for this data set.
    UnknownSpeciesError
        For a snapshot with a species that the model does not know.
    """
    from tqdm import tqdm

    name = "model" if isinstance(model, DensityModel) else os.path.basename(str(model))
    trained = model if isinstance(model, DensityModel) else load_model(model)
    data = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    use, indices = choose_snapshots(trained, data, snapshots)
    evaluator = trained.evaluator(device, precision, uncertainty, samples, seed)
    results, points = [], []
    for i in tqdm(indices, desc="evaluate", unit="snapshot", disable=None if progress else True):
        snapshot = data[i]
        fields = predict_fields(trained, evaluator, snapshot)
        sigmas = (fields[1], fields[2]) if len(fields) == 3 else (None, None)
        metrics = compare_fields(snapshot.density, fields[0], snapshot.electrons, snapshot.grid.dv, *sigmas)
        results.append(SnapshotMetrics(i, data.meta(i), metrics))
        if len(fields) == 3:
            step = -(-fields[0].size // RELIABILITY_POINTS)
            mean, aleatoric, epistemic = (f.reshape(-1)[::step].astype(np.float64) for f in fields)
            reference = np.asarray(snapshot.density, np.float64).reshape(-1)[::step]
            points.append((mean, mean - reference, np.hypot(aleatoric, epistemic)))
    chosen = CalibrationPoints(*(np.concatenate(column) for column in zip(*points, strict=True))) if points else None
    return EvaluationReport(name, data.path.name, use, uncertainty, evaluator.precision, results, chosen)


def predict_fields(model: DensityModel, evaluator: Evaluator, snapshot: Snapshot) -> list[NDArray[np.float32]]:
    """Mean and, with uncertainty, aleatoric and epistemic sigma of a snapshot on its grid."""
    grid = snapshot.grid
    device = str(evaluator.device)
    environment = Environment(snapshot.structure, model.spec.descriptor, device)
    fields = [np.empty(grid.shape, np.float32) for _ in range(1 if evaluator.uncertainty is None else 3)]
    for tile in make_tiles(grid):
        values = environment.tile_features(grid, tile).values
        results = evaluator(values if isinstance(values, torch.Tensor) else torch.from_numpy(values))
        for field_, result in zip(fields, results, strict=False):
            if result is not None:
                field_[tile.slices] = result.cpu().numpy().reshape(tile.shape)
    return fields


def choose_snapshots(
    model: DensityModel, data: Dataset, snapshots: str | Sequence[int] | None
) -> tuple[str, list[int]]:
    """What `evaluate` takes for its argument `snapshots`: the use, and indices."""
    everything = list(range(len(data)))
    if snapshots is None or (isinstance(snapshots, str) and snapshots in USES):
        use = "test" if snapshots is None else str(snapshots)
        found = recorded_split(model, data).get(use)
        if found:
            return use, found
        if snapshots is None:
            return "all", everything
        raise DatasetError(f"the model does not record {use} snapshots of {data.path}; give 'all' or indices")
    if isinstance(snapshots, str):
        if snapshots == "all":
            return "all", everything
        raise DatasetError(
            f"snapshots {snapshots!r} are not known; give 'test', 'validation', 'train', 'all' or indices"
        )
    indices = [int(i) for i in snapshots]
    if not indices or any(not 0 <= i < len(data) for i in indices):
        raise DatasetError(
            f"snapshots {indices} are not among the {len(data)} of {data.path}; give 0 to {len(data) - 1}"
        )
    return "chosen", indices


def recorded_split(model: DensityModel, data: Dataset) -> dict[str, list[int]]:
    """The snapshots of a data set by use, as the model records them; empty where it was not trained on it."""
    record = model.spec.training
    first = {**record.get("dataset", {}), "split": record.get("split", {})}
    fingerprint = data.fingerprint()
    for entry in [first, *record.get("datasets", [])]:
        if entry.get("fingerprint") == fingerprint:
            return {use: [int(row["snapshot"]) for row in rows] for use, rows in entry["split"].items()}
    return {}
