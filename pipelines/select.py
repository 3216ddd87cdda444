"""Choose descriptors by measurement: ``gpurho select al32.h5 --out select.json``."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.datasets import Dataset, open_dataset
from gpurho.descriptors import DescriptorSpec, Environment
from gpurho.errors import SettingsError, StoreError
from gpurho.journal import Lock
from gpurho.model import DensityModel, write_atomic
from gpurho.partition import Tile
from gpurho.pipelines.train import LEARN, learn_channels
from gpurho.selection import SEARCHES, SMOOTH_START, SearchSettings, Sizes
from gpurho.training import Trainer, TrainingSettings, torch_threads
from gpurho.trainingset import Split, split_all
from gpurho.units import PER_ANGSTROM3
from gpurho.versions import NEWEST, check_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Source = Dataset | str | os.PathLike[str]

FORMAT = "gpurho-selection"

BUDGETS: dict[str, dict[str, Any]] = {
    "scalar-product": {"points_per_snapshot": 4000, "epochs": 20, "blocks": 2, "layers": 2, "width": 64},
    "smooth": {"points_per_snapshot": 4000, "epochs": 20, "blocks": 2, "layers": 2, "width": 32},
}
"""How candidates are trained where the caller does not say: enough to rank them, in about a minute each. Networks are
deterministic, because the noise of sampled weights would hide small differences."""

COMMON_BUDGET: dict[str, Any] = {
    "estimator": "none",
    "schedule": "one-cycle",
    "batch_size": 512,
    "learning_rate": 4e-3,
}

TIMED_EDGE = 24
"""Costs are those of a tile of so many points along each axis."""

TIMED_RUNS = 3


@dataclass(frozen=True)
class Candidate:
    """Descriptors that were tried.

    Attributes
    ----------
    series : str
        What asked for them: "distances", "k = 3", "cutoff", ...
    sizes : dict
        Settings of the descriptors.
    n_features : int
    rmse : float, e/angstrom^3
        On the validation snapshots; mean over the repeats.
    spread : float, e/angstrom^3
        Standard deviation over the repeats; 0 for one.
    feature_seconds, network_seconds : float
        Per grid point, of the descriptors and of the network, on this machine; on a CPU, those of all its cores
        together, which do not depend on what else runs there.
    train_seconds : float
        Of all repeats.
    """

    series: str
    sizes: Sizes
    n_features: int
    rmse: float
    spread: float
    feature_seconds: float
    network_seconds: float
    train_seconds: float

    @property
    def seconds_per_point(self) -> float:
        """Cost of a grid point: descriptors and network."""
        return self.feature_seconds + self.network_seconds


@dataclass(frozen=True)
class SelectionResult:
    """What was tried, and the choice.

    Attributes
    ----------
    family : str
    candidates : list of Candidate
        In the order of the search, each once.
    choice : Candidate
    record : Path
        The JSON file of all that was measured.
    """

    family: str
    candidates: list[Candidate]
    choice: Candidate
    record: Path

    @property
    def settings(self) -> dict[str, Any]:
        """Entries of `TrainingSettings` that train a model with the choice."""
        return {"family": self.family, **self.choice.sizes}

    def __str__(self) -> str:
        names = list(self.choice.sizes)
        width = max(len(c.series) for c in self.candidates)
        head = f"{'':2}{'series':{width}}  " + "  ".join(names)
        lines = [f"{head}  features  RMSE e/A^3  e/Bohr^3   descriptors + network, core us per point   training s"]
        for c in self.candidates:
            sizes = "  ".join(f"{c.sizes[n]:>{len(n)}g}" for n in names)
            spread = f" +- {c.spread:.1e}" if c.spread else ""
            lines.append(
                f"{'* ' if c is self.choice else '  '}{c.series:{width}}  {sizes}  {c.n_features:8d}  {c.rmse:10.3e}"
                f"  {c.rmse * PER_ANGSTROM3:8.2e}{spread}  {1e6 * c.feature_seconds:8.2f} +"
                f" {1e6 * c.network_seconds:.2f} = {1e6 * c.seconds_per_point:.2f}   {c.train_seconds:8.1f}"
            )
        words = " ".join(f"--set {name}={value}" for name, value in self.settings.items())
        return "\n".join([*lines, f"choice: {words}"])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Error against the number of descriptors (Fig. 15 of the paper) and against the cost of a point."""
        return plot_selection(self, path)


