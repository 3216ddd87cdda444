"""What is left of the errors of a model, and whether better error bars could rank them.

    pip install scikit-learn
    python benchmarks/error_limits.py al benchmarks/data/al32.h5 --json benchmarks/results/error_limits_al.json

On snapshots that were not trained on: Spearman's correlation of the absolute error with the model's sigma, with sigma
scaled to the true error of each snapshot, and with gradient boosting on the descriptors, which is fitted to the errors
of held-out snapshots themselves and judged on others of them (five parts, by snapshot). Then the share of the squared
error in waves longer than some lengths, and the share that a sum of functions of the distance to each atom, of any
range and fitted to the errors of the other held-out snapshots, would take away.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 4000
WAVES = (1.0, 1.4, 2.0, 2.7, 4.0)
"""Angstrom."""
SHELLS = np.arange(0.0, 6.01, 0.25)
"""Ends of the shells of wave numbers in which such a function is constant, 1/angstrom."""


def long_waves(error: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Share of the squared error in waves longer than each of `WAVES`."""
    power = np.abs(np.fft.fftn(error)) ** 2
    index = np.stack(np.meshgrid(*(np.fft.fftfreq(n) * n for n in error.shape), indexing="ij"), -1)
    per_angstrom = np.linalg.norm(index @ np.linalg.inv(cell).T, axis=-1)
    return np.array([power[per_angstrom < 1 / length].sum() for length in WAVES]) / power.sum()


def two_body_parts(error: np.ndarray, structure: Any) -> np.ndarray:
    """By shell of wave numbers: error times the atoms' waves, these squared; a function of distances is their ratio."""
    cell = structure.cell
    index = np.stack(np.meshgrid(*(np.fft.fftfreq(n) * n for n in error.shape), indexing="ij"), -1)
    wave = 2 * np.pi * index @ np.linalg.inv(cell).T
    length = np.linalg.norm(wave, axis=-1)
    inside = (length > 0) & (length < SHELLS[-1])
    found = (np.fft.fftn(error) / error.size)[inside]
    atoms = np.exp(-1j * wave[inside] @ structure.positions.T).sum(1) / abs(np.linalg.det(cell))
    shell = np.digitize(length[inside], SHELLS) - 1
    parts = ((found * atoms.conj()).real, np.abs(atoms) ** 2)
    return np.array([np.bincount(shell, part, len(SHELLS) - 1) for part in parts])


def taken_away(parts: np.ndarray, squares: np.ndarray) -> float:
    """Share of the squared error, snapshot by snapshot with the function that the others give; parts (n, 2, shells)."""
    gain = 0.0
    for i, (product, power) in enumerate(parts):
        others = np.delete(parts, i, axis=0).sum(0)
        function = others[0] / np.maximum(others[1], 1e-300)
        gain += float((2 * function * product - function**2 * power).sum())
    return gain / float(squares.sum())


def main() -> None:
    """Measure, and write the JSON."""
    import torch
    from scipy.stats import spearmanr
    from sklearn.ensemble import HistGradientBoostingRegressor

    from gpurho.datasets import open_dataset
    from gpurho.descriptors import Environment
    from gpurho.model import load_model
    from gpurho.partition import make_tiles
    from gpurho.pipelines.evaluate import recorded_split

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model, data = load_model(options.model), open_dataset(options.dataset)
    recorded = recorded_split(model, data)
    held = sorted([*recorded["test"], *recorded["validation"]])
    evaluate = model.evaluator(uncertainty="analytic", precision="fp32")
    rng = np.random.default_rng(0)
    features, errors, sigmas, owners, waves, squares, parts = [], [], [], [], [], [], []
    for i in held:
        snapshot = data[i]
        environment = Environment(snapshot.structure, model.spec.descriptor)
        error, sigma = np.zeros(snapshot.density.shape), np.zeros(snapshot.density.shape)
        for tile in make_tiles(snapshot.grid):
            values = torch.from_numpy(environment.tile_features(snapshot.grid, tile).values)
            mean, aleatoric, epistemic = (part.numpy().reshape(tile.shape) for part in evaluate(values))
            error[tile.slices] = mean - snapshot.density[tile.slices]
            sigma[tile.slices] = np.hypot(aleatoric, epistemic)
        waves.append(long_waves(error, snapshot.structure.cell))
        squares.append(np.mean(error**2))
        parts.append(two_body_parts(error, snapshot.structure))
        drawn = np.sort(rng.permutation(error.size)[:POINTS])
        features.append(environment.point_features(snapshot.grid.points()[drawn]).values)
        errors.append(np.abs(error.ravel()[drawn]))
        sigmas.append(sigma.ravel()[drawn])
        owners.append(np.full(POINTS, i))
    error, sigma, owner = (np.concatenate(parts) for parts in (errors, sigmas, owners))
    inputs = np.column_stack([np.concatenate(features), np.log(sigma)])
    true = np.concatenate(
        [np.full(POINTS, np.sqrt(np.mean(e**2) / np.mean(s**2))) for e, s in zip(errors, sigmas, strict=True)]
    )
    boosted = np.zeros(len(error))
    for k in range(5):
        judged = np.isin(owner, held[k::5])
        trees = HistGradientBoostingRegressor(max_iter=150, learning_rate=0.06, min_samples_leaf=200)
        boosted[judged] = trees.fit(inputs[~judged], np.log(error[~judged] + 1e-5)).predict(inputs[judged])
    share = np.average(waves, axis=0, weights=squares)
    record: dict[str, Any] = {
        "model": options.model,
        "snapshots": len(held),
        "spearman": {
            "sigma": spearmanr(error, sigma)[0],
            "sigma scaled to the true error of each snapshot": spearmanr(error, sigma * true)[0],
            "gradient boosting on held-out errors": spearmanr(error, boosted)[0],
            "sigma, mean over snapshots": float(
                np.mean([spearmanr(e, s)[0] for e, s in zip(errors, sigmas, strict=True)])
            ),
        },
        "share of squared error that two-body functions of any range take": taken_away(
            np.array(parts), np.array(squares)
        ),
        "share of squared error in longer waves": dict(zip(map(str, WAVES), share.tolist(), strict=True)),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
