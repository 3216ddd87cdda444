"""Descriptors of aluminium: gpurho against k-d trees with vectorised cosines, as in the paper, and torch-cluster.

All methods get the same atoms and grid points in one run, one round after the other. Every method's features are
compared with those of the first: distances to 1e-5 angstrom, cosines to 1e-4, but for points where the order of the
atoms is not defined (ties). The smooth family is timed in the same rounds, against NumPy and SciPy, and its features
are compared to 1e-5 of a column's largest value. Ends with status 1 where gpurho disagrees elsewhere.

    python benchmarks/descriptors.py --cells 4 --json descriptors.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpurho.descriptors import DescriptorSpec
    from gpurho.grid import Grid
    from gpurho.structure import Structure

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]
Query: TypeAlias = Callable[[F64], tuple[NDArray[Any], I64]]

LATTICE_CONSTANT = 4.05
"""Of aluminium, angstrom."""
RATTLE = 0.1
"""Standard deviation of the displacements, angstrom: about room temperature."""
CHUNK = 20_000
"""Points that the methods with NumPy cosines take at a time."""
SMOOTH_CHUNK = 1_000
"""Points that the NumPy way to the smooth descriptors takes at a time: its arrays stay in the cache."""
DISTANCE_TOLERANCE, COSINE_TOLERANCE, TIE, SMOOTH_TOLERANCE = 1e-5, 1e-4, 1e-5, 1e-5


@dataclass
class Surroundings:
    """The atoms in and around a cubic cell.

    `images` (n_images, 3) are their positions, `owners` (n_images,) the atoms of the cell that they are images of, and
    `partners` (n_atoms, k, 3) the vectors from each atom of the cell to the `k` nearest others; angstrom.
    """

    images: F64
    owners: I64
    partners: F64


@dataclass
class Case(Surroundings):
    """What every method gets: all of it made before the clock starts."""

    structure: Structure
    spec: DescriptorSpec
    smooth: DescriptorSpec
    grid: Grid
    points: F64
    ties: NDArray[np.bool_]


@dataclass
class Method:
    """A way to the features: `run` takes a place for them, or None when only the time counts."""

    name: str
    run: Callable[[NDArray[np.float32] | None], None]


def surroundings(positions: F64, edge: float, cutoff: float, k: int) -> Surroundings:
    """Of atoms at `positions` (n, 3) within a cube, every image within `cutoff` of it and the `k` partners of each."""
    from scipy.spatial import cKDTree

    reach = int(np.ceil(cutoff / edge))
    shifts = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    images = (positions + shifts * edge).reshape(-1, 3)
    owners = np.tile(np.arange(len(positions)), len(shifts))
    near = ((images >= -cutoff) & (images <= edge + cutoff)).all(axis=1)
    images, owners = np.ascontiguousarray(images[near]), owners[near]
    index = cKDTree(images).query(positions, k=k + 1)[1]
    return Surroundings(images, owners, images[index[:, 1:]] - positions[:, None])


def make_case(cells: int, spacing_bohr: float, planes: int | None) -> Case:
    """Rattled fcc aluminium of `cells`^3 cubic cells, and all points of its grid or of its first `planes` planes."""
    from scipy.spatial import cKDTree

    from gpurho.descriptors import DescriptorSpec
    from gpurho.grid import Grid
    from gpurho.structure import Structure
    from gpurho.units import BOHR

    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    edge = cells * LATTICE_CONSTANT
    positions = (corners + basis).reshape(-1, 3) * LATTICE_CONSTANT
    positions = (positions + rng.normal(0, RATTLE, positions.shape)) % edge
    structure = Structure(positions, np.full(len(positions), 13), np.eye(3) * edge, np.ones(3, bool))
    spec = DescriptorSpec(species=("Al",))
    smooth = DescriptorSpec(species=("Al",), family="smooth", cutoff=5.0)
    grid = Grid.from_spacing(structure.cell, spacing_bohr * BOHR)
    planes = min(planes or grid.shape[0], grid.shape[0])
    points = grid.points((0, 0, 0), (planes, *grid.shape[1:]))

    around = surroundings(positions, edge, spec.cutoff, spec.n_angle_neighbors)
    tree = cKDTree(around.images)
    distances, index = tree.query(positions, k=spec.n_angle_neighbors + 2)
    # An atom has tied partners where two of its k + 1 nearest others are equally far, a point likewise.
    tied_atoms = (np.diff(distances[:, 1:]) < TIE).any(axis=1)
    ties = np.empty(len(points), bool)
    for begin in range(0, len(points), CHUNK):
        part = slice(begin, begin + CHUNK)
        distances, index = tree.query(points[part], k=spec.n_angle_atoms + 1, workers=-1)
        ties[part] = (np.diff(distances) < TIE).any(axis=1) | tied_atoms[around.owners[index[:, :-1]]].any(axis=1)
    return Case(**vars(around), structure=structure, spec=spec, smooth=smooth, grid=grid, points=points, ties=ties)


def cosines(case: Surroundings, points: F64, index: I64) -> F64:
    """Set II by vectorised NumPy: (n_points, n_angle_atoms * k) for the indices of the nearest images."""
    first = case.images[index] - points[:, None]
    second = first[:, :, None, :] + case.partners[case.owners[index]]
    lengths = np.sqrt((first * first).sum(-1))[:, :, None] * np.sqrt((second * second).sum(-1))
    return ((first[:, :, None, :] * second).sum(-1) / lengths).reshape(len(points), -1)


def from_query(name: str, case: Case, make_query: Callable[[], Query]) -> Method:
    """A method that looks up the nearest images and takes the cosines by NumPy; each run builds its tree."""

    def run(out: NDArray[np.float32] | None) -> None:
        query = make_query()
        n_distances, n_angle = case.spec.n_distances, case.spec.n_angle_atoms
        scratch = np.empty((CHUNK, case.spec.n_features), np.float32)
        for begin in range(0, len(case.points), CHUNK):
            points = case.points[begin : begin + CHUNK]
            rows = scratch[: len(points)] if out is None else out[begin : begin + CHUNK]
            distances, index = query(points)
            rows[:, :n_distances] = distances
            rows[:, n_distances:] = cosines(case, points, index[:, :n_angle])

    return Method(name, run)


def scipy_method(case: Case, threads: int) -> Method:
    from scipy.spatial import cKDTree

    def make_query() -> Query:
        tree = cKDTree(case.images)
        return lambda points: tree.query(points, k=case.spec.n_distances, workers=threads)

    return from_query(f"scipy cKDTree, {threads} workers, NumPy cosines", case, make_query)


def pykdtree_method(case: Case, dtype: type[np.floating[Any]]) -> Method:
    from pykdtree.kdtree import KDTree

    def make_query() -> Query:
        tree = KDTree(case.images.astype(dtype))
        return lambda points: tree.query(points.astype(dtype), k=case.spec.n_distances)

    return from_query(f"pykdtree {np.dtype(dtype).name}, NumPy cosines", case, make_query)


def torch_cluster_method(case: Case) -> Method:
    import torch
    from torch_cluster import knn

    def make_query() -> Query:
        images, k = torch.as_tensor(case.images), case.spec.n_distances

        def query(points: F64) -> tuple[NDArray[Any], I64]:
            index = knn(images, torch.as_tensor(points), k)[1].view(len(points), k).numpy()
            return np.linalg.norm(case.images[index] - points[:, None], axis=2), index

        return query

    return from_query("torch-cluster knn (CPU), NumPy cosines", case, make_query)


def numpy_smooth_method(case: Case, threads: int) -> Method:
    """The smooth descriptors by a k-d tree, Chebyshev polynomials, spherical harmonics and matrix products."""
    from scipy.spatial import cKDTree
    from scipy.special import sph_harm_y_all

    spec = case.smooth
    left, right = np.triu_indices(spec.n_basis)

    def features(points: F64, index: I64, distances: F64) -> F64:
        missing = index == len(case.images)
        r = np.where(missing, spec.cutoff, distances)
        vectors = case.images[np.where(missing, 0, index)] - points[:, None]
        envelope = 0.5 * (1 + np.cos(np.pi * r / spec.cutoff))
        radial = np.polynomial.chebyshev.chebvander(2 * r / spec.cutoff - 1, spec.n_radial - 1) * envelope[..., None]
        polar = np.arccos(np.clip(vectors[..., 2] / np.maximum(r, 1e-12), -1, 1))
        angular = sph_harm_y_all(spec.l_max, spec.l_max, polar, np.arctan2(vectors[..., 1], vectors[..., 0]))
        damped = r / np.sqrt(r * r + 1.0)
        products = np.empty((len(points), len(left), spec.l_max))
        for degree in range(1, spec.l_max + 1):
            # Orders from -degree to degree: index -m counts from the end.
            harmonics = (
                np.moveaxis(angular[degree, np.arange(-degree, degree + 1)], 0, -1) * (damped**degree)[..., None]
            )
            c = np.swapaxes(radial[..., : spec.n_basis], 1, 2) @ harmonics
            products[:, :, degree - 1] = (c[:, left] * c[:, right].conj()).real.sum(-1) * (4 * np.pi / (2 * degree + 1))
        return np.concatenate([radial.sum(axis=1), products.reshape(len(points), -1)], axis=1)

    def run(out: NDArray[np.float32] | None) -> None:
        tree = cKDTree(case.images)
        for begin in range(0, len(case.points), SMOOTH_CHUNK):
            points = case.points[begin : begin + SMOOTH_CHUNK]
            most = int(tree.query_ball_point(points, spec.cutoff, workers=threads, return_length=True).max())
            distances, index = tree.query(points, k=most, distance_upper_bound=spec.cutoff, workers=threads)
            rows = features(points, index, distances)
            if out is not None:
                out[begin : begin + SMOOTH_CHUNK] = rows

    return Method(f"smooth: scipy cKDTree, {threads} workers, NumPy", run)


def gpurho_method(case: Case, threads: int, spec: DescriptorSpec) -> Method:
    from gpurho.descriptors import Environment
    from gpurho.partition import make_tiles

    region = [
        (0, len(case.points) // (case.grid.shape[1] * case.grid.shape[2])),
        *((0, n) for n in case.grid.shape[1:]),
    ]
    tiles = make_tiles(case.grid, region=region)
    scratch = np.empty((max(tile.n_points for tile in tiles), spec.n_features), np.float32)

    def run(out: NDArray[np.float32] | None) -> None:
        environment = Environment(case.structure, spec)
        field = None if out is None else out.reshape(*(stop for _, stop in region), -1)
        for tile in tiles:
            values = environment.tile_features(case.grid, tile, scratch[: tile.n_points]).values
            if field is not None:
                field[tile.slices] = values.reshape(*tile.shape, -1)

    prefix = "" if spec is case.spec else "smooth: "
    return Method(f"{prefix}gpurho, {threads} threads", run)


def make_methods(case: Case, threads: int) -> list[Method]:
    """The reference first, gpurho last, and between them what is installed."""
    methods = [scipy_method(case, threads)]
    for make in (
        lambda: pykdtree_method(case, np.float64),
        lambda: pykdtree_method(case, np.float32),
        lambda: torch_cluster_method(case),
    ):
        try:
            methods.append(make())
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    return [*methods, gpurho_method(case, threads, case.spec)]


def agreement(values: NDArray[np.float32], reference: NDArray[np.float32], case: Case) -> dict[str, Any]:
    """Largest differences, and how many points differ beyond the tolerances with and without ties."""
    n = case.spec.n_distances
    distance = np.zeros(len(values))
    cosine = np.zeros(len(values))
    for begin in range(0, len(values), CHUNK):
        part = slice(begin, begin + CHUNK)
        difference = np.abs(values[part].astype(np.float64) - reference[part])
        distance[part], cosine[part] = difference[:, :n].max(axis=1), difference[:, n:].max(axis=1)
    # A NaN must count as a difference.
    wrong = ~(cosine <= COSINE_TOLERANCE)
    return {
        "largest_distance_difference": float(distance.max()),
        "points_with_other_distances": int((~(distance <= DISTANCE_TOLERANCE)).sum()),
        "points_with_other_cosines_at_ties": int((wrong & case.ties).sum()),
        "points_with_other_cosines_elsewhere": int((wrong & ~case.ties).sum()),
        "largest_cosine_difference_without_ties": float(cosine[~case.ties].max(initial=0.0)),
    }


def smooth_agreement(values: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, Any]:
    """Largest difference, as a share of the largest value of its column, and how many points differ beyond it."""
    scale = np.maximum(np.abs(reference).max(axis=0), 1.0)
    difference = np.zeros(len(values))
    for begin in range(0, len(values), CHUNK):
        part = slice(begin, begin + CHUNK)
        difference[part] = (np.abs(values[part].astype(np.float64) - reference[part]) / scale).max(axis=1)
    return {
        "largest_difference": float(difference.max()),
        "points_with_other_features": int((~(difference <= SMOOTH_TOLERANCE)).sum()),
    }


def measure(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Features of every method compared, then `repeats` timed rounds over all methods of both families."""
    methods = make_methods(case, threads)
    reference = np.empty((len(case.points), case.spec.n_features), np.float32)
    methods[0].run(reference)
    rows: list[dict[str, Any]] = [{"method": methods[0].name}]
    for method in methods[1:]:
        values = np.full_like(reference, np.nan)
        method.run(values)  # also the warm-up: compiles what is to be compiled
        rows.append({"method": method.name, **agreement(values, reference, case)})
        del values
    smooth = [numpy_smooth_method(case, threads), gpurho_method(case, threads, case.smooth)]
    reference = np.empty((len(case.points), case.smooth.n_features), np.float32)
    smooth[0].run(reference)
    values = np.full_like(reference, np.nan)
    smooth[1].run(values)
    smooth_rows = [{"method": smooth[0].name}, {"method": smooth[1].name, **smooth_agreement(values, reference)}]
    del values, reference
    every = [*zip(methods, rows, strict=True), *zip(smooth, smooth_rows, strict=True)]
    for _, row in every:
        row["seconds"], row["cpu_seconds"] = [], []
    for _ in range(repeats):
        for method, row in every:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            method.run(None)
            row["seconds"].append(time.perf_counter() - begin)
            row["cpu_seconds"].append(time.process_time() - begin_cpu)
    for family in (rows, smooth_rows):
        for row in family:
            row["points_per_second_median"] = len(case.points) / statistics.median(row["seconds"])
            row["points_per_second_best"] = len(case.points) / min(row["seconds"])
            row["speedup_median"] = statistics.median(family[0]["seconds"]) / statistics.median(row["seconds"])
            row["speedup_best"] = min(family[0]["seconds"]) / min(row["seconds"])
            # Of all threads together; unlike the others it hardly depends on what else the machine does.
            row["points_per_cpu_second"] = len(case.points) / statistics.median(row["cpu_seconds"])
            row["speedup_cpu"] = statistics.median(family[0]["cpu_seconds"]) / statistics.median(row["cpu_seconds"])
    return {
        "atoms": len(case.structure),
        "grid": list(case.grid.shape),
        "points": len(case.points),
        "points_with_ties": int(case.ties.sum()),
        "methods": rows,
        "smooth": smooth_rows,
    }


