"""A DFT code started from a density: ``gpurho restart rho.h5 --engine sparc --out start``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.errors import OutputExistsError, SettingsError

if TYPE_CHECKING:
    from gpurho.dft.base import DFTSettings
    from gpurho.dft.restart import Restart

CODES = ("qe", "sparc", "gpaw")


def restart(
    density: Any,
    folder: str | Path,
    engine: str = "qe",
    settings: DFTSettings | None = None,
    pseudos: Any = None,
) -> Restart:
    """Write inputs with which a DFT code starts from a density.

    Parameters
    ----------
    density : Density, or path of a density file
        Of the whole cell; it is rescaled to the valence electrons of the pseudopotentials.
    folder : path
        Made where it is not there; must be empty.
    engine : str
        "qe", "sparc" or "gpaw".
    settings : DFTSettings, optional
    pseudos : path or mapping, optional
        See `gpurho.dft.restart.write_restart`.

    Returns
    -------
    Restart
        The files, and the command that starts the code in the folder.

    Raises
    ------
    OutputExistsError
        Where the folder holds something.
    GridError
        Where the density is not of the whole cell.
    StructureError, EngineError, MissingDependencyError, SettingsError
    """
    from gpurho.density import Density
    from gpurho.dft.restart import Restart, write_restart
    from gpurho.energy import density_values
    from gpurho.formats import read_density

    if not isinstance(density, Density):
        with read_density(Path(density)) as found:
            return restart(found, folder, engine, settings, pseudos)
    if engine not in CODES:
        raise SettingsError(f"engine {engine!r} has no restart files; give one of {', '.join(CODES)}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"{target} is there and not an empty folder; give another name")
    structure = density.structure
    values = density_values(structure, density)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until all is there: a failed start leaves nothing that looks like one.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        part = Path(name) / "part"
        part.mkdir()
        made = write_restart(part, structure, values, engine, settings, pseudos)
        os.replace(part, target)
    return Restart(tuple(target / path.relative_to(part) for path in made.files), made.command)


def add_parser(commands: Any) -> None:
    """The command ``gpurho restart``."""
    from gpurho.pipelines.label import add_settings

    parser = commands.add_parser("restart", help="inputs of a DFT code that start from a density")
    parser.add_argument("density", type=Path, help="*.h5, *.cube, CHGCAR, *.xsf, *.dens or *.vti of a whole cell")
    parser.add_argument("--engine", default="qe", choices=CODES, help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty")
    parser.add_argument(
        "--pseudos",
        nargs="+",
        metavar="P",
        help="a folder of psp8 files, or Al=Al.psp8 for each element (default: $SPARC_PSP_PATH; GTH-PBE for pw.x)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho restart``."""
    from gpurho.pipelines.label import settings_of

    made = restart(options.density, options.out, options.engine, settings_of(options), _pseudos(options.pseudos))
    if options.json:
        print(json.dumps({"files": [str(path) for path in made.files], "command": made.command}))
        return
    for path in made.files:
        print(f"wrote    {path}")
    print(f"go on    cd {options.out} && {made.command}")


def _pseudos(words: list[str] | None) -> Any:
    """A folder, or a mapping of symbols to files."""
    if words is None:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    pairs = [word.partition("=") for word in words]
    if any(not mark for _, mark, _ in pairs):
        raise SettingsError(f"--pseudos {' '.join(words)} is neither a folder nor files; give Al=Al.psp8 for each")
    return {symbol: path for symbol, _, path in pairs}
