"""Parts of a density field: sums over blocks, the electron-conserving correction, and arrays read on demand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from gpurho.errors import SettingsError

Box = tuple[slice, slice, slice]
NAMES = ("mean", "aleatoric", "epistemic")
"""The stored fields, in this order everywhere."""

BLOCK = 64
"""Points along each axis of the blocks that streaming operations read when the field names no chunk shape."""


@dataclass(frozen=True)
class Totals:
    """Sums over points, in units of e/angstrom^3 and its square; multiply by the volume per point for integrals."""

    n_points: int = 0
    sum_mean: float = 0.0
    sum_std: float = 0.0
    sum_aleatoric2: float = 0.0
    sum_epistemic: float = 0.0
    sum_epistemic2: float = 0.0
    min_mean: float = math.inf
    max_mean: float = -math.inf
    max_std: float = 0.0
    n_negative: int = 0
    n_capped: int = 0
    n_tied: int = 0
    n_outside: int = 0

    @classmethod
    def of_block(
        cls,
        mean: NDArray[np.float32],
        aleatoric: NDArray[np.float32] | None = None,
        epistemic: NDArray[np.float32] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> Totals:
        """The sums of one block of points, accumulated in float64; `counts` are n_capped, n_tied, n_outside."""
        sums: dict[str, Any] = {
            "n_points": mean.size,
            "sum_mean": float(mean.sum(dtype=np.float64)),
            "min_mean": float(mean.min()),
            "max_mean": float(mean.max()),
            "n_negative": int((mean < 0).sum()),
            **(counts or {}),
        }
        if aleatoric is not None and epistemic is not None:
            a2, e2 = np.square(aleatoric, dtype=np.float64), np.square(epistemic, dtype=np.float64)
            std = np.sqrt(a2 + e2)
            sums |= {
                "sum_std": float(std.sum()),
                "sum_aleatoric2": float(a2.sum()),
                "sum_epistemic": float(epistemic.sum(dtype=np.float64)),
                "sum_epistemic2": float(e2.sum()),
                "max_std": float(std.max()),
            }
        return cls(**sums)

    @classmethod
    def of_row(cls, columns: Sequence[str], row: Sequence[float]) -> Totals:
        """The sums in a row of a table whose columns are named."""
        values: dict[str, Any] = {
            name: int(value) if name.startswith("n_") else value for name, value in zip(columns, row, strict=True)
        }
        return cls(**values)

    @classmethod
    def merged(cls, parts: Iterable[Totals]) -> Totals:
        """The sums over all `parts`, rounded once, so that their order does not matter."""
        rows = list(parts)
        merged: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(row, field.name) for row in rows]
            if field.name.startswith("n_"):
                merged[field.name] = sum(values)
            elif field.name.startswith("sum_"):
                merged[field.name] = math.fsum(values)
            else:
                merged[field.name] = (min if field.name.startswith("min_") else max)(values, default=field.default)
        return cls(**merged)

    @property
    def sum_variance(self) -> float:
        """Sum of the total variance."""
        return self.sum_aleatoric2 + self.sum_epistemic2

    @property
    def finite(self) -> bool:
        """Whether every value summed was finite."""
        return all(math.isfinite(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Correction:
    """What makes a predicted density integrate to the number of electrons.

    ``mean -> scale * mean + shift * (aleatoric^2 + epistemic^2)``, both sigmas times `scale`.

    kind "uniform" is the paper's equation (6), ``rho * N_e / integral(rho)``: it acts on the sigmas alike. kind
    "uncertainty" adds the missing charge in proportion to the local variance, which is the shift of the mean when
    independent Gaussian errors are conditioned on their sum; it leaves the sigmas as they are, since one condition
    on n points removes one part in n of the variance.
    """

    kind: str | None = None
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def conserving(cls, kind: str | None, totals: Totals, dv: float, electrons: float) -> Correction:
        """The correction of `kind` that gives the integral `electrons`; `dv` in angstrom^3."""
        if kind is None:
            return cls()
        found = totals.sum_mean * dv
        if kind == "uniform":
            if not found > 0:
                raise SettingsError(
                    f"conserve 'uniform' cannot scale a density that integrates to {found:.6g};"
                    " use 'uncertainty' or None"
                )
            return cls(kind, scale=electrons / found)
        if kind == "uncertainty":
            if not totals.sum_variance > 0:
                raise SettingsError("conserve 'uncertainty' needs a variance that is not zero; use conserve='uniform'")
            return cls(kind, shift=(electrons - found) / (totals.sum_variance * dv))
        raise SettingsError(f"conserve {kind!r} is not known; give 'uniform', 'uncertainty' or None")

    @property
    def trivial(self) -> bool:
        """Whether nothing changes."""
        return self.scale == 1.0 and self.shift == 0.0

    def needs(self, name: str) -> tuple[str, ...]:
        """Raw fields from which the corrected field `name` is made."""
        return NAMES if name == "mean" and self.shift != 0.0 else (name,)

    def apply(self, name: str, raw: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """The corrected field `name`, float32, from raw arrays of one block; arithmetic in float64."""
        value = raw[name]
        if self.trivial or (name != "mean" and self.scale == 1.0):
            return value
        result = self.scale * value.astype(np.float64)
        if name == "mean" and self.shift != 0.0:
            for other in NAMES[1:]:
                result += self.shift * np.square(raw[other], dtype=np.float64)
        return result.astype(np.float32)


class LazyField(NDArrayOperatorsMixin):
    """A three-dimensional array whose boxes are read when they are asked for.

    Indexing takes whole numbers, slices and ``...`` as NumPy does; ``min``, ``max``, ``sum``, ``mean`` and ``std`` of
    all points read a chunk at a time. Arithmetic and ``np.asarray(field)`` read all of it.
    """

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(
        self,
        read: Callable[[Box], NDArray[np.float32]],
        shape: tuple[int, int, int],
        chunks: tuple[int, int, int] = (BLOCK, BLOCK, BLOCK),
        phase: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """`read` gives a box of unit-step slices; the borders of chunks lie at multiples of `chunks` less `phase`."""
        self._read, self.shape, self.chunks, self.phase = read, shape, chunks, phase

    @property
    def size(self) -> int:
        """Number of points."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<LazyField {self.shape} float32, read on demand>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a field on disk cannot be an array without a copy")
        values = self[...]
        return values if dtype is None else values.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [np.asarray(x) if isinstance(x, LazyField) else x for x in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        box, then = _normal_index(key, self.shape)
        return self._read(box)[then]

    def __getattr__(self, name: str) -> Any:
        if hasattr(np.ndarray, name) and not name.startswith("_"):
            raise AttributeError(f"a field on disk has no {name!r}; read it first: np.asarray(field).{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _parts(self) -> Iterator[NDArray[np.float64]]:
        return (self[box].astype(np.float64) for box in blocks(self))

    def min(self) -> float:
        """The smallest value."""
        return float(min(part.min() for part in self._parts()))

    def max(self) -> float:
        """The largest value."""
        return float(max(part.max() for part in self._parts()))

    def sum(self) -> float:
        """The sum of all values, in float64."""
        return math.fsum(part.sum() for part in self._parts())

    def mean(self) -> float:
        """The mean of all values, in float64."""
        return self.sum() / self.size

    def std(self) -> float:
        """The standard deviation of all values, in float64."""
        mean = self.mean()
        return math.sqrt(math.fsum(np.square(part - mean).sum() for part in self._parts()) / self.size)


Field = NDArray[np.float32] | LazyField


def _normal_index(key: Any, shape: tuple[int, int, int]) -> tuple[Box, tuple[Any, ...]]:
    """A NumPy basic index as the smallest box that holds it, and the index to apply to that box."""
    items = list(key) if isinstance(key, tuple) else [key]
    if sum(item is Ellipsis for item in items) > 1 or len(items) - (Ellipsis in items) > 3:
        raise IndexError(f"index {key!r} has more than three axes; give at most three of whole numbers, slices, '...'")
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (4 - len(items))
    items += [slice(None)] * (3 - len(items))
    box: list[slice] = []
    then: list[Any] = []
    for item, n in zip(items, shape, strict=True):
        if isinstance(item, slice):
            span = range(*item.indices(n))
            low, high = (min(span[0], span[-1]), max(span[0], span[-1]) + 1) if span else (0, 0)
            box.append(slice(low, high))
            then.append(slice(None, None, span.step) if span else slice(None))
        elif isinstance(item, (int, np.integer)) and not isinstance(item, (bool, np.bool_)):
            i = int(item) + n if item < 0 else int(item)
            if not 0 <= i < n:
                raise IndexError(f"index {item} is out of range for an axis of {n} points")
            box.append(slice(i, i + 1))
            then.append(0)
        else:
            raise IndexError(
                f"index {item!r} is not a whole number, slice or '...'; np.asarray(field) takes the rest of NumPy's"
            )
    return (box[0], box[1], box[2]), tuple(then)


def blocks(field: Field, depth: tuple[int, int, int] | None = None) -> Iterator[Box]:
    """Boxes that cover `field`, aligned with its chunks, so that each chunk is read once."""
    chunks = depth or (field.chunks if isinstance(field, LazyField) else (BLOCK, BLOCK, BLOCK))
    phase = field.phase if isinstance(field, LazyField) and depth is None else (0, 0, 0)
    spans = []
    for n, c, p in zip(field.shape, chunks, phase, strict=True):
        edges = [0, *range(c - p % c, n, c), n]
        spans.append([slice(a, b) for a, b in itertools.pairwise(edges)])
    for i in spans[0]:
        for j in spans[1]:
            for k in spans[2]:
                yield (i, j, k)


def take(field: Field, i: NDArray[np.int64], j: NDArray[np.int64], k: NDArray[np.int64]) -> NDArray[np.float32]:
    """``field[i, j, k]`` for index arrays of one shape; of a lazy field each chunk that is met is read once."""
    if not isinstance(field, LazyField):
        return np.asarray(field[i, j, k])
    where = [(index.reshape(-1) + p % c) // c for index, c, p in zip((i, j, k), field.chunks, field.phase, strict=True)]
    counts = [-(-(n + c) // c) for n, c in zip(field.shape, field.chunks, strict=True)]
    number = (where[0] * counts[1] + where[1]) * counts[2] + where[2]
    order = np.argsort(number, kind="stable")
    breaks = np.flatnonzero(np.diff(number[order])) + 1
    flat = [index.reshape(-1) for index in (i, j, k)]
    result = np.empty(i.size, dtype=np.float32)
    for group in np.split(order, breaks):
        if group.size == 0:
            continue
        local = [index[group] for index in flat]
        low = [int(index.min()) for index in local]
        box = tuple(slice(lo, int(index.max()) + 1) for lo, index in zip(low, local, strict=True))
        block = field[box]
        result[group] = block[local[0] - low[0], local[1] - low[1], local[2] - low[2]]
    return result.reshape(i.shape)
