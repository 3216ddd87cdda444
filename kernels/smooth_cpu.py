"""CPU driver of the smooth descriptors (Numba, parallel over blocks of grid points)."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from gpurho.kernels._cpu_fast import bound, cell_range, gather, sphere


@njit(parallel=True, error_model="numpy", cache=True)
def fill_smooth(
    points, order, batch_start, block_start, positions, cell_start, origin, edge, shape,
    l_max, cutoff, matrix, out, counts,
):  # fmt: skip
    """Descriptors of points into `out` (OUTPUT), and per block the points without atoms (OUTPUT: counts)."""
    n_species, n_basis, n_radial = matrix.shape
    n_channels = n_species * n_basis
    n_lm = (l_max + 1) ** 2
    for block in prange(len(block_start) - 1):
        for batch in range(block_start[block], block_start[block + 1]):
            first = batch_start[batch]
            last = batch_start[batch + 1]
            centre, radius = sphere(points, order, first, last)
            low, high = cell_range(centre, cutoff + radius, origin, edge, shape)
            c = np.empty((n_channels, n_lm))
            y = np.empty(n_lm)
            p_lm = np.zeros((l_max + 2, l_max + 2))
            t = np.empty(max(2, n_radial))
            norm = np.empty((l_max + 1, l_max + 1))
            for deg in range(l_max + 1):
                for m in range(deg + 1):
                    norm[deg, m] = math.sqrt((2 if m else 1) * math.gamma(deg - m + 1) / math.gamma(deg + m + 1))
            seen = np.zeros(last - first, np.uint8)
            for q in range(first, last):
                o = order[q]
                out[o] = 0.0
                c[:] = 0.0
                for s in range(n_species):
                    room = bound(cell_start[s], low, high, shape)
                    ids = np.empty(room, np.int32)
                    d2s = np.empty(room)
                    n = gather(positions, cell_start[s], points[o], cutoff, low, high, shape, ids, d2s)
                    for i in range(n):
                        if d2s[i] >= cutoff * cutoff:
                            continue
                        seen[q - first] = 1
                        a = ids[i]
                        dx = positions[a, 0] - points[o, 0]
                        dy = positions[a, 1] - points[o, 1]
                        dz = positions[a, 2] - points[o, 2]
                        r = math.sqrt(d2s[i])
                        x = 2 * r / cutoff - 1
                        envelope = 0.5 * (1 + math.cos(math.pi * r / cutoff))
                        t[0] = envelope
                        t[1] = x * envelope
                        for k in range(2, n_radial):
                            t[k] = 2 * x * t[k - 1] - t[k - 2]
                        for k in range(n_radial):
                            out[o, s * n_radial + k] += t[k]
                        scale = 1.0 / math.sqrt(d2s[i] + 1.0)
                        ux = dx * scale
                        uy = dy * scale
                        uz = dz * scale
                        rr = d2s[i] * scale * scale
                        re = 1.0
                        im = 0.0
                        diagonal = 1.0
                        for m in range(l_max + 1):
                            p_lm[m, m] = diagonal
                            if m < l_max:
                                p_lm[m + 1, m] = (2 * m + 1) * uz * diagonal
                            for deg in range(m + 2, l_max + 1):
                                p_lm[deg, m] = (
                                    (2 * deg - 1) * uz * p_lm[deg - 1, m] - (deg + m - 1) * rr * p_lm[deg - 2, m]
                                ) / (deg - m)
                            for deg in range(m, l_max + 1):
                                w = norm[deg, m] * p_lm[deg, m]
                                y[deg * deg + deg + m] = w * re
                                if m > 0:
                                    y[deg * deg + deg - m] = w * im
                            re, im = ux * re - uy * im, ux * im + uy * re
                            diagonal *= 2 * m + 1
                        for b in range(n_basis):
                            radial = 0.0
                            for k in range(n_radial):
                                radial += matrix[s, b, k] * t[k]
                            for j in range(n_lm):
                                c[s * n_basis + b, j] += radial * y[j]
                column = n_species * n_radial
                for b in range(n_channels):
                    for d in range(b, n_channels):
                        for deg in range(1, l_max + 1):
                            total = 0.0
                            for j in range(deg * deg, (deg + 1) * (deg + 1)):
                                total += c[b, j] * c[d, j]
                            out[o, column] = total
                            column += 1
            for q in range(last - first):
                counts[block] += 1 - seen[q]
