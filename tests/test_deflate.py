"""Streams that HDF5 reads: the same bytes back, and about as small as by zlib alone."""

from __future__ import annotations

import zlib

import h5py
import numpy as np
import pytest

from gpurho.deflate import deflate


def planes_of(values):
    """Shuffled bytes of float32 numbers."""
    return np.ascontiguousarray(np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8).reshape(-1, 4).T)


def fields():
    """Arrays of several kinds."""
    rng = np.random.default_rng(0)
    smooth = np.sin(np.linspace(0.0, 40.0, 20_000)) + 1.5
    noise = rng.normal(size=20_000)
    yield "smooth", smooth
    yield "noise", noise
    yield "noise of two digits", np.float32(noise * 100).astype(np.int32).astype(np.float32)
    yield "zeros", np.zeros(20_000)
    yield "outside of a region", np.full(20_000, np.nan)
    yield "half empty", np.where(np.arange(20_000) < 10_000, 0.0, smooth)
    yield "an island in vacuum", np.where(np.abs(np.arange(20_000) - 5_000) < 1_000, noise, 0.0)
    for n in (0, 1, 2, 100, 1_023, 1_025):
        yield f"{n} numbers", noise[:n]


@pytest.mark.parametrize(("name", "values"), list(fields()), ids=lambda v: v if isinstance(v, str) else "")
def test_the_same_bytes_back_and_small(name, values):
    planes = planes_of(values)
    stream = deflate(planes)
    assert zlib.decompress(stream) == planes.tobytes()
    assert stream == deflate(planes.copy())
    assert len(stream) <= 1.03 * len(zlib.compress(planes.tobytes(), 1)) + 64


def test_hdf5_reads_it_and_a_flipped_bit_is_seen(tmp_path):
    values = np.linspace(0.0, 2.0, 4_096, dtype=np.float32).reshape(16, 16, 16)
    stream = deflate(planes_of(values))
    for name, data in (("good", stream), ("bad", stream[:900] + bytes([stream[900] ^ 4]) + stream[901:])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as h5:
            made = h5.create_dataset(
                "x", values.shape, "<f4", chunks=values.shape, compression="gzip", compression_opts=1, shuffle=True
            )
            made.id.write_direct_chunk((0, 0, 0), data)
    with h5py.File(tmp_path / "good.h5") as h5:
        np.testing.assert_array_equal(h5["x"][...], values)
    with h5py.File(tmp_path / "bad.h5") as h5, pytest.raises(OSError, match=r"inflate|filter"):
        h5["x"][...]
