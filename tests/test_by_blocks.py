"""The network of a CPU called for each block of descriptors: the bits of both one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import bulk
from model_tools import delta_model
from numba import cfunc

import gpurho
from gpurho import hostnet
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import ModelError
from gpurho.evaluator import Evaluator
from gpurho.kernels._smooth_emit import DENSE
from gpurho.kernels.smooth import BlockNetwork
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import DensityModel, ModelSpec
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
    own = {"device": "cpu", "precision": "fp32", "grid": (11, 13, 33), "tile_shape": (8, 10, 16), "samples": 3}
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
    assert not made.holds_features
    assert len(made._features) == 0
    begun = made.evaluate(made.job.tiles[0])
    assert begun.feature_seconds > 0
    assert begun.network_seconds > 0
    assert stages(executor="script").holds_features


def test_many_drawn_networks_stay_with_descriptors_in_memory(monkeypatch):
    assert not stages(uncertainty="sampled").holds_features
    monkeypatch.setattr(hostnet, "MOST_WEIGHTS", 1)
    assert stages(uncertainty="sampled").holds_features
    assert not stages(uncertainty="analytic").holds_features


def test_a_network_that_fails_is_found_out(monkeypatch):
    """A kernel cannot raise: what it leaves undone is not a number."""

    @cfunc(DENSE)
    def nothing(features, first, last, out, n, table):
        pass

    old = Evaluator.by_blocks.fget
    monkeypatch.setattr(
        Evaluator, "by_blocks", property(lambda self: BlockNetwork(nothing.address, 0, old(self).n_rows))
    )
    with pytest.raises(ModelError, match="not finite"):
        predicted(MODELS["two-body part"])
