"""CUDA kernel that finds the candidate atoms of each batch of grid points: one thread block per batch and species."""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
import math
from collections.abc import Callable
from typing import Any

from numba import cuda, float64, int32, uint8

PAD = 1.0e-3
"""Slack of every search radius (angstrom), above the tie tolerance and the rounding of float32."""

THREADS = 128
BINS = 512
"""Of the histogram of squared distances."""

SIGNATURE = (
    float64[:, ::1], int32[::1], int32[::1],
    float64[:, ::1], int32[:, ::1], float64, float64, float64, float64, int32, int32, int32,
    int32, int32, float64, int32[::1],
    float64[:, ::1], float64[::1], int32[::1], int32[:, ::1], int32[::1], int32[:, ::1], uint8[::1],
)  # fmt: skip


def cell_index(x, origin, edge):
    """Index of the cell of coordinate x along one axis; may lie outside of the box."""
    return int(math.floor((x - origin) / edge))  # noqa: RUF046  (a float in CUDA)


def _inclusive_scan(buffer, thread, threads, value):
    """Running sums of `value` over the block's threads, into `buffer` (OUTPUT)."""
    buffer[thread] = value
    cuda.syncthreads()
    step = 1
    while step < threads:
        before = 0
        if thread >= step:
            before = buffer[thread - step]
        cuda.syncthreads()
        buffer[thread] += before
        cuda.syncthreads()
        step *= 2


def _largest(buffer, thread, threads, value):
    """The largest `value` of the block's threads, for each of them."""
    cuda.syncthreads()
    buffer[thread] = value
    cuda.syncthreads()
    step = threads // 2
    while step > 0:
        if thread < step:
            buffer[thread] = max(buffer[thread], buffer[thread + step])
        cuda.syncthreads()
        step //= 2
    return buffer[0]


def _row_of(ends, q, rows):
    """The first row whose running sum exceeds q."""
    low = 0
    high = rows - 1
    while low < high:
        middle = (low + high) // 2
        if ends[middle] > q:
            high = middle
        else:
            low = middle + 1
    return low


