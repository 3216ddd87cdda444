"""CUDA kernels compile to machine code without spilling registers: no GPU needed, but the CUDA tool chain is.

`benchmarks/sass_check.py` does all of them; here are some.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parent.parent / "benchmarks" / "sass_check.py"


def _load():
    spec = importlib.util.spec_from_file_location("sass_check", CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_representative_kernels_compile_without_spills(tmp_path):
    report = tmp_path / "sass.json"
    command = [sys.executable, str(CHECK), "--arch", "80", "--json", str(report), "--processes", "1"]
    done = subprocess.run(
        [*command, "--kernels", "gather", "select_96", "exact", "cross", "arrange", "expand"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {row["kernel"] for row in rows} == {"gather", "select_96", "exact", "cross", "arrange", "expand"}
    assert all(0 < row["registers"] <= 255 and row["shared"] <= 49152 for row in rows)


def test_a_spill_or_a_failure_fails_the_check():
    check = _load()
    good = {"registers": 255, "spill_stores": 0, "spill_loads": 0}
    assert not check.failed(good)
    assert check.failed({**good, "spill_stores": 4})
    assert check.failed({**good, "spill_loads": 4})
    assert check.failed({"error": "TypingError: no"})


def test_the_assembler_report_is_read(monkeypatch):
    check = _load()
    properties = "    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    used = "ptxas info : Used 40 registers, used 1 barriers, 512 bytes smem\n"
    report = properties.format(16, 4, 8) + used + properties.format(0, 0, 0)

    class Done:
        returncode, stdout, stderr = 0, "", report

    monkeypatch.setattr(check.subprocess, "run", lambda *a, **k: Done)
    found = check.assemble("", 80, "ptxas")
    assert found == {"registers": 40, "spill_stores": 4, "spill_loads": 8, "stack": 16, "shared": 512}
