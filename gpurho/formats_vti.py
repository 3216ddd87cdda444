"""VTK image data (``.vti``) of ParaView, PyVista and OVITO: lengths in angstrom, values in e/angstrom^3, x fastest.

Density and sigmas are point arrays of 32-bit numbers on the grid's own points, never resampled; the last plane along a
period is not repeated, so that sums over the points times the volume per point are integrals. Atoms and cell travel as
field data, from which this library reads the file back.

- A cell along x, y and z: values in base64 where their array stands, which every reader of the format takes.
- Any other cell is the image's direction matrix, whose columns are the unit vectors of the cell (VTK 9, ParaView 5.10
  and newer), and values are one raw block at the end of the file. OVITO (3.17) knows no direction matrix and would show
  a wrong cell; it refuses raw blocks, and takes such cells from ``*.cube``, ``*.xsf`` and CHGCAR as they are.

Reference: VTK XML file formats, https://docs.vtk.org/en/latest/vtk_file_formats/vtkxml_file_format.html
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import slabs
from gpurho.density import Density
from gpurho.errors import FormatError
from gpurho.fields import NAMES, Box, Field, LazyField
from gpurho.grid import Grid
from gpurho.structure import Structure

_TYPES = {"Float32": "<f4", "Float64": "<f8", "Int32": "<i4", "UInt8": "u1"}
_UNIT = '          <InformationKey name="UNITS_LABEL" location="vtkDataArray">e/angstrom^3</InformationKey>\n'
_LONGEST_LINE = 1 << 16
_TEXT_AT_ONCE = 4 << 22
_ALIGNED = 1e-12
"""Largest component of a unit vector of the cell across its axis that rounding explains."""


def write_vti(file: IO[bytes], density: Density) -> None:
    """Write all fields of a density as one image."""
    grid = density.grid
    spacing = np.linalg.norm(grid.steps, axis=1)
    direction = (grid.steps / spacing[:, None]).T
    inline = bool(np.abs(direction - np.eye(3)).max() < _ALIGNED)
    put = _Arrays(file, inline)
    extent = " ".join(f"0 {n - 1}" for n in grid.shape)
    # Some readers know no such attribute at all.
    turned = "" if inline else f' Direction="{_text(direction)}"'
    put.line('<?xml version="1.0"?>')
    put.line('<VTKFile type="ImageData" version="1.0" byte_order="LittleEndian" header_type="UInt64">')
    put.line(f'  <ImageData WholeExtent="{extent}" Origin="{_text(grid.origin)}" Spacing="{_text(spacing)}"{turned}>')
    put.line(f'    <Piece Extent="{extent}">\n      <PointData Scalars="mean">')
    for name in NAMES:
        field = getattr(density, name)
        if field is not None:
            put.array(f'type="Float32" Name="{name}"', 4 * grid.n_points, _planes(field), _UNIT)
    put.line("      </PointData>\n    </Piece>\n    <FieldData>")
    for name, (kind, array) in _field_data(density).items():
        columns = array.shape[1] if array.ndim == 2 else 1
        size = f'NumberOfComponents="{columns}" NumberOfTuples="{len(array)}"'
        put.array(f'type="{kind}" Name="{name}" {size}', array.nbytes, iter([array]))
    put.line("    </FieldData>\n  </ImageData>")
    put.end()


class _Arrays:
    """Arrays as base64 in their place, or as raw data kept for the end of the file."""

    def __init__(self, file: IO[bytes], inline: bool) -> None:
        self._file, self._inline = file, inline
        self._later: list[tuple[int, Iterator[NDArray[Any]]]] = []
        self._offset = 0

    def line(self, text: str) -> None:
        self._file.write(f"{text}\n".encode())

    def array(self, attributes: str, n_bytes: int, parts: Iterator[NDArray[Any]], key: str = "") -> None:
        """An array of `n_bytes` whose parts are made when they are written."""
        if self._inline:
            self.line(f'        <DataArray {attributes} format="binary">')
            self._encode(n_bytes, parts)
            self._file.write(f"\n{key}        </DataArray>\n".encode())
        else:
            self.line(f'        <DataArray {attributes} format="appended" offset="{self._offset}">')
            self._file.write(f"{key}        </DataArray>\n".encode())
            self._later.append((n_bytes, parts))
            self._offset += 8 + n_bytes

    def _encode(self, n_bytes: int, parts: Iterator[NDArray[Any]]) -> None:
        rest = _count(n_bytes)
        for part in parts:
            data = rest + part.tobytes()
            whole = len(data) // 3 * 3
            self._file.write(b64encode(memoryview(data)[:whole]))
            rest = data[whole:]
        self._file.write(b64encode(rest))

    def end(self) -> None:
        if not self._inline:
            self._file.write(b'  <AppendedData encoding="raw">\n_')
            for n_bytes, parts in self._later:
                self._file.write(_count(n_bytes))
                for part in parts:
                    self._file.write(part.data)
            self._file.write(b"\n  </AppendedData>\n")
        self._file.write(b"</VTKFile>\n")


def _count(n_bytes: int) -> bytes:
    return np.array(n_bytes, dtype="<u8").tobytes()


def _planes(field: Field) -> Iterator[NDArray[np.float32]]:
    for slab in slabs(field, 2):
        yield np.ascontiguousarray(slab.transpose(2, 1, 0), dtype="<f4")


def _text(values: NDArray[np.float64]) -> str:
    # Seventeen digits give the same number back.
    return " ".join(f"{value:.17g}" for value in values.reshape(-1))


def _field_data(density: Density) -> dict[str, tuple[str, NDArray[Any]]]:
    grid, structure = density.grid, density.structure
    return {
        "atom_numbers": ("Int32", structure.numbers.astype("<i4")),
        "atom_positions": ("Float64", structure.positions.astype("<f8")),
        "cell": ("Float64", structure.cell.astype("<f8")),
        "pbc": ("UInt8", structure.pbc.astype("u1")),
        "grid_cell": ("Float64", grid.cell.astype("<f8")),
        "grid_pbc": ("UInt8", np.array(grid.pbc, dtype="u1")),
    }


# -- reading ----------------------------------------------------------------------------------------------------


def read_vti(path: Path) -> Density:
    """The density in an image that `write_vti` wrote; raw values are read when they are asked for, base64 at once.

    Raises
    ------
    FormatError
        For a file that is cut off, or an image of another program, which has no atoms or other encodings.
    """
    image, arrays = _scan(path)
    missing = [n for n in ("mean", "atom_numbers", "atom_positions", "cell", "pbc", "grid_cell") if n not in arrays]
    if missing or not image:
        raise FormatError(
            f"{path} has no array {missing[0]!r} as gpurho writes it; give a *.vti of gpurho, or a *.cube"
        )
    extent = [int(n) for n in image["WholeExtent"].split()]
    i, j, k = (high - low + 1 for low, high in zip(extent[::2], extent[1::2], strict=True))
    origin = np.array(image["Origin"].split(), dtype=np.float64)
    grid = Grid((i, j, k), arrays["grid_cell"].reshape(3, 3), origin, [bool(p) for p in arrays["grid_pbc"]])
    structure = Structure(
        arrays["atom_positions"].reshape(-1, 3),
        arrays["atom_numbers"],
        arrays["cell"].reshape(3, 3),
        arrays["pbc"].astype(bool),
    )
    fields = [_field(path, arrays[name].reshape(k, j, i)) for name in NAMES if name in arrays]
    return Density(grid, structure, *fields, info={"source": str(path)})


def _scan(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Attributes of the image, and its arrays: mapped ones of raw blocks, others in memory."""
    image: dict[str, str] = {}
    arrays: dict[str, NDArray[Any]] = {}
    later: list[dict[str, str]] = []
    size = path.stat().st_size
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST_LINE):
            tag = line.strip()
            attributes = dict(re.findall(r'([A-Za-z_]{1,32})="([^"]{0,4096})"', tag.decode(errors="replace")))
            if tag.startswith(b"<VTKFile") and (
                attributes.get("header_type") != "UInt64"
                or "compressor" in attributes
                or attributes["type"] != "ImageData"
            ):
                break
            if tag.startswith(b"<ImageData"):
                image = attributes
            elif tag.startswith(b"<DataArray") and attributes["format"] == "appended":
                later.append(attributes)
            elif tag.startswith(b"<DataArray") and attributes["format"] == "binary":
                arrays[attributes["Name"]] = _decode(file, path, np.dtype(_TYPES[attributes["type"]]), size)
            elif tag.startswith(b"<AppendedData"):
                if attributes.get("encoding") == "raw" and file.read(1) == b"_":
                    start = file.tell()
                    arrays |= {a["Name"]: _mapped(path, a, start, size) for a in later}
                break
            elif tag == b"</VTKFile>":
                break
        else:
            raise FormatError(f"{path} ends too early; the file is not whole")
    return image, arrays


