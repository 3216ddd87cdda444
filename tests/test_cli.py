"""The command line as a user meets it: output, exit codes, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write
from predict_tools import aluminium, small_model

import gpurho
from gpurho.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and a structure."""
    folder = tmp_path_factory.mktemp("cli")
    small_model().save(folder / "small.safetensors")
    write(folder / "al.xyz", aluminium())
    return folder


def arguments(files, *more: str, structure: str = "al.xyz") -> list[str]:
    return [
        "predict",
        str(files / structure),
        "--model",
        str(files / "small.safetensors"),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--grid",
        "12",
        "12",
        "12",
        *more,
    ]


def failure(capsys, command: list[str], code: int = 1) -> str:
    """The one line that a command fails with."""
    assert main(command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gpurho: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_predict(files, tmp_path, capsys):
    out = tmp_path / "rho.h5"
    more = ["--out", str(out), "--plot", str(tmp_path / "a.png"), "--write", str(tmp_path / "rho.cube")]
    assert main(arguments(files, *more)) == 0
    text = capsys.readouterr().out
    assert "1,728 of a grid 12 x 12 x 12" in text
    assert "valence electrons 12" in text
    assert "points/s" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with gpurho.Density.open(out) as stored:
        cube = gpurho.Density.open(tmp_path / "rho.cube")
        np.testing.assert_allclose(cube.mean, np.asarray(stored.mean), rtol=1e-5)
    assert main(arguments(files, *more)) == 0
    assert "none: the file was complete" in capsys.readouterr().out


def test_predict_json_conserved(files, capsys):
    assert main(arguments(files, "--conserve", "uniform", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["electrons"] == pytest.approx(12)
    assert found["electrons_expected"] == 12
    assert found["n_points"] == 1728
    assert found["timing"]["n_points"] == 1728


def test_predict_region_without_uncertainty(files, capsys):
    region = ["--region", "0", "6", "0", "12", "0", "12"]
    assert main(arguments(files, *region, "--uncertainty", "none", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_points"] == 864
    assert found["electrons_expected"] is None
    assert found["electrons_std"] is None


def test_plan(files, capsys):
    command = ["plan", str(files / "al.xyz"), "--model", str(files / "small.safetensors"), "--device", "cpu"]
    assert main([*command, "--spacing", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_points"] == 9**3
    assert main([*command, "--spacing", "0.5"]) == 0
    assert "tiles    1 of 64 x 64 x 64" in capsys.readouterr().out


def test_convert(files, tmp_path, capsys):
    out = tmp_path / "rho.h5"
    assert main(arguments(files, "--out", str(out))) == 0
    capsys.readouterr()
    target = str(tmp_path / "CHGCAR")
    assert main(["convert", str(out), target, "--field", "std"]) == 0
    assert "CHGCAR" in capsys.readouterr().out
    assert "--overwrite" in failure(capsys, ["convert", str(out), target])
    assert main(["convert", str(out), target, "--overwrite"]) == 0


def test_models_and_check(capsys):
    assert main(["models"]) == 0
    assert main(["models", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out.splitlines()[-1]), list)
    for name in ("al", "sige"):
        assert main(["models", name]) == 0
        card = capsys.readouterr().out
        assert card.startswith(f"# {name}:")
        assert "Not for" in card
    assert "'gold' is not shipped" in failure(capsys, ["models", "gold"])
    assert main(["check", "--fast"]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "numba", "cuda", "precision", "torch-cluster", "pyg-lib", "dask-cuda", "cupy", "models"):
        assert sum(line[3:].startswith(name) for line in text.splitlines()) >= 1, name
    assert main(["check", "--fast", "--json"]) == 0
    assert {"name", "ok", "text"} == set(json.loads(capsys.readouterr().out)[0])


def test_unknown_species(files, capsys):
    write(files / "sige.xyz", bulk("SiGe", "zincblende", a=5.5))
    line = failure(capsys, arguments(files, structure="sige.xyz"))
    assert "structure has Ge, Si; model 'small' knows Al" in line


def test_structures_that_cannot_be(files, capsys):
    text = (files / "al.xyz").read_text().splitlines()
    broken = [*text[:3], text[3].replace(text[3].split()[2], "nan"), *text[4:]]
    (files / "nan.xyz").write_text("\n".join(broken) + "\n")
    assert "atom 1" in failure(capsys, arguments(files, structure="nan.xyz"))
    atoms = aluminium()
    atoms.positions[1] = atoms.positions[0] + 0.2
    write(files / "close.xyz", atoms)
    assert "atoms 0 and 1" in failure(capsys, arguments(files, structure="close.xyz"))
    atoms = aluminium()
    atoms.cell[:] = 0
    atoms.pbc = False
    write(files / "zero.xyz", atoms)
    assert "vacuum" in failure(capsys, arguments(files, structure="zero.xyz"))
    (files / "text.xyz").write_text("not a structure\nat all\n")
    assert "cannot be read" in failure(capsys, arguments(files, structure="text.xyz"))
    (files / "empty.xyz").write_text("")
    assert "cannot be read" in failure(capsys, arguments(files, structure="empty.xyz"))
    (files / "binary.xyz").write_bytes(bytes(range(256)))
    assert "cannot be read" in failure(capsys, arguments(files, structure="binary.xyz"))
    assert "does not exist" in failure(capsys, arguments(files, structure="none.xyz"))


def test_missing_gpu(files, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = arguments(files)
    command[command.index("cpu")] = "cuda"
    assert "CUDA" in failure(capsys, command)


def test_models_that_cannot_be(files, capsys):
    command = arguments(files)
    at = command.index("--model") + 1
    for name, content, text in (
        ("none", None, "neither a file nor a shipped model"),
        ("empty.safetensors", b"", "empty.safetensors"),
        ("junk.safetensors", b"junk" * 100, "junk.safetensors"),
    ):
        if content is not None:
            (files / name).write_bytes(content)
        command[at] = str(files / name)
        assert text in failure(capsys, command)


def test_output_of_other_settings(files, tmp_path, capsys):
    out = str(tmp_path / "rho.h5")
    assert main(arguments(files, "--out", out)) == 0
    capsys.readouterr()
    line = failure(capsys, arguments(files, "--out", out, "--conserve", "uniform"))
    assert "conserve None, not 'uniform'" in line
    assert "--no-resume" in line
    assert main(arguments(files, "--out", out, "--conserve", "uniform", "--no-resume")) == 0


def test_names_of_outputs_are_checked_before_the_work(files, tmp_path, capsys):
    out = tmp_path / "rho.h5"
    assert ".png" in failure(capsys, arguments(files, "--out", str(out), "--plot", "slice.doc"))
    assert "*.cube" in failure(capsys, arguments(files, "--out", str(out), "--write", "rho.txt"))
    assert not out.exists()


def test_settings_are_refused_in_one_line(files, capsys):
    assert "devices 0" in failure(capsys, arguments(files, "--devices", "0"))
    assert "exclude" in failure(capsys, arguments(files, "--spacing", "0.2"))
    assert "samples 1" in failure(capsys, arguments(files, "--uncertainty", "sampled", "--samples", "1"))
    assert "name does not say" in failure(capsys, ["convert", str(files / "al.xyz"), "x.cube"])
    assert "NAME=VALUE" in failure(capsys, ["train", "x.h5", "--out", "y", "--set", "epochs"])
    assert "x.h5" in failure(capsys, ["evaluate", str(files / "small.safetensors"), "x.h5", "--quiet"])
    assert "snapshots" in failure(capsys, ["evaluate", "al", "x.h5", "--snapshots", "first"])


@pytest.mark.parametrize("command", [[], ["predict"], ["predict", "x", "--spacing", "wide"], ["paint"]])
def test_wrong_usage(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_and_version(capsys):
    for command in (["--help"], ["predict", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 0
    assert "gpurho" in capsys.readouterr().out


def test_a_reader_that_goes_away(files):
    code = f"{sys.executable} -m gpurho check --fast | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_as_a_module(files, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpurho", *arguments(files, structure="none.xyz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
