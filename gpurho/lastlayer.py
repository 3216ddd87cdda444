"""Posterior of the last layer alone: exact Bayesian linear regression on the last hidden activations.

With the hidden layers fixed at their means, the density output is linear in the weights and bias w of the last layer,
``f = w . phi`` with ``phi = (h, 1)``. Under a Gaussian prior and Gaussian noise its posterior is Gaussian with

    covariance^-1 = tempering * sum over points of phi phi^T / sigma^2 + prior precision

(Laplace approximation of the last layer, exact here). A point stands for less than one observation: errors at
neighbouring grid points go together, since one environment that is fitted badly is seen by thousands of points. The
factor `tempering` says how much less, and is chosen with the prior's scale by the likelihood of held-out snapshots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.errors import ModelError, SettingsError
from gpurho.layers import LOG_VARIANCE_LIMITS, last_activations, transform_features

if TYPE_CHECKING:
    from gpurho.model import DensityModel

BATCH = 8192
NOISES = ("learned", "constant")
PRIOR_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
TEMPERINGS = tuple(float(10.0 ** (-k / 2)) for k in range(11))
DEFAULT_TEMPERING = 0.01
"""Used where nothing is held out; validation on 32-atom aluminium chose 0.001 to 0.01."""

ROUNDING = 2.0**-9
"""Relative rounding of activations in bfloat16, which the posterior must not take for a signal."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Points of snapshots that were not trained on: features (n, n_features) and densities (n,), e/angstrom^3."""

    features: Tensor
    density: Tensor


def fit_last_layer(
    model: DensityModel,
    features: Tensor,
    density: Tensor,
    weights: Tensor | None = None,
    *,
    held_out: HeldOut | None = None,
    prior_scale: float | None = None,
    tempering: float | None = None,
    noise: str = "learned",
    refit: bool = False,
) -> DensityModel:
    """The model with a posterior of its last layer, for ``uncertainty="last-layer"``.

    Parameters
    ----------
    model : DensityModel
    features : (n, n_features) float32 tensor
        Raw features of training points.
    density : (n,) tensor, e/angstrom^3
        Labels; they decide noise "constant" and `refit`, and nothing else.
    weights : (n,) tensor, optional
        How many points each one stands for; ones by default.
    held_out : HeldOut, optional
        Points that choose `prior_scale` and `tempering` where those are not given.
    prior_scale : float, optional
        Standard deviation of the prior: of a weight in units of 1 / sqrt(inputs), of the bias as it is, both for the
        standardised target. 1 without `held_out`.
    tempering : float, optional
        Independent observations per point, above 0 and up to 1; `DEFAULT_TEMPERING` without `held_out`.
    noise : "learned" or "constant"
        Variance of the labels: the network's own output, or one number from the residuals, which then replaces it.
    refit : bool
        Take the posterior's mean for weights and bias of the density output; otherwise they stay.

    Raises
    ------
    SettingsError
        For arguments out of range or of other shapes.
    ModelError
        When the precision matrix is not positive definite.
    """
    if noise not in NOISES:
        raise SettingsError(f"noise {noise!r} is not known; give 'learned' or 'constant'")
    for name, value, most in (("prior_scale", prior_scale, 1e6), ("tempering", tempering, 1.0)):
        if value is not None and not 0 < value <= most:
            raise SettingsError(f"{name} {value!r} is out of range; give a number above 0 and up to {most:g}")
    spec = model.spec
    if features.ndim != 2 or features.size(1) != spec.descriptor.n_features or density.shape != features.shape[:1]:
        raise SettingsError(
            f"features {tuple(features.shape)} and density {tuple(density.shape)} do not fit; give"
            f" (n, {spec.descriptor.n_features}) and (n,)"
        )
    constant = _residual_variance(model, features, density, weights) if noise == "constant" else None
    precision, moment = _normal_equations(model, features, density, weights, constant)
    prior = np.full(len(precision), 1.0 / np.sqrt(max(1, len(precision) - 1)))
    prior[-1] = 1.0
    record: dict[str, float | str | bool | int] = {"points": len(features), "noise": noise, "refit": refit}
    if held_out is not None and (prior_scale is None or tempering is None):
        scales = PRIOR_SCALES if prior_scale is None else (prior_scale,)
        temperings = TEMPERINGS if tempering is None else (tempering,)
        prior_scale, tempering, score = _choose(model, held_out, precision, prior, scales, temperings, constant)
        record["held_out_nll"] = score
    prior_scale = 1.0 if prior_scale is None else prior_scale
    tempering = DEFAULT_TEMPERING if tempering is None else tempering
    total = tempering * precision + np.diag((prior * prior_scale) ** -2.0)
    try:
        covariance = np.linalg.inv(total)
        factor = np.linalg.cholesky(0.5 * (covariance + covariance.T))
    except np.linalg.LinAlgError:
        raise ModelError(
            f"the last layer's precision is not positive definite at prior_scale {prior_scale:g}; give a smaller one"
        ) from None
    tensors = dict(model.tensors)
    tensors["last_layer"] = torch.from_numpy(np.tril(factor).astype(np.float32))
    last = spec.network.n_hidden
    if refit:
        mean = torch.from_numpy((covariance @ (tempering * moment)).astype(np.float32))
        for kind, values in (("weight", mean[:-1]), ("bias", mean[-1])):
            name = f"layers.{last}.{kind}_mean"
            tensors[name] = tensors[name].clone()
            tensors[name][0] = values
    if constant is not None:
        for kind, value in (("weight", 0.0), ("bias", float(np.log(constant)))):
            name = f"layers.{last}.{kind}_mean"
            tensors[name] = tensors[name].clone()
            tensors[name][1] = value
    record |= {"prior_scale": float(prior_scale), "tempering": float(tempering)}
    return type(model)(replace(spec, last_layer=record), tensors)


