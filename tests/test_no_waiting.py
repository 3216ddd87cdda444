"""Between a tile's atoms and its results nothing asks the device for a number: on the CPU by the operations, on a GPU
by the copies that are made."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from ase.build import bulk
from predict_tools import small_model
from torch.utils._python_dispatch import TorchDispatchMode

from gpurho.errors import ModelError
from gpurho.pipelines.settings import settle
from gpurho.pipelines.tiling import Stages

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
"""Operations whose result the host has to see before it can go on."""

HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("numba_cuda") is not None


class Recorded(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(named or {}))


def job_of(keep, uncertainty="analytic", model="al", **settings):
    atoms = bulk("Al", cubic=True, a=4.05) * (2, 2, 2)
    atoms.positions += np.random.default_rng(0).normal(0, 0.1, atoms.positions.shape)
    # TorchScript: the network of GPUs, whose operations torch knows.
    return settle(
        atoms, model, grid=(32, 32, 32), tile_shape=(16, 16, 16), uncertainty=uncertainty, keep=keep, executor="script",
        **settings,
    )  # fmt: skip


@pytest.fixture
def one_thread():
    """A mode of torch sees the operations of its own thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("uncertainty", ["analytic", "last-layer", "sampled", None])
@pytest.mark.parametrize("keep", [None, ["coarse:4", "histogram", "slice:z=0.5"], "electrons"])
def test_the_network_and_what_is_kept_of_it_wait_for_nothing(uncertainty, keep):
    job = job_of(keep, uncertainty, samples=2, device="cpu")
    stages, tile = Stages(job), job.tiles[0]
    features, _ = stages.features(tile)
    with Recorded() as recorded:
        stages.reduced(stages.network(features, tile), tile)
    assert {"linear", "addmm", "mm"} & set(recorded.names), recorded.names
    assert not WAITING & set(recorded.names)


def test_an_operation_that_waits_would_be_seen():
    with Recorded() as recorded:
        assert float(torch.ones(3).sum()) == 3.0
    assert WAITING & set(recorded.names)


def test_what_is_not_finite_is_found_when_results_are_there():
    job = job_of(None, device="cpu")
    stages, tile = Stages(job), job.tiles[1]
    features, _ = stages.features(tile)
    features[7, 3] = float("nan")
    results = stages.network(features, tile)
    arrays = [value.numpy() for value in results]
    # Products of bfloat16 by AMX read the row before on to this one, times zero.
    with pytest.raises(ModelError, match=r"mean of [12] of 4096 points is not finite"):
        stages.sorted_out(arrays, tile, {}, None)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device, or numba-cuda is not installed")
@pytest.mark.parametrize("family", ["smooth", "scalar-product"])
def test_no_copies_on_a_gpu_but_atoms_up_and_results_down(family):
    """Copies of a tile in the middle of a run, by CUPTI: its atoms' three arrays up, and as many down as there are
    results."""
    from torch.profiler import ProfilerActivity, profile

    job = job_of(None, model="al" if family == "smooth" else small_model(), device="cuda")
    assert job.model.spec.descriptor.family == family
    stages = Stages(job)
    for tile in list(job.tiles)[:2]:
        stages.finish(stages.begin(tile))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        waiting = stages.begin(job.tiles[2])
        torch.cuda.synchronize()
    stages.finish(waiting)
    names = [event.name for event in seen.events() if event.name.startswith("Memcpy")]
    # Three fields, the vector of the integral, flags and marks.
    assert sum("DtoH" in name for name in names) == 6, names
    assert sum("HtoD" in name for name in names) <= 3, names
