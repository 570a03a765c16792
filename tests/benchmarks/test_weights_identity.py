"""A checkpoint whose hash is not known is not measured under another name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from PIL import Image

from benchmarks.checkpoints import hub as hubs
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.reporting.summary import read_folder
from benchmarks.sweep import main


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str], cached: dict[str, str] | None = None) -> None:
    """One that answers, and what its client has in the cache."""

    class Metadata:
        def __init__(self, url: str) -> None:
            self.etag = answer(url)

    def lookup(repo: str, name: str, **_: Any) -> str | None:
        return (cached or {}).get(name)

    monkeypatch.setattr(hubs, "_hub_answers", lambda: True)
    monkeypatch.setattr(hubs, "unreachable_hub", lambda: None)
    monkeypatch.setattr(hubs, "get_hf_file_metadata", lambda url, **_: Metadata(url))
    monkeypatch.setattr(hubs, "try_to_load_from_cache", lookup)


class ReadTimeout(HTTPError):
    pass


def timed_out(url: str) -> str:
    raise ReadTimeout("The read operation timed out")


def test_the_hub_is_asked_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, lambda url: "abc", {"model.safetensors": str(tmp_path / "old")})
    assert Checkpoint("hf-hub", "user/repo").fingerprint == "abc"


def test_where_it_does_not_answer_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of whichever file is there."""
    hub(monkeypatch, timed_out, {"pytorch_model.bin": str(tmp_path / "blob")})
    checkpoint = Checkpoint("hf-hub", "user/repo")
    assert (checkpoint.fingerprint, checkpoint.why_unknown) == ("blob", None)


def test_without_either_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, timed_out)
    checkpoint = Checkpoint("hf-hub", "user/repo")
    assert (checkpoint.fingerprint, checkpoint.why_unknown) == (None, "ReadTimeout: The read operation timed out")

    def nothing(url: str) -> str:
        raise EntryNotFoundError(f"404: {url}")

    hub(monkeypatch, nothing)
    why = Checkpoint("hf-hub", "user/repo").why_unknown
    assert why == "user/repo has none of model.safetensors, pytorch_model.bin"


def test_weights_at_an_address_go_by_it() -> None:
    found = {Checkpoint("timm", name).fingerprint for name in ("gcvit_tiny.in1k", "gcvit_small.in1k")}
    assert len(found) == 2 and None not in found


def test_a_time_out_fails_the_checkpoint_and_is_mended_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder stands for the repository, so that no network is needed."""
    labels = {"label_names": ["cat", "dog"]}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=2)
        timm.models.save_for_hf(model, str(tmp_path / name), model_config=labels, safe_serialization=True)
    for index in range(4):
        folder = tmp_path / "photos" / labels["label_names"][index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (30 * index, 99, 200)).save(folder / f"{index}.png")
    models = ",".join(f"local-dir:{tmp_path / name}" for name in ("one", "two"))
    arguments = ["--models", models, "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    arguments += ["--device", "cpu", "--workers", "0", "--img-size", "64"]
    with monkeypatch.context() as patch:
        known = Checkpoint._hash.func  # type: ignore[attr-defined]
        silent = property(lambda self: (None, "ReadTimeout: slow") if self.id.endswith("two") else known(self))
        patch.setattr(Checkpoint, "_hash", silent)
        assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "the hash of its weights is unknown (ReadTimeout: slow), and without it its records cannot be" in printed
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").iterdir()]
    assert {(Path(r["model"]).name, r["status"]) for r in records} == {("one", "ok"), ("two", "failed")}
    assert main(arguments) == 0  # also without --retry-failed
    assert [one["status"] for one in read_folder(tmp_path / "out").counted] == ["ok", "ok"]
    assert len(list((tmp_path / "out" / "records").iterdir())) == 3
