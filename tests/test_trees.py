"""A search in threads that fails must not look like an answer."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from gpurho.trees import nearest


def test_a_thread_that_failed_is_an_error() -> None:
    rng = np.random.default_rng(0)
    tree, points = cKDTree(rng.random((50, 3))), rng.random((20, 3))
    distances, index = nearest(tree, points, 2)
    wanted = np.linalg.norm(tree.data[None] - points[:, None], axis=2)
    np.testing.assert_array_equal(index[:, 0], wanted.argmin(1))
    np.testing.assert_allclose(distances, np.sort(wanted, axis=1)[:, :2])

    class Failed:
        """What SciPy gives back where a thread met an exception."""

        n = 50

        def query(self, points: np.ndarray, k: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
            found = tree.query(points, k=k)
            found[0][7:] = np.inf
            found[1][7:] = self.n
            return found[0], found[1]

    with pytest.raises(MemoryError, match="ended early"):
        nearest(Failed(), points, 2)
