"""Train a model on a data set: split, train, calibrate, evaluate, save."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.datasets import Dataset, open_dataset
from gpurho.errors import OutputExistsError, SettingsError
from gpurho.pipelines.evaluate import EvaluationReport, evaluate
from gpurho.training import Trainer, TrainingSettings, torch_threads, training_record
from gpurho.trainingset import Split, split_snapshots

if TYPE_CHECKING:
    from gpurho.model import DensityModel


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    Attributes
    ----------
    model : DensityModel
        With calibration factors and, where there are test snapshots, their metrics in its specification.
    path : Path
        The model file.
    settings : TrainingSettings
    split : Split
    history : list of dict
        One row per epoch, as in the CSV log beside the model.
    metrics : EvaluationReport or None
        On the test snapshots.
    seconds : float
    """

    model: DensityModel
    path: Path
    settings: TrainingSettings
    split: Split
    history: list[dict[str, float]]
    metrics: EvaluationReport | None
    seconds: float

    def __str__(self) -> str:
        s = self.split
        counts = f"{len(s.train)} training, {len(s.validation)} validation, {len(s.test)} test snapshots"
        text = f"{self.path}: trained in {self.seconds:.0f} s on {counts}"
        return text if self.metrics is None else f"{text}\n{self.metrics}"


def train(
    dataset: Dataset | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    test: Sequence[int] | None = None,
    validation: Sequence[int] | None = None,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.1,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    keep_checkpoint: bool = False,
    progress: bool = True,
    dft: dict[str, Any] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a Bayesian network on a data set and write the model file.

    Parameters
    ----------
    dataset : Dataset or path
    out : path
        The model file, ``.safetensors``. Its checkpoint (``.checkpoint``) and log (``.csv``) lie beside it.
    test, validation : indices of snapshots, optional
        Snapshots held out; by default `test_fraction` and `validation_fraction` of them, spread over temperatures.
        Validation snapshots calibrate the error bars; test snapshots are only evaluated.
    threads : int, optional
        Torch threads while training.
    resume : bool
        Go on from the checkpoint of an interrupted run; with False it is removed.
    overwrite : bool
        Replace an existing model file.
    keep_checkpoint : bool
        Keep the checkpoint of the finished run.
    progress : bool
        Show a progress bar.
    dft : dict, optional
        Settings of the labels, for the specification; added to what the data set says.
    **settings
        Entries of `TrainingSettings`: epochs, points_per_snapshot, kl_weight, seed, ...

    Raises
    ------
    OutputExistsError
        When `out` exists and `overwrite` is False.
    DatasetError, SettingsError, ModelError
    """
    from tqdm import tqdm

    started = time.perf_counter()
    path = Path(out)
    if path.suffix != ".safetensors":
        raise SettingsError(f"model file {str(path)!r} must end in .safetensors")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or ask to overwrite it")
    if not path.parent.is_dir():
        raise SettingsError(f"folder {str(path.parent)!r} of the model file does not exist; make it first")
    known = {f.name for f in fields(TrainingSettings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise SettingsError(f"settings {unknown} are not known; training has {', '.join(sorted(known))}")
    chosen = TrainingSettings(**settings)
    data = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    split = split_snapshots(data, test, validation, test_fraction, validation_fraction)
    checkpoint = path.with_suffix(".checkpoint")
    if not resume:
        checkpoint.unlink(missing_ok=True)
    with torch_threads(threads):
        trainer = Trainer(data, split, chosen, checkpoint)
        bar = tqdm(desc="train", unit="step", disable=not progress, mininterval=1.0)

        def on_step(run: Trainer, likelihood: float) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = run.n_steps, run.step - 1, run.step - 1
            bar.set_postfix_str(f"nll {likelihood:.3f}" + _last_validation(run.history), refresh=False)
            bar.update()

        with bar:
            model = trainer.run(on_step)
        model = trainer.calibrated(model)
        model = model.with_spec(
            training=training_record(trainer, training_command(data, path, split, chosen, threads, dft)),
            dft={**_label_settings(data, split), **(dft or {})},
            provenance=_provenance(),
            library_version=_version(),
        )
        report = None
        if split.test:
            report = evaluate(model, data, snapshots=split.test, progress=progress)
            model = with_metrics(model, report)
    model.save(path)
    if not keep_checkpoint:
        checkpoint.unlink(missing_ok=True)
    return TrainResult(model, path, chosen, split, trainer.history, report, time.perf_counter() - started)


def with_metrics(model: DensityModel, report: EvaluationReport) -> DensityModel:
    """The model with the figures of `report` in its specification."""
    total = report.total
    names = ("coverage", "miscalibration_area", "nll", "spearman", "aleatoric_rms", "epistemic_rms")
    return model.with_spec(
        metrics={
            "use": "test",
            "dataset": report.dataset,
            "precision": report.precision,
            **{k: v for k, v in total.items() if k not in names},
            "by_snapshot": {str(s.snapshot): s.metrics.l1_per_electron for s in report.snapshots},
        },
        calibration={"use": "test", "uncertainty": report.uncertainty, **{k: total[k] for k in names if k in total}},
    )


def training_command(
    data: Dataset, path: Path, split: Split, settings: TrainingSettings, threads: int | None, dft: dict[str, Any] | None
) -> str:
    """The command line that repeats a run: the split by name, and settings that are not the defaults."""
    words = ["gpurho", "train", data.path.name, "--out", path.name]
    default = asdict(TrainingSettings())
    values: dict[str, Any] = {"test": list(split.test), "validation": list(split.validation)}
    values |= {k: v for k, v in asdict(settings).items() if v != default[k]}
    if threads is not None:
        values["threads"] = threads
    if dft:
        values["dft"] = dft
    for key, value in values.items():
        if key in ("epochs", "seed"):
            words += [f"--{key}", str(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            words += ["--set", f"{key}={text}"]
    return shlex.join(words)


def _last_validation(history: list[dict[str, float]]) -> str:
    return f", validation RMSE {history[-1]['validation_rmse']:.2e} e/A^3" if history else ""


def _label_settings(data: Dataset, split: Split) -> dict[str, Any]:
    known = ("kpts", "engine", "family", "pseudopotentials", "functional", "cutoff_eV")
    return {k: v for k, v in data.meta(split.train[0]).items() if k in known}


def _provenance() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    return {"torch": torch.__version__, "numpy": version("numpy"), "python": platform.python_version()}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gpurho")
    except PackageNotFoundError:
        return "0+unknown"
