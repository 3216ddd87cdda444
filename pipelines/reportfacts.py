"""What was run, in words: structure, model, settings, versions; and numbers as people write them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpurho.density import Density
from gpurho.pipelines.plan import human_seconds
from gpurho.structure import Structure

Rows = list[tuple[str, str]]
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


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


__all__ = ["Rows", "figure", "formula", "part", "real", "with_error"]
