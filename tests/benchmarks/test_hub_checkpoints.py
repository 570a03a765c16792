"""Checkpoints from a Hub, with the real client of timm and huggingface_hub, against a server on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


class Hub(http.server.BaseHTTPRequestHandler):
    """`/{user}/{repo}/resolve/{revision}/{file}` of the folder `root`, as the Hub serves small files."""

    root: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/":
            return self._send(200, b"")
        file = self.root.joinpath(*parts[:2], *parts[4:]) if parts[2:3] == ["resolve"] else None
        if file is None or not file.is_file():
            code = "EntryNotFound" if file is not None and file.parent.is_dir() else "RepoNotFound"
            return self._send(404, b"", {"X-Error-Code": code})
        content = file.read_bytes()
        commit = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._send(200, content, commit, body)

    def _send(self, status: int, content: bytes, headers: dict | None = None, body: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    torch.manual_seed(0)
    for repo, classes in (("timm/test_resnet.r160_in1k", 1000), ("user/animals", 2), ("user/more", 2)):
        labels = {"label_names": ["cat", "dog"]} if classes == 2 else {}
        model = timm.create_model("test_resnet", num_classes=classes)
        folder = tmp_path / "hub" / repo
        timm.models.save_for_hf(model, str(folder), model_config=labels, safe_serialization=True)
    handler = type("LocalHub", (Hub,), {"root": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_sweep_from_a_hub_and_then_from_the_cache(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    for index, name in enumerate(["n02123045", "n02099601"] * 4):  # tabby, golden retriever
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * index, 99, 200)).save(folder / f"{index}.png")
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "cat").symlink_to(tmp_path / "photos" / "n02123045")
    (tmp_path / "animals" / "dog").symlink_to(tmp_path / "photos" / "n02099601")

    def sweep(models: str, data: str, out: str, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "benchmarks.sweep", "--models", models, "--data", str(tmp_path / data)]
        result = subprocess.run(
            [*command, "--out", str(tmp_path / out), "--workers", "0", "--device", "cpu", *more],
            cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
        )  # fmt: skip
        records = [json.loads(file.read_text()) for file in (tmp_path / out / "records").glob("*.json")]
        return result, {record["model"]: record for record in records}

    result, records = sweep("test_resnet.r160_in1k,hf-hub:user/gone", "photos", "first")
    assert result.returncode == 1, result.stderr
    assert records["test_resnet.r160_in1k"]["status"] == "ok"
    assert records["test_resnet.r160_in1k"]["columns"] == 2
    assert records["test_resnet.r160_in1k"]["img_size"] == 160
    assert records["hf-hub:user/gone"]["status"] == "failed"
    assert "RepositoryNotFoundError" in records["hf-hub:user/gone"]["reason"]

    result, records = sweep("hf-hub:user/animals", "animals", "second")
    assert result.returncode == 0, result.stderr
    assert (records["hf-hub:user/animals"]["columns"], records["hf-hub:user/animals"]["n"]) == (2, 8)

    etag = hashlib.sha256((tmp_path / "hub/user/animals/model.safetensors").read_bytes()).hexdigest()
    assert records["hf-hub:user/animals"]["weights"] == etag

    # What this run downloads is removed after its cells; what was there before stays.
    cached = tmp_path / "cache" / "hub"
    result, fetched = sweep("hf-hub:user/animals,hf-hub:user/more", "animals", "fourth", "--prefetch", "--free-cache")
    assert result.returncode == 0, result.stderr
    assert {record["status"] for record in fetched.values()} == {"ok"}
    assert (cached / "models--user--animals" / "snapshots").is_dir()
    assert not list((cached / "models--user--more").rglob("*.safetensors"))

    hub.shutdown()
    hub.server_close()
    again, cached = sweep("hf-hub:user/animals", "animals", "third")
    assert again.returncode == 0, again.stderr
    assert cached["hf-hub:user/animals"]["results"] == records["hf-hub:user/animals"]["results"]
