"""Run each cell as a task of a Ray cluster, with the resources that it needs. Needs the extra `ray`.

Tasks return records and logs to the driver, which writes them exactly as it does for the local engine: a sweep may
start on one machine and continue on a cluster, or the other way round. Ray ships the code of both packages to the
nodes. Every node must have the driver's versions of Python, torch, timm and the other packages; the engine refuses a
node that differs.
"""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import ray
import torch
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import timm_csra
from timm_csra.accelerators import on_accelerator

from ..checkpoints.find import Checkpoint
from ..data.datasets import ImageSet
from ..records.files import Record
from ..scoring.cells import Cell, Options
from ..scoring.environment import PACKAGES
from ..scoring.measure import Unfinished, failure
from ..scoring.passes import Turn
from ..scoring.software import versions
from .estimate import memory_of
from .local import KEEP_MEMORY, EngineError, Lost, Outcome
from .worker import Compute, Models, compute, output_to, turns

T = TypeVar("T")
AHEAD = 2  # cells submitted for each slot: one runs, one waits, so that no slot idles
LOG_BYTES = 2**20  # a task returns at most this much of its output
ANSWER = 300.0  # seconds within which a node must report its software before the run starts


class RayEngine:
    """An engine that runs cells as tasks of a Ray cluster.

    Args:
        options: how a cell is measured; with an accelerator as `device`, each task asks for a GPU.
        address: address of the cluster, `auto` or `ray://host:port`; None starts one on this machine.
        cpus: CPU cores for each task.
        data: the image sets. Every node must see their files.
        compute: the function that tasks run; benchmarks of the engine replace it.
        jobs: number of tasks that share a GPU: one runs images while the others load checkpoints and read images.
        beside: compute metrics and intervals in tasks of their own, without a GPU. Default: only where cells use GPUs.

    Raises:
        EngineError: the cluster does not exist, or a node has other versions or does not see the data.
    """

    def __init__(
        self,
        options: Options,
        address: str | None = None,
        cpus: int = 1,
        data: Sequence[ImageSet] = (),
        compute: Compute = compute,
        jobs: int = 1,
        beside: bool | None = None,
    ) -> None:
        self._options, self._cpus = options, cpus
        self._gpus = 1 / jobs if on_accelerator(options.device) else 0
        self._beside = self._gpus > 0 if beside is None else beside
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(address or os.environ.get("RAY_ADDRESS"))
        self._needed = _software()
        self._images = {id(images): (images, ray.put(images)) for images in data}
        self._compute = ray.put(compute)
        self._task = ray.remote(num_cpus=cpus, num_gpus=self._gpus, max_retries=0, num_returns=2)(_compute_cell)
        self._finish = ray.remote(num_cpus=0, max_retries=0)(_finish_cell)  # `_answering` limits their number instead
        self._in_flight: dict[Any, tuple[Cell, Path, float, Any]] = {}
        self._finishing: dict[Any, tuple[Cell, Path, float, Any]] = {}
        self._slots, self._answering, self._looked = 1, 1, -1.0
        self._check_nodes(data)

    def room(self) -> list[Checkpoint | None]:
        if time.monotonic() - self._looked > 1.0:  # nodes come and go
            total = ray.cluster_resources()
            slots = min(total.get("CPU", 0) // self._cpus, total.get("GPU", 0) // self._gpus if self._gpus else 1e9)
            self._slots, self._looked = max(1, int(slots)), time.monotonic()
            self._answering = max(1, int(total.get("CPU", 0)))
        if len(self._finishing) >= self._answering:
            return []
        return [None] * (AHEAD * self._slots - len(self._in_flight))

    def submit(self, cell: Cell, log: Path) -> None:
        key = id(cell.data)
        if key not in self._images:
            self._images[key] = (cell.data, ray.put(cell.data))
        task = self._task.options(memory=self._memory(cell), name=f"{cell.checkpoint.name} {cell.task_name}")
        light = replace(cell, data=None)  # type: ignore[arg-type]
        how = (self._options, self._cpus, [self._compute], self._needed, self._beside)
        told, left = task.remote(light, [self._images[key][1]], *how)
        self._in_flight[told] = cell, log, time.perf_counter(), left

    def poll(self, seconds: float) -> list[Outcome]:
        waiting = [*self._in_flight, *self._finishing]
        done, rest = ray.wait(waiting, timeout=seconds)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        outcomes = [self._outcome(reference) for reference in done]
        return [outcome for outcome in outcomes if outcome is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for reference in (*self._in_flight, *self._finishing):
            ray.cancel(reference, force=True)
        if self._ours:
            ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome | None:
        """Return what a task returned, or None after submitting the task that computes the cell's metrics."""
        of_pass = reference in self._in_flight
        cell, log, started, left = (self._in_flight if of_pass else self._finishing).pop(reference)
        try:
            record, said = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise EngineError(str(error.cause)) from None
            raise
        except RayError as error:  # the worker or its node died, perhaps with a finished record
            first = str(error).strip().splitlines()[0]
            why = f"the process of this cell died: {type(error).__name__}: {first}"
            lost: Lost = "node" if isinstance(error, (NodeDiedError, ObjectLostError)) else "worker"
            return Outcome(cell, failure(cell, self._options, why, time.perf_counter() - started), lost)
        if said:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(said)
        if record is None:
            task = self._finish.options(memory=self._memory(cell), name=f"{cell.checkpoint.name} {cell.task_name}")
            self._finishing[task.remote(left)] = cell, log, started, None
            return None
        return Outcome(cell, record)

    def _memory(self, cell: Cell) -> int:
        """Bytes to ask Ray for: at most what the largest node has, else the task would wait forever."""
        nodes = (node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
        return int(min(memory_of(cell, self._options), max(nodes, default=0)))

    def _check_nodes(self, data: Sequence[ImageSet]) -> None:
        """Check that every node which could get a cell has the driver's software and sees the data."""
        kind = "GPU" if self._gpus else "CPU"
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) > 0]
        calibration = [images.calibration.pictures for images in data if images.calibration]
        files = sorted({str(path) for images in (*data, *calibration) for path in _sample(images)})
        report = ray.remote(_report)
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = report.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[f"{node['NodeManagerAddress']} {node['NodeID'][:8]}"] = options.remote(files)
        for name, reference in asked.items():
            try:
                software, absent = ray.get(reference, timeout=ANSWER)
            except (NodeDiedError, TaskUnschedulableError):
                continue  # the node has left the cluster since `ray.nodes` listed it
            except (GetTimeoutError, RayError) as error:
                raise EngineError(f"node {name} does not answer: {str(error).strip().splitlines()[0]}") from error
            _compare(name, software, self._needed)
            if absent:
                raise EngineError(
                    f"node {name}: found no {absent[0]}{f' and {len(absent) - 1} more' if len(absent) > 1 else ''} of "
                    f"{len(files)} files looked for, expected every node to see the data under the same path. Mount it "
                    "there, e.g. by NFS, or leave the node out."
                )


def _connect(address: str | None) -> None:
    packages = [str(Path(timm_csra.__file__).parent), str(Path(__file__).parents[1])]
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init("local", runtime_env={"env_vars": KEEP_MEMORY}, include_dashboard=False, **quiet)
        else:  # ship the code of this checkout to a cluster that is already running
            _reach(address)
            code = {"py_modules": packages, "excludes": ["__pycache__"], "env_vars": KEEP_MEMORY}
            ray.init(address=address, runtime_env=code, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"--address {address}: {str(error).strip().splitlines()[0]} Start a cluster with `ray start --head`, or "
            "leave out --address to start one on this machine."
        ) from error


def _reach(address: str) -> None:
    """Raise OSError at once if nothing listens at the address; Ray would keep trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _software() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, **versions(*PACKAGES), "timm_csra": timm_csra.__version__}


def _compare(where: str, found: dict[str, str], expected: dict[str, str]) -> None:
    differ = [f"{name} {found.get(name)} (expected {v})" for name, v in expected.items() if found.get(name) != v]
    if differ:
        raise EngineError(
            f"node {where}: found {', '.join(differ)}, the versions of the driver. Records of different versions must "
            "not be mixed: install the same ones there, or leave the node out."
        )


def _sample(images: ImageSet) -> list[Path]:
    """Up to a hundred of the data's files, evenly spread; for an archive, the archive itself."""
    files = [path for path in images.paths if isinstance(path, Path) and path.is_absolute()] if not images.store else []
    return files[:: max(1, len(files) // 100)]


def _report(files: list[str]) -> tuple[dict[str, str], list[str]]:
    return _software(), [file for file in files if not os.path.exists(file)]


class _Held:
    """State that a worker process keeps from one task to the next."""

    def __init__(self) -> None:
        self.run: str | None = None  # Ray may reuse a worker process for the next run: its function tells runs apart
        self.models = Models("cpu")
        self.images: dict[str, ImageSet] = {}
        self.compute: Compute = compute


_held = _Held()


def _compute_cell(
    cell: Cell,
    data: list[Any],
    options: Options,
    cpus: int,
    function: list[Any],
    needed: dict[str, str],
    beside: bool,
) -> tuple[tuple[Record | None, bytes], Unfinished | None]:
    """Run one cell on a node. `data` and `function` hold references in lists, so that Ray fetches them only on demand.

    Returns:
        The record and what the task printed, and None; or, where metrics are left to compute, None instead of the
        record, and the unfinished cell, which stays on the node until the next task takes it.
    """
    if _held.run != function[0].hex():
        context = ray.get_runtime_context()
        _compare(context.get_node_id()[:8], _software(), needed)  # the node may have joined after the run started
        if options.device == "cpu":
            torch.set_num_threads(cpus)
        _held.models = Models(options.device, options.channels_last, _turn(function[0].hex()))
        _held.run, _held.images = function[0].hex(), {}
        _held.compute = ray.get(function[0])
    name = data[0].hex()
    if name not in _held.images:
        _held.images[name] = ray.get(data[0])

    def begin() -> Record | Unfinished:
        found = _held.compute(replace(cell, data=_held.images[name]), options, _held.models, _every)
        return found.finished() if isinstance(found, Unfinished) and not beside else found

    found, said = _with_output(begin)
    return ((None, said), found) if isinstance(found, Unfinished) else ((found, said), None)


def _finish_cell(cell: Unfinished) -> tuple[Record, bytes]:
    return _with_output(cell.finished)


def _with_output(function: Callable[[], T]) -> tuple[T, bytes]:
    """Return the function's result and the end of what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with output_to(log):
            found = function()
        return found, log.read_bytes()[-LOG_BYTES:]


def _turn(run: str) -> Turn:
    """Let tasks that share a GPU run images one at a time."""
    if not (gpus := ray.get_gpu_ids()):
        return nullcontext
    name = f"timm_csra_{run}_{'_'.join(map(str, gpus))}.lock"
    return turns(Path(tempfile.gettempdir()) / name)


def _every(batches: Any) -> Any:
    return batches
