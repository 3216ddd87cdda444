"""What users of a command line take for granted: quick answers, completion, exit codes, JSON, no noise."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write
from predict_tools import aluminium, small_model

from gpurho import cli
from gpurho.pipelines import check as checks
from gpurho.pipelines.completion import SHELLS, completion

HEAVY = {"torch", "numba", "cupy", "dask", "matplotlib", "h5py", "ase"}


def loaded_by(words: str) -> set[str]:
    """Heavy libraries that a command loads."""
    code = (
        "import sys, contextlib, io\n"
        "from gpurho.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    main({words.split()!r})\n"
        "print(len(out.getvalue()), *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    length, *modules = done.stdout.split()
    assert int(length) > 5
    return HEAVY & set(modules)


@pytest.mark.parametrize(
    "words", ["--help", "--version", "predict --help", "calibrate --help", "paper --help", "completion bash"]
)
def test_help_and_completion_load_nothing_heavy(words: str) -> None:
    if words.startswith("completion"):
        pytest.importorskip("shtab")
    assert loaded_by(words) == set()


def subcommands(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def test_table_of_commands_is_that_of_their_modules() -> None:
    full = subcommands(cli.build_parser())
    assert list(full.choices) == [n for n in full.choices if n in cli.COMMANDS]
    assert set(full.choices) == set(cli.COMMANDS)
    lines = {choice.dest: choice.help for choice in full._choices_actions}
    assert lines == {name: line for name, (_, line) in cli.COMMANDS.items()}


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_each_command_alone_parses_as_among_all(name: str) -> None:
    alone = subcommands(cli.build_parser(name)).choices[name]
    among = subcommands(cli.build_parser()).choices[name]
    assert alone.format_help() == among.format_help()
    assert len(alone.format_help().splitlines()) > 3


def test_results_come_as_json_from_every_command_that_prints_some() -> None:
    def options(parser: argparse.ArgumentParser) -> set[str]:
        found = {text for action in parser._actions for text in action.option_strings}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= set.intersection(*(options(child) for child in action.choices.values()))
        return found

    without = {name for name, one in subcommands(cli.build_parser()).choices.items() if "--json" not in options(one)}
    # A script for a shell; a page and a picture, whose names are all that there is to say.
    assert without <= {"completion", "report", "plot"}


# -- completion --------------------------------------------------------------------------------------------------


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    code = (
        f"source {script}\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()\n'
        "$(complete -p gpurho | sed 's/.*-F \\([^ ]*\\).*/\\1/') 2>/dev/null\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    command = ["bash", "--norc", "-c", code, "bash", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "gpurho.bash"
    script.write_text(completion(cli.build_parser(), "bash"))
    (tmp_path / "structure.xyz").touch()
    assert completed(script, "gpurho", "pre") == ["predict"]
    assert {"plan", "plot", "paper", "predict"} == set(completed(script, "gpurho", "p"))
    assert completed(script, "gpurho", "predict", "--uncert") == ["--uncertainty"]
    assert completed(script, "gpurho", "predict", "--uncertainty", "l") == ["last-layer"]
    assert "al-vacancy" in completed(script, "gpurho", "build", "al-")
    assert completed(script, "gpurho", "predict", f"{tmp_path}/str") == [f"{tmp_path}/structure.xyz"]


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_scripts_of_all_shells(shell: str) -> None:
    pytest.importorskip("shtab")
    script = completion(cli.build_parser(), shell)
    assert "predict" in script
    assert "last-layer" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, check=False).returncode == 0


# -- exit codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_codes_of_a_run_that_is_stopped(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    small_model().save(tmp_path / "m.safetensors")
    write(tmp_path / "al.xyz", bulk("Al", "fcc", a=4.05, cubic=True).repeat(3))
    words = ["predict", "al.xyz", "--model", "m.safetensors", "--device", "cpu", "--precision", "fp32"]
    words += ["--spacing", "0.05", "--tile-shape", "16", "16", "16", "--out", "rho.h5"]
    command = [sys.executable, "-m", "gpurho", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as run:
        journal = tmp_path / "rho.h5.journal"
        for _ in range(1200):
            if (journal.exists() and journal.stat().st_size > 2000) or run.poll() is not None:
                break
            time.sleep(0.05)
        run.send_signal(sent)
        assert run.wait(60) == code
        assert run.stderr is not None
        said = run.stderr.read()
    assert said.startswith("gpurho: interrupted; run the same command again")
    assert said.count("\n") == 1  # no bar: this is no terminal
    assert (tmp_path / "rho.h5.part").exists()


def test_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "130 interrupted; 143 terminated" in " ".join(capsys.readouterr().out.split())


def test_command_that_handled_its_interrupt_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            return cli.INTERRUPTED
        return 0

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    monkeypatch.setattr(cli, "build_parser", lambda _: parser)
    assert cli.main([]) == 143


# -- check and JSON ----------------------------------------------------------------------------------------------


def test_check_sees_what_is_installed_but_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "halfway.py").write_text("raise ImportError('libhalf.so is missing')\n")
    (tmp_path / "crashing.py").write_text("import os; os._exit(139)\n")
    (tmp_path / "fine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages = [checks.Package(name, name, f"pip install {name}") for name in ("halfway", "crashing", "fine", "absent")]
    monkeypatch.setattr(checks, "PACKAGES", packages)
    found = {line.name: line for line in checks.check()}
    assert not found["halfway"].ok
    assert "libhalf.so is missing" in found["halfway"].text
    assert not found["crashing"].ok
    assert "139" in found["crashing"].text
    assert found["fine"].ok
    assert found["absent"].text == "not installed; pip install absent"
    monkeypatch.setenv("GPURHO_PW", "no-such-pw.x")
    line = next(line for line in checks.check(imports=False) if line.name == "espresso")
    assert not line.ok
    assert "no-such-pw.x" in line.text


def test_every_absent_part_says_how_to_get_it() -> None:
    for package in checks.PACKAGES:
        assert "pip install" in package.remedy or "wheel" in package.remedy or "comes with" in package.remedy
    for line in checks.check(imports=False):
        assert line.ok or len(line.text) > 25, line


def test_json_of_small_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "al-vacancy", "--out", str(tmp_path / "v.xyz"), "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["n_atoms"] > 10
    small_model().save(tmp_path / "m.safetensors")
    write(tmp_path / "al.xyz", aluminium())
    words = ["predict", str(tmp_path / "al.xyz"), "--model", str(tmp_path / "m.safetensors"), "--device", "cpu"]
    assert cli.main([*words, "--grid", "12", "12", "12", "--out", str(tmp_path / "rho.h5"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trust"]["level"] == "unknown"
    assert cli.main(["convert", str(tmp_path / "rho.h5"), str(tmp_path / "CHGCAR"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["bytes"] == (tmp_path / "CHGCAR").stat().st_size
    assert "augmentation" in made["note"]


def test_trust_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ase.io import read

    write(tmp_path / "al.xyz", aluminium(3))
    words = ["trust", str(tmp_path / "al.xyz")]
    assert cli.main(words) == 0
    assert "training data" in capsys.readouterr().out
    assert cli.main([*words, "--json", "--write", str(tmp_path / "out.xyz")]) == 0
    found = json.loads(capsys.readouterr().out)
    trust = read(tmp_path / "out.xyz").arrays["trust"]
    assert trust.max() == pytest.approx(found["largest"], rel=1e-5)


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import gpurho; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 2.0
