"""A picture of how well error bars describe errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from gpurho.calibration import TARGETS, reliability
from gpurho.errors import SettingsError, StoreError
from gpurho.plotting import check_picture_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 12


def plot_calibration(
    mean: ArrayLike, error: ArrayLike, sigma: ArrayLike, path: str | Path | None = None, title: str = "", dpi: int = 150
) -> Figure:
    """Four panels: calibration curve, scores against a Gaussian, error by sigma, coverage by density.

    Parameters
    ----------
    mean, error, sigma : (n,) arrays, e/angstrom^3
        Predicted density, its error, and total sigma.
    path : path, optional
        Picture to write; the name says the format (png, pdf, svg).

    Raises
    ------
    SettingsError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.special import erf

    m, e, s = (np.asarray(v, np.float64).ravel() for v in (mean, error, sigma))
    if not m.size == e.size == s.size or m.size < 100:
        raise SettingsError(f"{m.size} densities, {e.size} errors, {s.size} sigmas; a picture needs 100 of each")
    z = e / np.maximum(s, 1e-30)
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (curve, scores), (width, bins) = figure.subplots(2, 2)

    level = np.linspace(0.0, 1.0, 201)
    inside = np.searchsorted(np.sort(erf(np.abs(z) / np.sqrt(2.0))), level, side="right") / z.size
    curve.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="exact")
    curve.plot(level, inside, color="C0", label="observed")
    curve.set(xlabel="probability of the central interval", ylabel="share of errors inside", title="calibration")
    curve.legend(frameon=False)

    at = np.linspace(-5, 5, 101)
    scores.hist(np.clip(z, -5, 5), bins=at.tolist(), density=True, color="C0", alpha=0.6, label="error / sigma")
    scores.plot(at, np.exp(-0.5 * at**2) / np.sqrt(2 * np.pi), color="black", linewidth=1, label="Gaussian")
    scores.set(yscale="log", ylim=(1e-5, 1), xlabel="error / sigma", ylabel="density", title="scores")
    scores.legend(frameon=False)

    parts = np.array_split(np.argsort(s), 20)
    spread, rms = ([float(np.sqrt(np.mean(v[rows] ** 2))) for rows in parts] for v in (s, e))
    ends = [min(spread + rms) * 0.9, max(spread + rms) * 1.1]
    width.plot(ends, ends, color="0.6", linewidth=1)
    width.plot(spread, rms, "o-", color="C0", markersize=3)
    width.set(xscale="log", yscale="log", xlabel="sigma, e/angstrom$^3$", ylabel="rms error, e/angstrom$^3$")
    width.set_title("error by sigma")

    rows = reliability(m, e, s, BINS)
    middle = [0.5 * (row.low + row.high) for row in rows]
    for k, target in enumerate(TARGETS):
        bins.axhline(100 * target, color="0.6", linewidth=1)
        bins.plot(
            middle, [100 * row.coverage[k] for row in rows], "o-", color=f"C{k}", markersize=3, label=f"{k + 1} sigma"
        )
    bins.set(xlabel="predicted density, e/angstrom$^3$", ylabel="errors inside, %", title="coverage by density")
    bins.legend(frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    if path is not None:
        try:
            figure.savefig(path, dpi=dpi)
        except OSError as problem:
            raise StoreError(f"{path} cannot be written: {problem.strerror}; check the folder") from None
    return figure
