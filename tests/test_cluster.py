"""Clusters of this machine and schedulers elsewhere: what they are asked, and what is said where there are none."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from gpurho.errors import DeviceError, MissingDependencyError, SettingsError

pytest.importorskip("distributed")
# Sockets and event loops are closed by the garbage collector when it pleases.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_gpus_are_counted_and_dask_cuda_is_asked_for(monkeypatch):
    import torch

    from gpurho.pipelines import cluster

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="devices=3, but this machine has 2 GPUs"), cluster.local_client(3, "cuda"):
        pass
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(MissingDependencyError, match="dask-cuda"), cluster.local_client(2, "cuda"):
        pass
    asked: dict[str, Any] = {}

    def fake(**options: Any) -> None:
        asked.update(options)
        raise RuntimeError("no GPU in this test")

    monkeypatch.setitem(sys.modules, "dask_cuda", types.SimpleNamespace(LocalCUDACluster=fake))
    with pytest.raises(SettingsError, match="no GPU in this test"), cluster.local_client(2, "cuda"):
        pass
    assert asked["n_workers"] == 2
    assert asked["host"] == "127.0.0.1"
    assert asked["scheduler_kwargs"] == {"dashboard": False}


def test_schedulers_that_do_not_answer(tmp_path, monkeypatch):
    from gpurho.pipelines import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(SettingsError, match="no scheduler answers"):
        cluster.connect("tcp://127.0.0.1:9")
    with pytest.raises(SettingsError, match="does not exist"):
        cluster.connect(scheduler_file=tmp_path / "none.json")
    with pytest.raises(SettingsError, match="either"):
        cluster.connect()
