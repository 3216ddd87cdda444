"""Charts of the paper from our results; maps are in `gpurho.pipelines.paper_maps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.fieldstats import DENSITY_EDGES, LEVELS, FieldCounts
from gpurho.pipelines.paper_maps import DFT, OURS, PAPER, new_figure
from gpurho.pipelines.paper_sets import NAMES
from gpurho.pipelines.paper_tables import LatticeRow, Row
from gpurho.units import BOHR, HARTREE, PER_ANGSTROM3

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C5A2B", "#7F7F7F")
MARKERS = "osD^vP*Xp"
ATOM_TICKS = (32, 64, 128, 256, 512, 1024)
"""Numbers of atoms that are written at an axis."""


def draw_accuracy(tables: dict[str, list[Row]]) -> Figure:
    """Figure 6: L1 per electron and energy errors by case, ours beside the paper's, with targets."""
    figure = new_figure(6.6 * len(tables), 8.0)
    grid = figure.subplots(2, len(tables), squeeze=False)
    columns = (("l1", "L1 per electron"), ("energy", "error of the ground-state energy, Ha/atom"))
    for (material, rows), panels in zip(tables.items(), grid.T, strict=True):
        for panel, (column, title) in zip(panels, columns, strict=True):
            x = np.arange(len(rows))
            cells = [row.cells[column] for row in rows]
            for offset, name, color, label in ((-0.2, "paper", PAPER, "paper"), (0.2, "ours", OURS, "this library")):
                known = [i for i, c in enumerate(cells) if getattr(c, name) is not None]
                panel.bar(x[known] + offset, [getattr(cells[i], name) for i in known], 0.38, color=color, label=label)
            wanted = [i for i, c in enumerate(cells) if c.target is not None]
            if wanted:
                panel.hlines(
                    [cells[i].target for i in wanted],
                    x[wanted],
                    x[wanted] + 0.4,
                    color="black",
                    linewidth=2,
                    label="target",
                )
            panel.set_yscale("log")
            panel.set_xticks(x, [row.name.replace("all", "entire set") for row in rows], rotation=25, ha="right")
            panel.set_ylabel(title)
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
        panels[1].axhline(1.6e-3, color=DFT, linestyle=":", linewidth=1.4, label="chemical accuracy")
        panels[0].set_title(NAMES[material])
        for panel in panels:
            panel.legend(fontsize=8, framealpha=1.0, edgecolor="none")
    return figure


def draw_equations(rows: Sequence[LatticeRow]) -> Figure:
    """Figure 7: energy against lattice parameter, labels and predictions."""
    figure = new_figure(5.6 * len(rows), 4.4)
    for panel, row in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
        origin = row.curves["dft"].energy
        for source, color, marker, label in (("dft", DFT, "s", "DFT"), ("model", OURS, "o", "predicted density")):
            curve = row.curves.get(source)
            if curve is None:
                continue
            edge = np.cbrt(4 * curve.volumes) / BOHR
            energy = 1e3 * (curve.energies - origin) / HARTREE
            fill = "none" if source == "dft" else color
            size = 9 if source == "dft" else 4
            panel.plot(edge, energy, linestyle="", marker=marker, ms=size, mfc=fill, color=color, label=label)
            panel.axvline(
                curve.lattice_parameter(4) / BOHR, color=color, linestyle=":" if source == "dft" else "--", lw=1
            )
        panel.set_xlabel("lattice parameter, Bohr")
        panel.set_ylabel("free energy less its DFT minimum, mHa/atom")
        panel.set_title(f"Al, {row.our_case}", fontsize=10)
        panel.legend(fontsize=9, frameon=False)
        panel.grid(alpha=0.3)
    return figure