def select(
    dataset: Source | Sequence[Source],
    out: str | os.PathLike[str],
    *,
    family: str = "scalar-product",
    search: SearchSettings | None = None,
    repeats: int = 1,
    test: Sequence[Any] | None = None,
    validation: Sequence[Any] | None = None,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.1,
    contraction: str | None = LEARN,
    threads: int | None = None,
    device: str = "cpu",
    plot: bool = True,
    progress: bool = True,
    **settings: Any,
) -> SelectionResult:
    """Train networks on ever more descriptors until the error on the validation snapshots settles.

    Family "scalar-product": Algorithms 2 and 3 of the preprint. Family "smooth": cutoff, n_basis, l_max and n_radial
    grow one after the other. All candidates learn from the same points of the same snapshots; test snapshots are not
    touched.

    Parameters
    ----------
    dataset : Dataset or path, or a list of them
    out : path
        Record of every candidate, ``.json``; rewritten whole after each of them. What it already holds of the same
        settings, data and split is taken from it, so that a run which was killed goes on. The plot lies beside it.
    family : "scalar-product" or "smooth"
    search : SearchSettings, optional
        Steps, tolerances, limits.
    repeats : int
        Trainings of each candidate, with seeds that follow the one in `settings`; the mean error counts.
    test, validation, test_fraction, validation_fraction
        The split, as in `gpurho.pipelines.train.train`.
    contraction : "learn" or None
        Radial channels of the smooth family: learned for each candidate, as ``gpurho train`` does, or the first
        `n_basis` Chebyshev functions, which takes less time.
    threads : int, optional
        Torch threads while training.
    device : str
    plot : bool
        Draw ``.png`` beside the record.
    progress : bool
        Print a line for each candidate when it is measured.
    **settings
        Entries of `TrainingSettings` that all candidates have; `BUDGETS` says what they are otherwise.

    Raises
    ------
    SettingsError
        Also for settings that the search is to find.
    StoreError
        When another run writes to `out`, or it is no such record.
    DatasetError, ModelError, DeviceError
    """
    if family not in SEARCHES:
        raise SettingsError(f"family {family!r} is not known; give one of {', '.join(SEARCHES)}")
    path = Path(out)
    if path.suffix != ".json":
        raise SettingsError(f"record {str(path)!r} must end in .json")
    if not path.parent.is_dir():
        raise SettingsError(f"folder {str(path.parent)!r} of the record does not exist; make it first")
    if repeats < 1:
        raise SettingsError(f"repeats {repeats!r} is not a whole number from 1 up")
    found = search or SearchSettings()
    if contraction not in (LEARN, None):
        raise SettingsError(f"contraction {contraction!r} fits no series of sizes; give {LEARN!r} or None")
    searched = set(SMOOTH_START) if family == "smooth" else {"n_distances", "n_angle_atoms", "n_angle_neighbors"}
    known = {f.name for f in fields(TrainingSettings)} - searched - {"family"}
    wrong = sorted(set(settings) - known)
    if wrong:
        raise SettingsError(f"settings {wrong} are the search's or not known; it takes {', '.join(sorted(known))}")
    base = TrainingSettings(**{"family": family, **COMMON_BUDGET, **BUDGETS[family], **settings})
    sources = [dataset] if isinstance(dataset, Dataset | str | os.PathLike) else list(dataset)
    if not sources:
        raise SettingsError("no data set was given; name at least one HDF5 file")
    data = [d if isinstance(d, Dataset) else open_dataset(d) for d in sources]
    splits = split_all(data, test, validation, test_fraction, validation_fraction)
    lock = Lock(path.with_name(f".{path.name}.lock"), path)
    try:
        learn = contraction == LEARN and family == "smooth"
        bench = _Bench(path, data, splits, base, repeats, device, learn, progress)
        with torch_threads(threads):
            sizes = SEARCHES[family](bench.measure, found)
        choice = next(c for c in bench.tried.values() if c.sizes == sizes)
        result = SelectionResult(family, list(bench.tried.values()), choice, path)
        if plot:
            result.plot(path.with_suffix(".png"))
    finally:
        lock.release()
    return result


