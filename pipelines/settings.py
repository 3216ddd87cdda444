"""What a prediction is asked to do, with every default settled and every value checked before any work."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.densityfile import Layout, Region
from gpurho.errors import DeviceError, GridError, ModelError, SettingsError, StructureError, UnknownSpeciesError
from gpurho.fields import NAMES
from gpurho.grid import Grid
from gpurho.keep import Keep
from gpurho.partition import TileSet, make_tiles
from gpurho.sources import StructureSource
from gpurho.structure import Structure, as_structure

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

MIN_DISTANCE = 0.7
"""Atoms closer than this (angstrom) are an error in the input: just below the bond of the hydrogen molecule."""

DEFAULT_SPACING = 0.2
"""Mesh spacing in angstrom when none is asked for."""

MAX_TILE_POINTS = 1 << 24
EXECUTORS = ("auto", "script", "fused")
UNCERTAINTIES = ("analytic", "last-layer", "sampled", None)
CONSERVATIONS = ("uniform", "uncertainty", None)


@dataclass(frozen=True)
class Job:
    """A prediction with everything settled.

    `client` is that of a cluster or None. Where the structure has a part of the atoms of a larger one, `bins` is the
    shape of the whole's bins (`gpurho.descriptors.Environment`), `halo` how far around the tiles, in angstrom, it has
    all atoms, and `owners`, where sums of atoms are for the whole, what their numbers are there.
    """

    structure: Structure | StructureSource
    model: DensityModel
    model_name: str
    grid: Grid
    tiles: TileSet
    region: Region | None
    device: str
    precision: str
    uncertainty: str | None
    samples: int
    seed: int
    conserve: str | None
    devices: int = 1
    client: Any = None
    bins: tuple[int, int, int] | None = None
    keep: Keep = field(default_factory=Keep)
    halo: float | None = None
    executor: str = "script"
    owners: NDArray[np.int64] | None = None

    @property
    def distributed(self) -> bool:
        """Whether workers of a cluster do the job."""
        return self.client is not None or self.devices > 1

    @property
    def names(self) -> tuple[str, ...]:
        """Fields that the prediction makes."""
        return NAMES if self.uncertainty is not None else NAMES[:1]

    @property
    def electrons(self) -> float:
        """Valence electrons of the structure."""
        from ase.data import chemical_symbols

        valence = self.model.spec.valence
        return float(sum(valence[chemical_symbols[z]] * n for z, n in self.structure.counts.items()))

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers of the result, as JSON can hold it: equal settings, equal bits."""
        sampled = self.uncertainty == "sampled"
        return {
            "structure": self.structure.fingerprint(),
            "model": self.model.fingerprint(),
            "grid shape": list(self.grid.shape),
            "grid cell": self.grid.cell.tolist(),
            "grid origin": self.grid.origin.tolist(),
            "region": None if self.region is None else [list(pair) for pair in self.region],
            "tile shape": list(self.tiles.tile_shape),
            "uncertainty": self.uncertainty,
            "samples": self.samples if sampled else None,
            "seed": self.seed if sampled else None,
            "precision": self.precision,
            "device": self.device.split(":")[0],
            "conserve": self.conserve,
            **({} if self.keep.field_alone else {"keep": self.keep.to_items()}),
            **({} if self.executor == "script" else {"executor": self.executor}),
            "gpurho version": library_version(),
        }

    def layout(self) -> Layout:
        """What the output holds."""
        spec = self.model.spec
        provenance = {
            "electrons": self.electrons,
            "correlation_volume": spec.factors(self.uncertainty).correlation_volume,
            "model": {"name": self.model_name, "fingerprint": self.model.fingerprint(), "spec": spec.to_dict()},
            "versions": versions(),
        }
        return Layout(
            self.grid, self.tiles, self.structure, self.names, self.settings(), provenance, self.region, self.keep
        )


