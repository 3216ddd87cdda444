"""Prediction of atoms that lie in a file: the bits of a prediction with all atoms in memory, and less memory."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predict_tools import aluminium, settings, small_model, source_of

import gpurho
from gpurho.cli import main
from gpurho.density import Density
from gpurho.densityfile import open_density
from gpurho.errors import FormatError, SettingsError, StoreError, StructureError, UnknownSpeciesError
from gpurho.pipelines.settings import settle
from gpurho.pipelines.tiling import run_tiles
from gpurho.sources import StructureSource
from gpurho.store import FileSink
from gpurho.structure import Structure, as_structure

HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("numba_cuda") is not None
OPTIONS = settings(grid=(24, 18, 80))


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(("Al", "Ge"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurho.sources.BIN_WIDTH", 3.0)
    monkeypatch.setattr("gpurho.sources.BLOCK_ATOMS", 60)
    for module in ("sources", "dumpfile"):
        monkeypatch.setattr(f"gpurho.{module}.CHUNK", 37)
    monkeypatch.setattr("gpurho.pipelines.parts.TILES", 2)


def crystal(pbc: tuple[bool, bool, bool] = (True, True, True), repeat: tuple[int, int, int] = (2, 2, 14)) -> Structure:
    """A sheared, shaken cell of two species, longer than atoms see."""
    atoms = aluminium(repeat)
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0, 0], [0.1, 1, 0], [0.05, -0.08, 1]]), scale_atoms=True)
    atoms.numbers[np.random.default_rng(3).random(len(atoms)) < 0.3] = 32
    atoms.pbc = pbc
    if not all(pbc):
        atoms.wrap(pbc=True)
    return as_structure(atoms)


def whole_bytes(density: Density) -> list[bytes]:
    """All fields and the error bar of the integral."""
    assert density.aleatoric is not None
    assert density.epistemic is not None
    fields = [np.asarray(field[...]).tobytes() for field in (density.mean, density.aleatoric, density.epistemic)]
    return [*fields, np.float64([density.electrons, density.electrons_std]).tobytes()]


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("region", [None, ((3, 20), (0, 18), (9, 71))])
def test_fields_have_the_bits_of_atoms_in_memory(model, pbc, region):
    structure = crystal(pbc)
    with source_of(structure) as source:
        found = gpurho.predict(source, model, region=region, **OPTIONS)
        seen = [len(part.structure) for part in source.parts(model.spec.descriptor.reach)]
    wanted = gpurho.predict(structure, model, region=region, **OPTIONS)
    assert max(seen) < len(structure), "each part saw all atoms, so nothing was tested"
    assert whole_bytes(found) == whole_bytes(wanted)
    assert found.structure.fingerprint() == structure.fingerprint()  # after the source is closed


def test_sums_over_atoms_are_in_one_order():
    """Of the smooth descriptors, whose last bits are those of the order of the atoms."""
    structure = as_structure(aluminium((2, 2, 90)))  # so long that a part's own bins would be fewer
    options = OPTIONS | {"grid": (16, 16, 720)}
    with source_of(structure) as source:
        found = gpurho.predict(source, "al", **options)
    assert whole_bytes(found) == whole_bytes(gpurho.predict(structure, "al", **options))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device, or numba-cuda is missing")
@pytest.mark.parametrize("family", ["scalar-product", "smooth"])
def test_fields_have_these_bits_on_a_gpu(family):
    """Work on a tile may be under way when the atoms of the next part come."""
    model: Any = small_model() if family == "scalar-product" else "al"
    structure = as_structure(aluminium((2, 2, 14)))
    with source_of(structure) as source:
        found, wanted = (gpurho.predict(x, model, **OPTIONS | {"device": "cuda"}) for x in (source, structure))
    assert whole_bytes(found) == whole_bytes(wanted)


@pytest.mark.parametrize("family", ["scalar-product", "smooth"])
def test_parts_see_few_atoms(family):
    """Of both families of descriptors, whose reach is not the same."""
    from gpurho.pipelines.parts import parts_of

    model: Any = small_model() if family == "scalar-product" else "al"
    atoms = as_structure(aluminium((2, 2, 30)))
    options = {name: value for name, value in settings(grid=(16, 16, 240)).items() if name != "progress"}
    with source_of(atoms) as source:
        job = settle(source, model, **options)
        sizes = [len(part.structure) for part, _ in parts_of(job)]
        tiles = [tile.index for _, tiles in parts_of(job, {3, 4, 9}) for tile in tiles]
    assert max(sizes) < 0.5 * len(atoms)
    assert tiles == [i for i in range(len(job.tiles)) if i not in (3, 4, 9)]


def test_files_are_the_same_and_serve_both(model, tmp_path):
    """Byte for byte, sums of atoms, histograms and planes too; and what one began the other goes on with."""
    structure, keep = crystal(), ["field", "atoms", "histogram", "slice:z=0.5", "coarse:2"]
    with source_of(structure) as source:
        gpurho.predict(source, model, out=tmp_path / "a.h5", keep=keep, **OPTIONS).close()
        gpurho.predict(structure, model, out=tmp_path / "b.h5", keep=keep, **OPTIONS).close()
        assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
        again = gpurho.predict(source, model, out=tmp_path / "b.h5", keep=keep, **OPTIONS)
        assert again.per_atom().electrons.shape == (len(structure),)
        again.close()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("first", ["source", "structure"])
def test_an_interrupted_run_goes_on_from_either(model, tmp_path, first):
    structure, path = crystal(), tmp_path / "rho.h5"
    gpurho.predict(structure, model, out=tmp_path / "whole.h5", **OPTIONS).close()
    with source_of(structure) as source:
        begins, ends = (source, structure) if first == "source" else (structure, source)
        job = settle(begins, model, **{name: value for name, value in OPTIONS.items() if name != "progress"})
        sink, done = FileSink(path, job.layout(), True), 0

        def tick(_: int) -> None:
            nonlocal done
            done += 1
            if done == 11:
                raise StoppedError

        with pytest.raises(StoppedError):
            run_tiles(job, sink, tick)
        sink.close()
        assert not path.exists()
        gpurho.predict(ends, model, out=path, **OPTIONS).close()
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize("devices", [1, 2])
def test_workers_take_the_atoms_of_a_source(model, tmp_path, devices):
    pytest.importorskip("distributed")
    structure = crystal()
    wanted = whole_bytes(gpurho.predict(structure, model, **OPTIONS))
    with source_of(structure) as source:
        density = gpurho.predict(source, model, devices=devices, out=tmp_path / "rho.h5", **OPTIONS)
        with density:
            assert whole_bytes(density) == wanted


@pytest.mark.parametrize("region", [None, ((0, 40), (0, 40), (20, 60))])
def test_trust_is_that_of_atoms_in_memory(region):
    atoms = aluminium((2, 2, 8), rattle=0.12)
    del atoms[70]
    atoms.positions[20] += 0.7
    structure = as_structure(atoms)
    options = settings(grid=(40, 40, 160), uncertainty=None, tile_shape=(64, 64, 64), keep="electrons", region=region)
    wanted = gpurho.predict(structure, "al", **options).trust
    with source_of(structure) as source:
        found = gpurho.predict(source, "al", **options).trust
        alone = gpurho.trust(source, "al")
    assert wanted is not None
    assert found is not None
    np.testing.assert_allclose(found.per_atom, wanted.per_atom, rtol=1e-5)
    np.testing.assert_array_equal(found.why, wanted.why)
    assert found.sentence == wanted.sentence
    assert (found.why > 0).any(), "no atom stands out, so little was tested"
    if region is None:
        assert alone.sentence == wanted.sentence


def test_a_plan_of_a_source(model):
    structure = crystal()
    options = {name: value for name, value in OPTIONS.items() if name != "progress"}
    with source_of(structure) as source:
        found, wanted = (gpurho.plan(atoms, model, **options) for atoms in (source, structure))
    assert (found.n_atoms, found.n_points, found.electrons) == (wanted.n_atoms, wanted.n_points, wanted.electrons)
    assert found.memory_bytes < wanted.memory_bytes


def test_bad_atoms_are_found_and_named(model):
    structure = crystal()
    positions = structure.positions.copy()
    positions[77] = positions[5] + [0.1, 0, 0]
    near = Structure(positions, structure.numbers, structure.cell, structure.pbc)
    with source_of(near) as source, pytest.raises(StructureError, match=r"atoms 5 and 77 are 0\.1 angstrom apart"):
        gpurho.predict(source, model, **OPTIONS)
    open_cell = crystal((True, False, True))
    positions = open_cell.positions.copy()
    positions[60] += 1.5 * open_cell.cell[1]
    away = Structure(positions, open_cell.numbers, open_cell.cell, open_cell.pbc)
    with source_of(away) as source, pytest.raises(StructureError, match="atom 60 lies outside of the cell along"):
        gpurho.predict(source, model, **{**OPTIONS, "grid": None, "spacing": 0.8})
    with source_of(structure) as source, pytest.raises(UnknownSpeciesError, match="structure has Al, Ge"):
        gpurho.predict(source, "al", **OPTIONS)
    with source_of(structure) as source:
        pass
    with pytest.raises(StoreError, match="was closed"):
        gpurho.predict(source, model, **OPTIONS)
    with pytest.raises(StructureError, match="atoms are StructureSource"):
        as_structure(source)
    with pytest.raises(StoreError, match="give a folder with room"):
        source_of(structure, Path("/no/such/folder"))


def dump_of(structure: Structure, path: Path, frames: int = 1) -> Path:
    """A LAMMPS dump of an orthorhombic cell, the atoms shifted from frame to frame, the last where they are."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        for frame in range(frames):
            sides = "".join(f"0 {side!r}\n" for side in np.diag(structure.cell).tolist())
            file.write(f"ITEM: TIMESTEP\n{frame}\nITEM: NUMBER OF ATOMS\n{len(structure)}\n")
            file.write(f"ITEM: BOX BOUNDS pp pp pp\n{sides}ITEM: ATOMS id type x y z\n")
            for i, place in enumerate(structure.positions + 0.3 * (frames - 1 - frame)):
                file.write(
                    f"{i + 1} 1 {place[0]!r} {place[1]!r} {place[2]!r}\n".replace("np.float64(", "").replace(")", "")
                )
    return path


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("name", ["a.dump", "a.dump.gz"])
def test_frames_of_a_dump(tmp_path, monkeypatch, block, name):
    monkeypatch.setattr("gpurho.dumpfile.BLOCK", block)
    structure = as_structure(aluminium(2))
    path = dump_of(structure, tmp_path / name, 3)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "at") as file:
        file.write("\n \n")
    for frame, away in ((-1, 0.0), (2, 0.0), (1, 0.3), (0, 0.6), (-3, 0.6)):
        with StructureSource.from_dump(path, ["Al"], frame=frame) as source:
            np.testing.assert_array_equal(source.structure().positions, structure.positions + away)
    for frame in (3, -4):
        with pytest.raises(FormatError, match=f"has 3 frames and no frame {frame}; give 0 to 2, or -1"):
            StructureSource.from_dump(path, ["Al"], frame=frame)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FormatError, match=r"ends after atom|cannot be read|damaged after atom"):
        StructureSource.from_dump(path, ["Al"])


