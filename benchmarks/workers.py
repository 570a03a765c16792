"""Turn the arguments of the command line into devices and workers."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from joblib import cpu_count

from timm_csra.accelerators import AUTO, default_device, on_accelerator, precision

from .scoring.cells import Options

JOBS = 2  # default on an accelerator: one runs images, the other loads its checkpoint and reads its first images
MOST_LOADERS = 32  # each process has two batches in shared memory: 308 MB for 64 images of 448 pixels


def asked_loaders(args: argparse.Namespace, processes: int = 1) -> int:
    """Return the number of processes that read images for each process that computes.

    By default they share the cores that this process may use, by its affinity and its container; with Ray, the cores of
    a cell.
    """
    if args.workers is not None:
        return int(args.workers)
    if args.engine == "ray":
        return int(args.cpus_per_cell)
    return max(1, min(MOST_LOADERS, cpu_count() // processes))


def asked_workers(args: argparse.Namespace, options: Options) -> list[Options]:
    """Return the options of each worker of the local engine, which differ in the device.

    Raises:
        ValueError: options exclude each other, or a device does not exist.
    """
    found = _workers(args, options)
    loaders = asked_loaders(args, max(1, len(found)))
    jobs = asked_jobs(args, options) if on_accelerator(options.device) else 1
    return [replace(worker, workers=loaders) for worker in found for _ in range(jobs)]


def asked_jobs(args: argparse.Namespace, options: Options) -> int:
    """Return the number of checkpoints that share a device."""
    return int(args.jobs or (JOBS if on_accelerator(options.device) else 1))


def asked_answering(args: argparse.Namespace, workers: Sequence[Options]) -> int:
    """Return the number of metric processes for each worker."""
    devices = len({worker.device for worker in workers})
    if args.metric_workers is None:
        each = cpu_count() // devices if on_accelerator(workers[0].device) else 0
    else:
        each = args.metric_workers
    return math.ceil(each * devices / len(workers))


def _workers(args: argparse.Namespace, options: Options) -> list[Options]:
    if args.engine == "ray":
        given = {"--devices": args.devices, "--metric-workers": args.metric_workers is not None}
        given |= {"--jobs": args.jobs and not on_accelerator(options.device), "--prefetch": args.prefetch}
        given |= {"--free-cache": args.free_cache, "--keep-scores": args.keep_scores, "--rescore": args.rescore}
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"{', '.join(wrong)}: only for --engine local; leave it out with --engine ray.")
        return []
    if args.address:
        raise ValueError("--address: only for --engine ray; add that, or leave it out.")
    if args.jobs and not on_accelerator(options.device):
        if args.devices:
            raise ValueError("--devices and --jobs: expected one of them; without a GPU --jobs divides the CPU.")
        return [options] * args.jobs
    if args.devices == "all":
        count = torch.accelerator.device_count()
        if not count:
            raise ValueError("--devices all: found no accelerator; use --jobs N for several workers on the CPU.")
        devices = [f"{default_device()}:{index}" for index in range(count)]
    elif args.devices:
        devices = [usable_device(name.strip()) for name in args.devices.split(",")]
        if len({torch.device(device).type for device in devices}) > 1:
            raise ValueError(
                f"--devices: found {args.devices}; expected devices of one kind, since their results differ."
            )
    else:
        return [options]
    for device in devices[1:]:
        if args.amp == AUTO and (its := precision(AUTO, device)) != options.amp:
            raise ValueError(
                f"--amp auto: found {options.amp} for {devices[0]} and {its} for {device}; expected the same for "
                "all. Choose it with --amp, or leave out a device."
            )
    return [replace(options, device=device) for device in devices]


def usable_device(name: str) -> str:
    """Return the name of a usable device; `auto` stands for an accelerator if there is one, else the CPU.

    Raises:
        ValueError: the device cannot be used here.
    """
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # depends on the kind of device
            raise ValueError(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}") from error
        return name
    return default_device()
