"""The short form of every scenario of the fault suite; ``make faults`` is the full one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.bench import Bench
from faults.harness import Server
from faults.inputs import Inputs
from faults.scenarios import SCENARIOS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("faults")
    (folder / "inputs").mkdir()
    with Server(folder) as server:
        yield Bench(folder, server, Inputs(folder / "inputs"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_and_nothing_is_wrong(bench: Bench, name: str) -> None:
    if "Dask" in name:
        pytest.importorskip("distributed")
    assert SCENARIOS[name](bench)
