"""What a prediction will cost, found before any work."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.errors import SettingsError
from gpurho.partition import Tile
from gpurho.pipelines.parts import Nearby
from gpurho.pipelines.settings import Job, settle
from gpurho.pipelines.tiling import QUEUE, Stages, cut_short, encoder_threads, max_tile_points
from gpurho.sources import StructureSource
from gpurho.structure import Structure

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import NDArray

    from gpurho.model import DensityModel
    from gpurho.pipelines.scale import ScalePlan

PROBE_POINTS = 20
"""Points along each axis of the box that is timed: 8000 in all."""

COMPRESSION = 0.75
"""Size of float32 fields after shuffle and gzip, measured on densities of bf16 noise."""

BASE_BYTES = 500 * 2**20
"""Memory of the process with its libraries loaded."""

ATOM_BYTES = 400
"""Memory of an atom at the peak, while the neighbours of all atoms are found."""

SOURCE_ATOM_BYTES = 70
"""Memory of an atom that lies in a file (`gpurho.sources`): what is compared with the training data."""

OUTPUT_BYTES = 32
"""Of a point: up to five outputs of the network, and its place in the tile and among the descriptors that are kept."""


@dataclass(frozen=True)
class Plan:
    """The cost of a prediction.

    Attributes
    ----------
    electrons : valence electrons of the atoms
    spacing : steps of the grid along each axis, angstrom
    grid_shape, tile_shape, n_points, n_tiles : points of the grid, in tiles
    memory_bytes : of the host
    field_bytes, file_bytes : of the output before and after compression
    points_per_second, feature_seconds, network_seconds, seconds : as timed here on these atoms, one device
    """

    n_atoms: int
    electrons: float
    model: str
    device: str
    precision: str
    uncertainty: str | None
    grid_shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    n_points: int
    tile_shape: tuple[int, int, int]
    n_tiles: int
    memory_bytes: int
    field_bytes: int
    file_bytes: int
    points_per_second: float
    feature_seconds: float
    network_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        nx, ny, nz = self.grid_shape
        steps = " x ".join(f"{s:.3f}" for s in self.spacing)
        return "\n".join(
            [
                f"atoms    {self.n_atoms:,} ({self.electrons:g} valence electrons), model {self.model}",
                f"grid     {nx} x {ny} x {nz} points, steps {steps} angstrom; {self.n_points:,} to predict",
                f"tiles    {self.n_tiles:,} of {' x '.join(map(str, self.tile_shape))}",
                f"device   {self.device}, {self.precision}, uncertainty {self.uncertainty or 'none'}",
                f"memory   {self.memory_bytes / 2**30:.2f} GiB streaming to disk;"
                f" {(self.memory_bytes + self.field_bytes) / 2**30:.2f} GiB with the field in memory",
                f"output   about {self.file_bytes / 2**20:,.1f} MiB ({self.field_bytes / 2**20:,.1f} uncompressed)",
                f"time     about {human_seconds(self.seconds)}, {self.points_per_second:,.0f} points/s"
                f" (descriptors {human_seconds(self.feature_seconds)}, network {human_seconds(self.network_seconds)})",
            ]
        )


def plan(
    atoms: Atoms | Structure | StructureSource | int, model: str | Path | DensityModel = "auto", **settings: Any
) -> Plan | ScalePlan:
    """What `gpurho.predict` with the same arguments will cost: points, tiles, memory, bytes and time.

    All checks of `predict` are made. The time comes from a short run of the real stages on a few thousand points in
    the middle of the grid.

    Parameters
    ----------
    atoms, model, **settings
        As for `predict`; ``out``, ``resume`` and ``progress`` are taken and change nothing. Of a system too large to
        hold, the number of atoms, with ``density=`` (atoms per angstrom^3) or ``cell=``: see
        `gpurho.pipelines.scale.scale_plan`.
    """
    if isinstance(atoms, int | float):
        from gpurho.pipelines.scale import scale_plan

        return scale_plan(atoms, model, **settings)
    for name in ("out", "resume", "progress"):
        settings.pop(name, None)
    if settings.get("client") is not None:
        raise SettingsError("a plan is measured on this machine; leave out client and give devices=n for n equal GPUs")
    return plan_job(settle(atoms, model, **settings))


def plan_job(job: Job) -> Plan:
    """The plan of a job that `settle` made."""
    n = job.tiles.n_points
    feature_rate, network_rate = _probe(job)
    feature_seconds, network_seconds = n / feature_rate, n / network_rate
    if job.device.startswith("cuda"):  # processes share the cores of a CPU, which one uses already
        feature_seconds, network_seconds = feature_seconds / job.devices, network_seconds / job.devices
    seconds = feature_seconds + network_seconds
    tile = max_tile_points(job)
    per_point = point_bytes(job, job.grid.steps)
    steps = np.linalg.norm(job.grid.steps, axis=1)
    field_bytes = job.layout().raw_bytes
    atom_bytes = ATOM_BYTES if isinstance(job.structure, Structure) else SOURCE_ATOM_BYTES
    return Plan(
        n_atoms=len(job.structure),
        electrons=job.electrons,
        model=job.model_name,
        device=job.device,
        precision=job.precision,
        uncertainty=job.uncertainty,
        grid_shape=job.grid.shape,
        spacing=(float(steps[0]), float(steps[1]), float(steps[2])),
        n_points=n,
        tile_shape=job.tiles.tile_shape,
        n_tiles=len(job.tiles),
        memory_bytes=int(BASE_BYTES + atom_bytes * len(job.structure) + tile * per_point),
        field_bytes=field_bytes,
        file_bytes=int(COMPRESSION * field_bytes),
        points_per_second=n / seconds,
        feature_seconds=feature_seconds,
        network_seconds=network_seconds,
        seconds=seconds,
    )


def point_bytes(job: Job, steps: NDArray[np.float64]) -> float:
    """Bytes of the host for a point of a tile, whose grid has these steps (3, 3), angstrom.

    The points in float64, descriptors, and the results that are in the queue twice (raw and compressed).
    """
    spec = job.model.spec.descriptor
    found = 2 * 24 + 8 * len(job.names) * (QUEUE + encoder_threads(job))
    if job.device.startswith("cuda"):
        return found
    if spec.family != "smooth" or job.executor != "fused" or job.uncertainty == "sampled":
        return found + 4 * spec.n_features
    from gpurho.integrals import sublattice

    # Block by block: outputs of the network, and descriptors of the points that stand for the tile's integral.
    weight = np.inf
    if job.uncertainty is not None:
        weight = sublattice(Tile(0, (0, 0, 0), job.tiles.tile_shape), steps)[1]
    return found + OUTPUT_BYTES + 4 * spec.n_features / weight


def _probe(job: Job) -> tuple[float, float]:
    """Points per second of the descriptors and of the network, timed on the job's own atoms, after a warm-up."""
    start, stop = [], []
    for a, b, t in zip(job.tiles.start, job.tiles.stop, job.tiles.tile_shape, strict=True):
        size = min(PROBE_POINTS, b - a, t)
        start.append((a + b - size) // 2)
        stop.append(start[-1] + size)
    box = Tile(0, (start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    stages = Stages(job if isinstance(job.structure, Structure) else Nearby(job).part(box))
    spent, rounds = (0.0, 0.0), 0
    while rounds < 3:
        begun = stages.evaluate(box, wait=True)
        if cut_short(begun.features):
            continue
        fetching = time.perf_counter()
        stages.fetch(begun.outputs)()
        spent = begun.feature_seconds, begun.network_seconds + time.perf_counter() - fetching
        rounds += 1
    return box.n_points / spent[0], box.n_points / spent[1]


def human_seconds(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172800 else f"{seconds / 86400:.3g} days"


__all__ = ["Plan", "human_seconds", "plan", "plan_job"]