def activations(model: DensityModel, features: Tensor) -> Iterator[tuple[slice, Array, Array]]:
    """Batches of points: which, phi (n, W + 1), and the learned variance (n,) of the standardised target."""
    spec, t = model.spec, model.tensors
    weights, biases = (
        [t[f"layers.{i}.{k}_mean"] for i in range(spec.network.n_hidden + 1)] for k in ("weight", "bias")
    )
    with torch.inference_mode():
        for start in range(0, len(features), BATCH):
            rows = slice(start, min(start + BATCH, len(features)))
            x = transform_features(features[rows].float(), spec.distance_columns(), spec.distance_length)
            h = last_activations(
                (x - t["feature_mean"]) / t["feature_std"], weights, biases, t["skip"], spec.network.layers
            )
            log_variance = torch.nn.functional.linear(h, weights[-1][1:], biases[-1][1:])[:, 0]
            phi = np.concatenate([h.double().numpy(), np.ones((len(h), 1))], axis=1)
            yield rows, phi, np.exp(log_variance.clamp(*LOG_VARIANCE_LIMITS).double().numpy())


def standardised_target(model: DensityModel, features: Tensor, density: Tensor) -> Array:
    """What the network's first output stands for at these points."""
    values = density.double()
    if model.baseline is not None:
        values = values - features[:, : len(model.baseline)].double() @ model.baseline.double()
    return np.asarray(((values - model.spec.density_mean) / model.spec.density_std).numpy())


def _mean(model: DensityModel, phi: Array) -> Array:
    last = model.spec.network.n_hidden
    weight = model.tensors[f"layers.{last}.weight_mean"][0].double().numpy()
    return np.asarray(phi[:, :-1] @ weight + float(model.tensors[f"layers.{last}.bias_mean"][0]))


def _residual_variance(model: DensityModel, features: Tensor, density: Tensor, weights: Tensor | None) -> float:
    target = standardised_target(model, features, density)
    share = np.ones(len(target)) if weights is None else weights.double().numpy()
    total = sum(
        float(share[rows] @ (_mean(model, phi) - target[rows]) ** 2) for rows, phi, _ in activations(model, features)
    )
    return max(total / float(share.sum()), float(np.exp(LOG_VARIANCE_LIMITS[0])))


def _normal_equations(
    model: DensityModel, features: Tensor, density: Tensor, weights: Tensor | None, constant: float | None
) -> tuple[Array, Array]:
    """Sums of phi phi^T / sigma^2 and phi y / sigma^2 over the points, float64."""
    target = standardised_target(model, features, density)
    precision, moment = np.zeros(()), np.zeros(())
    for rows, phi, variance in activations(model, features):
        scale = 1.0 / (variance if constant is None else np.full(len(phi), constant))
        if weights is not None:
            scale *= weights[rows].double().numpy()
        scaled = phi * scale[:, None]
        precision = precision + scaled.T @ phi
        moment = moment + scaled.T @ target[rows]
    # Rounding of the activations as one more noise of the inputs: directions in which they never moved by more
    # than that carry no information, and without this term would get the whole width of the prior.
    noise = np.diag(precision) * ROUNDING**2 / 3.0
    noise[-1] = 0.0
    return precision + np.diag(noise), moment


def _choose(
    model: DensityModel,
    held_out: HeldOut,
    precision: Array,
    prior: Array,
    scales: tuple[float, ...],
    temperings: tuple[float, ...],
    constant: float | None,
) -> tuple[float, float, float]:
    """Prior scale and tempering with the largest likelihood of the held-out points, and its negative logarithm.

    Closed form per candidate from one eigendecomposition. A common factor on sigma is profiled out, since
    calibration follows.
    """
    eigenvalues, vectors = np.linalg.eigh(precision * np.outer(prior, prior))
    eigenvalues = np.maximum(eigenvalues, 0.0)
    target = standardised_target(model, held_out.features, held_out.density)
    squares, noise, error2 = [], [], []
    for rows, phi, variance in activations(model, held_out.features):
        squares.append(((phi * prior) @ vectors) ** 2)
        noise.append(variance if constant is None else np.full(len(phi), constant))
        error2.append((_mean(model, phi) - target[rows]) ** 2)
    q, n, e2 = np.concatenate(squares), np.concatenate(noise), np.concatenate(error2)
    best = (np.inf, scales[0], temperings[0])
    for scale in scales:
        for tempering in temperings:
            variance = n + q @ (scale**2 / (1.0 + tempering * scale**2 * eigenvalues))
            score = 0.5 * float(np.mean(np.log(variance)) + np.log(np.mean(e2 / variance)))
            best = min(best, (score, scale, tempering))
    return best[1], best[2], best[0]
