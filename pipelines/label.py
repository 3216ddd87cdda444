"""Label structures with a DFT engine: several workers, every label durable when it is done, resumable."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.dft.base import DFTSettings, Engine, KMesh
from gpurho.dft.engines import make_engine
from gpurho.errors import GpurhoError, SettingsError, StoreError, StructureError
from gpurho.labelstore import LabelStore, as_snapshot, engine_identity, label_key
from gpurho.pipelines.workers import available_cores, run_tasks
from gpurho.structure import Structure, as_structure

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

GATHER_SECONDS = 600
"""The data set is brought up to date when a label ends and this time has passed."""


@dataclass(frozen=True)
class LabelRun:
    """What a run did.

    Attributes
    ----------
    out : Path
    computed, found : int
        Labels of this run, and those that were there before.
    failures : dict
        Reason by number of the structure.
    duplicates : int
        Structures that were given more than once, beyond the first.
    seconds : float
    """

    out: Path
    computed: int
    found: int
    failures: dict[int, str]
    duplicates: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**vars(self), "out": str(self.out)}

    def __str__(self) -> str:
        text = f"{self.out}: {self.computed} labels computed in {self.seconds:.0f} s, {self.found} were there"
        if self.duplicates:
            text += f"\n{self.duplicates} structures were given before: labelled once, with what came with the first"
        for number, reason in self.failures.items():
            text += f"\nstructure {number} failed: {reason}"
        return text


@dataclass(frozen=True)
class _Task:
    number: int
    key: str
    structure: Structure
    meta: dict[str, Any]


def label(
    structures: Sequence[Atoms | Structure],
    out: str | os.PathLike[str],
    *,
    engine: str = "qe",
    engine_options: dict[str, Any] | None = None,
    settings: DFTSettings | None = None,
    start: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> LabelRun:
    """Compute the ground state of each structure and keep all in one HDF5 data set.

    Parameters
    ----------
    structures : sequence of ase.Atoms or Structure
        Plain values in ``atoms.info`` are kept with the label (temperature_K, family, ...).
    out : path
        The data set; labels that it, or an interrupted run, already has are not computed again.
    engine : {"qe", "gpaw", "sparc"} or "package.module:Class"
    engine_options : dict, optional
        For the engine's constructor.
    settings : DFTSettings, optional
    start : str or path, optional
        Model, by its name or file, from whose density each calculation starts; otherwise from superposed atoms. A label
        is converged to the same tolerance and so the same label either way, in fewer steps, and says where it started.
    workers : int, optional
        Calculations at once; by default one for each core.
    retry_failed : bool
        Try again what failed before.
    progress : bool

    Raises
    ------
    StructureError, UnknownSpeciesError
        Where a structure cannot be done at all, before any work.
    StoreError
        Where another run works on the same data set, or it cannot be written; finished labels are safe.
    """
    started = time.monotonic()
    settings = settings or DFTSettings()
    solver = make_engine(engine, **(engine_options or {}))  # a missing program is told before any work
    tasks = [_task(i, item, settings, solver) for i, item in enumerate(structures)]
    if start is not None:
        tasks = [_started(task, start) for task in tasks]
    if not tasks:
        raise SettingsError("no structures to label; give at least one")
    if workers is not None and workers < 1:
        raise SettingsError(f"{workers} workers cannot work; give 1 or more")
    with LabelStore(out) as store:
        unique: dict[str, _Task] = {}
        for task in tasks:
            unique.setdefault(task.key, task)
        found = sum(store.done(key) for key in unique)
        reasons = {t.number: None if store.done(t.key) else store.failure(t.key) for t in unique.values()}
        failures = {} if retry_failed else {number: why for number, why in reasons.items() if why is not None}
        todo = [t for t in unique.values() if not store.done(t.key) and t.number not in failures]
        keys = [task.key for task in tasks]
        computed = 0
        compute = partial(
            _one, out=store.out, engine=engine, options=engine_options or {}, settings=settings, start=start
        )
        try:
            for task, outcome in _compute(todo, store, compute, workers or available_cores(), progress, keys):
                if outcome is None:
                    computed += 1
                else:
                    failures[task.number] = outcome
        except BaseException:
            with contextlib.suppress(StoreError):  # what stopped the run is what its user must hear
                store.gather(keys)
            raise
        store.gather(keys)
        store.clear()
    seconds = time.monotonic() - started
    return LabelRun(Path(out), computed, found, dict(sorted(failures.items())), len(tasks) - len(unique), seconds)


def _task(number: int, item: Atoms | Structure, settings: DFTSettings, engine: Engine) -> _Task:
    try:
        structure = as_structure(item)
        name = engine_identity(engine, structure)
        meta = _plain(getattr(item, "info", {}))
        meta.setdefault("family", structure.to_ase().get_chemical_formula())
        return _Task(number, label_key(structure, settings, name), structure, meta)
    except GpurhoError as error:
        raise type(error)(f"structure {number}: {error}") from None


def _started(task: _Task, start: str | os.PathLike[str]) -> _Task:
    """The task with what its label says of the start; an atom that the model does not know is told before any work."""
    model = _start_model(os.fspath(start))
    try:
        model.spec.descriptor.species_index(task.structure)
    except GpurhoError as error:
        raise type(error)(f"structure {task.number}: {error}") from None
    return replace(task, meta={**task.meta, "start": Path(start).stem, "start_model": model.fingerprint()})


@lru_cache(maxsize=1)
def _start_model(start: str) -> DensityModel:
    from gpurho.model import load_model

    return load_model(start)


def _plain(info: dict[Any, Any]) -> dict[str, Any]:
    """The values of `info` that a data set can hold: text, whole and other numbers; arrays are left out."""
    plain: dict[str, Any] = {}
    for key, value in info.items():
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool):
            continue
        texts = [key, value] if isinstance(value, str) else [key]
        too_large = isinstance(value, int) and not -(2**63) <= value < 2**63
        # NUL, and halves of surrogate pairs, which are no UTF-8.
        if too_large or any("\0" in text or text != text.encode(errors="ignore").decode() for text in texts):
            raise StructureError(f"info {key!r} is {value!r}, which HDF5 cannot hold; remove or change it")
        plain[key] = value
    return plain


def _compute(
    todo: list[_Task],
    store: LabelStore,
    compute: Callable[[_Task], None],
    workers: int,
    progress: bool,
    keys: list[str],
) -> Iterator[tuple[_Task, str | None]]:
    """Each finished task with None, or the reason why it failed."""
    from tqdm import tqdm

    gathered = time.monotonic()
    with tqdm(total=len(todo), desc="label", unit="label", smoothing=0, disable=None if progress else True) as bar:
        for task, error in run_tasks(compute, todo, workers, lambda task: store.done(task.key)):
            bar.update()
            if isinstance(error, StoreError):
                raise StoreError(
                    f"{error}; {store.count(keys)} labels are safe: make room and run the same command again"
                )
            if error is not None and not isinstance(error, Exception):
                raise error
            reason = None if error is None else " ".join((str(error) or type(error).__name__).split())
            if reason is not None:
                store.fail(task.key, reason, task.meta)
            yield task, reason
            if time.monotonic() - gathered > GATHER_SECONDS:
                with contextlib.suppress(StoreError):  # the parts are safe, and the end will tell
                    store.gather(keys)
                gathered = time.monotonic()


def _one(
    task: _Task, out: Path, engine: str, options: dict[str, Any], settings: DFTSettings,
    start: str | os.PathLike[str] | None,
) -> None:  # fmt: skip
    """One label, in a worker: computed and made durable there."""
    density = None
    if start is not None:
        from gpurho.pipelines.predict import predict

        model, grid = _start_model(os.fspath(start)), settings.shape(task.structure)
        with predict(task.structure, model, grid=grid, uncertainty=None, device="cpu", progress=False) as rho:
            density = np.asarray(rho.mean, dtype=np.float64)
    result = make_engine(engine, **options).ground_state(task.structure, settings, density)
    LabelStore(out).save(task.key, as_snapshot(result, task.meta, task.key))


# -- command line ---------------------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments of DFT settings, shared by the commands that compute."""
    default = DFTSettings()
    parser.add_argument("--cutoff", type=float, metavar="EV", help="plane waves (by element)")
    parser.add_argument("--kmesh", type=int, nargs=3, metavar="N", help="k-points along each vector; 1 1 1 for one")
    parser.add_argument(
        "--k-reach", type=float, metavar="A", help=f"length that the k-mesh resolves ({default.k_reach} angstrom)"
    )
    parser.add_argument("--k-density", type=float, metavar="D", help="k-points per 1/angstrom instead")
    parser.add_argument("--k-shift", type=float, nargs=3, metavar="S", help="shift of either mesh in steps, 0 to 1")
    parser.add_argument("--gamma", action="store_true", help="the Gamma point alone")
    parser.add_argument(
        "--smearing", type=float, default=default.smearing_hartree, metavar="HARTREE", help="kT (%(default)s Hartree)"
    )
    parser.add_argument("--grid", type=int, nargs=3, metavar="N", help="points of the density")
    parser.add_argument("--tolerance", type=float, default=default.tolerance, metavar="L1", help="SCF (%(default)s)")
    parser.add_argument("--max-iterations", type=int, default=default.max_iterations, metavar="N")


