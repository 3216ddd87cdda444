"""How many points have which density and which sigma."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.fields import blocks
from gpurho.kept import Histogram
from gpurho.ploterrors import check_reference
from gpurho.plotstyle import (
    DPI,
    LABELS,
    LINES,
    SMALL,
    check_picture_name,
    column_width,
    formula,
    new_figure,
    save,
    style,
    unit_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BINS = 10_000

NARROW = 5.0
"""Width in inches below which panels stand one below the other."""

SIGMAS = np.logspace(-8.0, 2.0, 301)
"""Edges of the bins of sigmas, e/angstrom^3, 30 a decade."""


def plot_histogram(
    density: Density,
    path: str | Path | None = None,
    *,
    reference: Density | None = None,
    bins: int = 100,
    column: str | float | None = None,
    title: str | None = None,
    dpi: int = DPI,
) -> Figure:
    """Histograms of the density and, beside it, of the sigmas: points on a logarithmic scale.

    The field is read once, block by block; of a prediction that kept histograms alone these are drawn, in their bins.

    Parameters
    ----------
    density : Density
    path : path, optional
        Picture to write; the name says the format.
    reference : Density, optional
        On the same grid, of the same atoms: its density in the same bins.
    bins : int
        Of the density, between its least and largest value.
    column : "single", "double" or inches
        By default double with sigmas, else single.
    title : str, optional
        By default the formula and the number of points; "" for none.
    dpi : int

    Raises
    ------
    SettingsError, GridError, StructureError, FormatError, StoreError
    """
    if path is not None:
        check_picture_name(path)
    if not (isinstance(bins, int | np.integer) and 1 <= bins <= MAX_BINS):
        raise SettingsError(f"bins {bins!r} are no number of bins; give 1 to {MAX_BINS}")
    if reference is not None:
        check_reference(density, reference)
    counts = field_histograms(density, int(bins), reference)
    with style():
        uncertain = density.uncertain
        width = column_width(column if column is not None else ("double" if uncertain else "single"))
        beside = uncertain and width > NARROW
        figure = new_figure(width, width * (0.38 if beside else 1.3 if uncertain else 0.72))
        n = 1 + uncertain
        panels: Any = figure.subplots(*((1, n) if beside else (n, 1)), squeeze=False).ravel()
        _stairs(panels[0], counts["mean"], "mean", "predicted" if reference is not None else "", filled=True)
        if "reference" in counts:
            _stairs(panels[0], counts["reference"], "reference", "reference")
        top = float(counts["mean"].edges[-1])
        panels[0].set_xlabel(unit_label(panels[0].xaxis, top, "density"))
        if uncertain:
            for name in ("std", "epistemic", "aleatoric"):
                if name in counts:
                    _stairs(panels[1], counts[name], name, LABELS[name], filled=name == "std")
            _log_axis(panels[1])
        for panel in panels:
            panel.set_yscale("log")
            panel.set_ylim(bottom=0.7)
            panel.set_ylabel("grid points in a bin")
            panel.tick_params(labelsize=SMALL, which="both")
            if panel.get_legend_handles_labels()[1]:
                panel.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.1, columnspacing=1.0)
        text = f"{formula(density.structure)}, {counts['mean'].n_points:,} grid points" if title is None else title
        if text:
            figure.suptitle(text, x=0.01, ha="left")
        return save(figure, path, dpi)


def field_histograms(density: Density, bins: int, reference: Density | None = None) -> dict[str, Histogram]:
    """Histograms of "mean", with sigmas of "std", "aleatoric" and "epistemic", and of "reference".

    Those of densities have `bins` equal bins from the least to the largest value of `density` and `reference`; those of
    sigmas the bins `SIGMAS`.
    """
    if not density.has_field:
        found = {name: density.histogram(name) for name in (("mean", "std") if density.uncertain else ("mean",))}
        if reference is not None:
            found["reference"] = _counted(reference, {"mean": found["mean"].edges})["mean"]
        return found
    both = [density, *([] if reference is None else [reference])]
    ranges = [_range(one) for one in both]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    edges = {"mean": np.linspace(low, high if high > low else low + 1e-6, bins + 1)}
    if density.uncertain:
        edges |= dict.fromkeys(("std", "aleatoric", "epistemic"), SIGMAS)
    found = _counted(density, edges)
    if reference is not None:
        found["reference"] = _counted(reference, {"mean": edges["mean"]})["mean"]
    return found


def _range(density: Density) -> tuple[float, float]:
    """Least and largest density: as the prediction summed it up, where no correction moves it; else from the field."""
    if density.correction.shift == 0.0:
        scale, sums = density.correction.scale, density.totals
        return scale * sums.min_mean, scale * sums.max_mean
    low, high = np.inf, -np.inf
    for box in blocks(density.mean):
        values = density.mean[box]
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _counted(density: Density, edges: dict[str, NDArray[np.float64]]) -> dict[str, Histogram]:
    found = {name: Histogram.of_values(np.empty(0), e) for name, e in edges.items()}
    fields = {name: getattr(density, name) for name in edges if name != "std"}
    for box in blocks(density.mean):
        values = {name: np.asarray(field[box], dtype=np.float64) for name, field in fields.items()}
        if "std" in edges:
            values["std"] = np.hypot(values["aleatoric"], values["epistemic"])
        found = {name: h + Histogram.of_values(values[name], h.edges) for name, h in found.items()}
    return found


def _stairs(panel: Axes, histogram: Histogram, name: str, label: str, filled: bool = False) -> None:
    """One histogram, from its first bin that is not empty to its last."""
    full = np.flatnonzero(histogram.counts)
    if not full.size:
        return
    part = slice(full[0], full[-1] + 1)
    counts, edges = histogram.counts[part], histogram.edges[full[0] : full[-1] + 2]
    color = LINES[name]
    if filled:
        panel.stairs(counts, edges, fill=True, color=color, alpha=0.3, linewidth=0, baseline=0.5)
    dash: Any = (0, (4, 2)) if name == "reference" else "-"
    steps = panel.stairs(counts, edges, color=color, linewidth=1.0, linestyle=dash, label=label or None, baseline=0.5)
    steps.set_gid(name)


def _log_axis(panel: Axes) -> None:
    """Sigmas on a logarithmic scale, with few enough numbers for any span."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlabel(unit_label(panel.xaxis, high, "$\\sigma$"))
    decades = np.log10(high / low)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    panel.xaxis.set_minor_locator(LogLocator(subs=np.arange(1.0, 10.0).tolist()))
    panel.xaxis.set_minor_formatter(NullFormatter())
