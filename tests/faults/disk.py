"""Disks that are full at any moment, folders that cannot be written: one clear line, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.bench import LABEL, PREDICT, PREDICTIONS, TRAIN, TRAININGS, Bench, Job
from faults.harness import FaultError, Outcome
from faults.inputs import names_in

PAGE = 4096
LARGE = 64 << 20


class Disk:
    """A small file system in memory, where this process may mount one; else limits on the size of each file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mounted, self._limit = folder, False, LARGE
        folder.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            done = subprocess.run(_mount("size=64m", folder), capture_output=True, check=False)
            self.mounted = done.returncode == 0

    def room(self, n_bytes: int) -> None:
        """Leave so many bytes free from now on."""
        if not self.mounted:
            self._limit = n_bytes
            return
        stat = os.statvfs(self.folder)
        used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        size = max(PAGE, -(-(used + n_bytes) // PAGE) * PAGE)
        subprocess.run(_mount(f"remount,size={size}", self.folder), check=True, capture_output=True)

    @property
    def conditions(self) -> dict[str, Any]:
        """What a child has to be told."""
        return {} if self.mounted else {"file_bytes": self._limit}

    def close(self) -> None:
        """Take it away, with all that is in it."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _mount(options: str, folder: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]


@contextlib.contextmanager
def disk(bench: Bench) -> Iterator[Disk]:
    """A disk for one scenario."""
    made = Disk(bench.folder / "disk")
    try:
        yield made
    finally:
        made.close()


def predict(bench: Bench) -> dict[str, Any]:
    """Predictions, one page more room at a time: each write is once the first that fails."""
    return full(bench, PREDICTIONS[: bench.count(1, 4)], bench.count(3, 160), 24 * PAGE)


def label(bench: Bench) -> dict[str, Any]:
    """Labelling runs."""
    return full(bench, [LABEL], bench.count(2, 60), 0)


def train(bench: Bench) -> dict[str, Any]:
    """Training runs."""
    return full(bench, TRAININGS[1 : bench.count(2, 3)], bench.count(2, 60), 0)


def full(bench: Bench, jobs: list[Job] | tuple[Job, ...], points: int, least: int) -> dict[str, Any]:
    """Run `jobs` with ever more room until one is done; then with room enough, to the bytes of an undisturbed run."""
    failures, compared, kind = 0, 0, ""
    with disk(bench) as small:
        kind = "tmpfs" if small.mounted else "limits on the size of files"
        for job in jobs:
            bench.calm(job)
            size = _needs(bench, job, small)
            steps = min(max(1, size // PAGE), max(1, points // len(jobs)))
            for i in range(steps):
                room = least + (size - least) * i // steps
                out = _clean(small)
                small.room(room)
                outcome = job.run(bench, out, **small.conditions)
                tries = 0
                while outcome.code != 0:
                    failures, tries = failures + 1, tries + 1
                    _says_what_is_safe(job, outcome, out)
                    # Every other time it is tried again before there is room.
                    if i % 2 or tries > 1:
                        small.room(LARGE)
                    outcome = job.run(bench, out, **small.conditions)
                job.check(bench, out)
                compared += 1
    return {"faults injected": failures, "outputs compared": compared, "disk": kind}


def _needs(bench: Bench, job: Job, small: Disk) -> int:
    """Bytes that a run needs at most, about: found by running it and adding up what it leaves, with room for copies."""
    out = _clean(small)
    small.room(LARGE)
    job.run(bench, out, **small.conditions).expect()
    return 2 * sum((out / name).stat().st_size for name in names_in(out)) + 8 * PAGE


def _clean(small: Disk) -> Path:
    small.room(LARGE)
    out = small.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


def _says_what_is_safe(job: Job, outcome: Outcome, out: Path) -> None:
    outcome.refused(out.name)
    if job.name != "predict":
        return
    if (out / job.output).exists():
        raise FaultError(f"an unfinished output has the name of a whole one; {outcome.said}")
    if "tiles are safe" in outcome.said:
        from gpurho.journal import read_journal

        told = int(outcome.said.split(" tiles are safe")[0].split("; ")[-1].split(" ")[0])
        kept = max(0, len(read_journal(out / "rho.h5.journal")) - 1) if (out / "rho.h5.part").exists() else 0
        if told != kept:
            raise FaultError(f"it says that {told} tiles are safe, and {kept} are: {outcome.said}")


def writers(bench: Bench) -> dict[str, Any]:
    """Files and pictures made of a density: what was there stays as it was, and no half of the new one."""
    folder = bench.fresh()
    PREDICT.run(bench, folder).expect()
    failures, names = 0, ("a.cube", "CHGCAR", "a.xsf", "a.dens", "a.vti", "a.xyz", "a.dump", "a.h5", "a.png")
    with disk(bench) as small:
        for name in names[:: bench.count(4, 1)]:
            # A picture is written by asking again for the density that is there.
            words: list[object] = ["convert", folder / "rho.h5", small.folder / "out" / name, "--overwrite"]
            if name.endswith("png"):
                words = [*bench.inputs.predict(folder / "rho.h5"), "--plot", small.folder / "out" / name]
            out = _clean(small)
            bench.server.run(*words).expect()
            pages = -(-(out / name).stat().st_size // PAGE)
            for i in range(bench.count(1, 12)):
                out = _clean(small)
                (out / name).write_bytes(b"what was there before")
                small.room((pages - 1) * i // 12 * PAGE)
                bench.server.run(*words, **small.conditions).refused("out")
                failures += 1
                if (out / name).read_bytes() != b"what was there before":
                    raise FaultError(f"{name} was half replaced")
                left = names_in(out) - {name, f"{name}.part", f"{name}.journal"}
                if left:
                    raise FaultError(f"{left} stay behind after a failure to write {name}")
    return {"faults injected": failures, "formats": len(names[:: bench.count(4, 1)])}


def read_only(bench: Bench) -> dict[str, Any]:
    """Folders and files that may not be written: said before any work, and nothing is changed."""
    refused = 0
    for job in (PREDICT, LABEL, TRAIN)[: bench.count(3, 3)]:
        folder = bench.fresh()
        out = folder / "out"
        out.mkdir()
        out.chmod(0o555)
        job.run(bench, out, plain_user=True).refused("out")
        if names_in(out):
            raise FaultError(f"{names_in(out)} in a folder that may not be written")
        out.chmod(0o755)
        # Begun, then the folder is closed: what is there stays, and the same command goes on once it is open again.
        running = bench.server.start(*job.words(bench, out), forked=True)
        running.hit(9, 0.6 * bench.calm(job).seconds)
        running.outcome()
        for path in [out, *out.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {name: (out / name).read_bytes() for name in names_in(out)}
        if not (out / job.output).exists():
            job.run(bench, out, plain_user=True).refused("out")
            refused += 1
        if before != {name: (out / name).read_bytes() for name in names_in(out)}:
            raise FaultError(f"{job.name} changed files that may not be written")
        for path in [out, *out.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        if not (out / job.output).exists():
            job.run(bench, out).expect()
        job.check(bench, out)
        refused += 1
    return {"faults injected": refused}
