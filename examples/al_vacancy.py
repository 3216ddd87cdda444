# %% [markdown]
# # A vacancy in aluminium: the density, and where not to trust it
#
# One atom is missing from 108. The model `al` was trained on crystals of 32 atoms without a single vacancy, so
# this is a fair question to its error bars: do they say that the hole is something new?
#
# Half a minute on one core of a laptop. Pictures go to the folder named by `GPURHO_PICTURES`, or `pictures`.

# %%
import json
import os
from pathlib import Path

import numpy as np

import gpurho
from gpurho.builders import crystal, rattled, vacancy

pictures = Path(os.environ.get("GPURHO_PICTURES", "pictures"))
pictures.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The structure
#
# Three by three by three cubic cells, without the atom nearest to the middle, all others shaken by 0.08 angstrom.
# Any `ase.Atoms` will do in its place: `ase.io.read("my.cif")`.

# %%
perfect = crystal("Al", (3, 3, 3))
broken = vacancy(perfect)
distance = np.linalg.norm(perfect.positions[:, None] - broken.positions[None], axis=-1).min(axis=1)
hole = perfect.positions[np.argmax(distance)]
atoms = rattled(broken, 0.08, seed=1)
print(f"{len(atoms)} atoms, the hole at {np.round(hole, 3)}")

# %% [markdown]
# ## The density
#
# One call. `spacing` is the distance of grid points in angstrom: 0.25 is coarse and quick, leave it out for a
# grid as fine as that of the labels. What comes back is a field with two standard deviations in every point:
# *aleatoric*, the noise of the training data, and *epistemic*, what the network does not know.

# %%
rho = gpurho.predict(atoms, spacing=0.25, progress=False)
valence = 3 * len(atoms)
print(rho)
print(f"{rho.electrons_predicted:.2f} +- {rho.electrons_std:.2f} electrons predicted, {valence} there are")

# %% [markdown]
# The integral is not imposed: that it comes out within its error bar is a first check. (`conserve="uniform"`
# scales the density so that it is exact.)
#
# ## Pictures
#
# A plane through the hole, (001) and (110); a line through it along a close-packed row, with three sigmas to
# either side. The lower panel has the band on a scale of its own: it widens around the hole, and its epistemic
# part is widest in it.

# %%
edge = atoms.cell[0, 0]
row = np.array([1.0, 1.0, 0.0]) * edge / 2
rho.plot(pictures / "al_vacancy_001.png", position=hole[2] / edge, line=(hole - row, hole + row))
rho.plot(pictures / "al_vacancy_110.png", plane=(1, 1, 0), point=hole)
rho.plot(pictures / "al_vacancy_line.png", "line", a=hole - row, b=hole + row)
rho.plot(pictures / "al_vacancy_histogram.png", "histogram")

# %% [markdown]
# ## Numbers
#
# Sigma against the distance from the hole. Periodic images count: the shortest distance is meant.


# %%
def from_hole(points: np.ndarray) -> np.ndarray:
    """Distance of points from the nearest image of the hole, angstrom."""
    fractional = (points - hole) @ np.linalg.inv(atoms.cell.array)
    return np.linalg.norm((fractional - np.rint(fractional)) @ atoms.cell.array, axis=-1)


r = from_hole(rho.grid.points())
fields = {name: np.asarray(getattr(rho, name)).ravel() for name in ("mean", "aleatoric", "epistemic")}
print("distance/A   points   density  aleatoric  epistemic   (e/A^3)")
for low, high in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)):
    ring = (r >= low) & (r < high)
    values = [float(f[ring].mean()) for f in fields.values()]
    print(f"{low:4d} - {high:<4d} {ring.sum():8d}  {values[0]:8.4f}  {values[1]:9.5f}  {values[2]:9.5f}")
inside, bulk = fields["epistemic"][r < 1.4].mean(), fields["epistemic"][r > 5.0].mean()
print(f"in the hole epistemic sigma is {inside / bulk:.1f} times that of the bulk")

# %% [markdown]
# How much charge is left in the hole? The density integrated over the sphere that one atom of the crystal has for
# itself, here and, for comparison, around an atom of the bulk.
#
# `electrons_std` of a part of the cell has no closed form here, so points count as fully correlated: an upper
# bound.

# %%
radius = (3 * (edge**3 / 108) / (4 * np.pi)) ** (1 / 3)
sphere = r < radius
electrons = float(fields["mean"][sphere].sum() * rho.grid.dv)
bound = float((fields["aleatoric"] + fields["epistemic"])[sphere].sum() * rho.grid.dv)
print(
    f"{electrons:.2f} (at most +- {bound:.2f}) electrons within {radius:.2f} A of the hole; an atom of the bulk has 3"
)

# %% [markdown]
# The same for every atom: electrons of the points nearest to it, and their sigma. The neighbours of the hole lead
# the list. Written as extended xyz, OVITO colours the atoms by it.

# %%
charges = rho.per_atom()
atoms.arrays["electrons"], atoms.arrays["electrons_std"] = charges.electrons, charges.electrons_std
order = np.argsort(-charges.electrons_std)
print("least sure of: " + ", ".join(f"atom {i} ({from_hole(atoms.positions[i]):.1f} A away)" for i in order[:6]))
atoms.write(pictures / "al_vacancy_atoms.xyz", format="extxyz")

# %%
results = {
    "electrons": rho.electrons_predicted,
    "electrons_std": rho.electrons_std,
    "valence": valence,
    "epistemic_in_the_hole": float(inside),
    "epistemic_in_the_bulk": float(bulk),
    "electrons_in_the_hole": electrons,
    "distance_of_the_least_sure": float(from_hole(atoms.positions[order[:6]]).mean()),
}
(pictures / "al_vacancy.json").write_text(json.dumps(results, indent=1) + "\n")
