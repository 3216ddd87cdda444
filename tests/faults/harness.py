"""Running commands that meet faults, and comparing what they leave with what an undisturbed run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 120.0
"""A command that takes longer hangs."""

ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "OMP_WAIT_POLICY": "PASSIVE",
    # GNU OpenMP, which Numba would take otherwise, does not work in children of a process that has used it.
    "NUMBA_THREADING_LAYER": "workqueue",
    "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


class FaultError(AssertionError):
    """A result that is lost or wrong, a message that is not one clear line, a crash or a hang."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: the exit code (minus the signal), what it said on standard error and output, seconds."""

    code: int
    said: str
    seconds: float

    def expect(self, code: int = 0) -> Outcome:
        """This, or `FaultError` where the exit code is another."""
        if self.code != code:
            raise FaultError(f"exit code {self.code}, not {code}: {self.said[-2000:]}")
        return self

    def refused(self, *words: str) -> Outcome:
        """This, or `FaultError` unless it ended with exit code 1 and one clear line that has the `words`."""
        self.expect(1)
        lines = [line for line in self.said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("gpurho: ")]
        if len(errors) != 1 or "Traceback" in self.said or lines[-1] != errors[0]:
            raise FaultError(f"not one line that says what is wrong: {self.said[-2000:]}")
        missing = [word for word in words if word not in errors[0]]
        if missing:
            raise FaultError(f"the message does not say {missing[0]!r}: {errors[0]}")
        return self


class Server:
    """The warm process of `faults.server`; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._log, self._n = folder / "said", 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )
        if self._line() != "ready":
            raise FaultError("the server of the fault suite does not start")

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def start(self, *words: object, **conditions: Any) -> Running:
        """Begin the command ``gpurho words`` under the conditions that `faults.server` knows."""
        self._n += 1
        log = self._log.with_name(f"said.{self._n % 16}")
        request = {"log": str(log), **conditions}
        if "call" not in request:
            request["start"] = [str(word) for word in words]
        return Running(self, self._ask(request), log)

    def run(self, *words: object, **conditions: Any) -> Outcome:
        """The same to its end."""
        return self.start(*words, **conditions).wait()

    def ended(self, pid: int, seconds: float) -> int | None:
        """Exit code of a child, or None when it runs on."""
        found = self._ask({"wait": pid, "seconds": seconds})
        return None if found is None else int(found)


@dataclass
class Running:
    """A command at work."""

    server: Server
    pid: int
    log: Path
    begun: float = field(default_factory=time.monotonic)
    _code: int | None = None

    def wait(self, seconds: float = SECONDS) -> Outcome:
        """Its outcome; `FaultError` when it has not ended after so many seconds."""
        code = self.server.ended(self.pid, seconds)
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.server.ended(self.pid, 10.0)
            raise FaultError(f"still at work after {seconds:.0f} s: {self.said()[-2000:]}")
        self._code = code
        return Outcome(code, self.said(), time.monotonic() - self.begun)

    def said(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def hit(self, number: int, after: float) -> bool:
        """Send a signal `after` seconds from the start; False when it had ended by itself before."""
        code = self.server.ended(self.pid, max(0.0, self.begun + after - time.monotonic()))
        if code is not None:
            self._code = code
            return False
        os.kill(self.pid, number)
        return True

    def outcome(self, seconds: float = SECONDS) -> Outcome:
        """As `wait`, also where `hit` has seen the end."""
        if self._code is not None:
            return Outcome(self._code, self.said(), time.monotonic() - self.begun)
        return self.wait(seconds)
