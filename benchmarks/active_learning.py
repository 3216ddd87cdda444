"""Active learning on aluminium, as in Fig. 9 of the paper: a model finds the vacancy that it has never seen.

A model is trained on bulk aluminium (al32.h5). In 498 atoms at 400 K around a vacancy, ``gpurho suggest`` finds the
vacancy and cuts out a cell of at most 60 atoms. With that one cell added the model is trained again, and both models
are tested on the vacancies and divacancies of al_vacancies.h5, of which neither has seen anything.

    python benchmarks/active_learning.py --json benchmarks/results/active_learning.json

The structure was made by ``gpurho build vacancy Al --repeat 5 5 5 --a 4.05`` and ``gpurho sample --temperatures 400 400
--levels 1 --count 1 --equilibration 400 --pilot 400 --potential emt``, the label of al_suggested.h5 by ``gpurho label``
with Quantum ESPRESSO from what was suggested. ``--label`` computes the label anew, from what is suggested now.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
NEAR = 2.5
"""Points up to here from the centre of the vacancy are said to be at it, angstrom."""

TRAINING: dict[str, Any] = {
    "points_per_snapshot": 5000,
    "epochs": 15,
    "estimator": "none",
    "schedule": "one-cycle",
    "batch_size": 1024,
    "width": 48,
    "test_fraction": 0.1,
}
LAST_LAYER_POINTS, ADDED_POINTS = 2000, 20_000
"""Of each snapshot of bulk, and of the one that was asked for, for the posterior of the last layer.

