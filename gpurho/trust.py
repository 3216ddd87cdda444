"""Whether a structure is like what a model was trained on: a number for each atom, and a sentence.

The number is how far an atom's surroundings are from all training atoms (`gpurho.truststats`): from 1 on it is farther
from them than 99 in 100 of them are from each other. The sentence says what is likely the reason, from
separate checks of neighbours, composition and volume. Neither needs a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.sources import StructureSource
from gpurho.structure import Structure
from gpurho.surroundings import AtomBatches, Surroundings
from gpurho.truststats import AtomInputs, TrustStatistics, combined, nearest_known

if TYPE_CHECKING:
    from gpurho.model import DensityModel

Floats = NDArray[np.float64]

LEVELS = ("inside", "edge", "outside", "unknown")
KINDS = ("", "close", "open", "missing", "crowded", "stretched", "compressed", "unlike")
"""Why an atom is unlike the training atoms; `Trust.why` holds places in this tuple, 0 for atoms that are not."""

DEFECTS = [KINDS.index(kind) for kind in ("close", "open", "missing")]
"""Reasons for which one atom beyond 1 is not put down to chance."""

FAR = 1000.0
"""Largest number of an atom; also that of a species without training atoms."""

FEW_OUTSIDE = 0.03
"""Share of atoms beyond 1 that is called inside: of the training atoms it is one in a hundred."""

MANY_OUTSIDE = 0.5
"""Share of atoms beyond 1 from which on the structure is outside, however little they are. In the hottest snapshots
held out it reaches 0.4."""

CLEARLY = 2.0
"""Number of a single atom from which on the structure is outside; held-out atoms like the trained ones reach 1.5."""

APART_SHARE = 0.5
"""Least number of an atom that is said to stand out of a structure that is inside."""

OPEN = 0.22
"""Share of an atom's neighbours whose lack makes a surface or void, not a vacancy: 3 of 12."""

SAID = 2
"""Reasons that the sentence names."""

VOLUME_SLACK, SHARE_SLACK = 0.06, 0.03
"""How far beyond those of training the volume per atom (relative) and shares of species (absolute) may lie."""


@dataclass(frozen=True)
class Reason:
    """Why some atoms, or the structure as a whole (`count` 0), are unlike the training data.

    Attributes
    ----------
    kind : str
        One of `KINDS`, "composition" or "volume".
    count : int
        Atoms.
    text : str
    """

    kind: str
    count: int
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"kind": self.kind, "count": self.count, "text": self.text}


