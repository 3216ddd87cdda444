"""Small periodic cells out of large structures, with faces that match as well as the surroundings allow.

The translations of the surroundings are read off the atoms themselves: vectors from one atom to another that carry the
atoms around the centre onto others. Three of them span the cell. Where there are none (a liquid, a dislocation), the
cell is a cube; in both cases it is measured how far the real atoms beyond its faces lie from its periodic images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import SettingsError, StructureError
from gpurho.kernels.celllist import atoms_around, bin_atoms
from gpurho.structure import Structure, cell_heights

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

SKIN = 3.0
"""Real atoms up to here beyond the faces are compared with the periodic images, angstrom."""

SHARE = 0.75
"""Atoms closer than this share of the typical nearest distance do not stand side by side in a cell."""

SAMPLE = 120
"""Atoms around the centre on which translations are tried."""

TRANSLATIONS = 180
"""Translations among which three are chosen."""

PROPOSALS, TRIALS = 120, 10
"""Cells that are considered, and those of them with few enough atoms that are cut and compared."""

MISFIT = 0.35
"""Vectors that miss by more than this share of the nearest distance are no translations."""

SKEW = 0.3
"""Weight of the largest cosine between two cell vectors against the smallest height of the cell."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A periodic cell cut out of a structure.

    Attributes
    ----------
    structure : Structure
        Periodic along all of its cell vectors.
    owners : (n,) int array
        Index of each atom in the structure that it comes from.
    origin : (3,) array, angstrom
        Corner of the cell in that structure.
    mismatch, worst : float, angstrom
        Root mean square, and largest, distance between the atoms within 3 angstrom beyond the faces and the nearest
        atoms of the periodic continuation, and the other way round.
    removed : int
        Atoms within the cell that were left out because they stood too close to others across a face.
    added : int
        Atoms just beyond a face that were taken in because they would leave a hole.
    min_distance : float, angstrom
        What "too close" means.
    whole : bool
        The structure as it was, nothing cut.
    """

    structure: Structure
    owners: NDArray[np.int64]
    origin: Floats
    mismatch: float
    worst: float
    removed: int
    added: int
    min_distance: float
    whole: bool


def cut_cell(structure: Structure, centre: Floats, max_atoms: int = 110, min_distance: float | None = None) -> Cut:
    """A periodic cell of at most `max_atoms` atoms around a point, or the whole structure where that is small enough.

    Parameters
    ----------
    structure : Structure
    centre : (3,) array, angstrom
    max_atoms : int
    min_distance : float, angstrom, optional
        Of two atoms that come closer than this across the faces the one nearer to a face is left out; by default
        0.75 of the typical distance of nearest neighbours.

    Raises
    ------
    SettingsError
        For fewer than 4 atoms or a distance that is not positive.
    StructureError
        Where there are no atoms around the point.
    """
    if max_atoms < 4:
        raise SettingsError(f"max_atoms {max_atoms!r} is too few for a cell; give 4 or more")
    if min_distance is not None and not 0 < min_distance < np.inf:
        raise SettingsError(f"min_distance {min_distance!r} is not a length; give angstrom above 0, or leave it out")
    if len(structure) <= max_atoms and structure.pbc.all():
        near = 0.0 if min_distance is None else min_distance
        return Cut(structure, np.arange(len(structure)), np.zeros(3), 0.0, 0.0, 0, 0, near, True)
    cutter = _Cutter(structure, np.asarray(centre, float), max_atoms, min_distance)
    return cutter.best()


class _Cutter:
    """The atoms around a point, and cells cut out of them."""

    def __init__(self, structure: Structure, centre: Floats, max_atoms: int, min_distance: float | None) -> None:
        from scipy.spatial import cKDTree

        self.structure, self.centre, self.max_atoms = structure, centre, max_atoms
        bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        # The density of atoms: of the densest of some balls, as one may be half empty at a surface.
        radius, volume = 8.0, np.inf
        while not np.isfinite(volume):
            near, _ = atoms_around(bins, centre[None], radius)
            near = near[np.linalg.norm(near - centre, axis=1) <= radius]
            if len(near) >= 8:
                volume = 4.0 / 3.0 * np.pi * radius**3 / len(near)
            radius *= 1.0 if np.isfinite(volume) else 1.5
        self.edge = float(np.cbrt(max_atoms * volume))
        positions, owners = atoms_around(bins, centre[None], 2.6 * self.edge)
        inside = np.linalg.norm(positions - centre, axis=1) <= 2.6 * self.edge
        self.positions, self.owners = positions[inside], owners[inside].astype(np.int64)
        self.tree: cKDTree = cKDTree(self.positions)
        self.distances = np.linalg.norm(self.positions - centre, axis=1)
        core = self.positions[self.distances <= self.edge]
        nearest = float(np.median(self.tree.query(core, k=2)[0][:, 1]))
        self.nearest = nearest
        self.min_distance = SHARE * nearest if min_distance is None else float(min_distance)

    def best(self) -> Cut:
        """The best of the cells that the translations offer, and a cube."""
        vectors, misfits = self._translations()
        found: tuple[float, Cut] | None = None
        trials = 0
        for triple in self._triples(vectors, misfits):
            cut = self._cut(triple)
            if cut is not None:
                trials += 1
                found = _better(found, cut, self._cost(cut))
            if trials == TRIALS:
                break
        for cell, free in self._frames(vectors):
            cut = self._cut(cell)
            while cut is None:
                # Where the density varies there may be too many atoms in it: along the directions that are free.
                cell = np.where(free[:, None], 0.97 * cell, cell)
                cut = self._cut(cell)
            found = _better(found, cut, self._cost(cut))
        assert found is not None
        return found[1]

    def _frames(self, vectors: Floats) -> list[tuple[Floats, NDArray[np.bool_]]]:
        """Cells with two, one or no translations among their vectors, and which vectors are free.

        For surroundings that are periodic in some directions only: boundaries, dislocations, surfaces, liquids.
        """
        found = [(self.edge * np.eye(3), np.ones(3, bool))]
        close = vectors[np.argsort(np.abs(np.linalg.norm(vectors, axis=1) - self.edge), kind="stable")[:40]]
        pairs: list[tuple[float, Floats]] = []
        for i, first in enumerate(close):
            for second in close[i + 1 :]:
                normal = np.cross(first, second)
                area = float(np.linalg.norm(normal))
                sides = float(np.linalg.norm(first) * np.linalg.norm(second))
                length = self.edge**3 / max(area, 1e-9)
                if area > 0.75 * sides and 0.6 * self.edge < length < 1.8 * self.edge:
                    smallest = min(area / float(np.linalg.norm(first)), area / float(np.linalg.norm(second)), length)
                    pairs.append((smallest, np.array([first, second, normal * (length / area)])))
        pairs.sort(key=lambda entry: -entry[0])
        found += [(cell, np.array([False, False, True])) for _, cell in pairs[:4]]
        for first in close[:2]:
            length = float(np.linalg.norm(first))
            side = np.sqrt(self.edge**3 / length)
            along = np.cross(first, np.eye(3)[int(np.argmin(np.abs(first)))])
            along /= np.linalg.norm(along)
            cell = np.array([first, side * along, side * np.cross(first / length, along)])
            found.append((cell, np.array([False, True, True])))
        return found

    def _cost(self, cut: Cut) -> float:
        """What speaks against a cell: faces that do not match, and images of the centre that are near."""
        cell = cut.structure.cell
        unit = cell / np.linalg.norm(cell, axis=1)[:, None]
        skew = float(np.abs(unit @ unit.T - np.eye(3)).max())
        return cut.mismatch / self.nearest - float(cell_heights(cell).min()) / self.edge * (1.0 - SKEW * skew)

    # -- translations -----------------------------------------------------------------------------------------

    def _translations(self) -> tuple[Floats, Floats]:
        """Vectors between atoms, refined, and the root mean square by which they miss on atoms around the centre."""
        rng = np.random.default_rng(0)
        shell = np.flatnonzero((self.distances > 0.45 * self.edge) & (self.distances < 0.9 * self.edge))
        if len(shell) < 8:
            return np.empty((0, 3)), np.empty(0)
        sample = self.positions[rng.permutation(shell)[:SAMPLE]]
        anchors = self.positions[rng.permutation(shell)[:3]]
        vectors = (self.positions[None] - anchors[:, None]).reshape(-1, 3)
        lengths = np.linalg.norm(vectors, axis=1)
        vectors = vectors[(lengths > 0.6 * self.edge) & (lengths < 1.5 * self.edge)]
        # One of each pair of opposite vectors.
        vectors = vectors[(vectors @ np.array([1.0, 1e-3, 1e-6])) > 0]
        for _ in range(2):
            offsets, matched = self._residuals(sample, vectors)
            count = np.maximum(matched.sum(1), 1)
            vectors = vectors + (offsets * matched[:, :, None]).sum(1) / count[:, None]
        offsets, _ = self._residuals(sample, vectors)
        misfits = np.sqrt((offsets**2).sum(2).mean(1))
        order = np.argsort(misfits, kind="stable")
        vectors, misfits = vectors[order], misfits[order]
        vectors, misfits = _distinct(vectors, misfits, 0.25 * self.nearest)
        best = float(misfits.min(initial=np.inf))
        good = misfits <= min(best + 0.12 * self.nearest, MISFIT * self.nearest)
        return vectors[good], misfits[good]

    def _residuals(self, sample: Floats, vectors: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """From each translated atom to the nearest real one, (n_vectors, n_sample, 3), and whether it is near."""
        targets = sample[None] + vectors[:, None]
        distances, index = self.tree.query(targets.reshape(-1, 3), workers=1)
        offsets = self.positions[index].reshape(targets.shape) - targets
        return offsets, (distances < 0.4 * self.nearest).reshape(targets.shape[:2])

    def _triples(self, vectors: Floats, misfits: Floats) -> list[Floats]:
        """Three translations each, right-handed, the most promising first."""
        if len(vectors) < 3:
            return []
        order = np.argsort(np.abs(np.linalg.norm(vectors, axis=1) - self.edge), kind="stable")[:TRANSLATIONS]
        vectors, misfits = vectors[order], misfits[order]
        lengths = np.linalg.norm(vectors, axis=1)
        unit = vectors / lengths[:, None]
        cosines = np.abs(unit @ unit.T)
        limit = 1.06 * self.edge**3
        found: list[tuple[float, int, int, int, bool]] = []
        for i in range(len(vectors)):
            faces = np.cross(vectors[i], vectors[i + 1 :])
            volumes = faces @ vectors.T
            size = np.abs(volumes)
            skew = np.maximum(np.maximum(cosines[i, i + 1 :, None], cosines[i][None, :]), cosines[i + 1 :])
            # Heights over the three faces; k > j only, since the order of three does not matter.
            areas = np.linalg.norm(faces, axis=1)[:, None]
            others = lengths[i] * lengths[None, :] * np.sqrt(np.maximum(1 - cosines[i] ** 2, 1e-12))[None, :]
            thirds = lengths[i + 1 :, None] * lengths * np.sqrt(np.maximum(1 - cosines[i + 1 :] ** 2, 1e-12))
            height = size / np.maximum(np.maximum(areas, others), thirds)
            misfit = misfits[i] + misfits[i + 1 :, None] + misfits[None, :]
            quality = height / self.edge * (1 - SKEW * skew) - misfit / self.nearest
            j, k = np.arange(i + 1, len(vectors))[:, None], np.arange(len(vectors))[None, :]
            allowed = (k > j) & (size < limit) & (height > 0.4 * self.edge) & (skew < 0.75)
            rows, columns = np.nonzero(allowed)
            best = np.argsort(-quality[rows, columns], kind="stable")[:PROPOSALS]
            found += [
                (float(quality[r, c]), i, i + 1 + int(r), int(c), bool(volumes[r, c] < 0))
                for r, c in zip(rows[best], columns[best], strict=True)
            ]
        found.sort(key=lambda entry: -entry[0])
        return [vectors[[i, k, j] if left else [i, j, k]] for _, i, j, k, left in found[:PROPOSALS]]

    # -- a cell -----------------------------------------------------------------------------------------------

    def _cut(self, cell: Floats) -> Cut | None:
        """The cell around the centre; None where it would hold too many atoms."""
        heights = cell_heights(cell)
        inverse = np.linalg.inv(cell)
        fractions = (self.positions - self.centre) @ inverse + 0.5
        fractions -= self._offset(fractions, heights)
        # How deep within the cell, angstrom; beyond a face it is negative.
        depth = (np.minimum(fractions, 1.0 - fractions) * heights).min(axis=1)
        if np.count_nonzero(depth >= 0) > 1.1 * self.max_atoms:
            return None
        near = np.flatnonzero(depth >= -0.5 * self.min_distance)
        near = near[np.argsort(-depth[near], kind="stable")]
        taken = self._settled(fractions[near], cell)
        kept = near[taken]
        if not len(kept):
            raise StructureError(f"no atoms around {self.centre.round(3).tolist()}; give a centre nearer to some")
        if len(kept) > self.max_atoms:
            return None
        removed = int((depth[near] >= 0).sum() - (depth[kept] >= 0).sum())
        added = int((depth[kept] < 0).sum())
        kept = kept[np.argsort(self.owners[kept], kind="stable")]
        inside = fractions[kept] - np.floor(fractions[kept])
        inside[inside >= 1.0] = 0.0
        numbers = self.structure.numbers[self.owners[kept]]
        result = Structure(inside @ cell, numbers, cell, np.ones(3, bool))
        mismatch, worst = self._mismatch(result, fractions, depth)
        origin = self.positions[0] - fractions[0] @ cell
        return Cut(result, self.owners[kept], origin, mismatch, worst, removed, added, float(self.min_distance), False)

    def _offset(self, fractions: Floats, heights: Floats) -> Floats:
        """A small shift of the cell after which few atoms lie on its faces, (3,), fractions."""
        shift = np.zeros(3)
        for d in range(3):
            others = [e for e in range(3) if e != d]
            beside = np.abs(fractions[:, others] - 0.5).max(axis=1) < 0.55
            x = fractions[beside, d]
            trials = np.linspace(-1.0, 1.0, 41) * min(0.1, 0.6 * self.nearest / heights[d])
            # The face at 0; that at 1 is its image where the faces match.
            gaps = [((x - face - trials[:, None]) * heights[d]) for face in (0.0, 1.0)]
            crowd = sum(np.exp(-((gap / (0.2 * self.nearest)) ** 2)).sum(axis=1) for gap in gaps)
            crowd = crowd + 1e-3 * np.abs(trials) * heights[d]
            shift[d] = trials[int(np.argmin(crowd))]
        return shift

    def _settled(self, fractions: Floats, cell: Floats) -> NDArray[np.int64]:
        """Of atoms in the order of their rank those that stand clear of all that were taken before."""
        images = np.array([(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)], float) @ cell
        wrapped = (fractions - np.floor(fractions)) @ cell
        taken: list[int] = []
        for n in range(len(wrapped)):
            apart = wrapped[taken][:, None] - wrapped[n] + images
            if not taken or np.square(apart).sum(-1).min() >= self.min_distance**2:
                taken.append(n)
        return np.array(taken, np.int64)

    def _mismatch(self, cut: Structure, fractions: Floats, depth: Floats) -> tuple[float, float]:
        from scipy.spatial import cKDTree

        bins = bin_atoms(cut.positions, cut.cell, cut.pbc)
        corners = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)], float) @ cut.cell
        images, _ = atoms_around(bins, corners, 2.0 * SKIN + self.nearest)
        real = fractions @ cut.cell
        beyond = real[(depth < 0) & (depth > -SKIN)]
        heights = cell_heights(cut.cell)
        places = images @ np.linalg.inv(cut.cell)
        out = (np.minimum(places, 1.0 - places) * heights).min(axis=1)
        ghosts = images[(out < 0) & (out > -SKIN)]
        parts: list[Any] = []
        if len(beyond):
            parts.append(cKDTree(images).query(beyond)[0])
        if len(ghosts):
            parts.append(cKDTree(real).query(ghosts)[0])
        if not parts:
            return 0.0, 0.0
        distances = np.concatenate(parts)
        return float(np.sqrt(np.mean(distances**2))), float(distances.max())


def _better(found: tuple[float, Cut] | None, cut: Cut, cost: float) -> tuple[float, Cut]:
    return (cost, cut) if found is None or cost < found[0] - 1e-9 else found


def _distinct(vectors: Floats, misfits: Floats, apart: float) -> tuple[Floats, Floats]:
    """Vectors that lie `apart` from each other, the better of two kept; they come in the order of their misfits."""
    from scipy.spatial import cKDTree

    keep = np.ones(len(vectors), bool)
    if len(vectors):
        for i, near in enumerate(cKDTree(vectors).query_ball_point(vectors, apart)):
            if keep[i]:
                keep[[n for n in near if n > i]] = False
    return vectors[keep], misfits[keep]


__all__ = ["Cut", "cut_cell"]
