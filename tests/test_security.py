"""Files of strangers run no code, reach no other file and take no memory that they do not fill; Dask stays at home."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import resource
import shutil
import subprocess
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from predict_tools import aluminium, settings, small_model

from gpurho.errors import GpurhoError, ModelError, StoreError, StructureError

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "before-checksums"
SOURCES = [path for folder in ("gpurho", "kernels", "pipelines") for path in sorted((ROOT / folder).rglob("*.py"))]
NO_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "imp", "code"}
NO_CALLS = {"eval", "exec", "compile", "__import__"}


# -- what the sources may call -----------------------------------------------------------------------------------


def findings(tree: ast.AST) -> list[str]:
    """Calls and imports of a module that could run code out of a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in NO_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NO_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                name in NO_CALLS
                or (name.endswith("torch.load") and given.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load", "np.fromfile") and given.get("allow_pickle", "False") != "False")
                or (name == "np.load" and "allow_pickle" not in given)
                or name in ("os.system", "os.popen")
                or given.get("shell") == "True"
                or (name.endswith(("read_pickle", "import_module")) and "getattr" in ast.unparse(node))
            ):
                found.append(f"{name} in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_can_run_code_out_of_a_file(path):
    assert findings(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
    ],
)
def test_the_search_finds(text):
    assert findings(ast.parse(text))


def test_torchscript_is_loaded_in_one_place_only_and_only_when_trusted(tmp_path):
    users = [path.name for path in SOURCES if "jit.load" in path.read_text()]
    assert users == ["export.py"]
    from gpurho.model import load_exported, load_model

    model = small_model()
    model.export(tmp_path / "m.pt")
    for trusted in (False, None, 0, "yes"):
        with pytest.raises(ModelError, match="trusted=True"):
            load_exported(tmp_path / "m.pt", trusted=trusted)  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        load_model(tmp_path / "m.pt")


# -- hostile files -----------------------------------------------------------------------------------------------


class _Payload:
    """What touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def _readers():
    from gpurho.checkpoint import read_checkpoint
    from gpurho.datasets import open_dataset
    from gpurho.densityfile import open_density
    from gpurho.formats import read_density
    from gpurho.journal import read_journal
    from gpurho.model import load_model
    from gpurho.pipelines.paper_store import Results
    from gpurho.pipelines.select import _read_record
    from gpurho.pipelines.structures import read_structures
    from gpurho.pointstore import PointStore
    from gpurho.sources import StructureSource

    return {
        "m.safetensors": load_model,
        "c.safetensors": lambda path: read_checkpoint(path, "me"),
        "d.h5": open_dataset,
        "r.h5": open_density,
        **dict.fromkeys(("a.cube", "CHGCAR", "a.xsf", "a.dens", "a.vti"), read_density),
        "p.npz": lambda path: PointStore.reopen(3, path.with_suffix(""), "key"),
        "r.journal": read_journal,
        "s.json": _read_record,
        "results.json": lambda path: Results(path.parent),
        **dict.fromkeys(("a.traj", "a.xyz", "a.json", "a.db", "a.data", "a.pckl", "POSCAR"), read_structures),
        "a.dump": lambda path: StructureSource.from_dump(path, ["Al"]),
    }


@pytest.mark.parametrize("name", list(_readers()))
def test_pickles_in_every_kind_of_file_do_nothing(name, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / name
    data = pickle.dumps(_Payload(marker))
    pickle.loads(data)
    assert marker.exists()  # the payload works
    marker.unlink()
    if name == "p.npz":
        (tmp_path / "p").write_bytes(bytes(48))
        odd = np.array([_Payload(marker)], dtype=object)
        np.savez(path, key=np.array("key"), counts=np.array([4]), density=odd, weights=odd, crc32=np.array(0))
        assert _readers()[name](path) is None
    else:
        path.write_bytes(data)
        try:
            found = _readers()[name](path)
        except GpurhoError:
            found = []
        assert found == []  # a journal of no whole line
    assert not marker.exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    from gpurho.pipelines.paper_store import Results

    marker = tmp_path / "marker"
    results = Results(tmp_path)
    results.make("k", lambda: ({"x": 1}, {"a": np.ones(2)}))
    np.savez(results._arrays_path("k"), a=np.array([_Payload(marker)], dtype=object))
    with pytest.raises((ValueError, GpurhoError)):
        Results(tmp_path).arrays("k")
    assert not marker.exists()


# -- claims ------------------------------------------------------------------------------------------------------


def _grown(run) -> int:
    """Bytes by which the largest memory of this process grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _refused(error, run, match=None):
    def check():
        with pytest.raises(error, match=match):
            run()

    assert _grown(check) < 200 << 20


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    from gpurho.datasets import open_dataset
    from gpurho.formats import read_density
    from gpurho.model import load_model

    path = tmp_path / "m.safetensors"
    for size in (10**18, 2**63 + 5, 2**64 - 1, 10**9):
        path.write_bytes(size.to_bytes(8, "little") + b"{}" + bytes(100))
        _refused(ModelError, lambda: load_model(path))
    cube = tmp_path / "a.cube"
    for counts in ("1000000 1000000 1000000", "2147483647 2147483647 2147483647", "1 1 1000000000000000"):
        i, j, k = counts.split()
        cube.write_text(f"a\nb\n1 0 0 0\n{i} 1 0 0\n{j} 0 1 0\n{k} 0 0 1\n13 3 0 0 0\n1.0\n")
        _refused(GpurhoError, lambda: read_density(cube), "values|axes|whole")
    data = tmp_path / "d.h5"
    for name, shape in (("density", (10**5,) * 3), ("positions", (10**15, 3)), ("numbers", (10**15,))):
        shutil.copy(FIXTURES / "dataset.h5", data)
        with h5py.File(data, "r+") as h5:
            group = h5["snapshots/000000"]
            del group[name]
            group.create_dataset(name, shape, "f4", chunks=(1024, 1, 1)[: len(shape)])
        _refused(GpurhoError, lambda: open_dataset(data)[0])


