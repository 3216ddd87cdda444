"""The network of a CPU called for each block of descriptors: the bits of both one after the other."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from ase.build import bulk
from model_tools import delta_model
from numba import cfunc

import gpurho
from gpurho import executors, hostnet
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import DeviceError
from gpurho.evaluator import Evaluator
from gpurho.kernels._smooth_emit import DENSE
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import DensityModel, ModelSpec
from gpurho.pipelines.plan import OUTPUT_BYTES, point_bytes
from gpurho.pipelines.settings import settle
from gpurho.pipelines.tiling import Stages

KINDS = [None, "analytic", "last-layer", "sampled"]


def alloy():
    """Disordered, with vacuum: points without atoms."""
    atoms = bulk("Si", "diamond", 5.5, cubic=True)
    atoms.symbols[::3] = "Ge"
    atoms.positions += np.random.default_rng(2).normal(0, 0.1, atoms.positions.shape)
    atoms.set_cell(np.array([[5.5, 0.4, 0.0], [0.3, 5.5, 0.2], [0.0, 0.0, 14.5]]))
    return atoms


def settings(**changes):
    own = {"device": "cpu", "precision": "fp32", "grid": (22, 21, 33), "tile_shape": (8, 10, 16), "samples": 3}
    return own | changes


def few_columns():
    """A model with fewer features than a register has lanes."""
    descriptor = DescriptorSpec(("Si", "Ge"), cutoff=4.0, family="smooth", n_radial=3, n_basis=0)
    spec = ModelSpec(descriptor, {"Si": 4.0, "Ge": 4.0}, NetworkSpec(1, 1, 8), density_mean=0.1, density_std=0.05)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DensityNetwork(spec.network, descriptor.n_features, spec.distance_columns())
    return DensityModel.from_network(spec, net)


def with_last_layer(model):
    size = model.spec.network.width + 1
    spec = ModelSpec(**{**vars(model.spec), "last_layer": {"points": 0, "noise": "random"}})
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(3)).mul_(0.1).tril_()
    return DensityModel(spec, {**model.tensors, "last_layer": factor})


MODELS = {"two-body part": delta_model(), "two blocks": delta_model(2, "density"), "few columns": few_columns()}


def predicted(model, **changes):
    return gpurho.predict(alloy(), model, progress=False, **settings(**changes))


def facts(rho):
    names = [name for name in ("mean", "aleatoric", "epistemic") if getattr(rho, name, None) is not None]
    fields = {name: np.asarray(getattr(rho, name)) for name in names}
    return fields, (rho.totals, rho.electrons_std)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("uncertainty", KINDS)
def test_fields_counts_and_errors_are_those_of_descriptors_kept_in_memory(name, uncertainty, monkeypatch):
    model = with_last_layer(MODELS[name])
    fields, sums = facts(predicted(model, uncertainty=uncertainty))
    assert len(fields) == (3 if uncertainty else 1)
    assert all(np.ptp(values) > 0 for values in fields.values())
    monkeypatch.setattr(Evaluator, "by_blocks", None)
    others, expected = facts(predicted(model, uncertainty=uncertainty))
    assert fields.keys() == others.keys()
    for key, values in fields.items():
        assert values.tobytes() == others[key].tobytes(), key
    assert repr(sums) == repr(expected)
    assert sums[0].n_capped > 100


@pytest.mark.parametrize("grid", [(3, 3, 3), (2, 17, 1)])
def test_points_far_apart(grid, monkeypatch):
    """Differences between the coordinates of a batch would wrap around: its points are taken one by one."""
    atoms = bulk("Si", "diamond", 5.5, cubic=True).repeat((1, 1, 20))
    atoms.set_cell(np.diag([60.0, 60.0, 110.0]))
    found = [gpurho.predict(atoms, MODELS["two-body part"], progress=False, **settings(grid=grid))]
    monkeypatch.setattr(Evaluator, "by_blocks", None)
    found.append(gpurho.predict(atoms, MODELS["two-body part"], progress=False, **settings(grid=grid)))
    assert facts(found[0])[0]["mean"].tobytes() == facts(found[1])[0]["mean"].tobytes()


def stages(model=MODELS["two-body part"], **changes):
    return Stages(settle(alloy(), model, **settings(**changes)))


def test_the_descriptors_of_a_tile_are_not_kept():
    made = stages()
    assert len(made._features) == 0
    begun = made.evaluate(made.job.tiles[0])
    assert begun.feature_seconds > 0
    assert begun.network_seconds > 0
    assert len(stages(executor="script")._features) == made.job.tiles[0].n_points


def test_many_drawn_networks_stay_with_descriptors_in_memory(monkeypatch):
    assert len(stages(uncertainty="sampled")._features) == 0
    monkeypatch.setattr(hostnet, "MOST_WEIGHTS", 1)
    assert len(stages(uncertainty="sampled")._features) > 0
    assert len(stages(uncertainty="analytic")._features) == 0


def test_a_network_that_ends_early_is_found_out(monkeypatch):
    """A kernel cannot raise: what it leaves undone has bits of its own."""

    @cfunc(DENSE)
    def nothing(features, first, last, out, n, table):
        pass

    old = Evaluator.by_blocks.fget
    model = MODELS["two-body part"]
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "by_blocks", property(lambda self: replace(old(self), address=nothing.address)))
        with pytest.raises(DeviceError, match="ended early"):
            predicted(model)
    evaluator = model.evaluator("cpu")
    monkeypatch.setattr(evaluator._network, "_run", nothing)
    with pytest.raises(DeviceError, match="ended early"):
        evaluator(torch.zeros(3, model.spec.descriptor.n_features))


def test_a_network_is_held_by_whoever_may_call_it():
    model = delta_model(3, "density")
    network = model.evaluator("cpu").by_blocks
    held = weakref.ref(network.owner)
    executors._KEPT.clear()
    gc.collect()
    assert held() is not None
    del network
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("uncertainty", [None, "analytic"])
def test_bits_do_not_depend_on_the_number_of_threads(uncertainty):
    before = numba.get_num_threads()
    found = []
    try:
        for threads in {1, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(threads)
            found.append(facts(predicted(MODELS["two-body part"], uncertainty=uncertainty))[0])
    finally:
        numba.set_num_threads(before)
    for name, values in found[0].items():
        assert all(values.tobytes() == others[name].tobytes() for others in found)


@pytest.mark.parametrize("spacing", [0.2, 0.6])
def test_a_plan_counts_the_descriptors_that_are_kept(spacing):
    def bytes_of(**changes):
        job = settle(alloy(), MODELS["two-body part"], **{**settings(grid=None), "spacing": spacing, **changes})
        return point_bytes(job, job.grid.steps), 4 * job.model.spec.descriptor.n_features

    whole, features = bytes_of(executor="script", uncertainty="analytic")
    some, _ = bytes_of(uncertainty="analytic")
    none, _ = bytes_of(uncertainty=None)
    # Of every fourth point along each axis, or of all.
    expected = features / 64 if spacing == 0.2 else features
    assert some == pytest.approx(whole - features + OUTPUT_BYTES + expected, rel=0.1)
    assert none < whole - features
