"""Stands in for the program ``sparc`` in tests: reads its input by its own simple rules, and leaves recorded output.

``python fake_sparc.py DATA LOG -name STEM``: DATA has the recorded files; what was understood goes to LOG as JSON.
The environment variable FAKE_SPARC makes it fail in the way that it names.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import sys
from pathlib import Path


def read_input(path: Path) -> dict[str, list[str]]:
    """Every keyword with the words up to the next one."""
    found: dict[str, list[str]] = {}
    for word in path.read_text().split():
        if word.endswith(":") and word[:-1].isupper():
            found[key := word[:-1]] = []
        else:
            found[key].append(word)
    return found


def read_atoms(path: Path) -> list[dict[str, object]]:
    """The types of an .ion file in their order."""
    types: list[dict[str, object]] = []
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    while lines:
        key, _, value = lines.pop(0).partition(":")
        if key == "ATOM_TYPE":
            types.append({"symbol": value.strip()})
        elif key == "COORD_FRAC":
            n = int(str(types[-1]["N_TYPE_ATOM"]))
            types[-1]["fractions"] = [[float(x) for x in lines.pop(0).split()] for _ in range(n)]
        else:
            types[-1][key] = value.strip()
    return types


def read_density(path: Path) -> dict[str, object]:
    """Counts, steps, and the integral of a cube, in Bohr."""
    lines = path.read_text().splitlines()
    n_atoms = int(lines[2].split()[0])
    rows = [line.split() for line in lines[3:6]]
    counts = [int(row[0]) for row in rows]
    steps = [[float(x) for x in row[1:4]] for row in rows]
    values = [float(x) for line in lines[6 + n_atoms :] for x in line.split()]
    assert len(values) == counts[0] * counts[1] * counts[2]
    (a, b, c) = steps
    volume = (
        a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])
    )
    return {"counts": counts, "steps": steps, "integral": sum(values) * volume, "smallest": min(values)}


def main() -> int:
    data, log, flag, stem = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    assert flag == "-name"
    fail = os.environ.get("FAKE_SPARC", "")
    if fail == "crash":
        print("\x1b[31mERROR: Cannot read the pseudopotential!\x1b[0m\nsome trace")
        return 1
    inputs, types = read_input(Path(f"{stem}.inpt")), read_atoms(Path(f"{stem}.ion"))
    for kind in types:
        assert Path(str(kind["PSEUDO_POT"])).is_file()
    seen: dict[str, object] = {"inputs": inputs, "types": types, "threads": os.environ["OMP_NUM_THREADS"]}
    if "INPUT_DENS_FILE" in inputs:
        seen["density"] = read_density(Path(inputs["INPUT_DENS_FILE"][0]))
    log.write_text(json.dumps(seen))
    if fail == "silent":
        return 0
    one_shot, md = inputs["MAXIT_SCF"] == ["1"], inputs.get("MD_FLAG") == ["1"]
    name = "al32_m040_md" if md else "hf_rt25" if one_shot else "al32_m030"
    for suffix in ("out", "static", "eigen", "dens", "aimd"):
        source = data / f"{name}.{suffix}"
        if source.is_file():
            shutil.copy(source, f"{stem}.{suffix}")
        elif Path(f"{source}.xz").is_file():
            Path(f"{stem}.{suffix}").write_bytes(lzma.decompress(Path(f"{source}.xz").read_bytes()))
    if md:
        # A density of its grid and its atoms, everywhere the same: the recorded one is too large to keep.
        atoms = Path(f"{stem}.aimd").read_text().split(":R:\n")[-1].split("\n:V:")[0].splitlines()
        head = [
            "Electron density in Cube format",
            "Cell length: 15.2 15.2 15.2, boundary condition: P P P.",
            "32 0 0 0",
        ]
        head += ["38 0.4 0 0", "38 0 0.4 0", "38 0 0 0.4", *(f"13 3.0 {row}" for row in atoms)]
        Path(f"{stem}.dens").write_text("\n".join(head + [f"{96 / 15.2**3:.6E}"] * 38**3) + "\n")
    if one_shot:
        shutil.copy(data / "al32_m030.eigen", f"{stem}.eigen")
    if fail.startswith("cut "):
        suffix = fail.split()[1]
        text = Path(f"{stem}.{suffix}").read_text()
        Path(f"{stem}.{suffix}").write_text(text[: len(text) // 2])
    if fail == "unconverged":
        out = Path(f"{stem}.out")
        text = out.read_text().replace(
            "Total number of SCF: 29    \n",
            "Total number of SCF: 29    \nWARNING: SCF#1 did not converge to desired accuracy!\n",
        )
        out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
