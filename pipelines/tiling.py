"""The loop over tiles: descriptors and network on one device, compression and writing behind them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.errors import DeviceError
from gpurho.fields import Correction, Totals
from gpurho.kept import TileSums, totals_of
from gpurho.partition import Tile
from gpurho.pipelines.parts import parts_of
from gpurho.pipelines.settings import Job
from gpurho.store import FinishedTile
from gpurho.structure import Structure
from gpurho.trust import Trust

if TYPE_CHECKING:
    from torch import Tensor

    from gpurho.evaluator import Evaluator
    from gpurho.features import StartedFeatures
    from gpurho.integrals import IntegralErrors
    from gpurho.kernels.smooth import BlockNetwork

QUEUE = 4
"""Finished tiles that may wait for compression and writing; together with the tile at work they bound the memory."""


class Sink(Protocol):
    """Where tiles go; see `gpurho.store`."""

    @property
    def done(self) -> frozenset[int]: ...
    @property
    def totals(self) -> Totals: ...
    def encode(
        self,
        tile: Tile,
        values: list[NDArray[np.float32]],
        counts: dict[str, int],
        errors: NDArray[np.float64] | None = None,
        totals: Totals | None = None,
        sums: TileSums | None = None,
    ) -> FinishedTile: ...
    def write(self, finished: FinishedTile) -> None: ...
    def close(self) -> None: ...


class FinalSink(Sink, Protocol):
    """A sink that makes a density of its tiles."""

    def finish(self, correction: Correction, trust: Trust | None = None) -> Density: ...


@dataclass
class Timing:
    """Seconds by stage. `wait` is the time for the results before and the sink.

    On a GPU `features` and `network` are the time to launch the work, and the work itself lies in `wait`.
    """

    setup: float = 0.0
    features: float = 0.0
    network: float = 0.0
    wait: float = 0.0
    total: float = 0.0
    n_points: int = 0

    @property
    def points_per_second(self) -> float:
        """Points over the time of the whole run."""
        return self.n_points / self.total if self.total > 0 else 0.0


@dataclass(frozen=True)
class Begun:
    """A tile's outputs as `Stages.network` returns them, and how its descriptors were begun."""

    outputs: list[Tensor]
    features: StartedFeatures
    feature_seconds: float
    network_seconds: float


@dataclass(frozen=True)
class Waiting:
    """A tile that the device is at work on; `fetched` waits for its results on the host."""

    tile: Tile
    features: StartedFeatures
    fetched: Callable[[], list[NDArray[Any]]]
    atoms: NDArray[np.int64] | None
    feature_seconds: float
    network_seconds: float


def cut_short(started: StartedFeatures) -> bool:
    """Whether the device had too little room, and the values are none; waits for it. It has more the next time."""
    return started.marks is not None and started.settle(started.marks.cpu().numpy()) is None


class Background:
    """Encodes tiles in a few threads and writes them in order in one more; errors come back at the next tile."""

    def __init__(self, sink: Sink, threads: int) -> None:
        self._sink = sink
        self._encoders = ThreadPoolExecutor(threads, thread_name_prefix="gpurho-encode")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="gpurho-write")
        self._pending: deque[Future[None]] = deque()
        self._depth = QUEUE + threads
        self._failed = False

    def submit(
        self,
        tile: Tile,
        values: list[NDArray[np.float32]],
        counts: dict[str, int],
        errors: NDArray[np.float64] | None = None,
        totals: Totals | None = None,
        sums: TileSums | None = None,
    ) -> None:
        """Hand a tile over; waits when too many are in hand."""
        while len(self._pending) >= self._depth or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        encoded = self._encoders.submit(self._sink.encode, tile, values, counts, errors, totals, sums)
        self._pending.append(self._writer.submit(self._write, encoded))

    def _write(self, encoded: Future[FinishedTile]) -> None:
        # After a failure nothing more is written, so that the tiles of a file always lie in order.
        if self._failed:
            return
        try:
            self._sink.write(encoded.result())
        except BaseException:
            self._failed = True
            raise

    def drain(self) -> None:
        """Wait for all tiles in hand."""
        while self._pending:
            self._pending.popleft().result()

    def stop(self) -> None:
        """Finish what is in hand, unless writing failed: after an interrupt these tiles are worth keeping."""
        for pool in (self._encoders, self._writer):
            pool.shutdown(wait=True)


