"""The layers, the list of packages, and what an import may touch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "gpurho": "gpurho",
    "gpurho.data": "gpurho/data",
    "gpurho.dft": "gpurho/dft",
    "gpurho.kernels": "kernels",
    "gpurho.pipelines": "pipelines",
}

# A module imports from lower layers, or from its own (without cycles, which Python itself refuses).
LAYERS = [
    {"errors", "units", "trees", "versions"},
    {"kernels"},
    {"structure", "host", "checksums", "deflate", "hdf5guard"},
    {"builders", "defects", "_fcc", "grid", "partition", "sources", "dumpfile", "hdf5atoms"},
    {"neighbors", "_neighbor_providers", "features", "descriptors", "surroundings"},
    {
        "domain",
        "layers",
        "uncertainty",
        "evaluator",
        "scriptnet",
        "executors",
        "fused",
        "hostnet",
        "networkcheck",
        "modelspec",
        "truststats",
        "prediction",
        "export",
        "lastlayer",
        "calibration",
        "integrals",
        "model",
        "tensorfiles",
        "data",
    },
    {"trust", "fields", "sections", "peratom", "metrics", "fieldstats", "keep", "kept", "exactsums", "reductions"},
    {
        "density",
        "densityfile",
        "truststore",
        "densitychecks",
        "journal",
        "storedatoms",
        "store",
        "virtual",
        "shards",
        "shardsink",
        "memorystore",
        "plotting",
        "calibrationplot",
        "atomerrors",
        "datasets",
    }
    | {"formats", "formats_cube", "formats_vasp", "formats_xsf", "formats_sparc", "_textfields"}
    | {"plotstyle", "plotplanes", "plotmaps", "plotlines", "plothistograms", "ploterrors"}
    | {"formats_vti", "formats_atoms", "views", "refinement"},
    {"dft", "sampling", "labelstore", "energy", "energyjournal", "eos", "trainingset", "training"}
    | {
        "contraction",
        "trainsettings",
        "trainlog",
        "trainingdata",
        "trainingpoints",
        "pointsampling",
        "pointstore",
        "baseline",
        "flatnet",
    }
    | {"selection", "activelearning", "cutting"}
    | {"checkpoint", "ddp", "transfer"},
    {"pipelines", "cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules():
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            yield name, path


def imported(path):
    """Names of the gpurho modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in ("gpurho", "gpurho.dft", "gpurho.pipelines", "gpurho.kernels"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def top(name):
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_go_down_the_layers(name, path):
    if name == "gpurho":
        pytest.skip("the package root re-exports lazily")
    assert top(name) in RANK, f"{name} has no layer: add it to LAYERS"
    for other in imported(path):
        if other == "gpurho":
            pytest.fail(f"{name} imports the package root")
        if other.startswith("gpurho."):
            assert RANK[top(other)] <= RANK[top(name)], f"{name} imports {other} of a higher layer"
        assert other.split(".")[0] not in ("kernels", "pipelines"), f"{name} imports {other}"


def test_package_list_matches_the_folders():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert config["package-dir"] == FOLDERS
    assert sorted(config["packages"]) == sorted(FOLDERS)
    for top_folder in ("gpurho", "kernels", "pipelines"):
        nested = {str(p.parent.relative_to(ROOT)) for p in (ROOT / top_folder).rglob("*.py")}
        assert nested <= set(FOLDERS.values()), "a folder with modules is not in the package list"


def test_modules_are_short():
    long = {name: n for name, path in modules() if (n := len(path.read_text().splitlines())) > 430}
    assert not long


def test_import_touches_no_heavy_library():
    code = (
        "import sys, gpurho\n"
        "heavy = {'torch', 'numba', 'cupy', 'dask', 'matplotlib', 'h5py', 'ase', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    import gpurho

    for name in gpurho.__all__:
        assert getattr(gpurho, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        gpurho.nonsense  # noqa: B018


def test_threads_sleep_while_they_wait() -> None:
    code = "import gpurho, os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    for wish, found in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | (
            {} if wish is None else {"OMP_WAIT_POLICY": wish}
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found
