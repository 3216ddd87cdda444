"""Very large systems: counts beyond 32 bits, atoms that are never all in memory, plans for a billion atoms."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from predict_tools import TRICLINIC, aluminium, small_model

from gpurho.densityfile import Layout
from gpurho.descriptors import Environment
from gpurho.errors import FormatError, SettingsError, StoreError, StructureError
from gpurho.fields import Totals
from gpurho.grid import Grid
from gpurho.integrals import sublattice
from gpurho.keep import Keep
from gpurho.kernels.celllist import atoms_around, bin_atoms
from gpurho.partition import make_tiles
from gpurho.pipelines.calibration import Rates
from gpurho.pipelines.scale import scale_plan
from gpurho.pipelines.structures import read_structure
from gpurho.sources import Header, StructureSource
from gpurho.structure import Structure

# -- counts beyond 32 bits --------------------------------------------------------------------------------------

HUGE = Grid((20_000, 15_001, 14_000), np.diag([4000.0, 3000.2, 2800.0]))


def test_tiles_of_a_huge_grid_count_in_64_bits():
    assert HUGE.n_points == 20_000 * 15_001 * 14_000 > 2**41
    tiles = make_tiles(HUGE)
    assert len(tiles) == 313 * 235 * 219 > 2**23
    assert tiles.n_points == HUGE.n_points
    last = tiles[len(tiles) - 1]
    assert last.stop == HUGE.shape
    assert last.start == (312 * 64, 234 * 64, 218 * 64)
    flat = (last.start[0] * HUGE.shape[1] + last.start[1]) * HUGE.shape[2] + last.start[2]
    assert flat > 2**41
    edges = [tiles[i] for i in (0, 219, 219 * 235, len(tiles) // 2, len(tiles) - 2)]
    for tile in edges:
        i, j, k = (start // 64 for start in tile.start)
        assert (i * 235 + j) * 219 + k == tile.index
    thin = make_tiles(Grid((2**31 - 1, 2, 2), np.diag([1e5, 1.0, 1.0])), (1, 1, 1))
    assert len(thin) == 4 * (2**31 - 1)
    assert thin[2**33 - 5].stop == (2**31 - 1, 2, 2)


def test_points_of_a_far_tile_are_where_they_should_be():
    tiles = make_tiles(HUGE)
    last = tiles[len(tiles) - 1]
    points = HUGE.points(last.start, last.stop)
    assert points.shape == (last.n_points, 3)
    want = np.array(last.stop, float) - 1
    np.testing.assert_allclose(points[-1], want * [4000.0 / 20_000, 3000.2 / 15_001, 2800.0 / 14_000], rtol=1e-15)
    box, weight = sublattice(last, HUGE.steps)
    chosen = [len(range(n)[axis]) for axis, n in zip(box, last.shape, strict=True)]
    assert weight * math.prod(chosen) == pytest.approx(last.n_points)


def test_sums_and_sizes_of_a_huge_grid():
    parts = [Totals(n_points=3 * 10**9, sum_mean=5.0e8, n_capped=2**31, n_negative=7) for _ in range(2000)]
    merged = Totals.merged(parts)
    assert merged.n_points == 6 * 10**12
    assert merged.n_capped == 2000 * 2**31
    assert merged.sum_mean == 1.0e12
    structure = Structure.from_ase(aluminium())
    grid = Grid((20_000, 15_004, 14_000), HUGE.cell)

    def size(words: list[str]) -> int:
        tiles = make_tiles(grid)
        names = ("mean", "aleatoric", "epistemic")
        return Layout(grid, tiles, structure, names, {}, {}, None, Keep.of(words)).raw_bytes

    assert size(["field"]) == 12 * grid.n_points > 2**45
    assert size(["coarse:4"]) * 64 == size(["field"])
    assert size(["slice:y=0.5"]) == 12 * 20_000 * 14_000
    assert size(["electrons"]) == 0


def test_kernels_count_with_64_bits_at_the_edges():
    """Descriptors in the last tile of a grid of 4e12 points, against those of the same points near the origin."""
    model = small_model()
    corner = np.array([3990.0, 2990.0, 2790.0])
    rng = np.random.default_rng(0)
    near = rng.uniform(0, 9, (60, 3))
    far = Structure(corner + near, np.full(60, 13), HUGE.cell, np.zeros(3, bool))
    tiles = make_tiles(HUGE, (8, 8, 8))
    tile = tiles[len(tiles) - 1]
    got = Environment(far, model.spec.descriptor).tile_features(HUGE, tile).values
    here = Structure(near, np.full(60, 13), np.eye(3) * 30, np.zeros(3, bool))
    points = HUGE.points(tile.start, tile.stop) - corner
    want = Environment(here, model.spec.descriptor).point_features(points).values
    np.testing.assert_allclose(got, want, atol=2e-4)


# -- atoms from files -------------------------------------------------------------------------------------------


def write_dump(path: Path, structure: Structure, kind: str = "x", origin: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
    """A LAMMPS dump, its atoms in a random order, of a structure whose cell is lower triangular."""
    cell = structure.cell
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    low = np.array(origin) + np.array([min(0, xy, xz, xy + xz), min(0, yz), 0])
    high = np.array(origin) + np.diag(cell) + np.array([max(0, xy, xz, xy + xz), max(0, yz), 0])
    periods = " ".join("pp" if p else "ff" for p in structure.pbc)
    columns = {"x": "id type x y z", "xs": "id element xs ys zs q", "xu": "type id xu yu zu"}[kind]
    head = f"ITEM: TIMESTEP\n7\nITEM: NUMBER OF ATOMS\n{len(structure)}\nITEM: BOX BOUNDS xy xz yz {periods}\n"
    for a, b, tilt in zip(low, high, (xy, xz, yz), strict=True):
        head += f"{a!r} {b!r} {tilt!r}\n".replace("np.float64(", "").replace(")", "")
    lines = []
    types = {13: 1, 14: 2, 32: 3}
    names = {13: "Al", 14: "Si", 32: "Ge"}
    scaled = structure.positions @ np.linalg.inv(cell)
    for i in np.random.default_rng(1).permutation(len(structure)):
        z = int(structure.numbers[i])
        if kind == "xs":
            lines.append(f"{i + 1} {names[z]} {scaled[i, 0]:.17g} {scaled[i, 1]:.17g} {scaled[i, 2]:.17g} 0.5")
        else:
            p = structure.positions[i] + origin
            first = f"{i + 1} {types[z]}" if kind == "x" else f"{types[z]} {i + 1}"
            lines.append(f"{first} {p[0]:.17g} {p[1]:.17g} {p[2]:.17g}")
    path.write_text(head + f"ITEM: ATOMS {columns}\n" + "\n".join(lines) + "\n")


def scattered(pbc: tuple[bool, bool, bool] = (True, True, True), n: int = 3000) -> Structure:
    """Atoms of three species at random in a triclinic cell of some bins, some of them outside of it."""
    cell = np.array([[141.0, 0, 0], [6.0, 38.0, 0], [-4.0, 9.0, 52.0]])
    rng = np.random.default_rng(5)
    positions = rng.uniform(-0.05, 1.05, (n, 3)) @ cell
    return Structure(positions, rng.choice([13, 14, 32], n), cell, np.array(pbc))


@pytest.mark.parametrize("kind", ["x", "xs", "xu"])
@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, False)])
def test_a_dump_gives_the_atoms_of_every_tile(tmp_path, kind, pbc):
    structure = scattered(pbc)
    origin = (0.0, 0.0, 0.0) if kind == "xs" else (-3.0, 7.0, 100.0)
    write_dump(tmp_path / "a.dump", structure, kind, origin)
    if all(pbc) and kind != "xs":  # where no direction has an end, the box has no place
        structure = Structure(structure.positions + origin, structure.numbers, structure.cell, structure.pbc)
    spec = small_model(("Al", "Si", "Ge")).spec.descriptor
    grid = Grid((40, 36, 50), structure.cell, pbc=list(pbc))
    with StructureSource.from_dump(tmp_path / "a.dump", ["Al", "Si", "Ge"], tmp_path) as source:
        assert len(source) == 3000
        assert source.counts == {z: int((structure.numbers == z).sum()) for z in (13, 14, 32)}
        assert source.pbc.tolist() == list(pbc)
        np.testing.assert_allclose(source.cell, structure.cell, atol=1e-12)
        found = source.structure()
        np.testing.assert_allclose(found.positions, structure.positions, atol=1e-10)
        np.testing.assert_array_equal(found.numbers, structure.numbers)
        whole = Environment(structure, spec)
        some = 0
        for tile in make_tiles(grid, (10, 12, 10)):
            if tile.index % 11:
                continue
            part, index = source.near(grid, tile, spec.reach)
            assert (np.diff(index) > 0).all()
            np.testing.assert_allclose(part.positions, structure.positions[index], atol=1e-10)
            np.testing.assert_array_equal(part.numbers, structure.numbers[index])
            some += len(index) < 3000
            got = Environment(part, spec).tile_features(grid, tile).values
            np.testing.assert_allclose(got, whole.tile_features(grid, tile).values, atol=2e-5)
        assert some, "no tile was served by a part of the atoms, so nothing was tested"


def source_of(structure: Structure, folder: Path | None = None) -> StructureSource:
    """The atoms in pieces whose order is not theirs."""
    order = np.random.default_rng(2).permutation(len(structure))
    header = Header(len(structure), structure.cell, np.zeros(3), structure.pbc)
    chunks = ((structure.positions[part], structure.numbers[part], part) for part in np.array_split(order, 7))
    return StructureSource.from_chunks(header, chunks, folder)


def test_hdf5_atoms(tmp_path):
    structure = scattered()
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        group = h5.create_group("structure")
        group["positions"], group["numbers"] = structure.positions, structure.numbers
        group.attrs["cell"], group.attrs["pbc"] = structure.cell, structure.pbc
    grid = Grid((40, 36, 50), structure.cell)
    with StructureSource.from_hdf5(tmp_path / "a.h5") as source:
        part, index = source.near(grid, make_tiles(grid, (10, 12, 10))[40], 6.0)
        np.testing.assert_array_equal(part.positions, structure.positions[index])
        whole, every = source.near(grid, make_tiles(grid)[0], 60.0)
        assert len(every) == len(whole) == 3000
    with pytest.raises(StoreError, match="closed"):
        source.near(grid, make_tiles(grid)[0], 6.0)
    with pytest.raises(FormatError, match="no atoms in group 'other'"):
        StructureSource.from_hdf5(tmp_path / "a.h5", "other")


@pytest.mark.parametrize("kind", ["x", "xs", "xu"])
@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("step", [1, 3])
def test_a_dump_in_pieces_is_what_ase_reads(tmp_path, kind, pbc, step):
    """Also of a part of the atoms, whose ids have gaps."""
    path = tmp_path / "a.dump"
    write_dump(path, scattered(pbc, 500), kind, (-3.0, 7.0, 100.0) if kind != "xs" else (0.0, 0.0, 0.0))
    head, lines = path.read_text().split("ITEM: ATOMS")
    columns, *rows = lines.strip().split("\n")
    where = columns.split().index("id")
    rows = [row for row in rows if int(row.split()[where]) % step == 0]
    path.write_text(
        "\n".join([f"{head.replace(chr(10) + '500', f'{chr(10)}{len(rows)}')}ITEM: ATOMS {columns}", *rows, ""])
    )
    wanted = Structure.from_ase(read_structure(path, ["Al", "Si", "Ge"]))
    with StructureSource.from_dump(path, ["Al", "Si", "Ge"]) as source:
        found = source.structure()
        assert len(source) == len(found) == 500 // step
        np.testing.assert_array_equal(found.numbers, wanted.numbers)
        np.testing.assert_array_equal(found.pbc, wanted.pbc)
        np.testing.assert_allclose(found.cell, wanted.cell, atol=1e-12)
        np.testing.assert_allclose(found.positions, wanted.positions, atol=1e-12)
        assert source.fingerprint() == found.fingerprint()
        assert source.symbols == found.symbols == ("Al", "Ge", "Si")
        assert source.volume == pytest.approx(found.volume)
    path.write_text(path.read_text().replace(rows[7], rows[8]))
    with pytest.raises(FormatError, match="two atoms with"):
        StructureSource.from_dump(path, ["Al", "Si", "Ge"])


@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, False)])
def test_parts_hold_each_atom_once_and_all_around(monkeypatch, pbc):
    monkeypatch.setattr("gpurho.sources.BLOCK_ATOMS", 400)
    structure, reach = scattered(pbc, 2000), 5.0
    with source_of(structure) as source:
        times = np.zeros(2000, int)
        bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        count = 0
        for part in source.parts(reach):
            count += 1
            times[part.index[part.inside]] += 1
            np.testing.assert_array_equal(part.structure.positions, structure.positions[part.index])
            points = (bins.fractional @ bins.cell)[np.isin(bins.owners, part.index[part.inside])]
            for point in points[::40]:
                positions, owners = atoms_around(bins, point[None], reach)
                near = owners[np.linalg.norm(positions - point, axis=1) <= reach]
                assert set(near) <= set(part.index)
        assert count > 3
        assert (times == 1).all()


def test_empty_space_still_gives_a_structure():
    cell = np.diag([100.0, 20, 20])
    header = Header(1, cell, np.zeros(3), np.zeros(3, bool))
    source = StructureSource.from_chunks(header, iter([(np.array([[1.0, 1, 1]]), np.array([13]), np.zeros(1, int))]))
    grid = Grid((100, 20, 20), cell)
    part, index = source.near(grid, make_tiles(grid, (10, 20, 20))[9], 5.0)
    assert len(part) == 1
    assert index.tolist() == [0]
    assert part.numbers.tolist() == [13]
    source.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("ITEM: NUMBER", "NUMBER"), "no LAMMPS text dump"),
        (lambda t: t.replace("\n50\n", "\n60\n"), "ends after atom 50 of 60"),
        (lambda t: "\n".join(t.split("\n")[:-20]), "ends after atom 31 of 50"),
        (lambda t: t.replace("id type", "id kind"), "element or type are needed"),
        (lambda t: t.replace("\n50 ", "\nx50 3 nonsense "), "damaged after atom 0|elements"),
        (lambda t: t.replace("ITEM: BOX BOUNDS", "ITEM: BOX SIZES"), "no LAMMPS|no box|damaged"),
    ],
)
def test_damaged_dumps(tmp_path, change, message):
    path = tmp_path / "a.dump"
    write_dump(path, scattered(n=50))
    path.write_text(change(path.read_text()))
    with pytest.raises(FormatError, match=message) as error:
        StructureSource.from_dump(path, ["Al", "Si", "Ge"], tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.dump"]


def test_wrong_atoms_are_refused(tmp_path):
    path = tmp_path / "a.dump"
    write_dump(path, scattered(n=50))
    with pytest.raises(FormatError, match=r"atoms of type 3, and elements"):
        StructureSource.from_dump(path, ["Al", "Si"])
    with pytest.raises(FormatError, match="no chemical symbol"):
        StructureSource.from_dump(path, ["Al", "Si", "Xx"])
    header = Header(1, TRICLINIC, np.zeros(3), np.ones(3, bool))
    with pytest.raises(StructureError, match="atom 0 has position"):
        StructureSource.from_chunks(header, iter([(np.array([[1.0, np.nan, 1]]), np.array([13]), np.zeros(1, int))]))
    with pytest.raises(FormatError, match=r"cannot be read: No such file"):
        StructureSource.from_dump(tmp_path / "none.dump", ["Al"])


MILLION = """
import resource, sys
import numpy as np
from pathlib import Path
from gpurho.grid import Grid
from gpurho.partition import make_tiles
from gpurho.pipelines.calibration import Rates
from gpurho.pipelines.scale import scale_plan
from gpurho.pipelines.structures import read_structure
from gpurho.sources import StructureSource

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

