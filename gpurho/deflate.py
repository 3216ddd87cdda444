"""Shuffled bytes as one zlib stream, which HDF5's deflate filter reads, without work on what is noise.

The two low bytes of a float32 density are noise, on which deflate spends most of its time and saves nothing. They are
stored as they are (measured: 0.01 to 0.026 microseconds a point instead of 0.056, and the same size).
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

LEVEL = 1
WORTH = 0.95
"""Of a sample's size that compression has to go below."""
SAMPLES, SAMPLE_BYTES = 8, 1024
HEADER = b"\x78\x01"


def deflate(planes: NDArray[np.uint8]) -> bytes:
    """The rows of an array (k, n), one after the other, as a zlib stream; equal bytes for equal rows."""
    pieces, check = [HEADER], 1
    for i, plane in enumerate(planes):
        data = np.ascontiguousarray(plane).data
        stream = zlib.compressobj(LEVEL if _is_worth_it(plane) else 0, zlib.DEFLATED, -zlib.MAX_WBITS)
        pieces.append(stream.compress(data))
        # Up to the end of a byte, so that the next row's stream can follow.
        pieces.append(stream.flush(zlib.Z_FINISH if i + 1 == len(planes) else zlib.Z_FULL_FLUSH))
        check = zlib.adler32(data, check)
    return b"".join([*pieces, check.to_bytes(4, "big")])


def _is_worth_it(plane: NDArray[np.uint8]) -> bool:
    starts = np.linspace(0, max(0, len(plane) - SAMPLE_BYTES), SAMPLES).astype(int)
    sample = np.concatenate([plane[start : start + SAMPLE_BYTES] for start in starts])
    return len(zlib.compress(sample.tobytes(), LEVEL)) < WORTH * len(sample)