def settings_of(options: argparse.Namespace) -> DFTSettings:
    """The settings that `add_settings` asked for."""
    given = [name for name in ("gamma", "kmesh", "k_density", "k_reach") if getattr(options, name)]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise SettingsError(f"{names} each say what the k-points are; give one of them")
    if options.k_shift and given not in (["kmesh"], ["k_density"]):
        raise SettingsError("--k-shift goes with --kmesh or --k-density; give one of them")
    default = DFTSettings()
    a, b, c = options.k_shift or default.k_shift
    shift = (a, b, c)
    return DFTSettings(
        cutoff=options.cutoff,
        kmesh=KMesh() if options.gamma else KMesh(tuple(options.kmesh), shift) if options.kmesh else None,
        k_reach=options.k_reach or default.k_reach,
        k_density=options.k_density,
        k_shift=shift,
        smearing_hartree=options.smearing,
        grid=tuple(options.grid) if options.grid else None,
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
    )


def add_parser(commands: Any) -> None:
    """The command ``gpurho label``."""
    parser = commands.add_parser("label", help="reference densities by DFT, into an HDF5 data set")
    parser.add_argument("structures", type=Path, nargs="+", help="files that ASE reads: all frames, or FILE@0:10")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HDF5 data set; resumable")
    parser.add_argument("--engine", default="qe", help="qe, gpaw, sparc, or package.module:Class (%(default)s)")
    parser.add_argument("--start", metavar="MODEL", help="begin from its density, not from superposed atoms")
    parser.add_argument("--workers", type=int, metavar="N", help="calculations at once (default: one for each core)")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed before")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser)
    parser.set_defaults(run=run, kept="finished labels are safe: run the same command again to go on")


def run(options: argparse.Namespace) -> int:
    """Run ``gpurho label``."""
    from gpurho.pipelines.structures import read_structures

    frames = [atoms for path in options.structures for atoms in read_structures(path)]
    result = label(
        frames,
        options.out,
        engine=options.engine,
        settings=settings_of(options),
        start=options.start,
        workers=options.workers,
        retry_failed=options.retry_failed,
        progress=not options.quiet,
    )
    print(json.dumps(result.to_dict()) if options.json else result)
    return 1 if result.failures else 0
