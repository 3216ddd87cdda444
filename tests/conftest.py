"""Settings of the test suite: few threads, and Hypothesis without deadlines (compilation is slow, once)."""

from __future__ import annotations

import os
import signal

# A suite that a shell has put into the background ignores interrupts, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")
# Threads that spin while they wait make a test many times slower when another process uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "gpurho",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("gpurho")
