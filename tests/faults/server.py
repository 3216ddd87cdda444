"""A process that has imported and compiled everything, and forks a child for each command: a run costs no start-up.

``python -m faults.server`` reads requests from standard input, one line of JSON each, and answers with one line:

- ``{"start": [words], "log": path, ...}``: run the command line ``gpurho words`` in a child, what it says going to
  `log`; answers its process id. Further entries are conditions, see `_conditions`.
- ``{"call": "module:function", "arguments": {...}, "log": path}``: the same with a function that returns None.
- ``{"wait": pid, "seconds": s}``: answers how the child ended (the exit code, or minus the signal), or null when it
  has not after so many seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

CAPABILITIES_TO_WRITE = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root ignores permissions."""


def serve() -> int:
    """Answer requests until standard input ends; returns the exit code."""
    _warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_wait(request["wait"], request["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _leave(_child, request)
        print(pid, flush=True)
    return 0


def _warm_up() -> None:
    """Import and compile; children inherit it."""
    import tempfile
    from pathlib import Path

    from predict_tools import aluminium, settings, small_model
    from training_tools import SMALL, toy_snapshot

    import gpurho
    import gpurho.cli
    import gpurho.plotting
    from faults.inputs import Inputs
    from gpurho.datasets import write_dataset
    from gpurho.pipelines.train import train

    # Commands import what they need when they run; here before.
    for name in ("label", "predict", "summary", "convert", "structures", "distributed", "cluster", "check"):
        importlib.import_module(f"gpurho.pipelines.{name}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rho = gpurho.predict(aluminium(), small_model(), grid=(8, 8, 8), out=folder / "rho.h5", **settings())
        rho.plot(folder / "rho.png")
        rho.close()
        data = write_dataset(folder / "toy.h5", [toy_snapshot(i, points=8) for i in range(5)])
        small = {**SMALL, "epochs": 1, "points_per_snapshot": 60, "batch_size": 32}
        train(data, folder / "toy.safetensors", progress=False, **small)
        words = Inputs(folder).predict(folder / "again.h5")
        with open(folder / "said", "w") as said, contextlib.redirect_stdout(said):
            gpurho.cli.main([str(word) for word in words])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def _leave(function: Callable[[dict[str, Any]], int], request: dict[str, Any]) -> NoReturn:
    """End this process as the interpreter does, but for taking its modules apart, which takes seconds after a fork."""
    code = 70
    try:
        code = function(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _child(request: dict[str, Any]) -> int:
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (until the process ends)
    # The server's own objects may hold a line that was not yet sent.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _conditions(request)
    if "call" in request:
        module, _, name = request["call"].partition(":")
        getattr(importlib.import_module(module), name)(**request.get("arguments", {}))
        return 0
    from gpurho.cli import main

    return main(request["start"])


def _conditions(request: dict[str, Any]) -> None:
    """What a child meets.

    ``file_bytes``: the largest file that it may write; ``plain_user``: permissions count for root too; ``clock``: a
    name of `faults.clock`; ``environment``: variables; ``forked``: workers of a labelling run are forked, and so start
    in no time, where they are else new processes.
    """
    os.environ.update(request.get("environment", {}))
    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    if request.get("plain_user"):
        without_capabilities()
    if request.get("forked"):
        import multiprocessing

        from gpurho.pipelines import workers

        forking = SimpleNamespace(get_context=lambda kind: multiprocessing.get_context("fork"))
        workers.multiprocessing = forking  # type: ignore[assignment]
    if "clock" in request:
        from faults.clock import disturb

        os.environ["GPURHO_FAULTS_CLOCK"] = request["clock"]
        disturb(request["clock"])


def without_capabilities() -> None:
    """Let permissions of files count for this process, even where root runs it (Linux)."""
    if os.geteuid() != 0:
        return

    class _Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for number in CAPABILITIES_TO_WRITE:
        for kind in range(3):
            data[kind] &= ~(1 << number) & 0xFFFFFFFF
    if libc.capset(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    sys.exit(serve())
