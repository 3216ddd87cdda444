"""Slow references in float64 NumPy, written from the definitions and not from the library's code."""

from __future__ import annotations

import itertools

import numpy as np

TOLERANCE = 1e-5


def images(positions, cell, pbc, points, reach):
    """All images of the atoms that may lie within `reach` of the points: (positions, owners)."""
    inverse = np.linalg.inv(cell)
    f_atoms, f_points = positions @ inverse, points @ inverse
    margin = reach * np.linalg.norm(inverse, axis=0)
    low = np.floor(f_points.min(0) - margin - f_atoms.max(0)).astype(int)
    high = np.ceil(f_points.max(0) + margin - f_atoms.min(0)).astype(int)
    ranges = [range(a, b + 1) if p else range(1) for a, b, p in zip(low, high, pbc, strict=True)]
    shifts = np.array(list(itertools.product(*ranges)), float)
    everything = (positions[None] + (shifts @ cell)[:, None]).reshape(-1, 3)
    owners = np.tile(np.arange(len(positions)), len(shifts))
    near = np.linalg.norm(everything - points.mean(0), axis=1)
    keep = near <= reach + np.linalg.norm(points - points.mean(0), axis=1).max() + 1e-6
    return everything[keep], owners[keep]


def shells(distances):
    """Groups of indices of ascending distances: each holds all up to its first distance plus the tolerance."""
    groups = []
    for i, d in enumerate(distances):
        if groups and d <= distances[groups[-1][0]] + TOLERANCE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def cosine(u, v):
    nu, nv = np.linalg.norm(u), np.linalg.norm(v)
    return 0.0 if nu < 1e-6 or nv < 1e-6 else float(u @ v / (nu * nv))


def neighbor_vectors(atom, species_positions, cell, pbc, cutoff):
    """Vectors from an atom to all others of its species within the cutoff, ascending."""
    where, _ = images(species_positions, cell, pbc, atom[None], cutoff + 1.0)
    v = where - atom
    d = np.linalg.norm(v, axis=1)
    order = np.argsort(d, kind="stable")
    v, d = v[order], d[order]
    # One entry is the atom itself; a coincident atom is a neighbour.
    return v[1:][d[1:] <= cutoff], d[1:][d[1:] <= cutoff]


def row_of_cosines(u, vectors, distances, k):
    row = []
    for group in shells(distances):
        row += sorted((cosine(u, u + vectors[i]) for i in group), reverse=True)
        if len(row) >= k:
            break
    return (row + [0.0] * k)[:k]


