"""What a report says of a density, as plain values: figures, warnings, calibration, the atoms that are least sure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.calibration import TARGETS
from gpurho.density import Density
from gpurho.errors import ModelError
from gpurho.model import DensityModel, list_models, load_model
from gpurho.peratom import AtomCharges, per_atom
from gpurho.pipelines.reportfacts import Rows, figure, part, real, with_error
from gpurho.pipelines.reportpictures import UNIT
from gpurho.pipelines.summary import SIGNIFICANT
from gpurho.trust import KINDS, Trust

MAX_SUMMED = 1e8
"""Points of a field up to which sums of atoms are found unasked: that takes a look at every point."""

WHY = {
    "close": "atoms too close",
    "open": "surface or void",
    "missing": "neighbour missing",
    "crowded": "dense place",
    "unlike": "another order",
}
"""Kinds of `gpurho.trust` in words, where they need others."""

FEW_OUTSIDE = 1e-3
"""Share of the points outside of the training domain from which on that is a warning; hot liquids have a few."""


@dataclass(frozen=True)
class Warned:
    """Something to know before the density is used; grave ones come first."""

    grave: bool
    text: str


@dataclass(frozen=True)
class RankedAtom:
    """One of the atoms that the model is least sure about.

    Attributes
    ----------
    position : angstrom
    electrons, sigma : of the points nearest to the atom; NaN where they were not summed
    ratio : float
        Sigma over that of the median atom.
    distance : float, optional
        From the training atoms, 1 where these end; `why`, a word for the reason, where there is one.
    """

    index: int
    symbol: str
    position: tuple[float, float, float]
    electrons: float = math.nan
    sigma: float = math.nan
    ratio: float = math.nan
    distance: float | None = None
    why: str = ""


# -- figures ----------------------------------------------------------------------------------------------------


def electron_rows(density: Density) -> Rows:
    """The integral with its error bar, against the number of electrons that the atoms bring."""
    predicted, sigma = density.electrons_predicted, density.electrons_std
    rows: Rows = [("Predicted", with_error(predicted, sigma))]
    expected = expected_electrons(density)
    if expected is not None:
        off = predicted - expected
        bars = f"{figure(abs(off) / sigma, 2)} error bars, " if sigma else ""
        text = with_error(off, sigma).split(" ±")[0] if sigma else figure(off)
        rows += [("Expected", f"{expected:,g}"), ("Difference", f"{text} ({bars}{figure(100 * off / expected, 2)} %)")]
    if density.correction.kind is not None:
        rows.append((f"After conservation ({density.correction.kind})", f"{density.electrons:,.8g}"))
    rows.append(("Points of the grid", f"{density.totals.n_points:,}"))
    return rows


def field_rows(density: Density) -> Rows:
    """Ranges of the density and sizes of its sigmas, over all points."""
    totals = density.totals
    raw = "" if density.correction.kind is None else ", before conservation"
    rows: Rows = [
        (f"Lowest density{raw}", f"{figure(totals.min_mean)} {UNIT}"),
        (f"Highest density{raw}", f"{figure(totals.max_mean)} {UNIT}"),
    ]
    if density.mean_std is not None and density.max_std is not None:
        n, scale = totals.n_points, density.correction.scale
        rows += [
            ("Sigma of a point, average", f"{figure(density.mean_std)} {UNIT}"),
            ("Sigma of a point, largest", f"{figure(density.max_std)} {UNIT}"),
            ("Noise of the labels (aleatoric), rms", f"{figure(scale * math.sqrt(totals.sum_aleatoric2 / n))} {UNIT}"),
            ("Model's ignorance (epistemic), rms", f"{figure(scale * math.sqrt(totals.sum_epistemic2 / n))} {UNIT}"),
        ]
    return rows


def expected_electrons(density: Density) -> float | None:
    """Valence electrons of the structure, where the density covers all of it and they are known."""
    return real(density.info.get("electrons")) if density.info.get("region") is None else None


def share(n: int, total: int) -> str:
    """A count of points with its share."""
    return f"{n:,} of {total:,} points ({100 * n / max(total, 1):.2g} %)"


def warnings_of(density: Density, trust: Trust | None) -> list[Warned]:
    """What to know before the density is used."""
    totals, info, sigma = density.totals, density.info, density.electrons_std
    found: list[Warned] = []
    if trust is not None and trust.known:
        found.append(Warned(trust.level != "inside", f"The structure is {trust.sentence}."))
    if totals.n_outside:
        text = f"{share(totals.n_outside, totals.n_points)} lie outside of the training domain: extrapolated there."
        found.append(Warned(totals.n_outside > FEW_OUTSIDE * totals.n_points, text))
    expected = expected_electrons(density)
    if expected is not None and sigma and abs(density.electrons_predicted - expected) > SIGNIFICANT * sigma:
        off = abs(density.electrons_predicted - expected) / sigma
        found.append(
            Warned(True, f"The predicted number of electrons is {off:.1f} error bars away from that of the atoms.")
        )
    if totals.n_capped:
        text = f"{share(totals.n_capped, totals.n_points)} see fewer atoms than the descriptors count, as at surfaces."
        found.append(Warned(totals.n_capped > 0.01 * totals.n_points, text))
    if totals.n_negative:
        found.append(Warned(False, f"{share(totals.n_negative, totals.n_points)} have a negative density."))
    if part(info, "model") is None:
        found.append(
            Warned(
                False, "The file does not say which model made it, so training domain and calibration are not known."
            )
        )
    elif density.uncertain:
        found += _calibration_warnings(info)
    if not density.uncertain:
        found.append(Warned(False, "Predicted without error bars; gpurho predict --uncertainty analytic gives them."))
    elif not density.correlated:
        found.append(
            Warned(
                False,
                "The error bar of the electron number is an upper bound: how errors of points go together"
                " was not kept.",
            )
        )
    if info.get("region") is not None:
        found.append(Warned(False, "The density covers a region of the cell, so its integral has no expected value."))
    return sorted(found, key=lambda w: not w.grave)


def _calibration_warnings(info: Mapping[str, Any]) -> list[Warned]:
    used, tested = part(info, "settings", "uncertainty"), part(info, "model", "spec", "calibration")
    if not coverage_of(info):
        return [Warned(True, "The model has not been calibrated: how often its error bars hold is not known.")]
    kind = part(tested, "uncertainty")
    if isinstance(kind, str) and used not in (None, kind):
        return [Warned(False, f"The calibration was tested with {kind} error bars; this run has {used} ones.")]
    return []


# -- calibration ------------------------------------------------------------------------------------------------


def coverage_of(info: Mapping[str, Any]) -> list[float]:
    """Shares of test errors within 1, 2, 3 sigma; empty where the model does not say."""
    values = part(info, "model", "spec", "calibration", "coverage")
    if not isinstance(values, list) or len(values) != len(TARGETS):
        return []
    found = [real(value) for value in values]
    return [value for value in found if value is not None] if None not in found else []


def test_rows(info: Mapping[str, Any]) -> Rows:
    """Errors of the model on its own test snapshots."""
    metrics, tested = part(info, "model", "spec", "metrics"), part(info, "model", "spec", "calibration")
    rows: Rows = []
    if part(metrics, "dataset") is not None:
        rows.append(("Test set", str(part(metrics, "dataset"))))
        counts = ((part(metrics, "snapshots"), "snapshots"), (part(metrics, "n_points"), "points"))
        known = [f"{n:,.0f} {name}" for value, name in counts if (n := real(value)) is not None]
        rows.append(("Tested on", ", ".join(known) or "not known"))
    for name, label, factor, unit in (
        ("l1_per_electron", "L1 error per electron", 100.0, " %"),
        ("l1_per_electron_max", "L1 error, worst snapshot", 100.0, " %"),
        ("rmse", "RMS error", 1.0, f" {UNIT}"),
        ("nrmse", "RMS error, share of the range", 100.0, " %"),
        ("max_error", "Largest error of a point", 1.0, f" {UNIT}"),
    ):
        if (value := real(part(metrics, name))) is not None:
            rows.append((label, figure(factor * value) + unit))
    for name, label in (
        ("miscalibration_area", "Miscalibration area"),
        ("spearman", "Rank correlation of error and sigma"),
    ):
        if (value := real(part(tested, name))) is not None:
            rows.append((label, figure(value, 2)))
    return rows


# -- model and trust --------------------------------------------------------------------------------------------


def find_model(info: Mapping[str, Any], wanted: str | Path | DensityModel | None = None) -> DensityModel | None:
    """The model that made a density: `wanted`, or the shipped one with its fingerprint; None where it is not here.

    Raises
    ------
    ModelError
        Where `wanted` is another model.
    """
    fingerprint, name = part(info, "model", "fingerprint"), part(info, "model", "name")
    if wanted is not None:
        found = wanted if isinstance(wanted, DensityModel) else load_model(wanted)
        if fingerprint is not None and found.fingerprint() != fingerprint:
            raise ModelError(
                f"model {wanted!s} is not the one that made the density ({name!s}, {str(fingerprint)[:12]});"
                " give that one, or leave --model out"
            )
        return found
    for shipped in list_models():
        if shipped.name == name and (model := DensityModel.load(shipped.path)).fingerprint() == fingerprint:
            return model
    return None


def shipped_card(info: Mapping[str, Any]) -> str | None:
    """The card of the shipped model that made a density; None for any other model."""
    if find_model(info) is None:
        return None
    card = next(m.path for m in list_models() if m.name == part(info, "model", "name")).with_suffix(".md")
    return card.read_text(encoding="utf-8") if card.is_file() else None


# -- atoms ------------------------------------------------------------------------------------------------------


def charges_of(density: Density, everything: bool = False, progress: bool = True) -> tuple[AtomCharges | None, str]:
    """Sums over the points of each atom, or None and why there are none."""
    if not density.uncertain:
        return None, "Predicted without error bars, so sigmas of atoms are not known."
    if density.kept is not None and density.kept.atom_sums is not None:
        return density.per_atom(), ""
    if not density.has_field:
        return None, "The prediction kept no sums of atoms; --keep atoms does."
    n = math.prod(density.shape)
    if n > MAX_SUMMED and not everything:
        return None, (
            f"Not summed over the atoms: the field has {n:,} points. gpurho report --all-points does it, and predict"
            " --keep field --keep atoms keeps the sums."
        )
    from tqdm import tqdm

    # As Density.per_atom does it, with a bar.
    volume = real(density.info.get("correlation_volume")) or 0.0
    with tqdm(
        total=n, desc="sums of atoms", unit=" points", unit_scale=True, disable=None if progress else True
    ) as bar:
        fields = (density.mean, density.aleatoric, density.epistemic)

        def tick(points: int) -> None:
            bar.update(points)

        return per_atom(density.structure, density.grid, *fields, tick, volume), ""


def ranked(density: Density, charges: AtomCharges, trust: Trust | None, count: int) -> list[RankedAtom]:
    """The atoms with the largest standard deviations, largest first."""
    sigma = charges.electrons_std
    if sigma is None:
        return []
    seen = np.flatnonzero(charges.volumes > 0)
    usual = float(np.median(sigma[seen])) if seen.size else 0.0
    order = seen[np.argsort(-sigma[seen], kind="stable")][:count]
    return [
        RankedAtom(
            **_atom(density, trust, i),
            electrons=float(charges.electrons[i]),
            sigma=float(sigma[i]),
            ratio=float(sigma[i]) / usual if usual > 0 else math.nan,
        )
        for i in order.tolist()
    ]


def farthest(density: Density, trust: Trust, count: int) -> list[RankedAtom]:
    """The atoms that are farthest from the training atoms, farthest first, where nothing is known of their sigmas."""
    known = np.flatnonzero(np.isfinite(trust.per_atom))
    order = known[np.argsort(-trust.per_atom[known], kind="stable")][:count]
    return [RankedAtom(**_atom(density, trust, i)) for i in order.tolist()]


def _atom(density: Density, trust: Trust | None, i: int) -> dict[str, Any]:
    from ase.data import chemical_symbols

    x, y, z = density.structure.positions[i].tolist()
    return {
        "index": i,
        "symbol": chemical_symbols[int(density.structure.numbers[i])],
        "position": (x, y, z),
        "distance": None if trust is None else real(float(trust.per_atom[i])),
        "why": "" if trust is None else WHY.get(kind := KINDS[int(trust.why[i])], kind),
    }


def sigma_histogram(charges: AtomCharges, bins: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many atoms have which sigma: counts and edges, electrons."""
    assert charges.electrons_std is not None  # asked for where there is an uncertainty
    values = charges.electrons_std[charges.volumes > 0]
    counts, edges = np.histogram(values, bins, (0.0, float(values.max()) * 1.02 or 1.0))
    return counts.astype(np.float64), edges


__all__ = ["RankedAtom", "Warned", "charges_of", "find_model", "ranked", "warnings_of"]
