"""The paper's figures, one after the other: which of our results each shows, and what stands in for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.errors import StoreError
from gpurho.fieldstats import FieldCounts
from gpurho.pipelines import paper_figures, paper_maps
from gpurho.pipelines.paper_plan import Part
from gpurho.pipelines.paper_sets import NAMES, SETS
from gpurho.pipelines.paper_store import Results
from gpurho.pipelines.paper_tables import LatticeRow, Row, measured_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gpurho.pipelines.paper_plan import Task

DPI = 110


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its place in the paper, what it shows, and the file; None where it cannot be made."""

    number: str
    title: str
    caption: str
    file: str | None


@dataclass(eq=False)
class Extras:
    """Comparisons that need more than one model or other files.

    Attributes
    ----------
    roads : list of dict
        Rows of `paper_figures.draw_roads`, and "set", the data set.
    candidates : list of dict
        Of ``gpurho select``.
    guides : dict
        Rows of ``gpurho.transfer.size_guide`` by material.
    """

    roads: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    guides: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Gallery:
    """Draws the figures into a folder.

    Parameters
    ----------
    folder : Path
    parts : dict
        By material.
    results : Results
    tables : dict
        Tables IV and V by material.
    lattice : sequence of LatticeRow
    extras : Extras
    numbers : dict
        The paper's.
    """

    def __init__(
        self,
        folder: Path,
        parts: dict[str, Part],
        results: Results,
        tables: dict[str, list[Row]],
        lattice: Sequence[LatticeRow],
        extras: Extras,
        numbers: dict[str, Any],
    ) -> None:
        self.folder, self.parts, self.results, self.numbers = folder, parts, results, numbers
        self.tables, self.lattice, self.extras = tables, lattice, extras

    def draw(self) -> list[Picture]:
        """Every figure, in the order of the paper, then those that the paper does not have."""
        return [self._save(*item) for item in self._figures()]

    def _figures(self) -> Iterator[tuple[str, str, str, Figure | None]]:
        yield self._largest("al", "2", "1372 atoms at 631 K")
        yield self._largest("sige", "3", "512 atoms at 2300 K")
        yield from self._defects()
        yield self._vacancy_sige()
        yield self._accuracy()
        yield self._equations()
        yield from self._uncertainty()
        yield self._roads()
        yield self._selection()
        yield self._sizes()
        yield from self._calibration()
        yield self._guides()

    # -- maps -----------------------------------------------------------------------------------------------------

    def _largest(self, material: str, number: str, theirs: str) -> tuple[str, str, str, Figure | None]:
        title = f"{NAMES[material]}: the plane of the largest mean squared error, DFT and prediction"
        found = self._map(material, "largest")
        if found is None:
            return f"Figure {number}", title, self._missing(material, "a thermal cell"), None
        text, values, arrays = found
        caption = (
            f"{text}{_warm(values)}; the paper shows {theirs}. Plane of grid points across cell vector"
            f" {'abc'[values['axis']]} in which the mean squared error is largest; below, the part around its largest"
            " error. Circles mark atoms within 0.5 angstrom of the plane."
        )
        figure = paper_maps.draw_maps([("", arrays, ("reference", "mean", "error", "std"))], zoomed=True)
        return f"Figure {number}", title, caption, figure

    def _defects(self) -> Iterator[tuple[str, str, str, Figure | None]]:
        rows = []
        texts = []
        for name in ("vacancy", "divacancy"):
            found = self._map("al", name)
            if found is not None:
                texts.append(f"{name}: {found[0]}{_warm(found[1])}")
                rows.append((name, found[2], ("reference", "mean", "error", "std")))
        title = "Al: vacancy and divacancy, DFT and prediction"
        if rows:
            caption = f"{'; '.join(texts)}. The paper has a vacancy in 256 and a divacancy in 108 atoms, too."
            yield "Figure 4a", title, caption, paper_maps.draw_maps(rows)
        else:
            yield "Figure 4a", title, self._missing("al", "vacancies"), None
        names = ("screw dislocations", "edge dislocations", "tilt grain boundaries")
        shown = [(n, s) for n in names if (s := self._system("al", n)) is not None]
        title = "Al: dislocations and grain boundaries, prediction and its sigmas"
        if not shown:
            yield "Figure 4b-d", title, self._missing("al", "built structures", labels=False), None
            return
        sizes = ", ".join(f"{n}, {v['n_atoms']} atoms" for n, (v, _) in shown)
        caption = (
            f"{sizes}; seen along the dislocation line or tilt axis. There are no labels of these, so no reference: the"
            " paper shows DFT beside the prediction. Atoms are at their elastic or geometric positions, not relaxed."
        )
        yield "Figure 4b-d", title, caption, paper_maps.draw_atoms([(n, arrays) for n, (_, arrays) in shown])

    def _vacancy_sige(self) -> tuple[str, str, str, Figure | None]:
        title = "SiGe: vacancy, DFT, prediction and error"
        found = self._map("sige", "vacancy")
        if found is None:
            return "Figure 5", title, self._missing("sige", "vacancies"), None
        caption = f"{found[0]}{_warm(found[1])}; the paper shows a divacancy in 512 and a vacancy in 216 atoms."
        return "Figure 5", title, caption, paper_maps.draw_maps([("", found[2], ("reference", "mean", "error", "std"))])

    def _uncertainty(self) -> Iterator[tuple[str, str, str, Figure | None]]:
        title = "Al: uncertainty of a large system"
        big = self._biggest("al")
        if big is None:
            yield "Figure 8", title, self._missing("al", "built structures", labels=False), None
        else:
            caption = (
                f"{big[0]['n_atoms']} atoms of a crystal rattled at random, without a label; the paper's are 1372"
                " thermal atoms. The line is the dotted one in the first panel."
            )
            yield "Figure 8", title, caption, paper_maps.draw_uncertainty([("", big[1], int(big[0]["row"]))])
        yield self._vacancy_uncertainty()
        yield self._composition()

    def _vacancy_uncertainty(self) -> tuple[str, str, str, Figure | None]:
        title = "Al: uncertainty at a vacancy"
        rows: list[tuple[str, dict[str, Any], int]] = []
        found, trained = self._map("al", "vacancy"), self._map("al", "vacancy, trained")
        if found is not None:
            caption = f"{found[0]}{_warm(found[1])}; the paper's vacancy is in 256 atoms. The line goes through it."
            rows.append(("", found[2], int(found[1]["row"])))
            if trained is not None:
                rows.append(("vacancy in training", trained[2], int(trained[1]["row"])))
                caption += " Second row: the model that has a vacancy in its training data (the paper's panel e)."
            else:
                caption += " The paper's panel e needs a second model, trained with a vacancy: --with-defects."
            return "Figure 9", title, caption, paper_maps.draw_uncertainty(rows)
        built = self._system("al", "vacancy in 256")
        if built is None:
            return "Figure 9", title, self._missing("al", "vacancies"), None
        caption = (
            f"{self._missing('al', 'vacancies')} In their place a built vacancy of {built[0]['n_atoms']} rattled atoms,"
            " without a reference."
        )
        rows = [("", built[1], int(built[0]["row"]))]
        return "Figure 9", title, caption, paper_maps.draw_uncertainty(rows)

    def _composition(self) -> tuple[str, str, str, Figure | None]:
        title = "SiGe: uncertainty at 40 % Si"
        found = self._map("sige", "composition")
        if found is not None:
            caption = f"{found[0]}{_warm(found[1])}: the composition with the least Si. The paper's is 40 % Si, too."
            rows = [("", found[2], int(found[1]["row"]))]
            return "Figure 10", title, caption, paper_maps.draw_uncertainty(rows)
        built = self._system("sige", "alloy of 40 % Si")
        if built is None:
            return "Figure 10", title, self._missing("sige", "other compositions"), None
        caption = f"{self._missing('sige', 'other compositions')} In their place a built, rattled alloy."
        rows = [("", built[1], int(built[0]["row"]))]
        return "Figure 10", title, caption, paper_maps.draw_uncertainty(rows)

    # -- charts ---------------------------------------------------------------------------------------------------

    def _accuracy(self) -> tuple[str, str, str, Figure | None]:
        title = "errors of density and ground-state energy by case"
        shown = {m: rows for m, rows in self.tables.items() if rows}
        caption = (
            "Figures of Tables IV and V. Cases without a blue bar have no labels, or their energies were left out."
        )
        return "Figure 6", title, caption, paper_figures.draw_accuracy(shown) if shown else None

    def _equations(self) -> tuple[str, str, str, Figure | None]:
        title = "Al: energy against lattice parameter"
        rows = [row for row in self.lattice if "dft" in row.curves]
        if not rows:
            return "Figure 7", title, "No energies of the scans of lattice parameters yet.", None
        caption = (
            "Lines mark the minima. Each point of a predicted density is one diagonalisation (Harris-Foulkes). k-meshes"
            " are converged here, the paper's small cell is not: compare differences from DFT, not the minima."
        )
        return "Figure 7", title, caption, paper_figures.draw_equations(rows)

    def _roads(self) -> tuple[str, str, str, Figure | None]:
        title = "models with and without transfer learning"
        saved, drop = (self.numbers["transfer"][k] for k in ("data_time_saved", "rmse_drop_al_256"))
        paper = f"The paper: {drop:.0%} less RMSE on 256 Al atoms, {saved:.0%} less time for the data."
        rows = self.extras.roads
        if len(rows) < 2:
            return "Figure 14", title, f"Needs two models or more: --compare NAME=FILE. {paper}", None
        names = ", ".join(dict.fromkeys(r["set"] for r in rows))
        caption = f"On {names}, seen by none of the models; time of the labels that each was trained on. {paper}"
        return "Figure 14", title, caption, paper_figures.draw_roads(rows)

    def _selection(self) -> tuple[str, str, str, Figure | None]:
        title = "convergence with the number of descriptors"
        if not self.extras.candidates:
            return "Figure 15", title, "Needs the record of gpurho select: --select FILE.", None
        caption = "Candidates of gpurho select. The paper settles on 60 distances and 15 x 3 angles."
        figure = paper_figures.draw_selection(self.extras.candidates, self.numbers["descriptors"])
        return "Figure 15", title, caption, figure

    def _sizes(self) -> tuple[str, str, str, Figure | None]:
        title = "error and uncertainty against system size"
        series: dict[str, list[tuple[float, dict[str, float]]]] = {}
        paper: dict[str, list[tuple[float, float]]] = {}
        for material, part in self.parts.items():
            points: list[tuple[float, dict[str, float]]] = []
            for row in self.tables[material]:
                if row.name.isdigit() and row.cells["l1"].ours is not None:
                    points.append((float(row.name), {"l1": row.cells["l1"].ours}))
            for name in part.systems:
                found = self._system(material, name) if name.startswith("crystal") else None
                if found is not None:
                    v = found[0]
                    sigmas = {"epistemic": v["rms_epistemic"], "aleatoric": v["rms_aleatoric"]}
                    points.append((float(v["n_atoms"]), sigmas))
            if points:
                series[material] = points
                table = self.numbers["tables"][material]
                paper[material] = [(float(k), v[0]) for k, v in table.items() if k.isdigit()]
        caption = (
            "Left: test snapshots. Right: crystals rattled alike at every size; a sigma that stays level says that"
            " larger systems are no extrapolation (the paper's Supplementary Figure 3)."
        )
        return "Also", title, caption, paper_figures.draw_sizes(series, paper) if series else None

    def _calibration(self) -> Iterator[tuple[str, str, str, Figure | None]]:
        counts: dict[str, dict[str, FieldCounts]] = {}
        for material, part in self.parts.items():
            for name in part.measured:
                values = measured_values(part, self.results, name)
                one = next(s for s in SETS if s.name == name)
                if values and one.row is not None:
                    merged = FieldCounts.merged(FieldCounts.from_dict(v["counts"]) for v in values)
                    counts.setdefault(material, {})[name] = merged
        everything = {name: c for groups in counts.values() for name, c in groups.items()}
        title = "calibration, and error against sigma"
        caption = (
            "Left: on the diagonal, error bars say what they mean. Right: bins of sigma with 100 points or more; on the"
            " line, points of a sigma have errors of that size. The paper shows neither."
        )
        yield "Also", title, caption, paper_figures.draw_calibration(everything) if everything else None
        title = "distribution of the density over grid points"
        caption = "The paper's Supplementary Figure 4."
        yield "Also", title, caption, paper_figures.draw_histograms(counts) if counts else None

    def _guides(self) -> tuple[str, str, str, Figure | None]:
        title = "when larger cells add nothing"
        if not self.extras.guides:
            return "Also", title, "Needs labels of two sizes or more of a material.", None
        caption = (
            "Divergence of the density and of the leading components of the descriptors between the largest cells and"
            " smaller ones (the paper's Supplementary Figure 5); dotted, what it is between halves of the next larger"
            " cells, where nothing differs. Sets of unlike temperatures differ by these, too."
        )
        return "Also", title, caption, paper_figures.draw_guides(self.extras.guides)

    # -- what is there --------------------------------------------------------------------------------------------

    def _map(self, material: str, name: str) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
        """Which snapshot, values and arrays of a plane."""
        part = self.parts[material]
        task = part.maps.get(name)
        values = None if task is None else self.results.get(task.key)
        if task is None or values is None:
            return None
        where = task.text.removeprefix("maps of ")
        return f"{NAMES[material]} {values['n_atoms']} atoms ({where})", values, self._arrays(task)

    def _system(self, material: str, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        task = self.parts[material].systems.get(name)
        values = None if task is None else self.results.get(task.key)
        return None if task is None or values is None else (values, self._arrays(task))

    def _biggest(self, material: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        names = [n for n in self.parts[material].systems if n.startswith("crystal")]
        found = [s for n in names if (s := self._system(material, n)) is not None]
        return max(found, key=lambda s: s[0]["n_atoms"], default=None)

    def _arrays(self, task: Task) -> dict[str, Any]:
        return self.results.arrays(task.key)

    def _missing(self, material: str, what: str, labels: bool = True) -> str:
        if self.parts[material].model is None:
            return f"No model of {NAMES[material]} was given."
        if not labels:
            return f"No {what}: left out by --largest."
        return f"No labels yet of {what} of {NAMES[material]}, or every one was trained on."

    def _save(self, number: str, title: str, caption: str, figure: Figure | None) -> Picture:
        if figure is None:
            return Picture(number, title, caption, None)
        name = "_".join(f"{number} {title}".lower().replace(":", "").replace(",", "").split())[:60].rstrip("_-")
        path = self.folder / f"{name}.png"
        try:
            figure.savefig(path, dpi=DPI)
        except OSError as error:
            raise StoreError(f"picture {path} cannot be written: {error.strerror}") from None
        return Picture(number, title, caption, path.name)


def _warm(values: dict[str, Any]) -> str:
    t = values.get("temperature")
    return f" at {float(np.round(t)):.0f} K" if t is not None else ""


__all__ = ["Extras", "Gallery", "Picture"]
