"""Dask clusters to predict on: one worker for each device of this machine, or any that is running already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.errors import DeviceError, MissingDependencyError, SettingsError
from gpurho.pipelines.workers import available_cores

if TYPE_CHECKING:
    from distributed import Client

LOOPBACK = "127.0.0.1"
START_SECONDS = 120
"""Seconds that the workers of this machine have to start."""

CONNECT_SECONDS = 30
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
MUST_AGREE = ("gpurho", "torch", "numba", "numpy")
"""Packages that must have one version on all workers, since they decide the bits of the result."""


def local_options(devices: int, device: str) -> dict[str, Any]:
    """Arguments of the cluster of `devices` workers on this machine: closed to the network, without a dashboard."""
    options: dict[str, Any] = {
        "n_workers": devices,
        "threads_per_worker": 1,
        "host": LOOPBACK,
        # The scheduler always serves its state by HTTP; at least on a free port of the loopback, and nothing to see.
        "dashboard_address": f"{LOOPBACK}:0",
        "scheduler_kwargs": {"dashboard": False},
        "memory_limit": None,
        "silence_logs": logging.CRITICAL,
    }
    if device.startswith("cuda"):
        return options | {"device_memory_limit": None, "protocol": "tcp"}
    share = str(max(1, available_cores() // devices))
    # The user's own wish stands; Dask's default would be one thread.
    return options | {"processes": True, "env": {name: os.environ.get(name, share) for name in THREADS}}


@contextlib.contextmanager
def local_client(devices: int, device: str) -> Iterator[Client]:
    """A client of a cluster with one worker process for each of `devices` devices, which ends with the context.

    Raises
    ------
    MissingDependencyError
        Without dask and distributed, or, for GPUs, dask-cuda.
    DeviceError
        Where there are fewer GPUs.
    SettingsError
        Where the workers cannot start.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingsError(
            f"devices={devices} starts processes: call predict from a file, under if __name__ == '__main__':, as"
            " multiprocessing asks"
        )
    kind = _cluster_class(devices, device)
    from distributed import Client

    before = dict(os.environ)
    try:
        cluster = kind(**local_options(devices, device))
    except (RuntimeError, OSError, TimeoutError, ValueError) as error:
        raise SettingsError(
            f"devices={devices}: workers cannot start ({_reason(error)}); call predict from a file, under"
            " if __name__ == '__main__':"
        ) from error
    try:
        with Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(devices, timeout=START_SECONDS)
            # Dask sets variables of its workers here too; later imports of this process must not meet them.
            for name in [name for name in os.environ if name not in before]:
                del os.environ[name]
            yield client
    except TimeoutError as error:
        raise SettingsError(f"devices={devices}: workers did not start within {START_SECONDS} s") from error
    finally:
        cluster.close(timeout=10)


def _cluster_class(devices: int, device: str) -> Callable[..., Any]:
    if not device.startswith("cuda"):
        return _distributed().LocalCluster
    import torch

    found = torch.cuda.device_count()
    if found < devices:
        raise DeviceError(
            f"devices={devices}, but this machine has {found} GPUs; give devices={found}, or device='cpu'"
        )
    _distributed()
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError:
        raise MissingDependencyError("several GPUs need dask-cuda; pip install 'gpurho[dask-cuda]'") from None
    return LocalCUDACluster


def _distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise MissingDependencyError(
            "several devices need dask and distributed; pip install 'gpurho[dask]' ('gpurho[dask-cuda]' for GPUs)"
        ) from None
    return distributed


def connect(address: str | None = None, scheduler_file: str | Path | None = None) -> Client:
    """A client of a running cluster, by the scheduler's address or by the file that it wrote.

    Encryption is as Dask's configuration says (``distributed.comm.tls``).

    Raises
    ------
    SettingsError
        When no scheduler answers, or not exactly one of the two is given.
    """
    if (address is None) == (scheduler_file is None):
        raise SettingsError("give either the scheduler's address or its file, e.g. --scheduler tcp://node1:8786")
    if scheduler_file is not None and not Path(scheduler_file).is_file():
        raise SettingsError(f"scheduler file {scheduler_file} does not exist; start dask scheduler --scheduler-file")
    where = {"address": address} if address is not None else {"scheduler_file": str(scheduler_file)}
    distributed = _distributed()
    # What goes wrong is told in one line by who meets it, and not with tracebacks of the connection.
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address is not None and address.startswith("tls://") and not _has_keys(distributed):
        raise SettingsError(
            f"the scheduler at {address} takes encrypted connections, and Dask's configuration here names no"
            " certificates; set distributed.comm.tls (ca-file, client key and cert), as on the scheduler"
        )
    try:
        return distributed.Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise SettingsError(
            f"no scheduler answers at {address or scheduler_file} ({_reason(error)}); check that it runs"
        ) from None


def _has_keys(distributed: Any) -> bool:
    """Whether Dask's configuration has what a client needs to encrypt."""
    arguments: dict[str, Any] = distributed.Security().get_connection_args("client")
    return arguments.get("ssl_context") is not None


def check_client(client: Any) -> None:
    """Raise `SettingsError` unless `client` is a Dask client that is connected and not asynchronous."""
    if not (hasattr(client, "submit") and hasattr(client, "scheduler_info")):
        raise SettingsError(f"client={client!r} is no dask.distributed Client; give one, e.g. Client(cluster)")
    if getattr(client, "asynchronous", False) or getattr(client, "status", "") != "running":
        raise SettingsError(f"client={client!r} is closed or asynchronous; give an open Client(cluster)")


def worker_facts(device: str | None, precision: str) -> dict[str, Any]:
    """What a worker would compute on; runs on the worker."""
    import torch

    from gpurho.evaluator import resolve_precision
    from gpurho.pipelines.settings import resolve_device, versions

    where = resolve_device(None if device is None else device).split(":")[0]
    found = versions()
    return {
        "device": where,
        "precision": resolve_precision(precision, torch.device(where)),
        **{name: found[name] for name in MUST_AGREE},
    }


def agreed_facts(client: Any, device: str | None, precision: str) -> dict[str, Any]:
    """Device kind, precision and versions that all workers of a cluster have; waits for the first worker.

    Raises
    ------
    SettingsError
        Where workers differ, or have no gpurho.
    """
    client.wait_for_workers(1)
    try:
        found = client.run(worker_facts, device, precision)
    except ImportError as error:
        raise SettingsError(f"the workers cannot import gpurho ({_reason(error)}); install it on all of them") from None
    (address, first), *others = found.items()
    for other, facts in others:
        for name, value in facts.items():
            if value != first[name]:
                raise SettingsError(
                    f"workers differ: {name} is {first[name]} on {address} and {value} on {other}; use equal workers,"
                    " or give device= and precision="
                )
    return first


def _reason(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
