"""What a report says of a density, as plain values: figures, settings, warnings, the atoms that are least sure."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.calibration import TARGETS
from gpurho.density import Density
from gpurho.errors import GpurhoError, ModelError, SettingsError
from gpurho.model import DensityModel, list_models, load_model
from gpurho.peratom import AtomCharges
from gpurho.pipelines.plan import human_seconds
from gpurho.pipelines.reportpictures import UNIT
from gpurho.structure import Structure
from gpurho.trust import KINDS, Trust

Rows = list[tuple[str, str]]
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

MAX_SUMMED = 2e8
"""Points of a field up to which sums of atoms are found unasked: that takes a look at every point."""

SIGNIFICANT = 3.0
"""Error bars by which the number of electrons may be off before the report warns."""


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
    electrons, sigma : of the points nearest to the atom
    ratio : float
        Sigma over that of the median atom.
    distance : float, optional
        From the training atoms, 1 where these end; `why`, a word for the reason, where there is one.
    """

    index: int
    symbol: str
    position: tuple[float, float, float]
    electrons: float
    sigma: float
    ratio: float
    distance: float | None = None
    why: str = ""


def formula(structure: Structure) -> str:
    """Chemical formula in alphabetic order with subscripts: Ge₃₂Si₃₂."""
    from ase.data import chemical_symbols

    numbers, counts = np.unique(structure.numbers, return_counts=True)
    parts = sorted((chemical_symbols[z], int(n)) for z, n in zip(numbers, counts, strict=True))
    return "".join(symbol + (str(n).translate(SUBSCRIPTS) if n > 1 else "") for symbol, n in parts)


def real(value: Any) -> float | None:
    """`value` if it is a finite number, else None: a file may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def part(values: Any, *names: str) -> Any:
    """The entry of nested mappings; None where there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def figure(value: float, digits: int = 3) -> str:
    """A number for people: so many digits, a true minus sign, powers of ten written as such."""
    if value == 0:
        return "0"
    text = f"{value:#,.{digits}g}".rstrip(".") if 1e-4 <= abs(value) < 1e6 else f"{value:.{digits - 1}e}"
    if "e" in text:
        head, power = text.split("e")
        text = f"{head} × 10{str(int(power)).replace('-', '⁻').translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return text.replace("-", "−")


def decimals(sigma: float) -> int:
    """Digits after the point that an error bar leaves, with two of its own."""
    return max(0, min(9, 1 - math.floor(math.log10(sigma)))) if sigma > 0 else 3


def with_error(value: float, sigma: float | None) -> str:
    """A value with its error bar, both to two digits of the latter."""
    if sigma is None or not math.isfinite(sigma):
        return f"{value:,.6g}".replace("-", "−")
    n = decimals(sigma)
    return f"{value:,.{n}f} ± {sigma:,.{n}f}".replace("-", "−")


# -- what was run -----------------------------------------------------------------------------------------------


def structure_rows(structure: Structure) -> Rows:
    """The structure in words."""
    from ase.data import atomic_masses, chemical_symbols
    from ase.units import kg

    numbers, counts = np.unique(structure.numbers, return_counts=True)
    kinds = ", ".join(f"{n:,} {chemical_symbols[z]}" for z, n in zip(numbers, counts, strict=True))
    cell = structure.cell
    lengths = np.linalg.norm(cell, axis=1)
    pairs = ((1, 2), (0, 2), (0, 1))
    angles = [math.degrees(math.acos(float(cell[i] @ cell[j] / lengths[i] / lengths[j]))) for i, j in pairs]
    mass = float(sum(atomic_masses[z] * n for z, n in zip(numbers, counts, strict=True))) / kg * 1e3
    periodic = [name for name, period in zip("abc", structure.pbc, strict=True) if period]
    return [
        ("Formula", formula(structure)),
        ("Atoms", kinds),
        ("Cell edges a, b, c", ", ".join(f"{x:.4f}" for x in lengths) + " Å"),
        ("Angles α, β, γ", ", ".join(f"{x:.2f}" for x in angles) + "°"),
        ("Periodic along", ", ".join(periodic) or "no axis"),
        ("Volume", f"{structure.volume:,.2f} Å³, {structure.volume / len(structure):,.3f} Å³ per atom"),
        ("Mass density", f"{mass / (structure.volume * 1e-24):,.3f} g/cm³"),
    ]