path, n = Path(sys.argv[1]), 100
side = 2.55 * n
with open(path, "w") as file:
    file.write(f"ITEM: TIMESTEP\\n0\\nITEM: NUMBER OF ATOMS\\n{n ** 3}\\nITEM: BOX BOUNDS pp pp pp\\n")
    file.write(f"0 {side}\\n" * 3 + "ITEM: ATOMS id type x y z\\n")
    # The order of a domain decomposition is not that of places: layers of one axis after another.
    for i in range(n):
        rows = [f"{(i * n + j) * n + k + 1} 1 {2.55 * k + 1:.5f} {2.55 * j + 1:.5f} {2.55 * i + 1:.5f}\\n"
                for j in range(n) for k in range(n)]
        file.write("".join(rows))
np.loadtxt(["1 2"], usecols=[0])  # code and buffers that any use needs
before = peak()
source = StructureSource.from_dump(path, ["Al"], path.parent)
read = peak() - before
grid = Grid((1275, 1275, 1275), source.cell)
tiles = make_tiles(grid)
sizes = [len(source.near(grid, tiles[i], 8.0)[1]) for i in range(0, len(tiles), 97)]
print(len(source), before, read, peak() - before, max(sizes), min(sizes))
"""


def test_a_million_atoms_pass_in_bounded_memory(tmp_path):
    code = textwrap.dedent(MILLION)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.dump")], capture_output=True, text=True, check=True
    )
    n_atoms, _, read, peak, most, least = (float(x) for x in run.stdout.split())
    assert n_atoms == 1_000_000
    # Positions and numbers alone would take 32 MB; text and tables of ASE or NumPy some hundreds.
    assert read < 24, f"{read} MB to read"
    assert peak < 28, f"{peak} MB in all"
    assert 400 < least <= most < 25_000


# -- plans ------------------------------------------------------------------------------------------------------

RATES = Rates(1e-8, 4e-9, 1e-9, 3e-9, 1e-6, 2e-6, 4e-6)


def test_a_plan_for_a_billion_atoms_by_hand():
    model = small_model()
    options = {"density": 0.06, "device": "cpu", "precision": "fp32", "calibrated": RATES, "devices": 8}
    plan = scale_plan(10**9, model, spacing=0.25, keep=["coarse:4", "atoms", "slice:z=0.5"], price=2.0, **options)
    edge = (1e9 / 0.06) ** (1 / 3)
    axis = int(np.ceil(edge / 0.25))
    axis = -(-axis // 4) * 4
    assert plan.grid_shape == (axis,) * 3
    assert plan.n_points == axis**3 > 2**39
    assert plan.n_tiles == int(np.ceil(axis / 64)) ** 3
    assert plan.electrons == 3e9
    assert plan.network_seconds == pytest.approx(axis**3 * 4e-9 / 8)
    assert plan.driver_seconds == pytest.approx(2000)
    assert plan.reading_seconds == pytest.approx(4000)
    run = (axis**3 * (edge / axis) ** 3 / 128) ** (1 / 3)
    halo = (1 + 2 * model.spec.descriptor.reach / run) ** 3
    assert plan.setup_seconds == pytest.approx(1e9 * halo * 1e-6 / 8, rel=1e-6)
    raw = 12 * (axis // 4) ** 3 + 12 * axis**2 + 80 * 10**9
    assert plan.stored_bytes == pytest.approx(0.75 * raw, rel=1e-9)
    assert plan.disk_seconds == pytest.approx(0.75 * raw / 1e9, rel=1e-6)
    device = plan.setup_seconds + plan.feature_seconds + plan.network_seconds + plan.reduction_seconds
    assert plan.seconds == pytest.approx(2000 + max(device, plan.encoding_seconds, plan.disk_seconds))
    assert plan.dominant == "one process before"
    assert plan.price == pytest.approx(2.0 * plan.device_hours)
    assert plan.device_hours == pytest.approx(8 * plan.seconds / 3600)
    json.dumps(plan.to_dict())
    text = str(plan)
    for word in ("1,000,000,000", "one process before takes longest", "device hours", "coarse:4x4x4"):
        assert word in text


def test_plans_grow_as_they_must():
    options = {"density": 0.06, "device": "cpu", "precision": "fp32", "calibrated": RATES}
    plans = [scale_plan(n, small_model(), spacing=0.25, **options) for n in (10**6, 10**8, 10**10)]
    for small, large in itertools.pairwise(plans):
        assert large.n_points / small.n_points == pytest.approx(100, rel=0.02)
        assert large.network_seconds / small.network_seconds == pytest.approx(100, rel=0.02)
        assert large.stored_bytes / small.stored_bytes == pytest.approx(100, rel=0.02)
    many = scale_plan(10**8, small_model(), spacing=0.25, devices=100, **options)
    assert many.feature_seconds == pytest.approx(plans[1].feature_seconds / 100)
    assert many.driver_seconds == plans[1].driver_seconds
    assert many.worker_bytes < plans[1].worker_bytes
    full = plans[1]
    few = scale_plan(10**8, small_model(), spacing=0.25, keep="electrons", **options)
    assert few.stored_bytes == 0 < full.stored_bytes == int(0.75 * 12 * full.n_points)


def test_rates_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gpurho.pipelines.calibration.MANY_EDGE", 8)
    monkeypatch.setattr("gpurho.pipelines.calibration.PROBE_POINTS", 12)
    model, options = small_model(), {"density": 0.06, "device": "cpu", "precision": "fp32", "keep": "atoms"}
    first = scale_plan(10**9, model, **options)
    assert all(getattr(first, f"{name}_seconds") > 0 for name in ("driver", "setup", "feature", "network", "reading"))
    file = tmp_path / "gpurho" / "calibration.json"
    assert len(json.loads(file.read_text())) == 1

    def never(*_):
        raise AssertionError("it measured again")

    with monkeypatch.context() as patch:
        patch.setattr("gpurho.pipelines.calibration.measure", never)
        assert scale_plan(10**9, model, **options) == first
        with pytest.raises(AssertionError, match="again"):
            scale_plan(10**9, model, **{**options, "uncertainty": None})
    file.write_text("{ damaged")
    assert scale_plan(10**9, model, **options).n_points == first.n_points
    assert len(json.loads(file.read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("gpurho.pipelines.calibration.measure", lambda job: RATES)
    assert scale_plan(10**6, small_model(), density=0.06, device="cpu").driver_seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_atoms": 1.5}, "not a whole number"),
        ({"n_atoms": 0}, "out of range"),
        ({"n_atoms": 10**13}, "out of range"),
        ({"density": None}, "density .* or the cell"),
        ({"cell": (10.0, 10, 10)}, "density .* or the cell"),
        ({"density": 60.0}, "not one of matter"),
        ({"density": None, "cell": (1.0, 1.0, 0.0)}, "no volume"),
        ({"devices": 0}, "devices 0"),
        ({"disk_rate": 0}, "disk_rate"),
        ({"composition": {"Cu": 1}}, "composition"),
        ({"model": "auto"}, "name the model"),
        ({"keep": "nothing"}, "not known"),
    ],
)
def test_wrong_plans(changes, message):
    options = {"n_atoms": 10**9, "model": small_model(), "density": 0.06, "device": "cpu", "calibrated": RATES}
    with pytest.raises(SettingsError, match=message):
        scale_plan(**(options | changes))


def test_plan_by_number_from_python_and_the_command_line(tmp_path, monkeypatch, capsys):
    from gpurho.cli import main
    from gpurho.pipelines.plan import plan

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gpurho.pipelines.calibration.measure", lambda job: RATES)
    model = small_model()
    model.save(tmp_path / "small.safetensors")
    found = plan(10**9, model, cell=(2600.0, 2600.0, 2500.0), device="cpu", devices=4)
    assert found.density == pytest.approx(1e9 / (2600.0 * 2600 * 2500))
    words = ["plan", "--atoms", "1e9", "--density", "0.06", "--model", str(tmp_path / "small.safetensors")]
    assert main([*words, "--device", "cpu", "--devices", "4", "--price", "2.5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["n_atoms"] == 10**9
    assert values["price"] == pytest.approx(2.5 * values["device_hours"])
    assert main(["plan"]) == 1
    assert "structure file or --atoms" in capsys.readouterr().err
    assert main([*words, "--grid", "8", "8", "8"]) == 1
    assert "--atoms does not go with --grid" in capsys.readouterr().err