Few points lie at the vacancy: of 2000 about 50, which with a tempering of 0.01 are half an observation, and sigma at
single vacancies stays what it was (ratio 1.01). Ten times as many are still one observation in 5 angstrom^3 of the
cell, far fewer than the volumes of 0.6 angstrom^3 within which errors go together.
"""

SHOWN = 1
"""Snapshot of al_vacancies.h5 in the figure: one vacancy, 624 K."""

STEPS = 40
"""Points along each cell vector among which the centre of a vacancy is looked for."""


def centre_of_vacancy(structure: Any) -> np.ndarray:
    """Where the density of atoms, each smeared out by 1.2 angstrom, is lowest."""
    from gpurho.kernels.celllist import atoms_around, bin_atoms

    axis = np.arange(STEPS) / STEPS
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3) @ structure.cell
    atoms, _ = atoms_around(bin_atoms(structure.positions, structure.cell, structure.pbc), points, 5.0)
    crowd = np.zeros(len(points))
    for atom in atoms:
        crowd += np.exp(-np.square(points - atom).sum(1) / (2 * 1.2**2))
    return np.asarray(points[crowd.argmin()])


def distances(structure: Any, points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """From the nearest image of `centre`."""
    from ase.geometry import find_mic

    return np.asarray(find_mic(points - centre, structure.cell, structure.pbc)[1])


def train_model(path: Path, datasets: list[Path]) -> Any:
    """A model with a calibrated posterior of its last layer; taken from `path` where it is there."""
    import torch

    from gpurho.calibration import calibrate
    from gpurho.datasets import open_dataset
    from gpurho.lastlayer import HeldOut, fit_last_layer
    from gpurho.model import load_model
    from gpurho.pipelines.evaluate import recorded_split
    from gpurho.pipelines.train import train
    from gpurho.trainingset import sample_points

    if path.exists():
        return load_model(path)
    raw = path.with_suffix(".raw.safetensors")
    if not raw.exists():
        train(datasets, raw, threads=1, progress=False, **TRAINING)
    model = load_model(raw)

    def points(use: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        drawn = []
        for number, data in enumerate(map(open_dataset, datasets)):
            for i in recorded_split(model, data)[use]:
                n = ADDED_POINTS if number else LAST_LAYER_POINTS
                drawn.append(sample_points(data[i], model.spec.descriptor, n, (0, i)))
        features, density = (np.concatenate([pair[k] for pair in drawn]) for k in (0, 1))
        groups = np.repeat(np.arange(len(drawn)), [len(y) for _, y in drawn])
        return torch.from_numpy(features), torch.from_numpy(density), groups

    held = points("validation")
    model = fit_last_layer(model, *points("train")[:2], held_out=HeldOut(*held[:2]))
    model = calibrate(model, *held, "last-layer")
    model.save(path)
    return model


def test(model: Any, data: Any, indices: list[int], vacancies: bool) -> dict[str, Any]:
    """Errors and epistemic sigma over snapshots, at the vacancies and away from them, e/angstrom^3."""
    from gpurho.pipelines.predict import predict

    rows = []
    for i in indices:
        snapshot = data[i]
        rho = predict(
            snapshot.structure, model, grid=snapshot.grid, uncertainty="last-layer", device="cpu", progress=False
        )
        error = np.asarray(rho.mean, np.float64) - snapshot.density
        sigma = np.asarray(rho.epistemic, np.float64)
        row = {"snapshot": i, "atoms": len(snapshot.structure), "temperature_K": snapshot.meta["temperature_K"]}
        row["l1_per_electron"] = float(np.abs(error).sum() * snapshot.grid.dv / snapshot.electrons)
        parts = {"all": np.ones(error.size, bool)}
        if vacancies:
            centre = centre_of_vacancy(snapshot.structure)
            near = distances(snapshot.structure, snapshot.grid.points(), centre) < NEAR
            parts = {"at": near, "away": ~near}
            row["centre"] = centre.round(3).tolist()
        for name, where in parts.items():
            row[f"rmse_{name}"] = float(np.sqrt(np.mean(error.ravel()[where] ** 2)))
            row[f"sigma_{name}"] = float(np.sqrt(np.mean(sigma.ravel()[where] ** 2)))
        rows.append(row)
    names = [k for k in rows[0] if k.startswith(("rmse", "sigma", "l1"))]
    # Geometric means: one snapshot, of a divacancy, has ten times the sigma of the others.
    return {"mean": {k: float(np.exp(np.mean([np.log(r[k]) for r in rows]))) for k in names}, "snapshots": rows}


def ask(model: Any, structure: Path, out: Path | None = None) -> dict[str, Any]:
    """What `gpurho suggest` says of the large structure."""
    from ase.io import read

    from gpurho.activelearning import atom_scores
    from gpurho.pipelines.predict import predict
    from gpurho.pipelines.suggest import SCAN_SPACING, suggest
    from gpurho.structure import Structure

    atoms = Structure.from_ase(read(structure))
    training = [DATA / "al32.h5"] if out is not None else [DATA / "al32.h5", DATA / "al_suggested.h5"]
    found = suggest(structure, model, training=training, max_atoms=60, out=out, progress=False, overwrite=True)
    centre = centre_of_vacancy(atoms)
    with predict(atoms, model, spacing=SCAN_SPACING, uncertainty="last-layer", progress=False) as rho:
        scores = atom_scores(rho)
    away = distances(atoms, atoms.positions, centre)
    return {
        "atoms": len(atoms),
        "centre_of_vacancy": centre.round(3).tolist(),
        "sigma_of_neighbours": float(np.median(scores[away < 3.6])),
        "sigma_of_others": float(np.median(scores[away >= 3.6])),
        "suggestions": [
            {"distance_from_vacancy": float(distances(atoms, s.position[None], centre)[0]), **s.record()} for s in found
        ],
    }


def draw(path: Path, before: Any, after: Any, data: Any, results: dict[str, Any]) -> None:
    """Errors and sigma in a plane through a vacancy, the density along a line, and the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gpurho.density import Density
    from gpurho.pipelines.predict import predict

    snapshot = data[SHOWN]
    structure, grid = snapshot.structure, snapshot.grid
    centre = centre_of_vacancy(structure)
    z = float(centre @ np.linalg.inv(structure.cell)[:, 2]) % 1.0
    truth = Density(grid, structure, snapshot.density)
    fields = [
        predict(structure, model, grid=grid, uncertainty="last-layer", device="cpu", progress=False)
        for model in (before, after)
    ]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4)
    length = np.linalg.norm(structure.cell, axis=1)
    layer = round(z * grid.shape[2]) % grid.shape[2]
    errors = [np.abs(np.asarray(f.mean)[:, :, layer] - snapshot.density[:, :, layer]) for f in fields]
    sigmas = [np.asarray(f.epistemic)[:, :, layer] for f in fields]
    for row, (planes, what) in enumerate(((errors, "absolute error"), (sigmas, "epistemic sigma"))):
        top = 1e3 * float(np.quantile(planes[0], 0.999))
        for column, name in enumerate(("before", "after")):
            ax = axes[row, column]
            image = ax.imshow(
                1e3 * planes[column].T, origin="lower", vmin=0, vmax=top, extent=(0, length[0], 0, length[1])
            )
            x, y, _ = (centre @ np.linalg.inv(structure.cell) % 1.0) * length
            ax.plot(x, y, "+", color="w", markersize=12)
            ax.set(title=f"{what}, {name}", xlabel="x, Å", ylabel="y, Å")
        figure.colorbar(image, ax=axes[row, :2].tolist(), label="10$^{-3}$ e/Å$^3$", shrink=0.8)
    a, b = centre - 0.5 * structure.cell[0], centre + 0.5 * structure.cell[0]
    x = np.linspace(-0.5, 0.5, 200) * length[0]
    exact = truth.line(a, b, 200).mean
    for column, name in enumerate(("before", "after")):
        ax = axes[0, 2 + column]
        line = fields[column].line(a, b, 200)
        sigma = np.hypot(line.aleatoric, line.epistemic)
        ax.fill_between(x, -3e3 * sigma, 3e3 * sigma, alpha=0.3, label="±3 sigma")
        ax.plot(x, 1e3 * (line.mean - exact), "k", label="error")
        ax.set(title=f"through the vacancy, {name}", xlabel="from its centre, Å", ylabel="10$^{-3}$ e/Å$^3$")
        ax.legend(fontsize="small")
    low = min(ax.get_ylim()[0] for ax in axes[0, 2:])
    for ax in axes[0, 2:]:
        ax.set_ylim(low, -low)
    for ax, what, title in ((axes[1, 2], "rmse", "RMSE"), (axes[1, 3], "sigma", "epistemic sigma")):
        for k, name in enumerate(("before", "after")):
            mean = results[name]["vacancies"]["mean"]
            values = [1e3 * mean[f"{what}_{where}"] for where in ("at", "away")]
            ax.bar(np.arange(2) + 0.4 * k, values, 0.35, label=name)
        ax.set_xticks([0.2, 1.2], ["at the vacancies", "away from them"])
        ax.set(title=f"{title}, {len(data)} snapshots", ylabel="10$^{-3}$ e/Å$^3$")
        ax.legend(fontsize="small")
    cell = results["suggested_atoms"]
    figure.suptitle(f"Al 107 with a vacancy, 624 K: trained on bulk Al 32, and with one suggested cell of {cell} atoms")
    figure.savefig(path, dpi=110)


