"""From atoms to the electron density with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.density import Density
from gpurho.densityfile import existing_difference, open_density
from gpurho.errors import FormatError, OutputExistsError, StoreError
from gpurho.fields import Correction
from gpurho.formats import kind_of
from gpurho.grid import Grid
from gpurho.keep import Keep
from gpurho.memorystore import MemorySink
from gpurho.pipelines.plan import Plan, plan
from gpurho.pipelines.settings import Job, settle
from gpurho.pipelines.tiling import FinalSink, Sink, Timing, run_tiles
from gpurho.pipelines.trust import job_trust
from gpurho.shards import refuse_unfinished, remove_shards, tidy
from gpurho.sources import StructureSource
from gpurho.store import FileSink
from gpurho.structure import Structure

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

MEMORY_SHARE = 0.8
"""Share of the free memory that a field in memory may take."""

__all__ = ["Plan", "plan", "predict", "run_job"]


def predict(
    atoms: Atoms | Structure | StructureSource,
    model: str | Path | DensityModel = "auto",
    *,
    devices: int | None = None,
    device: str | None = None,
    client: Any = None,
    spacing: float | None = None,
    grid: Grid | Sequence[int] | None = None,
    uncertainty: str | None = "analytic",
    samples: int = 30,
    seed: int = 0,
    conserve: str | None = None,
    region: Sequence[Sequence[int]] | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    precision: str = "auto",
    executor: str = "auto",
    progress: bool = True,
    tile_shape: Sequence[int] | None = None,
    keep: Keep | str | Sequence[str] | None = None,
) -> Density:
    """Predict the electron density of a structure, with error bars, tile by tile.

    Parameters
    ----------
    atoms : ase.Atoms, Structure or StructureSource
        The last (`gpurho.sources`) is of atoms that do not fit into memory: a part of them is there at a time. The
        fields have the same bits.
    model : str, path or DensityModel
        "auto" takes the shipped model that knows the species of the structure and the fewest others.
    devices : int, optional
        Workers on this machine: one process for each of so many GPUs (Dask-CUDA), or with ``device="cpu"`` so many
        processes that share the cores. The values are those of one device, bit for bit, on equal processors.
    client : dask.distributed.Client, optional
        A running cluster whose workers do the work, instead of `devices`. All need this version of gpurho, and have to
        see `out`.
    device : str, optional
        "cpu" or "cuda[:n]"; by default the GPU where there is one. A device that is not there is an error.
    spacing : float, angstrom, optional
        Largest step of the grid along each cell vector; 0.2 by default.
    grid : Grid or 3 ints, optional
        A grid, or the shape of one over the cell, instead of `spacing`.
    uncertainty : "analytic", "last-layer", "sampled" or None
        One pass that propagates variances; the posterior of the last layer alone, at nearly the cost of the mean;
        `samples` passes with weights drawn from `seed`; or the mean alone.
    conserve : "uniform", "uncertainty" or None
        Make the integral the number of valence electrons: by one factor (paper, equation 6), or by a shift in
        proportion to the variance. See `gpurho.fields.Correction`.
    region : ((i0, i1), (j0, j1), (k0, k1)), optional
        Predict only this box of grid points (stops exclusive); `region_of` finds it from fractional coordinates.
    out : path, optional
        HDF5 file that the tiles stream to, in bounded memory. A run that was interrupted, in whatever way, goes on
        where it stopped when it is called again, and gives the same file, byte for byte. A finished file of the same
        settings is opened and returned. With several workers the fields lie in ``<out>.shards`` beside it, which must
        be moved with it.
    resume : bool
        False starts again and replaces what is at `out`.
    precision : "auto", "bf16" or "fp32"
    executor : "auto", "script" or "fused"
        The network by TorchScript, or in one kernel: on CPUs `gpurho.hostnet`, which "auto" takes there, on GPUs one
        of Triton (`gpurho.fused`), which is not measured yet.
    progress : bool
        A progress bar, if standard error is a terminal.
    tile_shape : 3 ints
        Points of a tile; (64, 64, 64) by default. Bits of the result are those of the tile shape.
    keep : str or list of str, optional
        What to keep, where the full field has no room; found on the device, exactly as from the full field. "field"
        (the default); "coarse:4" or "coarse:4x4x2", means over blocks of points (`Density.coarse`; a grid from
        `spacing` is made fine enough to divide into them); "slice:z=0.5", a plane across cell vector x, y or z
        (`Density.slice`); "atoms", electrons and sigmas (`Density.per_atom`); "histogram" or "histogram:2.5,250", upper
        end and bins (`Density.histogram`); "electrons", nothing but the integral with its error bar, which each
        prediction keeps.

    Returns
    -------
    Density
        In memory, or lazy on the file; its ``trust`` compares the atoms with the training data (`gpurho.trust`).

    Raises
    ------
    UnknownSpeciesError, StructureError, GridError, SettingsError, DeviceError, ModelError
        Before any work, each naming the value and the remedy.
    OutputExistsError
        `out` exists and was made with other settings; the message names the setting.
    StoreError
        The field does not fit into memory, or the disk failed; the message says what is safe.
    """
    job = settle(
        atoms,
        model,
        devices=devices,
        device=device,
        client=client,
        spacing=spacing,
        grid=grid,
        uncertainty=uncertainty,
        samples=samples,
        seed=seed,
        conserve=conserve,
        region=region,
        precision=precision,
        executor=executor,
        tile_shape=tile_shape,
        keep=keep,
    )
    return run_job(job, out, resume=resume, progress=progress)


def _check_name(path: Path) -> None:
    """Refuse to write HDF5 under a name that says another format."""
    try:
        kind = kind_of(path)
    except FormatError:
        return
    if kind != "hdf5":
        raise FormatError(
            f"{path}: the output is HDF5, and that name says {kind}; give e.g. {path.with_name('rho.h5')}, and write"
            " others from it: rho.write(...) (--write)"
        )


def run_job(job: Job, out: str | Path | None = None, *, resume: bool = True, progress: bool = True) -> Density:
    """Do a job that `settle` made; see `predict`."""
    sink: FinalSink
    if out is None:
        _check_memory(job)
        if job.distributed:
            return _distributed(job, None, resume, progress)
        sink = MemorySink(job.layout())
    else:
        path = Path(out)
        if path.is_dir():
            raise StoreError(f"{path} is a folder; give the name of a file, e.g. {path / 'rho.h5'}")
        _check_name(path)
        if path.exists() and resume:
            difference = existing_difference(path, job.settings())
            if difference is None:
                density = open_density(path)
                tidy(path)
                return density
            name, wanted, found = difference
            raise OutputExistsError(
                f"{path} exists and was made with {name} {_short(found)}, not {_short(wanted)}; give another output, or"
                " resume=False (--no-resume) to replace it"
            )
        if job.distributed:
            return _distributed(job, path, resume, progress)
        if resume:
            refuse_unfinished(path)
        sink = FileSink(path, job.layout(), resume)
    try:
        timing = _run(job, sink, progress)
        correction = Correction.conserving(job.conserve, sink.totals, job.grid.dv, job.electrons)
        density = sink.finish(correction, job_trust(job, progress))
        if out is not None:
            remove_shards(Path(out))  # of an output that this one replaced
    finally:
        sink.close()
    density.info["timing"] = {**asdict(timing), "points_per_second": timing.points_per_second}
    return density


def _distributed(job: Job, path: Path | None, resume: bool, progress: bool) -> Density:
    from gpurho.pipelines.distributed import run_distributed

    return run_distributed(job, path, resume, progress)


def _run(job: Job, sink: Sink, progress: bool) -> Timing:
    from tqdm import tqdm

    before = sum(job.tiles[i].n_points for i in sink.done)
    with tqdm(
        total=job.tiles.n_points,
        initial=before,
        unit=" points",
        unit_scale=True,
        desc=f"density of {len(job.structure)} atoms",
        # None: quiet unless standard error is a terminal.
        disable=None if progress else True,
    ) as bar:
        return run_tiles(job, sink, lambda n: (bar.update(n), None)[1])


def _check_memory(job: Job) -> None:
    import psutil

    # Electron conservation makes a second copy of the fields when they are looked at.
    need = job.layout().raw_bytes * (2 if job.conserve else 1)
    free = psutil.virtual_memory().available
    if need > MEMORY_SHARE * free:
        raise StoreError(
            f"the field of {job.tiles.n_points:.3g} points needs {need / 2**30:.3g} GiB of memory and"
            f" {free / 2**30:.3g} GiB are free; pass out='rho.h5' (--out) to stream it to disk, or a larger spacing"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:28] + "..." + text[-28:]


def region_of(grid: Grid, low: Sequence[float], high: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """A box of grid points by fractional coordinates, for ``region=``.

    Parameters
    ----------
    grid : Grid
    low, high : 3 floats
        Along each cell vector, from `low` up to `high`, exclusive; what lies beyond the cell is cut off.

    Returns
    -------
    three pairs of int
        First point and the one after the last along each axis.
    """
    import math

    box = []
    for a, b, n in zip(low, high, grid.shape, strict=True):
        # The small slack keeps a fraction that names a point from losing it through rounding.
        box.append((max(0, math.ceil(a * n - 1e-9)), min(n, math.ceil(b * n - 1e-9))))
    return tuple(box)
