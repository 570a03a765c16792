"""The order of cells, and what is computed once more: the schedule of a sweep on engines that compute nothing."""

import json
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.checkpoints.downloads import Downloads
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import ImageSet
from benchmarks.engine_cost import Named
from benchmarks.engines.local import Lost, Outcome
from benchmarks.engines.run import Run
from benchmarks.engines.schedule import ATTEMPTS
from benchmarks.engines.simulated import Cluster
from benchmarks.records.files import read_records
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.measure import failure
from benchmarks.simulate import Simulation, cells_of, durations, main, simulate
from timm_csra.evaluation.scoring import DEFAULT, PLAIN

OPTIONS = Options((PLAIN, DEFAULT))
NOTHING = ImageSet("nothing", (), (), ("a", "b"))


class Counted(ImageSet):
    """As many images as its name says, none of which is there."""

    def __len__(self) -> int:
        return int(self.name)


class Buildable(Named):
    """A checkpoint that nobody loads, for any size."""

    def why_not_at(self, size: tuple[int, int]) -> str | None:
        return None


def cells_with(images: dict[str, list[int]]) -> list[Cell]:
    """Cells of checkpoints whose work is proportional to these numbers; unknown models count as one another."""
    return [
        Cell(Buildable("timm", name), Counted(str(count), (), (), ("a", "b")), "single", "1x")
        for name, counts in images.items()
        for count in counts
    ]


@dataclass
class Scripted:
    """Workers that finish in the order in which they were given cells, or lose them, by the name of the checkpoint."""

    workers: int
    loses: dict[str, list[Lost]] = field(default_factory=dict)
    given: list[Cell] = field(default_factory=list)
    held: list[Checkpoint | None] = field(default_factory=list)
    busy: list[tuple[int, Cell]] = field(default_factory=list)

    def room(self) -> list[Checkpoint | None]:
        self.held = self.held or [None] * self.workers
        taken = {number for number, _ in self.busy}
        return [held for number, held in enumerate(self.held) if number not in taken]

    def submit(self, cell: Cell, log: Path) -> None:
        taken = {number for number, _ in self.busy}
        idle = [number for number in range(self.workers) if number not in taken]
        number = min(idle, key=lambda n: 0 if self.held[n] == cell.checkpoint else 1 if self.held[n] is None else 2)
        self.held[number] = cell.checkpoint
        self.busy.append((number, cell))
        self.given.append(cell)

    def poll(self, seconds: float) -> list[Outcome]:
        number, cell = self.busy.pop(0)
        if losses := self.loses.get(cell.checkpoint.id):
            lost = losses.pop(0)
            self.held[number] = None
            return [Outcome(cell, failure(cell, OPTIONS, f"the {lost} is gone"), lost)]
        return [Outcome(cell, failure(cell, OPTIONS, "") | {"status": "ok", "reason": None})]

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def run(out: Path, cells: list[Cell], engine: Scripted) -> tuple[list[dict], str]:
    with (out.parent / "said").open("a") as said:
        run = Run(OPTIONS, out, {}, False, Console(file=said, width=200))
        records = [record for _, record in run.records(cells, lambda _: engine, Downloads(False, False))]
    return records, (out.parent / "said").read_text()


def order(engine: Scripted) -> list[tuple[str, int]]:
    return [(cell.checkpoint.id, cell.images) for cell in engine.given]


def test_one_worker_goes_through_the_cells_in_turn(tmp_path: Path) -> None:
    cells = cells_with({"small": [1, 3], "large": [10, 100, 20], "middle": [5]})
    engine = Scripted(1)
    run(tmp_path / "out", cells, engine)
    assert [id(cell) for cell in engine.given] == [id(cell) for cell in cells]


def test_workers_keep_their_checkpoint_where_nothing_is_late(tmp_path: Path) -> None:
    """Of many equal checkpoints each is loaded once, but for those at the end, with which all help."""
    cells = cells_with({f"m{i}": [10] * 6 for i in range(40)})
    engine = Scripted(3)
    run(tmp_path / "out", cells, engine)
    workers = [(engine.given[i::3]) for i in range(3)]  # they finish in turn
    loads = sum(a.checkpoint != b.checkpoint for given in workers for a, b in pairwise(given))
    assert loads <= 40 + 3 * 3


