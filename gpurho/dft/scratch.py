"""Temporary folders of programs that compute, which a later run removes where their own was killed.

A run that is killed cannot remove its folder, which may hold hundreds of megabytes. Each folder has a file ``owner``
that its process keeps locked (flock): the system drops the lock with the process, whatever ended it, and a process id
that is in use again means nothing. A folder whose lock is free, and that says it is one of this user and this machine,
belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWNER = "owner"
"""The locked file in each folder."""

_NAME = re.compile(r"gpurho-[a-z]{1,16}-[a-z0-9_]{8}")


@contextmanager
def scratch_folder(kind: str, parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A folder ``gpurho-<kind>-<random>``, removed at the end; those that dead processes left in `parent` go first.

    Parameters
    ----------
    kind : str
        Small letters: what the folder is for.
    parent : path, optional
        By default that of the system's temporary files.

    Raises
    ------
    OSError
        Where the folder cannot be made.
    """
    # In full: programs run in the folder.
    root = Path(os.path.abspath(parent or tempfile.gettempdir()))
    remove_abandoned(root)
    folder, lock = _make(kind, root)
    try:
        yield folder
    finally:
        _remove(folder)
        if lock >= 0:
            os.close(lock)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the folders in `parent` whose processes have died; returns them.

    Those of live processes, other users and other machines stay, as does everything that `scratch_folder` did not
    make.
    """
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:
        return []
    removed = []
    for folder in sorted(parent / name for name in names):
        lock = _take_over(folder)
        if lock >= 0:
            _remove(folder)
            os.close(lock)
            removed.append(folder)
    return removed


def _make(kind: str, root: Path) -> tuple[Path, int]:
    """A new folder and its lock, -1 where the file system has none."""
    # It gets its name once it is locked: others never see one of a live process without a lock.
    young = Path(tempfile.mkdtemp(prefix=".gpurho-", dir=root))
    lock = -1
    try:
        lock = os.open(young / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # without locks nobody could tell that this process lives: no owner, and no removal by others
            os.close(lock)
            lock = -1
            (young / OWNER).unlink()
        else:
            os.write(lock, _words())
        folder = young.with_name(f"gpurho-{kind}-{young.name.removeprefix('.gpurho-')}")
        os.rename(young, folder)
    except BaseException:
        shutil.rmtree(young, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
        raise
    return folder, lock


def _take_over(folder: Path) -> int:
    """The lock of a folder of this user and machine whose process is dead; -1 for any other."""
    lock, ours = -1, False
    try:
        about = os.lstat(folder)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            return -1
        lock = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its process may have removed it since it was opened.
            same = os.path.samestat(os.fstat(lock), os.stat(folder / OWNER, follow_symlinks=False))
            ours = same and os.pread(lock, 512, 0) == _words()
    except OSError:  # held, gone, or not to be read: not ours
        ours = False
    if not ours and lock >= 0:
        os.close(lock)
        lock = -1
    return lock


def _words() -> bytes:
    # The machine, because locks of some shared file systems are known to one machine alone.
    return f"gpurho scratch folder of a process on {socket.gethostname()}\n".encode()


def _remove(folder: Path) -> None:
    """Remove a folder, its owner last: what cannot be removed now is found by a later run."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name == OWNER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [OWNER]:
            (folder / OWNER).unlink()
        folder.rmdir()


__all__ = ["OWNER", "remove_abandoned", "scratch_folder"]
