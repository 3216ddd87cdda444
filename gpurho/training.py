"""Training of the Bayesian network by variational inference (preprint section III.E, equations 3 and 5)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.datasets import Dataset
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import ModelError, SettingsError
from gpurho.evaluator import cpu_has_bf16
from gpurho.layers import LOG_VARIANCE_LIMITS, DensityNetwork, NetworkSpec, transform_features
from gpurho.model import DensityModel, ModelSpec, write_atomic
from gpurho.trainingset import Split, sample_points, valence_electrons
from gpurho.uncertainty import CalibrationFactors, fit_calibration

CHECKPOINT_KEY = "gpurho-checkpoint"
MAX_FEATURE_BYTES = 8 * 2**30
ESTIMATORS = ("shared", "local")


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a training run, together with the data and the split.

    Parameters
    ----------
    n_distances, n_angle_atoms, n_angle_neighbors, n_cross, cutoff
        Descriptors, see `DescriptorSpec`.
    blocks, layers, width
        Network, see `NetworkSpec`.
    distance_length : float, angstrom
        Distances enter as ``exp(-d / distance_length)``; 0 for the distances.
    points_per_snapshot : int
        Grid points drawn from every training snapshot; bounds the memory.
    epochs, batch_size, learning_rate, warmup_steps
        Adam with a linear warm-up and a cosine decay.
    estimator : "shared" or "local"
        One draw of the weights per batch, or local reparameterisation; at equal time the former fits better.
    kl_weight : float
        Factor on KL / N_data in the loss; 1 is equation (3). N_data counts the grid points of the training snapshots.
    prior_scale, initial_scale : float
        Standard deviations of prior and initial posterior of a weight, in units of 1 / sqrt(inputs of its layer).
    precision : "auto", "fp32" or "bf16"
        Of the matrix products; parameters and their updates are float32.
    checkpoint_steps : int
        Steps between checkpoints.
    seed : int
        Decides points, initial weights, order and noise.
    """

    n_distances: int = 60
    n_angle_atoms: int = 15
    n_angle_neighbors: int = 3
    n_cross: int = 0
    cutoff: float = 9.0
    blocks: int = 3
    layers: int = 3
    width: int = 250
    distance_length: float = 1.5
    points_per_snapshot: int = 40_000
    epochs: int = 10
    batch_size: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    estimator: str = "shared"
    kl_weight: float = 1.0
    prior_scale: float = 1.0
    initial_scale: float = 0.05
    precision: str = "auto"
    checkpoint_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("points_per_snapshot", "epochs", "batch_size", "checkpoint_steps"):
            if not getattr(self, name) >= 1:
                raise SettingsError(f"{name} {getattr(self, name)!r} is not a whole number from 1 up")
        for name in ("learning_rate", "prior_scale", "initial_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} {getattr(self, name)!r} is not a positive number")
        if self.kl_weight < 0 or self.seed < 0 or self.warmup_steps < 0 or self.distance_length < 0:
            raise SettingsError("kl_weight, seed, warmup_steps and distance_length must not be negative")
        if self.estimator not in ESTIMATORS or self.precision not in ("auto", "fp32", "bf16"):
            raise SettingsError(f"estimator {self.estimator!r} or precision {self.precision!r} is not known")

    def descriptor(self, species: Sequence[str]) -> DescriptorSpec:
        """The descriptors of these settings for some species."""
        return DescriptorSpec(
            tuple(species), self.n_distances, self.n_angle_atoms, self.n_angle_neighbors, self.n_cross, self.cutoff
        )


@dataclass
class TrainingData:
    """Features and standardised densities of one use, in memory."""

    features: Tensor
    target: Tensor
    n_grid: int


