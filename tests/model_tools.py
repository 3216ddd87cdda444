"""A small model of the smooth family with random weights, and features for it."""

from __future__ import annotations

import torch

from gpurho.descriptors import DescriptorSpec
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import DensityModel, ModelSpec

SMOOTH = DescriptorSpec(("Si", "Ge"), cutoff=4.0, family="smooth", n_radial=5, n_basis=2, l_max=2)
N_TWO = 10


def delta_model(blocks: int = 1, target: str = "delta") -> DensityModel:
    spec = ModelSpec(
        SMOOTH,
        {"Si": 4.0, "Ge": 4.0},
        NetworkSpec(blocks, 2, 12),
        density_mean=0.01,
        density_std=0.05,
        target=target,
    )
    n = SMOOTH.n_features
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = DensityNetwork(spec.network, n, spec.distance_columns(), initial_scale=0.2)
        net.feature_mean.uniform_(-1, 1)
        net.feature_std.uniform_(0.5, 1.5)
        net.feature_low.fill_(-4.0)
        net.feature_high.fill_(4.0)
        baseline = torch.zeros(n)
        baseline[:N_TWO] = torch.randn(N_TWO) * 0.1
    return DensityModel.from_network(spec, net, baseline if target == "delta" else None)


def features(n: int = 200) -> torch.Tensor:
    return torch.randn(n, SMOOTH.n_features, generator=torch.Generator().manual_seed(1)) * 1.5