def test_packed_bombs_are_refused(tmp_path):
    from gpurho.pipelines.structures import read_structures

    path = tmp_path / "a.xyz.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    _refused(StructureError, lambda: read_structures(path), "unpacks")


def test_entities_do_not_grow(tmp_path):
    from gpurho.dft.qe_files import read_result

    path = tmp_path / "a.xml"
    lines = ['<!DOCTYPE a [<!ENTITY x0 "aaaaaaaaaa">']
    lines += [f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 12)]
    path.write_text("".join(lines) + "]><a>&x11;</a>")
    _refused(GpurhoError, lambda: read_result(path))


# -- other files -------------------------------------------------------------------------------------------------


def _secret(folder: Path) -> Path:
    path = folder / "secret.h5"
    with h5py.File(path, "w") as h5:
        h5["x"] = np.full((4, 4, 4), 0.5, np.float32)
    return path


def _external_link(h5, name, secret):
    h5[name] = h5py.ExternalLink(str(secret), "/x")


def _soft_link(h5, name, secret):
    h5["elsewhere"] = h5py.ExternalLink(str(secret), "/x")
    h5[name] = h5py.SoftLink("/elsewhere")


def _storage(h5, name, secret):
    h5.create_dataset(name, (4, 4, 4), "f4", external=[(str(secret), 0, 256)])


def _virtual(h5, name, secret):
    layout = h5py.VirtualLayout((4, 4, 4), "f4")
    layout[...] = h5py.VirtualSource(str(secret), "x", (4, 4, 4))
    h5.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("trick", [_external_link, _soft_link, _storage, _virtual])
@pytest.mark.parametrize(("file", "name"), [("dataset.h5", "snapshots/000000/density"), ("field.h5", "mean")])
def test_no_other_file_is_read(trick, file, name, tmp_path):
    from gpurho.datasets import open_dataset
    from gpurho.densityfile import open_density

    (tmp_path / "elsewhere").mkdir()
    secret = _secret(tmp_path / "elsewhere")
    path = tmp_path / file
    shutil.copy(FIXTURES / file, path)
    with h5py.File(path, "r+") as h5:
        del h5[name]
        trick(h5, name, secret)
    with pytest.raises(GpurhoError, match=r"link|another file|table of shards"):
        open_dataset(path)[0] if file == "dataset.h5" else open_density(path)