def draw_sizes(
    series: dict[str, list[tuple[float, dict[str, float]]]], paper: dict[str, list[tuple[float, float]]]
) -> Figure:
    """Error of labelled cells and sigma of built crystals against the number of atoms.

    Parameters
    ----------
    series : dict
        By material: (atoms, values), values any of l1, rmse, epistemic, aleatoric, sigma (e/angstrom^3 but for l1).
    paper : dict
        By material: (atoms, L1 per electron) of the paper.
    """
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2)
    for k, (material, points) in enumerate(series.items()):
        name = NAMES[material]
        known = sorted((n, v["l1"]) for n, v in points if "l1" in v)
        if known:
            left.plot(*zip(*known, strict=True), marker=MARKERS[k], color=OURS, label=f"{name}, this library", ls="-")
        left.plot(
            *zip(*sorted(paper[material]), strict=True), marker=MARKERS[k], color=PAPER, ls="--", label=f"{name}, paper"
        )
        for field, style in (("epistemic", "-"), ("aleatoric", "--")):
            sizes = sorted((n, v[field] * PER_ANGSTROM3) for n, v in points if field in v)
            if sizes:
                label = f"{name}, {field}"
                right.plot(*zip(*sizes, strict=True), marker=MARKERS[k], color=COLORS[k], ls=style, label=label)
    left.set_ylabel("L1 per electron")
    right.set_ylabel("root mean square sigma, e/Bohr$^3$")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ATOM_TICKS, [str(n) for n in ATOM_TICKS])
        panel.set_xlabel("atoms")
        panel.set_ylim(bottom=0, top=1.25 * panel.get_ylim()[1])
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def draw_calibration(sets: dict[str, FieldCounts]) -> Figure:
    """Share of errors inside central intervals, and error against sigma, by data set."""
    figure = new_figure(11.0, 4.8)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="black", lw=1, ls=":", label="exact")
    ends = []
    for k, (name, counts) in enumerate(sets.items()):
        style: dict[str, Any] = {
            "color": COLORS[k % len(COLORS)],
            "marker": MARKERS[k % len(MARKERS)],
            "ms": 4,
            "label": name,
        }
        left.plot(LEVELS, counts.coverage(), lw=1.2, **style)
        sigma, error = (x * PER_ANGSTROM3 for x in counts.error_against_sigma())
        right.plot(sigma, error, lw=1.2, **style)
        ends += [*sigma, *error]
    if ends:
        span = [min(ends), max(ends)]
        right.plot(span, span, color="black", lw=1, ls=":")
    left.set(xlabel="probability of the interval", ylabel="share of errors inside", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="sigma of a bin, e/Bohr$^3$", ylabel="root mean square error in it, e/Bohr$^3$")
    right.set_xscale("log")
    right.set_yscale("log")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    return figure


def draw_histograms(sets: dict[str, dict[str, FieldCounts]]) -> Figure:
    """Distribution of the density over points: labels and predictions of the smallest cells, by material."""
    figure = new_figure(5.6 * len(sets), 4.2)
    edges = DENSITY_EDGES * PER_ANGSTROM3
    for panel, (material, groups) in zip(np.atleast_1d(figure.subplots(1, len(sets))), sets.items(), strict=True):
        for k, (name, counts) in enumerate(groups.items()):
            width = np.diff(edges) * counts.n_points
            color = COLORS[k % len(COLORS)]
            panel.stairs(counts.reference / width, edges, color=color, lw=1.4, label=f"{name}, DFT")
            panel.stairs(counts.predicted / width, edges, color=color, lw=1.0, ls=":", label=f"{name}, predicted")
        top = max(float(edges[1:][c.reference > 0].max()) for c in groups.values())
        panel.set_xlim(0, 1.05 * top)
        panel.set_yscale("log")
        panel.set_xlabel("density, e/Bohr$^3$")
        panel.set_ylabel("share of points per e/Bohr$^3$")
        panel.set_title(NAMES[material])
        panel.legend(fontsize=8, frameon=False)
        panel.grid(alpha=0.3)
    return figure


