"""The scenarios by name, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from faults import clusters, damage, disk, kills, moments, soak
from faults.bench import Bench

SCENARIOS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "kill predict": kills.predict,
    "kill label": kills.label,
    "kill train": kills.train,
    "kill Dask workers": clusters.workers,
    "kill Dask scheduler": clusters.scheduler,
    "full disk predict": disk.predict,
    "full disk label": disk.label,
    "full disk train": disk.train,
    "full disk writers": disk.writers,
    "read-only": disk.read_only,
    "damaged files": damage.files,
    "clocks": moments.clocks,
    "two runs": moments.two_runs,
    "signals": moments.signals,
    "soak predictions": soak.predictions,
    "soak labels": soak.labels,
}
