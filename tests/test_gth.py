"""GTH-PBE potentials, free atoms and UPF files against closed forms and independent readers."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import spherical_jn

from gpurho.dft.gth import free_atom, gth, valence_electrons
from gpurho.dft.upf import STEP, upf_text
from gpurho.errors import UnknownSpeciesError

SPECIES = ("Al", "Si", "Ge", "O", "Cu")


def test_the_published_parameters_of_aluminium():
    al = gth("Al")
    assert (al.valence, al.r_local, al.c) == (3, 0.45, (-7.55476126,))
    assert al.channels[0].h == ((6.95993832, -1.88883584), (-1.88883584, 2.43847659))
    assert valence_electrons(["Al", "Si", "Ge", "Ge"]) == 15


def test_an_element_without_a_potential_is_named():
    with pytest.raises(UnknownSpeciesError, match="'Xx'"):
        gth("Xx")


@pytest.mark.parametrize("symbol", SPECIES)
def test_projectors_have_unit_norm(symbol):
    p = gth(symbol)
    for channel in p.channels:
        for i in range(len(channel.h)):
            norm = quad(lambda r, c=channel, i=i: float((r * p.projector(c, i, np.array(r))) ** 2), 0, 20)[0]
            assert norm == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("symbol", SPECIES)
@pytest.mark.parametrize("q", [0.5, 2.0, 5.0])
def test_the_local_part_has_the_published_fourier_transform(symbol, q):
    # Equation 5 of Goedecker, Teter and Hutter (1996), the polynomial's part: only even powers, Gaussian integrals.
    p = gth(symbol)
    x = q * p.r_local
    forms = [1, 3 - x**2, 15 - 10 * x**2 + x**4, 105 - 105 * x**2 + 21 * x**4 - x**6]
    short = (
        (2 * np.pi) ** 1.5 * p.r_local**3 * np.exp(-(x**2) / 2) * sum(c * f for c, f in zip(p.c, forms, strict=False))
    )
    expected = -4 * np.pi * p.valence / q**2 * np.exp(-(x**2) / 2) + short

    def integrand(r):
        # Without the Coulomb tail, whose transform is -4 pi Z / q^2.
        return 4 * np.pi * r**2 * spherical_jn(0, q * r) * float(p.local(np.array(r)) + p.valence / r)

    found = quad(integrand, 1e-9, 12, limit=400)[0] - 4 * np.pi * p.valence / q**2
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("symbol", ["Al", "Si", "Ge"])
def test_free_atoms_hold_their_electrons_in_normalised_shells(symbol):
    atom = free_atom(symbol)
    assert 4 * np.pi * (atom.density * atom.r**2).sum() * 0.01 == pytest.approx(gth(symbol).valence, rel=1e-6)
    assert (atom.density >= 0).all()
    for _, _, u in atom.orbitals:
        assert (u**2).sum() * 0.01 == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("symbol", SPECIES)
def test_upf_files_say_what_the_parameters_say(symbol):
    p, root = gth(symbol), ET.fromstring(upf_text(symbol))

    def numbers(name):
        element = root.find(name)
        values = np.array(element.text.split(), float)
        assert len(values) == int(element.get("size"))
        return values

    r = numbers("PP_MESH/PP_R")
    header = root.find("PP_HEADER")
    assert float(header.get("z_valence")) == p.valence
    assert int(header.get("mesh_size")) == len(r)
    assert int(header.get("number_of_proj")) == sum(len(c.h) for c in p.channels)
    # Far out the local potential is that of the ion, -2 Z / r in Rydberg.
    np.testing.assert_allclose(numbers("PP_LOCAL")[-100:], -2 * p.valence / r[-100:], rtol=1e-10)
    d = numbers("PP_NONLOCAL/PP_DIJ").reshape(-1, int(header.get("number_of_proj")))
    np.testing.assert_array_equal(d, d.T)
    assert d[0, 0] == pytest.approx(2 * p.channels[0].h[0][0])
    for i in range(1, len(d) + 1):
        beta = numbers(f"PP_NONLOCAL/PP_BETA.{i}")
        assert (beta**2).sum() * STEP == pytest.approx(1, abs=1e-6)
        assert int(root.find(f"PP_NONLOCAL/PP_BETA.{i}").get("cutoff_radius_index")) % 2 == 1
    assert numbers("PP_RHOATOM").sum() * STEP == pytest.approx(p.valence, rel=1e-6)
