"""Train a model on data sets: split, train, calibrate, evaluate, save."""

from __future__ import annotations

import glob
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gpurho.datasets import Dataset, open_dataset
from gpurho.ddp import check_devices, run_distributed
from gpurho.errors import OutputExistsError, SettingsError
from gpurho.evaluator import resolve_device
from gpurho.model import write_atomic
from gpurho.pipelines.evaluate import EvaluationReport, evaluate
from gpurho.store import lock_output
from gpurho.training import Start, Trainer, TrainingSettings, torch_threads, training_record
from gpurho.trainingset import Split, check_apart, split_all, valence_electrons
from gpurho.trainlog import StepBar
from gpurho.trainsettings import model_entries, setting_words, settings_of_model

if TYPE_CHECKING:
    from gpurho.model import DensityModel

Source = Dataset | str | os.PathLike[str]

LEARN = "learn"
"""Radial channels that are fitted to the training snapshots."""

SHARED_WIDTH = 128
"""Width of a network from which on threads share the work of its steps. Measured at 32 on two cores: one thread takes
34 s, two take 44."""

CHANNEL_EPOCHS = 12
CHANNEL_POINTS = 120_000
"""Epochs and points of that fit: measured to be enough on 39 snapshots of 32 atoms."""


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
    splits : list of Split
        One for every data set.
    history : list of dict
        One row per epoch, as in the CSV log beside the model.
    metrics : EvaluationReport or None
        On the test snapshots of the first data set that has any; `reports` has one of each.
    seconds : float
    """

    model: DensityModel
    path: Path
    settings: TrainingSettings
    splits: list[Split]
    history: list[dict[str, float]]
    reports: list[EvaluationReport]
    seconds: float

    @property
    def split(self) -> Split:
        """The split of the first data set."""
        return self.splits[0]

    @property
    def metrics(self) -> EvaluationReport | None:
        """The first of `reports`."""
        return self.reports[0] if self.reports else None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        reports = [report.to_dict() for report in self.reports]
        return {"out": str(self.path), "seconds": self.seconds, "epochs": self.history, "reports": reports}

    def __str__(self) -> str:
        used = [sum(len(getattr(s, use)) for s in self.splits) for use in ("train", "validation", "test")]
        counts = f"{used[0]} training, {used[1]} validation, {used[2]} test snapshots"
        text = f"{self.path}: trained in {self.seconds:.0f} s on {counts}"
        return "\n".join([text, *(str(report) for report in self.reports)])


def train(
    dataset: Source | Sequence[Source],
    out: str | os.PathLike[str],
    *,
    test: Sequence[Any] | None = None,
    validation: Sequence[Any] | None = None,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.1,
    threads: int | None = None,
    device: str = "cpu",
    devices: int = 1,
    resume: bool = True,
    overwrite: bool = False,
    keep_checkpoint: bool = False,
    progress: bool = True,
    tensorboard: str | os.PathLike[str] | None = None,
    dft: dict[str, Any] | None = None,
    start: Start | None = None,
    contraction: Any = LEARN,
    **settings: Any,
) -> TrainResult:
    """Train a Bayesian network on data sets and write the model file.

    Parameters
    ----------
    dataset : Dataset or path, or a list of them
    out : path
        The model file, ``.safetensors``. Its checkpoint (``.checkpoint``) and log (``.csv``) lie beside it.
    test, validation : indices of snapshots, optional
        Snapshots held out, for several data sets one list for each; by default `test_fraction` and
        `validation_fraction` of each, spread over temperatures. Validation snapshots decide when to stop and calibrate
        the error bars; test snapshots are only evaluated.
    threads : int, optional
        Torch threads while training; by default one for narrow networks on a CPU, and otherwise torch's own number.
    device : str
        "cpu" or a CUDA device.
    devices : int
        Processes that share every batch: as many GPUs, or processes on the CPU.
    resume : bool
        Go on from the checkpoint of an interrupted run; with False it is removed.
    overwrite : bool
        Replace an existing model file.
    keep_checkpoint : bool
        Keep the checkpoint of the finished run.
    progress : bool
        Show a progress bar.
    tensorboard : path, optional
        Folder for TensorBoard's event files.
    dft : dict, optional
        Settings of the labels, for the specification; added to what the data set says.
    start : Start, optional
        A model to go on from; see `gpurho.pipelines.transfer.transfer`.
    contraction : "learn", None, or nested tuples (n_species, n_basis, n_radial)
        Radial channels of the family "smooth": learned from the training snapshots first (`fit_contraction`), the
        first `n_basis` Chebyshev functions, or as given.
    **settings
        Entries of `TrainingSettings`: family, epochs, points_per_snapshot, patience, seed, ...

    Raises
    ------
    OutputExistsError
        When `out` exists and `overwrite` is False.
    StoreError
        When another process trains to the same `out`, or its folder cannot be written.
    MissingDependencyError
        When TensorBoard is asked for and not installed.
    DatasetError, SettingsError, ModelError, DeviceError
    """
    started = time.perf_counter()
    path = Path(out)
    if path.suffix != ".safetensors":
        raise SettingsError(f"model file {str(path)!r} must end in .safetensors")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or ask to overwrite it")
    if not path.parent.is_dir():
        raise SettingsError(f"folder {str(path.parent)!r} of the model file does not exist; make it first")
    if start is not None and not isinstance(start, Start):
        raise SettingsError(f"start {start!r} is not a Start; see gpurho transfer")
    known = {f.name for f in fields(TrainingSettings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise SettingsError(f"settings {unknown} are not known; training has {', '.join(sorted(known))}")
    if contraction not in (LEARN, None):
        settings["contraction"] = contraction
    chosen = TrainingSettings(**settings) if start is None else settings_of_model(start.model.spec, **settings)
    sources = [dataset] if isinstance(dataset, Dataset | str | os.PathLike) else list(dataset)
    if not sources:
        raise SettingsError("no data set was given; name at least one HDF5 file")
    data = [d if isinstance(d, Dataset) else open_dataset(d) for d in sources]
    splits = split_all(data, test, validation, test_fraction, validation_fraction)
    if len(data) > 1:
        check_apart(data, splits)
    check_devices(resolve_device(device), devices, chosen.batch_size)
    checkpoint = path.with_suffix(".checkpoint")
    learned = checkpoint.with_suffix(".channels.json")
    with _alone(path, checkpoint, learned):
        if path.exists() and not overwrite:
            raise OutputExistsError(f"{path} was finished by another run; choose another name or ask to overwrite it")
        if not resume:
            learned.unlink(missing_ok=True)
        with torch_threads(_training_threads(chosen, device, devices) if threads is None else threads):
            if start is None and contraction == LEARN and chosen.family == "smooth" and chosen.n_basis * chosen.l_max:
                chosen = replace(chosen, contraction=learn_channels(data, splits, chosen, learned, progress))
            trainer = Trainer(data, splits, chosen, checkpoint, device=device, start=start, tensorboard=tensorboard)
            if not resume:
                trainer.clean()
            if devices == 1:
                with StepBar(progress) as bar:
                    model = trainer.run(bar)
            else:
                model = run_distributed(trainer, devices, progress)
            model = trainer.calibrated(model)
        command = training_command(data, path, splits, chosen, threads, dft, devices, start, contraction)
        model = model.with_spec(
            training=training_record(trainer, command),
            dft={**_label_settings(data, splits), **(dft or {})},
            provenance=_provenance(),
            library_version=_version(),
        )
        reports = [
            evaluate(model, d, snapshots=s.test, device=device, progress=progress)
            for d, s in zip(data, splits, strict=True)
            if s.test
        ]
        if reports:
            model = with_metrics(model, reports[0], reports)
        model.save(path)
        if keep_checkpoint:
            trainer.data.remove_scratch()
        else:
            trainer.clean()
            learned.unlink(missing_ok=True)
    return TrainResult(model, path, chosen, splits, trainer.history, reports, time.perf_counter() - started)


def _training_threads(settings: TrainingSettings, device: str, devices: int) -> int | None:
    """One thread where the work of a step is too small to be shared; None for torch's own number."""
    return 1 if settings.width < SHARED_WIDTH and devices == 1 and resolve_device(device).type == "cpu" else None