class _Bench:
    """Trains candidates, measures them, and keeps the record."""

    def __init__(
        self,
        path: Path,
        data: list[Dataset],
        splits: list[Split],
        base: TrainingSettings,
        repeats: int,
        device: str,
        learn: bool,
        progress: bool,
    ) -> None:
        self.path, self.data, self.splits, self.base = path, data, splits, base
        self.repeats, self.device, self.learn, self.progress = repeats, device, learn, progress
        self.where = [[d.fingerprint(), asdict(s)] for d, s in zip(data, splits, strict=True)]
        self.known = _read_record(path)
        self.tried: dict[str, Candidate] = {}

    def measure(self, series: str, sizes: Sizes) -> float:
        """Error of descriptors: from the record, or by training."""
        settings = replace(self.base, **sizes)
        identity = {"settings": asdict(settings), "data": self.where, "repeats": self.repeats, "device": self.device}
        if self.learn:
            identity["contraction"] = LEARN
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        if key in self.tried:
            return self.tried[key].rmse
        if key not in self.known:
            files = self.path.with_name(f".{self.path.stem}.{key}")
            self.known[key] = asdict(self._train(series, settings, sizes, files))
            record = {"format": FORMAT, "format_version": NEWEST[FORMAT], "candidates": self.known}
            write_atomic(self.path, json.dumps(record, indent=1).encode())
            # Checkpoints stay until the record has their results, so that nothing is trained twice.
            for file in self.path.parent.iterdir():
                if file.name.startswith(f"{files.name}."):
                    file.unlink()
        candidate = Candidate(**{**self.known[key], "series": series})
        self.tried[key] = candidate
        if self.progress and sys.stderr.isatty():
            words = ", ".join(f"{name} {value:g}" for name, value in sizes.items())
            said = f"{series}: {words}: RMSE {candidate.rmse:.3e} e/A^3 ({candidate.train_seconds:.0f} s)"
            print(said, file=sys.stderr, flush=True)
        return candidate.rmse

    def _train(self, series: str, settings: TrainingSettings, sizes: Sizes, files: Path) -> Candidate:
        started = time.perf_counter()
        errors = []
        for i in range(self.repeats):
            seeded = replace(settings, seed=settings.seed + i)
            if self.learn and seeded.n_basis * seeded.l_max:
                kept = files.with_name(f"{files.name}.{i}.channels.json")
                seeded = replace(seeded, contraction=learn_channels(self.data, self.splits, seeded, kept))
            checkpoint = files.with_name(f"{files.name}.{i}.checkpoint")
            trainer = Trainer(self.data, self.splits, seeded, checkpoint, device=self.device)
            model = trainer.run()
            errors.append(trainer.validate()[0])
            trainer.data.remove_scratch()
        seconds = time.perf_counter() - started
        costs = self._costs(model, trainer.descriptor)
        n = trainer.descriptor.n_features
        return Candidate(series, sizes, n, float(np.mean(errors)), float(np.std(errors)), *costs, seconds)

    def _costs(self, model: DensityModel, descriptor: DescriptorSpec) -> tuple[float, float]:
        """Seconds per point of descriptors and network, the best of some runs over a tile."""
        import torch

        part, split = next((d, s) for d, s in zip(self.data, self.splits, strict=True) if s.validation)
        snapshot = part[split.validation[0]]
        n = [min(TIMED_EDGE, size) for size in snapshot.grid.shape]
        tile = Tile(0, (0, 0, 0), (n[0], n[1], n[2]))
        environment = Environment(snapshot.structure, descriptor, self.device)
        evaluate = model.evaluator(self.device)
        clock = time.perf_counter if self.device.startswith("cuda") else time.process_time
        best = [np.inf, np.inf]
        for _ in range(1 + TIMED_RUNS):  # the first compiles and warms up
            start = clock()
            values = environment.tile_features(snapshot.grid, tile).values
            features = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
            if features.is_cuda:
                torch.cuda.synchronize(features.device)
            middle = clock()
            mean, _, _ = evaluate(features)
            float(mean[0])  # waits for a GPU
            best = [min(best[0], middle - start), min(best[1], clock() - middle)]
        return best[0] / tile.n_points, best[1] / tile.n_points


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    record: Any = None
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(path.read_text())
    if isinstance(record, dict) and record.get("format") == FORMAT:
        check_version(record.get("format_version"), FORMAT, path, StoreError)
    else:
        raise StoreError(f"{path} is no record of gpurho select that this version reads; give another name")
    names = {f.name for f in fields(Candidate)}
    candidates: Any = record.get("candidates")
    if not isinstance(candidates, dict) or any(
        not isinstance(values, dict) or set(values) != names for values in candidates.values()
    ):
        raise StoreError(f"{path} is damaged; give another name, or remove it to measure everything again")
    found: dict[str, dict[str, Any]] = candidates
    return found


