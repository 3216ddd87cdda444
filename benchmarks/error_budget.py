"""Error budget of single precision: each stage of a prediction against float64, at random points of a structure.

The reference is float64 from end to end: descriptors by definition (`tests/oracles.py`), standardisation, network
and sums. Each row changes one stage to what predictions use and leaves the others in float64; the last rows change all.

    python benchmarks/error_budget.py --points 400 --json error_budget.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io import read
from numpy.typing import NDArray

from gpurho.descriptors import Environment
from gpurho.layers import transform_features
from gpurho.model import DensityModel, load_model
from gpurho.modelspec import ModelSpec
from gpurho.structure import Structure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles import smooth_features

F64 = NDArray[np.float64]


def features64(structure: Structure, spec: ModelSpec, points: F64) -> F64:
    """Descriptors by definition."""
    symbols = np.array(structure.to_ase().get_chemical_symbols())
    found = smooth_features(structure.positions, symbols, structure.cell, structure.pbc, points, spec.descriptor)
    return np.asarray(found, dtype=np.float64)


def standardised(model: DensityModel, features: F64, dtype: torch.dtype) -> F64:
    """Inputs of the network, found in `dtype`."""
    mean, std = (model.tensors[name].to(dtype) for name in ("feature_mean", "feature_std"))
    x = torch.as_tensor(features).to(dtype)
    columns = model.spec.distance_columns()
    if columns:
        x = transform_features(x, columns, float(model.spec.distance_length))
    # As `gpurho.evaluator` does it: one multiply-add.
    return np.asarray(torch.addcmul(-mean / std, x, 1.0 / std).double().numpy())


def network(model: DensityModel, inputs: F64, dtype: torch.dtype) -> tuple[F64, F64]:
    """Density without the two-body part, and the root of the variance over weights, e/angstrom^3, found in `dtype`."""
    with torch.inference_mode():
        out, variance = model.prediction_network(dtype, "analytic")(torch.as_tensor(inputs).to(dtype))
    mean = out[:, 0].double().numpy() * model.spec.density_std + model.spec.density_mean
    return mean, np.sqrt(np.maximum(variance.double().numpy(), 0.0)) * model.spec.density_std


def baseline(model: DensityModel, features: F64, dtype: torch.dtype) -> F64:
    """The two-body part, e/angstrom^3; zero for models of the density itself."""
    if model.baseline is None:
        return np.zeros(len(features))
    x = torch.as_tensor(features[:, : model.spec.n_two_body]).to(dtype)
    return np.asarray((x @ model.baseline.to(dtype)).double().numpy())


def budget(structure: Structure, model: DensityModel, points: F64) -> dict[str, dict[str, float]]:
    """Largest and root-mean-square error of density and sigma by stage, e/angstrom^3."""
    double, single = torch.float64, torch.float32
    exact = features64(structure, model.spec, points)
    fast = np.asarray(Environment(structure, model.spec.descriptor).point_features(points).values, np.float64)
    inputs = standardised(model, exact, double)
    mean, sigma = network(model, inputs, double)
    two_body = baseline(model, exact, double)
    want = mean + two_body

    def row(density: F64, spread: F64) -> dict[str, float]:
        errors = {"density": density - want, "sigma": spread - sigma}
        found = {f"{name}_largest": float(np.abs(e).max()) for name, e in errors.items()}
        return found | {f"{name}_rms": float(np.sqrt(np.mean(e**2))) for name, e in errors.items()}

    def with_inputs(x: F64, two: F64, dtype: torch.dtype) -> dict[str, float]:
        density, spread = network(model, x, dtype)
        return row(density + two, spread)

    rows = {
        "descriptors": with_inputs(standardised(model, fast, double), baseline(model, fast, double), double),
        "standardisation": with_inputs(standardised(model, exact, single), two_body, double),
        "two-body part": with_inputs(inputs, baseline(model, exact, single), double),
        "network, fp32": with_inputs(inputs, two_body, single),
        "network, bf16": with_inputs(inputs, two_body, torch.bfloat16),
    }
    # The library's own road, from atoms to the density; its sigmas are calibrated, so they have no reference here.
    for precision in ("fp32", "bf16"):
        evaluate = model.evaluator("cpu", precision, "analytic")
        density = evaluate(torch.as_tensor(fast, dtype=single))[0].double().numpy()
        rows[f"all, {precision}"] = {k: v for k, v in row(density, sigma).items() if k.startswith("density")}
    return rows


def integral_error(n: int, seed: int = 0) -> dict[str, float]:
    """Relative error of the sum of `n` float32 densities: the library's exact sums, and a plain float32 sum."""
    from gpurho.exactsums import to_float
    from gpurho.reductions import exact_sum

    values = np.random.default_rng(seed).uniform(0.0, 0.5, n).astype(np.float32)
    exact = math.fsum(values.tolist())
    ours = float(to_float(exact_sum(torch.as_tensor(values).double()).numpy().reshape(-1, 2))[0])
    plain = float(np.cumsum(values)[-1])
    return {"exact": abs(ours / exact - 1), "float32, one by one": abs(plain / exact - 1)}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| stage | density, largest | density, rms | sigma, largest |", "|---|---|---|---|"]
    for name, row in record["stages"].items():
        cells = [row.get(key) for key in ("density_largest", "density_rms", "sigma_largest")]
        lines.append(f"| {name} | " + " | ".join("-" if c is None else f"{c:.1e}" for c in cells) + " |")
    lines += [f"| integral, {name} (relative) | {value:.1e} | - | - |" for name, value in record["integral"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structure", type=Path, default=Path(__file__).parents[1] / "gpurho/data/al_vacancy.xyz")
    parser.add_argument("--model", default="al")
    parser.add_argument("--points", type=int, default=400)
    parser.add_argument("--sum-points", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    atoms = read(options.structure)
    assert not isinstance(atoms, list)  # one frame
    structure, model = Structure.from_ase(atoms), load_model(options.model)
    points = np.random.default_rng(0).uniform(size=(options.points, 3)) @ structure.cell
    record = {
        "unit": "e/angstrom^3",
        "structure": options.structure.name,
        "n_atoms": len(structure),
        "model": options.model,
        "points": options.points,
        "rms_density": model.density_rms,
        "stages": budget(structure, model, points),
        "integral": integral_error(options.sum_points),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
    }
    print(table(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
