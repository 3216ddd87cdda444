"""The record of the full form: ``benchmarks/results/reliability.json``, one entry for each scenario."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "reliability.json"
FOUND = Path(__file__).with_name("found.json")
"""What the suite has found, and what was done about it."""

TOTALS = ("kills", "faults injected", "signals", "full disks", "runs turned away", "outputs compared")


def load(path: Path) -> dict[str, Any]:
    """The record, empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def done(path: Path) -> set[str]:
    """Scenarios that were run and did not fail."""
    return {name for name, entry in load(path).get("faults", {}).items() if "failure" not in entry}


def add(path: Path, scenario: str, found: dict[str, Any], seconds: float, seed: int) -> None:
    """Replace the entry of a scenario; what others have written into the file stays."""
    record = load(path)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    entry = {**found, "seconds": round(seconds, 1), "seed": seed, "date": date, "machine": machine()}
    record.setdefault("faults", {})[scenario] = entry
    entries = record["faults"].values()
    record["fault totals"] = {name: sum(int(entry.get(name, 0)) for entry in entries) for name in TOTALS} | {
        "scenarios": len(entries),
        "failures left": sum("failure" in entry for entry in entries),
    }
    record["failures found and fixed"] = json.loads(FOUND.read_text())
    fuzz = load(path.with_name("fuzz.json"))
    if fuzz:
        record["fuzz totals"] = {
            "cases fuzzed": fuzz["cases"],
            "kinds": len(fuzz["kinds"]),
            "failures left": fuzz["failed"] if isinstance(fuzz["failed"], int) else len(fuzz["failed"]),
        }
        record["failures found and fixed by fuzzing"] = fuzz["found_and_fixed"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def machine() -> str:
    """The machine in words."""
    name = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores of {name}, {system}"
