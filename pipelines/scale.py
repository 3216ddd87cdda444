"""What a prediction of so many atoms costs, from their number and density alone: for systems too large to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpurho.densityfile import Layout
from gpurho.errors import SettingsError
from gpurho.grid import Grid
from gpurho.keep import Keep
from gpurho.kept import COLUMNS
from gpurho.partition import make_tiles
from gpurho.pipelines.calibration import SAMPLE_EDGE, Rates, lattice, rates
from gpurho.pipelines.plan import ATOM_BYTES, BASE_BYTES, SOURCE_ATOM_BYTES, point_bytes
from gpurho.pipelines.settings import DEFAULT_SPACING, settle
from gpurho.pipelines.tiling import encoder_threads

if TYPE_CHECKING:
    from gpurho.model import DensityModel

MAX_ATOMS = 10**12
COMPRESSION = 0.75
"""Size of float32 fields after shuffle and gzip."""

TILE_BYTES = 1500
"""Memory of the beginning process for a tile: its sums and checksums."""

RUNS = 16
"""Runs of tiles that each worker gets, about; each has a halo of its own."""


@dataclass(frozen=True)
class ScalePlan:
    """The cost of a prediction by number of atoms. Seconds of stages are those of the clock, on all devices together.

    `seconds` is that of the beginning process, then the longest of the device's work (descriptors, network,
    reductions and setup), compression and the disk, which overlap. `reading_seconds` is beside it: for a text dump
    too large for memory. Bytes: `stored_bytes` after compression, `driver_bytes` of the beginning process, which holds
    all atoms, `worker_bytes` of each worker.
    """

    n_atoms: int
    electrons: float
    density: float
    model: str
    device: str
    devices: int
    precision: str
    uncertainty: str | None
    keep: tuple[str, ...]
    grid_shape: tuple[int, int, int]
    n_points: int
    n_tiles: int
    driver_seconds: float
    setup_seconds: float
    feature_seconds: float
    network_seconds: float
    reduction_seconds: float
    encoding_seconds: float
    disk_seconds: float
    reading_seconds: float
    seconds: float
    dominant: str
    device_hours: float
    price: float | None
    stored_bytes: int
    driver_bytes: int
    worker_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from gpurho.pipelines.plan import human_seconds

        nx, ny, nz = self.grid_shape
        stages = {
            "one process before": self.driver_seconds,
            "setup": self.setup_seconds,
            "descriptors": self.feature_seconds,
            "network": self.network_seconds,
            "reductions": self.reduction_seconds,
            "compression": self.encoding_seconds,
            "disk": self.disk_seconds,
        }
        lines = [
            f"atoms    {self.n_atoms:,}, {self.density:.4g} per angstrom^3 ({self.electrons:g} valence electrons),"
            f" model {self.model}",
            f"grid     {nx} x {ny} x {nz}: {self.n_points:,} points in {self.n_tiles:,} tiles",
            f"devices  {self.devices} x {self.device}, {self.precision}, uncertainty {self.uncertainty or 'none'}; keep"
            f" {', '.join(self.keep)}",
            f"memory   {self.driver_bytes / 2**30:.3g} GiB in the process that begins, {self.worker_bytes / 2**30:.3g}"
            " GiB in each worker",
            f"output   {self.stored_bytes / 2**30:.4g} GiB",
            f"time     {human_seconds(self.seconds)}: "
            + ", ".join(f"{name} {human_seconds(value)}" for name, value in stages.items()),
            f"         {self.dominant} takes longest; a text dump of the atoms takes"
            f" {human_seconds(self.reading_seconds)} to read",
        ]
        cost = "" if self.price is None else f", {self.price:,.2f} in the currency of the price"
        return "\n".join([*lines, f"cost     {self.device_hours:,.3g} device hours{cost}"])


def scale_plan(
    n_atoms: int,
    model: str | Path | DensityModel,
    *,
    density: float | None = None,
    cell: ArrayLike | None = None,
    composition: Mapping[str, float] | None = None,
    devices: int = 1,
    keep: Keep | str | Sequence[str] | None = None,
    disk_rate: float = 1e9,
    price: float | None = None,
    calibrated: Rates | None = None,
    refresh: bool = False,
    **settings: Any,
) -> ScalePlan:
    """What a prediction of `n_atoms` atoms will cost; answers in seconds, whatever their number.

    Parameters
    ----------
    n_atoms : int
    model : as for `gpurho.predict`, but for "auto"
    density : float, atoms per angstrom^3, optional
        Of the atoms, 0.0603 for aluminium; or give the `cell`, (3,) lengths or (3, 3) rows in angstrom.
    composition : mapping of symbol to share, optional
        All species of the model alike by default.
    devices : int
        Equal to the one of this machine.
    keep : as for `gpurho.predict`
    disk_rate : float
        Bytes per second that all workers together can write.
    price : float, optional
        Of a device for an hour.
    calibrated : Rates, optional
        Instead of those of this machine, which are measured the first time and remembered; `refresh` measures anew.
    **settings
        spacing, uncertainty, samples, precision, device, tile_shape as for `gpurho.predict`.

    Raises
    ------
    SettingsError
    """
    count = _whole(n_atoms)
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise SettingsError(f"devices {devices!r} is not a whole number from 1 up")
    if not disk_rate > 0:
        raise SettingsError(f"disk_rate {disk_rate!r} is not positive; give bytes per second")
    rows, crowd = _cell(count, density, cell)
    found, name = _model(model)
    shares = _shares(found, composition)
    parts = Keep.of(keep)
    spacing = settings.pop("spacing", None) or DEFAULT_SPACING
    sample = lattice(SAMPLE_EDGE, crowd, _numbers(shares))
    # Slices cost what they cost whatever the system; their planes may not lie in the sample's grid.
    job = settle(sample, found, spacing=spacing, keep=replace(parts, slices=()), **settings)
    cost = rates(job, refresh) if calibrated is None else calibrated

    plain = Grid.from_spacing(rows, spacing)
    grid = Grid(parts.fitting(plain.shape), rows)
    tiles = make_tiles(grid, job.tiles.tile_shape)
    layout = Layout(grid, tiles, sample, job.names, {}, {}, None, replace(parts, atoms=False))
    raw = layout.raw_bytes + (16 * len(COLUMNS) * count if parts.atoms else 0)
    n = grid.n_points
    edge = (grid.volume / (RUNS * devices)) ** (1 / 3)
    # Atoms of a run's halo are prepared by each run that sees them.
    seen = count * (1.0 + 2.0 * found.spec.descriptor.reach / edge) ** 3
    stages = {
        "driver": count * cost.driver,
        "setup": seen * cost.setup / devices,
        "feature": n * cost.features / devices,
        "network": n * cost.network / devices,
        "reduction": n * cost.reductions / devices,
        "encoding": raw * cost.encoding / (devices * encoder_threads(job)),
        "disk": COMPRESSION * raw / disk_rate,
    }
    device = sum(stages[key] for key in ("setup", "feature", "network", "reduction"))
    elapsed = stages["driver"] + max(device, stages["encoding"], stages["disk"])
    hours = devices * elapsed / 3600
    tile = np.prod(np.array(job.tiles.tile_shape, dtype=float))
    per_point = point_bytes(job, grid.steps)
    valence = sum(found.spec.valence[s] * share for s, share in shares.items()) / sum(shares.values())
    words = {
        "driver": "one process before",
        "feature": "descriptors",
        "reduction": "reductions",
        "encoding": "compression",
    }
    # Of what overlaps, the longer decides.
    behind = max(("encoding", "disk"), key=lambda key: stages[key])
    deciding = [behind] if stages[behind] > device else ["setup", "feature", "network", "reduction"]
    longest = max(["driver", *deciding], key=lambda key: stages[key])
    return ScalePlan(
        n_atoms=count,
        electrons=count * valence,
        density=crowd,
        model=name,
        device=job.device,
        devices=devices,
        precision=job.precision,
        uncertainty=job.uncertainty,
        keep=tuple(parts.to_items()),
        grid_shape=grid.shape,
        n_points=n,
        n_tiles=len(tiles),
        **{f"{key}_seconds": float(value) for key, value in stages.items()},
        reading_seconds=count * cost.reading,
        seconds=float(elapsed),
        dominant=words.get(longest, longest),
        device_hours=float(hours),
        price=None if price is None else float(hours * price),
        stored_bytes=int(COMPRESSION * raw),
        driver_bytes=BASE_BYTES + SOURCE_ATOM_BYTES * count + TILE_BYTES * len(tiles),
        worker_bytes=int(BASE_BYTES + ATOM_BYTES * seen / (RUNS * devices) + tile * per_point),
    )


def _whole(n_atoms: Any) -> int:
    if isinstance(n_atoms, bool) or not isinstance(n_atoms, int | float) or int(n_atoms) != n_atoms:
        raise SettingsError(f"n_atoms {n_atoms!r} is not a whole number")
    if not 1 <= n_atoms <= MAX_ATOMS:
        raise SettingsError(f"n_atoms {n_atoms!r} is out of range; give 1 to {MAX_ATOMS:.0e}")
    return int(n_atoms)


def _cell(count: int, density: float | None, cell: ArrayLike | None) -> tuple[np.ndarray, float]:
    if (density is None) == (cell is None):
        raise SettingsError(
            "a plan by number of atoms needs their density (atoms per angstrom^3) or the cell: give one"
        )
    if cell is not None:
        rows = np.asarray(cell, dtype=float)
        rows = np.diag(rows) if rows.shape == (3,) else rows
        if rows.shape != (3, 3) or not abs(np.linalg.det(rows)) > 0:
            raise SettingsError(f"cell {np.asarray(cell).tolist()} has no volume; give 3 lengths or 3 rows in angstrom")
        return rows, float(count / abs(np.linalg.det(rows)))
    assert density is not None
    if not 1e-6 < density < 1.0:
        raise SettingsError(f"density {density!r} is not one of matter; give atoms per angstrom^3, e.g. 0.06")
    return np.eye(3) * (count / density) ** (1 / 3), float(density)


def _model(model: Any) -> tuple[DensityModel, str]:
    from gpurho.model import DensityModel, load_model

    if isinstance(model, DensityModel):
        return model, "given"
    if model == "auto":
        raise SettingsError("model 'auto' goes by the atoms, which are not there; name the model")
    return load_model(model), Path(model).stem


def _shares(model: DensityModel, composition: Mapping[str, float] | None) -> dict[str, float]:
    shares = dict.fromkeys(model.spec.species, 1.0) if composition is None else dict(composition)
    unknown = [symbol for symbol in shares if symbol not in model.spec.species]
    if unknown or not shares or not all(share > 0 for share in shares.values()):
        raise SettingsError(
            f"composition {shares} is not one of shares above 0 of {', '.join(model.spec.species)}; give e.g."
            f" {dict.fromkeys(model.spec.species, 1)}"
        )
    return shares


def _numbers(shares: Mapping[str, float]) -> list[int]:
    """Atomic numbers in turn, about in proportion."""
    from ase.data import atomic_numbers

    least = min(shares.values())
    return [atomic_numbers[s] for s, share in shares.items() for _ in range(min(20, max(1, round(share / least))))]