def run_rows(density: Density, source: Path | None) -> Rows:
    """Grid, settings, versions and times."""
    info, grid = density.info, density.grid
    settings, versions = part(info, "settings"), part(info, "versions")
    steps = np.linalg.norm(grid.steps, axis=1)
    rows: Rows = [
        ("Grid", f"{' × '.join(map(str, grid.shape))} = {math.prod(grid.shape):,} points"),
        ("Steps", ", ".join(f"{s:.4f}" for s in steps) + " Å"),
    ]
    region = info.get("region")
    if region is not None:
        rows.append(("Region", "points " + ", ".join(f"{a} to {b - 1}" for a, b in region)))
    if density.kept is not None:
        rows.append(("Kept", ", ".join(density.kept.keep.to_items())))
    if isinstance(settings, Mapping):
        kind = settings.get("uncertainty")
        if kind == "sampled":
            kind = f"sampled, {settings.get('samples')} draws, seed {settings.get('seed')}"
        rows.append(("Error bars", str(kind or "none")))
        rows.append(
            ("Electron number", f"made exact ({settings['conserve']})" if settings.get("conserve") else "as predicted")
        )
        rows.append(("Device", f"{settings.get('device')}, {settings.get('precision')}"))
    timing = part(info, "timing")
    if (total := real(part(timing, "total"))) is not None:
        speed = real(part(timing, "points_per_second"))
        rows.append(("Time", human_seconds(total) + (f", {speed:,.0f} points/s" if speed else "")))
    if isinstance(versions, Mapping):
        rows.append(("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    if source is not None:
        written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(source.stat().st_mtime))
        rows += [("File", source.name), ("File written", written)]
    return rows


def model_rows(info: Mapping[str, Any]) -> Rows:
    """The model: name, what it is, what it learned from. Empty where the file names none."""
    model, spec = part(info, "model"), part(info, "model", "spec")
    if not isinstance(model, Mapping):
        return []
    rows: Rows = [("Model", f"{model.get('name')}, fingerprint {str(model.get('fingerprint'))[:12]}")]
    valence = part(spec, "valence")
    if isinstance(valence, Mapping):
        rows.append(
            ("Elements", ", ".join(f"{s} ({n:g} electrons)" for s, n in valence.items() if real(n) is not None))
        )
    descriptor = part(spec, "descriptor")
    if isinstance(descriptor, Mapping):
        rows.append(("Descriptors", f"{descriptor.get('family', 'scalar-product')}, to {descriptor.get('cutoff')} Å"))
    network = part(spec, "network")
    if isinstance(network, Mapping):
        size = " × ".join(str(network.get(name)) for name in ("blocks", "layers", "width"))
        rows.append(("Network", f"{size} (blocks, layers, width)"))
    labels = part(spec, "dft")
    if isinstance(labels, Mapping) and labels:
        rows.append(("Labels", ", ".join(f"{k} {_plain(v)}" for k, v in labels.items())))
    sets = part(spec, "training", "datasets")
    if isinstance(sets, Sequence) and not isinstance(sets, str) and sets:
        rows.append(("Trained on", "; ".join(_data_set(s) for s in sets)))
    return rows


def _plain(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data_set(values: Any) -> str:
    train = part(values, "split", "train")
    n = len(train) if isinstance(train, list) else part(values, "snapshots")
    return f"{part(values, 'file')}, {n} snapshots"


# -- figures ----------------------------------------------------------------------------------------------------


def electron_rows(density: Density) -> Rows:
    """The integral with its error bar, against the number of electrons that the atoms bring."""
    predicted, sigma = density.electrons_predicted, density.electrons_std
    rows: Rows = [("Predicted", with_error(predicted, sigma))]
    expected = expected_electrons(density)
    if expected is not None:
        off = predicted - expected
        bars = f"{figure(abs(off) / sigma, 2)} error bars, " if sigma else ""
        text = with_error(off, sigma).split(" ±")[0]
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
        found.append(Warned(True, text))
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


def charges_of(density: Density, everything: bool = False) -> tuple[AtomCharges | None, str]:
    """Sums over the points of each atom, or None and why there are none."""
    if not density.has_field and (density.kept is None or density.kept.atom_sums is None):
        return None, "The prediction kept no sums of atoms; --keep atoms does."
    kept = density.kept is not None and density.kept.atom_sums is not None
    if not kept and math.prod(density.shape) > MAX_SUMMED and not everything:
        return None, (
            f"Not summed over the atoms: the field has {math.prod(density.shape):,} points. gpurho report --all-points"
            " does it, and predict --keep field --keep atoms keeps the sums."
        )
    try:
        return density.per_atom(), ""
    except SettingsError as error:
        return None, str(error)


def ranked(density: Density, charges: AtomCharges, trust: Trust | None, count: int) -> list[RankedAtom]:
    """The atoms with the largest standard deviations, largest first."""
    from ase.data import chemical_symbols

    sigma = charges.electrons_std
    if sigma is None:
        return []
    seen = np.flatnonzero(charges.volumes > 0)
    usual = float(np.median(sigma[seen])) if seen.size else 0.0
    order = seen[np.argsort(-sigma[seen], kind="stable")][:count]
    structure = density.structure
    return [
        RankedAtom(
            int(i),
            chemical_symbols[int(structure.numbers[i])],
            (float(structure.positions[i, 0]), float(structure.positions[i, 1]), float(structure.positions[i, 2])),
            float(charges.electrons[i]),
            float(sigma[i]),
            float(sigma[i]) / usual if usual > 0 else math.nan,
            None if trust is None else real(float(trust.per_atom[i])),
            "" if trust is None else KINDS[int(trust.why[i])],
        )
        for i in order
    ]


def sigma_histogram(charges: AtomCharges, bins: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many atoms have which sigma: counts and edges, electrons."""
    assert charges.electrons_std is not None  # asked for where there is an uncertainty
    values = charges.electrons_std[charges.volumes > 0]
    counts, edges = np.histogram(values, bins, (0.0, float(values.max()) * 1.02 or 1.0))
    return counts.astype(np.float64), edges


__all__ = ["GpurhoError", "RankedAtom", "Warned"]
