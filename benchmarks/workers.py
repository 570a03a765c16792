"""Where cells are computed: the devices and workers that the command line asks for."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from joblib import cpu_count

from timm_csra.accelerators import AUTO, default_device, on_accelerator, precision

from .scoring.cells import Options

JOBS = 2  # on an accelerator: one runs images, the other loads its checkpoint and reads its first images
MOST_LOADERS = 32  # each is a process, with two batches in shared memory: of 64 images of 448 pixels, 308 MB


def asked_loaders(args: argparse.Namespace, processes: int = 1) -> int:
    """How many processes read images for each of those that compute. By default they share the cores that this process
    may use, by its affinity and its container; what Ray counts for a cell is the cell's."""
    if args.workers is not None:
        return int(args.workers)
    if args.engine == "ray":
        return int(args.cpus_per_cell)
    return max(1, min(MOST_LOADERS, cpu_count() // processes))


def asked_workers(args: argparse.Namespace, options: Options) -> list[Options]:
    """The options of each worker of the local engine: they differ in the device.

    Raises:
        ValueError: what does not go together, or a device that is not there.
    """
    found = _workers(args, options)
    loaders = asked_loaders(args, max(1, len(found)))
    jobs = asked_jobs(args, options) if on_accelerator(options.device) else 1
    return [replace(worker, workers=loaders) for worker in found for _ in range(jobs)]


def asked_jobs(args: argparse.Namespace, options: Options) -> int:
    """How many checkpoints share a device."""
    return int(args.jobs or (JOBS if on_accelerator(options.device) else 1))


def asked_answering(args: argparse.Namespace, workers: Sequence[Options]) -> int:
    """How many processes compute metrics beside the passes of each worker."""
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
            raise ValueError(f"{', '.join(wrong)}: of this machine alone; leave it out with --engine ray.")
        return []
    if args.address:
        raise ValueError("--address: is of --engine ray; add that, or leave it out.")
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
            raise ValueError(f"--devices: found {args.devices}; expected devices of one kind, whose figures agree.")
    else:
        return [options]
    for device in devices[1:]:
        if args.amp == AUTO and (its := precision(AUTO, device)) != options.amp:
            raise ValueError(
                f"--amp auto: found {options.amp} for {devices[0]} and {its} for {device}; expected one for all. Say "
                "which with --amp, or leave a device out."
            )
    return [replace(options, device=device) for device in devices]


def usable_device(name: str) -> str:
    """The device of that name; `auto` is an accelerator where there is one.

    Raises:
        ValueError: it cannot be used here.
    """
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # torch says it in many ways
            raise ValueError(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}") from error
        return name
    return default_device()
