"""Threads of the CPU: batches side by side, with the bits of one thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time

import pytest
import torch

from gpurho.host import side_by_side
from gpurho.model import load_model


@pytest.fixture
def threads():
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_items_run_at_once_each_on_one_thread(threads):
    threads(3)
    together = threading.Barrier(3, timeout=30)
    seen = []

    def work(item):
        together.wait()
        seen.append((item, torch.get_num_threads(), threading.get_ident()))

    side_by_side(work, range(6))
    assert sorted(item for item, _, _ in seen) == list(range(6))
    assert {count for _, count, _ in seen} == {1}
    assert len({thread for _, _, thread in seen}) == 3
    assert torch.get_num_threads() == 3


def test_with_one_thread_nothing_leaves_it(threads):
    threads(1)
    seen = []
    side_by_side(lambda item: seen.append(threading.get_ident()), range(3))
    assert seen == [threading.get_ident()] * 3


def test_an_error_of_an_item_is_raised(threads):
    threads(2)

    def work(item):
        time.sleep(0.01)
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        side_by_side(work, range(8))


@pytest.mark.parametrize("uncertainty", [None, "analytic", "last-layer", "sampled"])
@pytest.mark.parametrize("n_points", [1, 700, 5000])
def test_a_network_gives_the_same_bits_on_any_number_of_threads(threads, uncertainty, n_points):
    model = load_model("al")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n_points, model.spec.descriptor.n_features, generator=generator)
    features = model.tensors["feature_mean"] + model.tensors["feature_std"] * noise
    evaluator = model.evaluator(device="cpu", uncertainty=uncertainty, samples=3, batch_size=512)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append([x for x in evaluator(features) if x is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
from gpurho.host import side_by_side
torch.set_num_threads(2)
side_by_side(lambda item: None, range(4))
child = os.fork()
if child == 0:
    seen = []
    side_by_side(seen.append, range(4))
    os._exit(0 if sorted(seen) == [0, 1, 2, 3] else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_batches_do_not_map_their_memory_anew():
    code = """
import resource, torch
from gpurho.model import load_model
model = load_model("al")
evaluator = model.evaluator(device="cpu", uncertainty="analytic", batch_size=4096)
features = model.tensors["feature_mean"].repeat(40_960, 1)
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    evaluator(features)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    # What Dask sets for its workers.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, timeout=60, env=environment, capture_output=True, text=True)
    # Ten batches, each of some megabytes of pages of 4 KiB.
    assert int(done.stdout) < 2000
