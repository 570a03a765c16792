"""Checkpoints from a Hub, with the real client of timm and huggingface_hub, against a server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from ..hub import WRITER, Hub

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    torch.manual_seed(0)
    hub = Hub()
    for repo, classes in (("timm/test_resnet.r160_in1k", 1000), ("user/animals", 2), ("user/more", 2)):
        labels = {"label_names": ["cat", "dog"]} if classes == 2 else {}
        model = timm.create_model("test_resnet", num_classes=classes)
        folder = tmp_path / "hub" / repo
        timm.models.save_for_hf(model, str(folder), model_config=labels, safe_serialization=True)
        hub.add(repo, folder, seed="copies")  # they share their commits, as copies on the Hub do
    return hub


def sweep(url: str, home: Path, out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", "--out", str(out), "--workers", "0", "--device", "cpu", *arguments],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
    )  # fmt: skip
    assert WRITER not in result.stdout + result.stderr + "".join(file.read_text() for file in out.rglob("*.*"))
    return result, [json.loads(file.read_text()) for file in (out / "records").glob("*.json")]


@pytest.mark.slow
def test_sweep_from_a_hub_and_then_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    for index, name in enumerate(["n02123045", "n02099601"] * 4):  # tabby, golden retriever
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * index, 99, 200)).save(folder / f"{index}.png")
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "cat").symlink_to(tmp_path / "photos" / "n02123045")
    (tmp_path / "animals" / "dog").symlink_to(tmp_path / "photos" / "n02099601")
    photos, animals = str(tmp_path / "photos"), str(tmp_path / "animals")
    home = tmp_path / "cache"

    with hub.serve() as url:
        models = "test_resnet.r160_in1k,hf-hub:user/gone,hf-hub:user/animals"
        result, records = sweep(url, home, tmp_path / "first", "--models", models, "--data", photos, animals)
        assert result.returncode == 1, result.stderr
        of = {(record["model"], record["data"]): record for record in records}
        ours = of["test_resnet.r160_in1k", "photos"]
        assert (ours["status"], ours["columns"], ours["img_size"]) == ("ok", 2, 160)
        gone = of["hf-hub:user/gone", "photos"]
        assert gone["status"] == "failed" and "RepositoryNotFoundError" in gone["reason"]
        theirs = of["hf-hub:user/animals", "animals"]
        assert (theirs["columns"], theirs["n"]) == (2, 8)
        weights = (tmp_path / "hub/user/animals/model.safetensors").read_bytes()
        assert theirs["weights"] == hashlib.sha256(weights).hexdigest()  # the ETag

        # What this run downloads is removed after its cells; what was there before stays.
        models = "hf-hub:user/animals,hf-hub:user/more"
        arguments = ["--models", models, "--data", animals, "--prefetch", "--free-cache"]
        result, records = sweep(url, home, tmp_path / "second", *arguments)
        assert result.returncode == 0, result.stderr
        assert {record["status"] for record in records} == {"ok"}
        assert (home / "hub" / "models--user--animals" / "snapshots").is_dir()
        assert not list((home / "hub" / "models--user--more").rglob("*.safetensors"))

    arguments = ["--models", "hf-hub:user/animals", "--data", animals]
    result, records = sweep(url, home, tmp_path / "third", *arguments)  # from the cache alone
    assert result.returncode == 0, result.stderr
    assert records[0]["results"] == theirs["results"]


@pytest.mark.slow
def test_weights_of_what_does_not_apply_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    for index, name in enumerate(["cat", "owl"] * 4):
        folder = tmp_path / "animals" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * index, 99, 200)).save(folder / f"{index}.png")
    arguments = ["--models", "hf-hub:user/animals,test_resnet.r160_in1k", "--data", str(tmp_path / "animals")]
    arguments += ["--task", "single,multilabel,mosaic", "--prefetch"]
    with hub.serve() as url:
        result, records = sweep(url, tmp_path / "cache", tmp_path / "out", *arguments, "--dry-run")
        assert (result.returncode, records) == (0, []), result.stderr
        assert result.stdout.count("not applicable") == 6 + 3  # and three reasons
        result, records = sweep(url, tmp_path / "cache", tmp_path / "out", *arguments)
    assert result.returncode == 1  # nothing has been measured
    assert [record["status"] for record in records] == ["not_applicable"] * 6
    assert "1 classes of the data are not among the head's: owl" in {
        record["reason"].partition(";")[0] for record in records
    }
    assert not [
        request
        for request in hub.requests
        if request.startswith("GET /blobs/") or ("GET" in request and "model." in request)
    ]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
@pytest.mark.parametrize("engine", [["--jobs", "2"], ["--engine", "ray", "--cpus-per-cell", "1"]], ids=["local", "ray"])
def test_workers_of_one_node_download_weights_once(engine: list[str], hub: Hub, tmp_path: Path) -> None:
    """Both workers begin with the same checkpoint, at two sizes."""
    for index, name in enumerate(["cat", "dog"] * 4):
        folder = tmp_path / "animals" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * index, 99, 200)).save(folder / f"{index}.png")
    arguments = ["--models", "hf-hub:user/animals", "--data", str(tmp_path / "animals"), "--img-size", "64,96"]
    with hub.serve() as url:
        result, records = sweep(url, tmp_path / "cache", tmp_path / "out", *arguments, *engine)
    assert result.returncode == 0, result.stderr
    assert [record["status"] for record in records] == ["ok", "ok"]
    downloads = [request for request in hub.requests if request.startswith("GET") and "/blobs/" in request]
    assert len(downloads) == 1, downloads


@pytest.mark.slow
def test_what_gains_is_pushed_with_its_record(tmp_path: Path, real_data: Path) -> None:
    hub = Hub()
    with hub.serve() as url:
        arguments = ["--models", "pypi:tf_efficientnet_lite0", "--data", str(real_data / "imagenette500")]
        arguments += ["--task", "mosaic", "--push-best", "user/csra"]
        result, _ = sweep(url, tmp_path / "cache", tmp_path / "out", *arguments)
        assert result.returncode == 1
        assert "Use --yes to confirm" in result.stderr and not hub.repos
        result, records = sweep(url, tmp_path / "cache", tmp_path / "out", *arguments, "--yes")
    assert result.returncode == 0, result.stderr
    tree = hub.repos["user/csra-tf_efficientnet_lite0"].commits[-1]
    row = next(r for r in records[0]["results"] if (r["metric"], r["protocol"]) == ("mAP", "crossfit"))
    assert f"| {row['value']:.2f} | {row['gain']:+.2f} [" in tree["README.md"].decode()
    best = next(r for r in records[0]["results"] if (r["metric"], r["protocol"]) == ("mAP", "best"))
    settings = json.loads(tree["config.json"])["csra"]
    assert settings["lam"] == float(best["lam"])