class Stages:
    """Descriptors and network of a job on its device.

    `earlier` stages of a job with the same model and settings, but for atoms and tiles, lend their network and buffers.
    """

    def __init__(self, job: Job, earlier: Stages | None = None) -> None:
        import torch

        from gpurho.descriptors import Environment
        from gpurho.integrals import IntegralErrors

        self.job = job
        assert isinstance(job.structure, Structure)  # see `gpurho.pipelines.parts`
        self.environment = Environment(job.structure, job.model.spec.descriptor, job.device, job.bins)
        self.cuda = job.device.startswith("cuda")
        self._copies: Any = torch.cuda.Stream(job.device) if self.cuda else None
        self._torch = torch
        self.evaluator: Evaluator
        self._errors: IntegralErrors | None = None
        self._features: Any
        self._by_blocks: BlockNetwork | None
        self._reducer: Reducer | None = None
        if not job.keep.field_alone:
            from gpurho.reductions import Reducer

            self._pieces = job.layout().pieces
            self._reducer = Reducer(job.keep, self._pieces, job.grid, job.names, self.environment, job.device, job.halo)
        if earlier is not None:
            self.evaluator, self._errors, self._by_blocks = earlier.evaluator, earlier._errors, earlier._by_blocks
            enough = len(earlier._features) >= max_tile_points(job)
            self._features = earlier._features if enough or self._by_blocks is not None else self._buffer()
            return
        self.evaluator = job.model.evaluator(
            device=job.device,
            precision=job.precision,
            executor=job.executor,
            uncertainty=job.uncertainty,
            samples=job.samples,
            seed=job.seed,
        )
        if job.uncertainty is not None:
            self._errors = IntegralErrors(job.model, job.uncertainty, job.device, job.samples, job.seed)
        smooth = job.model.spec.descriptor.family == "smooth"
        self._by_blocks = self.evaluator.by_blocks if smooth and not self.cuda else None
        self._features = self._buffer() if self._by_blocks is None else ()

    def _buffer(self) -> Any:
        """One buffer for all tiles: gigabytes of fresh pages would cost more than the descriptors."""
        shape = (max_tile_points(self.job), self.job.model.spec.descriptor.n_features)
        if self.cuda:
            return self._torch.empty(shape, dtype=self._torch.float32, device=self.job.device)
        return np.empty(shape, dtype=np.float32)

    def features(self, tile: Tile) -> tuple[Tensor, StartedFeatures]:
        """Descriptors of a tile on the device, valid until the next call, and as they were begun; not by blocks."""
        made = self.environment.start_tile(self.job.grid, tile, out=self._features[: tile.n_points])
        return made.values if self.cuda else self._torch.from_numpy(made.values), made

    def evaluate(self, tile: Tile, wait: bool = False) -> Begun:
        """Descriptors and network of a tile; with `wait` each waits for the device, for the times to be theirs."""
        start = time.perf_counter()
        if self._by_blocks is not None:
            return self._block_by_block(tile, self._by_blocks)
        features, made = self.features(tile)
        if wait:
            self.synchronize()
        middle = time.perf_counter()
        outputs = self.network(features, tile)
        if wait:
            self.synchronize()
        return Begun(outputs, made, middle - start, time.perf_counter() - middle)

    def begin(self, tile: Tile) -> Waiting:
        """Set the device to work on a tile; nothing waits for it."""
        begun = self.evaluate(tile)
        start = time.perf_counter()
        results, atoms = self.reduced(begun.outputs, tile)
        if begun.features.marks is not None:
            results.append(begun.features.marks)
        fetched = self.fetch(results)
        seconds = begun.network_seconds + time.perf_counter() - start
        return Waiting(tile, begun.features, fetched, atoms, begun.feature_seconds, seconds)

    def finish(self, waiting: Waiting) -> tuple[Any, ...]:
        """Results of a tile on the host as `Background.submit` takes them after the tile; waits for the device."""
        while True:
            arrays = waiting.fetched()
            made = waiting.features.settle(None if waiting.features.marks is None else arrays.pop())
            if made is not None:
                counts = {"n_capped": made.n_capped, "n_tied": made.n_tied}
                return self.sorted_out(arrays, waiting.tile, counts, waiting.atoms)
            waiting = self.begin(waiting.tile)

    def network(self, features: Tensor, tile: Tile) -> list[Tensor]:
        """The fields of a tile on the device, and what `sorted_out` needs with them; nothing waits for the device.

        The fields are the mean and, where wanted, both standard deviations; then comes the vector of the tile's
        integral, see `gpurho.integrals`, and the flags of `gpurho.evaluator.Evaluator.unchecked`.
        """
        with self._torch.inference_mode():
            values, flags = self.evaluator.unchecked(features)
            if self._errors is not None:
                from gpurho.integrals import sublattice

                box, weight = sublattice(tile, self.job.grid.steps)
                chosen = features.view(*tile.shape, -1)[box].reshape(-1, features.size(1))
                values.append(self._errors(chosen)[0] * weight)
        return [*values, flags]

    def _block_by_block(self, tile: Tile, network: BlockNetwork) -> Begun:
        """As `features` and `network`, but that the network comes to the descriptors while these are in a cache."""
        from gpurho.features import Features, StartedFeatures
        from gpurho.integrals import sublattice

        start = time.perf_counter()
        chosen, weight = np.empty(0, np.int64), 0.0
        if self._errors is not None:
            box, weight = sublattice(tile, self.job.grid.steps)
            chosen = np.arange(tile.n_points).reshape(tile.shape)[box].ravel()
        made = self.environment.tile_outputs(self.job.grid, tile, network, chosen)
        middle = time.perf_counter()
        values, flags = self.evaluator.finished(made.rows)
        if self._errors is not None:
            values.append(self._errors(self._torch.from_numpy(made.features))[0] * weight)
        described = (middle - start) * (1.0 - made.network_share)
        counts = Features(None, made.n_capped, 0, 0)
        begun = StartedFeatures(None, None, lambda marks: counts)
        return Begun([*values, flags], begun, described, time.perf_counter() - start - described)

    def reduced(self, outputs: list[Tensor], tile: Tile) -> tuple[list[Tensor], NDArray[np.int64] | None]:
        """What is kept of the fields that `network` gave, still on the device; and the atoms that their sums are of."""
        if self._reducer is None:
            return outputs, None
        n = len(self.job.names)
        with self._torch.inference_mode():
            results, atoms = self._reducer(tile, outputs[:n])
        if atoms is not None and self.job.owners is not None:
            atoms = self.job.owners[atoms]
        return results + outputs[n:], atoms

    def sorted_out(
        self, arrays: list[NDArray[Any]], tile: Tile, counts: dict[str, int], atoms: NDArray[np.int64] | None
    ) -> tuple[Any, ...]:
        """Results on the host as `Background.submit` takes them after the tile.

        Raises `ModelError` where a field is not finite.
        """
        *arrays, flags = arrays
        counts = counts | {"n_outside": self.evaluator.settle(flags.tolist(), tile.n_points)}
        if self._reducer is None:
            n = len(self.job.names)
            return arrays[:n], counts, arrays[n] if len(arrays) > n else None
        n = sum(piece.box(tile) is not None for piece in self._pieces)
        rest = iter(arrays[n:])
        totals = totals_of(tile.n_points, next(rest), next(rest), counts)
        bins = next(rest) if self.job.keep.histogram is not None else None
        sums = TileSums.of(bins, atoms, None if atoms is None else next(rest))
        return arrays[:n], counts, next(rest, None), totals, sums

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            self._torch.cuda.synchronize(self.job.device)

    def fetch(self, values: list[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """Begin the copy of results to the host; the function returned waits for it."""
        if not self.cuda:
            arrays = [value.numpy() for value in values]
            return lambda: arrays
        cuda = self._torch.cuda
        host = [self._torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for v in values]
        # On a stream of their own, beside the work on the next tile.
        self._copies.wait_stream(cuda.current_stream(self.job.device))
        with cuda.stream(self._copies):
            for target, value in zip(host, values, strict=True):
                value.record_stream(self._copies)
                target.copy_(value, non_blocking=True)
            event = cuda.Event()
            event.record()

        def wait() -> list[NDArray[Any]]:
            event.synchronize()
            return [target.numpy() for target in host]

        return wait


def max_tile_points(job: Job) -> int:
    """Points of the largest tile of a job."""
    spans = [b - a for a, b in zip(job.tiles.start, job.tiles.stop, strict=True)]
    n = 1
    for span, t in zip(spans, job.tiles.tile_shape, strict=True):
        n *= min(span, t)
    return n


def encoder_threads(job: Job) -> int:
    """Threads that compress: one beside a CPU at work; for a GPU half of the cores, since gzip is what is slow."""
    return max(1, min(8, (os.cpu_count() or 2) // 2)) if job.device.startswith("cuda") else 1


def run_tiles(job: Job, sink: Sink, tick: Callable[[int], None], make_stages: Callable[..., Stages] = Stages) -> Timing:
    """Predict all tiles that `sink` does not have yet; `tick` is told the points of each finished tile."""
    import torch

    timing = Timing()
    begin = time.perf_counter()
    done = sink.done
    if len(done) == len(job.tiles):
        return timing
    background = Background(sink, encoder_threads(job))
    waiting: tuple[Stages, Waiting] | None = None
    stages: Stages | None = None

    def hand_over() -> None:
        if waiting is not None:
            # By its own stages: those of the next part of the atoms may have begun.
            tile = waiting[1].tile
            background.submit(tile, *waiting[0].finish(waiting[1]))
            tick(tile.n_points)
            timing.n_points += tile.n_points

    try:
        for part, tiles in parts_of(job, done):
            start = time.perf_counter()
            stages = make_stages(part) if stages is None else make_stages(part, stages)
            timing.setup += time.perf_counter() - start
            for tile in tiles:
                begun = stages.begin(tile)
                end = time.perf_counter()
                # The tile before this one comes down while the device works on this one.
                hand_over()
                waiting = stages, begun
                timing.features += begun.feature_seconds
                timing.network += begun.network_seconds
                timing.wait += time.perf_counter() - end
        start = time.perf_counter()
        hand_over()
        background.drain()
        timing.wait += time.perf_counter() - start
    except torch.OutOfMemoryError:
        raise DeviceError(
            f"a tile of {max_tile_points(job):,} points does not fit on {job.device}; give a smaller tile_shape"
            " (--tile-shape 32 32 32)"
        ) from None
    finally:
        background.stop()
    timing.total = time.perf_counter() - begin
    return timing
