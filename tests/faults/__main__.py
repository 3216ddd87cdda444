"""``python -m faults``: the full form of the suite, or the scenarios named, into ``benchmarks/results``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from faults import record
from faults.bench import Bench
from faults.harness import Server
from faults.inputs import Inputs
from faults.scenarios import SCENARIOS


def main() -> int:
    """Run scenarios; returns how many failed."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--short", action="store_true", help="the form of continuous integration; records nothing")
    parser.add_argument("--todo", action="store_true", help="only what the record does not have yet")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the labelling run with faults (60)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--record", type=Path, default=record.PATH)
    parser.add_argument("--folder", type=Path, help="where to work (default: /dev/shm, or the temporary folder)")
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    names = options.scenarios or list(SCENARIOS)
    if options.todo:
        names = [name for name in names if name not in record.done(options.record)]
    memory = Path("/dev/shm")
    where = options.folder or (memory if memory.is_dir() else None)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpurho-faults-", dir=where) as name:
        folder = Path(name)
        (folder / "inputs").mkdir()
        with Server(folder) as server:
            bench = Bench(folder, server, Inputs(folder / "inputs"), not options.short, options.seed, options.minutes)
            for scenario in names:
                begin = time.monotonic()
                try:
                    found = SCENARIOS[scenario](bench)
                except Exception as error:
                    traceback.print_exc()
                    found, failed = {"failure": str(error)[-2000:]}, failed + 1
                seconds = time.monotonic() - begin
                print(f"{scenario:24} {seconds:7.1f} s  {found}", flush=True)
                if bench.full:
                    record.add(options.record, scenario, found, seconds, options.seed)
    return failed


if __name__ == "__main__":
    sys.exit(main())
