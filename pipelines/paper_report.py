"""The report of a comparison with the paper: one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gpurho.pipelines.paper_gallery import Picture
from gpurho.pipelines.paper_plan import Part
from gpurho.pipelines.paper_sets import NAMES
from gpurho.pipelines.paper_tables import DENSITY, ENERGY, Cell, LatticeRow, Row

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2.2em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05em; margin: 1.6em 0 .3em; }
table { border-collapse: collapse; margin: .6em 0 1em; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th.group { text-align: center; border-left: 2px solid #bbb; white-space: normal; }
.wide { overflow-x: auto; } .wide table { font-size: 12px; }
.wide th, .wide td { padding: .25em .45em; } .wide td.text { min-width: 6.5em; }
td.first { border-left: 2px solid #bbb; } td.text, th.text { text-align: left; white-space: normal; }
td.ours { font-weight: 600; } td.yes { color: #005a8c; } td.no { color: #a34700; } td.other { color: #666; }
figure { margin: 1.4em 0 2.2em; } img { max-width: 100%; } figcaption, .note { color: #444; font-size: 13.5px; }
.none { color: #555; font-size: 13.5px; border-left: 3px solid #bbb; padding-left: .8em; margin: 1em 0; }
"""


def write_report(
    path: Path,
    parts: dict[str, Part],
    tables: dict[str, list[Row]],
    lattice: Sequence[LatticeRow],
    calibration: dict[str, list[dict[str, Any]]],
    floors: dict[str, list[tuple[str, dict[str, Any]]]],
    pictures: Sequence[Picture],
    notes: Sequence[str],
    source: str,
) -> str:
    """The text of the report; figures are read from the folder of `path` and embedded."""
    body = [
        "<h1>The paper, redone with this library's own labels</h1>",
        f"<p class='note'>Paper: {escape(source)}.</p>",
    ]
    body.append(_models(parts))
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f"<h2>What to know</h2><ul class='note'>{items}</ul>")
    body.append("<h2>Tables</h2>")
    for number, (material, rows) in zip(("IV", "V"), tables.items(), strict=False):
        body.append(_accuracy(number, material, rows, floors.get(material, [])))
    body.append(_lattice(lattice))
    body.append(_calibration(calibration))
    body.append("<h2>Figures</h2>")
    body += [_picture(path.parent, picture) for picture in pictures]
    head = f"<meta charset='utf-8'><title>gpurho and the paper</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _models(parts: dict[str, Part]) -> str:
    lines = []
    for material, part in parts.items():
        if part.model is None:
            lines.append([NAMES[material], "no model given", "", "", ""])
            continue
        spec = part.model.spec
        n = spec.network
        network = f"{n.blocks} x {n.layers} x {n.width}" if n.blocks else "linear"
        features = f"{spec.descriptor.family}, {spec.descriptor.n_features}"
        trained = ", ".join(dict.fromkeys([*part.seen.found, *(f"{m} (not here)" for m in part.seen.missing)])) or "-"
        lines.append([NAMES[material], f"{part.name} ({part.model.fingerprint()[:12]})", features, network, trained])
    head = ("material", "model", "descriptors", "hidden layers", "trained on")
    return _table([f"<th class='text'>{h}</th>" for h in head], [[_text(c) for c in line] for line in lines])


def _accuracy(number: str, material: str, rows: Sequence[Row], floors: Sequence[tuple[str, dict[str, Any]]]) -> str:
    parts = [f"<h3>Table {number}: {NAMES[material]}</h3>"]
    for columns, count, what in ((DENSITY, "snapshots", "densities"), (ENERGY, "energies", "energies")):
        first = (
            f"<th class='text' rowspan='2'>case</th><th class='text' rowspan='2'>ours</th><th rowspan='2'>{count}</th>"
        )
        groups = "".join(f"<th class='group' colspan='3'>{escape(title)}</th>" for _, title in columns)
        second = "<th class='group'>ours</th><th>paper</th><th>target</th>" * len(columns)
        lines = []
        for row in rows:
            n = row.snapshots if count == "snapshots" else row.energies
            cells = "".join(_cells(row.cells[name]) for name, _ in columns)
            lines.append(f"<tr>{_text(row.paper_case)}{_text(row.our_case)}<td>{n or '-'}</td>{cells}</tr>")
        head = f"<thead><tr>{first}{groups}</tr><tr>{second}</tr></thead>"
        table = f"<table aria-label='{what}'>{head}<tbody>{''.join(lines)}</tbody></table>"
        parts.append(f"<div class='wide'>{table}</div>")
    parts.append(
        "<p class='note'>Errors per snapshot, then their mean (root mean square of the RMSE). L1 per electron after the"
        " rescaling of equation 6. Energies: absolute differences from the label after one diagonalisation in the"
        " potential of the predicted density (Harris-Foulkes, free energies); eigenvalues of states with an occupation"
        " above 0.001. In the last row every snapshot has the same weight, so its mix of cases is not the paper's.</p>"
    )
    if floors:
        texts = [
            f"{name} {_number(abs(v['energy']))} Ha/atom, xc {_number(abs(v['xc']))} Ha/atom,"
            f" Fermi level {_number(abs(v['fermi_level']))} Ha"
            for name, v in floors
        ]
        parts.append(
            f"<p class='note'>The same for the labels' own densities, the floor: {escape('; '.join(texts))}.</p>"
        )
    return "".join(parts)


