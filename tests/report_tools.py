"""A density of known values for the tests of reports, and a reader of their pages."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
from predict_tools import TRICLINIC, triclinic_structure, wave

from gpurho.density import Density
from gpurho.grid import Grid

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'&"
VOID = {"meta", "link", "input", "br", "img"}


def arrays(shape: tuple[int, int, int] = (20, 24, 28)) -> tuple[Grid, np.ndarray, np.ndarray, np.ndarray]:
    """A triclinic grid, and a mean and two sigmas on it that differ everywhere."""
    grid = Grid(shape, TRICLINIC)
    mean = wave(grid, triclinic_structure()).astype(np.float32)
    aleatoric = (0.002 + 0.01 * mean).astype(np.float32)
    epistemic = (0.004 * (1 + np.roll(mean, 3, axis=1) ** 2)).astype(np.float32)
    return grid, mean, aleatoric, epistemic


def info(text: str = "toy") -> dict[str, Any]:
    """Provenance like that of a file, with `text` wherever a file may hold one."""
    spec = {
        "valence": {"Al": 3.0, "Si": 4.0},
        "descriptor": {"family": text, "cutoff": 6.0},
        "network": {"blocks": 1, "layers": 3, "width": text},
        "dft": {"engine": text, "kpts": [2, 2, 2], text: 1},
        "training": {"datasets": [{"file": text, "snapshots": 4}]},
        "metrics": {"dataset": text, "snapshots": 15, "l1_per_electron": 0.00439, "rmse": text, "n_points": 1000},
        "calibration": {"coverage": [0.7, 0.94, 0.99], "uncertainty": "analytic", "spearman": 0.25},
    }
    return {
        "electrons": 11.0,
        "model": {"name": text, "fingerprint": text, "spec": spec},
        "settings": {"uncertainty": "analytic", "device": text, "precision": text, "conserve": None},
        "versions": {"gpurho": text},
        "timing": {"total": 75.0, "points_per_second": 1234.0},
    }


def toy(text: str = "toy", uncertain: bool = True, **changes: Any) -> Density:
    """The density of `arrays` with the provenance of `info`."""
    grid, mean, aleatoric, epistemic = arrays()
    sigmas = (aleatoric, epistemic) if uncertain else ()
    return Density(grid, triclinic_structure(), mean, *sigmas, info=info(text) | changes)


class Page(HTMLParser):
    """A page as its elements (with attributes and own text), the rows of its tables, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.ids: dict[str, dict[str, str]] = {}
        self._open: list[str] = []
        self._strips: dict[str, np.ndarray] = {}
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        values = {k: v or "" for k, v in attributes}
        self.elements.append((tag, values))
        if "id" in values:
            assert values["id"] not in self.ids, f"{values['id']} twice"
            self.ids[values["id"]] = values
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")
        if tag == "image":
            self.ids[self._panel]["href"] = values["href"]
        if tag == "svg":
            self._panel = values.get("id", "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.texts.append(data)
            if "td" in self._open or "th" in self._open:
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        """All that is to be read."""
        return " ".join(" ".join(self.texts).split())

    @property
    def table(self) -> dict[str, str]:
        """Rows of two cells."""
        return {row[0]: row[1] for row in self.rows if len(row) == 2}

    @property
    def data(self) -> Any:
        """What the script is told."""
        return json.loads(self.scripts[0])

    def planes(self, panel: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Values of the planes of a picture, (n1, n2) each, read back from its colours; and half a colour's width."""
        from matplotlib import colormaps
        from PIL import Image

        attributes = self.ids[panel]
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["href"].split(",", 1)[1]))).convert("RGBA")
        pixels = np.asarray(picture).astype(int)
        name = {"mean": "viridis", "std": "magma"}[attributes["data-name"]]
        code = np.array(self.data["palettes"][attributes["data-name"]])
        colors = np.stack([code >> 16, (code >> 8) & 255, code & 255], axis=1)
        assert np.abs(colors - 255 * colormaps[name](np.linspace(0, 1, 255))[:, :3]).max() < 2
        assert len(set(code.tolist())) == 255
        order = np.argsort(code)
        seen = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
        level = order[np.searchsorted(code[order], seen).clip(0, 254)]
        assert (code[level] == seen)[pixels[..., 3] > 0].all(), "a colour that is none of the scale's"
        low, high = float(attributes["data-low"]), float(attributes["data-high"])
        part = level / 254
        values = low * (high / low) ** part if attributes["data-log"] == "1" else low + (high - low) * part
        values = np.where(pixels[..., 3] > 0, values, np.nan)
        rows = int(attributes["data-rows"])
        frames = [values[k : k + rows] for k in range(0, len(values), rows)]
        assert len(frames) == int(attributes["data-frames"])
        # A border of one pixel on the near sides and two on the far ones.
        return np.array((high - low) / 508), [frame[1:-2, 1:-2].T for frame in frames]
