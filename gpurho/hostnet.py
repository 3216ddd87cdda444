"""The network as one pass over blocks of points on a CPU: `gpurho.kernels.dense_cpu` with the numbers of a model.

`precision` "bf16" multiplies bfloat16 where the processor does, and sums in float32; elsewhere it rounds the weights
alone. On its first use in a process a model's network is compared with the reference (`gpurho.scriptnet`) on points of
its own, and refused where it strays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gpurho.errors import DeviceError
from gpurho.host import keep_freed_memory, side_by_side
from gpurho.kernels import dense_cpu
from gpurho.kernels._dense_lanes import ANALYTIC, COLUMN_ROWS, LAST_LAYER, MEAN
from gpurho.kernels._smooth_emit import UNDONE
from gpurho.kernels.dense_cpu import (
    BIAS,
    BIAS_VARIANCES,
    BLOCK,
    FACTOR,
    FACTOR_BIAS,
    FACTOR_REST,
    KINDS,
    LAST,
    LAST_ROWS,
    TRANSPOSED,
    VARIANCES,
    WEIGHTS,
    ZEROS,
    N,
    padded,
)
from gpurho.kernels.smooth import BlockNetwork
from gpurho.scriptnet import Inputs, Outputs

if TYPE_CHECKING:
    from gpurho.prediction import PredictionNetwork

POINTS = 128
"""Points that go through all layers at a time, by measurement: weights then come from the second level of the cache."""
SAMPLED_POINTS = 2048
"""Points whose inputs are kept for all drawn networks, each of which is then read once for them."""
MOST_POINTS = 2**15
"""Points that a thread takes at once, at most."""
MOST_WEIGHTS = 2**20
"""Bytes of drawn networks up to which they stay in a core's cache from block to block of the points."""
UNBOUNDED = 3.0e38
ALIGNMENT = 64

Bytes = NDArray[np.uint8]