def machine(threads: int) -> dict[str, Any]:
    """Processor, threads, versions and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {"python": platform.python_version()}
    for package in ("gpurho", "numpy", "numba", "scipy", "pykdtree", "torch", "torch-cluster"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": threads,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def print_table(system: dict[str, Any]) -> None:
    grid = "x".join(map(str, system["grid"]))
    print(
        f"\nAl {system['atoms']} atoms, grid {grid}, {system['points']} points, {system['points_with_ties']} with ties"
    )
    header = f"{'method':46s} {'points/s':>10s} {'best':>10s} {'per CPU s':>10s}"
    print(f"{header} {'speedup':>8s} {'(best)':>7s} {'(CPU)':>7s}  {'max |dd|':>8s}  wrong cosines")
    for row in [*system["methods"], *system["smooth"]]:
        line = f"{row['method']:46s} {row['points_per_second_median']:10.0f} {row['points_per_second_best']:10.0f}"
        line += f" {row['points_per_cpu_second']:10.0f}"
        line += f" {row['speedup_median']:8.2f} {row['speedup_best']:7.2f} {row['speedup_cpu']:7.2f}"
        if "largest_distance_difference" in row:
            line += f"  {row['largest_distance_difference']:8.1e}  {row['points_with_other_cosines_elsewhere']}"
            line += f" (+ {row['points_with_other_cosines_at_ties']} at ties)"
        if "largest_difference" in row:
            line += f"  {row['largest_difference']:8.1e}"
        print(line)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="descriptors of aluminium by several methods")
    parser.add_argument("--cells", type=int, nargs="+", default=[4], help="cubic cells along each edge (4: 256 atoms)")
    parser.add_argument("--spacing-bohr", type=float, default=0.4, help="mesh spacing in Bohr")
    parser.add_argument("--planes", type=int, help="first planes of the grid only, to be quick")
    parser.add_argument("--threads", type=int, default=2, help="threads of every method that has them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(arguments)
    # pykdtree and torch read this when they are first imported, Numba likewise.
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(options.threads)

    import numba

    numba.set_num_threads(min(options.threads, numba.get_num_threads()))
    report: dict[str, Any] = {"benchmark": "descriptors", "machine": machine(options.threads), "systems": []}
    for cells in options.cells:
        system = measure(make_case(cells, options.spacing_bohr, options.planes), options.threads, options.repeats)
        print_table(system)
        report["systems"].append(system)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    ours = [system["methods"][-1] for system in report["systems"]]
    wrong = sum(row["points_with_other_distances"] + row["points_with_other_cosines_elsewhere"] for row in ours)
    wrong += sum(system["smooth"][-1]["points_with_other_features"] for system in report["systems"])
    if wrong:
        print(f"gpurho disagrees at {wrong} points without ties", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
