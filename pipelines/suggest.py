"""Ask for the structures that a model would learn most from: ``gpurho suggest big.xyz --out suggestions``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gpurho.activelearning import (
    Coverage,
    Environments,
    Peculiarity,
    Region,
    alike,
    atom_scores,
    find_regions,
    outlier_level,
    typical,
)
from gpurho.cutting import Cut, cut_cell
from gpurho.datasets import Dataset, open_dataset
from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.pipelines.suggestfiles import check_folder, write_suggestions
from gpurho.structure import Structure, as_structure

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

Item: TypeAlias = "Atoms | Structure | Density | str | os.PathLike[str]"

INPUTS = ("qe", "sparc")
SCAN_SPACING = 0.4
"""Grid on which uncertainty is looked at, angstrom: sums over an atom's points do not need a fine one."""

MEMORY_POINTS = 30_000_000
"""Scans of more grid points go to a file."""

KNOWN_ATOMS = 4000
"""Atoms of the input that stand for what is known where no training data is given."""

REFERENCES = 4
"""Training snapshots whose own uncertainty is the measure for an input that is unknown as a whole."""

LOOKED_AT = 40
"""Regions that are looked at for each suggestion that is wanted."""


@dataclass(frozen=True, eq=False)
class Suggestion:
    """A cell to compute, and why.

    Attributes
    ----------
    atoms : ase.Atoms
        The periodic cell; ``info`` holds what is below as plain values.
    score : float, e/angstrom^3
        See `gpurho.activelearning.Region`.
    position : (3,) array, angstrom
        Centre of the region, in the structure that it comes from.
    source : str
        Which structure that is.
    region : (n,) int array
        Its atoms that stand out.
    novelty : float
        Median over them of how new their surroundings are (`gpurho.activelearning.Coverage`); from 1 on they are.
    cut : Cut
        How the cell was made, and how well its faces match.
    reason : str
        All of this in a line.
    """

    atoms: Atoms
    score: float
    position: NDArray[np.float64]
    source: str
    region: NDArray[np.int64]
    novelty: float
    cut: Cut
    reason: str

    def record(self) -> dict[str, Any]:
        """As plain values for JSON."""
        cut = self.cut
        return {
            "score": self.score,
            "source": self.source,
            "position": [round(float(x), 4) for x in self.position],
            "region": self.region.tolist(),
            "novelty": self.novelty,
            "n_atoms": len(self.atoms),
            "mismatch": cut.mismatch,
            "worst": cut.worst,
            "removed": cut.removed,
            "added": cut.added,
            "min_distance": cut.min_distance,
            "whole": cut.whole,
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)
class _Scan:
    """A structure with the score of each of its atoms, by this model or in a density that was given."""

    name: str
    structure: Structure
    scores: NDArray[np.float64]
    predicted: bool = True


