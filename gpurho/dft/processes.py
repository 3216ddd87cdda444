"""Programs run to their end, which never outlive the process that waits for them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from gpurho.errors import EngineError

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def execute(command: list[str], folder: Path, output: str, remedy: str) -> int:
    """Run `command` in `folder`, what it says going to the file `output` there; returns its exit code.

    The program and its children are stopped when this process is interrupted, and killed (on Linux) when it is killed.

    Raises
    ------
    EngineError
        Where the program cannot be started; the message ends with `remedy`.
    """
    # Unbuffered, so that the reason of a failure is in the output when MPI ends the program.
    fixed = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GFORTRAN_UNBUFFERED_ALL": "1"}
    environment = {**os.environ, **fixed}
    with open(folder / output, "w") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise EngineError(f"{command[0]} cannot be started: {error.strerror}; {remedy}") from None
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def end_with_parent() -> None:
    """Let the system kill this process with its parent, however that one ends (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
