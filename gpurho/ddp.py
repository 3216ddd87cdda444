"""Training by several processes on one machine, through torch's DistributedDataParallel.

Every process takes its part of every batch; gradients are averaged, so that n processes take the steps that one
would with the same batches, but for rounding. GPUs talk through NCCL, processes on the CPU through Gloo.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from gpurho.datasets import open_dataset
from gpurho.errors import DeviceError, ModelError
from gpurho.model import DensityModel
from gpurho.training import Trainer
from gpurho.trainingdata import check_batch
from gpurho.trainlog import StepBar

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, one of which may be computing features."""


def check_devices(device: torch.device, devices: int, batch_size: int) -> None:
    """Raise `DeviceError` or `SettingsError` where so many processes cannot train."""
    most = torch.cuda.device_count() if device.type == "cuda" else 256
    if not 1 <= devices <= most:
        raise DeviceError(f"devices {devices} is not from 1 to {most}, the number there is")
    check_batch(batch_size, devices)
    if devices > 1 and not torch.distributed.is_available():
        raise DeviceError("this torch has no torch.distributed; train with devices=1")


def run_distributed(trainer: Trainer, devices: int, progress: bool = False) -> DensityModel:
    """Run a trainer that has not begun in `devices` processes; afterwards it stands where they ended.

    Raises
    ------
    DeviceError
        For fewer than one device, more GPUs than there are, or a torch without the means.
    GpurhoError
        What a process failed with.
    """
    cuda = trainer.device.type == "cuda"
    check_devices(trainer.device, devices, trainer.settings.batch_size)
    from torch.multiprocessing import ProcessRaisedException, start_processes

    # One process computes the features into the scratch files, which all then read.
    trainer.data.on_disk = True
    trainer.data.gather()
    with tempfile.TemporaryDirectory(prefix="gpurho") as folder:
        values = (devices, f"file://{Path(folder).resolve()}/meeting", cuda, _arguments(trainer), progress)
        try:
            start_processes(_work, values, nprocs=devices, start_method="spawn")
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise ModelError(f"a training process failed: {last}") from None
    trainer.prepare()
    trainer.restore()
    return trainer.finish()


def _arguments(trainer: Trainer) -> dict[str, Any]:
    """What another process needs to build the same trainer."""
    return {
        "paths": [str(p.dataset.path) for p in trainer.parts],
        "splits": [p.split for p in trainer.parts],
        "settings": trainer.settings,
        "checkpoint": str(trainer.checkpoint),
        "start": trainer.start,
        "tensorboard": trainer.tensorboard,
        "threads": trainer.threads,
    }


def _work(rank: int, world: int, meeting: str, cuda: bool, values: dict[str, Any], progress: bool) -> None:
    """The life of one process."""
    torch.set_num_threads(max(1, values["threads"] // world) if not cuda else values["threads"])
    if cuda:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", init_method=meeting, rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        trainer = Trainer(
            [open_dataset(p) for p in values["paths"]],
            values["splits"],
            values["settings"],
            values["checkpoint"],
            device=f"cuda:{rank}" if cuda else "cpu",
            start=values["start"],
            tensorboard=values["tensorboard"],
            rank=rank,
            world=world,
        )
        with StepBar(progress and rank == 0) as bar:
            trainer.run(bar)
    finally:
        torch.distributed.destroy_process_group()


__all__ = ["run_distributed"]