def test_the_largest_cell_is_begun_first_and_a_large_checkpoint_is_divided(tmp_path: Path) -> None:
    cells = cells_with({"many": [10] * 6, "large": [10, 100, 101], "small": [1, 2]})
    engine = Scripted(3)
    run(tmp_path / "out", cells, engine)
    assert order(engine)[:2] == [("large", 101), ("large", 100)]


def test_a_node_is_no_attempt_of_the_cell(tmp_path: Path) -> None:
    """A lost node leaves no record, so that a sweep which is stopped then does not take the cell for a failed one."""
    cells = cells_with({"a": [1], "unlucky": [1], "b": [1]})
    nodes: list[Lost] = ["node"] * (ATTEMPTS["node"] - 1)
    engine = Scripted(2, {"unlucky": list(nodes)})
    written = []
    submit = engine.submit

    def told(cell: Cell, log: Path) -> None:
        written.append([record["model"] for record in read_records(tmp_path / "out")])
        submit(cell, log)

    engine.submit = told  # type: ignore[method-assign]
    records, said = run(tmp_path / "out", cells, engine)
    assert {record["model"]: record["status"] for record in records} == dict.fromkeys(("a", "unlucky", "b"), "ok")
    assert Counter(order(engine)) == {("a", 1): 1, ("b", 1): 1, ("unlucky", 1): 1 + len(nodes)}
    assert not any("unlucky" in names for names in written)
    assert said.count("(the node is gone); it is computed once more") == len(nodes)
    records, _ = run(tmp_path / "never", cells, Scripted(2, {"unlucky": ["node", *nodes]}))
    assert [record["status"] for record in records if record["model"] == "unlucky"] == ["failed"]


def test_a_cell_that_kills_its_worker_twice_has_failed(tmp_path: Path) -> None:
    cells = cells_with({"a": [1], "deadly": [1]})
    engine = Scripted(2, {"deadly": ["worker", "node", "worker"]})
    records, said = run(tmp_path / "out", cells, engine)
    found = {record["model"]: record for record in records}
    assert (found["deadly"]["status"], found["deadly"]["attempts"]) == ("failed", 3)
    assert found["a"]["status"] == "ok"
    assert len(read_records(tmp_path / "out")) == 2
    assert said.count("it is computed once more") == 2


def test_what_another_sweep_works_on_comes_last(tmp_path: Path) -> None:
    """Also where its cells are the largest, and would be late."""
    cells = cells_with({"locked": [1000, 1], "a": [10, 10], "b": [10]})
    (tmp_path / "out").mkdir()
    other = Run(OPTIONS, tmp_path / "out", {}, False, Console(quiet=True)).lock(cells[0].checkpoint)
    assert other is not None
    engine = Scripted(2)
    poll, began = engine.poll, time.monotonic()

    def wait_and_release(seconds: float) -> list[Outcome]:
        if len(engine.given) == 3 and len(engine.busy) == 1:
            other.release()
        return poll(seconds)

    engine.poll = wait_and_release  # type: ignore[method-assign]
    records, said = run(tmp_path / "out", cells, engine)
    assert {record["status"] for record in records} == {"ok"}
    assert len(records) == 5
    assert [name for name, _ in order(engine)][3:] == ["locked"] * 2
    assert time.monotonic() - began < 10
    assert "Another sweep works on locked" in said


def test_finished_cells_count_for_nothing(tmp_path: Path) -> None:
    """A sweep that goes on begins with the largest of what is left, not with a checkpoint that was large."""
    cells = cells_with({"done": [1000, 1], "middle": [30], "small": [1, 2], "larger": [50]})
    run(tmp_path / "out", cells[:1], Scripted(1))
    engine = Scripted(2)
    records, _ = run(tmp_path / "out", cells, engine)
    assert len(records) == len(cells)
    assert order(engine)[:2] == [("larger", 50), ("middle", 30)]


