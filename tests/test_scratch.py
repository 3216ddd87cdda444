"""Temporary folders of DFT programs: those of killed runs go, all others stay."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from ase.build import bulk

from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.qe import QeEngine
from gpurho.dft.scratch import OWNER, remove_abandoned, scratch_folder
from gpurho.errors import EngineError
from gpurho.structure import Structure

HOLD = """
import sys, time
from pathlib import Path
from gpurho.dft.scratch import scratch_folder
with scratch_folder("qe", sys.argv[1]) as folder:
    (folder / "gpurho.save").mkdir()
    (folder / "gpurho.save" / "charge-density.dat").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""

CALCULATE = """
import sys
from ase.build import bulk
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.qe import QeEngine
from gpurho.structure import Structure
aluminium = Structure.from_ase(bulk("Al", cubic=True))
QeEngine(sys.argv[1], scratch=sys.argv[2]).ground_state(aluminium, DFTSettings(cutoff=100.0, kmesh=KMesh()))
"""


@contextmanager
def holder(parent):
    """A process that holds a folder in `parent`, until its input ends or it is killed; and the folder."""
    command = [sys.executable, "-c", HOLD, str(parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.fixture
def abandoned(tmp_path):
    """The folder of a process that was killed."""
    with holder(tmp_path) as (process, folder):
        process.kill()
        process.wait()
    assert (folder / "gpurho.save" / "charge-density.dat").stat().st_size == 1000
    return folder


def test_a_folder_goes_at_the_end_and_after_an_error(tmp_path):
    with scratch_folder("qe", tmp_path) as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "file").touch()
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), scratch_folder("sparc", tmp_path):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_names_are_whole_where_the_parent_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with scratch_folder("qe", ".") as folder:
        assert folder.is_absolute()
        monkeypatch.chdir("/")
        assert folder.is_dir()


def test_a_new_run_removes_what_a_killed_one_left(tmp_path):
    with holder(tmp_path) as (live, kept), holder(tmp_path) as (dead, left):
        dead.kill()
        dead.wait()
        assert left.is_dir()
        with scratch_folder("sparc", tmp_path) as mine:
            assert not left.exists()
            assert set(tmp_path.iterdir()) == {kept, mine}
            # That of this process is locked for itself, too.
            assert remove_abandoned(tmp_path) == []
            assert (kept / "gpurho.save" / "charge-density.dat").stat().st_size == 1000
        live.stdin.close()
        assert live.wait() == 0
        assert not list(tmp_path.iterdir())


def test_what_a_link_in_a_left_folder_names_stays(tmp_path, abandoned):
    other = tmp_path / "results"
    other.mkdir()
    (other / "rho.h5").touch()
    (abandoned / "link").symlink_to(other)
    (abandoned / "gpurho.save" / "link").symlink_to(other / "rho.h5")
    assert remove_abandoned(tmp_path) == [abandoned]
    assert list(tmp_path.iterdir()) == [other]
    assert (other / "rho.h5").is_file()


def no_owner(folder):
    (folder / OWNER).unlink()


def other_machine(folder):
    text = (folder / OWNER).read_text()
    (folder / OWNER).write_text(text.replace(socket.gethostname(), "node17"))


def other_file(folder):
    (folder / OWNER).write_text("mine\n")


def linked_owner(folder):
    (folder / OWNER).rename(folder.parent / "elsewhere")
    (folder / OWNER).symlink_to(folder.parent / "elsewhere")


def pipe(folder):
    (folder / OWNER).unlink()
    os.mkfifo(folder / OWNER)


@pytest.mark.parametrize("change", [no_owner, other_machine, other_file, linked_owner, pipe])
def test_folders_that_are_not_surely_ours_stay(tmp_path, abandoned, change):
    change(abandoned)
    assert remove_abandoned(tmp_path) == []
    assert (abandoned / "gpurho.save" / "charge-density.dat").is_file()


def test_those_of_other_users_and_other_names_stay(tmp_path, abandoned, monkeypatch):
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        assert remove_abandoned(tmp_path) == []
    for name in ("gpurho-qe-1", "gpurho-qe-abcdefghi", "other-qe-abcdefgh"):
        named = abandoned.rename(tmp_path / name)
        assert remove_abandoned(tmp_path) == []
        named.rename(abandoned)
    moved = abandoned.rename(tmp_path / "mine")
    abandoned.symlink_to(moved)
    assert remove_abandoned(tmp_path) == []
    abandoned.unlink()
    moved.rename(abandoned)
    assert remove_abandoned(tmp_path) == [abandoned]
    assert remove_abandoned(tmp_path / "none") == []


def test_without_locks_nobody_removes(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(38, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr("gpurho.dft.scratch.fcntl.flock", refused)
        context = scratch_folder("qe", tmp_path)
        folder = context.__enter__()
    assert remove_abandoned(tmp_path) == []
    assert folder.is_dir()
    context.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_emptied_is_left_for_the_next_run(tmp_path, abandoned, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gpurho.dft.scratch.shutil.rmtree", lambda *args, **keywords: None)
        remove_abandoned(tmp_path)
        assert (abandoned / OWNER).is_file()
    assert remove_abandoned(tmp_path) == [abandoned]
    assert not abandoned.exists()


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_a_killed_calculation_leaves_nothing_to_the_next(tmp_path):
    """``kill -9`` of a process amid ``pw.x``: the next calculation removes its folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    slow = program(tmp_path / "slow", "head -c 100000 /dev/zero > wfc1.dat\nexec sleep 60")
    with subprocess.Popen([sys.executable, "-c", CALCULATE, str(slow), str(scratch)]) as process:
        try:
            until = time.monotonic() + 60
            while not (found := list(scratch.glob("*/wfc1.dat"))) or found[0].stat().st_size < 100000:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            process.kill()
    quick = QeEngine(str(program(tmp_path / "quick", "exit 3")), scratch=scratch)
    with pytest.raises(EngineError, match="exit code 3"):
        quick.ground_state(Structure.from_ase(bulk("Al", cubic=True)), DFTSettings(cutoff=100.0, kmesh=KMesh()))
    assert not list(scratch.iterdir())