def make_gather(threads: int, bins: int) -> Callable[..., Any]:
    """The kernel, for launches of (n_species * n_batches) blocks of `threads` (a power of two) threads."""
    inclusive_scan = cuda.jit(device=True)(_inclusive_scan)
    largest = cuda.jit(device=True)(_largest)
    row_of = cuda.jit(device=True)(_row_of)
    cell_of = cuda.jit(device=True)(cell_index)
    per_thread = bins // threads

    def gather(
        points, order, batch_start,
        positions, cell_start, origin_x, origin_y, origin_z, edge, cells_x, cells_y, cells_z,
        n_sorted, n_fine, reach, class_sizes,
        spheres, cuts, counts, lists, class_counts, class_entries, exact,
    ):  # fmt: skip
        """Candidates of a batch: every atom that is among the `n_sorted` nearest of one of its points.

        OUTPUT: ``spheres[batch]`` centre and radius; ``cuts[entry]`` the candidates' largest distance from the
        centre; ``counts[entry]`` how many there are; ``lists[entry]`` the first of them, as many as fit;
        ``class_entries[c, :class_counts[c]]`` the entries whose candidates fit into network c;
        ``class_counts[-1]`` the most candidates of an entry; ``exact`` 1 for the points of an entry that has too many
        for the largest network or too few for the fast path. An entry is a species' batch, species-major.
        """
        thread = cuda.threadIdx.x
        entry = cuda.blockIdx.x
        n_batches = len(batch_start) - 1
        species = entry // n_batches
        batch = entry - species * n_batches
        reals = cuda.shared.array(threads, float64)
        ends = cuda.shared.array(threads, int32)
        sums = cuda.shared.array(threads, int32)
        offsets = cuda.shared.array(threads, int32)
        histogram = cuda.shared.array(bins, int32)
        nth = cuda.shared.array(1, float64)
        first = batch_start[batch]
        last = batch_start[batch + 1]

        # The sphere around the batch: the centre of its bounding box, and the farthest point.
        p = order[first]
        high_x = low_x = points[p, 0]
        high_y = low_y = points[p, 1]
        high_z = low_z = points[p, 2]
        for q in range(first + thread, last, threads):
            p = order[q]
            low_x = min(low_x, points[p, 0])
            low_y = min(low_y, points[p, 1])
            low_z = min(low_z, points[p, 2])
            high_x = max(high_x, points[p, 0])
            high_y = max(high_y, points[p, 1])
            high_z = max(high_z, points[p, 2])
        x = 0.5 * (largest(reals, thread, threads, high_x) - largest(reals, thread, threads, -low_x))
        y = 0.5 * (largest(reals, thread, threads, high_y) - largest(reals, thread, threads, -low_y))
        z = 0.5 * (largest(reals, thread, threads, high_z) - largest(reals, thread, threads, -low_z))
        square = 0.0
        for q in range(first + thread, last, threads):
            p = order[q]
            square = max(square, (points[p, 0] - x) ** 2 + (points[p, 1] - y) ** 2 + (points[p, 2] - z) ** 2)
        radius = math.sqrt(largest(reals, thread, threads, square))
        if thread == 0:
            spheres[batch, 0] = x
            spheres[batch, 1] = y
            spheres[batch, 2] = z
            spheres[batch, 3] = radius
            nth[0] = math.inf

        far = reach + radius + PAD
        first_x = max(0, cell_of(x - far, origin_x, edge))
        first_y = max(0, cell_of(y - far, origin_y, edge))
        first_z = max(0, cell_of(z - far, origin_z, edge))
        last_x = min(cells_x - 1, cell_of(x + far, origin_x, edge))
        last_y = min(cells_y - 1, cell_of(y + far, origin_y, edge))
        last_z = min(cells_z - 1, cell_of(z + far, origin_z, edge))
        width = max(0, last_y - first_y + 1)
        rows = max(0, last_x - first_x + 1) * width
        if last_z < first_z:
            rows = 0
        for i in range(thread, bins, threads):
            histogram[i] = 0
        cuda.syncthreads()

        scale = bins / (far * far)
        n = 0
        # Phase 0 counts the atoms by distance, phase 1 lists those within the radius that this gives.
        for phase in range(2):
            for chunk in range(0, rows, threads):
                length = 0
                begin = 0
                if chunk + thread < rows:
                    i = (chunk + thread) // width
                    j = chunk + thread - i * width
                    row = ((first_x + i) * cells_y + first_y + j) * cells_z
                    begin = cell_start[species, row + first_z]
                    length = cell_start[species, row + last_z + 1] - begin
                inclusive_scan(ends, thread, threads, length)
                # Atom q of the chunk is offsets[row of q] + q.
                offsets[thread] = begin - (ends[thread] - length)
                cuda.syncthreads()
                total = ends[threads - 1]
                each = (total + threads - 1) // threads
                stop = min((thread + 1) * each, total)
                row = row_of(ends, thread * each, threads)
                kept = 0
                for q in range(thread * each, stop):
                    while ends[row] <= q:
                        row += 1
                    a = offsets[row] + q
                    square = (positions[a, 0] - x) ** 2 + (positions[a, 1] - y) ** 2 + (positions[a, 2] - z) ** 2
                    if square <= far * far:
                        kept += 1
                        if phase == 0:
                            cuda.atomic.add(histogram, min(int(square * scale), bins - 1), 1)
                if phase == 1:
                    inclusive_scan(sums, thread, threads, kept)
                    slot = n + sums[thread] - kept
                    n += sums[threads - 1]
                    row = row_of(ends, thread * each, threads)
                    for q in range(thread * each, stop):
                        while ends[row] <= q:
                            row += 1
                        a = offsets[row] + q
                        square = (positions[a, 0] - x) ** 2 + (positions[a, 1] - y) ** 2 + (positions[a, 2] - z) ** 2
                        if square <= far * far:
                            if slot < lists.shape[1]:
                                lists[entry, slot] = a
                            slot += 1
                cuda.syncthreads()
            if phase == 0:
                cuda.syncthreads()
                mine = 0
                for i in range(per_thread):
                    mine += histogram[thread * per_thread + i]
                inclusive_scan(sums, thread, threads, mine)
                before = sums[thread] - mine
                if before < n_sorted and n_sorted <= sums[thread]:
                    i = thread * per_thread
                    before += histogram[i]
                    while before < n_sorted:
                        i += 1
                        before += histogram[i]
                    # The upper edge of the bin of the n_sorted-th atom: no nearer than that atom.
                    nth[0] = math.sqrt((i + 1) / scale)
                cuda.syncthreads()
                far = min(nth[0] + 2.0 * radius + PAD, far)

        group = 0
        while group < len(class_sizes) and class_sizes[group] < max(n, n_sorted):
            group += 1
        fast = n >= n_fine and group < len(class_sizes)
        if not fast:
            for q in range(first + thread, last, threads):
                exact[order[q]] = 1
        if thread == 0:
            cuts[entry] = far
            counts[entry] = n
            cuda.atomic.max(class_counts, len(class_sizes), n)
            if fast:
                class_entries[group, cuda.atomic.add(class_counts, group, 1)] = entry

    return gather
