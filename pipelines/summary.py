"""What a finished prediction says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpurho.density import Density
from gpurho.pipelines.plan import human_seconds
from gpurho.pipelines.settings import Job
from gpurho.shards import folder_bytes
from gpurho.trust import unknown

SIGNIFICANT = 3.0
"""Error bars that the predicted electrons may be away from those of the atoms."""


def summarize(job: Job, density: Density, out: Path | None = None) -> dict[str, Any]:
    """The figures of a prediction as plain values."""
    totals, timing = density.totals, density.info.get("timing")
    whole = job.region is None
    return {
        "n_atoms": len(job.structure),
        "species": list(job.structure.symbols),
        "model": job.model_name,
        "device": job.device,
        "precision": job.precision,
        "uncertainty": job.uncertainty,
        "grid_shape": list(job.grid.shape),
        "region": None if whole else [list(pair) for pair in job.region or ()],
        "n_points": totals.n_points,
        "electrons": density.electrons,
        "electrons_predicted": density.electrons_predicted,
        "electrons_std": density.electrons_std,
        "electrons_std_is_bound": density.electrons_std is not None and not density.correlated,
        "electrons_expected": job.electrons if whole else None,
        "conserve": job.conserve,
        "mean_std": density.mean_std,
        "max_std": density.max_std,
        "min_density": totals.min_mean,
        "max_density": totals.max_mean,
        "n_negative": totals.n_negative,
        "n_capped": totals.n_capped,
        "n_tied": totals.n_tied,
        "n_outside": totals.n_outside,
        "trust": (density.trust or unknown(0)).to_dict(),
        "out": None if out is None else str(out),
        "out_bytes": None if out is None else folder_bytes(out),
        "timing": timing,
    }


def summary_text(s: dict[str, Any]) -> str:
    """A summary for people."""
    nx, ny, nz = s["grid_shape"]
    box = "" if s["region"] is None else f", region {s['region']}"
    lines = [
        f"atoms    {s['n_atoms']:,} {', '.join(s['species'])}; model {s['model']}, {s['device']}, {s['precision']}",
        f"points   {s['n_points']:,} of a grid {nx} x {ny} x {nz}{box}",
    ]
    error = "" if s["electrons_std"] is None else f" +- {s['electrons_std']:.3g}"
    error += " (an upper bound)" if s["electrons_std_is_bound"] else ""
    expected = "" if s["electrons_expected"] is None else f"; valence electrons {s['electrons_expected']:g}"
    lines.append(f"charge   {s['electrons_predicted']:.6g}{error} electrons predicted{expected}")
    if s["conserve"]:
        lines.append(f"         {s['electrons']:.9g} after conservation ({s['conserve']})")
    lines.append(f"density  {s['min_density']:.4g} to {s['max_density']:.4g} e/angstrom^3")
    if s["mean_std"] is not None:
        lines.append(f"sigma    {s['mean_std']:.3g} on average, {s['max_std']:.3g} at most, e/angstrom^3")
    lines.append(f"trust    {s['trust']['sentence']}")
    if s["electrons_expected"] is not None and s["electrons_std"]:
        off = abs(s["electrons_predicted"] - s["electrons_expected"]) / s["electrons_std"]
        if off > SIGNIFICANT:
            lines.append(f"warning  the predicted electrons are {off:.1f} error bars away from those of the atoms")
    if s["n_negative"]:
        points = "1 point has" if s["n_negative"] == 1 else f"{s['n_negative']:,} points have"
        lines.append(f"warning  {points} a negative density")
    if s["n_outside"]:
        share = s["n_outside"] / s["n_points"]
        lines.append(f"warning  {s['n_outside']:,} points ({share:.2%}) lie outside of the training data: extrapolated")
    if s["n_capped"]:
        share = s["n_capped"] / s["n_points"]
        lines.append(f"capped   {s['n_capped']:,} points ({share:.2%}) see fewer atoms than the descriptors count")
    timing = s["timing"]
    if timing and timing["n_points"]:
        parts = {name: timing[name] for name in ("setup", "features", "network", "wait")}
        shares = ", ".join(f"{name} {value / timing['total']:.1%}" for name, value in parts.items())
        lines.append(
            f"time     {human_seconds(timing['total'])}, {timing['points_per_second']:,.0f} points/s ({shares})"
        )
    elif s["out"]:
        lines.append("time     none: the file was complete")
    if s["out"]:
        lines.append(f"file     {s['out']}, {s['out_bytes'] / 2**20:,.1f} MiB")
    return "\n".join(lines)
