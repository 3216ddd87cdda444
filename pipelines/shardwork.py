"""What a worker does: one run of tiles into one shard, with the model that it holds from run to run."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.densityfile import Layout
from gpurho.errors import DAMAGED_ARCHIVE, DeviceError, SettingsError, StoreError
from gpurho.grid import Grid
from gpurho.keep import Keep
from gpurho.partition import TileSet
from gpurho.pipelines.settings import Job, versions
from gpurho.pipelines.tiling import Stages, Timing, run_tiles
from gpurho.shardsink import ShardSink
from gpurho.structure import Structure
from gpurho.virtual import open_shard, settings_digest

PATIENCE = 30.0
"""Seconds that a shared file system has to show what another node wrote."""

CHECK_SECONDS = 2.0
"""Seconds between two looks whether anybody still waits for this worker."""


@dataclass(frozen=True)
class Task:
    """A run of tiles, as it is sent to a worker: all but atoms and model, which lie in the folder of shards."""

    folder: Path
    name: str
    tiles: TileSet
    grid: Grid
    names: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    bins: tuple[int, int, int]
    session: str
    device: str
    precision: str
    executor: str
    uncertainty: str | None
    samples: int
    seed: int

    @property
    def atoms(self) -> Path:
        """The file with the atoms that the run's points see."""
        return self.folder / f"{self.name}.{self.session}.npz"

    @property
    def signal(self) -> Path:
        """The file that is there as long as somebody waits."""
        return self.folder / f"{self.session}.session"

    @property
    def model(self) -> Path:
        """The file of the model."""
        return self.folder / f"{self.settings['model'][:16]}.safetensors"


@dataclass
class _Held:
    """What a worker keeps between runs."""

    key: tuple[Any, ...] = ()
    model: Any = None
    stages: Stages | None = None
    loads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_HELD = _Held()


class _AbandonedError(Exception):
    """Nobody waits for the result any more."""


def work(task: Task) -> dict[str, Any]:
    """Predict a run of tiles into its shard, unless it is finished; returns the journal's facts, no values.

    Raises
    ------
    StoreError
        When the folder of shards cannot be seen from here, or the disk failed.
    SettingsError
        When this worker has other versions than the process that waits for it.
    """
    with _HELD.lock:  # a worker of several threads has one device all the same
        return _work(task)


def _work(task: Task) -> dict[str, Any]:
    _check_versions(task)
    shard = task.folder / f"{task.name}.h5"
    facts: dict[str, Any] = {"computed": 0, "replayed": 0, "timing": asdict(Timing()), "loads": _HELD.loads}
    if _is_whole(shard, task):
        return facts
    structure, owners = _atoms(task)
    model = _model(task)
    keep, box = Keep.of(task.settings.get("keep")), task.settings["region"]
    region = None if box is None else tuple((int(a), int(b)) for a, b in box)
    job = Job(
        structure=structure,
        model=model,
        model_name=task.model.stem,
        grid=task.grid,
        tiles=task.tiles,
        region=region,
        device=task.device,
        precision=task.precision,
        executor=task.executor,
        uncertainty=task.uncertainty,
        samples=task.samples,
        seed=task.seed,
        conserve=None,
        bins=task.bins,
        keep=keep,
        halo=model.spec.descriptor.reach,
    )
    layout = Layout(task.grid, task.tiles, structure, task.names, task.settings, {}, region, keep)
    sink = ShardSink(task.folder, task.name, layout, uuid.uuid4().hex[:12], owners)
    looked = time.monotonic()

    def tick(_: int) -> None:
        nonlocal looked
        if time.monotonic() - looked > CHECK_SECONDS:
            looked = time.monotonic()
            if not _wanted(task):
                raise _AbandonedError

    try:
        timing = run_tiles(job, sink, tick, _stages)
        sink.finish()
    except _AbandonedError:
        return facts | {"abandoned": True}
    finally:
        sink.close()
    return facts | {
        "computed": len(task.tiles) - sink.replayed,
        "replayed": sink.replayed,
        "timing": asdict(timing),
        "loads": _HELD.loads,
    }


def _check_versions(task: Task) -> None:
    from gpurho.pipelines.cluster import MUST_AGREE

    own = versions()
    for name in MUST_AGREE:
        if own[name] != task.versions[name]:
            raise SettingsError(
                f"a worker has {name} {own[name]}, not {task.versions[name]}; install the same version on all workers"
            )


def _is_whole(shard: Path, task: Task) -> bool:
    """Whether an earlier attempt finished the run, of which nobody heard."""
    try:
        open_shard(shard, settings_digest(task.settings)).close()
    except StoreError:
        return False
    return True


def _wanted(task: Task) -> bool:
    # A name of its own for each session: a network file system may show old contents for a while, and no new names.
    return task.signal.exists()


def _atoms(task: Task) -> tuple[Structure, NDArray[np.int64]]:
    deadline = time.monotonic() + PATIENCE
    while not task.atoms.exists():
        if time.monotonic() > deadline:
            import socket

            raise StoreError(
                f"{task.atoms} cannot be seen on {socket.gethostname()}; give an output (out=) on a file system that"
                " all workers share"
            )
        time.sleep(0.2)
    try:
        with np.load(task.atoms, allow_pickle=False) as file:
            return Structure(file["positions"], file["numbers"], file["cell"], file["pbc"]), file["owners"]
    except DAMAGED_ARCHIVE as error:
        raise StoreError(f"{task.atoms} is damaged ({error}); run the same command again") from None


def _model(task: Task) -> Any:
    """The model, loaded once for all runs that need it."""
    key = tuple(getattr(task, name) for name in ("device", "precision", "executor", "uncertainty", "samples", "seed"))
    key += (task.settings["model"],)
    if _HELD.key != key:
        from gpurho.model import DensityModel

        model = DensityModel.load(task.model)
        if model.fingerprint() != task.settings["model"]:
            raise StoreError(f"{task.model} is damaged; run the same command again")
        _HELD.key, _HELD.model, _HELD.stages = key, model, None
        _HELD.loads += 1
    return _HELD.model


def _stages(job: Job) -> Stages:
    try:
        _HELD.stages = Stages(job, _HELD.stages)
    except DeviceError:
        _HELD.key = ()
        raise
    return _HELD.stages
