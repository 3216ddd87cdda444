"""Settings of the test suite: few threads, and Hypothesis without deadlines (compilation is slow, once)."""

from __future__ import annotations

import os
import shutil
import signal

# A suite that a shell has put into the background ignores interrupts, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")
# Threads that spin while they wait make a test many times slower when another process uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if shutil.which("nvidia-smi") is None:
    # Before anything imports Triton: from then on its own functions are interpreted, or compiled, too.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "gpurho",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("gpurho")
