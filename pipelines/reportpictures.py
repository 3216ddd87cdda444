"""Pictures of a report: planes as indexed PNG inside of SVG, with atoms, axes and a scale of colours."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import NDArray

from gpurho.pipelines.reportslices import Frames, Mark, Scale
from gpurho.plotting import COLORS

WIDTH, HEIGHT = 318.0, 340.0
"""Largest picture of a slice, without axes, in units that are pixels where there is room."""

SMALL = 178.0
"""Edge of a close-up."""

LEVELS = 255
"""Colours of a scale; colour 0 of a picture is transparent, for points beyond the field."""

UNIT = "e/Å³"


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """An indexed PNG whose colour 0 is transparent.

    Parameters
    ----------
    pixels : (rows, columns) uint8
    palette : (n, 3) uint8
    """
    rows, columns = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), dtype=np.uint8), pixels], axis=1)  # filter 0, the best for indices
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.tobytes()),
        (b"tRNS", b"\x00"),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def palette_of(name: str) -> NDArray[np.uint8]:
    """The colours of a quantity, (1 + LEVELS, 3) uint8; the first stands for what is not there."""
    from matplotlib import colormaps

    colors = np.rint(255 * colormaps[COLORS[name]](np.linspace(0.0, 1.0, LEVELS))[:, :3]).astype(int)
    seen: set[tuple[int, ...]] = set()
    for color in colors:
        # The page's script reads values off the colours, so neighbours that round to one are told apart by a shade.
        while tuple(color) in seen:
            color[2] += 1 if color[2] < 255 else -3
        seen.add(tuple(color))
    return np.concatenate([[[255, 255, 255]], colors]).astype(np.uint8)


def indices(values: NDArray[np.float32], scale: Scale) -> NDArray[np.uint8]:
    """Colours of values, uint8: 1 at the low end of the scale, LEVELS at the high one, 0 for NaN."""
    part = scale.parts(values)
    found = 1 + np.rint(np.nan_to_num(part, nan=0.0) * (LEVELS - 1))
    return np.where(np.isfinite(part), found, 0).astype(np.uint8)


def strip(frames: Frames, name: str, scale: Scale) -> NDArray[np.uint8]:
    """All planes of a quantity one below the other, (n (n2 + 3), n1 + 3) uint8.

    A plane has its first points once more beyond its ends (its last ones, where the field is not periodic), and one
    more on all sides, so that a smooth enlargement never mixes planes.
    """
    parts = []
    for plane in frames.fields[name]:
        padded = indices(plane, scale)
        for axis in (0, 1):
            rows = np.arange(-1, padded.shape[axis] + 2)
            n = padded.shape[axis]
            padded = np.take(padded, rows % n if frames.wraps[axis] else np.clip(rows, 0, n - 1), axis=axis)
        parts.append(padded.T)
    return np.concatenate(parts)


def data_uri(data: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


@dataclass(frozen=True)
class Panel:
    """A picture of one quantity in planes of one shape.

    Parameters
    ----------
    frames, name, scale
        What is drawn.
    title, alt, where : str
        Heading in the picture; what it shows, in words; where the plane shown first lies.
    ident : str
        Names the parts of the picture in the page; letters, digits and hyphens.
    species : (n_atoms,) array of int
        Kind of each atom, for its colour.
    symbols : list of str
        Element of each kind.
    frame : int
        The plane shown first.
    labels : (str, str)
        Names of the axes.
    """

    frames: Frames
    name: str
    scale: Scale
    title: str
    alt: str
    ident: str
    species: NDArray[np.int64]
    symbols: Sequence[str]
    where: str = ""
    frame: int = 0
    labels: tuple[str, str] = ("Å", "Å")
    small: bool = False
    centre: int | None = None
    box: tuple[float, float, float, float] = field(init=False)

    def __post_init__(self) -> None:
        u, v = self.frames.u, self.frames.v
        x, y = ([0.0, u[k], v[k], u[k] + v[k]] for k in (0, 1))
        object.__setattr__(self, "box", (float(min(x)), float(min(y)), float(max(x)), float(max(y))))

    @property
    def factor(self) -> float:
        """Units of the picture per angstrom."""
        x0, y0, x1, y1 = self.box
        if self.small:
            return SMALL / max(x1 - x0, y1 - y0)
        return min(WIDTH / (x1 - x0), HEIGHT / (y1 - y0))

    @property
    def margins(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return (0.0, 0.0, 0.0, 0.0) if self.small else (36.0, 46.0, 14.0, 36.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where in-plane coordinates (angstrom) lie in the picture."""
        x0, _, _, y1 = self.box
        left, top, _, _ = self.margins
        return left + (x - x0) * self.factor, top + (y1 - y) * self.factor

    def matrix(self) -> tuple[float, ...]:
        """The six numbers that take pixels of the strip's first plane to the picture, as SVG orders them."""
        n1, n2 = self.frames.fields[self.name][0].shape
        s, u, v = self.factor, self.frames.u, self.frames.v
        a, b, c, d = s * u[0] / n1, -s * u[1] / n1, s * v[0] / n2, -s * v[1] / n2
        x, y = self.place(0.0, 0.0)
        # The first point of the plane is the middle of the second pixel, since a row of others comes before it.
        return tuple(float(t) for t in (a, b, c, d, x - 1.5 * (a + c), y - 1.5 * (b + d)))

    def circles(self, marks: Sequence[Mark]) -> list[tuple[float, float, int, int]]:
        """Atoms as centre, kind and index."""
        found = []
        for mark in marks:
            x, y = self.place(mark.x, mark.y)
            found.append((round(x, 1), round(y, 1), int(self.species[mark.atom]), mark.atom))
        return found

    @property
    def radius(self) -> float:
        """Of the circles of atoms."""
        return float(np.clip(0.22 * self.factor, 2.0, 5.0))

    def svg(self) -> str:
        """The picture."""
        left, top, right, bottom = self.margins
        x0, y0, x1, y1 = self.box
        width = left + (x1 - x0) * self.factor + right
        height = top + (y1 - y0) * self.factor + bottom
        if not self.small:
            width = max(width, 250.0)
        n_frames = len(self.frames.fractions)
        pixels = strip(self.frames, self.name, self.scale)
        rows, columns = pixels.shape[0] // n_frames, pixels.shape[1]
        edges = [(0.0, 0.0), tuple(self.frames.u), tuple(self.frames.u + self.frames.v), tuple(self.frames.v)]
        outline = " ".join("{:.2f},{:.2f}".format(*self.place(*map(float, edge))) for edge in edges)
        matrix = " ".join(f"{t:.8g}" for t in self.matrix())
        marks = None if self.frames.marks is None else self.frames.marks[self.frame]
        clip = f"clip-{self.ident}"
        picture = (
            f'<clipPath id="{clip}"><polygon points="{outline}"/></clipPath>'
            f'<g clip-path="url(#{clip})"><g transform="matrix({matrix})"><image class="strip" width="{columns}"'
            f' height="{pixels.shape[0]}" y="{-self.frame * rows}" preserveAspectRatio="none"'
            f' href="{data_uri(png(pixels, palette_of(self.name)))}"/></g>'
            f'<g class="atoms">{self._atoms(marks)}</g></g>'
            f'<polygon class="edge" points="{outline}"/>'
        )
        data = (
            f' data-rows="{rows}" data-frames="{n_frames}" data-low="{self.scale.low:.8g}"'
            f' data-high="{self.scale.high:.8g}" data-clipped="{int(self.scale.clipped)}"'
            f' data-log="{int(self.scale.log)}" data-name="{self.name}"'
            f' data-alt="{escape(self.alt, quote=True)}"'
        )
        frame = "" if self.small else self._bar(width) + self._axes()
        return (
            f'<svg class="panel{" small" if self.small else ""}" id="{self.ident}" role="img"'
            f' aria-label="{escape(self.alt + self.where, quote=True)}" viewBox="0 0 {width:.1f} {height:.1f}"'
            f' style="max-width:{width:.0f}px"{data}>{frame}{picture}</svg>'
        )

    def _atoms(self, marks: Sequence[Mark] | None) -> str:
        found = []
        for x, y, kind, atom in self.circles(marks or ()):
            name = escape(f"{self.symbols[kind]} {atom}")
            extra = " centre" if atom == self.centre else ""
            found.append(
                f'<circle class="kind{kind % 4}{extra}" cx="{x:g}" cy="{y:g}" r="{self.radius:.1f}">'
                f"<title>{name}</title></circle>"
            )
        return "".join(found)

    def _bar(self, width: float) -> str:
        """Title and scale of colours."""
        left, _, right, _ = self.margins
        bar = 112.0
        x = width - right - bar
        more = "&gt; " if self.scale.clipped else ""
        return (
            f'<text class="title" x="{left}" y="13">{escape(self.title)}</text>'
            f'<text class="unit" x="{left}" y="29">{UNIT}{", log" if self.scale.log else ""}</text>'
            f'<rect x="{x:.1f}" y="4" width="{bar}" height="11" fill="url(#scale-{self.name})"/>'
            f'<text class="tick" x="{x:.1f}" y="28">{tick_text(self.scale.low)}</text>'
            f'<text class="tick end" x="{x + bar:.1f}" y="28">{more}{tick_text(self.scale.high)}</text>'
        )

    def _axes(self) -> str:
        """Ticks along both edges of the picture, in angstrom."""
        x0, y0, x1, y1 = self.box
        parts = []
        bottom = self.place(0.0, y0)[1]
        left = self.margins[0]
        # Counted from the first corner of the plane, which a slanted cell need not have at its left end.
        for value in ticks(x0, x1):
            x = self.place(value, 0.0)[0]
            parts.append(
                f'<path class="tickmark" d="M{x:.1f} {bottom:.1f}v4"/>'
                f'<text class="tick mid" x="{x:.1f}" y="{bottom + 15:.1f}">{value:g}</text>'
            )
        for value in ticks(y0, y1):
            y = self.place(0.0, value)[1]
            parts.append(
                f'<path class="tickmark" d="M{left} {y:.1f}h-4"/>'
                f'<text class="tick end" x="{left - 7}" y="{y + 3.5:.1f}">{value:g}</text>'
            )
        middle = self.place(0.5 * (x0 + x1), 0.0)[0]
        up = self.place(0.0, 0.5 * (y0 + y1))[1]
        first, second = (escape(label) for label in self.labels)
        parts.append(f'<text class="tick mid" x="{middle:.1f}" y="{bottom + 30:.1f}">{first}</text>')
        parts.append(f'<text class="tick mid" transform="translate(11 {up:.1f}) rotate(-90)">{second}</text>')
        return "".join(parts)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`."""
    span = high - low
    step = next((m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5) if span / (m * 10.0**e) <= most - 1 + 1e-9), span)
    first = int(np.ceil(low / step - 1e-9))
    last = int(np.floor(high / step + 1e-9))
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """An end of a scale, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def gradient(name: str) -> str:
    """The colours of a quantity for the scales of all its pictures."""
    colors = palette_of(name)[1:]
    picked = np.rint(np.linspace(0, LEVELS - 1, 33)).astype(int)
    stops = "".join(
        f'<stop offset="{i / (len(picked) - 1):.4f}" stop-color="#{"".join(f"{c:02x}" for c in colors[k])}"/>'
        for i, k in enumerate(picked)
    )
    return f'<linearGradient id="scale-{name}">{stops}</linearGradient>'


def bars(counts: Sequence[float], edges: Sequence[float], label: str, alt: str) -> str:
    """A histogram; `edges` in the unit that `label` names."""
    width, height, left, top, bottom = 370.0, 120.0, 8.0, 6.0, 36.0
    low, high = float(edges[0]), float(edges[-1])
    most = max(max(counts), 1.0)
    s = (width - 2 * left) / (high - low)
    shapes = "".join(
        f'<rect class="bar" x="{left + (a - low) * s:.2f}" y="{top + height * (1 - n / most):.2f}"'
        f' width="{max((b - a) * s - 0.6, 0.4):.2f}" height="{height * n / most:.2f}"/>'
        for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
        if n > 0
    )
    base = top + height
    marks = "".join(
        f'<path class="tickmark" d="M{left + (t - low) * s:.1f} {base}v4"/>'
        f'<text class="tick mid" x="{left + (t - low) * s:.1f}" y="{base + 15}">{t:g}</text>'
        for t in ticks(low, high)
    )
    return (
        f'<svg class="panel wide" role="img" aria-label="{escape(alt, quote=True)}"'
        f' viewBox="0 0 {width:g} {base + bottom:g}" style="max-width:{width:g}px">{shapes}'
        f'<path class="tickmark" d="M{left} {base}H{width - left}"/>{marks}'
        f'<text class="tick mid" x="{width / 2}" y="{base + 31}">{escape(label)}</text></svg>'
    )


__all__ = ["UNIT", "Panel", "bars", "data_uri", "gradient", "indices", "palette_of", "png", "strip", "ticks"]