@contextmanager
def _alone(*files: Path) -> Iterator[None]:
    """Keep other runs from the first of `files`, and remove what killed ones left of writing any of them."""
    lock = lock_output(files[0])
    try:
        for file in files:
            for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def learn_channels(
    data: Sequence[Dataset], splits: Sequence[Split], settings: TrainingSettings, path: Path, progress: bool = False
) -> Any:
    """Radial channels fitted to the training snapshots; kept in `path`, from which a resumed run takes them."""
    from gpurho.contraction import fit_contraction

    species = sorted(valence_electrons(*data))
    spec = replace(settings, contraction=None).descriptor(species)
    identity = {
        "spec": spec.to_dict(),
        "seed": settings.seed,
        "data": [[d.fingerprint(), list(s.train)] for d, s in zip(data, splits, strict=True)],
    }
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        record = json.loads(path.read_text())
        if record["identity"] == json.loads(json.dumps(identity)):
            return record["contraction"]
    snapshots = [d[i] for d, s in zip(data, splits, strict=True) for i in s.train]
    with tqdm(desc="radial channels", unit="epoch", total=CHANNEL_EPOCHS, disable=None if progress else True) as bar:
        fit = fit_contraction(
            snapshots,
            spec,
            points_per_snapshot=max(1, min(3000, CHANNEL_POINTS // len(snapshots))),
            epochs=CHANNEL_EPOCHS,
            seed=settings.seed,
            on_epoch=lambda epoch, loss: (bar.set_postfix_str(f"loss {loss:.4f}"), bar.update(), None)[2],
        )
    write_atomic(path, json.dumps({"identity": identity, "contraction": fit.spec.contraction}).encode())
    return fit.spec.contraction


def with_metrics(
    model: DensityModel, report: EvaluationReport, reports: Sequence[EvaluationReport] = ()
) -> DensityModel:
    """The model with the figures of `report` in its specification, and the totals of several by data set."""
    total = report.total
    names = ("coverage", "miscalibration_area", "nll", "spearman", "aleatoric_rms", "epistemic_rms")
    return model.with_spec(
        metrics={
            "use": "test",
            "dataset": report.dataset,
            "precision": report.precision,
            **{k: v for k, v in total.items() if k not in names},
            "by_snapshot": {str(s.snapshot): s.metrics.l1_per_electron for s in report.snapshots},
            **({"by_dataset": [{"dataset": r.dataset, **r.total} for r in reports]} if len(reports) > 1 else {}),
        },
        calibration={"use": "test", "uncertainty": report.uncertainty, **{k: total[k] for k in names if k in total}},
    )


def training_command(
    data: Sequence[Dataset],
    path: Path,
    splits: Sequence[Split],
    settings: TrainingSettings,
    threads: int | None,
    dft: dict[str, Any] | None,
    devices: int = 1,
    start: Start | None = None,
    contraction: Any = LEARN,
) -> str:
    """The command line that repeats a run: the split by name, and settings that are not the defaults."""
    files = [d.path.name for d in data]
    named = {use: [list(getattr(s, use)) for s in splits] for use in ("test", "validation")}
    values: dict[str, Any] = {k: v[0] if len(v) == 1 else v for k, v in named.items()}
    values |= setting_words(settings)
    if contraction == LEARN or settings.family != "smooth":
        values.pop("contraction", None)
    elif contraction is None:
        values["contraction"] = None
    if start is None:
        words = ["gpurho", "train", *files, "--out", path.name]
    else:
        words = ["gpurho", "transfer", start.name, *files, "--out", path.name]
        words += ["--freeze-layers", str(start.frozen_layers), "--prior", start.prior]
        values = {k: v for k, v in values.items() if k not in model_entries(start.model.spec)}
    if threads is not None:
        values["threads"] = threads
    if dft:
        values["dft"] = dft
    if devices > 1:
        values["devices"] = devices
    for key, value in values.items():
        if key in ("epochs", "seed", "devices"):
            words += [f"--{key}", str(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            words += ["--set", f"{key}={text}"]
    return shlex.join(words)


def _label_settings(data: Sequence[Dataset], splits: Sequence[Split]) -> dict[str, Any]:
    known = ("kpts", "engine", "family", "pseudopotentials", "functional", "cutoff_eV")
    for d, s in zip(data, splits, strict=True):
        if s.train:
            return {k: v for k, v in d.meta(s.train[0]).items() if k in known}
    return {}


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