def plot_selection(result: SelectionResult, path: str | os.PathLike[str] | None = None) -> Figure:
    """Error against the number of descriptors, series by series, and against the cost of a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    markers = "osD^vP*X"
    line = "-" if result.family == "scalar-product" else ""
    for i, name in enumerate(dict.fromkeys(c.series for c in result.candidates)):
        members = [c for c in result.candidates if c.series == name]
        y = [1e3 * c.rmse for c in members]
        label = {"distances": "distances (set I)"}.get(name, f"angles, {name}" if name.startswith("k =") else name)
        for axes, x in ((left, [c.n_features for c in members]), (right, [1e6 * c.seconds_per_point for c in members])):
            axes.errorbar(
                x,
                y,
                yerr=[1e3 * c.spread for c in members] if any(c.spread for c in members) else None,
                color=f"C{i}",
                marker=markers[i % len(markers)],
                linestyle=line if axes is left else "",
                markersize=5,
                capsize=3,
                label=label,
            )
    if not line:
        # One size at a time grows, and not all that is tried is taken: in the order of the search.
        order = [(c.n_features, 1e3 * c.rmse) for c in result.candidates]
        left.plot(*zip(*order, strict=True), color="0.7", linewidth=0.8, zorder=0)
    choice = result.choice
    for axes, place in ((left, float(choice.n_features)), (right, 1e6 * choice.seconds_per_point)):
        axes.plot(
            place, 1e3 * choice.rmse, "o", markersize=14, markerfacecolor="none", markeredgecolor="k", label="choice"
        )
        axes.grid(alpha=0.3)
    words = ", ".join(f"{k} {v:g}" for k, v in choice.sizes.items())
    left.set(xlabel="number of descriptors", ylabel="RMSE on validation snapshots, $10^{-3}$ e/Å$^3$")
    right.set(xlabel="descriptors and network, core µs per grid point")
    left.legend(fontsize="small")
    figure.suptitle(f"{result.family}: {words}", fontsize="medium")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


__all__ = ["BUDGETS", "Candidate", "SelectionResult", "plot_selection", "select"]