def _lattice(rows: Sequence[LatticeRow]) -> str:
    if not rows:
        return ""
    head = (
        "<thead><tr><th class='text' rowspan='2'>Al supercell</th><th class='text' rowspan='2'>ours</th>"
        "<th class='group' colspan='3'>lattice parameter, Bohr: prediction (DFT), difference</th>"
        "<th class='group' colspan='3'>bulk modulus, GPa: prediction (DFT), difference</th></tr><tr>"
        + "<th class='group'>ours</th><th>paper</th><th>target</th>" * 2
        + "</tr></thead>"
    )
    lines = []
    for row in rows:
        cells = ""
        for k, digits in ((0, 4), (1, 2)):
            ours = "-"
            state = ""
            if row.differences is not None:
                m, d = row.ours["model"][k], row.ours["dft"][k]
                ours = f"{m:.{digits}f} ({d:.{digits}f})<br>{row.differences[k]:.3%}"
                state = " yes" if row.differences[k] <= row.targets[k] else " no"
            m, d = row.paper["model"][k], row.paper["dft"][k]
            cells += f"<td class='first ours{state}'>{ours}</td>"
            cells += f"<td class='other'>{m:.{digits}f} ({d:.{digits}f})<br>{row.paper_differences[k]:.3%}</td>"
            cells += f"<td class='other'>{row.targets[k]:.2%}</td>"
        lines.append(f"<tr>{_text(f'{row.repeat} x {row.repeat} x {row.repeat}')}{_text(row.our_case)}{cells}</tr>")
    return f"<h3>Table VI: equation of state</h3><table>{head}<tbody>{''.join(lines)}</tbody></table>"


def _calibration(tables: dict[str, list[dict[str, Any]]]) -> str:
    rows = [row for table in tables.values() for row in table]
    if not rows:
        return ""
    lines = []
    for row in rows:
        cells = [_text(row["set"]), f"<td>{row['snapshots']}</td>"]
        for share, reached in zip(row["coverage"], row["reached"], strict=True):
            cells.append(f"<td class='ours {'yes' if reached else 'no'}'>{100 * share:.1f}</td>")
        cells.append(f"<td>{row['miscalibration_area']:.3f}</td><td>{row['nll']:.2f}</td>")
        rank: Cell = row["spearman"]
        mark = "" if rank.ours is None else " yes" if rank.target is not None and rank.ours >= rank.target else " no"
        ours = "-" if rank.ours is None else f"{rank.ours:.2f}"
        cells.append(f"<td class='ours{mark}'>{ours}</td><td class='other'>{rank.target}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    heads = (
        "within 1 sigma, %",
        "2 sigma",
        "3 sigma",
        "miscalibration area",
        "NLL, nats/point",
        "rank of error",
        "target",
    )
    head = "<th class='text'>data set</th><th>snapshots</th>" + "".join(f"<th>{h}</th>" for h in heads)
    return (
        "<h3>Calibration (the paper gives none)</h3>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table><p class='note'>Targets: 68.3, 95.4 and 99.7 % within 3, 2 and 1 points; rank is Spearman's"
        " correlation of absolute error and sigma.</p>"
    )


def _picture(folder: Path, picture: Picture) -> str:
    title = f"<h3>{escape(picture.number)}: {escape(picture.title)}</h3>"
    if picture.file is None:
        return f"{title}<p class='none'>Not made. {escape(picture.caption)}</p>"
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    image = f"<img alt='{escape(picture.title, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"{title}<figure>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _cells(cell: Cell) -> str:
    mark = "" if cell.reached is None else " yes" if cell.reached else " no"
    ours = f"<td class='first ours{mark}'>{_number(cell.ours)}</td>"
    return f"{ours}<td class='other'>{_number(cell.paper)}</td><td class='other'>{_number(cell.target)}</td>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _text(value: str) -> str:
    return f"<td class='text'>{escape(value)}</td>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>{rows}</tbody></table>"


__all__ = ["write_report"]