@dataclass(frozen=True, eq=False)
class Trust:
    """How like a structure is to the training data of a model.

    Attributes
    ----------
    per_atom : (n_atoms,) float32
        Distance of each atom from the training atoms, 1 where these end; NaN where it is not known, or the atom was
        not looked at because the prediction is for a region without it.
    why : (n_atoms,) uint8
        Place in `KINDS` of the likely reason, for atoms from 1 on and those that stand out.
    level : str
        "inside", "edge", "outside", or "unknown" for a model that keeps no statistics.
    reasons : tuple of Reason
        Those of the structure first, then those of atoms, the farthest first.
    sentence : str
        All of it in a line.
    """

    per_atom: NDArray[np.float32]
    why: NDArray[np.uint8]
    level: str
    reasons: tuple[Reason, ...]
    sentence: str

    @property
    def outside(self) -> NDArray[np.int64]:
        """Indices of the atoms from 1 on, farthest first."""
        index = np.flatnonzero(self.per_atom >= 1.0)
        return index[np.argsort(-self.per_atom[index], kind="stable")]

    @property
    def unusual(self) -> NDArray[np.int64]:
        """Indices of all atoms with a reason, farthest first: those outside, and those that stand out inside."""
        index = np.flatnonzero(self.why)
        return index[np.argsort(-self.per_atom[index], kind="stable")]

    @property
    def known(self) -> bool:
        """Whether the model keeps what the numbers need."""
        return self.level != "unknown"

    @property
    def largest(self) -> float | None:
        """The number of the farthest atom; None where it is not known."""
        found = self.per_atom[np.isfinite(self.per_atom)]
        return float(found.max()) if found.size else None

    def kinds(self) -> list[str]:
        """The reason of each atom in a word, one of `KINDS`."""
        return [KINDS[i] for i in self.why.tolist()]

    def summary(self) -> dict[str, Any]:
        """Level, sentence and reasons as plain values; with the arrays, `from_parts` makes it whole again."""
        return {
            "level": self.level,
            "sentence": self.sentence,
            "reasons": [reason.to_dict() for reason in self.reasons],
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON: the summary, and the atoms that are farthest."""
        most = self.unusual[:10].tolist()
        return {
            **self.summary(),
            "largest": self.largest,
            "n_outside": len(self.outside),
            "atoms": [
                {"atom": i, "trust": round(float(self.per_atom[i]), 4), "kind": KINDS[self.why[i]]} for i in most
            ],
        }

    @classmethod
    def from_parts(cls, per_atom: NDArray[Any], why: NDArray[Any], summary: dict[str, Any]) -> Trust:
        """From the arrays and `summary`; raises KeyError, TypeError or ValueError for others."""
        reasons = tuple(Reason(str(r["kind"]), int(r["count"]), str(r["text"])) for r in summary["reasons"])
        level = str(summary["level"])
        if level not in LEVELS or why.shape != per_atom.shape or (why.size and int(why.max()) >= len(KINDS)):
            raise ValueError(f"trust of level {level!r} with arrays of shape {per_atom.shape} and {why.shape}")
        return cls(per_atom.astype(np.float32), why.astype(np.uint8), level, reasons, str(summary["sentence"]))

    def __str__(self) -> str:
        return self.sentence


def trust_of(
    structure: Structure | StructureSource,
    model: DensityModel,
    device: str = "cpu",
    wanted: NDArray[np.bool_] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Trust:
    """Compare a structure with the training data of a model.

    The cost is that of descriptors at one point for each atom, some thousandth of a prediction; memory is bounded but
    for two numbers an atom.

    Parameters
    ----------
    structure : Structure or StructureSource
    model : DensityModel
    device : str
        Where descriptors are computed.
    wanted : (n_atoms,) bool array, optional
        Atoms to look at; all by default.
    tick : callable, optional
        Told the atoms of each batch that is done.

    Raises
    ------
    UnknownSpeciesError
        For an atom that the model does not know.
    """
    n = len(structure)
    stats = model.spec.trust
    if stats is None:
        return unknown(n)
    looked = np.ones(n, dtype=bool) if wanted is None else wanted
    mean, basis, known = (model.tensors[f"trust_{k}"].double().numpy() for k in ("mean", "basis", "known"))
    by_species = np.split(known, np.cumsum(stats.atoms)[:-1])
    per_atom, species = np.full(n, np.nan, dtype=np.float32), np.zeros(n, dtype=np.int8)
    # Small types: these are the arrays that grow with the atoms.
    lengths = np.full(n, np.inf, dtype=np.float32), np.zeros(n, dtype=np.float32)
    shells = Surroundings(lengths[0], np.zeros(n, dtype=np.int8), lengths[1])
    for part, index, chosen in _parts(structure, max(model.spec.descriptor.reach, stats.shell), looked):
        inputs, batches = AtomInputs(model, part, device), AtomBatches(part, chosen)
        for atoms, points in batches:
            kinds = inputs.species[atoms]
            z, thin = np.split((inputs.at(points) - mean[kinds]) @ basis, [stats.axes], axis=1)
            far = np.full(len(atoms), FAR)
            for s in np.unique(kinds):
                if len(by_species[s]):
                    found = combined(nearest_known(z[kinds == s], by_species[s]), thin[kinds == s])
                    far[kinds == s] = np.minimum(found, FAR)
            here = atoms if index is None else index[atoms]
            per_atom[here], species[here] = far, kinds
            around = batches.surroundings(points, stats.shell)
            for name in ("nearest", "coordination", "bond"):
                getattr(shells, name)[here] = getattr(around, name)
            if tick is not None:
                tick(len(atoms))
    return _judged(structure, species, per_atom, shells, stats, model.spec.species)


def _parts(
    structure: Structure | StructureSource, reach: float, wanted: NDArray[np.bool_]
) -> Iterator[tuple[Structure, NDArray[np.int64] | None, NDArray[np.bool_]]]:
    """Atoms with all others within `reach`, their numbers in the whole (None: all), and which of them to look at."""
    if isinstance(structure, Structure):
        yield structure, None, wanted
        return
    for part in structure.parts(reach):
        chosen = part.inside & wanted[part.index]
        if chosen.any():
            yield part.structure, part.index, chosen


def unknown(n_atoms: int) -> Trust:
    """The answer for a model that keeps no statistics of its training atoms."""
    return Trust(
        np.full(n_atoms, np.nan, dtype=np.float32),
        np.zeros(n_atoms, dtype=np.uint8),
        "unknown",
        (),
        "not known: the model keeps no statistics of its training atoms; gpurho calibrate adds them",
    )


# -- words ------------------------------------------------------------------------------------------------------


def _judged(
    structure: Structure | StructureSource,
    species: NDArray[Any],
    per_atom: NDArray[np.float32],
    shells: Surroundings,
    stats: TrustStatistics,
    names: Sequence[str],
) -> Trust:
    looked = np.isfinite(per_atom)
    n = int(looked.sum())
    beyond = np.flatnonzero(looked & (per_atom >= 1.0))
    why = np.zeros(len(per_atom), dtype=np.uint8)
    lacking = _lacking(per_atom, shells, looked)
    why[beyond] = _kinds(beyond, species, shells, stats, lacking)
    notes = [] if not looked.all() else _whole(structure, species, shells, stats, names)
    most = float(per_atom[looked].max()) if n else 0.0
    if most >= CLEARLY or len(beyond) > MANY_OUTSIDE * n:
        level = "outside"
    elif len(beyond) > max(1.0, FEW_OUTSIDE * n) or notes or np.isin(why[beyond], DEFECTS).any():
        level = "edge"
    else:
        level = "inside"
    standing = np.flatnonzero(lacking) if not len(beyond) else np.empty(0, dtype=np.int64)
    why[standing] = KINDS.index("missing")
    reasons = [*notes, *_reasons(per_atom, why, species, shells, stats)]
    sentence = _sentence(level, per_atom, n, beyond, standing, reasons)
    return Trust(per_atom, why, level, tuple(reasons), sentence)


def _kinds(
    atoms: NDArray[np.int64],
    species: NDArray[Any],
    shells: Surroundings,
    stats: TrustStatistics,
    lacking: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """The likely reason of each of these atoms, which all have one; `lacking` from `_lacking`."""
    low, middle, high = np.array(stats.coordination)[species[atoms]].T
    short, long = np.array(stats.bond)[species[atoms]].T
    count, bond = shells.coordination[atoms], shells.bond[atoms]
    checks = {
        "close": shells.nearest[atoms] < 0.95 * stats.nearest,
        "open": count <= (1.0 - OPEN) * middle,
        "stretched": bond > 1.01 * long,
        "compressed": bond < 0.99 * short,
        "missing": (count < low) | lacking[atoms],
        "crowded": count > high,
    }
    place = np.select(list(checks.values()), [KINDS.index(kind) for kind in checks], KINDS.index("unlike"))
    return place.astype(np.uint8)


def _lacking(per_atom: NDArray[np.float32], shells: Surroundings, looked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Atoms that lack neighbours which the structure's others have, and are farther from the training than those."""
    values = per_atom[looked]
    middle = float(np.median(values)) if values.size else 0.0
    spread = 1.4826 * float(np.median(np.abs(values - middle))) if values.size else 0.0
    usual = float(np.median(shells.coordination[looked])) if values.size else 0.0
    apart = looked & (per_atom >= max(APART_SHARE, 2.0 * middle, middle + 5.0 * spread))
    return np.asarray(apart & (shells.coordination < usual))


def _whole(
    structure: Structure | StructureSource,
    species: NDArray[Any],
    shells: Surroundings,
    stats: TrustStatistics,
    names: Sequence[str],
) -> list[Reason]:
    """What is unlike training in the structure as a whole: shares of species, and volume where no surface makes it."""
    notes = []
    for s, name in enumerate(names):
        share, (low, high) = float(np.mean(species == s)), stats.composition[s]
        if not low - SHARE_SLACK <= share <= high + SHARE_SLACK and len(names) > 1:
            trained = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
            notes.append(Reason("composition", 0, f"{share:.0%} {name}, trained on {trained}"))
            break  # the share of another species follows from it
    middle = np.array(stats.coordination, dtype=np.float32)[species, 1]
    volume, (low, high) = structure.volume / len(structure), stats.volume
    bulk = structure.pbc.all() and np.mean(shells.coordination > (1.0 - OPEN) * middle) > 0.95
    if bulk and not (1 - VOLUME_SLACK) * low <= volume <= (1 + VOLUME_SLACK) * high:
        change = np.cbrt(volume / (high if volume > high else low)) - 1.0
        trained = f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"
        text = f"{volume:.1f} angstrom^3 per atom, trained on {trained} ({change:+.1%} in length)"
        notes.append(Reason("volume", 0, text))
    return notes


def _reasons(
    per_atom: NDArray[np.float32],
    why: NDArray[np.uint8],
    species: NDArray[Any],
    shells: Surroundings,
    stats: TrustStatistics,
) -> list[Reason]:
    """The reasons of atoms, that of the farthest atom first."""
    found = []
    for place in np.unique(why[why > 0]):
        atoms = np.flatnonzero(why == place)
        text = _text(KINDS[place], atoms, species, shells, stats, len(atoms) / len(why))
        found.append((-float(per_atom[atoms].max()), Reason(KINDS[place], len(atoms), text)))
    return [reason for _, reason in sorted(found, key=lambda pair: pair[0])]


def _text(
    kind: str,
    atoms: NDArray[np.int64],
    species: NDArray[Any],
    shells: Surroundings,
    stats: TrustStatistics,
    share: float,
) -> str:
    main = int(np.bincount(species[atoms]).argmax())
    bonds, usual = stats.bond[main], stats.coordination[main][1]
    count = shells.coordination[atoms]
    neighbours = f"{count.min()}" if count.min() == count.max() else f"{count.min()} to {count.max()}"
    trained = f"trained on {bonds[0]:.2f} to {bonds[1]:.2f}"
    mean = float(shells.bond[atoms].mean())
    if kind == "close":
        return f"atoms {shells.nearest[atoms].min():.2f} angstrom apart, trained down to {stats.nearest:.2f}"
    if kind == "open":
        what = "a surface or void" if usual - count.max() > 1 else "a vacancy or surface"
        what = "another phase, a molecule, or other units" if share > 0.5 else what
        return f"{neighbours} neighbours for {usual:g}: {what}"
    if kind == "missing":
        return f"{neighbours} neighbours for {usual:g}: a vacancy"
    if kind == "crowded":
        return f"{neighbours} neighbours for {usual:g}: a dense place"
    if kind in ("stretched", "compressed"):
        return f"{kind}, bonds of {mean:.2f} angstrom, {trained}"
    return "unlike any in training: another order, or hotter"


def _sentence(
    level: str,
    per_atom: NDArray[np.float32],
    n: int,
    beyond: NDArray[np.int64],
    standing: NDArray[np.int64],
    reasons: Sequence[Reason],
) -> str:
    looked = np.isfinite(per_atom)
    if not n:
        return "no atom lies in the region"
    worst = int(np.nanargmax(np.where(looked, per_atom, -1.0)))
    most = float(per_atom[worst])
    share = len(beyond) / n
    some = f"{len(beyond):,} of {n:,} ({share:.1%})" if share >= 0.001 else f"{len(beyond):,} of {n:,}"
    plain = [r for r in reasons if r.kind != "unlike"] if reasons and reasons[0].kind != "unlike" else reasons
    say = [f"{r.count:,} with {r.text}" if r.kind in ("open", "missing", "crowded") else r.text for r in plain]
    tail = f": {'; '.join(say[:SAID])}" if say else ""
    if level == "outside":
        return f"OUTSIDE of the training data, {some} atoms up to {most:.2f}, most at atom {worst}{tail}"
    if level == "edge" and len(beyond):
        return f"at the EDGE of the training data, {some} atoms up to {most:.2f}, most at atom {worst}{tail}"
    if level == "edge":
        return f"at the EDGE of the training data, atoms up to {most:.2f} of 1{tail}"
    if len(standing):
        return f"inside of the training data, atoms up to {most:.2f} of 1; some stand out{tail}"
    if len(beyond):
        return f"inside of the training data, {some} atoms a little beyond, up to {most:.2f} of 1"
    return f"inside of the training data, atoms up to {most:.2f} of 1"
