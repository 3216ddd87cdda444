"""Checkpoints of training runs: tensors and a record in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gpurho.errors import ModelError
from gpurho.model import write_atomic
from gpurho.tensorfiles import check_metadata, check_tensors, tensor_file
from gpurho.versions import check_version

CHECKPOINT_KEY = "gpurho-checkpoint"
FORMAT_VERSION = 1
"""In the metadata beside the record; the first checkpoints had none."""


def write_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; `record` holds plain values and has an entry "identity"."""
    write_atomic(
        path, tensor_file(tensors, {CHECKPOINT_KEY: json.dumps(record), "format_version": str(FORMAT_VERSION)})
    )


def read_checkpoint(path: Path, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint; raises `ModelError` when it is damaged or belongs to another run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        check_metadata(metadata, str(path))
        check_version(int(metadata.get("format_version", 1)), CHECKPOINT_KEY, path, ModelError)
        check_tensors(tensors, metadata, str(path))
        record = json.loads(metadata[CHECKPOINT_KEY])
        same = record["identity"] == identity
    except ModelError as error:
        if "upgrade gpurho" in str(error):
            raise
        reason = str(error).removeprefix(f"{path} is damaged: ").split(";")[0]
        raise ModelError(f"{path}: damaged checkpoint ({reason}); remove it to start anew") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: damaged checkpoint ({error}); remove it to start anew") from None
    if not same:
        raise ModelError(
            f"{path}: checkpoint of a run with other settings, data or split; remove it or train to another path"
        )
    return tensors, record


__all__ = ["read_checkpoint", "write_checkpoint"]
