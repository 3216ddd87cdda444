"""Training of the Bayesian network by variational inference (preprint section III.E, equations 3 and 5)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpurho.calibration import calibrate
from gpurho.checkpoint import read_checkpoint, write_checkpoint
from gpurho.datasets import Dataset
from gpurho.errors import ModelError, SettingsError
from gpurho.evaluator import cpu_has_bf16, resolve_device
from gpurho.flatnet import FlatNetwork, likelihoods
from gpurho.model import DensityModel, ModelSpec
from gpurho.trainingdata import TrainingData, mix_seed
from gpurho.trainingpoints import Part
from gpurho.trainingset import Split, valence_electrons
from gpurho.trainlog import TrainingLog
from gpurho.trainsettings import TrainingSettings

BF16_WIDTH = 128
"""Narrower networks gain little: a step took 0.84, 0.68 and 0.45 of the time in fp32 at widths of 64, 128 and 250,
measured on one core with AVX512-BF16."""

CUDA_CHECK_STEPS = 20
"""Steps between two looks at the loss on a GPU, each of which waits for it."""


@dataclass(frozen=True)
class Start:
    """A model to go on from.

    Parameters
    ----------
    model : DensityModel
    frozen_layers : int
        Its first hidden layers, which stay as they are.
    prior : "standard" or "posterior"
        The prior of the settings, or the model's posterior.
    name : str
        Of its file, for the record.
    """

    model: DensityModel
    frozen_layers: int = 0
    prior: str = "standard"
    name: str = "model"

    def __post_init__(self) -> None:
        if self.prior not in ("standard", "posterior"):
            raise SettingsError(f"prior {self.prior!r} is not known; give 'standard' or 'posterior'")

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"model": self.model.fingerprint(), "frozen_layers": self.frozen_layers, "prior": self.prior}


class Trainer:
    """A training run: `run` trains to the end, from the checkpoint where there is one.

    Every draw depends on the seed and the step alone, so that a run which was interrupted and resumed gives the
    same bits as one that was not (on one machine with one number of threads).

    Parameters
    ----------
    dataset, split : Dataset and Split, or as many of each
    settings : TrainingSettings
    checkpoint : path
        The log (``.csv``) and the scratch files of features lie beside it.
    device : str
        "cpu" or a CUDA device.
    start : Start, optional
        The model to go on from; settings must be its own (`settings_of_model`).
    tensorboard : path, optional
        Folder for event files.
    rank, world : int
        Which of how many processes of a group this is (`gpurho.ddp`); each takes its part of every batch.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Dataset],
        split: Split | Sequence[Split],
        settings: TrainingSettings,
        checkpoint: str | os.PathLike[str],
        *,
        device: str = "cpu",
        start: Start | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
        splits = [split] if isinstance(split, Split) else list(split)
        self.parts = [Part(d, s, d.fingerprint()) for d, s in zip(datasets, splits, strict=True)]
        self.settings, self.start, self.tensorboard = settings, start, tensorboard
        self.checkpoint = Path(checkpoint)
        self.device = resolve_device(device)
        self.rank, self.world = rank, world
        found = valence_electrons(*datasets)
        self.valence = found if start is None else start.model.spec.valence
        if start is not None and any(self.valence.get(k) != v for k, v in found.items()):
            raise ModelError(f"the data set has valence electrons {found}; the model has {self.valence}")
        self.descriptor = settings.descriptor(sorted(self.valence)) if start is None else start.model.spec.descriptor
        self.identity = json.dumps(
            {
                "settings": asdict(settings),
                "data": [{"split": asdict(p.split), "dataset": p.fingerprint} for p in self.parts],
                "start": None if start is None else start.record(),
            },
            sort_keys=True,
        )
        self.threads = torch.get_num_threads()
        self.log = TrainingLog(
            self.checkpoint.with_suffix(".csv"), Path(tensorboard) if tensorboard is not None and rank == 0 else None
        )
        self.step, self.stopped, self._seen = 0, False, math.nan
        self._sum, self._count = torch.zeros((), dtype=torch.float64), 0
        self._best_value, self._best_epoch = math.inf, 0
        self._best: list[Tensor] = []
        self._ema: list[Tensor] = []
        self.data = TrainingData(self.parts, self.descriptor, settings, self.checkpoint, self.device, rank, world)
        self.net: FlatNetwork
        self.spec: ModelSpec

    @property
    def history(self) -> list[dict[str, float]]:
        """Rows of the log, one per epoch."""
        return self.log.rows

    # --- preparation -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Draw points, compute features, build the network."""
        s = self.settings
        self.data.gather()
        model = None if self.start is None else self.start.model
        if model is None:
            spec = ModelSpec(
                self.descriptor, self.valence, s.network(), distance_length=float(s.distance_length), target=s.target
            )
        else:
            spec = model.spec
        self.spec = self.data.scale(spec, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            frozen = 0 if self.start is None else self.start.frozen_layers
            net = FlatNetwork(self.spec, s.prior_scale, s.initial_scale, frozen)
        if self.start is not None:
            net.load(self.start.model.tensors)
            if self.start.prior == "posterior":
                net.prior_from_posterior()
        self.net = net.to(self.device)
        groups: list[dict[str, Any]] = [
            {"params": [net.mean], "weight_decay": s.weight_decay},
            {"params": [net.rho, net.skip]},
        ]
        self.optimizer = torch.optim.AdamW(groups, s.learning_rate, weight_decay=0.0, fused=True)
        self._tensors = [net.mean, net.rho, net.skip]
        self._ema = [t.detach().clone() for t in self._tensors] if s.ema > 0 else []
        self.steps_per_epoch = self.data.steps_per_epoch
        self.n_steps = s.epochs * self.steps_per_epoch
        self.autocast = self._use_bf16()
        self._module: Any = net
        if self.world > 1:
            from torch.nn.parallel import DistributedDataParallel

            # Every process has the same buffers already, and they never change.
            names = [name for name, _ in net.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)
            self._module = DistributedDataParallel(net)

    def _use_bf16(self) -> bool:
        s = self.settings
        if s.precision != "auto":
            return s.precision == "bf16"
        if s.width < BF16_WIDTH or s.blocks == 0:
            return False
        if self.device.type == "cuda":
            return torch.cuda.get_device_capability(self.device)[0] >= 8
        return cpu_has_bf16()

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Trainer, float], None] | None = None) -> DensityModel:
        """Train to the end; `on_step` is called after every step with the trainer and the loss."""
        self.prepare()
        torch.set_num_threads(self.threads)
        if self.checkpoint.exists():
            self.restore()
        if self.step == 0 and self.rank == 0:
            self.log.start()
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            while self.step < self.n_steps and not self.stopped:
                likelihood = self.train_step()
                last = self.step == self.n_steps
                if self.step % self.steps_per_epoch == 0 or last:
                    self._end_epoch(time.perf_counter() - started)
                if self.step % self.settings.checkpoint_steps == 0 or last or self.stopped:
                    self.save_checkpoint()
                if on_step is not None:
                    on_step(self, likelihood)
        self.log.close()
        return self.finish()

    def finish(self) -> DensityModel:
        """The model of a run that has ended: of its best state, its running mean or its last state."""
        self._take(self._best or self._ema)
        return self.model()

    def train_step(self) -> float:
        """One step of Adam; returns the mean negative log likelihood of the batch, without its constant."""
        s, k = self.settings, self.step
        x, y, w = self.data.batch(k)
        epoch = k / self.steps_per_epoch
        estimator = s.estimator_at(epoch)
        seeds = (s.seed, 2, k, self.rank) if estimator == "local" and self.rank else (s.seed, 2, k)
        torch.manual_seed(mix_seed(*seeds))
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * s.rate_factor(k, self.n_steps)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss, likelihood = self._module(x, y, w, estimator, s.kl_factor(epoch) / self.data.n_grid, s.beta)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        if s.ema > 0:
            # Early on, when there is little to average over, the mean must not cling to the start.
            decay = min(s.ema, (1 + k) / (10 + k))
            for mean, value in zip(self._ema, self._tensors, strict=True):
                mean.lerp_(value.detach(), 1.0 - decay)
        if self.world > 1:
            torch.distributed.all_reduce(likelihood, torch.distributed.ReduceOp.SUM)
            likelihood = likelihood / self.world
        self._sum, self._count = self._sum.to(likelihood.device) + likelihood, self._count + 1
        if self.device.type == "cuda" and k % CUDA_CHECK_STEPS:
            return self._seen
        self._seen = float(likelihood)
        if not math.isfinite(self._seen):
            raise ModelError(f"training diverged at step {k}: the loss is {self._seen}; give a smaller learning_rate")
        return self._seen

    def _end_epoch(self, seconds: float) -> None:
        """Validate, log, and see whether to stop."""
        s = self.settings
        current = [t.detach().clone() for t in self._tensors] if self._ema else []
        self._take(self._ema)
        rmse, likelihood = self.validate()
        epoch = -(-self.step // self.steps_per_epoch)
        if self.rank == 0:
            self.log.add(
                {
                    "epoch": float(epoch),
                    "step": float(self.step),
                    "train_nll": float(self._sum) / self._count,
                    "kl_per_point": float(self.net.kl().detach()) / self.data.n_grid,
                    "validation_rmse": rmse,
                    "validation_nll": likelihood,
                    "learning_rate": s.learning_rate * s.rate_factor(self.step - 1, self.n_steps),
                    "seconds": seconds,
                }
            )
        self._sum, self._count = torch.zeros((), dtype=torch.float64), 0
        if s.patience and epoch > s.deterministic_epochs:
            if rmse < self._best_value:
                self._best_value, self._best_epoch = rmse, epoch
                self._best = [t.detach().clone() for t in self._tensors]
            self.stopped = epoch - self._best_epoch >= s.patience
        self._take(current)

    def validate(self) -> tuple[float, float]:
        """RMSE, e/angstrom^3, and mean negative log likelihood on the points of the validation snapshots."""
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for x, y in self.data.held_out():
                out = self.net.at_means(x)
                square, likelihood = (out[:, 0] - y).square().mean(), likelihoods(out, y, None, 0.0)[0]
                total += torch.stack([square, likelihood, torch.ones_like(square)]).double() * len(y)
        if self.world > 1:
            torch.distributed.all_reduce(total)
        mean_square, mean_likelihood = (total[:2] / total[2]).tolist()
        if not math.isfinite(mean_square):
            raise ModelError(f"training diverged before step {self.step}; give a smaller learning_rate")
        return math.sqrt(mean_square) * self.spec.density_std, mean_likelihood

    def _take(self, tensors: list[Tensor]) -> None:
        """Put parameters in place of the present ones; an empty list leaves them."""
        with torch.no_grad():
            for own, value in zip(self._tensors, tensors, strict=False):
                own.copy_(value)

    # --- results -----------------------------------------------------------------------------------------------

    def model(self) -> DensityModel:
        """The model as it stands, without calibration and records."""
        return DensityModel(self.spec, {**self.data.scaling.tensors, **self.net.tensors()})

    def calibrated(self, model: DensityModel, points: int = 20_000) -> DensityModel:
        """The model with its error bars calibrated on the validation snapshots."""
        return calibrate(model, *self.data.validation_points(points))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write all that the run needs to go on, whole or not at all."""
        if self.rank != 0:
            return
        tensors = {f"network.{i}": v for i, v in enumerate(self._tensors)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self._ema)} | {f"best.{i}": v for i, v in enumerate(self._best)}
        record = {
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "epoch_sum": float(self._sum),
            "epoch_count": self._count,
            "best": [self._best_value if self._best else 0.0, self._best_epoch],
            "stopped": self.stopped,
        }
        write_checkpoint(self.checkpoint, tensors, record)

    def restore(self) -> None:
        """Go on from the checkpoint; raises `ModelError` when it belongs to another run."""
        tensors, record = read_checkpoint(self.checkpoint, self.identity)

        def series(name: str) -> list[Tensor]:
            return [tensors[f"{name}.{i}"].to(self.device) for i in range(3) if f"{name}.{i}" in tensors]

        self._take(series("network"))
        self._ema, self._best = series("ema"), series("best")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.stopped = int(record["step"]), bool(record["stopped"])
        self._sum, self._count = torch.tensor(record["epoch_sum"], dtype=torch.float64), int(record["epoch_count"])
        if self._best:
            self._best_value, self._best_epoch = float(record["best"][0]), int(record["best"][1])
        if self.rank == 0:
            self.log.resume(list(record["history"]))

    def clean(self) -> None:
        """Remove the checkpoint and the scratch files."""
        self.checkpoint.unlink(missing_ok=True)
        self.data.remove_scratch()


def negative_log_likelihood(out: Tensor, target: Tensor) -> Tensor:
    """Mean of equation (5) with its sign turned: ``log(sigma^2) / 2 + (f - y)^2 / (2 sigma^2)``; out is (n, 2)."""
    return likelihoods(out, target, None, 0.0)[0]


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


def training_record(trainer: Trainer, command: str) -> dict[str, Any]:
    """What `ModelSpec.training` says about a finished run.

    ``datasets`` names every data set with its split; ``dataset`` and ``split`` are those of the first.
    """

    def named(part: Part) -> dict[str, Any]:
        data, keep = part.dataset, ("trajectory", "index", "temperature_K")
        split = {
            use: [{"snapshot": i, **{k: v for k, v in data.meta(i).items() if k in keep}} for i in indices]
            for use, indices in asdict(part.split).items()
        }
        return {"file": data.path.name, "fingerprint": part.fingerprint, "snapshots": len(data), "split": split}

    datasets = [named(part) for part in trainer.parts]
    first = dict(datasets[0])
    return {
        "command": command,
        "settings": asdict(trainer.settings),
        "dataset": {k: first[k] for k in ("file", "fingerprint", "snapshots")},
        "split": first["split"],
        "datasets": datasets,
        "points": len(trainer.data),
        "steps": trainer.step,
        "stopped_early": trainer.stopped,
        "final": trainer.history[-1] if trainer.history else {},
        **({} if trainer.start is None else {"start": {"file": trainer.start.name, **trainer.start.record()}}),
    }


__all__ = [
    "Start",
    "Trainer",
    "TrainingSettings",
    "negative_log_likelihood",
    "torch_threads",
    "training_record",
]