def test_a_group_of_another_file_is_no_snapshot(tmp_path):
    from gpurho.datasets import open_dataset

    path = tmp_path / "d.h5"
    shutil.copy(FIXTURES / "dataset.h5", path)
    with h5py.File(path, "r+") as h5:
        h5["snapshots/000001"] = h5py.ExternalLink(str(FIXTURES / "dataset.h5"), "/snapshots/000000")
    data = open_dataset(path)
    assert data[0].electrons == 12.0
    with pytest.raises(GpurhoError, match=r"link to the file .*dataset\.h5"):
        data[1]


@pytest.mark.parametrize("name", ["/etc/hostname", "../x.h5", "sharded.h5.shards/../../x.h5", "a\x00b", ""])
def test_shards_stay_beside_their_output(name, tmp_path):
    from gpurho.virtual import inside

    with pytest.raises(StoreError, match="not in its own folder"):
        inside(tmp_path / "sharded.h5", name)
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(StoreError, match="leads out"):
        inside(tmp_path / "sharded.h5", "link/hostname")
    assert inside(tmp_path / "sharded.h5", "sharded.h5.shards/000000.h5").name == "000000.h5"


# -- Dask --------------------------------------------------------------------------------------------------------


def test_local_clusters_are_closed_to_the_network():
    from gpurho.pipelines.cluster import local_options

    options = local_options(2, "cpu")
    assert options["host"] == "127.0.0.1"
    assert options["dashboard_address"].startswith("127.0.0.1:")
    assert options["scheduler_kwargs"] == {"dashboard": False}
    assert local_options(2, "cuda")["host"] == "127.0.0.1"


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Dask's configuration as a user writes it, with a key and a certificate of its own."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=gpurho"
    subprocess.run(command.split(), check=True, capture_output=True)
    one = {"key": str(key), "cert": str(certificate)}
    return {
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": str(certificate),
        **{f"distributed.comm.tls.{role}": one for role in ("scheduler", "worker", "client")},
    }


@pytest.fixture
def tls_cluster(tls):
    """A cluster that takes encrypted connections alone."""
    import dask
    from distributed import LocalCluster
    from distributed.security import Security

    with (
        warnings.catch_warnings(),
        dask.config.set(tls),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tls",
            host="127.0.0.1",
            security=Security(),
            dashboard_address=None,
        ) as cluster,
    ):
        yield cluster.scheduler_address


def test_predictions_over_tls_where_it_is_configured(tls_cluster, tmp_path):
    import gpurho
    from gpurho.pipelines.cluster import connect

    assert tls_cluster.startswith("tls://127.0.0.1")
    atoms, model = aluminium(), small_model()
    with connect(tls_cluster) as client:
        assert client.security.require_encryption
        found = gpurho.predict(atoms, model, grid=(4, 4, 4), client=client, out=tmp_path / "r.h5", **settings())
        want = gpurho.predict(atoms, model, grid=(4, 4, 4), **settings())
        assert np.array_equal(found.mean[:, :, :], want.mean)
        found.close()


def test_who_has_no_key_is_refused(tls_cluster, monkeypatch):
    import dask

    from gpurho.errors import SettingsError
    from gpurho.pipelines import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2)
    bare = {"distributed.comm.tls.client": {"key": None, "cert": None}, "distributed.comm.tls.ca-file": None}
    with dask.config.set({**bare, "distributed.comm.require-encryption": False}):
        for address in (tls_cluster, tls_cluster.replace("tls://", "tcp://")):
            with pytest.raises(SettingsError) as caught:
                cluster.connect(address)
            assert "\n" not in str(caught.value)


def test_json_of_strangers_is_bounded_in_depth(tmp_path):
    from gpurho.pipelines.select import _read_record

    path = tmp_path / "s.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(StoreError):
        _read_record(path)
    path.write_text(json.dumps({"format": "gpurho-selection", "format_version": 1, "candidates": {"../../x": 3}}))
    with pytest.raises(StoreError, match="damaged"):
        _read_record(path)
