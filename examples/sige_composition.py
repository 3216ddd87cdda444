# %% [markdown]
# # Silicon-germanium across composition: how far does a model reach?
#
# The model `sige` has seen 32 Si and 32 Ge atoms, shuffled and heated, and nothing else. An alloy of another
# composition is an extrapolation of a special kind: every atom is known, its neighbourhoods less so. Here the
# composition goes from pure silicon to pure germanium, and we watch what the error bars say.
#
# Half a minute on one core of a laptop. Pictures go to the folder named by `GPURHO_PICTURES`, or `pictures`.

# %%
import json
import os
from pathlib import Path

import numpy as np

import gpurho
from gpurho.builders import alloy, rattled
from gpurho.plotstyle import LINES, UNIT, new_figure, save, style

pictures = Path(os.environ.get("GPURHO_PICTURES", "pictures"))
pictures.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Seven alloys of 64 atoms
#
# Random arrangements on the diamond lattice, with the lattice constant of Vegard's law, shaken by 0.08 angstrom.
# One prediction each, on a coarse grid.

# %%
shares = np.array([0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1.0])
predictions = {}
for share in shares:
    fractions = {"Si": 1 - share, "Ge": share}
    atoms = rattled(alloy({k: v for k, v in fractions.items() if v > 0}, (2, 2, 2), seed=4), 0.08, seed=5)
    predictions[share] = gpurho.predict(atoms, model="sige", spacing=0.37, progress=False)

# %% [markdown]
# ## What the error bars say
#
# Electrons: four for each atom, whatever the element, so 256. Each prediction should meet that within three error
# bars. Epistemic sigma: least where the training data is, and it should grow to either side.

# %%
print(" Ge/%   electrons (256 there are)   epistemic   aleatoric  (rms, 1e-3 e/A^3)")
rows = []
for share, rho in predictions.items():
    sigma = {n: 1e3 * float(np.sqrt(np.mean(np.square(getattr(rho, n))))) for n in ("epistemic", "aleatoric")}
    rows.append((rho.electrons_predicted, rho.electrons_std, sigma["epistemic"], sigma["aleatoric"]))
    total, error, unknown, noise = rows[-1]
    print(f"{100 * share:5.1f}   {total:9.2f} +- {error:.2f}            {unknown:9.2f}   {noise:9.2f}")
electrons, errors, epistemic, aleatoric = np.array(rows).T

with style():
    figure = new_figure(3.5, 2.5)
    panel = figure.subplots()
    for name, values in (("epistemic", epistemic), ("aleatoric", aleatoric)):
        panel.plot(100 * shares, values, "o-", markersize=3, color=LINES[name], label=f"{name} $\\sigma$")
    panel.set(xlabel="germanium (%)", ylabel=f"rms over the cell (10$^{{-3}}$ {UNIT})", ylim=(0, None))
    panel.legend()
    save(figure, pictures / "sige_composition.png")

# %% [markdown]
# ## What the density says: bonds
#
# In the alloy of equal parts there are three kinds of bonds. The density in the middle of each, with its error
# bar, read off the grid by cubic interpolation (`rho.at`). The kinds differ by a few thousandths, about the sigma
# of a single point; from bond to bond the density differs ten times as much, and that is real, far beyond sigma:
# the shaking makes bonds shorter and longer.

# %%
rho = predictions[0.5]
structure = rho.structure
vectors = structure.positions[None] - structure.positions[:, None]
fractional = vectors @ np.linalg.inv(structure.cell)
vectors = (fractional - np.rint(fractional)) @ structure.cell
first, second = np.nonzero(np.triu(np.linalg.norm(vectors, axis=-1) < 2.9, 1))
middles = structure.positions[first] + 0.5 * vectors[first, second]
mean, aleatoric_there, epistemic_there = rho.at(middles)
sigma = np.hypot(aleatoric_there, epistemic_there)
kinds = np.sort(structure.numbers[np.stack([first, second])], axis=0)
bonds = {}
for name, pair in (("Si-Si", (14, 14)), ("Si-Ge", (14, 32)), ("Ge-Ge", (32, 32))):
    chosen = (kinds[0] == pair[0]) & (kinds[1] == pair[1])
    lengths = np.linalg.norm(vectors[first[chosen], second[chosen]], axis=-1)
    bonds[name] = (
        int(chosen.sum()),
        float(mean[chosen].mean()),
        float(mean[chosen].std()),
        float(sigma[chosen].mean()),
    )
    n, middle, spread, error = bonds[name]
    print(f"{n:3d} {name} bonds: {middle:.3f} e/A^3 in the middle, {spread:.3f} from bond to bond, sigma {error:.4f};")
    print(f"    correlation with length {np.corrcoef(lengths, mean[chosen])[0, 1]:.2f}")

# %% [markdown]
# ## Pictures
#
# The (110) plane of the alloy with equal parts and of pure germanium, on the same scales, so that colours can be
# compared: chains of atoms and their bonds, and beside it the total sigma. Sigma is larger all over in germanium.

# %%
scales = {"mean": (0.0, 0.6), "std": (0.0, 1e-3 * np.ceil(1e3 * float(np.max(predictions[1.0].std))))}
for share in (0.5, 1.0):
    here = predictions[share]
    name = pictures / f"sige_110_{100 * share:.0f}.png"
    here.plot(name, plane=(1, 1, 0), atom=0, fields=("mean", "std"), limits=scales)

# %%
results = {
    "germanium": shares.tolist(),
    "electrons": electrons.tolist(),
    "electrons_std": errors.tolist(),
    "epistemic": (1e-3 * epistemic).tolist(),
    "bonds": bonds,
}
(pictures / "sige_composition.json").write_text(json.dumps(results, indent=1) + "\n")
