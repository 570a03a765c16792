"""The benchmarks of metrics and of engines, on sizes that take seconds."""

import json
from pathlib import Path

import pytest

from benchmarks import engine_cost, scaling


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large blocks go back to the system at once: the peak is what is held, without the gaps that malloc leaves, which
    # differ by tens of megabytes from run to run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    out, found = tmp_path / "scaling.json", {}
    for asked in (16, 32):
        size = ["--images", "1000", "--classes", "300", "--settings", str(asked), "--task", "multilabel"]
        assert scaling.main([*size, "--out", str(out)]) == 0
        (cost,) = json.loads(out.read_text())["costs"]
        found[cost["size"]["settings"]] = cost["extra_mb"]
    # Logits of one setting are 1.1 MB; kept for every setting, 16 more of them would be 18 MB more.
    assert found[33] - found[17] < 9


def test_growth_is_measured_along_each_axis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "in_process", lambda function, *arguments: function(*arguments))
    out = tmp_path / "scaling.json"
    size = ["--images", "1000", "--classes", "4", "--settings", "16", "--task", "single"]
    assert scaling.main([*size, "--grow", "--out", str(out)]) == 0
    sizes = [cost["size"] for cost in json.loads(out.read_text())["costs"]]
    assert [(size["images"], size["classes"], size["settings"]) for size in sizes] == [
        (1000, 4, 17), (500, 4, 17), (1000, 2, 17), (1000, 4, 9)
    ]  # fmt: skip
    assert "1,000" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
def test_engines_lose_nothing_and_do_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many cells that take no time, and on two workers few that wait: half as long as one after the other, nearly."""
    monkeypatch.setattr(engine_cost, "in_process", lambda function, *arguments: function(*arguments))
    out = tmp_path / "engines.json"
    arguments = ["--cells", "300", "--waiting", "12", "--wait", "0.3", "--workers", "2", "--out", str(out)]
    assert engine_cost.main(arguments) == 0
    costs = json.loads(out.read_text())["costs"]
    assert [(c["engine"], c["workers"], c["records"], c["computed"], c["twice"]) for c in costs] == [
        ("local", 2, 300, 300, 0), ("ray", 2, 300, 300, 0), ("local", 2, 12, 12, 0), ("ray", 2, 12, 12, 0)
    ]  # fmt: skip
    assert all(12 * 0.3 / cost["seconds"] > 1.5 for cost in costs[2:]), costs
