"""What a fine grid costs by interpolation instead of prediction, in time and in error.

``python benchmarks/refinement.py --json benchmarks/results/refinement.json``: snapshots of ``benchmarks/data`` that
the models have not seen, predicted at several steps, interpolated to half the step (`gpurho.refinement`) and compared
with a prediction of every point; and the same by a Fourier series over the whole cell. The measure is the model's own
error against DFT.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
CASES = {
    "Al 32, 315 K": ("al32.h5", "al", 1),
    "Al 32, 1866 K": ("al32.h5", "al", 50),
    "SiGe 64": ("sige64.h5", "sige", 19),
}
STEPS = (0.15, 0.2, 0.23, 0.27, 0.3)
"""Angstrom."""


def main() -> None:
    """Measure and print."""
    import gpurho.refinement as module
    from gpurho.datasets import open_dataset
    from gpurho.dft.grids import fourier_resample
    from gpurho.model import load_model
    from gpurho.pipelines.predict import predict
    from gpurho.units import BOHR

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # The limit is what this measures.
    module.LARGEST_STEP = 1.0
    rows = []
    for case, (file, name, number) in CASES.items():
        snapshot, model = open_dataset(DATA / file)[number], load_model(name)
        structure = snapshot.structure

        def run(spacing=None, grid=None, structure=structure, model=model):
            began = time.process_time()
            rho = predict(structure, model, spacing=spacing, grid=grid, uncertainty=None, progress=False)
            return rho, time.process_time() - began

        run(spacing=0.5)
        label = np.asarray(snapshot.density, dtype=float)
        own = _rms(np.asarray(run(grid=label.shape)[0].mean, dtype=float) - label)
        for step in STEPS:
            coarse, few = run(spacing=step)
            shape = tuple(2 * n for n in coarse.shape)
            fine, many = run(grid=shape)
            began = time.process_time()
            ours = np.asarray(module.refined(coarse, grid=shape).mean, dtype=float)
            seconds = time.process_time() - began
            every = np.asarray(fine.mean, dtype=float)
            series = fourier_resample(np.asarray(coarse.mean, dtype=float), shape)
            error = _rms(ours - every)
            rows.append(
                {
                    "case": case,
                    "step_angstrom": float(np.linalg.norm(structure.cell[0]) / coarse.shape[0]),
                    "points": int(np.prod(shape)),
                    "rmse_of_the_model_e_per_bohr3": own * BOHR**3,
                    "rms_of_interpolation_e_per_bohr3": error * BOHR**3,
                    "share": error / own,
                    "share_of_fourier_series": _rms(series - every) / own,
                    "l1_per_electron": float(np.abs(ours - every).sum() / every.sum()),
                    "largest_e_per_bohr3": float(np.abs(ours - every).max() * BOHR**3),
                    "cpu_seconds": {"every point": many, "coarse": few, "interpolation": seconds},
                    "times_as_fast": many / (few + seconds),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        record = {"date": str(date.today()), "machine": "2 cores of an AMD EPYC", "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


if __name__ == "__main__":
    main()