def features(positions, symbols, cell, pbc, points, spec):
    """Descriptors of `points` as a (n_points, n_features) float64 array, and which rows the tie rule touched."""
    positions, cell, points = np.asarray(positions, float), np.asarray(cell, float), np.asarray(points, float)
    symbols = np.asarray(symbols)
    m, ma, k = spec.n_distances, spec.n_angle_atoms, spec.n_angle_neighbors
    out, tied = [], []
    neighbors = {}
    own = {s: positions[symbols == s] for s in spec.species}
    for point in points:
        row, ordered, touched = [], {}, False
        for s in spec.species:
            where, owners = (
                images(own[s], cell, pbc, point[None], spec.cutoff + 0.5)
                if len(own[s])
                else (
                    np.zeros((0, 3)),
                    np.zeros(0, int),
                )
            )
            d = np.linalg.norm(where - point, axis=1)
            order = np.argsort(d, kind="stable")
            order = order[d[order] <= spec.cutoff + TOLERANCE]
            where, owners, d = where[order], owners[order], d[order]
            row += list(np.minimum(np.concatenate([d[:m], np.full(m, spec.cutoff)])[:m], spec.cutoff))
            groups = shells(d)
            ordered[s] = (where, groups)
            rows = []
            for group in groups:
                if len(rows) >= ma:
                    break
                touched |= len(group) > 1
                block = []
                for i in group:
                    key = (s, int(owners[i]))
                    if key not in neighbors:
                        neighbors[key] = neighbor_vectors(own[s][owners[i]], own[s], cell, pbc, spec.cutoff)
                    v, dv = neighbors[key]
                    touched |= any(len(g) > 1 and g[0] < k for g in shells(dv))
                    block.append(row_of_cosines(where[i] - point, v, dv, k))
                rows += list(-np.sort(-np.array(block).reshape(len(group), k), axis=0))
            row += list((np.array(rows + [np.zeros(k)] * ma).reshape(-1, k) if k else np.zeros((ma, 0)))[:ma].ravel())
        for a, s in enumerate(spec.species):
            for t in spec.species[a + 1 :]:
                n = spec.n_cross
                block = np.zeros((n, n))
                (pa, ga), (pb, gb) = ordered[s], ordered[t]
                i = 0
                for group_a in ga:
                    if i >= n:
                        break
                    j, rows_here = 0, min(len(group_a), n - i)
                    for group_b in gb:
                        if j >= n:
                            break
                        columns_here = min(len(group_b), n - j)
                        touched |= len(group_a) > 1 or len(group_b) > 1
                        values = sorted(
                            (cosine(pa[p] - point, pb[q] - point) for p in group_a for q in group_b), reverse=True
                        )
                        block[i : i + rows_here, j : j + columns_here] = np.reshape(
                            values[: rows_here * columns_here], (rows_here, columns_here)
                        )
                        j += len(group_b)
                    i += len(group_a)
                row += list(block.ravel())
        out.append(row)
        tied.append(touched)
    return np.array(out), np.array(tied)


def smooth_features(positions, symbols, cell, pbc, points, spec):
    """The smooth descriptors of `points` as (n_points, n_features) float64.

    The sum over m of products of spherical harmonics is a Legendre polynomial of the angle between two atoms.
    """
    positions, cell, points = np.asarray(positions, float), np.asarray(cell, float), np.asarray(points, float)
    symbols = np.asarray(symbols)
    out = []
    for point in points:
        two_body, channels, directions = [], [], []
        for s, symbol in enumerate(spec.species):
            own = positions[symbols == symbol]
            where = images(own, cell, pbc, point[None], spec.cutoff)[0] if len(own) else np.zeros((0, 3))
            vectors = where - point
            r = np.linalg.norm(vectors, axis=1)
            vectors, r = vectors[r < spec.cutoff], r[r < spec.cutoff]
            envelope = 0.5 * (1 + np.cos(np.pi * r / spec.cutoff))
            radial = np.polynomial.chebyshev.chebvander(2 * r / spec.cutoff - 1, spec.n_radial - 1).T * envelope
            two_body += list(radial.sum(axis=1))
            matrix = np.eye(spec.n_radial)[: spec.n_basis] if spec.contraction is None else spec.contraction[s]
            channels.append(np.reshape(matrix, (spec.n_basis, spec.n_radial)) @ radial)
            directions.append(vectors / np.sqrt(r**2 + 1.0)[:, None])
        spectrum = []
        pairs = [(s, n) for s in range(len(spec.species)) for n in range(spec.n_basis)]
        angular = {}
        for s in range(len(spec.species)):
            for t in range(len(spec.species)):
                u, v = directions[s], directions[t]
                size = np.outer(np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1))
                cosines = np.clip(u @ v.T / np.maximum(size, 1e-300), -1, 1)
                legendre = np.polynomial.legendre.legvander(cosines, spec.l_max)
                angular[s, t] = [legendre[..., d] * size**d for d in range(spec.l_max + 1)]
        for i, (s, n) in enumerate(pairs):
            for t, k in pairs[i:]:
                spectrum += [channels[s][n] @ angular[s, t][d] @ channels[t][k] for d in range(1, spec.l_max + 1)]
        out.append(two_body + spectrum)
    return np.array(out)
