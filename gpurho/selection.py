"""Which descriptors: the searches of the preprint's appendix (Algorithms 2 and 3), and one for the smooth family.

A search asks for errors of descriptors one after the other and ends with its choice. It knows nothing of data and
training, so that what trains the candidates may keep a record and go on from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpurho.errors import SettingsError

Sizes = dict[str, Any]
"""Settings of descriptors by name, as `TrainingSettings` has them."""

Measure = Callable[[str, Sizes], float]
"""Error of descriptors, given the name of the series that asks for it and their sizes."""

STOPS = ("either", "both")


@dataclass(frozen=True)
class SearchSettings:
    """Steps and tolerances of the searches.

    Parameters
    ----------
    tolerance : float
        A change of the error counts from this share of the present error on: eta of Algorithm 2.
    angle_tolerance : float, optional
        The same for the two loops of Algorithm 3; `tolerance` by default.
    stop : "either" or "both"
        End a series when its last error differs by less than the tolerance from either of the two before, as the
        algorithms are printed ("while d1 >= eta & d2 >= eta"), or from both of them, which noise deceives less.
    distance_step, max_distances : int
        M grows by the first and ends at the second.
    angle_step, max_angle_atoms : int
        The same for M_a, which ends at M, too.
    neighbors : tuple of int
        Values of k, in their order.
    start : dict
        Where the smooth family begins: cutoff (angstrom), n_basis, l_max, n_radial.
    steps, most : dict
        By how much each of these grows, and its largest value.
    """

    tolerance: float = 0.02
    angle_tolerance: float | None = None
    stop: str = "either"
    distance_step: int = 10
    max_distances: int = 120
    angle_step: int = 5
    max_angle_atoms: int = 40
    neighbors: tuple[int, ...] = (2, 3, 4)
    start: Sizes | None = None
    steps: Sizes | None = None
    most: Sizes | None = None

    def __post_init__(self) -> None:
        for name in ("tolerance", "angle_tolerance"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise SettingsError(f"{name} {value!r} is not a share of the error; give more than 0 and less than 1")
        if self.stop not in STOPS:
            raise SettingsError(f"stop {self.stop!r} is not known; give one of {', '.join(STOPS)}")
        for name in ("distance_step", "angle_step", "max_angle_atoms"):
            self._check_whole(name, 1)
        self._check_whole("max_distances", self.distance_step)
        neighbors = tuple(self.neighbors)
        if not neighbors or any(int(k) != k or k < 1 for k in neighbors) or len(set(neighbors)) != len(neighbors):
            raise SettingsError(f"neighbors {list(neighbors)} are not different whole numbers from 1 up")
        object.__setattr__(self, "neighbors", neighbors)
        for name, default in (("start", SMOOTH_START), ("steps", SMOOTH_STEPS), ("most", SMOOTH_MOST)):
            given = getattr(self, name) or {}
            unknown = sorted(set(given) - set(default))
            if unknown or any(not v > 0 for v in given.values()):
                raise SettingsError(f"{name} {given!r} does not fit; give positive values of {', '.join(default)}")
            object.__setattr__(self, name, {**default, **given})

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(f"{name} {value!r} is not a whole number from {least} up")


SMOOTH_START: Sizes = {"cutoff": 4.0, "n_basis": 3, "l_max": 2, "n_radial": 12}
SMOOTH_STEPS: Sizes = {"cutoff": 0.5, "n_basis": 1, "l_max": 1, "n_radial": 4}
SMOOTH_MOST: Sizes = {"cutoff": 8.0, "n_basis": 12, "l_max": 8, "n_radial": 40}


def select_scalar_product(measure: Measure, settings: SearchSettings) -> Sizes:
    """M by Algorithm 2, then M_a and k by Algorithm 3.

    Two things that the algorithms leave open: a series that ends before it has anything to step back to gives its
    first size; and where no k is close to the one before, that of the smallest error is taken, as the text has it.
    Angles are left out where they do not do better than distances alone.

    Returns
    -------
    dict
        n_distances, n_angle_atoms, n_angle_neighbors.
    """
    s = settings

    def distances(m: int) -> float:
        return measure("distances", _sizes(m, 0, 0))

    m, error = converge_series(distances, s.distance_step, s.max_distances, s.tolerance, s.stop)
    tolerance = s.tolerance if s.angle_tolerance is None else s.angle_tolerance
    most = min(s.max_angle_atoms, m)
    found: list[tuple[int, int, float]] = []
    for k in s.neighbors:

        def angles(atoms: int, k: int = k) -> float:
            return measure(f"k = {k}", _sizes(m, atoms, k))

        atoms, value = converge_series(angles, min(s.angle_step, most), most, tolerance, s.stop)
        if found and abs(value - found[-1][2]) < tolerance * value:
            break
        found.append((atoms, k, value))
    else:
        found.sort(key=lambda entry: entry[2])
        found = found[:1]
    atoms, k, value = found[-1]
    return _sizes(m, atoms, k) if value < error else _sizes(m, 0, 0)


def converge_series(
    error: Callable[[int], float], step: int, most: int, tolerance: float, stop: str
) -> tuple[int, float]:
    """The size, a multiple of `step` up to `most`, from which on the error changes little, and its error.

    The loop of Algorithms 2 and 3: two steps back from where the last error differs by less than `tolerance` of
    itself from the two before (`SearchSettings.stop`). Without such a place, the size of the smallest error.
    """
    errors: list[float] = []
    for size in range(step, most + 1, step):
        errors.append(error(size))
        last = errors[-1]
        near = [abs(last - e) < tolerance * last for e in [math.inf, math.inf, *errors[:-1]][-2:]]
        if any(near) if stop == "either" else all(near):
            index = max(0, len(errors) - 3)
            return (index + 1) * step, errors[index]
    index = errors.index(min(errors))
    return (index + 1) * step, errors[index]


def select_smooth(measure: Measure, settings: SearchSettings) -> Sizes:
    """Cutoff, n_basis, l_max and n_radial: each grows while the error falls by more than the tolerance.

    One after the other, and round after round until none of them grows: a wider cutoff may want more functions.

    Returns
    -------
    dict
        cutoff, n_basis, l_max, n_radial.
    """
    s = settings
    steps, most = s.steps or {}, s.most or {}
    sizes = dict(s.start or {})
    best = measure("start", dict(sizes))
    while True:
        grown = False
        for name in steps:
            while True:
                wider = {**sizes, name: round(sizes[name] + steps[name], 6)}
                if wider[name] > most[name] or wider["n_basis"] > wider["n_radial"]:
                    break
                error = measure(name, dict(wider))
                if not error < (1.0 - s.tolerance) * best:
                    break
                sizes, best, grown = wider, error, True
        if not grown:
            return sizes


def _sizes(m: int, atoms: int, k: int) -> Sizes:
    return {"n_distances": m, "n_angle_atoms": atoms, "n_angle_neighbors": k if atoms else 0}


SEARCHES: dict[str, Callable[[Measure, SearchSettings], Sizes]] = {
    "scalar-product": select_scalar_product,
    "smooth": select_smooth,
}
"""The search of each family."""

__all__ = ["SEARCHES", "SearchSettings", "converge_series", "select_scalar_product", "select_smooth"]
