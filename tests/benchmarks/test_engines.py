"""One suite for both engines: the same records, the same survival. Ray runs as a real cluster of several nodes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray._private import services
from ray.cluster_utils import Cluster
from rich.console import Console

from benchmarks.checkpoints.downloads import Downloads
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.calibration import with_calibration, without_measured
from benchmarks.data.datasets import ImageSet
from benchmarks.data.sources import load_image_set, load_pictures
from benchmarks.engine_cost import Named
from benchmarks.engines import cluster as cluster_engine
from benchmarks.engines.cluster import RayEngine
from benchmarks.engines.local import EngineError, LocalEngine
from benchmarks.engines.run import Run
from benchmarks.engines.worker import Models
from benchmarks.records.files import read_records
from benchmarks.records.phases import Phases
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.kept import Scored
from benchmarks.scoring.measure import Unfinished, failure, run_cell
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, Scores, Setting

from .test_survival import ROOT, save

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]
LOOPBACK = "127.0.0.1"
OPTIONS = Options((PLAIN, DEFAULT, Setting(0.5, (1.0, math.inf))), workers=0, batch_size=4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that computes nothing and two nodes of one CPU each, on this machine."""
    patch = pytest.MonkeyPatch()
    patch.setattr(services, "resolve_ip_for_localhost", lambda host: host)  # Ray would replace it by the machine's own
    patch.setenv("PYTHONPATH", str(ROOT))
    head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": LOOPBACK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        add_node(cluster)
    ray.init(address=cluster.address, _node_ip_address=LOOPBACK, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, node_ip_address=LOOPBACK)