@contextmanager
def open_files(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_checkpoints_than_files_may_be_open(tmp_path: Path) -> None:
    cells = cells_with({f"m{i}": [1] for i in range(150)})
    with open_files(100):
        records, _ = run(tmp_path / "out", cells, Scripted(150))
    assert len(records) == 150


@dataclass
class Drawn:
    """A sweep whose cells take what was drawn."""

    cells: list[Cell]
    cluster: Cluster


@st.composite
def sweeps(draw: st.DrawFn, failures: float = 0.0, longest: int = 10_000) -> Drawn:
    groups = draw(st.lists(st.lists(st.integers(1, longest), min_size=1, max_size=6), min_size=1, max_size=12))
    cells = cells_with({f"m{i}": group for i, group in enumerate(groups)})
    devices, ahead, seed = draw(st.integers(1, 30)), draw(st.sampled_from([None, 0])), draw(st.integers(0, 99))
    seconds = lambda cell: float(cell.images)  # noqa: E731
    return Drawn(cells, Cluster(devices, seconds, failures, load=0.0, ahead=ahead, seed=seed))


@settings(max_examples=30, deadline=None)
@given(sweeps())
def test_no_device_idles_while_a_cell_waits(drawn: Drawn) -> None:
    """Graham's bound for whatever gives a free machine something to do, and the times that nothing can beat."""
    cells, devices = drawn.cells, drawn.cluster.devices
    found = simulate(cells, drawn.cluster)
    even, largest = sum(cell.images for cell in cells) / devices, max(cell.images for cell in cells)
    assert found.lost == 0
    assert found.spent.computing == pytest.approx(even * devices)
    assert max(even, largest) <= found.spent.makespan * (1 + 1e-9)
    assert found.spent.makespan <= (even + (1 - 1 / devices) * largest) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(sweeps(failures=0.5, longest=2_000))
def test_nothing_is_lost_with_the_nodes(drawn: Drawn) -> None:
    """One node in two is lost in an hour. That one cell of 2,000 s loses ten of them, after which it is given up, has a
    probability below 1e-6."""
    found = simulate(drawn.cells, drawn.cluster)
    assert found.lost == 0
    assert found.spent.computing == pytest.approx(sum(cell.images for cell in drawn.cells))
    assert found.ratio <= 1 + 1e-9
    assert (found.spent.repeated > 0) <= (found.spent.lost_cells > 0) <= (found.spent.lost_nodes > 0)


def test_one_device_takes_what_all_cells_do_and_loading() -> None:
    cells = cells_with({"a": [100, 20, 7], "b": [5, 5]})
    found = simulate(cells, Cluster(1, lambda cell: float(cell.images), failures=0.0, load=3.0, giving=0.5), asking=2.0)
    assert found.spent.makespan == pytest.approx(137 + 2 * 3 + 5 * 0.5 + 2 * 2.0)
    assert (found.spent.loading, found.spent.computing, found.open) == (6.0, 137.0, 1)


def sweep(count: int, devices: int, engine: str, failures: float, seed: int) -> Simulation:
    cells = cells_of(count, 50_000, seed)
    taken = durations(cells, 1e13, 0.0, seed)
    ahead = 1 if engine == "ray" else None
    return simulate(
        cells, Cluster(devices, lambda c: taken[id(c)], failures, giving=0.005, ahead=ahead, seed=seed), asking=2.0
    )


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_sweep_of_2000_cells_comes_near_the_ideal(engine: str) -> None:
    seeds = [sweep(2_000, 32, engine, 0.01, seed) for seed in range(4)]
    assert [found.lost for found in seeds] == [0] * 4
    assert all(0.9 <= found.ratio <= 1 for found in seeds), [found.ratio for found in seeds]
    often = sweep(2_000, 32, engine, 0.2, 0)
    assert often.spent.lost_nodes > 4 and often.spent.repeated > 0
    assert often.lost == 0 and often.ratio <= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("engine", ["ray", "local"])
def test_27000_cells_on_256_devices_reach_nine_tenths_of_the_ideal(engine: str, seed: int) -> None:
    began = time.process_time()
    found = sweep(27_000, 256, engine, 0.01, seed)
    assert (found.cells, found.lost) == (27_000, 0)
    assert found.ratio >= 0.9
    assert time.process_time() - began < 60


def test_the_command_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--cells", "300", "--devices", "16", "--failures", "5", "--seed", "3", "--speed", "2e13"]
    assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads(said[-1])
    assert (found["cells"], found["devices"], found["speed"], found["cells_lost"]) == (300, 16, 2e13, 0)
    assert math.isclose(found["ratio"], found["ideal_hours"] / found["makespan_hours"], abs_tol=1e-3)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


@pytest.mark.parametrize("wrong", ["--speed=0", "--failures=-1", "--load=nan", "--devices=0"])
def test_numbers_that_make_no_sense(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([wrong])
    assert f"argument {wrong.split('=')[0]}: found '{wrong.split('=')[1]}'; expected " in capsys.readouterr().err
