"""Models: the specification, the file, and the fast evaluation of features.

A model file is one safetensors file: tensors, and the specification as JSON in its metadata. It holds no code, so
loading one from a stranger is safe. TorchScript is used in `gpurho.export` alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpurho.errors import ModelError, SettingsError
from gpurho.evaluator import Evaluator
from gpurho.export import ExportedModel, exported_archive, load_exported
from gpurho.layers import DensityNetwork, inverse_softplus_tensor
from gpurho.modelspec import ModelSpec
from gpurho.prediction import PredictionNetwork
from gpurho.tensorfiles import check_metadata, check_tensors, tensor_file

if TYPE_CHECKING:
    from gpurho.fused import FusedNetwork
    from gpurho.hostnet import HostNetwork
    from gpurho.scriptnet import ScriptNetwork

METADATA_KEY = "gpurho"
DATA_FOLDER = Path(__file__).parent / "data"
FEATURE_TENSORS = ("feature_mean", "feature_std", "feature_low", "feature_high")
BOUNDS = ("feature_low", "feature_high")
UNBOUNDED = 1e6
"""Standard deviations of the inputs beyond which the domain of a model ends that does not know its bounds."""

MAX_FILE_BYTES = 2 * 2**30


class DensityModel:
    """A trained model: its specification and its tensors.

    Parameters
    ----------
    spec : ModelSpec
    tensors : mapping of str to Tensor
        float32, with the names and shapes of ``spec.tensor_shapes()``.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        shapes = spec.tensor_shapes()
        _check_names(set(shapes), set(tensors), "model")
        for name, shape in shapes.items():
            _check_tensor(tensors[name], name, shape)
        if "last_layer" in shapes and bool(tensors["last_layer"].triu(1).any()):
            raise ModelError("tensor last_layer is not lower triangular")
        if "baseline" in shapes and bool(tensors["baseline"][spec.n_two_body :].any()):
            raise ModelError(f"tensor baseline has values beyond the {spec.n_two_body} columns of two-body sums")
        self.spec = spec
        # In memory of their own, aligned: products of a few rows may round differently where a file's bytes lie askew.
        self.tensors = {name: tensors[name].detach().cpu().contiguous().clone() for name in shapes}

    # --- parts -------------------------------------------------------------------------------------------------

    def _layers(self, what: str) -> list[Tensor]:
        return [self.tensors[f"layers.{i}.{what}"] for i in range(self.spec.network.n_hidden + 1)]

    def prediction_network(
        self,
        dtype: torch.dtype = torch.float32,
        uncertainty: str | None = "analytic",
        tensors: list[list[Tensor]] | None = None,
        fused: bool = False,
    ) -> PredictionNetwork:
        """The network in plain tensors; `tensors` = [weights, biases] replaces the means."""
        weights, biases = tensors or [self._layers("weight_mean"), self._layers("bias_mean")]
        analytic = uncertainty == "analytic"
        variances = (
            [[t.square() for t in self._layers(f"{k}_sigma")] for k in ("weight", "bias")] if analytic else [None, None]
        )
        factor = self.last_layer() if uncertainty == "last-layer" else None
        skip, layers = self.tensors["skip"], self.spec.network.layers
        return PredictionNetwork(weights, biases, skip, layers, dtype, variances[0], variances[1], factor, fused)

    def last_layer(self) -> Tensor:
        """Lower-triangular L of the covariance ``L L^T`` of the density output's weights and bias, (W + 1, W + 1).

        Raises
        ------
        ModelError
            For a model without it.
        """
        if "last_layer" not in self.tensors:
            raise ModelError(
                "the model has no posterior of its last layer; fit one with gpurho calibrate, or use"
                " uncertainty 'analytic'"
            )
        return self.tensors["last_layer"]

    @property
    def baseline(self) -> Tensor | None:
        """Coefficients of the leading, two-body columns of the raw features in the density; None without them."""
        return self.tensors["baseline"][: self.spec.n_two_body] if "baseline" in self.tensors else None

    @property
    def density_rms(self) -> float:
        """How large densities were in training, e/angstrom^3.

        Of the target "delta" it is found from the mean of the two-body part, whose spread is left out.
        """
        mean = self.spec.density_mean
        if self.baseline is not None:
            mean += float(self.tensors["feature_mean"][: self.spec.n_two_body].double() @ self.baseline.double())
        return math.hypot(mean, self.spec.density_std)

    @classmethod
    def from_network(cls, spec: ModelSpec, network: DensityNetwork, baseline: Tensor | None = None) -> DensityModel:
        """The model of a trained network; `baseline` (n_features,), e/angstrom^3, with the target "delta" only."""
        tensors = {k: getattr(network, k) for k in (*FEATURE_TENSORS, "skip")}
        for i, layer in enumerate(network.linears):
            for kind in ("weight", "bias"):
                tensors[f"layers.{i}.{kind}_mean"] = getattr(layer, f"{kind}_mean")
                tensors[f"layers.{i}.{kind}_sigma"] = nn.functional.softplus(getattr(layer, f"{kind}_rho"))
        if baseline is not None:
            tensors["baseline"] = baseline.float()
        return cls(spec, {k: v.detach().clone() for k, v in tensors.items()})

    def network(self) -> DensityNetwork:
        """A network to train further, with this model's posterior."""
        spec = self.spec
        net = DensityNetwork(spec.network, spec.descriptor.n_features, spec.distance_columns(), spec.distance_length)
        with torch.no_grad():
            for name in (*FEATURE_TENSORS, "skip"):
                getattr(net, name).copy_(self.tensors[name])
            for i, layer in enumerate(net.linears):
                for kind in ("weight", "bias"):
                    getattr(layer, f"{kind}_mean").copy_(self.tensors[f"layers.{i}.{kind}_mean"])
                    rho = inverse_softplus_tensor(self.tensors[f"layers.{i}.{kind}_sigma"])
                    getattr(layer, f"{kind}_rho").copy_(rho)
        return net

    def with_spec(self, **changes: Any) -> DensityModel:
        """The same tensors with entries of the specification replaced."""
        return DensityModel(replace(self.spec, **changes), self.tensors)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides predictions: tensors, descriptor, network, scaling, calibration factors.

        Not of the statistics of training atoms, which decide no density.
        """
        values = self.spec.to_dict()
        names = (
            "descriptor",
            "network",
            "density_mean",
            "density_std",
            "distance_length",
            "target",
            "calibration_factors",
            "last_layer_calibration",
        )
        digest = hashlib.sha256(json.dumps({n: values[n] for n in names}, sort_keys=True).encode())
        for name in sorted(n for n in self.tensors if not n.startswith("trust_")):
            digest.update(name.encode())
            digest.update(self.tensors[name].numpy().tobytes())
        return digest.hexdigest()

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluator(
        self,
        device: str = "cpu",
        precision: str = "auto",
        uncertainty: str | None = "analytic",
        samples: int = 30,
        seed: int = 0,
        batch_size: int | None = None,
        executor: str = "auto",
    ) -> Evaluator:
        """The fast path from features to densities; see `gpurho.evaluator.Evaluator`.

        `executor` is "script" (TorchScript, in batches of `batch_size` points), "fused" (one kernel: `gpurho.hostnet`
        on CPUs, `gpurho.fused` on GPUs) or "auto": "fused" on CPUs, unless `batch_size` is given.
        """
        from gpurho.evaluator import check_uncertainty, resolve_device, resolve_executor, resolve_precision

        where = resolve_device(device)
        resolved = resolve_precision(precision, where)
        check_uncertainty(uncertainty, samples)
        if executor == "auto" and batch_size is not None:
            executor = "script"
        executor = resolve_executor(executor, where.type, self.spec.network.n_hidden)
        if self.spec.network.n_hidden == 0:
            resolved = "fp32"  # the output layer, which is all there is, runs in float32
        samples = samples if uncertainty == "sampled" else 0
        from gpurho.executors import fused_network, script_network

        network: ScriptNetwork | FusedNetwork | HostNetwork
        if executor == "fused":
            network = fused_network(self, where, resolved, uncertainty, samples, seed)
        else:
            network = script_network(self, where, resolved, uncertainty, samples, seed, batch_size)
        return Evaluator(
            network,
            n_features=self.spec.descriptor.n_features,
            density_mean=self.spec.density_mean,
            density_std=self.spec.density_std,
            density_rms=self.density_rms,
            factors=self.spec.factors(uncertainty),
            precision=resolved,
            uncertainty=uncertainty,
        )

    def drawn(self, seed: int, index: int) -> list[list[Tensor]]:
        """Draw number `index` of the run `seed` from the posterior: [weights, biases], by layer."""
        from gpurho.uncertainty import draw_weights

        kinds = ("weight", "bias")
        means = [t for k in kinds for t in self._layers(f"{k}_mean")]
        values = draw_weights(means, [t for k in kinds for t in self._layers(f"{k}_sigma")], seed, index)
        half = len(values) // 2
        return [values[:half], values[half:]]

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file, whole or not at all."""
        write_atomic(path, tensor_file(self.tensors, {METADATA_KEY: self.spec.to_json()}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DensityModel:
        """Read a model file; everything is checked against its specification before a tensor is read.

        Raises
        ------
        ModelError
            For a file that is missing, damaged, of a newer format, or does not fit its specification.
        """
        from safetensors import SafetensorError, safe_open

        spec = read_spec(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                shapes = spec.tensor_shapes()
                # The first models had no bounds of their inputs.
                bounds = () if set(BOUNDS) & set(file.keys()) else BOUNDS
                shapes = {name: shape for name, shape in shapes.items() if name not in bounds}
                _check_names(set(shapes), set(file.keys()), str(path))
                for name, shape in shapes.items():
                    part = file.get_slice(name)
                    if tuple(part.get_shape()) != shape or part.get_dtype() != "F32":
                        raise ModelError(
                            f"{path}: tensor {name} is {part.get_dtype()} {tuple(part.get_shape())};"
                            f" the specification says F32 {shape}"
                        )
                tensors = {name: file.get_tensor(name) for name in shapes}
                check_tensors(tensors, file.metadata() or {}, str(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: the model file is damaged ({error})") from None
        try:
            for name, sign in zip(bounds, (-1, 1), strict=False):
                tensors[name] = tensors["feature_mean"] + sign * UNBOUNDED * tensors["feature_std"]
            return cls(spec, tensors)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None

    def export(self, path: str | os.PathLike[str], uncertainty: str = "analytic") -> None:
        """Write a self-contained TorchScript archive for C++ and other hosts.

        Its ``forward`` takes raw float32 features (n, n_features) and returns (mean, aleatoric, epistemic) in
        e/angstrom^3; the specification lies in its extra file ``spec.json``. A TorchScript archive is code: read
        it back with `load_exported`, from sources you trust only. `uncertainty` is "analytic" or "last-layer".
        """
        if uncertainty not in ("analytic", "last-layer"):
            raise SettingsError(f"uncertainty {uncertainty!r} cannot be exported; give 'analytic' or 'last-layer'")
        write_atomic(path, exported_archive(self, uncertainty))


@dataclass(frozen=True)
class ModelInfo:
    """One line about a model file."""

    name: str
    path: Path
    spec: ModelSpec


def list_models(folder: str | os.PathLike[str] | None = None) -> list[ModelInfo]:
    """The models that come with the library (or lie in `folder`), by name; reads specifications only."""
    where = DATA_FOLDER if folder is None else Path(folder)
    return [ModelInfo(p.stem, p, read_spec(p)) for p in sorted(where.glob("*.safetensors"))]


def load_model(name_or_path: str | os.PathLike[str]) -> DensityModel:
    """A model by the name of a shipped one or by the path of its file.

    Parameters
    ----------
    name_or_path : str or path
        "al", "sige" (`gpurho.models` lists them), or a ``*.safetensors`` file that `train` or `calibrate` wrote; a file
        of that name comes first.

    Returns
    -------
    DensityModel

    Raises
    ------
    ModelError
        Where there is neither, or the file is damaged, of another kind or of a later version.
    """
    path = Path(name_or_path)
    shipped = {p.stem: p for p in DATA_FOLDER.glob("*.safetensors")}
    if str(name_or_path) in shipped and not path.is_file():
        path = shipped[str(name_or_path)]
    if not path.is_file():
        known = ", ".join(sorted(shipped)) or "none"
        raise ModelError(f"model {str(name_or_path)!r} is neither a file nor a shipped model (shipped: {known})")
    return DensityModel.load(path)


def read_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """The specification of a model file, without its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            raise ModelError(f"{path}: {size} bytes is more than a model file may have ({MAX_FILE_BYTES})")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from None
    if METADATA_KEY not in metadata:
        raise ModelError(f"{path}: a safetensors file without a gpurho specification")
    check_metadata(metadata, str(path))
    return ModelSpec.from_json(metadata[METADATA_KEY], str(path))


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(
            f"{target} cannot be written: {reason}; what was there is unchanged, make room and run again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _check_names(expected: set[str], found: set[str], where: str) -> None:
    if expected != found:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise ModelError(
            f"{where}: tensors do not fit the specification: missing {missing[:3]}, unexpected {extra[:3]}"
        )


def _check_tensor(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ModelError(
            f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}; the specification says float32 {shape}"
        )
    if not torch.isfinite(tensor).all():
        raise ModelError(f"tensor {name} has values that are not finite")
    if (name.endswith("_sigma") or name == "feature_std") and not bool((tensor > 0).all()):
        raise ModelError(f"tensor {name} has values that are not positive")


__all__ = [
    "DensityModel",
    "Evaluator",
    "ExportedModel",
    "ModelInfo",
    "ModelSpec",
    "list_models",
    "load_exported",
    "load_model",
    "read_spec",
    "write_atomic",
]
