"""What the page of a report shows, gathered from a density."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.density import Density
from gpurho.pipelines import reportdata as data
from gpurho.pipelines import reportfacts as facts
from gpurho.pipelines.reporthtml import Report
from gpurho.pipelines.reportslices import Frames, Scale, axis_slices, close_up, common_scale, slice_count

if TYPE_CHECKING:
    from gpurho.model import DensityModel
    from gpurho.trust import Trust


def gather(
    density: Density,
    path: Path | None,
    model: str | Path | DensityModel | None,
    slices: int | None,
    n_atoms: int,
    all_points: bool,
    progress: bool,
) -> Report:
    """All that the page shows of a density."""
    from ase.data import chemical_symbols

    info, structure = density.info, density.structure
    trust, trust_text = trust_of(density, model)
    views, slices_note, field = _views(density, slices, progress)
    charges, why = data.charges_of(density, all_points, progress) if n_atoms else (None, "")
    atoms = data.ranked(density, charges, trust, n_atoms) if charges is not None else []
    summed = bool(atoms)
    if not summed and trust is not None and n_atoms:
        atoms = data.farthest(density, trust, n_atoms)
    near = [close_up(field, atom.index) for atom in atoms] if field is not None else []
    names = ("mean", "std") if density.uncertain else ("mean",)
    present = [name for name in names if any(name in f.fields for f in [*views, *near])]
    numbers, kinds = np.unique(structure.numbers, return_inverse=True)
    warned = data.warnings_of(density, trust)
    title = facts.formula(structure)
    return Report(
        title=title,
        kicker="Predicted electron density" + (f" · {path.name}" if path is not None else ""),
        lede=_lede(density, warned),
        key=_key(density, trust),
        warnings=warned,
        electrons=data.electron_rows(density),
        field=data.field_rows(density),
        structure=facts.structure_rows(structure),
        model=facts.model_rows(info),
        run=facts.run_rows(density, path),
        coverage=data.coverage_of(info),
        tests=data.test_rows(info),
        views=views,
        scales=_scales(views, near, present, density.max_std),
        kinds=kinds.astype(np.int64),
        symbols=[chemical_symbols[int(z)] for z in numbers],
        atoms=atoms,
        closeups=near,
        edges=tuple(float(x) for x in np.linalg.norm(density.grid.cell, axis=1)),
        card=data.shipped_card(info),
        slices_note=slices_note,
        why_no_slices="The prediction kept neither the field nor planes of it, so there is nothing to draw.",
        why_no_atoms=why,
        atoms_note=_atoms_note(len(structure), summed, trust is not None, why),
        trust=trust_text,
        sigmas=data.sigma_histogram(charges) if charges is not None and summed else None,
        histograms=_histograms(density),
        footer=f"Written by gpurho {_version()} on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."
        " This page holds all of its pictures and data; it asks nothing of the network.",
    )


def _scales(views: list[Frames], near: list[Frames], names: list[str], largest: float | None) -> dict[str, Scale]:
    found = {}
    for name in names:
        # Interpolated close-ups swing a little beyond the field; the largest sigmas may lie in them alone.
        frames = views if views and name == "mean" else [*views, *near]
        found[name] = common_scale(frames, name, largest if name == "std" else None)
    return found


def _version() -> str:
    from gpurho.pipelines.settings import library_version

    return library_version()


def _views(density: Density, wanted: int | None, progress: bool) -> tuple[list[Frames], str, Density | None]:
    """Planes across the axes, a word on where they are from, and the field that close-ups can be cut from."""
    from tqdm import tqdm

    field: Density | None = density if density.has_field else None
    note = ""
    if field is None and density.kept is not None and density.kept.keep.coarse is not None:
        field = density.coarse
        blocks = " × ".join(map(str, density.kept.keep.coarse))
        note = f"The prediction kept means over blocks of {blocks} points, which are what is shown."
    elif field is None:
        note = "The prediction kept these planes, not the whole field."
    shown = field or density
    count = slice_count(math.prod(shown.shape), wanted)
    views = []
    with tqdm(total=3 * count, desc="slices", unit=" planes", disable=None if progress else True) as bar:
        for axis in range(3):
            frames = axis_slices(shown, axis, count, bar.update)
            if frames is not None:
                views.append(frames)
    return views, note, field


def _histograms(density: Density) -> list[tuple[str, Any, Any]]:
    """Those that the prediction kept; of the sigmas in decades, since that is what their bins are."""
    if density.kept is None or not density.kept.histograms:
        return []
    found = density.histogram("mean")
    top = np.flatnonzero(found.counts)
    last = int(top[-1]) + 1 if top.size else 1
    return [("density", found.counts[:last].astype(float), found.edges[: last + 1])]


def _lede(density: Density, warned: list[data.Warned]) -> str:
    grave = sum(w.grave for w in warned)
    model = facts.part(density.info, "model", "name")
    made = f"predicted by the model {model}" if model is not None else "read from a file that names no model"
    what = f"The valence electron density of {len(density.structure):,} atoms, {made}"
    what += " with error bars." if density.uncertain else ", without error bars."
    if grave:
        return f"{what} {grave} warning{'s' if grave > 1 else ''} below."
    return what


def _key(density: Density, trust: Trust | None) -> list[tuple[str, str, str]]:
    """The figures at the top."""
    totals = density.totals
    expected = data.expected_electrons(density)
    found = [
        (
            "Electrons",
            facts.with_error(density.electrons_predicted, density.electrons_std),
            f"{expected:,g} expected" if expected is not None else "no expected number",
        ),
        ("Density", f"{facts.figure(totals.min_mean)} to {facts.figure(totals.max_mean)}", data.UNIT),
    ]
    if density.mean_std is not None and density.max_std is not None:
        remark = f"{data.UNIT} on average; at most {facts.figure(density.max_std)}"
        found.append(("Sigma of a point", facts.figure(density.mean_std), remark))
    if facts.part(density.info, "model") is not None:
        share = 100 * totals.n_outside / max(totals.n_points, 1)
        remark = "of the points: out of the training domain"
        found.append(("Extrapolated", f"{facts.figure(share, 2) if share else 'none'}{' %' if share else ''}", remark))
    if trust is not None:
        remark = f"of {len(trust.per_atom):,} atoms; the farthest at {trust.largest or 0.0:.2f} of 1"
        found.append(("Unlike training", f"{len(trust.outside):,}", remark))
    return found


def _atoms_note(n: int, summed: bool, trusted: bool, why: str) -> str:
    distance = "how far an atom is from the training atoms; 1 is where these end."
    if not summed:
        return (
            f"{why} Of {n:,} atoms, those with the largest distance: {distance} Atoms are numbered from 0, as in ASE."
        )
    text = (
        f"The atoms of {n:,} with the largest standard deviation of the electrons nearest to them, also in units of"
        " that of the median atom. Atoms are numbered from 0, as in ASE."
    )
    return f"{text} Distance: {distance}" if trusted else text


def trust_of(density: Density, model: str | Path | DensityModel | None) -> tuple[Trust | None, str]:
    """How far each atom is from the training data: as it was kept, or found now; or None, and a sentence that says why.

    Raises
    ------
    ModelError
        Where `model` is not the one that made the density.
    """
    from gpurho.trust import trust_of as judged

    found = data.find_model(density.info, model) if model is not None or density.trust is None else None
    trust = density.trust if found is None else judged(density.structure, found)
    if trust is None:
        return None, (
            "How far the structure is from the model's training data is not known: the density does not say it. gpurho"
            " report --model FILE gives it, where the model has statistics of them (gpurho calibrate adds them)."
        )
    if trust.known:
        return trust, ""
    return None, f"How far the atoms are from the training data is {trust.sentence}."


__all__ = ["gather"]