class HostNetwork:
    """A network in one pass on a CPU.

    Parameters
    ----------
    networks : sequence of PredictionNetwork
        In float32, not frozen, with a hidden layer at least: that of the posterior means, then those of drawn weights.
    inputs : Inputs
    precision : "fp32" or "bf16"
    with_sigma : bool
    kind : "amx", "dot" or "fp32", optional
        Of the products; what this processor is best at by default.
    """

    def __init__(
        self,
        networks: Sequence[PredictionNetwork],
        inputs: Inputs,
        precision: str,
        with_sigma: bool,
        kind: str | None = None,
    ) -> None:
        network = networks[0]
        self.device, self.precision = inputs.slope.device, precision
        self.kind = kind or (dense_cpu.bf16_kind() if precision == "bf16" else "fp32")
        self.mode = ANALYTIC if network.analytic else LAST_LAYER if network.last_layer else MEAN
        self._with_sigma, self._two_body = with_sigma, inputs.baseline is not None
        sets = [_Packed(n, padded(inputs.n_features), precision, self.kind) for n in networks]
        packed = _aligned((len(sets), max(s.size for s in sets)))
        for row, numbers in zip(packed, sets, strict=True):
            numbers.copy_to(row)
        places = np.stack([s.places for s in sets])
        shifts = np.array([s.shifts for s in sets], np.float32)
        hidden, layers = len(network.layers) - 1, network.n_layers
        skip = np.zeros(hidden, np.float32)
        for i in range(hidden):
            if i % layers:
                skip[i] = float(network.skip[i // layers, i % layers - 1])
        columns = _columns(inputs)
        self._many = len(sets) > 1
        self._points = SAMPLED_POINTS if self._many else POINTS
        self._rows = 1 + self._two_body + 3 * with_sigma
        decays = bool(inputs.columns) and inputs.length > 0
        self._run = dense_cpu.make_kernel(
            KINDS.index(self.kind), self.mode, int(with_sigma), int(decays), int(self._two_body), dense_cpu.VERSION
        )
        self._held = packed, columns, places, skip, shifts  # what the table has the addresses of
        sizes = inputs.n_features, self._rows, len(columns), hidden, *packed.shape, self._points, POINTS
        arrays = columns, packed, places, skip, shifts, dense_cpu.TILES
        self._table = np.array([*sizes, *(a.ctypes.data for a in arrays)], np.int64)
        keep_freed_memory()

    def __call__(self, features: Tensor) -> Outputs:
        """Outputs for features (n, n_features)."""
        n = features.size(0)
        values = features.contiguous().numpy()
        out = np.empty((self._rows, n), np.float32)
        out.view(np.int32).fill(UNDONE)
        share = -(-n // (4 * torch.get_num_threads() * self._points)) * self._points
        step = max(self._points, min(MOST_POINTS, share))

        def part(first: int) -> None:
            last = min(first + step, n)
            self._run.ctypes(values.ctypes.data, first, last, out.ctypes.data, n, self._table.ctypes.data)

        side_by_side(part, range(0, n, step))
        return self.outputs(out)

    @property
    def by_blocks(self) -> BlockNetwork | None:
        """The network for descriptors that are made block by block; None where drawn ones would fill a cache."""
        if self._table[dense_cpu.SETS] * self._table[dense_cpu.SET_BYTES] > MOST_WEIGHTS and self._many:
            return None
        return BlockNetwork(self._run.address, self._table.ctypes.data, self._rows, self)

    def outputs(self, rows: NDArray[np.float32]) -> Outputs:
        """What rows of the kernel, (rows, n), say; raises `DeviceError` where it has not written them."""
        if (rows[0].view(np.int32) == UNDONE).any():
            raise DeviceError("the network's kernel ended early: out of memory; give fewer threads (OMP_NUM_THREADS)")
        out = torch.from_numpy(rows)
        log_variance, excess, variance = out[-3:] if self._with_sigma else (None, None, None)
        return Outputs(out[0], log_variance, variance, excess, out[1] if self._two_body else None)


class _Packed:
    """The numbers of one network in the order in which the kernel reads them."""

    def __init__(self, network: PredictionNetwork, n_inputs: int, precision: str, kind: str) -> None:
        self._pieces: list[Bytes] = []
        self.size, self.precision, self.kind = 0, precision, kind
        layers = list(network.layers)
        *hidden, last = layers
        width = last.weight.size(1)
        units = padded(width)
        self.places = np.zeros((len(layers), 5), np.int64)
        for i, layer in enumerate(hidden):
            weight = self._rounded(_filled(layer.weight, units, n_inputs if i == 0 else units))
            self._put(i, WEIGHTS, self._panels(weight))
            self._put(i, BIAS, _filled(layer.bias[None], 1, units))
            if network.analytic:
                spread = _filled(layer.weight_variance, units, weight.size(1))
                self._put(i, VARIANCES, self._panels(self._rounded(spread)))
                self._put(i, BIAS_VARIANCES, _filled(layer.bias_variance[None], 1, units))
                if i > 0:
                    self._put(i, TRANSPOSED, self._panels(weight.T))
        rows = torch.zeros(LAST_ROWS, units)
        rows[:2, :width] = last.weight[:2]
        constant = 0.0
        if network.analytic:
            rows[2, :width] = last.weight_variance[0]
            constant = float(last.bias_variance[0])
        end = len(hidden)
        self._put(end, LAST, rows.reshape(LAST_ROWS, -1, BLOCK).transpose(0, 1))
        self.places[end, FACTOR] = self.size  # the end of the rows before, in any case
        if network.last_layer:
            # The factor is triangular: its last column is that of the bias alone. In bfloat16 it comes in two parts,
            # since large terms cancel.
            factor = _filled(network.factor[:width], units, units)
            first = self._rounded(factor) if self.kind != "fp32" else factor
            self._put(end, FACTOR, self._panels(first))
            self._put(end, FACTOR_REST, self._panels(factor - first))
            self._put(end, FACTOR_BIAS, _filled(network.factor_bias[None, :width], 1, units))
            constant = float(network.factor_bias[width]) ** 2
        self._put(end, ZEROS, torch.zeros(BLOCK))
        self.shifts = [float(last.bias[0]), float(last.bias[1]), constant]

    def copy_to(self, row: Bytes) -> None:
        """Write all numbers to the front of a row."""
        at = 0
        for piece in self._pieces:
            row[at : at + len(piece)] = piece
            at += -(-len(piece) // ALIGNMENT) * ALIGNMENT

    def _put(self, layer: int, column: int, values: Tensor | NDArray[Any]) -> None:
        self.places[layer, column] = self.size
        piece = np.ascontiguousarray(values).view(np.uint8).ravel()
        self._pieces.append(piece)
        self.size += -(-len(piece) // ALIGNMENT) * ALIGNMENT

    def _rounded(self, values: Tensor) -> Tensor:
        return values.bfloat16().float() if self.precision == "bf16" else values

    def _panels(self, weights: Tensor) -> NDArray[Any]:
        """Weights (units, inputs) block by block, see `gpurho.kernels._dense_lanes`."""
        rows, columns = (n // BLOCK for n in weights.shape)
        if self.kind == "fp32":
            return weights.reshape(rows, BLOCK, columns, BLOCK).permute(0, 2, 3, 1).contiguous().numpy()
        # As whole numbers, since NumPy has no bfloat16.
        bits = weights.bfloat16().view(torch.int16).reshape(rows, 2, N, columns, BLOCK // 2, 2)
        return bits.permute(0, 3, 1, 4, 2, 5).contiguous().numpy()


def _filled(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix in float32, filled up with zeros."""
    values = values.detach().float()
    return F.pad(values, (0, columns - values.size(1), 0, rows - values.size(0)))


def _aligned(shape: tuple[int, int]) -> Bytes:
    """Zeros that begin on a cache line, as do their rows if these are so long."""
    buffer = np.zeros(shape[0] * shape[1] + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + shape[0] * shape[1]].reshape(shape)


def _columns(inputs: Inputs) -> NDArray[np.float32]:
    """(chunks, COLUMN_ROWS, 32): what becomes of the features, see `gpurho.kernels._dense_lanes.COLUMN_ROWS`."""
    n = inputs.n_features
    rows = torch.zeros(COLUMN_ROWS, padded(n))
    slope, shift, low, high, baseline, rate = rows
    slope[:n], shift[:n] = inputs.slope, inputs.shift
    low.fill_(-UNBOUNDED)
    high.fill_(UNBOUNDED)
    low[:n], high[:n] = inputs.low, inputs.high
    if inputs.baseline is not None:
        baseline[: len(inputs.baseline)] = inputs.baseline
    if inputs.length > 0:
        for start, stop in zip(inputs.columns[::2], inputs.columns[1::2], strict=True):
            rate[start:stop] = 1.0 / inputs.length
    return np.ascontiguousarray(rows.reshape(COLUMN_ROWS, -1, BLOCK).transpose(0, 1).numpy())
