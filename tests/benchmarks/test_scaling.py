"""The benchmarks of metrics and of engines, on sizes that take seconds."""

import json
from pathlib import Path

import pytest

from benchmarks import engine_cost, scaling


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large blocks go back to the system at once: the peak is what is held, without the gaps that malloc leaves, which
    # differ by tens of megabytes from run to run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    out = tmp_path / "scaling.json"
    size = ["--images", "1000", "--classes", "300", "--settings", "32", "--task", "multilabel"]
    assert scaling.main([*size, "--grow", "--out", str(out)]) == 0
    full, images, classes, settings = json.loads(out.read_text())["costs"]
    assert (full["size"]["settings"], settings["size"]["settings"]) == (33, 17)
    # Logits of one setting are 1.1 MB; kept for every setting, 16 more of them would be 18 MB more.
    assert full["extra_mb"] - settings["extra_mb"] < 9
    assert (images["size"]["images"], classes["size"]["classes"]) == (500, 150)
    assert "1,000" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
def test_engines_lose_nothing_and_do_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    assert (
        engine_cost.main(["--cells", "300", "--waiting", "12", "--wait", "0.3", "--workers", "1,2", "--out", str(out)])
        == 0
    )
    costs = json.loads(out.read_text())["costs"]
    assert [(c["engine"], c["workers"], c["records"], c["computed"], c["twice"]) for c in costs[:2]] == [
        ("local", 2, 300, 300, 0), ("ray", 2, 300, 300, 0)
    ]  # fmt: skip
    seconds = {(cost["engine"], cost["workers"]): cost["seconds"] for cost in costs[2:]}
    for engine in ("local", "ray"):
        assert seconds[engine, 1] / seconds[engine, 2] > 1.5
