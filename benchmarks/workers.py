"""Where cells are computed: the devices and workers that the command line asks for."""

import argparse
from dataclasses import replace

import torch

from .scoring.cells import Options


def asked_workers(args: argparse.Namespace, options: Options) -> list[Options]:
    """The options of each worker of the local engine: they differ in the device.

    Raises:
        ValueError: what does not go together, or a device that is not there.
    """
    if args.engine == "ray":
        given = {"--devices": args.devices, "--jobs": args.jobs, "--prefetch": args.prefetch}
        given |= {"--free-cache": args.free_cache, "--keep-scores": args.keep_scores, "--rescore": args.rescore}
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"{', '.join(wrong)}: of this machine alone; leave it out with --engine ray.")
        return []
    if args.address:
        raise ValueError("--address: is of --engine ray; add that, or leave it out.")
    if args.devices and args.jobs:
        raise ValueError("--devices and --jobs: expected one of them; --jobs divides the CPU.")
    if args.jobs:
        if options.device != "cpu":
            raise ValueError(
                f"--jobs: divides the CPU, found --device {options.device}; use --devices or --device cpu."
            )
        return [options] * args.jobs
    if args.devices == "all":
        count = torch.accelerator.device_count()
        if not count:
            raise ValueError("--devices all: found no accelerator; use --jobs N for several workers on the CPU.")
        kind = torch.accelerator.current_accelerator()
        return [replace(options, device=f"{kind.type if kind else 'cuda'}:{index}") for index in range(count)]
    if args.devices:
        devices = [usable_device(name.strip()) for name in args.devices.split(",")]
        if len({torch.device(device).type for device in devices}) > 1:
            raise ValueError(f"--devices: found {args.devices}; expected devices of one kind, whose figures agree.")
        return [replace(options, device=device) for device in devices]
    return [options]


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
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
