"""Safetensors files with checksums, which the format itself has not: of the texts in its metadata, and of the tensors.

Files of earlier versions of this library have none and are read without.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from gpurho.errors import ModelError

CHECKSUM_KEY = "checksum"


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the same bytes for the same tensors and metadata."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain)
    size = int.from_bytes(data[:8], "little")
    sums = f"{_text_sum(metadata):08x} {_tensor_sum(plain):08x}"
    # The library that writes these files keeps several entries of metadata in no certain order.
    header = {"__metadata__": {**metadata, CHECKSUM_KEY: sums}, **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def check_metadata(metadata: Mapping[str, str], where: str) -> None:
    """Raise `ModelError` where the texts of a file are not those that were written."""
    sums = metadata.get(CHECKSUM_KEY)
    if sums is not None and sums.split(" ")[0] != f"{_text_sum(metadata):08x}":
        raise ModelError(f"{where} is damaged: its specification does not match its checksum; take an undamaged copy")


def check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> None:
    """Raise `ModelError` where the tensors of a file are not those that were written."""
    sums = metadata.get(CHECKSUM_KEY)
    if sums is not None and sums.split(" ")[-1] != f"{_tensor_sum(tensors):08x}":
        raise ModelError(f"{where} is damaged: its tensors do not match their checksum; take an undamaged copy")


def _text_sum(metadata: Mapping[str, str]) -> int:
    rest = {key: text for key, text in metadata.items() if key != CHECKSUM_KEY}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _tensor_sum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


__all__ = ["CHECKSUM_KEY", "check_metadata", "check_tensors", "tensor_file"]
