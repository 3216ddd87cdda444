# %% [markdown]
# # A model of your own from five snapshots
#
# Labels are what costs: a DFT calculation of 32 atoms takes minutes, training takes seconds. So train early, on
# few snapshots, look at errors and error bars on others, and decide then whether more labels are worth their
# price.
#
# This needs `benchmarks/data/al32.h5` of a checkout of the repository: 60 snapshots of 32 aluminium atoms from
# 315 to 1866 K with their DFT densities. For data of your own see `gpurho label` (makes the labels), `gpurho
# collect` and `gpurho.formats.snapshot_from_density_file` (reads those that you have).
#
# Half a minute on one core of a laptop. Pictures go to the folder named by `GPURHO_PICTURES`, or `pictures`.

# %%
import json
import os
from pathlib import Path

import numpy as np

import gpurho
from gpurho.datasets import open_dataset, write_dataset
from gpurho.density import Density
from gpurho.pipelines.evaluate import evaluate
from gpurho.pipelines.train import train

pictures = Path(os.environ.get("GPURHO_PICTURES", "pictures"))
pictures.mkdir(parents=True, exist_ok=True)
here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
labels = open_dataset(here.parent / "benchmarks" / "data" / "al32.h5")

# %% [markdown]
# ## Five snapshots, from cold to hot
#
# Spread over temperature, so that four to train on span all that one is to be used for. The fifth, in the middle,
# is held back: it decides when to stop, and how wide the error bars are.

# %%
chosen = [0, 12, 24, 36, 48]
print("trained on", ", ".join(f"{labels.meta(i)['temperature_K']:.0f} K" for i in chosen))
five = write_dataset(pictures / "five.h5", [labels[i] for i in chosen])

# %% [markdown]
# ## Training
#
# Ten passes over 12,000 points of each snapshot. From the command line: `gpurho train five.h5 --epochs 10`.

# %%
result = train(five, pictures / "five.safetensors", test=[], validation=[2], epochs=10, progress=False, overwrite=True)
print(f"trained in {result.seconds:.0f} s")

# %% [markdown]
# ## How good is it?
#
# On four snapshots that neither this model nor the shipped one has seen: they are test snapshots of the latter,
# which was trained on 39. L1 is the integral of |error| over the number of electrons; coverage says how many
# errors lie within one, two and three sigmas, and should be 0.68, 0.95 and 1.00.

# %%
unseen = [5, 17, 33, 50]
reports = {
    name: evaluate(m, labels, snapshots=unseen, progress=False) for name, m in (("five", result.model), ("al", "al"))
}
print("model   L1 per electron   rms error, e/A^3   within 1 / 2 / 3 sigma")
for name, report in reports.items():
    total = report.total
    share = " / ".join(f"{c:.2f}" for c in total["coverage"])
    print(f"{name:5}   {total['l1_per_electron']:15.2%}   {total['rmse']:16.5f}   {share}")

# %% [markdown]
# Eight times the labels make the L1 error smaller by a third or more. The error bars of the small model say
# what they mean almost as well as those of the large one, except in its tails: one snapshot to
# calibrate on knows little of rare, large errors.
#
# ## Where does it err?
#
# One unseen snapshot against its label: signed error, and error in sigmas, on a plane; along a line; and the
# calibration over the whole cell. Pale on the right: the error bars cover the error; dark red: an error that the
# model did not see coming.

# %%
snapshot = labels[unseen[1]]
reference = Density(snapshot.grid, snapshot.structure, snapshot.density)
rho = gpurho.predict(snapshot.structure, model=result.path, grid=snapshot.grid.shape, progress=False)
rho.plot(pictures / "five_error.png", "error", reference=reference, atom=0)
a = snapshot.structure.positions[0]
b = a + np.array([8.0, 8.0, 0.0])
rho.plot(pictures / "five_line.png", "line", a=a, b=b, reference=reference)
rho.plot(pictures / "five_calibration.png", "calibration", reference=reference)

# %%
results = {
    "seconds": result.seconds,
    "l1": {name: report.total["l1_per_electron"] for name, report in reports.items()},
    "coverage": {name: report.total["coverage"] for name, report in reports.items()},
    "electrons": rho.electrons_predicted,
    "electrons_std": rho.electrons_std,
}
(pictures / "train_on_five_snapshots.json").write_text(json.dumps(results, indent=1) + "\n")
