"""What every scenario has at hand: the warm server, the inputs, fresh folders, and the results of undisturbed runs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.harness import FaultError, Outcome, Server
from faults.inputs import Inputs, names_in, result_of


@dataclass
class Bench:
    """A folder to work in, and how much is to be done.

    Attributes
    ----------
    full : bool
        The full form of each scenario, and not the short one of continuous integration.
    seed : int
        Of all random moments and places.
    """

    folder: Path
    server: Server
    inputs: Inputs
    full: bool = False
    seed: int = 7
    minutes: float = 60.0
    _fresh: int = 0
    _calm: dict[tuple[str, ...], Calm] = field(default_factory=dict)

    def random(self, name: str) -> random.Random:
        """Draws of a scenario."""
        return random.Random(f"{self.seed} {name}")

    def count(self, short: int, full: int) -> int:
        """How often something is done."""
        return full if self.full else short

    def fresh(self) -> Path:
        """A new folder; the one before the last is removed."""
        self._fresh += 1
        shutil.rmtree(self.folder / f"run{self._fresh - 2}", ignore_errors=True)
        path = self.folder / f"run{self._fresh}"
        path.mkdir()
        return path

    def calm(self, job: Job) -> Calm:
        """The undisturbed run of a job, done once."""
        key = (job.name, *(str(word) for word in job.more))
        if key not in self._calm:
            folder = self.folder / f"calm{len(self._calm)}"
            folder.mkdir(exist_ok=True)
            outcome = job.run(self, folder).expect()
            self._calm[key] = Calm(result_of(folder / job.output), names_in(folder), outcome.seconds)
        return self._calm[key]


@dataclass(frozen=True)
class Calm:
    """What an undisturbed run left, and how long it took."""

    result: dict[str, Any]
    names: set[str]
    seconds: float


@dataclass(frozen=True)
class Job:
    """A command with an output, always of the same name."""

    name: str
    more: tuple[object, ...] = ()

    @property
    def output(self) -> str:
        """Name of the output."""
        return {"predict": "rho.h5", "label": "al.h5", "train": "al.safetensors"}[self.name]

    def words(self, bench: Bench, folder: Path, *more: object) -> list[object]:
        """The command line."""
        words: Callable[..., list[object]] = getattr(bench.inputs, self.name)
        return words(folder / self.output, *self.more, *more)

    def run(self, bench: Bench, folder: Path, **conditions: Any) -> Outcome:
        """The command to its end."""
        return bench.server.run(*self.words(bench, folder), **{"forked": True, **conditions})

    def check(self, bench: Bench, folder: Path, may_stay: Callable[[str], bool] = lambda name: False) -> None:
        """Raise `FaultError` unless a folder holds what an undisturbed run leaves, and nothing else."""
        calm = bench.calm(self)
        found = {name for name in names_in(folder) if name in calm.names or not may_stay(name)}
        if found != calm.names:
            raise FaultError(f"{self.name}: {sorted(found ^ calm.names)} should not be there, or is missing")
        result = result_of(folder / self.output)
        if result != calm.result:
            different = [k for k in {*result, *calm.result} if result.get(k) != calm.result.get(k)]
            raise FaultError(f"{self.name}: {different} are not those of an undisturbed run")


PREDICT = Job("predict")
LABEL = Job("label")
TRAIN = Job("train")
PREDICTIONS = (
    PREDICT,
    Job("predict", ("--keep", "field", "--keep", "coarse:2", "--keep", "atoms", "--keep", "histogram")),
    Job("predict", ("--keep", "slice:z=0.5", "--keep", "atoms", "--conserve", "uniform")),
    Job("predict", ("--region", 3, 20, 0, 18, 5, 24, "--uncertainty", "sampled", "--samples", 3)),
)
TRAININGS = (
    TRAIN,
    Job("train", ("--set", "memory_limit=2e-4")),
    Job("train", ("--set", "ema=0.9", "--set", "patience=1", "--set", "sampling=importance")),
)
"""The commands with settings that take other ways: sums beside the journal, features in scratch files, and so on."""