class Trainer:
    """A training run: `run` trains to the end, from the checkpoint where there is one.

    Every draw depends on the seed and the step alone, so that a run which was interrupted and resumed gives the
    same bits as one that was not (on one machine with one number of threads).
    """

    def __init__(
        self, dataset: Dataset, split: Split, settings: TrainingSettings, checkpoint: str | os.PathLike[str]
    ) -> None:
        self.dataset, self.split, self.settings = dataset, split, settings
        self.checkpoint = Path(checkpoint)
        self.valence = valence_electrons(dataset)
        self.descriptor = settings.descriptor(sorted(self.valence))
        size = settings.points_per_snapshot * len(split.train) * self.descriptor.n_features * 4
        if size > MAX_FEATURE_BYTES:
            raise SettingsError(
                f"points_per_snapshot {settings.points_per_snapshot} would take {size / 2**30:.1f} GiB of features;"
                f" give at most {int(settings.points_per_snapshot * MAX_FEATURE_BYTES / size)}"
            )
        self.fingerprint = dataset.fingerprint()
        self.identity = json.dumps(
            {"settings": asdict(settings), "split": asdict(split), "dataset": self.fingerprint}, sort_keys=True
        )
        self.threads = torch.get_num_threads()
        self.step = 0
        self._sum, self._count = 0.0, 0
        self.history: list[dict[str, float]] = []
        self.network: DensityNetwork
        self.spec: ModelSpec
        self._order, self._order_epoch = torch.empty(0, dtype=torch.long), -1

    # --- preparation -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Draw points, compute features, build the network."""
        s = self.settings
        train = [self._points(i) for i in self.split.train]
        held = [self._points(i) for i in self.split.validation]
        density = np.concatenate([t[1] for t in train])
        base = ModelSpec(
            self.descriptor,
            self.valence,
            NetworkSpec(s.blocks, s.layers, s.width),
            float(density.mean()),
            float(density.std()),
            float(s.distance_length),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            network = DensityNetwork(
                base.network,
                self.descriptor.n_features,
                base.distance_columns(),
                s.distance_length,
                s.prior_scale,
                s.initial_scale,
            )
        features = torch.from_numpy(np.concatenate([t[0] for t in train]))
        inputs = transform_features(features, base.distance_columns(), s.distance_length).double()
        network.feature_mean.copy_(inputs.mean(0))
        # A column without spread (far distances that are all capped) must not be blown up.
        network.feature_std.copy_(inputs.std(0, correction=0).clamp_min(1e-5))
        network.feature_low.copy_(inputs.amin(0))
        network.feature_high.copy_(inputs.amax(0))
        del inputs
        n_grid = sum(int(np.prod(self.dataset[i].density.shape)) for i in self.split.train)

        def target(values: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(((values - base.density_mean) / base.density_std).astype(np.float32))

        self.train_data = TrainingData(features, target(density), n_grid)
        self.validation_data = TrainingData(
            torch.from_numpy(np.concatenate([t[0] for t in held])), target(np.concatenate([t[1] for t in held])), 0
        )
        self.spec, self.network = base, network
        self.optimizer = torch.optim.Adam(network.parameters(), s.learning_rate, fused=True)
        self.steps_per_epoch = max(1, len(features) // s.batch_size)
        self.n_steps = s.epochs * self.steps_per_epoch
        use_bf16 = s.precision == "bf16" or (s.precision == "auto" and cpu_has_bf16())
        self.autocast = torch.bfloat16 if use_bf16 else torch.float32

    def _points(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        return sample_points(
            self.dataset[index], self.descriptor, self.settings.points_per_snapshot, (self.settings.seed, index)
        )

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Trainer, float], None] | None = None) -> DensityModel:
        """Train to the end; `on_step` is called after every step with the trainer and the loss."""
        self.prepare()
        # The descriptors' parallel loops share the OpenMP runtime with torch and leave their own thread count in it.
        torch.set_num_threads(self.threads)
        if self.checkpoint.exists():
            self.restore()
        if self.step == 0:
            self._start_log()
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            while self.step < self.n_steps:
                likelihood = self.train_step()
                self._sum, self._count = self._sum + likelihood, self._count + 1
                last = self.step == self.n_steps
                if self.step % self.steps_per_epoch == 0 or last:
                    self._log_epoch(self._sum / self._count, time.perf_counter() - started)
                    self._sum, self._count = 0.0, 0
                if self.step % self.settings.checkpoint_steps == 0 or last:
                    self.save_checkpoint()
                if on_step is not None:
                    on_step(self, likelihood)
        return self.model()

    def train_step(self) -> float:
        """One step of Adam; returns the mean negative log likelihood of the batch, without its constant."""
        s, k = self.settings, self.step
        epoch, position = divmod(k, self.steps_per_epoch)
        if self._order_epoch != epoch:
            generator = torch.Generator().manual_seed(_mix(s.seed, 1, epoch))
            self._order = torch.randperm(len(self.train_data.target), generator=generator)
            self._order_epoch = epoch
        rows = self._order[position * s.batch_size : (position + 1) * s.batch_size]
        torch.manual_seed(_mix(s.seed, 2, k))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(k)
        x, y = self.train_data.features[rows], self.train_data.target[rows]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast == torch.bfloat16):
            if s.estimator == "shared":
                out, divergence = self.network.sample_shared(x)
            else:
                out, divergence = self.network.sample(x), self.network.kl()
        likelihood = negative_log_likelihood(out.float(), y)
        loss = likelihood + s.kl_weight / self.train_data.n_grid * divergence
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        value = float(likelihood.detach())
        if not math.isfinite(value):
            raise ModelError(f"training diverged at step {k}: the loss is {value}; give a smaller learning_rate")
        return value

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a thousandth."""
        s = self.settings
        warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
        return s.learning_rate * warm * (0.5 * (1 + math.cos(math.pi * step / self.n_steps)) + 1e-3)

    def model(self) -> DensityModel:
        """The model as it stands, without calibration and records."""
        return DensityModel.from_network(self.spec, self.network)

    def calibrated(self, model: DensityModel, points: int = 20_000) -> DensityModel:
        """The model with calibration factors fitted on the validation snapshots."""
        rows = torch.randperm(len(self.validation_data.target), generator=torch.Generator().manual_seed(0))[:points]
        evaluate = model.with_spec(calibration_factors=CalibrationFactors()).evaluator(precision="fp32")
        mean, aleatoric, epistemic = evaluate(self.validation_data.features[rows])
        truth = self.validation_data.target[rows].double() * self.spec.density_std + self.spec.density_mean
        if aleatoric is None or epistemic is None:
            raise ModelError("calibration needs an evaluator with uncertainty")
        factors = fit_calibration((mean.double() - truth).numpy(), aleatoric.numpy(), epistemic.numpy())
        return model.with_spec(calibration_factors=factors)

    # --- records -----------------------------------------------------------------------------------------------

    @property
    def log_path(self) -> Path:
        """CSV table of the run, one row per epoch."""
        return self.checkpoint.with_suffix(".csv")

    def _start_log(self) -> None:
        self.history = []
        self.log_path.write_text(
            "epoch,step,train_nll,kl_per_point,validation_rmse,validation_nll,learning_rate,seconds\n"
        )

    def _log_epoch(self, likelihood: float, seconds: float) -> None:
        with torch.inference_mode():
            out = torch.cat([self.network(x) for x in self.validation_data.features.split(8192)])
            error = out[:, 0] - self.validation_data.target
            row = {
                "epoch": float(self.step // self.steps_per_epoch),
                "step": float(self.step),
                "train_nll": likelihood,
                "kl_per_point": float(self.network.kl()) / self.train_data.n_grid,
                "validation_rmse": float(error.square().mean().sqrt()) * self.spec.density_std,
                "validation_nll": float(negative_log_likelihood(out, self.validation_data.target)),
                "learning_rate": self.learning_rate(self.step - 1),
                "seconds": seconds,
            }
        self.history.append(row)
        with open(self.log_path, "a") as file:
            file.write(",".join(f"{v:.6g}" for v in row.values()) + "\n")

    def save_checkpoint(self) -> None:
        """Write all that the run needs to go on, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        record = {
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "epoch_sum": self._sum,
            "epoch_count": self._count,
        }
        data = save(
            {k: v.detach().contiguous() for k, v in tensors.items()}, metadata={CHECKPOINT_KEY: json.dumps(record)}
        )
        write_atomic(self.checkpoint, data)

    def restore(self) -> None:
        """Go on from the checkpoint; raises `ModelError` when it belongs to another run."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.checkpoint), framework="pt") as file:
                record = json.loads((file.metadata() or {})[CHECKPOINT_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            same = record["identity"] == self.identity
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{self.checkpoint}: damaged checkpoint ({error}); remove it to start anew") from None
        if not same:
            raise ModelError(
                f"{self.checkpoint}: checkpoint of a run with other settings, data or split;"
                " remove it or train to another path"
            )
        self.network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.history = int(record["step"]), list(record["history"])
        self._sum, self._count = float(record["epoch_sum"]), int(record["epoch_count"])
        with suppress(OSError):
            # Rows of epochs after the checkpoint will be written again.
            lines = self.log_path.read_text().splitlines()[: 1 + len(self.history)]
            self.log_path.write_text("\n".join(lines) + "\n")


def negative_log_likelihood(out: Tensor, target: Tensor) -> Tensor:
    """Mean of equation (5) with its sign turned: ``log(sigma^2) / 2 + (f - y)^2 / (2 sigma^2)``; out is (n, 2)."""
    log_variance = out[:, 1].clamp(*LOG_VARIANCE_LIMITS)
    return 0.5 * (log_variance + (out[:, 0] - target).square() * torch.exp(-log_variance)).mean()


@contextmanager
def torch_threads(n: int | None) -> Iterator[None]:
    """Run with `n` torch threads, and give back the former number; None leaves it."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def training_record(trainer: Trainer, command: str) -> dict[str, Any]:
    """What `ModelSpec.training` says about a finished run."""
    dataset = trainer.dataset

    def names(indices: Sequence[int]) -> list[dict[str, Any]]:
        keep = ("trajectory", "index", "temperature_K")
        return [{"snapshot": i, **{k: v for k, v in dataset.meta(i).items() if k in keep}} for i in indices]

    return {
        "command": command,
        "settings": asdict(trainer.settings),
        "dataset": {"file": dataset.path.name, "fingerprint": trainer.fingerprint, "snapshots": len(dataset)},
        "split": {k: names(v) for k, v in asdict(trainer.split).items()},
        "points": len(trainer.train_data.target),
        "steps": trainer.step,
        "final": trainer.history[-1] if trainer.history else {},
    }


__all__ = [
    "Trainer",
    "TrainingSettings",
    "negative_log_likelihood",
    "torch_threads",
    "training_record",
]
