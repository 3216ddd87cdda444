"""Ground-state electron densities with error bars, for systems of millions of atoms.

Everything here is found when it is first used: importing gpurho touches no GPU and no file, and one setting: threads of
OpenMP sleep while they wait, unless OMP_WAIT_POLICY says otherwise.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Descriptors and network run beside each other, each with all cores; threads that spin while they wait take the cores
# from those that work. Measured on two cores with the model "al", analytic sigma: 2.4 times as fast on a quiet machine,
# 15 times on a busy one. The OpenMP runtime reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if not (_here := Path(__file__).resolve().parent).joinpath("kernels").is_dir():
    # In a checkout that is not installed, `kernels` and `pipelines` lie beside this folder, not in it.
    __path__.append(str(_here.parent))

_EXPORTS = {
    "Density": "density",
    "DensityModel": "model",
    "DescriptorSpec": "descriptors",
    "Grid": "grid",
    "Plan": "pipelines.plan",
    "Structure": "structure",
    "DFTSettings": "dft.base",
    "KMesh": "dft.base",
    "collect": "pipelines.collect",
    "converge": "pipelines.converge",
    "descriptors": "descriptors",
    "energies": "energy",
    "label": "pipelines.label",
    "load_model": "model",
    "models": "pipelines.models",
    "plan": "pipelines.plan",
    "predict": "pipelines.predict",
    "region_of": "pipelines.predict",
    "report": "pipelines.report",
    "restart": "pipelines.restart",
    "sample": "sampling",
    "trust": "pipelines.trust",
    "DatasetError": "errors",
    "ConvergenceError": "errors",
    "DeviceError": "errors",
    "EngineError": "errors",
    "FormatError": "errors",
    "GpurhoError": "errors",
    "GridError": "errors",
    "HaloTooSmallError": "errors",
    "MissingDependencyError": "errors",
    "ModelError": "errors",
    "NeighborOverflowError": "errors",
    "OutputExistsError": "errors",
    "SettingsError": "errors",
    "StoreError": "errors",
    "StructureError": "errors",
    "UnknownSpeciesError": "errors",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from gpurho.density import Density as Density
    from gpurho.descriptors import DescriptorSpec as DescriptorSpec
    from gpurho.dft.base import DFTSettings as DFTSettings
    from gpurho.dft.base import KMesh as KMesh
    from gpurho.energy import energies as energies
    from gpurho.grid import Grid as Grid
    from gpurho.model import DensityModel as DensityModel
    from gpurho.model import load_model as load_model
    from gpurho.pipelines.converge import converge as converge
    from gpurho.pipelines.label import label as label
    from gpurho.pipelines.models import models as models
    from gpurho.pipelines.plan import Plan as Plan
    from gpurho.pipelines.plan import plan as plan
    from gpurho.pipelines.predict import predict as predict
    from gpurho.pipelines.predict import region_of as region_of
    from gpurho.pipelines.report import report as report
    from gpurho.pipelines.trust import trust as trust
    from gpurho.sampling import sample as sample
    from gpurho.structure import Structure as Structure

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("gpurho")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"gpurho.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'gpurho' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps names of the table above from being hidden: ``gpurho.descriptors`` is the function, not its module."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its name in the package when it is first imported.
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
