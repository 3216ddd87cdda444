"""The short form: a few cases of every kind, in a process of its own. The full form is ``make fuzz``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuzz import cases, mutations

TESTS = Path(__file__).resolve().parents[1]
FEW = {"predict", "rewrite", "command", "file-traj", "aimd"}
"""Kinds whose cases take long."""


def _batches(names: list[str], count: int, folder: Path) -> list[dict]:
    command = [sys.executable, "-m", "fuzz.cases", ",".join(names), "0", str(count), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    words = (folder / "words").read_text(errors="replace") if (folder / "words").exists() else ""
    assert done.returncode == 0, done.stderr[-2000:] + words[-2000:]
    return json.loads((folder / "result").read_text())


@pytest.mark.parametrize("few", [False, True])
def test_a_few_cases_of_every_kind(few, tmp_path):
    names = [name for name in cases.kinds() if (name in FEW) == few]
    results = _batches(names, 5 if few else 12, tmp_path)
    assert [result["kind"] for result in results] == names
    failures = {result["kind"]: result["failures"] for result in results if result["failures"]}
    assert not failures
    assert sum(sum(result["outcomes"].values()) for result in results) == len(names) * (5 if few else 12)
    assert sum(result["outcomes"].get("refused", 0) for result in results) > 0


def test_what_counts_as_a_failure(tmp_path):
    from gpurho.errors import StructureError

    def outcome(case):
        return cases.run_case(case, "kind", 0, tmp_path)[0]

    def refuse(rng, folder):
        raise StructureError("no; give another")

    def fail(rng, folder):
        raise ValueError("no")

    def warn(rng, folder):
        np.log(np.zeros(1))
        return "right"

    def wrong(rng, folder):
        cases.finite([np.nan])
        return "accepted"

    assert outcome(refuse) == "refused"
    assert [outcome(case) for case in (fail, warn, wrong)] == ["failed"] * 3
    assert outcome(lambda rng, folder: "right") == "right"


def test_mutations_change_their_text_and_repeat():
    text = b"3\n1.0E-01 2.0E+00\n" * 30
    made = [mutations.damaged(text, cases.generator("x", i)) for i in range(40)]
    assert sum(new != text for new in made) > 30
    assert made == [mutations.damaged(text, cases.generator("x", i)) for i in range(40)]
    assert any(b"\r\n" in mutations.equal_rewrite(text, cases.generator("x", i)) for i in range(9))
