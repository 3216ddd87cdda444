"""Grids, tiles, regions and settings of a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from predict_tools import aluminium

from fuzz.cases import WrongError, finite
from fuzz.structures import model, odd_cell

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 64, -1, 2**31, 2**31 - 1, 2**63, -(2**63), 10**18, 1.0, 2.5, 0.3, -0.2, 1e-9, 1e-300, 1e300),
    *(np.nan, np.inf, -np.inf, None, True, False, "3", "x", "", b"4", [], (2,), np.int8(5), np.float32(4), 3j, {}),
)


def odd(rng: np.random.Generator) -> Any:
    """Something where a number is due."""
    return NUMBERS[int(rng.integers(len(NUMBERS)))]


def triple(rng: np.random.Generator) -> Any:
    """Three whole numbers, or not quite."""
    if rng.random() < 0.5:
        return tuple(int(n) for n in rng.integers(1, 9, 3))
    return [odd(rng) for _ in range(int(rng.choice([0, 1, 2, 3, 3, 3, 3, 4])))] if rng.random() < 0.9 else odd(rng)


def region(rng: np.random.Generator) -> Any:
    """Three pairs, or not quite."""
    if rng.random() < 0.4:
        low = rng.integers(0, 4, 3)
        return [(int(a), int(a + b)) for a, b in zip(low, rng.integers(0, 5, 3), strict=True)]
    return (
        [(odd(rng), odd(rng)) for _ in range(int(rng.choice([0, 2, 3, 3, 3, 4])))] if rng.random() < 0.9 else odd(rng)
    )


def grid_case(rng: np.random.Generator, folder: Path) -> str:
    """A grid, its points, its tiles."""
    from gpurho.grid import Grid
    from gpurho.partition import make_tiles

    cell: Any = odd_cell(rng)
    if rng.random() < 0.1:
        cell = odd(rng)
    if rng.random() < 0.4:
        grid = Grid.from_spacing(cell, odd(rng) if rng.random() < 0.6 else float(rng.uniform(0.3, 3)))
    else:
        origin: Any = (0.0, 0.0, 0.0) if rng.random() < 0.7 else triple(rng)
        pbc: Any = (True, True, True) if rng.random() < 0.8 else triple(rng)
        grid = Grid(triple(rng), cell, origin, pbc)
    finite([grid.dv, grid.volume], "volume")
    if not grid.dv > 0 or min(grid.shape) < 1:
        raise WrongError(f"grid {grid.shape} with dv {grid.dv}")
    tiles = make_tiles(grid, triple(rng), None if rng.random() < 0.5 else region(rng))
    if tiles.n_points < 1 or not len(tiles):
        raise WrongError("no tiles")
    for index in {0, len(tiles) - 1, len(tiles) // 2}:
        tile = tiles[index]
        if not all(0 <= a < b <= n for a, b, n in zip(tile.start, tile.stop, grid.shape, strict=True)):
            raise WrongError(f"tile {tile} of {grid.shape}")
    if len(tiles) < 1000 and sum(tile.n_points for tile in tiles) != tiles.n_points:
        raise WrongError("tiles do not cover their box")
    if grid.n_points < 10_000:
        finite(grid.points(), "points")
    return "accepted"


KEEPS: tuple[Any, ...] = (
    *(None, "field", "atoms", "electrons", "coarse:2", "coarse:0", "coarse:-1", "coarse:1e9", "coarse:4x4", "coarse:"),
    *("slice:z=0.5", "slice:z=nan", "slice:q=1", "slice:z=inf", "slice:z=1e300", "histogram", "histogram:0,1"),
    *("histogram:1,1e9", "histogram:nan,3", "histogram:2,0", ":", "", "\x00", 7, [], ["atoms", "coarse:2"], [None]),
)


def settle_case(rng: np.random.Generator, folder: Path) -> str:
    """Settling a prediction with settings of all kinds; what is settled is planned."""
    from gpurho.pipelines.settings import settle

    choices: dict[str, Any] = {
        "spacing": odd(rng),
        "grid": triple(rng),
        "uncertainty": [None, "analytic", "sampled", "last-layer", "x", 3, np.nan, []][int(rng.integers(8))],
        "samples": odd(rng),
        "seed": odd(rng),
        "conserve": [None, "uniform", "uncertainty", "x", 1, {}][int(rng.integers(6))],
        "region": region(rng),
        "precision": ["auto", "fp32", "bf16", "fp8", None, 3][int(rng.integers(6))],
        "tile_shape": triple(rng),
        "keep": KEEPS[int(rng.integers(len(KEEPS)))],
        "device": ["cpu", "cuda", "cuda:7", "tpu", "", 3, "cpu:1"][int(rng.integers(7))],
        "devices": odd(rng),
        "client": [None, "x", 3, object()][int(rng.integers(4))],
    }
    names = rng.permutation(list(choices))[: int(rng.integers(1, 4))]
    given = {str(name): choices[str(name)] for name in names}
    if not {"spacing", "grid"} & set(given):
        given["grid"] = (4, 4, 4)
    used: Any = (
        model()
        if rng.random() < 0.9
        else [None, "nonsense", "../../etc/passwd", 3, b"al", "\x00"][int(rng.integers(6))]
    )
    job = settle(aluminium(), used, **{"device": "cpu", **given})
    if job.tiles.n_points < 1:
        raise WrongError("nothing to do")
    finite([job.electrons, job.layout().raw_bytes], "sizes")
    return "accepted"


KINDS = {"grid": grid_case, "settings": settle_case}
