"""Checkpoints of training runs: tensors and a record in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gpurho.errors import ModelError
from gpurho.model import write_atomic

CHECKPOINT_KEY = "gpurho-checkpoint"


def write_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; `record` holds plain values and has an entry "identity"."""
    from safetensors.torch import save

    data = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, save(data, metadata={CHECKPOINT_KEY: json.dumps(record)}))


def read_checkpoint(path: Path, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint; raises `ModelError` when it is damaged or belongs to another run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {})[CHECKPOINT_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        same = record["identity"] == identity
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: damaged checkpoint ({error}); remove it to start anew") from None
    if not same:
        raise ModelError(
            f"{path}: checkpoint of a run with other settings, data or split; remove it or train to another path"
        )
    return tensors, record


__all__ = ["read_checkpoint", "write_checkpoint"]