def suggest(
    structures: Item | Sequence[Item],
    model: str | os.PathLike[str] | DensityModel = "auto",
    *,
    count: int = 5,
    out: str | os.PathLike[str] | None = None,
    training: Dataset | str | os.PathLike[str] | Sequence[Dataset | str | os.PathLike[str]] | None = None,
    max_atoms: int = 110,
    min_distance: float | None = None,
    level: float | None = None,
    uncertainty: str = "auto",
    spacing: float = SCAN_SPACING,
    device: str | None = None,
    inputs: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> list[Suggestion]:
    """Find what a model does not know in large structures, and cut cells for DFT around it.

    1. Every atom gets the root mean square of the epistemic sigma over the grid points nearest to it.
    2. Atoms that stand out are gathered into regions.
    3. Regions whose surroundings are known, or alike those of a suggestion before them, are left out. The hotter a
       structure, the less are two of a kind alike.
    4. Around each of the rest a periodic cell is cut out whose faces match as well as possible.

    Parameters
    ----------
    structures : structure, density, file, or a list of them
        ase.Atoms, `Structure`, `Density`, a file of structures (all of its frames) or of a predicted density
        (``.h5``), which is not predicted again.
    model : name, path or DensityModel
        As in `predict`; not used for densities.
    count : int
        Most suggestions.
    out : path, optional
        Folder to write: ``suggestions.xyz`` for ``gpurho label``, ``suggestions.json``, and the inputs asked for;
        whole or not at all.
    training : data set or path, or a list of them, optional
        What the model was trained on; where it records its split, the training snapshots alone. Without it regions are
        compared with the surroundings of those atoms of the input that the model is surest of.
    max_atoms : int
        Of a cell; a structure that is not larger is taken whole.
    min_distance : float, angstrom, optional
        See `gpurho.cutting.cut_cell`.
    level : float, e/angstrom^3, optional
        Score from which on an atom stands out; by default 5 spreads above the median of all atoms (and 1.3 times it),
        or above the training data's own where that is lower.
    uncertainty : "auto", "last-layer" or "analytic"
        "auto" takes the first where the model has it.
    spacing : float, angstrom
        Grid of the prediction.
    device : str, optional
    inputs : sequence of "qe" and "sparc"
        Input files to write for each suggestion.
    overwrite : bool
        Replace `out`.
    progress : bool

    Returns
    -------
    list of Suggestion
        Highest score first; empty where nothing stands out that is not known.

    Raises
    ------
    SettingsError, OutputExistsError, StoreError
        Before any work.
    StructureError, UnknownSpeciesError, ModelError, DatasetError
    """
    if count < 1:
        raise SettingsError(f"count {count!r} is not a whole number from 1 up")
    wrong = sorted(set(inputs) - set(INPUTS))
    if wrong:
        raise SettingsError(f"inputs {wrong} are not known; give some of {', '.join(INPUTS)}")
    # ase.Atoms are a sequence of atoms, but one structure.
    several = isinstance(structures, Sequence) and not isinstance(structures, str | os.PathLike)
    items: list[Any] = list(cast(Any, structures)) if several else [structures]
    if not items:
        raise SettingsError("no structures to look at; give at least one")
    target = None if out is None else Path(out)
    if target is not None:
        check_folder(target, overwrite)
    elif inputs:
        raise SettingsError(f"inputs of {', '.join(inputs)} need a folder; give out (--out FOLDER)")
    found = _Model(model, uncertainty, spacing, device, progress)
    scans = [scan for item in items for scan in found.scans(item, target)]
    sources = [] if training is None else [training] if isinstance(training, Dataset | str | os.PathLike) else training
    data = [d if isinstance(d, Dataset) else open_dataset(d) for d in sources]
    known = [(d, i) for d in data for i in found.trained_on(d)]
    scores = np.concatenate([scan.scores for scan in scans])
    middle, _ = typical(scores)
    if level is None:
        level = outlier_level(scores)
        if known and any(scan.predicted for scan in scans):
            reference = np.concatenate([found.score(d[i].structure).scores for d, i in _spread(known, REFERENCES)])
            level = min(level, outlier_level(reference))
    regions = [(scan, region) for scan in scans for region in find_regions(scan.structure, scan.scores, level, middle)]
    regions.sort(key=lambda pair: -pair[1].score)
    species = sorted(
        {s for scan in scans for s in scan.structure.symbols} | {s for d, i in known for s in _symbols(d, i)}
    )
    space = Environments(species)
    groups = [space.of(d[i].structure) for d, i in known] or _surest(space, scans)
    coverage = Coverage(groups)
    chosen: list[Suggestion] = []
    asked: list[NDArray[np.float64]] = []
    peculiarities: dict[int, Peculiarity] = {}
    for scan, region in regions[: LOOKED_AT * count]:
        novelty = float(np.median(coverage.novelty(space.of(scan.structure, region.atoms))))
        if novelty <= 1.0:
            continue
        if id(scan) not in peculiarities:
            peculiarities[id(scan)] = Peculiarity(scan.structure, space, coverage)
        peculiar = peculiarities[id(scan)].of(region)
        if any(alike(peculiar, other) for other in asked):
            continue
        asked.append(peculiar)
        cut = cut_cell(scan.structure, region.position, max_atoms, min_distance)
        chosen.append(_suggestion(scan, region, cut, novelty, middle, bool(known)))
        if len(chosen) == count:
            break
    if target is not None:
        write_suggestions(target, chosen, inputs)
    return chosen


def _suggestion(scan: _Scan, region: Region, cut: Cut, novelty: float, middle: float, trained: bool) -> Suggestion:
    symbols = scan.structure.to_ase().symbols
    what = "the training data" if trained else "atoms that the model is sure of"
    made = (
        "taken whole"
        if cut.whole
        else f"cut out with a mismatch of {cut.mismatch:.2f} angstrom (at most {cut.worst:.2f}),"
        f" {cut.removed} atoms removed and {cut.added} added at its faces, none closer than {cut.min_distance:.2f}"
    )
    reason = (
        f"epistemic sigma {region.peak:.2e} e/A^3 at {symbols[int(region.atoms[0])]} {int(region.atoms[0])} of"
        f" {scan.name}, {region.peak / middle:.1f} times the typical, over {len(region.atoms)} atoms;"
        f" {novelty:.1f} times as far from {what} as these from each other; {len(cut.structure)} atoms {made}"
    )
    atoms = cut.structure.to_ase()
    suggestion = Suggestion(atoms, region.score, region.position, scan.name, region.atoms, novelty, cut, reason)
    record = suggestion.record()
    keep = ("score", "source", "novelty", "mismatch", "worst", "removed", "added", "min_distance", "whole", "reason")
    atoms.info = {"family": "suggested", **{f"suggest_{name}": record[name] for name in keep}}
    return suggestion


class _Model:
    """Predicts structures and scores their atoms."""

    def __init__(self, model: Any, uncertainty: str, spacing: float, device: str | None, progress: bool) -> None:
        if uncertainty not in ("auto", "last-layer", "analytic"):
            raise SettingsError(f"uncertainty {uncertainty!r} is not known; give 'auto', 'last-layer' or 'analytic'")
        self.model, self.uncertainty, self.spacing = model, uncertainty, spacing
        self.device, self.progress = device, progress

    def resolve(self, structure: Structure) -> None:
        """Read the model when it is first needed."""
        from gpurho.model import DensityModel
        from gpurho.pipelines.settings import settle

        if not isinstance(self.model, DensityModel):
            self.model = settle(structure, self.model, spacing=self.spacing, uncertainty=None, device="cpu").model
        if self.uncertainty == "auto":
            self.uncertainty = "last-layer" if self.model.spec.last_layer else "analytic"

    def scans(self, item: Any, folder: Path | None) -> Iterator[_Scan]:
        """The structures of an item with their scores."""
        from gpurho.pipelines.structures import read_structures

        if isinstance(item, Density):
            yield _Scan("density", item.structure, atom_scores(item), predicted=False)
        elif isinstance(item, str | os.PathLike):
            path = Path(item)
            if path.suffix == ".h5":
                with Density.open(path) as density:
                    yield _Scan(path.name, density.structure, atom_scores(density), predicted=False)
                return
            frames = read_structures(path)
            for i, atoms in enumerate(frames):
                name = path.name if len(frames) == 1 else f"{path.name}@{i}"
                yield self.score(as_structure(atoms), name, folder)
        else:
            structure = as_structure(item)
            yield self.score(structure, structure.to_ase().get_chemical_formula(), folder)

    def score(self, structure: Structure, name: str = "", folder: Path | None = None) -> _Scan:
        """Predict a structure and score its atoms; a large field goes to a file beside `folder` for that time."""
        from gpurho.pipelines.predict import predict

        self.resolve(structure)
        scratch = None
        if structure.volume / self.spacing**3 > MEMORY_POINTS and folder is not None:
            scratch = folder.with_name(f".{folder.name}.{structure.fingerprint()[:12]}.h5")
        with predict(
            structure,
            self.model,
            spacing=self.spacing,
            uncertainty=self.uncertainty,
            device=self.device,
            out=scratch,
            progress=self.progress and bool(name),
        ) as density:
            scores = atom_scores(density)
        if scratch is not None:
            scratch.unlink()
        return _Scan(name, structure, scores)

    def trained_on(self, data: Dataset) -> list[int]:
        """Snapshots that the model was trained on; all where it does not say."""
        from gpurho.model import DensityModel
        from gpurho.pipelines.evaluate import recorded_split

        recorded = recorded_split(self.model, data) if isinstance(self.model, DensityModel) else {}
        return recorded.get("train") or list(range(len(data)))


def _surest(space: Environments, scans: Sequence[_Scan]) -> list[NDArray[np.float64]]:
    """Surroundings of the atoms with scores up to the median, of each structure some."""
    found = []
    middle = float(np.median(np.concatenate([scan.scores for scan in scans])))
    for scan in scans:
        index = np.flatnonzero(scan.scores <= middle)
        if len(index):
            chosen = np.random.default_rng(0).permutation(index)[: max(1, KNOWN_ATOMS // len(scans))]
            found.append(space.of(scan.structure, np.sort(chosen)))
    return found


def _symbols(data: Dataset, i: int) -> tuple[str, ...]:
    return data[i].structure.symbols


def _spread(known: list[tuple[Dataset, int]], n: int) -> list[tuple[Dataset, int]]:
    return [known[i] for i in np.unique(np.linspace(0, len(known) - 1, n).astype(int))]


__all__ = ["INPUTS", "Suggestion", "suggest"]