def _decode(file: IO[bytes], path: Path, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """An array in base64, whose first eight bytes are its length, a part at a time."""
    first = b64decode(file.read(12), validate=True)
    n_bytes = int(np.frombuffer(first[:8], "<u8")[0])
    if n_bytes > size:
        raise FormatError(f"{path} names {n_bytes} bytes and has {size}; the file is not whole")
    data = bytearray(first[8:])
    left = 4 * -(-(8 + n_bytes) // 3) - 12
    while left > 0:
        text = file.read(min(left, _TEXT_AT_ONCE))
        if not text:
            raise FormatError(f"{path} ends within its values; the file is not whole")
        data += b64decode(text, validate=True)
        left -= len(text)
    file.readline()
    return np.frombuffer(data, dtype, n_bytes // dtype.itemsize)


def _mapped(path: Path, attributes: dict[str, str], start: int, size: int) -> NDArray[Any]:
    dtype = np.dtype(_TYPES[attributes["type"]])
    at = start + int(attributes["offset"])
    n_bytes = int(np.fromfile(path, "<u8", 1, offset=at)[0])
    if at + 8 + n_bytes > size:
        raise FormatError(f"{path} ends within {attributes['Name']!r}; the file is not whole")
    return np.memmap(path, dtype, "r", at + 8, (n_bytes // dtype.itemsize,))


def _finite(path: Path, values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        found = np.array(values, dtype=np.float32, order="C")
    if not np.isfinite(found).all():
        raise FormatError(f"{path} holds values that are not finite; check the file")
    return found


def _field(path: Path, stored: NDArray[Any]) -> Field:
    """The values (nz, ny, nx) of a file as a field."""
    values = stored.transpose(2, 1, 0)
    i, j, k = values.shape
    if not isinstance(stored, np.memmap):
        return _finite(path, values)

    offset, shape = stored.offset, stored.shape

    def read(box: Box) -> NDArray[np.float32]:
        # Mapped anew each time, so that pages that were read do not stay in memory.
        mapped = np.memmap(path, stored.dtype, "r", offset, shape)
        return _finite(path, mapped.transpose(2, 1, 0)[box])

    return LazyField(read, (i, j, k))