def settle(
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
    precision: str = "auto",
    executor: str = "auto",
    tile_shape: Sequence[int] | None = None,
    keep: Keep | str | Sequence[str] | None = None,
) -> Job:
    """Settle the arguments of `gpurho.predict`, cheapest checks first; see there."""
    _check_devices(devices, client, device)
    for name, value, known in (
        ("uncertainty", uncertainty, UNCERTAINTIES),
        ("conserve", conserve, CONSERVATIONS),
        ("executor", executor, EXECUTORS),
    ):
        if value not in known:
            raise SettingsError(f"{name} {value!r} is not known; give one of {', '.join(map(repr, known))}")
    _check_whole("samples", samples, 2, 100_000)
    _check_whole("seed", seed, 0, 2**63 - 1)
    if conserve is not None and region is not None:
        raise SettingsError(f"conserve {conserve!r} needs the whole grid: a region has no known charge; leave one out")
    if conserve == "uncertainty" and uncertainty is None:
        raise SettingsError("conserve 'uncertainty' needs sigmas; give uncertainty='analytic' or conserve='uniform'")
    parts = Keep.of(keep)
    if parts.histogram is not None and conserve == "uncertainty":
        raise SettingsError("a histogram cannot follow conserve 'uncertainty'; give conserve='uniform' or no histogram")
    structure = atoms if isinstance(atoms, StructureSource) else as_structure(atoms)
    found, name = find_model(structure, model)
    if uncertainty == "last-layer":
        found.last_layer()  # raises where there is none
    if client is None:
        where = resolve_device(device)
        settled = _resolve_precision(precision, where)
    else:
        from gpurho.pipelines.cluster import agreed_facts

        facts = agreed_facts(client, device, precision)
        where, settled = facts["device"], facts["precision"]
    mesh = _settle_grid(structure, spacing, grid, parts)
    if conserve is not None and not np.allclose(mesh.cell, structure.cell, rtol=0, atol=1e-6):
        raise SettingsError(f"conserve {conserve!r} needs a grid over the structure's cell; leave out grid or conserve")
    tiles = make_tiles(mesh, parts.tile_shape() if tile_shape is None else tile_shape, region)
    shape = tiles.tile_shape
    parts.check(mesh, tiles)
    if shape[0] * shape[1] * shape[2] > MAX_TILE_POINTS:
        raise GridError(f"tile shape {shape} has over {MAX_TILE_POINTS} points; give a smaller one, e.g. (64, 64, 64)")
    structure.check_overlaps(MIN_DISTANCE)
    part = None if region is None else tuple(zip(tiles.start, tiles.stop, strict=True))
    return Job(
        structure=structure,
        model=found,
        model_name=name,
        grid=mesh,
        tiles=tiles,
        region=part,
        device=where,
        precision=settled,
        uncertainty=uncertainty,
        samples=int(samples),
        seed=int(seed),
        conserve=conserve,
        devices=1 if devices is None else int(devices),
        client=client,
        keep=parts,
        executor=_resolve_executor(executor, found, where, settled, uncertainty, int(samples), int(seed)),
    )


def _resolve_executor(
    executor: str, model: DensityModel, device: str, precision: str, uncertainty: str | None, samples: int, seed: int
) -> str:
    """What "auto" means; a CPU's kernel is tried here, before anything is written."""
    from gpurho.evaluator import resolve_executor

    resolved = resolve_executor(executor, device.split(":")[0], model.spec.network.n_hidden)
    if resolved == "fused" and device == "cpu":
        try:
            model.evaluator(device, precision, uncertainty, samples, seed, executor=resolved)
        except DeviceError as problem:
            if executor != "auto":
                raise
            warnings.warn(f"TorchScript runs the network: {problem}", stacklevel=4)
            return "script"
    return resolved


