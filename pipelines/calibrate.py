"""Calibrate the error bars of a trained model, fit the posterior of its last layer, and note its training atoms."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gpurho.atomerrors import atom_errors
from gpurho.calibration import calibrate as fit_factors
from gpurho.calibration import fit_correlation_volume
from gpurho.datasets import Dataset, open_dataset
from gpurho.errors import DatasetError, ModelError, OutputExistsError, SettingsError
from gpurho.lastlayer import HeldOut, fit_last_layer
from gpurho.metrics import coverage, spearman
from gpurho.peratom import per_atom
from gpurho.pipelines.evaluate import choose_snapshots
from gpurho.pipelines.predict import predict
from gpurho.pipelines.traincommands import CALIBRATION_POINTS
from gpurho.trainingset import sample_points
from gpurho.truststats import fit_trust

if TYPE_CHECKING:
    from torch import Tensor

    from gpurho.model import DensityModel

INTEGRAL_SNAPSHOTS = 6
"""Most snapshots that are predicted whole for the error bars of integrals."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated model, and its coverage (1, 2, 3 sigma) and Spearman's rank correlation on the points fitted to.

    `trust` says what the model knows of its training atoms.
    """

    model: DensityModel
    path: Path | None
    snapshots: list[int]
    figures: dict[str, tuple[tuple[float, float, float], float]]
    trust: str = "as it was"

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        kinds = {
            kind: {"factors": vars(self.model.spec.factors(kind)), "coverage": list(shares), "rank_correlation": rank}
            for kind, (shares, rank) in self.figures.items()
        }
        out = None if self.path is None else str(self.path)
        last_layer = self.model.spec.last_layer
        return {"snapshots": self.snapshots, "kinds": kinds, "last_layer": last_layer, "trust": self.trust, "out": out}

    def __str__(self) -> str:
        lines = []
        if self.figures:
            lines.append(f"calibrated on {len(self.snapshots)} snapshots: {', '.join(map(str, self.snapshots))}")
        for kind, (shares, rank) in self.figures.items():
            factors = self.model.spec.factors(kind)
            curve = ", ".join(f"{f:.3f}" for f in factors.curve) or f"{factors.aleatoric:.3f}"
            inside = "/".join(f"{c:.3f}" for c in shares)
            lines.append(f"{kind:<10s} factor {curve}; in 1s/2s/3s {inside}, rank correlation {rank:.2f}")
            lines.append(f"           errors go together within {factors.correlation_volume:.2f} angstrom^3")
        if self.figures and self.model.spec.last_layer:
            lines.append("last layer " + ", ".join(f"{k} {v}" for k, v in self.model.spec.last_layer.items()))
        lines.append(f"trust      {self.trust}")
        return "\n".join(lines + ([f"wrote {self.path}"] if self.path else []))


def calibrate(
    model: DensityModel | str | os.PathLike[str],
    dataset: Dataset | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    snapshots: str | Sequence[int] = "validation",
    train: str | Sequence[int] | None = "train",
    refit: bool = False,
    noise: str = "learned",
    points: int = CALIBRATION_POINTS,
    seed: int = 0,
    overwrite: bool = False,
    known: Sequence[Dataset | str | os.PathLike[str]] = (),
    trust_only: bool = False,
    progress: bool = False,
) -> Calibration:
    """Fit the posterior of the last layer, calibrate "analytic" and "last-layer" error bars, note the training atoms.

    Parameters
    ----------
    model : DensityModel, name or path
    dataset : Dataset or path
    out : path, optional
        Model file to write, ``.safetensors``.
    snapshots : "validation", "all", or indices
        Snapshots held out, which the calibration is fitted to and the last layer's tempering chosen on.
    train : "train", indices, or None
        Snapshots that the last layer is fitted to, and whose atoms `gpurho.trust` compares with; with None both stay
        as they are.
    refit, noise
        See `gpurho.lastlayer.fit_last_layer`.
    points : int
        Grid points drawn from every snapshot.
    seed : int
    overwrite : bool
        Replace `out`.
    known : data sets or paths, optional
        More data that the model was trained on, for `gpurho.trust`: all snapshots of each.
    trust_only : bool
        Note the training atoms and leave all else as it is.
    progress : bool
        A progress bar, if standard error is a terminal.

    Raises
    ------
    DatasetError
        For snapshots that are not there, that the model does not record, or that are in both uses.
    OutputExistsError, SettingsError
    """
    from gpurho.model import DensityModel, load_model

    path = None if out is None else Path(out)
    if path is not None and path.suffix != ".safetensors":
        raise SettingsError(f"model file {str(path)!r} must end in .safetensors")
    if path is not None and path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or ask to overwrite it")
    if points < 100:
        raise SettingsError(f"points {points!r} are too few; give 100 or more")
    trained = model if isinstance(model, DensityModel) else load_model(model)
    data = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    if trust_only:
        if train is None:
            raise SettingsError("trust_only needs the training snapshots; give train (--train) other than none")
        trained, text = _with_trust(trained, data, choose_snapshots(trained, data, train)[1], known)
        if path is not None:
            trained.save(path)
        return Calibration(trained, path, [], {}, text)
    text = Calibration.trust
    _, held = choose_snapshots(trained, data, snapshots)
    whole = held[:: -(-len(held) // INTEGRAL_SNAPSHOTS)]
    n_fitted = 0 if train is None else len(choose_snapshots(trained, data, train)[1])
    # Two kinds of error bars, each with snapshots that are predicted whole.
    total = len(held) + n_fitted + 2 * len(whole)
    bar = tqdm(total=total, desc="calibrate", unit="snapshot", leave=False, disable=None if progress else True)

    def tick() -> None:
        bar.update()

    features, density, groups = _points(trained, data, held, points, seed, tick)
    if train is not None:
        _, fitted = choose_snapshots(trained, data, train)
        both = sorted(set(fitted) & set(held))
        if both:
            raise DatasetError(f"snapshots {both} are both fitted to and held out; name them apart")
        trained = fit_last_layer(
            trained,
            *_points(trained, data, fitted, points, seed, tick)[:2],
            held_out=HeldOut(features, density),
            noise=noise,
            refit=refit,
        )
        trained, text = _with_trust(trained, data, fitted, known)
    kinds = ["analytic", "last-layer"] if trained.spec.last_layer else ["analytic"]
    figures = {}
    for kind in kinds:
        trained = fit_factors(trained, features, density, groups, kind)
        mean, aleatoric, epistemic = trained.evaluator(precision="fp32", uncertainty=kind)(features)
        error = (mean - density).numpy()
        sigma = sum(part.double().square() for part in (aleatoric, epistemic) if part is not None) ** 0.5
        figures[kind] = (coverage(error, sigma), spearman(np.abs(error), sigma))
        trained = with_correlation_volume(trained, data, whole, kind, tick)
    bar.close()
    if path is not None:
        trained.save(path)
    return Calibration(trained, path, held, figures, text)


def _with_trust(
    model: DensityModel, data: Dataset, indices: Sequence[int], known: Sequence[Dataset | str | os.PathLike[str]]
) -> tuple[DensityModel, str]:
    """The model with the statistics of its training atoms, and a line about them."""
    structures = [data[i].structure for i in indices]
    for more in known:
        structures += [s.structure for s in (more if isinstance(more, Dataset) else open_dataset(more))]
    try:
        found = fit_trust(model, structures)
    except ModelError as error:
        return model, f"not known: {error}"
    stats = found.spec.trust
    assert stats is not None  # just fitted
    return found, f"{sum(stats.atoms)} atoms of {stats.snapshots} training snapshots, {stats.axes} + {stats.thin} axes"


def with_correlation_volume(
    model: DensityModel,
    data: Dataset,
    indices: Sequence[int],
    uncertainty: str,
    tick: Callable[[], None] | None = None,
) -> DensityModel:
    """The model with the correlation volume of one kind of error bars, from the electrons of atoms held out.

    The snapshots are predicted whole; `tick` is called after each.
    """
    columns = []
    for i in indices:
        snapshot = data[i]
        structure, grid = snapshot.structure, snapshot.grid
        rho = predict(
            structure, model, grid=grid, uncertainty=uncertainty, device="cpu", precision="fp32", progress=False
        )
        error = (np.asarray(rho.mean) - snapshot.density).astype(np.float32)
        noise = per_atom(structure, grid, error, rho.aleatoric, np.zeros(grid.shape, np.float32))
        assert noise.electrons_std is not None  # asked for
        common = atom_errors(rho, model) * noise.volumes
        columns.append((noise.electrons, common, noise.electrons_std**2 / grid.dv))
        if tick is not None:
            tick()
    volume = fit_correlation_volume(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    name = "last_layer_calibration" if uncertainty == "last-layer" else "calibration_factors"
    return model.with_spec(**{name: replace(model.spec.factors(uncertainty), correlation_volume=volume)})


def _points(
    model: DensityModel, data: Dataset, indices: Sequence[int], points: int, seed: int, tick: Callable[[], None]
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Features, densities and snapshot of points drawn from some snapshots."""
    import torch

    drawn = []
    for i in indices:
        drawn.append(sample_points(data[i], model.spec.descriptor, points, (seed, i)))
        tick()
    groups = np.repeat(np.asarray(indices, np.int64), [len(d) for _, d in drawn])
    return (
        torch.from_numpy(np.concatenate([f for f, _ in drawn])),
        torch.from_numpy(np.concatenate([d for _, d in drawn])),
        groups,
    )


def snapshot_names(text: str) -> str | list[int]:
    """A use by name, or the numbers in ``0,3,5``."""
    if text in ("test", "validation", "train", "all"):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingsError(
            f"snapshots {text!r} are not known; give test, validation, train, all, or numbers: 0,3,5"
        ) from None


__all__ = ["Calibration", "calibrate"]