def test_the_command_with_atoms_on_the_disk(tmp_path, capsys):
    """``--scratch`` gives the file that atoms in memory give, to the byte, and reads densities too."""
    path = dump_of(as_structure(aluminium((2, 2, 3))), tmp_path / "a.dump", 2)
    common = ["--species", "Al", "--grid", "16", "16", "24", "--precision", "fp32", "--quiet"]
    assert main(["predict", str(path), "--out", str(tmp_path / "memory.h5"), *common]) == 0
    scratch = ["--scratch", str(tmp_path)]
    assert main(["predict", str(path), "--out", str(tmp_path / "disk.h5"), *common, *scratch]) == 0
    with open_density(tmp_path / "memory.h5") as a, open_density(tmp_path / "disk.h5") as b:
        assert whole_bytes(a) == whole_bytes(b)
        assert a.info["settings"] == b.info["settings"]
    again = ["predict", str(tmp_path / "disk.h5"), "--out", str(tmp_path / "disk.h5"), *common, *scratch]
    assert main(again) == 0  # the same atoms, read from the result: nothing is left to do
    assert main(["trust", str(path), "--species", "Al", *scratch, "--write", str(tmp_path / "t.xyz")]) == 0
    assert main(["plan", str(path), *common[:-1], *scratch]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "t.xyz"), *common, *scratch]) == 1
    assert "no LAMMPS text dump" in capsys.readouterr().err
    names = {"a.dump", "memory.h5", "disk.h5", "t.xyz"}
    assert {file.name for file in tmp_path.iterdir()} == names  # nothing temporary is left


