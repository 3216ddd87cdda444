"""What feeds a training run: batches of standardised points, from memory or shard by shard from a scratch file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError
from gpurho.model import DensityModel
from gpurho.modelspec import ModelSpec
from gpurho.pointstore import BYTES_BESIDE, PointStore, remove_scratch, shard_order
from gpurho.trainingpoints import Part, Scaling, gather_points
from gpurho.trainsettings import TrainingSettings

EVALUATION_BATCH = 8192

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Inputs (n, F), targets (n,), weights (n,) or None for all 1."""


class TrainingData:
    """Points of the training and validation snapshots, and the order in which the steps see them.

    Parameters
    ----------
    parts : sequence of Part
    descriptor : DescriptorSpec
    settings : TrainingSettings
    checkpoint : Path
        Scratch files of features lie beside it.
    device : torch.device
        Where batches are wanted.
    rank, world : int
        Which of how many processes this is; each gets its part of every batch, and features are in scratch files.

    Attributes
    ----------
    on_disk : bool
        Features go to scratch files whatever their size.
    n_grid : int
        Grid points of the training snapshots.
    scaling : Scaling
    steps_per_epoch, n_shards : int
    """

    def __init__(
        self,
        parts: Sequence[Part],
        descriptor: DescriptorSpec,
        settings: TrainingSettings,
        checkpoint: Path,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.parts, self.descriptor, self.settings, self.device = parts, descriptor, settings, device
        check_batch(settings.batch_size, world)
        self.rank, self.world, self.on_disk = rank, world, world > 1
        self.n_grid = sum(p.n_grid for p in parts)
        self.paths = {use: checkpoint.with_suffix(f".{use}.features") for use in ("train", "validation")}
        self.scaling: Scaling
        self.train: PointStore
        self.validation: PointStore

    def __len__(self) -> int:
        return len(self.train)

    # --- preparation -------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Draw the points and compute their features, in memory where they fit the limit and this is one process."""
        self._epoch, self._loaded = -1, (-1, -1)
        self._plan: list[tuple[int, int]] = []
        self._x = self._y = torch.empty(0)
        s, row = self.settings, self.descriptor.n_features * 4
        draws, held = (sum(p.draws(use, s.points_per_snapshot) for p in self.parts) for use in ("train", "validation"))
        self.limit = int(s.memory_limit * 2**30) - (draws + held) * (BYTES_BESIDE + 4)
        # Of the points to validate on, raw and standardised features are kept.
        streamed = self.on_disk or (draws + 2 * held) * row > self.limit
        if self.limit < 1000 * row:
            raise SettingsError(
                f"memory_limit {s.memory_limit} GiB is too small for {draws + held} points even with their"
                " features on disk; give fewer points_per_snapshot"
            )
        self.train, self.validation = (
            gather_points(self.parts, use, self.descriptor, s, self.paths[use] if streamed else None, str(self.device))
            for use in ("train", "validation")
        )
        size = len(self.train) * row * self.world
        self.n_shards = 1 if not streamed or size <= self.limit else math.ceil(size / (0.8 * self.limit))

    def scale(self, spec: ModelSpec, model: DensityModel | None) -> ModelSpec:
        """Fit the scaling, or take that of a model to go on from, and bring the points to the device.

        Returns the specification with the mean and standard deviation of the target.
        """
        self.scaling = Scaling.fit(spec, self.train) if model is None else Scaling.of_model(model, self.train)
        self.target, self.validation_target = (self.scaling.targets(s) for s in (self.train, self.validation))
        self._weighted = bool((self.train.weights != 1).any())
        self._inputs: Tensor | None = None
        self._held: Tensor | None = None
        if self.train.path is None:
            held = self.scaling.inputs(self.validation.rows(0, len(self.validation)))
            self._held = held.to(self.device)
            self._inputs = self.scaling.standardise(self.train.rows(0, len(self.train)))
        sizes = [sum(b - a for a, b in self.train.shard_ranges(self.n_shards, k)) for k in range(self.n_shards)]
        self._batches = [max(1, n // self.settings.batch_size) for n in sizes]
        self.steps_per_epoch = sum(self._batches)
        return self.scaling.spec

    def remove_scratch(self) -> None:
        """Remove the scratch files."""
        for path in self.paths.values():
            remove_scratch(path)

    # --- batches -----------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """Inputs, targets and weights (None for all 1) of a step: this process's part of its batch."""
        s = self.settings
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = shard_order(self.n_shards, (s.seed, 3, epoch))
            self._plan, self._epoch = [(k, i) for k in order for i in range(self._batches[k])], epoch
        shard, batch = self._plan[position]
        if (epoch, shard) != self._loaded:
            if shard != self._loaded[1]:
                self._load(shard)
            generator = torch.Generator().manual_seed(mix_seed(s.seed, 1, epoch, shard))
            self._order = torch.randperm(len(self._y), generator=generator).to(self.device)
            self._loaded = (epoch, shard)
        rows = self._order[batch * s.batch_size : (batch + 1) * s.batch_size]
        if self.world > 1:
            rows = rows[: len(rows) // self.world * self.world][self.rank :: self.world]
        w = None if self._w is None else self._w[rows]
        return self._x.index_select(0, rows), self._y[rows], w

    def _load(self, shard: int) -> None:
        """Bring a shard to the device; the former one is let go first."""
        self._x = torch.empty(0)
        if self._inputs is not None:
            self._x, self._y = self._inputs.to(self.device), self.target.to(self.device)
            weights: np.ndarray = self.train.weights
        else:
            features, index = self.train.shard(self.n_shards, shard)
            self._x = self.scaling.standardise(features).to(self.device)
            self._y = self.target[torch.from_numpy(index)].to(self.device)
            weights = self.train.weights[index]
        self._w: Tensor | None = torch.from_numpy(weights).to(self.device) if self._weighted else None

    # --- points to validate on ---------------------------------------------------------------------------------

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of the points to validate on, this process's part of them, in pieces."""
        for i, start in enumerate(range(0, len(self.validation), EVALUATION_BATCH)):
            if i % self.world != self.rank:
                continue
            stop = min(start + EVALUATION_BATCH, len(self.validation))
            if self._held is not None:
                x = self._held[start:stop]
            else:
                x = self.scaling.inputs(self.validation.rows(start, stop)).to(self.device)
            yield x, self.validation_target[start:stop].to(self.device)

    def validation_points(self, points: int) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        """Raw features (n, F) float32, densities (n,) and snapshots (n,) of up to `points` points to validate on."""
        n = len(self.validation)
        rows = np.sort(np.random.default_rng(0).permutation(n)[:points])
        features = np.empty((len(rows), self.descriptor.n_features), np.float32)
        for start, chunk in self.validation.chunks(EVALUATION_BATCH):
            a, b = np.searchsorted(rows, [start, start + len(chunk)])
            features[a:b] = chunk[rows[a:b] - start]
        owners = np.searchsorted(self.validation.starts, rows, side="right") - 1
        return torch.from_numpy(features), torch.from_numpy(self.validation.density[rows]), owners


def check_batch(batch_size: int, devices: int) -> None:
    """Raise `SettingsError` unless every device gets the same part of a batch."""
    if batch_size % devices:
        raise SettingsError(f"batch_size {batch_size} is not a multiple of the {devices} devices")


def mix_seed(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


__all__ = ["Batch", "TrainingData", "check_batch", "mix_seed"]