def draw_roads(rows: Sequence[dict[str, Any]]) -> Figure:
    """Figure 14: error on the largest cells and the DFT time of the training data, model by model.

    Each row has name, rmse and epistemic (e/angstrom^3) and hours (None where the labels do not say).
    """
    figure = new_figure(10.0, 4.2)
    left, right = figure.subplots(1, 2)
    x = np.arange(len(rows))
    left.bar(x - 0.2, [r["rmse"] * PER_ANGSTROM3 for r in rows], 0.38, color=OURS, label="RMSE")
    left.bar(x + 0.2, [r["epistemic"] * PER_ANGSTROM3 for r in rows], 0.38, color=COLORS[4], label="epistemic sigma")
    left.set_ylabel("e/Bohr$^3$")
    left.legend(fontsize=9, frameon=False)
    known = [i for i, r in enumerate(rows) if r["hours"] is not None]
    right.bar(x[known], [rows[i]["hours"] for i in known], 0.5, color=COLORS[2])
    right.set_ylabel("hours of DFT behind the training data")
    for i in set(range(len(rows))) - set(known):
        right.text(i, 0, "not recorded", rotation=90, ha="center", va="bottom", fontsize=8)
    for panel in (left, right):
        panel.set_xticks(x, [r["name"] for r in rows], rotation=20, ha="right")
        panel.set_xlim(-0.7, len(rows) - 0.3)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    return figure


def draw_selection(candidates: Sequence[dict[str, Any]], chosen: dict[str, int]) -> Figure:
    """Figure 15: error against the number of descriptors; candidates have series, n_features, rmse."""
    figure = new_figure(6.8, 4.6)
    panel: Axes = figure.subplots()
    for k, name in enumerate(dict.fromkeys(c["series"] for c in candidates)):
        members = sorted((c["n_features"], c["rmse"] * PER_ANGSTROM3) for c in candidates if c["series"] == name)
        label = "distances (set I)" if name == "distances" else f"angles, {name}" if name.startswith("k =") else name
        line: dict[str, Any] = {"marker": MARKERS[k % len(MARKERS)], "color": COLORS[k % len(COLORS)], "label": label}
        panel.plot(*zip(*members, strict=True), lw=1.2, **line)
    total = chosen["M"] + chosen["M_a"] * chosen["k"]
    panel.axvline(total, color=PAPER, ls="--", lw=1, label=f"the paper's choice, {total}")
    panel.set(xlabel="number of descriptors", ylabel="RMSE on held-out snapshots, e/Bohr$^3$")
    panel.legend(fontsize=9, frameon=False)
    panel.grid(alpha=0.3)
    return figure


def draw_guides(guides: dict[str, list[dict[str, Any]]]) -> Figure:
    """KL divergence of the largest cells' density and descriptors from smaller ones': rows of `SizeGuide.to_dict`."""
    figure = new_figure(5.6 * len(guides), 4.2)
    for panel, (material, sizes) in zip(np.atleast_1d(figure.subplots(1, len(guides))), guides.items(), strict=True):
        rows = sizes[:-1]
        atoms = [r["atoms"] for r in rows]
        for k, (name, what) in enumerate((("density", "density"), ("features", "descriptors"))):
            values = [r[f"{name}_largest"] for r in rows]
            noise = [r[f"{name}_noise"] for r in rows]
            panel.plot(atoms, values, color=COLORS[k], marker=MARKERS[k], label=what)
            panel.plot(atoms, noise, color=COLORS[k], ls=":", marker=MARKERS[k], mfc="none", label=f"{what}, noise")
        panel.set_xlabel("atoms")
        panel.set_xticks(atoms)
        panel.set_ylabel(f"KL divergence of {sizes[-1]['atoms']:.0f} atoms from them, nats")
        panel.set_yscale("log")
        panel.set_title(NAMES[material])
        panel.legend(fontsize=8, frameon=False)
        panel.grid(alpha=0.3)
    return figure