def test_very_many_atoms_stay_in_the_file(model, tmp_path, monkeypatch):
    structure = crystal()
    gpurho.predict(structure, model, out=tmp_path / "rho.h5", **OPTIONS).close()
    monkeypatch.setattr("gpurho.storedatoms.MANY", 50)
    density = open_density(tmp_path / "rho.h5")
    assert f"{len(structure)} atoms" in repr(density)
    assert density.structure.fingerprint() == structure.fingerprint()
    density.close()
    assert len(density.structure) == len(structure)  # read before
    density = open_density(tmp_path / "rho.h5")
    density.close()
    with pytest.raises(SettingsError, match="file was closed"):
        len(density.structure)
    data = bytearray((tmp_path / "rho.h5").read_bytes())
    place = data.index(structure.positions.tobytes())
    data[place + 3] ^= 1
    (tmp_path / "bad.h5").write_bytes(data)
    with open_density(tmp_path / "bad.h5") as density, pytest.raises(StoreError, match="does not match its checksum"):
        len(density.structure)


MEMORY = """
import resource, sys
import numpy as np
import gpurho
from gpurho.dumpfile import Header
from gpurho.sources import StructureSource
from gpurho.structure import Structure

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def lattice(cells):
    unit = 4.05 * np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    for i in range(cells[0]):
        corners = 4.05 * np.stack(np.meshgrid([i], np.arange(cells[1]), np.arange(cells[2]), indexing="ij"), -1)
        yield (corners.reshape(-1, 1, 3) + unit).reshape(-1, 3)

def run(atoms):
    gpurho.predict(atoms, "al", grid=(20, 20, 20), keep="electrons", device="cpu", progress=False).close()

kind, n = sys.argv[1], int(sys.argv[2])
cells = (n, 50, 50)
small = np.concatenate(list(lattice((3, 3, 3))))
run(Structure(small, np.full(len(small), 13), np.eye(3) * 4.05 * 3, np.ones(3, bool)))  # libraries and code
before = peak()
cell = np.diag(np.array(cells) * 4.05)
if kind == "memory":
    positions = np.concatenate(list(lattice(cells)))
    run(Structure(positions, np.full(len(positions), 13), cell, np.ones(3, bool)))
else:
    def chunks():
        done = 0
        for part in lattice(cells):
            yield part, np.full(len(part), 13), np.arange(done, done + len(part))
            done += len(part)
    header = Header(n * 50 * 50 * 4, cell, np.zeros(3), np.ones(3, bool))
    with StructureSource.from_chunks(header, chunks()) as source:
        run(source)
print(peak() - before)
"""


def _peak(kind: str, n: int) -> float:
    code = textwrap.dedent(MEMORY)
    run = subprocess.run([sys.executable, "-c", code, kind, str(n)], capture_output=True, text=True, check=True)
    return float(run.stdout)


def test_memory_of_an_atom():
    """What a prediction takes for each atom, trust included, is a fraction of what it takes with all in memory."""
    few, many = (_peak("source", n) for n in (10, 50))
    each = (many - few) * 2**20 / (40 * 50 * 50 * 4)
    assert each < 100, f"{each} bytes an atom"
