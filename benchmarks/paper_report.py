"""The report of `paper_tables`: its columns as text, and the picture of stage shares and ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 30
KINDS: dict[str, str | None] = {
    "mean": None, "analytic": "analytic", "last-layer": "last-layer", f"sampled-{SAMPLES}": "sampled",
}  # fmt: skip
"""Rows of the tables, and the uncertainty that `gpurho.predict` is asked for."""

TARGETS = {"predict_over_gemm": 0.7, "analytic_over_mean": 3.5, "sampled_over_mean": 31.0, "paper_over_gpurho": 50.0}
"""The first and the last are to be reached, the others not to be exceeded."""


def show(column: dict[str, Any]) -> None:
    """A column as lines of text."""
    published = column["published_seconds"]
    print(
        f"\n{column['system']} atoms, {column['grid'][0]}^3 points; in the paper descriptors took"
        f" {published['descriptors']} s, the network {published['network_cpu']} s (cores not given)"
    )
    header = f"{'way':8} {'kind':22} {'CPU s':>9} {'points/s':>9} {'descr.':>7} {'network':>8}"
    print(f"{header} {'faster':>7} {'measured':>9}")
    for way, rows in column["ways"].items():
        for kind, row in rows.items():
            share, speed = row["share"], row.get("speedup")
            print(
                f"{way:8} {kind:22} {row['cpu_seconds']:9.1f} {row['points_per_cpu_second']:9.0f}"
                f" {share['descriptors']:7.1%} {share['network']:8.1%} {'' if speed is None else f'{speed:.1f}x':>7}"
                f" {row['fraction_measured']:9.2%}",
                flush=True,
            )
    print(json.dumps(column["agreement"]))


def plot(report: dict[str, Any], path: Path) -> None:
    """Stage shares of the largest cells, and how much faster than the paper's way each cell is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = {m: [c for c in report["tables"] if c["system"].startswith(m + " ")] for m in ("Al", "SiGe")}
    groups = {m: columns for m, columns in groups.items() if columns}
    figure = Figure(figsize=(14, 4.6 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_2d(figure.subplots(len(groups), 2))
    names = {"paper": "paper's way", "same": "gpurho, same network", "shipped": "gpurho, shipped model"}
    stages = {"descriptors": "#0072b2", "network": "#e69f00", "rest": "#999999"}
    marks = dict(zip(KINDS, (("o", "#000000"), ("s", "#0072b2"), ("D", "#009e73"), ("^", "#d55e00")), strict=True))
    for (left, right), columns in zip(panels, groups.values(), strict=True):
        largest = columns[-1]
        rows = [(f"{names[w]}: {k}", r) for w, kinds in largest["ways"].items() for k, r in kinds.items()][::-1]
        begin = np.zeros(len(rows))
        for stage, color in stages.items():
            width = np.array([100 * row["share"][stage] for _, row in rows])
            left.barh([name for name, _ in rows], width, left=begin, color=color, label=stage)
            begin += width
        for y, (_, row) in enumerate(rows):
            seconds = row["cpu_seconds"]
            left.text(102, y, f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s", va="center", fontsize=8)
        left.set_xlim(0, 118)
        left.set_xticks([0, 50, 100], ["0", "50 %", "100 % of the CPU time"])
        left.set_title(
            f"{largest['system']} atoms, {largest['points'] / 1e6:.2f} million points, one thread", fontsize=10
        )
        atoms = [c["atoms"] for c in columns]
        for way, line in (("same", "--"), ("shipped", "-")):
            for kind, (marker, color) in marks.items():
                speed = [c["ways"][way][kind]["speedup"] for c in columns]
                right.plot(atoms, speed, line, marker=marker, color=color)
            speed = [c["ways"][way]["mean"]["speedup_over_point_by_point"] for c in columns]
            right.plot(atoms, speed, line, marker="o", color="#000000", markerfacecolor="white")
        right.axhline(TARGETS["paper_over_gpurho"], color="0.6", linewidth=1, linestyle=":")
        right.set(xscale="log", yscale="log", ylim=(0.8, 500), xlabel="atoms", ylabel="times faster (CPU time)")
        right.set_xticks(atoms, [str(n) for n in atoms])
        right.set_yticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
        right.minorticks_off()
        right.set_title("against the paper's way (dotted: goal)", fontsize=10)
        right.grid(alpha=0.3)
    panels[0, 0].legend(loc="upper center", bbox_to_anchor=(0.42, -0.1), ncols=3, fontsize=8, frameon=False)
    handles = [Line2D([], [], linestyle="", marker=m, color=c, label=k) for k, (m, c) in marks.items()]
    handles.append(
        Line2D(
            [], [], linestyle="", marker="o", color="black", markerfacecolor="white", label="mean, over point by point"
        )
    )
    handles += [Line2D([], [], linestyle=s, color="0.3", label=names[w]) for w, s in (("same", "--"), ("shipped", "-"))]
    panels[0, 1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
