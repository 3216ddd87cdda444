"""Train a model further on larger cells, or say from which size on larger cells add nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gpurho.datasets import Dataset, open_dataset
from gpurho.descriptors import DescriptorSpec
from gpurho.model import DensityModel, load_model
from gpurho.pipelines.train import Source, TrainResult, train
from gpurho.training import Start
from gpurho.trainsettings import TrainingSettings
from gpurho.transfer import SizeGuide, frozen_layers
from gpurho.transfer import size_guide as _size_guide


def transfer(
    model: DensityModel | str | os.PathLike[str],
    dataset: Source | Sequence[Source],
    out: str | os.PathLike[str],
    *,
    freeze: float = 0.333,
    freeze_layers: int | None = None,
    prior: str = "standard",
    **options: Any,
) -> TrainResult:
    """Train the later layers of a model on other data, as the preprint does on larger cells (section III.G).

    Standardisation, two-body superposition and scaling of the target stay those of the model; the bounds of its
    domain grow by the new points. Its posterior is where the training begins.

    Parameters
    ----------
    model : DensityModel, name or path
    dataset, out
        As for `train`.
    freeze : float
        Share of the hidden layers, from the first, that stay as they are.
    freeze_layers : int, optional
        Their number instead.
    prior : "standard" or "posterior"
        "posterior": the old posterior is the prior, so that the new data are weighed against the old.
    **options
        Any other of `train`; settings of descriptors, network and target are the model's.

    Raises
    ------
    SettingsError
        For a setting that contradicts the model.
    ModelError, DatasetError, OutputExistsError
    """
    trained = model if isinstance(model, DensityModel) else load_model(model)
    frozen = frozen_layers(trained.spec.network, freeze) if freeze_layers is None else freeze_layers
    name = "model" if isinstance(model, DensityModel) else os.path.basename(str(model))
    return train(dataset, out, start=Start(trained, frozen, prior, name), **options)


def size_guide(
    datasets: Sequence[Source],
    model: DensityModel | str | os.PathLike[str] | None = None,
    points: int = 20_000,
    seed: int = 0,
    **settings: Any,
) -> SizeGuide:
    """Compare data sets of cells of several sizes; see `gpurho.transfer.size_guide`.

    Features are those of `model`, or of `TrainingSettings` with `settings`.
    """
    data = [d if isinstance(d, Dataset) else open_dataset(d) for d in datasets]
    if model is not None:
        spec = (model if isinstance(model, DensityModel) else load_model(model)).spec
        return _size_guide(data, spec.descriptor, points, spec.distance_length, seed)
    chosen = TrainingSettings(**settings)
    found = sorted({str(symbol) for d in data for s in d for symbol in s.structure.symbols})
    descriptor: DescriptorSpec = chosen.descriptor(found)
    return _size_guide(data, descriptor, points, chosen.distance_length, seed)


__all__ = ["size_guide", "transfer"]
