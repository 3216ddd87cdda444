"""How fast this machine is at each stage of a prediction: measured once in a few seconds, and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpurho.densityfile import compress_chunk
from gpurho.descriptors import Environment
from gpurho.dumpfile import Header
from gpurho.partition import Tile
from gpurho.pipelines.settings import MIN_DISTANCE, Job, library_version
from gpurho.pipelines.tiling import Stages, cut_short
from gpurho.pipelines.workers import available_cores
from gpurho.sources import StructureSource
from gpurho.structure import Structure, fingerprint

SAMPLE_EDGE = 6
"""Atoms along each edge of the structure whose points are timed."""

MANY_EDGE = 24
"""Atoms along each edge of the structure whose preparation is timed: 13,824 in all."""

PROBE_POINTS = 24
"""Points along each axis of the box that is timed."""


@dataclass(frozen=True)
class Rates:
    """Seconds of each stage.

    Parameters
    ----------
    features, network, reductions : float
        For a point, on one device: descriptors; network with its error bars; what `keep` makes of the fields.
    encoding : float
        For a byte of float32, on one thread.
    setup : float
        For an atom: its neighbours and cells, where its points are predicted.
    driver : float
        For an atom, in the one process that begins the work: checks and fingerprint, of atoms in a file.
    reading : float
        For an atom of a LAMMPS text dump: read and sorted on the disk.
    """

    features: float
    network: float
    reductions: float
    encoding: float
    setup: float
    driver: float
    reading: float


REPEATS, LEAST, ENOUGH_SECONDS = 12, 4, 3.0
"""The box is timed so often, or less when that takes long: of other work on the machine the quickest knows least."""


def lattice(edge: int, density: float, numbers: list[int]) -> Structure:
    """edge^3 shaken atoms of so many per angstrom^3, the species in turn: as crowded as the system, no more like it."""
    step = density ** (-1.0 / 3.0)
    places = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = (places + 0.5 + np.random.default_rng(0).uniform(-0.1, 0.1, places.shape)) * step
    species = np.array(numbers)[np.arange(len(positions)) % len(numbers)]
    return Structure(positions, species, np.eye(3) * edge * step, np.array([True] * 3))


def rates(job: Job, refresh: bool = False) -> Rates:
    """The rates of this machine for a job on a `lattice`: from the user's cache folder, or measured now.

    `refresh` measures anew. The file is ``calibration.json`` in ``$XDG_CACHE_HOME/gpurho`` or ``~/.cache/gpurho``; a
    folder that cannot be written to costs nothing but the measurement, a few seconds, the next time.
    """
    path, key = cache_folder() / "calibration.json", json.dumps(_identity(job))
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(path.read_text())
    if not refresh:
        with contextlib.suppress(KeyError, TypeError):
            return Rates(**known[key])
    found = measure(job)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{os.getpid()}.{path.name}")
        new.write_text(json.dumps({**known, key: asdict(found)}, indent=1))
        os.replace(new, path)
    return found


def cache_folder() -> Path:
    """Where this library remembers what it measured."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpurho"


def _identity(job: Job) -> list[Any]:
    """All that the rates depend on."""
    import torch

    if job.device.startswith("cuda"):
        device: list[Any] = [torch.cuda.get_device_name(job.device)]
    else:
        device = [platform.node(), platform.machine(), available_cores(), os.environ.get("OMP_NUM_THREADS")]
    steps = np.linalg.norm(job.grid.steps, axis=1).round(3).tolist()
    density = round(len(job.structure) / job.structure.volume, 4)
    samples = job.samples if job.uncertainty == "sampled" else None
    how = [job.precision, job.executor, job.uncertainty, samples, job.keep.to_items(), steps, density]
    return [library_version(), job.model.fingerprint(), *device, *how]


def measure(job: Job) -> Rates:
    """Time all stages; best of a few, since whatever else runs here only adds."""
    stages = Stages(job)
    shape = [min(PROBE_POINTS, n, t) for n, t in zip(job.grid.shape, job.tiles.tile_shape, strict=True)]
    # Whole blocks of a coarse field.
    i, j, k = (max(1, n // f) * f for n, f in zip(shape, job.keep.coarse or (1, 1, 1), strict=True))
    box = Tile(0, (0, 0, 0), (i, j, k))
    spent = np.full((REPEATS, 3), np.inf)
    started = time.perf_counter()
    for done, row in enumerate(spent):
        if done >= LEAST and time.perf_counter() - started > ENOUGH_SECONDS:
            break
        begun = stages.evaluate(box, wait=True)
        if cut_short(begun.features):
            continue
        begin = time.perf_counter()
        results, _ = stages.reduced(begun.outputs, box)
        stages.fetch(results)()
        row[:] = begun.feature_seconds, begun.network_seconds, time.perf_counter() - begin
    points = spent[1:].min(axis=0) / box.n_points
    field = stages.fetch([begun.outputs[0]])()[0]
    encoding = _best(lambda: compress_chunk(field, box.slices, box.shape)) / field.nbytes
    density = len(job.structure) / job.structure.volume
    many = lattice(MANY_EDGE, density, sorted(job.structure.counts))
    spec = job.model.spec.descriptor
    setup = _best(lambda: Environment(many, spec, job.device)) / len(many)
    features_time, network_time, reductions_time = (float(x) for x in points)
    driver, reading = _driver(many) / len(many), _reading(many) / len(many)
    return Rates(features_time, network_time, reductions_time, encoding, setup, driver, reading)


def _best(action: Callable[[], Any], times: int = 2) -> float:
    best = np.inf
    for _ in range(times):
        begin = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - begin)
    return float(best)


def _driver(many: Structure) -> float:
    """Checking atoms that lie in a file, since those of very large systems do."""
    everything = (many.positions, many.numbers, np.arange(len(many)))
    header = Header(len(many), many.cell, np.zeros(3), many.pbc)

    def check(source: StructureSource) -> None:
        source.check_overlaps(MIN_DISTANCE)
        fingerprint(len(source), source.pieces, source.cell, source.pbc)

    with StructureSource.from_chunks(header, iter([everything])) as source:
        return _best(lambda: check(source))


def _reading(many: Structure) -> float:
    from ase.data import chemical_symbols

    kinds, types = np.unique(many.numbers, return_inverse=True)
    with tempfile.TemporaryDirectory(prefix="gpurho-") as folder:
        path = Path(folder) / "atoms.dump"
        bounds = "".join(f"0 {length!r}\n" for length in np.diag(many.cell).tolist())
        with open(path, "w", encoding="ascii") as file:
            file.write(f"ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n{len(many)}\nITEM: BOX BOUNDS pp pp pp\n{bounds}")
            file.write("ITEM: ATOMS id type x y z\n")
            np.savetxt(file, np.column_stack([np.arange(len(many)), types + 1, many.positions]), "%d %d %.6f %.6f %.6f")
        return _best(lambda: StructureSource.from_dump(path, [chemical_symbols[z] for z in kinds], folder).close())
