"""A report as one HTML page that needs nothing else: text, pictures, style and script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.calibration import TARGETS
from gpurho.pipelines.reportcard import card_html
from gpurho.pipelines.reportdata import RankedAtom, Warned
from gpurho.pipelines.reportfacts import Rows, decimals, figure, with_error
from gpurho.pipelines.reportpictures import UNIT, Panel, bars, gradient, palette_of, tick_text
from gpurho.pipelines.reportslices import CLOSE_UP, LOOK, MAX_ATOMS, WITHIN, Frames, Scale

PLAIN_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
TITLES = {"mean": "Density", "std": "Sigma"}


@dataclass(frozen=True, eq=False)
class Report:
    """All that a page shows; texts are plain, the page escapes them.

    Attributes
    ----------
    title, kicker, lede : str
        Heading, the line above it, the sentence below it.
    key : list of (name, value, remark)
        The figures that stand out.
    views : list of Frames
        Planes across the cell vectors.
    scales : dict of str to Scale
        Of "mean" and "std".
    closeups : list of Frames
        One for each of `atoms`, or none.
    kinds : (n_atoms,) array of int
        Which of `symbols` each atom is.
    sigmas : (counts, edges), optional
        How many atoms have which sigma, electrons.
    why_no_slices, why_no_atoms : str
        What stands in place of what is missing.
    """

    title: str
    kicker: str
    lede: str
    key: list[tuple[str, str, str]]
    warnings: list[Warned]
    electrons: Rows
    field: Rows
    structure: Rows
    model: Rows
    run: Rows
    coverage: list[float]
    tests: Rows
    views: list[Frames]
    scales: dict[str, Scale]
    kinds: NDArray[np.int64]
    symbols: list[str]
    atoms: list[RankedAtom]
    closeups: list[Frames]
    edges: tuple[float, ...]
    card: str | None = None
    slices_note: str = ""
    why_no_slices: str = ""
    why_no_atoms: str = ""
    atoms_note: str = ""
    trust: str = ""
    sigmas: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    histograms: list[tuple[str, NDArray[np.float64], NDArray[np.float64]]] = default(default_factory=list)
    footer: str = ""


def page(report: Report) -> str:
    """The text of the page."""
    style, script = (files("gpurho.data").joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    slices, data = _slices(report)
    sections = [
        ("warnings", "What to know", _warnings(report)),
        ("slices", "Slices", slices),
        ("totals", "Totals", _totals(report)),
        ("atoms", "Where the model is least sure", _atoms(report)),
        ("calibration", "Calibration of the model", _calibration(report)),
        ("run", "What was run", _run(report)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in shown)
    body = "".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{escape(title)}</h2>{text}</section>'
        for name, title, text in shown
    )
    head = (
        f'<p class="kicker">{escape(report.kicker)}</p><h1>{rich(report.title)}</h1>'
        f'<p class="lede">{escape(report.lede)}</p><dl class="key">{_key(report)}</dl>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    )
    gradients = "".join(gradient(name) for name in report.scales)
    defs = f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{gradients}</defs></svg>'
    # Data in a script element: nothing in it may end the element.
    values = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Whatever a file held, the page runs this one script and asks for nothing beyond itself.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="gpurho">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(report.title)}: electron density</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>{defs}<header>{head}</header>\n<main>{body}</main>\n"
        f"<footer><p>{escape(report.footer)}</p></footer>\n"
        f'<script type="application/json" id="report-data">{values}</script>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )


def rich(text: str) -> str:
    """Escaped text with subscripts set as such, which not every typeface has, and units that are not torn apart."""
    safe = escape(text).replace(f" {UNIT}", f'\N{NO-BREAK SPACE}<span class="unit">{UNIT}</span>')
    return re.sub("[₀-₉]+", lambda m: f"<sub>{m[0].translate(PLAIN_DIGITS)}</sub>", safe)


def _key(report: Report) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in report.key
    )


def _table(rows: Rows) -> str:
    body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{rich(v)}</td></tr>' for k, v in rows)
    return f"<table><tbody>{body}</tbody></table>"


def _warnings(report: Report) -> str:
    if not report.warnings:
        items = "<p>Nothing that counts against this density was found.</p>"
    else:
        items = "".join(
            f'<li class="{"grave" if w.grave else "mild"}"><strong>{"Warning" if w.grave else "Note"}:</strong>'
            f" {escape(w.text)}</li>"
            for w in report.warnings
        )
        items = f'<ul class="warnings">{items}</ul>'
    return items + (f'<p class="note">{escape(report.trust)}</p>' if report.trust else "")


def _totals(report: Report) -> str:
    pictures = "".join(
        f"<figure>{bars(list(counts), list(edges), f'{name}, {UNIT}', f'Histogram of the {name} over the points.')}"
        f"<figcaption>How many points have which {escape(name)}.</figcaption></figure>"
        for name, counts, edges in report.histograms
    )
    return (
        f'<div class="facts numbers"><div><h3>Electrons</h3>{_table(report.electrons)}</div>'
        f"<div><h3>Field</h3>{_table(report.field)}</div></div>{pictures}"
    )


# -- slices -----------------------------------------------------------------------------------------------------


def _slices(report: Report) -> tuple[str, dict[str, Any]]:
    """The planes with their sliders, and what the script has to know of them."""
    data: dict[str, Any] = {"unit": UNIT, "symbols": report.symbols, "views": [], "palettes": {}}
    for name in report.scales:
        colors = palette_of(name)[1:].astype(int)
        data["palettes"][name] = [int(r) << 16 | int(g) << 8 | int(b) for r, g, b in colors]
    if not report.views:
        return f"<p>{escape(report.why_no_slices)}</p>", data
    views = []
    for frames in report.views:
        text, values = _view(report, frames)
        views.append(text)
        data["views"].append(values)
    crowded = any(frames.marks is None for frames in report.views)
    thinned = any(frames.thinned for frames in report.views)
    notes = [report.slices_note] if report.slices_note else []
    notes.append("One scale of colours for all planes of a quantity.")
    if "std" in report.scales:
        notes.append("Sigma is the standard deviation of a point.")
    if any(scale.clipped for scale in report.scales.values()):
        notes.append("The few values beyond the upper end of a scale have its last colour.")
    if crowded:
        notes.append(f"Atoms are not drawn: over {MAX_ATOMS} lie in a plane.")
    else:
        notes.append(f"Circles: atoms within {WITHIN:g} Å of the plane.")
    if thinned:
        notes.append("Planes with more points than a picture has pixels show evenly spread ones.")
    notes.append("Point at a picture to read its values.")
    legend = "" if crowded else _legend(report.symbols)
    still = '<noscript><p class="note">Without JavaScript only the middle planes are shown.</p></noscript>'
    intro = f'<p class="note">{escape(" ".join(notes))}</p>{still}{legend}'
    return f'{intro}<div class="views">{"".join(views)}</div>', data


def _legend(symbols: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 13 13" aria-hidden="true"><circle class="kind{i % 4}" cx="6.5" cy="6.5" r="5"/></svg>'
        f"{escape(symbol)}</li>"
        for i, symbol in enumerate(symbols)
    )
    return f'<ul class="legend">{items}</ul>'


def _view(report: Report, frames: Frames) -> tuple[str, dict[str, Any]]:
    axis = frames.axis or 0
    letter, others = "abc"[axis], [c for c in "abc" if c != "abc"[axis]]
    length = report.edges[axis]
    texts = [f"{f:.3f} of {letter}, {f * length:.2f} Å along it" for f in frames.fractions]
    middle = len(texts) // 2
    slanted = abs(float(frames.v[0])) > 1e-6 * float(frames.v[1])
    panels = [
        Panel(
            frames,
            name,
            report.scales[name],
            TITLES[name],
            f"{TITLES[name]} in the plane across {letter} at ",
            f"view-{letter}-{name}",
            report.kinds,
            report.symbols,
            where=texts[middle],
            frame=middle,
            labels=(f"along {others[0]}, Å", f"{'across ' + others[0] if slanted else 'along ' + others[1]}, Å"),
        )
        for name in report.scales
    ]
    only = " disabled" if len(texts) == 1 else ""
    html = (
        f'<figure class="view" id="view-{letter}"><div class="control"><label for="slice-{letter}">Across {letter}'
        f'</label><input type="range" id="slice-{letter}" min="0" max="{len(texts) - 1}" step="1" value="{middle}"'
        f' aria-valuetext="{texts[middle]}"{only}><output for="slice-{letter}">{texts[middle]}</output></div>'
        f'{"".join(panel.svg() for panel in panels)}<p class="probe"></p></figure>'
    )
    first = panels[0]
    n1, n2 = frames.fields["mean"][0].shape
    values = {
        "id": f"view-{letter}",
        "texts": texts,
        "matrix": [round(t, 8) for t in first.matrix()],
        "pixels": [n1, n2],
        "corner": [round(t, 3) for t in first.place(0.0, 0.0)],
        "factor": round(first.factor, 6),
        "radius": round(first.radius, 1),
        "atoms": None if frames.marks is None else [first.circles(marks) for marks in frames.marks],
    }
    return html, values


# -- atoms ------------------------------------------------------------------------------------------------------


def _atoms(report: Report) -> str:
    if not report.atoms:
        return f"<p>{escape(report.why_no_atoms)}</p>" if report.why_no_atoms else ""
    trusted = any(atom.distance is not None for atom in report.atoms)
    reasons = any(atom.why for atom in report.atoms)
    summed = all(math.isfinite(atom.sigma) for atom in report.atoms)
    names = ["#", "Atom", *(["Sigma", "× median", "Electrons"] if summed else [])]
    names += ["Distance"] * trusted + ["Why"] * reasons + ["x, Å", "y, Å", "z, Å"]
    head = "".join(f'<th scope="col"{"" if name in ("Atom", "Why") else " class=n"}>{name}</th>' for name in names)
    places = max(decimals(atom.sigma) for atom in report.atoms) if summed else 0
    lines = []
    for rank, atom in enumerate(report.atoms, 1):
        cells = [f"{atom.sigma:.{places}f}", figure(atom.ratio), f"{atom.electrons:.{places}f}"] if summed else []
        cells += ["–" if atom.distance is None else f"{atom.distance:.2f}"] if trusted else []
        numbers = _numbers(cells) + (f'<td class="why">{escape(atom.why)}</td>' if reasons else "")
        numbers += _numbers([f"{x:.3f}" for x in atom.position])
        label = f'<td class="n">{rank}</td><th scope="row">{escape(atom.symbol)} {atom.index}</th>'
        lines.append(f"<tr>{label}{numbers}</tr>")
    table = f"<table class='ranking'><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    intro = f'<p class="note">{escape(report.atoms_note)}</p>' if report.atoms_note else ""
    table = f'<div class="scroll" tabindex="0" role="region" aria-label="Atoms by sigma">{table}</div>'
    return f'{intro}<div class="ranked"><div>{table}</div>{_spread(report)}</div>{_closeups(report)}'


def _numbers(cells: Sequence[str]) -> str:
    return "".join(f'<td class="n">{escape(cell.replace("-", "−"))}</td>' for cell in cells)


def _spread(report: Report) -> str:
    """How many atoms have which sigma."""
    if report.sigmas is None:
        return ""
    counts, edges = report.sigmas
    n = int(counts.sum())
    picture = bars(list(counts), list(edges), "sigma of an atom, electrons", f"Histogram of the sigmas of {n:,} atoms.")
    return f"<figure>{picture}<figcaption>Sigmas of all {n:,} atoms.</figcaption></figure>"


def _closeups(report: Report) -> str:
    if not report.closeups:
        return ""
    items = []
    for rank, (atom, frames) in enumerate(zip(report.atoms, report.closeups, strict=True), 1):
        who = f"{atom.symbol} {atom.index}"
        panels = "".join(
            Panel(
                frames,
                name,
                report.scales[name],
                TITLES[name],
                f"{TITLES[name]} around {who}",
                f"near-{rank}-{name}",
                report.kinds,
                report.symbols,
                small=True,
                centre=atom.index,
            ).svg()
            for name in report.scales
        )
        value = f"{with_error(atom.electrons, atom.sigma)} e" if math.isfinite(atom.sigma) else ""
        caption = f"<b>{rank}. {escape(who)}</b> {escape(value)}"
        items.append(f'<li><figure><div class="pair">{panels}</div><figcaption>{caption}</figcaption></figure></li>')
    sides = "Density on the left, sigma on the right, on the scales of the slices."
    about = f"Planes of {CLOSE_UP:g} × {CLOSE_UP:g} Å through each atom (ringed), "
    if "std" in report.scales:
        about += f"the point of largest sigma within {LOOK:g} Å of it, and a near neighbour. {sides}"
    else:
        about += "and near neighbours, on the scale of the slices."
    scales = "".join(
        f"<span>{TITLES[name]} {tick_text(scale.low)}<svg viewBox='0 0 130 11' aria-hidden='true'>"
        f"<rect width='130' height='11' fill='url(#scale-{name})'/></svg>"
        f"{'&gt; ' if scale.clipped else ''}{tick_text(scale.high)} {UNIT}{', log' if scale.log else ''}</span>"
        for name, scale in report.scales.items()
    )
    return (
        f"<h3>Close-ups</h3><p class='note'>{escape(about)}</p>"
        f'<div class="scales">{scales}</div><ol class="closeups">{"".join(items)}</ol>'
    )


# -- model and run ----------------------------------------------------------------------------------------------


def _calibration(report: Report) -> str:
    if not (report.coverage or report.tests or report.card):
        return ""
    text = "<p>The file says nothing of how the error bars of this model were tested.</p>"
    if report.coverage:
        lines = "".join(
            f'<tr><th scope="row">{k} sigma</th><td class="n">{100 * found:.1f} %</td>'
            f'<td class="n">{100 * target:.1f} %</td><td class="n">{sign(100 * (found - target))}</td></tr>'
            for k, (found, target) in enumerate(zip(report.coverage, TARGETS, strict=True), 1)
        )
        text = (
            "<table><thead><tr><th scope='col'>Errors within</th><th scope='col' class='n'>found</th>"
            "<th scope='col' class='n'>Gaussian</th><th scope='col' class='n'>points off</th></tr></thead>"
            f"<tbody>{lines}</tbody></table><p class='note'>Shares of errors of test points, on which the model was"
            " not trained, within so many of its error bars. A share under the Gaussian one: the error bars are too"
            " small.</p>"
        )
    tests = f"<div>{_table(report.tests)}</div>" if report.tests else ""
    card = ""
    if report.card:
        card = (
            "<details><summary>Card of the model: what it is for, data, tests by case</summary>"
            f'<div class="cardbox">{card_html(report.card)}</div></details>'
        )
    return f'<div class="facts numbers"><div>{text}</div>{tests}</div>{card}'


def sign(value: float) -> str:
    """A difference with its sign, one digit after the point."""
    return f"{value:+.1f}".replace("-", "−")


def _run(report: Report) -> str:
    columns = ((("Structure", report.structure), ("Model", report.model)), (("Prediction", report.run),))
    parts = "".join(
        f"<div>{''.join(f'<h3>{name}</h3>{_table(rows)}' for name, rows in blocks if rows)}</div>" for blocks in columns
    )
    return f'<div class="facts">{parts}</div>'


__all__ = ["Report", "page"]
