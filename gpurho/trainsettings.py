"""Settings of a training run, and their defaults for each family of descriptors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError
from gpurho.layers import NetworkSpec
from gpurho.modelspec import ModelSpec

ESTIMATORS = ("shared", "local", "none")
SCHEDULES = ("cosine", "one-cycle", "constant")
SAMPLINGS = ("uniform", "importance")
PRECISIONS = ("auto", "fp32", "bf16")
TARGETS = ("density", "delta")

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "scalar-product": {
        "cutoff": 9.0,
        "target": "density",
        "blocks": 3,
        "layers": 3,
        "width": 250,
        "points_per_snapshot": 40_000,
        "epochs": 10,
        "batch_size": 512,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "weight_decay": 0.0,
        "ema": 0.0,
        "estimator": "shared",
        "beta": 0.0,
        "kl_start": 0.0,
        "kl_ramp": 0.0,
        "initial_scale": 0.05,
    },
    "smooth": {
        "cutoff": 6.0,
        "target": "delta",
        "blocks": 1,
        "layers": 2,
        "width": 32,
        "points_per_snapshot": 12_000,
        "epochs": 20,
        "batch_size": 2048,
        "learning_rate": 4e-3,
        "schedule": "one-cycle",
        "weight_decay": 0.05,
        "ema": 0.998,
        "estimator": "local",
        "beta": 1.0,
        "initial_scale": 0.02,
    },
}
"""What `TrainingSettings` takes for the entries that it leaves to the family. Those of "smooth" were measured on 39
snapshots of 32 atoms of aluminium: the running mean takes 5 % off the error, more points and epochs or networks of
1.5 times the width take nothing."""

KL_SHARES = {"kl_start": 0.3, "kl_ramp": 0.2}
"""Shares of the epochs that "smooth" trains before weights are drawn, and raises the factor on KL over."""

BY_FAMILY: Any = None
"""Default of an entry that `FAMILY_DEFAULTS` fills in."""

DEFAULT_FAMILY = "smooth"

_WHOLE = (
    ("points_per_snapshot", 1),
    ("epochs", 1),
    ("batch_size", 1),
    ("checkpoint_steps", 1),
    ("seed", 0),
    ("warmup_steps", 0),
    ("patience", 0),
)
_NOT_NEGATIVE = ("kl_weight", "kl_start", "kl_ramp", "distance_length", "weight_decay")


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a training run, together with the data and the split.

    Defaults of what `FAMILY_DEFAULTS` names depend on the family.

    Parameters
    ----------
    family : "scalar-product" or "smooth"
    cutoff : float, angstrom
    n_distances, n_angle_atoms, n_angle_neighbors, n_cross
        Descriptors of the family "scalar-product", see `DescriptorSpec`.
    n_radial, n_basis, l_max, contraction
        Descriptors of the family "smooth".
    target : "density" or "delta"
        Learn the density, or its difference from a two-body superposition that is fitted first (family "smooth").
    blocks, layers, width
        Network, see `NetworkSpec`.
    distance_length : float, angstrom
        Distances enter as ``exp(-d / distance_length)``; 0 for the distances.
    points_per_snapshot : int
        Grid points drawn from every snapshot.
    sampling : "uniform" or "importance"
        "importance": a part `importance_share` of the points is drawn with probabilities inverse to the frequency
        of their density and of their distance to the nearest nucleus.
    importance_power : float, 0 to 1
        A point counts in the loss by (1 / its relative probability) to this power: 1 keeps the loss unbiased, 0
        lets rare regions count as often as they are drawn.
    keep_fraction : float
        Share of the points that is kept when those are dropped whose features lie close to those of kept ones, which
        take over their weight; 1 keeps all.
    memory_limit : float, GiB
        Features beyond it go to a scratch file beside the checkpoint, from which they are read shard by shard.
    epochs, batch_size, learning_rate, warmup_steps
        Adam with a linear warm-up.
    schedule : "cosine", "one-cycle" or "constant"
        Half a cosine down to a thousandth; up over the first 30 % and down; or constant, after the warm-up.
    weight_decay : float
        Decoupled weight decay of the means (AdamW); 0 is Adam.
    ema : float
        Decay per step of a running mean of the parameters, which is validated and kept in their place; 0 for none.
    patience : int
        Stop after so many epochs without a better RMSE on the validation snapshots, and take the best state; 0 to
        train to the end and take the last.
    estimator : "shared", "local" or "none"
        One draw of the weights per batch, local reparameterisation, or none: a deterministic network, whose weights'
        sigmas stay what they were.
    beta : float, 0 to 1
        Each point's likelihood counts by its predicted variance to this power; 0 is equation (5), and 1 fits the mean
        as least squares do (Seitzer et al., ICLR 2022).
    kl_weight : float
        Factor on KL / N_data in the loss; 1 is equation (3). N_data counts the grid points of the training snapshots.
    kl_start, kl_ramp : float, epochs
        Train without drawing weights until `kl_start`, then raise the factor linearly over `kl_ramp` epochs.
    prior_scale, initial_scale : float
        Standard deviations of prior and initial posterior of a weight, in units of 1 / sqrt(inputs of its layer).
    precision : "auto", "fp32" or "bf16"
        Of the matrix products; parameters and their updates are float32. "auto" takes bf16 from a width of 128 where
        the processor multiplies it; narrower networks gain little by it.
    checkpoint_steps : int
        Steps between checkpoints.
    seed : int
        Decides points, initial weights, order and noise.
    """

    family: str = DEFAULT_FAMILY
    cutoff: float = BY_FAMILY
    n_distances: int = 60
    n_angle_atoms: int = 15
    n_angle_neighbors: int = 3
    n_cross: int = 0
    n_radial: int = 16
    n_basis: int = 6
    l_max: int = 4
    contraction: Any = None
    target: str = BY_FAMILY
    blocks: int = BY_FAMILY
    layers: int = BY_FAMILY
    width: int = BY_FAMILY
    distance_length: float = 1.5
    points_per_snapshot: int = BY_FAMILY
    sampling: str = "uniform"
    importance_share: float = 0.5
    importance_power: float = 1.0
    keep_fraction: float = 1.0
    memory_limit: float = 4.0
    epochs: int = BY_FAMILY
    batch_size: int = BY_FAMILY
    learning_rate: float = BY_FAMILY
    warmup_steps: int = 300
    schedule: str = BY_FAMILY
    weight_decay: float = BY_FAMILY
    ema: float = BY_FAMILY
    patience: int = 0
    estimator: str = BY_FAMILY
    beta: float = BY_FAMILY
    kl_weight: float = 1.0
    kl_start: float = BY_FAMILY
    kl_ramp: float = BY_FAMILY
    prior_scale: float = 1.0
    initial_scale: float = BY_FAMILY
    precision: str = "auto"
    checkpoint_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("family", self.family, tuple(FAMILY_DEFAULTS))
        for name, value in FAMILY_DEFAULTS[self.family].items():
            if getattr(self, name) is BY_FAMILY:
                object.__setattr__(self, name, value)
        for name, least in _WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingsError(f"{name} {value!r} is not a whole number from {least} up")
        for name, share in KL_SHARES.items():
            if getattr(self, name) is BY_FAMILY:
                object.__setattr__(self, name, share * self.epochs)
        for name in ("learning_rate", "prior_scale", "initial_scale", "memory_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} {getattr(self, name)!r} is not a positive number")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"{name} {getattr(self, name)!r} must not be negative")
        for name in ("importance_share", "importance_power", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} {getattr(self, name)!r} is not a number from 0 to 1")
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema {self.ema!r} is not a decay from 0 to below 1; give for instance 0.999")
        if not 0 < self.keep_fraction <= 1:
            raise SettingsError(f"keep_fraction {self.keep_fraction!r} is not above 0 and at most 1")
        _one_of("estimator", self.estimator, ESTIMATORS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("sampling", self.sampling, SAMPLINGS)
        _one_of("target", self.target, TARGETS)
        if self.target == "delta" and self.family != "smooth":
            raise SettingsError(f"target 'delta' needs the family 'smooth', not {self.family!r}; give target='density'")

    def descriptor(self, species: Sequence[str]) -> DescriptorSpec:
        """The descriptors of these settings for some species."""
        values: dict[str, Any] = {"family": self.family, "cutoff": self.cutoff}
        if self.family == "smooth":
            names = ("n_radial", "n_basis", "l_max", "contraction")
        else:
            names = ("n_distances", "n_angle_atoms", "n_angle_neighbors", "n_cross")
        return DescriptorSpec(tuple(species), **values, **{n: getattr(self, n) for n in names})

    def network(self) -> NetworkSpec:
        """The network of these settings."""
        return NetworkSpec(self.blocks, self.layers, self.width)

    @property
    def deterministic_epochs(self) -> float:
        """Epochs until the posterior is trained with its full weight; states before them are no candidates."""
        return 0.0 if self.estimator == "none" else self.kl_start + self.kl_ramp

    def kl_factor(self, epoch: float) -> float:
        """Factor on KL / N_data at a time in epochs."""
        if self.estimator == "none":
            return self.kl_weight
        if epoch < self.kl_start:
            return 0.0
        return self.kl_weight * (min(1.0, (epoch - self.kl_start) / self.kl_ramp) if self.kl_ramp > 0 else 1.0)

    def estimator_at(self, epoch: float) -> str:
        """The estimator in use at a time in epochs."""
        return "none" if epoch < self.kl_start else self.estimator

    def rate_factor(self, step: int, n_steps: int) -> float:
        """The learning rate at a step, in units of `learning_rate`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return warm
        if self.schedule == "one-cycle":
            peak = 0.3 * n_steps
            if step < peak:
                return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / peak))
            return 0.5 * (1 + math.cos(math.pi * (step - peak) / (n_steps - peak))) + 1e-4
        return warm * (0.5 * (1 + math.cos(math.pi * step / n_steps)) + 1e-3)


def model_entries(spec: ModelSpec) -> dict[str, Any]:
    """The settings that a model decides: its descriptors, network and target."""
    d = spec.descriptor
    columns = (
        "n_radial",
        "n_basis",
        "l_max",
        "contraction",
        "n_distances",
        "n_angle_atoms",
        "n_angle_neighbors",
        "n_cross",
    )
    return {
        "family": d.family,
        "cutoff": d.cutoff,
        "target": spec.target,
        "blocks": spec.network.blocks,
        "layers": spec.network.layers,
        "width": spec.network.width,
        "distance_length": spec.distance_length,
        **{name: getattr(d, name) for name in columns},
    }


def settings_of_model(spec: ModelSpec, **settings: Any) -> TrainingSettings:
    """Settings to train a model further: `model_entries`, and anything else as given.

    Raises
    ------
    SettingsError
        When `settings` contradict what the model is.
    """
    fixed = model_entries(spec)
    wrong = sorted(k for k, v in fixed.items() if k in settings and settings[k] != v)
    if wrong:
        name = wrong[0]
        raise SettingsError(f"{name} {settings[name]!r} is not that of the model, {fixed[name]!r}; leave it out")
    return TrainingSettings(**{**settings, **fixed})


def setting_words(settings: TrainingSettings) -> dict[str, Any]:
    """The entries that differ from the defaults of their family, which repeat these settings."""
    default = asdict(TrainingSettings(family=settings.family, epochs=settings.epochs))
    default["epochs"] = FAMILY_DEFAULTS[settings.family]["epochs"]
    values = {k: v for k, v in asdict(settings).items() if v != default[k]}
    return values if settings.family == DEFAULT_FAMILY else {"family": settings.family, **values}


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingsError(f"{name} {value!r} is not known; give one of {', '.join(known)}")


__all__ = ["FAMILY_DEFAULTS", "TrainingSettings", "model_entries", "setting_words", "settings_of_model"]