def label(suggestions: Path) -> None:
    """Compute what was suggested with Quantum ESPRESSO."""
    import subprocess
    import sys

    out = DATA / "al_suggested.h5"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpurho", "label", str(suggestions), "--out", str(out), "--engine", "qe"]
    subprocess.run([*command, "--workers", "1"], check=True)


def run(folder: Path, anew: bool, figure: Path | None) -> dict[str, Any]:
    """All of it; models are taken from `folder` where they are there."""
    from gpurho.datasets import open_dataset

    started = time.perf_counter()
    structure = DATA / "structures" / "al499_vacancy.xyz"
    bulk, vacancies = open_dataset(DATA / "al32.h5"), open_dataset(DATA / "al_vacancies.h5")
    before = train_model(folder / "before.safetensors", [DATA / "al32.h5"])
    asked = ask(before, structure, folder / "suggestions")
    print(*(s["reason"] for s in asked["suggestions"]), sep="\n", flush=True)
    if anew:
        label(folder / "suggestions" / "suggestions.xyz")
    after = train_model(folder / "after.safetensors", [DATA / "al32.h5", DATA / "al_suggested.h5"])
    asked_again = ask(after, structure)
    held = [int(row["snapshot"]) for row in before.spec.training["split"]["test"]]
    results: dict[str, Any] = {
        "training": TRAINING,
        "suggested_atoms": len(open_dataset(DATA / "al_suggested.h5")[0].structure),
    }
    for name, model, question in (("before", before, asked), ("after", after, asked_again)):
        results[name] = {
            "large_structure": question,
            "vacancies": test(model, vacancies, list(range(len(vacancies))), True),
            "bulk": test(model, bulk, held, False),
        }
    results["seconds"] = time.perf_counter() - started
    if figure is not None:
        draw(figure, before, after, vacancies, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Geometric means over the snapshots, before and after."""
    lines = [f"{'e/angstrom^3, held out':34} {'before':>10} {'after':>10} {'ratio':>6}"]
    for title, group, key in (
        ("RMSE at the vacancies", "vacancies", "rmse_at"),
        ("RMSE away from them", "vacancies", "rmse_away"),
        ("epistemic sigma at the vacancies", "vacancies", "sigma_at"),
        ("epistemic sigma away from them", "vacancies", "sigma_away"),
        ("L1 per electron, vacancies", "vacancies", "l1_per_electron"),
        ("L1 per electron, bulk Al 32", "bulk", "l1_per_electron"),
    ):
        first, second = (results[name][group]["mean"][key] for name in ("before", "after"))
        lines.append(f"{title:34} {first:10.3e} {second:10.3e} {second / first:6.2f}")
    for name in ("before", "after"):
        asked = results[name]["large_structure"]
        lines.append(
            f"{asked['atoms']} atoms, {name}: sigma of the vacancy's neighbours"
            f" {asked['sigma_of_neighbours'] / asked['sigma_of_others']:.2f} times that of others;"
            f" suggestions at {[round(s['distance_from_vacancy'], 2) for s in asked['suggestions']]} angstrom from it"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", action="store_true", help="compute the label anew (Quantum ESPRESSO, 10 minutes)")
    parser.add_argument("--folder", type=Path, help="keep the models and suggestions there, and go on from them")
    parser.add_argument("--json", type=Path, help="figures; the plot gets the same name with .png")
    args = parser.parse_args()
    figure = args.json and args.json.with_suffix(".png")
    if args.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            results = run(Path(folder), args.label, figure)
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        results = run(args.folder, args.label, figure)
    print(table(results))
    if args.json:
        from predict import machine

        args.json.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
