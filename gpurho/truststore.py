"""The trust of a prediction in its HDF5 file: group ``trust``."""

from __future__ import annotations

import json
from typing import Any

from gpurho.checksums import get, get_text, put, put_text
from gpurho.trust import Trust


def write_trust(h5: Any, trust: Trust) -> None:
    """Into an open file; the same bytes for the same numbers."""
    group = h5.create_group("trust")
    for name, values in (("per_atom", trust.per_atom), ("why", trust.why)):
        put(
            group,
            name,
            values,
            chunks=(min(len(values), 1 << 16),),
            shuffle=True,
            compression="gzip",
            compression_opts=1,
        )
    put_text(group["per_atom"], "unit", "distance from the training atoms, 1 where these end")
    put_text(group, "summary", json.dumps(trust.summary()))


def read_trust(h5: Any) -> Trust | None:
    """From an open file; None where it has none. Raises KeyError, TypeError or ValueError for a damaged one."""
    if "trust" not in h5:
        return None
    group = h5["trust"]
    return Trust.from_parts(get(group, "per_atom"), get(group, "why"), json.loads(get_text(group, "summary")))
