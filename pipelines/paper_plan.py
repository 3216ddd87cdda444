"""What a comparison with the paper consists of: every computation with its key, made once, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho import builders, defects
from gpurho.datasets import Snapshot
from gpurho.dft.base import Engine
from gpurho.dft.engines import make_engine
from gpurho.pipelines.paper_sets import SeenData, TestData, find_tests, snapshot_fingerprint
from gpurho.pipelines.paper_store import Made, Results, entry_key
from gpurho.pipelines.paper_work import Work, energy_errors
from gpurho.pipelines.predict import predict
from gpurho.structure import Structure

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

RATTLE = {"al": 0.12, "sige": 0.10}
"""Standard deviation, angstrom, of the displacements of built crystals along each axis."""

AL_LATTICE = 4.05
"""Lattice parameter of built aluminium, angstrom, as in the data sets."""

SIZES = {"al": (2, 3, 4, 5, 6, 7), "sige": (2, 3, 4, 5)}
"""Cubic cells along each edge of the built crystals: 32 to 1372 atoms of Al, 64 to 1000 of SiGe."""

FOUND = ("al256", "al108", "al32"), ("sige216", "sige64")
"""Data sets for Figures 2 and 3, the largest first."""


@dataclass(frozen=True, eq=False)
class Task:
    """A computation: what the results call it, what the reader does, and the function."""

    key: str
    text: str
    compute: Callable[[], Made]
    field: str = ""
    """Tasks of one prediction have the same."""


@dataclass(eq=False)
class Part:
    """The comparison for one material: what is to be computed, and what came of it.

    Attributes
    ----------
    material : "al" or "sige"
    name : str
        Of the model; empty without one.
    model : DensityModel or None
    tests : list of TestData
    seen : SeenData
    measured : dict
        Tasks of metrics by data set.
    energies, floors : dict
        Tasks of energies of predicted densities by data set, and of one label's own density.
    maps : dict
        Tasks of planes of snapshots by name.
    systems : dict
        Tasks of built structures by name.
    failed : dict
        Reasons by key.
    """

    material: str
    name: str
    model: DensityModel | None
    tests: list[TestData]
    seen: SeenData
    measured: dict[str, list[Task]] = field(default_factory=dict)
    energies: dict[str, list[Task]] = field(default_factory=dict)
    floors: dict[str, Task] = field(default_factory=dict)
    maps: dict[str, Task] = field(default_factory=dict)
    systems: dict[str, Task] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def tasks(self, energies: bool = True) -> Iterator[Task]:
        """All of them, with or without energies, the dearest kinds last."""
        labelled = [*(task for group in self.measured.values() for task in group), *self.maps.values()]
        # Those of one field follow one another, so that it is predicted once.
        order = {name: k for k, name in enumerate(dict.fromkeys(task.field for task in labelled))}
        yield from sorted(labelled, key=lambda task: order[task.field])
        yield from self.systems.values()
        if not energies:
            return
        for group in self.energies.values():
            yield from group
        yield from self.floors.values()

    def test(self, name: str) -> TestData | None:
        """A data set by name, if it has labels that the model has not seen."""
        for one in self.tests:
            if one.set.name == name and one.indices:
                return one
        return None


def plan_part(
    material: str,
    name: str,
    model: DensityModel | None,
    folder: Path,
    work: Work,
    engine: str | Engine,
    *,
    snapshots: int | None = None,
    energies: int = 2,
    largest: int = 1400,
    with_defects: DensityModel | None = None,
) -> Part:
    """Every computation for a material; none where there is no model.

    Parameters
    ----------
    material, name, model
        "al" or "sige", the name of its model, and the model.
    folder : Path
        Where the data sets lie.
    work : Work
    engine : str or Engine
        For energies.
    snapshots, energies : int
        Most snapshots of a data set whose densities and whose energies are compared.
    largest : int
        Most atoms of built structures.
    with_defects : DensityModel, optional
        A model that was trained with a defect, for Figure 9e.
    """
    tests, seen = find_tests(model, material, folder)
    part = Part(material, name, model, tests, seen)
    if model is None:
        return part
    shape = partial(_labelled, model.fingerprint(), work)
    solver = engine if isinstance(engine, str) else engine.name
    for test in tests:
        data = test.dataset
        if data is None:
            continue
        which = test.spread(snapshots)
        part.measured[test.set.name] = [measure_task(work, model, test, i) for i in which]
        few = test.indices if test.set.row is None else test.spread(energies)
        part.energies[test.set.name] = [
            shape("energy", test.set.name, i, data[i], partial(_energy, work, model, test, i, engine), solver)
            for i in few
        ]
        if few and test.set.row is not None:
            part.floors[test.set.name] = Task(
                entry_key("floor", f"{test.set.name}-{few[0]}", snapshot_fingerprint(data[few[0]]), solver),
                f"energy of label {few[0]} of {test.set.name} itself",
                partial(_energy, work, None, test, few[0], engine),
            )
    _plan_maps(part, shape, work, model, with_defects)
    for system, (build, axis, where) in built_systems(material, largest).items():
        atoms = build()
        structure = Structure.from_ase(atoms)
        part.systems[system] = Task(
            entry_key("system", system, model.fingerprint(), structure.fingerprint(), work.key(), work.spacing, axis),
            f"{system}, {len(atoms)} atoms",
            partial(work.system, model, atoms, axis, where),
        )
    return part


def run_part(part: Part, results: Results, energies: bool, tick: Callable[[Task], None]) -> None:
    """Do what is not done, with or without energies.

    A computation that fails is named in `part.failed` and does not stop the others.
    """
    from gpurho.errors import GpurhoError, StoreError

    for task in part.tasks(energies):
        tick(task)
        try:
            results.make(task.key, task.compute)
        except StoreError:
            raise
        except GpurhoError as error:
            part.failed[task.key] = f"{task.text}: {error}"


def built_systems(material: str, largest: int) -> dict[str, tuple[Callable[[], Atoms], int, str]]:
    """Structures without labels, by name: their builder, the cell vector across the plane shown, and where it lies."""
    found: dict[str, tuple[Callable[[], Atoms], int, str]] = {}
    rattle = RATTLE[material]
    per_cell = 4 if material == "al" else 8
    for n in SIZES[material]:
        atoms = per_cell * n**3
        if atoms <= largest:
            found[f"crystal of {atoms}"] = (partial(_rattled_crystal, material, n, rattle), 2, "middle")
    if material == "sige":
        if per_cell * 64 <= largest:
            found["alloy of 40 % Si"] = (partial(_rattled_alloy, 0.4, 4, rattle), 2, "middle")
        return found
    if largest >= 256:
        found["vacancy in 256"] = (partial(_rattled_vacancy, 4, rattle), 2, "void")
        found["screw dislocations"] = (partial(defects.screw_dislocation, "Al", a=AL_LATTICE), 2, "middle")
        found["edge dislocations"] = (partial(defects.edge_dislocation, "Al", a=AL_LATTICE), 2, "middle")
        found["tilt grain boundaries"] = (
            partial(defects.tilt_grain_boundary, "Al", width=18.0, a=AL_LATTICE),
            2,
            "middle",
        )
    return found


def with_fewest_atoms(test: TestData, lost: int) -> int | None:
    """The coolest unseen snapshot of a set of cells with `lost` atoms fewer than a full crystal of Al; None without."""
    data = test.dataset
    if data is None:
        return None
    fitting = [i for i in test.indices if (len(data[i].structure) + lost) in (32, 108, 256, 500)]
    return min(fitting, key=lambda i: float(data.meta(i).get("temperature_K", 0.0)), default=None)


def measure_task(work: Work, model: DensityModel, test: TestData, i: int) -> Task:
    """The metrics of snapshot `i` of a set."""
    compute = partial(_measure, work, model, test, i)
    return _labelled(model.fingerprint(), work, "metrics", test.set.name, i, _snapshot(test, i), compute)


# -- parts ------------------------------------------------------------------------------------------------------------


def _labelled(
    fingerprint: str, work: Work, kind: str, name: str, i: int, snapshot: Snapshot, compute: Any, *more: Any
) -> Task:
    key = entry_key(kind, f"{name}-{i}", fingerprint, snapshot_fingerprint(snapshot), work.key(), *more)
    return Task(key, f"{kind} of {name}, snapshot {i}", compute, f"{fingerprint} {name} {i}")


def _measure(work: Work, model: DensityModel, test: TestData, i: int) -> Made:
    return work.measure(model, _snapshot(test, i))


def _maps(work: Work, model: DensityModel, test: TestData, i: int, where: str) -> Made:
    return work.label_maps(model, _snapshot(test, i), where)


def _energy(work: Work, model: DensityModel | None, test: TestData, i: int, engine: str | Engine) -> Made:
    snapshot = _snapshot(test, i)
    density: NDArray[np.floating] = snapshot.density
    if model is not None:
        rho = predict(
            snapshot.structure,
            model,
            grid=snapshot.density.shape,
            uncertainty=None,
            device=work.device,
            precision=work.precision,
            progress=False,
        )
        density = np.asarray(rho.mean)
    solver = make_engine(engine) if isinstance(engine, str) else engine
    return energy_errors(solver, snapshot, density), {}


def _snapshot(test: TestData, i: int) -> Snapshot:
    if test.dataset is None:
        raise IndexError(i)
    return test.dataset[i]


def _plan_maps(part: Part, shape: Any, work: Work, model: DensityModel, with_defects: DensityModel | None) -> None:
    def add(name: str, test: TestData, i: int, where: str, other: DensityModel | None = None) -> None:
        used = other or model
        snapshot = _snapshot(test, i)
        compute = partial(_maps, work, used, test, i, where)
        if other is None:
            part.maps[name] = shape("maps", test.set.name, i, snapshot, compute, where)
        else:
            part.maps[name] = _labelled(other.fingerprint(), work, "maps", test.set.name, i, snapshot, compute, where)

    for names in FOUND:
        for name in names:
            test = part.test(name)
            if test is not None:
                add("largest", test, _near(test, 631.0 if part.material == "al" else 2300.0), "worst")
                break
    vacancies = part.test("al_vacancies" if part.material == "al" else "sige_vacancies")
    if vacancies is not None and part.material == "al":
        for name, lost in (("vacancy", 1), ("divacancy", 2)):
            i = with_fewest_atoms(vacancies, lost)
            if i is not None:
                add(name, vacancies, i, "void")
                if name == "vacancy" and with_defects is not None:
                    add("vacancy, trained", vacancies, i, "void", with_defects)
    elif vacancies is not None:
        add("vacancy", vacancies, vacancies.indices[0], "void")
    mixed = part.test("sige64_compositions")
    if mixed is not None:
        least = min(mixed.indices, key=lambda i: np.mean(_snapshot(mixed, i).structure.numbers == 14))
        add("composition", mixed, least, "worst")


def _near(test: TestData, temperature: float) -> int:
    data = test.dataset
    if data is None:
        raise IndexError(test.set.name)
    return min(test.indices, key=lambda i: abs(float(data.meta(i).get("temperature_K", 0.0)) - temperature))


def _rattled_crystal(material: str, n: int, rattle: float) -> Atoms:
    if material == "sige":
        return _rattled_alloy(0.5, n, rattle)
    return builders.rattled(builders.crystal("Al", (n, n, n), a=AL_LATTICE), rattle, seed=n)


def _rattled_alloy(share: float, n: int, rattle: float) -> Atoms:
    return builders.rattled(builders.alloy({"Si": share, "Ge": 1 - share}, (n, n, n), seed=n), rattle, seed=n)


def _rattled_vacancy(n: int, rattle: float) -> Atoms:
    return builders.rattled(builders.vacancy(builders.crystal("Al", (n, n, n), a=AL_LATTICE)), rattle, seed=n)
