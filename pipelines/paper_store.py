"""Finished pieces of a long comparison: each computed once, written whole, found again by what it was made from."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import StoreError
from gpurho.versions import check_version

FORMAT = "gpurho-paper"
FORMAT_VERSION = 1
RESULTS = "results.json"
ARRAYS = "arrays"

Made = tuple[dict[str, Any], dict[str, NDArray[Any]]]
"""What a computation gives: plain values, and arrays by name."""


class Results:
    """Entries in ``results.json`` of a folder, arrays beside it; opened anew they are all there.

    Parameters
    ----------
    folder : Path
        Made where it does not exist.

    Raises
    ------
    StoreError
        For a file that is no such list, or of a newer version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RESULTS
        self.computed = 0
        self.entries: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, Any] = {}
        try:
            (folder / ARRAYS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"folder {folder} cannot be made: {error.strerror}; give another one") from None
        if self.path.exists():
            try:
                values = json.loads(self.path.read_text())
                known = values["format"] == FORMAT
                if known:
                    check_version(values.get("format_version"), FORMAT, self.path, StoreError)
                entries = values["entries"]
                known = known and all({"values", "arrays"} <= set(entry) for entry in entries.values())
            except StoreError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
                known, entries = False, {}
            if not known:
                raise StoreError(f"{self.path} is no list of results of this version; give another folder")
            self.entries = entries

    def get(self, key: str) -> dict[str, Any] | None:
        """The values of an entry, or None."""
        entry = self.entries.get(key)
        return None if entry is None else entry["values"]

    def arrays(self, key: str) -> dict[str, NDArray[Any]]:
        """The arrays of an entry; none where it is not there or has none."""
        path = self._arrays_path(key)
        if key not in self.entries or not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def make(self, key: str, compute: Callable[[], Made]) -> dict[str, Any]:
        """The values of an entry, computed and made durable where they are not there yet."""
        found = self.entries.get(key)
        if found is not None and (not found["arrays"] or self._arrays_path(key).is_file()):
            return found["values"]
        started = time.perf_counter()
        values, arrays = compute()
        if arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            _write(self._arrays_path(key), buffer.getvalue())
        seconds = round(time.perf_counter() - started, 3)
        self.entries[key] = {"values": values, "arrays": sorted(arrays), "seconds": seconds}
        self.computed += 1
        self.save()
        return values

    def save(self) -> None:
        """Write all entries, whole or not at all."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "tables": self.tables}
        lines = [f"{json.dumps(name)}: {_dumped(value)}" for name, value in head.items()]
        # One line for each entry: a reader can compare two files, and histograms take no pages.
        entries = [f"  {json.dumps(key)}: {_dumped(entry)}" for key, entry in sorted(self.entries.items())]
        lines.append('"entries": {\n' + ",\n".join(entries) + "\n}")
        _write(self.path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def _arrays_path(self, key: str) -> Path:
        return self.folder / ARRAYS / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".npz")


def entry_key(kind: str, name: str, *inputs: Any) -> str:
    """A name that a reader understands and that is another one for other inputs (anything JSON can hold)."""
    digest = hashlib.sha256(json.dumps([kind, name, *inputs], sort_keys=True).encode()).hexdigest()
    return f"{kind}/{name}/{digest[:16]}"


def _dumped(value: Any) -> str:
    """JSON in one line; what is no finite number is null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items()}
        if isinstance(item, list | tuple):
            return [plain(v) for v in item]
        if isinstance(item, np.generic):
            item = item.item()
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), allow_nan=False)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; what was finished before is safe") from None
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["Made", "Results", "entry_key"]