def _check_devices(devices: int | None, client: Any, device: str | None) -> None:
    if devices is not None:
        _check_whole("devices", devices, 1, 100_000)
        if client is not None:
            raise SettingsError(f"devices={devices} and a client exclude each other: its cluster has its own workers")
    if client is not None:
        from gpurho.pipelines.cluster import check_client

        check_client(client)
    if device is not None and not isinstance(device, str):
        raise SettingsError(f"device {device!r} is a {type(device).__name__}; give 'cpu', 'cuda' or 'cuda:0'")
    if device is not None and ":" in device and (client is not None or (devices or 1) > 1):
        raise SettingsError(f"device {device!r} names one device of several workers; give {device.split(':')[0]!r}")


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise SettingsError(f"{name} {value!r} is not a whole number from {least} to {most}")


def resolve_device(device: str | None) -> str:
    """ "cpu" or a CUDA device as torch names it; without a wish, the GPU where there is one."""
    import torch

    from gpurho.evaluator import resolve_device as check

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(check(device))


def _resolve_precision(precision: str, device: str) -> str:
    import torch

    from gpurho.evaluator import resolve_precision

    return resolve_precision(precision, torch.device(device))


def _settle_grid(structure: Structure | StructureSource, spacing: float | None, grid: Any, keep: Keep) -> Grid:
    if grid is not None:
        if spacing is not None:
            raise SettingsError(f"spacing {spacing!r} and a grid exclude each other; give one of them")
        return grid if isinstance(grid, Grid) else Grid(grid, structure.cell, pbc=structure.pbc.tolist())
    if not structure.pbc.all():
        _check_inside(structure)
    pbc = structure.pbc.tolist()
    found = Grid.from_spacing(structure.cell, DEFAULT_SPACING if spacing is None else spacing, pbc=pbc)
    return Grid(keep.fitting(found.shape), structure.cell, pbc=pbc)


def _check_inside(structure: Structure | StructureSource) -> None:
    """Raise `StructureError` for an atom outside of the cell along a direction without period."""
    inverse, first = np.linalg.inv(structure.cell), 0
    for positions, _ in structure.pieces():
        outside = (np.abs(positions @ inverse - 0.5) > 0.5 + 1e-6) & ~structure.pbc
        if outside.any():
            atom, axis = (int(i) for i in np.argwhere(outside)[0])
            raise StructureError(
                f"atom {first + atom} lies outside of the cell along cell vector {axis}, which has no period, so its"
                " density would be lost; centre the atoms (atoms.center(vacuum=8)) or pass a grid that holds them"
            )
        first += len(positions)


def find_model(structure: Structure | StructureSource, model: Any) -> tuple[DensityModel, str]:
    """The model to use and its name; of the shipped ones that know all species, the one with the fewest."""
    from gpurho.model import DensityModel, list_models, load_model

    if isinstance(model, DensityModel):
        found, name = model, "given"
    elif model == "auto":
        infos = list_models()
        fitting = [info for info in infos if set(structure.symbols) <= set(info.spec.species)]
        if not fitting:
            known = [f"model {info.name!r} knows {', '.join(info.spec.species)}" for info in infos]
            raise UnknownSpeciesError(
                f"structure has {', '.join(structure.symbols)}; {'; '.join(known) or 'no model is shipped'};"
                " train a model for these species or pass model=path"
            )
        best = min(fitting, key=lambda info: (len(info.spec.species), info.name))
        found, name = DensityModel.load(best.path), best.name
    elif isinstance(model, str | Path):
        found, name = load_model(model), Path(model).stem
    else:
        raise ModelError(f"model {model!r} is a {type(model).__name__}; give 'auto', a name, a path or a DensityModel")
    unknown = [symbol for symbol in structure.symbols if symbol not in found.spec.species]
    if unknown:
        raise UnknownSpeciesError(
            f"structure has {', '.join(structure.symbols)}; model {name!r} knows {', '.join(found.spec.species)};"
            f" use a model trained with {', '.join(unknown)}"
        )
    return found, name


def library_version() -> str:
    """Version of gpurho."""
    try:
        return version("gpurho")
    except PackageNotFoundError:
        return "0+unknown"


def versions() -> dict[str, str]:
    """Versions of what takes part in the numbers."""
    found = {"python": platform.python_version(), "gpurho": library_version()}
    for name in ("numpy", "torch", "numba", "h5py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