ENGINES = {
    "local": partial(LocalEngine, [OPTIONS] * 2),
    "local, four": partial(LocalEngine, [OPTIONS] * 4),
    "local, metrics beside": partial(LocalEngine, [OPTIONS] * 2, take_turns=True, answering=2),
    "ray": partial(RayEngine, OPTIONS, cpus=1),
    "ray, metrics beside": partial(RayEngine, OPTIONS, cpus=1, beside=True),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    """A function that starts an engine of several workers, one thread each."""
    if request.param.startswith("ray"):
        request.getfixturevalue("cluster")
    start = ENGINES[request.param]
    return lambda compute=None: start(**({"compute": compute} if compute else {}))


def cells_of(models: list[Checkpoint], photos: Path, sizes: tuple[int, ...] = (64, 96)) -> list[Cell]:
    data = load_image_set(photos)
    tasks = (("single", None), ("mosaic", 2))
    return [Cell(m, data, task, (s, s), str(s), grid) for m in models for s in sizes for task, grid in tasks]


def run(out: Path, cells: list[Cell], engine: Any, compute: Any = None, retry_failed: bool = False) -> list[dict]:
    run = Run(OPTIONS, out, {}, retry_failed, Console(file=(out.parent / "told").open("a"), width=200))
    return [record for _, record in run.records(cells, lambda progress: engine(compute), Downloads(False, False))]


def stable(record: dict) -> dict:
    """What does not depend on when and where."""
    varying = ("seconds", "device_seconds", "finished", "phases", "environment", "cost", "images_run")
    return json.loads(json.dumps({name: value for name, value in record.items() if name not in varying}))


@pytest.mark.filterwarnings("ignore:.*few to choose lam reliably", "ignore:.*the largest tried")
def test_records_are_the_same_and_bit_identical(engine: Any, tmp_path: Path, photos: Path) -> None:
    models = [Checkpoint("local-dir", save(tmp_path / f"m{i}", i).removeprefix("local-dir:")) for i in range(2)]
    # Lam is also chosen without labels, by what is left of the same pictures and one more.
    rng = np.random.default_rng(1)
    pictures = Path(shutil.copytree(photos, tmp_path / "pictures"))
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(pictures / "cat" / "more.png")
    cells = cells_of(models, photos)
    (data,) = without_measured(with_calibration([cells[0].data], load_pictures(pictures)))
    cells = [replace(cell, data=data) for cell in cells]
    records = run(tmp_path / "out", cells, engine)
    assert len(records) == len(cells) == 8
    assert {record["agreement"]["images"] for record in records} == {1}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = Models("cpu")
        expected = {json.dumps(c.key(OPTIONS)): stable(run_cell(c, partial(here.get, c), OPTIONS)) for c in cells}
    finally:
        torch.set_num_threads(threads)
    stored = {json.dumps(record["key"]): stable(record) for record in read_records(tmp_path / "out")}
    assert {json.dumps(record["key"]): stable(record) for record in records} == stored
    assert expected == stored
    assert all(record["status"] == "ok" for record in records)
    assert all(len(record["environment"]["commit"]) >= 40 for record in records)


def counting(folder: str, cell: Cell, options: Options, models: Models, track: Any) -> dict:
    """A cell that only tells that it has been computed, where, and, by its checkpoint's name, may fail or die."""
    with open(folder, "a") as file:
        file.write(f"{cell.checkpoint.id} {os.getpid()}\n")
    if cell.checkpoint.id.startswith("broken"):
        print("what went wrong", flush=True)
        return failure(cell, options, "ValueError: broken")
    first = Path(f"{folder}.{cell.checkpoint.id}")
    if cell.checkpoint.id.startswith("dies") and (cell.checkpoint.id == "dies always" or not first.exists()):
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.checkpoint.id.startswith("slow"):
        time.sleep(1)
    record = failure(cell, options, "")
    return record | {"status": "ok", "where": ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""}


@dataclass(frozen=True)
class Left(Unfinished):
    """Metrics that fail or die where `counting` does."""

    told: str = ""

    def finished(self) -> dict:
        return counting(self.told, self.cell, self.options, Models("cpu"), iter)


def leaving(told: str, cell: Cell, options: Options, models: Models, track: Any) -> Left:
    scores = Scores(torch.zeros(1, 2), {})
    return Left(cell, options, Scored(scores, torch.zeros(1), {}), Phases(), {}, 0.0, told)


WHERE = [
    ("local", counting),
    ("ray", counting),
    ("local, metrics beside", leaving),
    ("ray, metrics beside", leaving),
]


def trivial(names: list[str]) -> list[Cell]:
    data = ImageSet("nothing", (), (), ("a", "b"))
    return [Cell(Named("timm", name), data, "single", (64, 64)) for name in names]


def counted(told: Path) -> dict[str, int]:
    names = [line.rsplit(" ", 1)[0] for line in told.read_text().splitlines()]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(("engine", "where"), WHERE, indirect=["engine"])
def test_failures_and_deaths(engine: Any, tmp_path: Path, where: Any) -> None:
    """What fails is not tried again; what dies is, once; all others are computed once, whatever happens beside them."""
    told = tmp_path / "computed"
    compute = partial(where, str(told))
    names = ["a", "broken", "dies once", "b", "dies always", "c"]
    if isinstance(engine(), RayEngine):
        names.remove("dies once")  # as somebody kills it below; a new worker of Ray takes ten seconds
    records = run(tmp_path / "out", trivial(names), engine, compute)
    found = {record["model"]: record for record in records}
    assert {name: record["status"] for name, record in found.items()} == {
        name: "failed" if name in ("broken", "dies always") else "ok" for name in names
    }
    assert found["broken"]["reason"] == "ValueError: broken"
    assert "the process of this cell died" in found["dies always"]["reason"]
    assert counted(told) == {name: 2 if name.startswith("dies") else 1 for name in names}
    log = next(path for path in (tmp_path / "out" / "logs").iterdir() if path.name.startswith("broken"))
    assert "what went wrong" in log.read_text()
    assert {r["model"]: r["status"] for r in read_records(tmp_path / "out")} == {
        name: record["status"] for name, record in found.items()
    }


def test_failures_and_deaths_are_tried_again_when_asked(tmp_path: Path) -> None:
    """By records alone, which no engine reads."""
    told = tmp_path / "computed"
    names = ["a", "broken", "dies once", "b", "dies always", "c"]
    engine = lambda compute: LocalEngine([OPTIONS] * 2, compute=compute)  # noqa: E731
    for retry_failed in (False, True):
        records = run(tmp_path / "out", trivial(names), engine, partial(counting, str(told)), retry_failed)
        assert len(records) == len(names)
    expected = {"a": 1, "b": 1, "c": 1, "broken": 2, "dies once": 2, "dies always": 4}
    assert counted(told) == expected


@pytest.mark.parametrize(("engine", "where"), WHERE[:3], indirect=["engine"])
def test_a_worker_that_somebody_kills(engine: Any, tmp_path: Path, where: Any) -> None:
    told = tmp_path / "computed"
    cells = trivial([f"slow {i}" for i in range(4)])
    folder = Run(OPTIONS, tmp_path / "out", {}, False, Console(quiet=True))
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not told.exists() or not told.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        name, pid = told.read_text().splitlines()[-1].rsplit(" ", 1)
        time.sleep(0.3)  # of the second that the cell takes
        os.kill(int(pid), signal.SIGKILL)
        killed.append(name)

    killer = threading.Thread(target=kill)
    killer.start()
    list(folder.records(cells, lambda _: engine(partial(where, str(told))), Downloads(False, False)))
    killer.join()
    assert [record["status"] for record in read_records(tmp_path / "out")] == ["ok"] * 4
    assert counted(told) == {cell.checkpoint.id: 1 + (cell.checkpoint.id in killed) for cell in cells}


def mixed(told: str, cell: Cell, options: Options, models: Models, track: Any) -> dict | Left:
    """Images that kill their process, and metrics that take a second."""
    compute = counting if cell.checkpoint.id.startswith("dies") else leaving
    return compute(told, cell, options, models, track)


def test_metrics_beside_a_worker_that_dies_twice(tmp_path: Path) -> None:
    """A cell whose metrics were computed meanwhile is not to blame: it is computed again, and has a result."""
    cells = trivial(["slow 0", "dies always", "a"])
    compute = partial(mixed, str(tmp_path / "computed"))
    records = run(
        tmp_path / "out", cells, lambda compute: LocalEngine([OPTIONS], compute=compute, answering=2), compute
    )
    assert {record["model"]: record["status"] for record in records} == {
        "slow 0": "ok",
        "dies always": "failed",
        "a": "ok",
    }
    assert counted(tmp_path / "computed")["dies always"] == 2


@pytest.mark.parametrize(("begun", "finished"), [("local", "ray"), ("ray", "local")])
def test_ctrl_c_loses_nothing(begun: str, finished: str, tmp_path: Path, photos: Path) -> None:
    """What one engine has computed before Ctrl-C the other does not compute again."""
    engines = {"local": ["--engine", "local", "--jobs", "2"], "ray": ["--engine", "ray", "--cpus-per-cell", "1"]}
    models = ",".join(save(tmp_path / f"m{i}", i) for i in range(3))
    command = [sys.executable, "-m", "benchmarks.sweep", "--models", models, "--data", str(photos), "--workers", "0"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out"), "--img-size", "64,96,128,160"]
    process = subprocess.Popen(
        command + engines[begun], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    records = tmp_path / "out" / "records"
    deadline = time.monotonic() + 180
    while not (records.is_dir() and len(list(records.glob("[!.]*.json"))) >= 2):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    shown, told = (stream.decode() for stream in process.communicate(timeout=120))
    assert process.returncode == 130, told
    assert "start again to do the rest" in told and "Traceback" not in told
    before = {path: path.stat().st_mtime_ns for path in records.glob("[!.]*.json")}
    assert 2 <= len(before) < 12
    assert all(json.loads(path.read_text())["status"] == "ok" for path in before)
    assert (tmp_path / "out" / "summary.csv").is_file() and f"{len(before)} records" in shown
    assert re.search(r"s of computing: loading checkpoints \d+%, .*forward passes and attention \d+%", shown)
    again = subprocess.run(command + engines[finished], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert again.returncode == 0, again.stderr.decode()
    after = {path: path.stat().st_mtime_ns for path in records.glob("[!.]*.json")}
    assert before.items() <= after.items()
    assert len(after) == 12


def test_a_node_is_lost_and_another_joins(cluster: Cluster, tmp_path: Path) -> None:
    told = tmp_path / "computed"
    cells = trivial([f"slow {i}" for i in range(12)])
    doomed = add_node(cluster)
    cluster.wait_for_nodes()
    folder = Run(OPTIONS, tmp_path / "out", {}, False, Console(quiet=True))
    joined, where = None, []
    start = lambda _: RayEngine(OPTIONS, cpus=1, compute=partial(counting, str(told)))  # noqa: E731
    for count, (_, record) in enumerate(folder.records(cells, start, Downloads(False, False))):
        where.append(record.get("where"))
        if count == 2:
            cluster.remove_node(doomed, allow_graceful=False)
            joined = add_node(cluster)
    stored = read_records(tmp_path / "out")
    assert [record["status"] for record in stored] == ["ok"] * 12
    assert joined is not None
    assert len(set(where)) >= 3
    cluster.remove_node(joined)


def test_nodes_are_asked_before_anything_runs(
    cluster: Cluster, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_image_set(photos)
    RayEngine(OPTIONS, cpus=1, data=[data])
    for path in photos.rglob("*.png"):
        path.unlink()
    with pytest.raises(EngineError, match="found no .*png and 11 more of 12 files looked for, expected every node to"):
        RayEngine(OPTIONS, cpus=1, data=[data])
    monkeypatch.setattr(cluster_engine, "_software", lambda: {"python": "3.11", "timm": "9.9"})
    with pytest.raises(EngineError, match=r"node .*: found timm 1\.\S+ \(expected 9\.9\), the versions of the driver"):
        RayEngine(OPTIONS, cpus=1)


def test_a_node_that_joins_with_other_versions_ends_the_run(cluster: Cluster, tmp_path: Path) -> None:
    engine = RayEngine(OPTIONS, cpus=1)
    engine._needed = engine._needed | {"timm": "9.9"}  # as if the cluster had been another one when it was asked
    with pytest.raises(EngineError, match=r"found timm 1\.\S+ \(expected 9\.9\)"):
        run(tmp_path / "out", trivial(["a"]), lambda _: engine)
    assert read_records(tmp_path / "out") == []


def test_no_cluster_at_the_address(tmp_path: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sweep", "--models", save(tmp_path / "m"), "--data", str(photos)]
    command += ["--device", "cpu", "--out", str(tmp_path / "out"), "--engine", "ray", "--address", "127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--address 127.0.0.1:9: " in done.stderr
    assert "Start a cluster with `ray start --head`, or leave out --address" in done.stderr
