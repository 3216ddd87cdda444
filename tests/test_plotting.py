"""Pictures: what is drawn where, and that no global state is touched."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure, wave

from gpurho import plotting
from gpurho.density import Density
from gpurho.errors import FormatError, SettingsError, StoreError
from gpurho.grid import Grid


@pytest.fixture(scope="module")
def density():
    structure = triclinic_structure()
    grid = Grid((14, 16, 18), TRICLINIC)
    mean = wave(grid, structure).astype(np.float32)
    return Density(grid, structure, mean, 0.1 * mean, 0.05 * mean)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_writes_files(density, tmp_path, suffix):
    path = tmp_path / f"slice.{suffix}"
    density.plot(path)
    assert path.stat().st_size > 5000
    assert not sys.modules.get("matplotlib.pyplot") or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_panels_and_scales(density):
    figure = density.plot(axis=1, position=0.25)
    assert [p.get_title() for p in panels(figure)] == [plotting.TITLES[n] for n in ("mean", "aleatoric", "epistemic")]
    section = density.slice(1, 0.25)
    for panel, values in zip(panels(figure), (section.mean, section.aleatoric, section.epistemic), strict=True):
        mesh = panel.collections[0]
        np.testing.assert_allclose(mesh.get_array().reshape(values.shape), values)
        assert panel.get_aspect() == 1
        x, _ = section.coordinates()
        assert panel.get_xlim() == pytest.approx((x.min(), x.max()))
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel().startswith("e/")]
    assert labels == ["e/angstrom$^3$"] * 3


def test_mean_alone_and_any_plane(density):
    bare = Density(density.grid, density.structure, density.mean)
    assert len(panels(bare.plot())) == 1
    figure = density.plot(normal=(1, 1, 0), width=5.0, fields=("mean", "std"))
    assert len(panels(figure)) == 2
    with pytest.raises(SettingsError, match="'std'"):
        bare.plot(fields=("std",))
    with pytest.raises(SettingsError, match="'colour'"):
        density.plot(fields=("colour",))


def test_atoms_are_marked_where_they_are(density):
    section = density.slice(2, 0.0)
    # Atom 0 lies at fraction 0.3 along c: in the plane through it and in no other.
    through = density.slice(2, 0.3)
    marks = plotting.atoms_near(density.structure, through, 0.05)
    height = np.abs((density.structure.positions[0] - through.origin) @ through.normal)
    assert height < 1e-9
    assert len(marks) == 1
    relative = density.structure.positions[0] - through.origin
    np.testing.assert_allclose(marks[0], through.axes @ relative, atol=1e-9)
    assert len(plotting.atoms_near(density.structure, section, 0.05)) == 0
    # A wide plane shows periodic images.
    wide = density.plane(through.normal, density.structure.positions[0], width=12.0, spacing=0.5)
    assert len(plotting.atoms_near(density.structure, wide, 0.05)) > 4


def test_large_sections_are_thinned(density, monkeypatch):
    monkeypatch.setattr(plotting, "MAX_PIXELS", 5)
    section = density.slice(0, 0.0)
    thin = plotting._thinned(section)
    assert max(thin.mean.shape) <= 5
    step = -(-section.mean.shape[0] // 5), -(-section.mean.shape[1] // 5)
    for full, part in zip(section.coordinates(), thin.coordinates(), strict=True):
        np.testing.assert_allclose(full[:: step[0], :: step[1]], part, atol=1e-9)
    np.testing.assert_array_equal(section.mean[:: step[0], :: step[1]], thin.mean)


def test_names_that_cannot_be_written(density, tmp_path):
    with pytest.raises(FormatError, match=r"\.png"):
        density.plot(tmp_path / "slice.doc")
    with pytest.raises(StoreError, match="cannot be written"):
        density.plot(tmp_path / "no" / "slice.png")
