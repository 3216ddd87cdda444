"""The full form: ``python -m fuzz --cases 100000 --out fuzz.json``; goes on where an earlier run stopped."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fuzz.cases import CASE_SECONDS, kinds

SHARES = {
    "predict": 0.04,
    "rewrite": 0.03,
    "descriptors": 0.03,
    "command": 0.015,
    "density-h5": 0.02,
    "dataset": 0.02,
    "model": 0.02,
    "checkpoint": 0.02,
    "points": 0.015,
    "source-dump": 0.015,
    "aimd": 0.02,
    "upf": 0.02,
    **{f"file-{kind}": 0.012 for kind in ("xyz", "poscar", "cif", "lammps-data", "dump", "ion", "traj", "json", "pdb")},
}
"""Parts of all cases that the slower kinds get; the others share the rest."""

BATCH = 2000


def run_batch(kind: str, first: int, count: int, seconds: float) -> dict[str, Any]:
    """A batch in a process of its own; the end of the process or of its time is a failure of the case at work."""
    with tempfile.TemporaryDirectory(prefix="gpurho-fuzz-") as folder:
        command = [sys.executable, "-m", "fuzz.cases", kind, str(first), str(count), folder]
        tests = Path(__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
            text = f"the process ended with {done.returncode}: {done.stderr[-400:]}"
        except subprocess.TimeoutExpired:
            text = f"no end after {seconds:.0f} s"
        result = Path(folder) / "result"
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())[0]
            return found
        state, words = Path(folder) / "state", Path(folder) / "words"
        outcomes = state.read_text().split() if state.exists() else []
        if words.exists():
            text += " " + " ".join(words.read_text(errors="replace")[-1500:].split())
        counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
        failures = [{"number": first + i, "text": "see a run of it"} for i, o in enumerate(outcomes) if o == "failed"]
        failures.append({"number": first + len(outcomes), "text": text})
        return {"kind": kind, "first": first, "count": len(outcomes) + 1, "outcomes": counts, "failures": failures}


def again(record: dict[str, Any]) -> None:
    """Run the cases that failed once more; those that pass are moved to the list of what was found and fixed."""
    for kind, entry in record["kinds"].items():
        left = []
        for failure in entry["failures"]:
            found = run_batch(kind, failure["number"], 1, 12 * CASE_SECONDS)
            if found["failures"]:
                left.append(found["failures"][0])
                continue
            (outcome,) = found["outcomes"]
            was = "ended" if "process ended" in failure["text"] or "no end" in failure["text"] else "failed"
            entry["outcomes"][was] -= 1
            entry["outcomes"][outcome] = entry["outcomes"].get(outcome, 0) + 1
            entry.setdefault("fixed", []).append({**failure, "text": " ".join(failure["text"].split())[:200]})
        entry["failures"] = left
        entry["outcomes"] = {name: count for name, count in entry["outcomes"].items() if count}


def counted(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its sums, the date and the machine."""
    entries = record["kinds"].values()
    record["cases"] = sum(e["cases"] for e in entries)
    record["failed"] = sum(e["outcomes"].get("failed", 0) + e["outcomes"].get("ended", 0) for e in entries)
    record["date"] = datetime.date.today().isoformat()
    record["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return record


def planned(total: int) -> dict[str, int]:
    """Cases of each kind."""
    names = list(kinds())
    rest = (1 - sum(SHARES.get(name, 0) for name in names)) / sum(name not in SHARES for name in names)
    return {name: -int(-total * SHARES.get(name, rest) // 1) for name in names}


def main() -> int:
    """Run what is missing, and write the counts after every batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--kind", action="append", help="only this kind, may be given several times")
    parser.add_argument("--anew", action="store_true", help="forget what the file holds of these kinds")
    parser.add_argument("--again", action="store_true", help="only run the cases that failed once more")
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    record.setdefault("kinds", {})
    if options.again:
        again(record)
        options.out.write_text(json.dumps(counted(record), indent=1) + "\n")
        return 1 if record["failed"] else 0
    for kind, count in planned(options.cases).items():
        if options.kind and kind not in options.kind:
            continue
        if options.anew:
            record["kinds"].pop(kind, None)
        entry = record["kinds"].setdefault(kind, {"cases": 0, "outcomes": {}, "failures": []})
        while entry["cases"] < count:
            n = min(BATCH, count - entry["cases"])
            found = run_batch(kind, entry["cases"], n, CASE_SECONDS * 10 + n * 0.5)
            lost = found["count"] - sum(found["outcomes"].values())
            for name, number in {**found["outcomes"], "ended": lost}.items():
                if number:
                    entry["outcomes"][name] = entry["outcomes"].get(name, 0) + number
            entry["failures"] = (entry["failures"] + found["failures"])[:50]
            entry["cases"] += found["count"]
            options.out.write_text(json.dumps(counted(record), indent=1) + "\n")
            print(kind, entry["cases"], entry["outcomes"], flush=True)
            for failure in found["failures"][:8]:
                print("   ", failure["number"], failure["text"][:400], flush=True)
    return 1 if record.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
