"""Files torn, zeroed in part, or changed in one byte: read as they were, or refused in a line that names them.

Cases run in batches in a child of the server, so that a crash of a library that reads them is a failure of one case.
"""

from __future__ import annotations

import hashlib
import json
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.bench import Bench
from faults.damaged import KINDS, Kind
from faults.harness import FaultError

BATCH_SECONDS = 600.0
EXAMPLES = 12
"""Failures that are told in full."""

Damage = tuple[str, int, int]
"""("cut", bytes left, 0), ("zero", start, length) or ("flip", place, mask)."""


def damages(size: int, draw: random.Random, count: int) -> Iterator[Damage]:
    """`count` damages of a file of `size` bytes: flips of one byte for two thirds, then cuts and zeroed blocks."""
    for i in range(count):
        place = draw.randrange(size)
        if i % 3 < 2:
            yield "flip", place, draw.choice((0xFF, 1 << draw.randrange(8)))
        elif i % 2:
            yield "cut", place, 0
        else:
            # Blocks of the sizes in which disks and file systems lose data, where they lie.
            length = draw.choice((64, 512, 4096))
            yield "zero", place // length * length, length


def damaged(data: bytes, damage: Damage) -> bytes:
    """The bytes with a damage done to them."""
    what, place, more = damage
    if what == "cut":
        return data[:place]
    changed = bytearray(data)
    if what == "zero":
        changed[place : place + more] = bytes(len(changed[place : place + more]))
    else:
        changed[place] ^= more
    return bytes(changed)


def files(bench: Bench) -> dict[str, Any]:
    """All kinds of files."""
    found = {name: of_kind(bench, name, bench.count(24, KINDS[name].cases)) for name in KINDS}
    bad = {name: counts for name, counts in found.items() if counts["failures"]}
    if bad:
        raise FaultError(json.dumps(bad, indent=1))
    return {"faults injected": sum(sum(v["outcomes"].values()) for v in found.values()), **found}


def of_kind(bench: Bench, name: str, count: int) -> dict[str, Any]:
    """One kind of file: how many damages ended in which way, and the failures."""
    folder = bench.fresh()
    report = folder / "report"
    first, outcomes, failures = 0, Counter[str](), list[str]()
    while first < count:
        arguments = {"name": name, "folder": str(folder), "report": str(report), "first": first, "count": count}
        running = bench.server.start(call="faults.damage:batch", arguments=arguments | {"seed": bench.seed})
        code = running.wait(BATCH_SECONDS).code
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        for line in lines:
            if "outcome" in line:
                outcomes[line["outcome"]] += 1
                if line["outcome"] == "failure":
                    failures.append(f"{line['damage']}: {line['said']}")
        report.unlink(missing_ok=True)
        if code == 0:
            break
        if not lines:
            raise FaultError(f"{name}: the batch ended with {code}: {running.said()[-2000:]}")
        # The case that was begun and not ended took the process with it.
        outcomes["failure"] += 1
        failures.append(f"{lines[-1]['damage']}: the process ended with {code}")
        first = lines[-1]["case"] + 1
    return {"outcomes": dict(outcomes), "failures": failures[:EXAMPLES]}


def batch(name: str, folder: str, report: str, first: int, count: int, seed: int) -> None:
    """Cases `first` up to `count` of a kind; runs in a child."""
    kind: Kind = KINDS[name]()
    where = Path(folder) / "files"
    where.mkdir(exist_ok=True)
    if first == 0:
        kind.make(where)
    targets = kind.targets(where)
    whole = {path: path.read_bytes() for path in targets}
    everything = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
    want = digest_of(kind.read(where))
    draw = random.Random(f"{seed} {name}")
    plan = [(path, d) for path in targets for d in damages(len(whole[path]), draw, -(-count // len(targets)))]
    with open(report, "w") as out:
        for case, (path, damage) in enumerate(plan[:count]):
            if case < first:
                continue
            note = {"case": case, "damage": [path.name, *damage]}
            out.write(json.dumps(note) + "\n")
            out.flush()
            path.write_bytes(damaged(whole[path], damage))
            outcome, said = _outcome(kind, where, path, want)
            out.write(json.dumps({**note, "outcome": outcome, "said": said}) + "\n")
            kind.restore(where, everything)


def _outcome(kind: Kind, where: Path, path: Path, want: str) -> tuple[str, str]:
    from gpurho.errors import GpurhoError

    try:
        found = digest_of(kind.read(where))
    except GpurhoError as error:
        text = str(error)
        if "\n" in text or len(text) > 500:
            return "failure", f"not one line: {text}"
        if not kind.names(path, text):
            return "failure", f"the message does not name the file: {text}"
        return "refused", text
    except Exception:
        return "failure", traceback.format_exc()[-900:]
    if found == "made again":
        return "made again", ""
    return ("as it was", "") if found == want else ("failure", "other values, in silence")


def digest_of(value: Any) -> str:
    """A digest of nested plain values and arrays; "made again" for what is then computed anew."""
    if value is None:
        return "made again"
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value):
            update(f"{key}=".encode())
            _feed(update, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(update, item)
    elif hasattr(value, "tobytes"):
        update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        update(repr(value).encode())
