"""The specification of a model: everything of it but its tensors, as JSON can hold it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import GpurhoError, ModelError
from gpurho.layers import NetworkSpec
from gpurho.truststats import TrustStatistics
from gpurho.uncertainty import CalibrationFactors
from gpurho.versions import check_version

FORMAT = "gpurho-model"
FORMAT_VERSION = 3
"""Written into every file. Version 2 added the target "delta", networks without hidden layers, the posterior of the
last layer and calibration curves; version 3 the statistics of training atoms. Older files are read as they are."""

TARGETS = ("density", "delta")


@dataclass(frozen=True)
class ModelSpec:
    """What a model is: everything of it but its tensors, as JSON can hold it.

    Parameters
    ----------
    descriptor : DescriptorSpec
        Features, and the species in their order.
    valence : dict
        Electrons that each species brings, by symbol.
    network : NetworkSpec
    density_mean, density_std : float, e/angstrom^3
        Mean and standard deviation of the training target, which the network's output is scaled by.
    distance_length : float, angstrom
        Distances d enter the network as ``exp(-d / distance_length)``; 0 for the distances themselves.
    target : "density" or "delta"
        What the network gives: the density, or its difference from a two-body superposition that is linear in the
        features, the tensor ``baseline`` (smooth family only).
    calibration_factors, last_layer_calibration : CalibrationFactors
        Of the error bars "analytic" and "sampled", and of "last-layer".
    last_layer : dict
        How the posterior of the last layer, the tensor ``last_layer``, was fitted; empty without one.
    trust : TrustStatistics, optional
        Of the training atoms, with tensors of its own; see `gpurho.trust`.
    training, dft, metrics, calibration, provenance : dict
        How it was trained, the settings of the labels, and what it reached on held-out snapshots.
    """

    descriptor: DescriptorSpec
    valence: dict[str, float]
    network: NetworkSpec = field(default_factory=NetworkSpec)
    density_mean: float = 0.0
    density_std: float = 1.0
    distance_length: float = 0.0
    target: str = "density"
    calibration_factors: CalibrationFactors = field(default_factory=CalibrationFactors)
    last_layer_calibration: CalibrationFactors = field(default_factory=CalibrationFactors)
    last_layer: dict[str, Any] = field(default_factory=dict)
    trust: TrustStatistics | None = None
    training: dict[str, Any] = field(default_factory=dict)
    dft: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    library_version: str = ""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ModelError(f"model target {self.target!r} is not known; this version knows {', '.join(TARGETS)}")
        if self.target == "delta" and self.descriptor.family != "smooth":
            raise ModelError(
                f"model target 'delta' needs descriptors of the family 'smooth', not {self.descriptor.family!r};"
                " use target 'density'"
            )
        for name in ("valence", "last_layer", "training", "dft", "metrics", "calibration", "provenance"):
            if not isinstance(getattr(self, name), dict):
                raise ModelError(f"model {name} {getattr(self, name)!r} is not a table of names and values")
        bad = [f"{k}: {v!r}" for k, v in self.valence.items() if not isinstance(v, int | float) or not 0 < v < 120]
        if bad:
            raise ModelError(f"model valence electrons {', '.join(bad)} are out of range")
        missing = [s for s in self.species if s not in self.valence]
        if missing:
            raise ModelError(f"model names no valence electrons for {', '.join(missing)}")
        for name in ("density_mean", "density_std", "distance_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
                raise ModelError(f"model {name} {value!r} is not a finite number")
        if self.density_std <= 0 or self.distance_length < 0:
            raise ModelError(
                f"model density_std {self.density_std} or distance_length {self.distance_length} is out of range"
            )
        if self.trust is not None and len(self.trust.atoms) != len(self.species):
            raise ModelError(f"trust statistics are of {len(self.trust.atoms)} species, not of {len(self.species)}")

    @property
    def species(self) -> tuple[str, ...]:
        """Chemical symbols the model knows."""
        return self.descriptor.species

    def distance_columns(self) -> list[int]:
        """Column ranges of the distances among the features, ``[start, stop, start, stop, ...]``."""
        d = self.descriptor
        if d.family != "scalar-product":
            return []
        per_species = d.n_distances + d.n_angle_atoms * d.n_angle_neighbors
        return [n for s in range(len(d.species)) for n in (s * per_species, s * per_species + d.n_distances)]

    @property
    def n_two_body(self) -> int:
        """Leading columns of the features that are two-body sums, which ``baseline`` may use."""
        d = self.descriptor
        return len(d.species) * d.n_radial if d.family == "smooth" else 0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of every tensor of the model file; all are float32."""
        n = self.descriptor.n_features
        shapes: dict[str, tuple[int, ...]] = {
            "feature_mean": (n,),
            "feature_std": (n,),
            "feature_low": (n,),
            "feature_high": (n,),
            "skip": self.network.skip_shape,
        }
        if self.target == "delta":
            shapes["baseline"] = (n,)
        for i, (rows, columns) in enumerate(self.network.shapes(n)):
            for kind in ("mean", "sigma"):
                shapes[f"layers.{i}.weight_{kind}"] = (rows, columns)
                shapes[f"layers.{i}.bias_{kind}"] = (rows,)
        if self.last_layer:
            size = self.network.shapes(n)[-1][1] + 1
            shapes["last_layer"] = (size, size)
        if self.trust is not None:
            shapes |= self.trust.tensor_shapes(n)
        return shapes

    def factors(self, uncertainty: str | None) -> CalibrationFactors:
        """The calibration of one kind of error bars."""
        return self.last_layer_calibration if uncertainty == "last-layer" else self.calibration_factors

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["descriptor"] = self.descriptor.to_dict()
        values["network"] = vars(self.network)
        for name in ("calibration_factors", "last_layer_calibration"):
            values[name] = vars(getattr(self, name))
        values["trust"] = None if self.trust is None else self.trust.to_dict()
        return {"format": FORMAT, **values}

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "model") -> ModelSpec:
        """From `to_json`; `where` names the source in error messages."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where}: the specification is not JSON ({error})") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ModelError(f"{where}: the specification is not one of a gpurho model")
        check_version(values.get("format_version"), FORMAT, where, ModelError)
        values["format_version"] = FORMAT_VERSION
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ModelError(f"{where}: the specification has unknown entries {unknown}")
        try:
            values["descriptor"] = DescriptorSpec.from_dict(values["descriptor"])
            values["network"] = NetworkSpec(**values["network"])
            for name in ("calibration_factors", "last_layer_calibration"):
                if name in values:
                    values[name] = CalibrationFactors(**values[name])
            if values.get("trust") is not None:
                values["trust"] = TrustStatistics(**values["trust"])
            return cls(**values)
        except KeyError as error:
            raise ModelError(f"{where}: the specification has no entry {error}") from None
        except (GpurhoError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{where}: {error}") from None
