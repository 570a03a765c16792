"""`examples/serve.py` under uvicorn on the loopback interface, with clients at the same time."""

import io
import logging
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import timm_csra
from examples.serve import create_app, main

from .paper import NAMES, pictures, refused, saved, scores_of_classes


class Service:
    """A wrapped model served on a free port, and the sizes of its forward passes."""

    def __init__(self, folder: Path, **options: Any) -> None:
        name, self.plain = saved(folder, 0.4, "log_softmax")
        self.model: nn.Module = timm_csra.from_pretrained(name)
        self.batches: list[int] = []
        self.model.register_forward_pre_hook(lambda _, inputs: self.batches.append(len(inputs[0])))
        app = create_app(self.model, **options)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        limits = httpx.Limits(max_connections=100)
        address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.client = httpx.Client(base_url=address, limits=limits, timeout=30, trust_env=False)
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def at_once(self, bodies: list[bytes]) -> list[httpx.Response]:
        barrier = Barrier(len(bodies))

        def post(body: bytes) -> httpx.Response:
            barrier.wait()
            return self.client.post("/tags", content=body, params={"top": 5})

        with ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(post, bodies))

    def expected(self, body: bytes) -> dict[str, float]:
        picture = Image.open(io.BytesIO(body)).convert("RGB")
        x = create_transform(**resolve_model_data_config(self.plain))(picture)[None]
        return dict(zip(NAMES, scores_of_classes(self.plain, x, 0.4, "log_softmax")[0].tolist(), strict=True))

    def check(self, response: httpx.Response, body: bytes) -> None:
        assert response.status_code == 200, response.text
        tags = response.json()["tags"]
        assert {tag["tag"]: tag["score"] for tag in tags} == pytest.approx(self.expected(body), rel=1e-4, abs=1e-4)
        assert [tag["score"] for tag in tags] == sorted((tag["score"] for tag in tags), reverse=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Waits long, so that a slow machine batches too."""
    service = Service(tmp_path_factory.mktemp("model"), batch=8, wait=0.25, mib=1, megapixels=0.1)
    yield service
    service.close()


@pytest.fixture
def bodies(tmp_path: Path) -> list[bytes]:
    return [file.read_bytes() for file in pictures(tmp_path, 12)]


def test_requests_share_forward_passes_and_each_gets_its_own_answer(service: Service, bodies: list[bytes]) -> None:
    before = len(service.batches)
    for body, response in zip(bodies, service.at_once(bodies), strict=True):
        service.check(response, body)
    sizes = service.batches[before:]
    assert sum(sizes) == len(bodies) and len(sizes) < len(bodies) and max(sizes) <= 8
    assert len({str(service.expected(body)) for body in bodies}) == len(bodies), "answers are told apart"


def test_a_broken_picture_harms_no_other(service: Service, bodies: list[bytes]) -> None:
    sent = [*bodies[:3], bodies[3][:300], b"no picture", *bodies[4:6]]
    before = len(service.batches)
    for body, response in zip(sent, service.at_once(sent), strict=True):
        if body in bodies:
            service.check(response, body)
        else:
            assert response.status_code == 415
            assert response.json()["detail"].startswith("This is not a picture that can be read: ")
    assert sum(service.batches[before:]) == 5


def test_a_failing_pass_is_said_to_those_in_it_and_the_service_goes_on(service: Service, bodies: list[bytes]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = service.model.register_forward_pre_hook(fail)
    try:
        for response in service.at_once(bodies[:3]):
            failed = {"detail": "The model failed; the reason is in the log of the service."}
            assert (response.status_code, response.json()) == (500, failed)
    finally:
        handle.remove()
    service.check(*service.at_once(bodies[:1]), bodies[0])


def png(width: int, height: int) -> bytes:
    """A picture of this size, as its header says, without pixels."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 415, "Found no body, expected a picture."),
        (b"x", 415, "This is not a picture that can be read: unknown format. Expected JPEG, PNG or WebP."),
        (EPS, 415, "This is not a picture that can be read: unknown format. Expected JPEG, PNG or WebP."),
        (png(1, 6000), 413, "Found 1 x 6000 pixels, expected sides of a ratio of at most 20."),
        (b"x" * (2**20 + 1), 413, "Found more than 1 MiB, expected at most that for a picture."),
        (png(400, 300), 413, "Found 0.12 million pixels, expected at most 0.1 million."),
        (
            png(40000, 40000),
            413,
            "Found too many pixels, expected at most 0.1 million.",
        ),
    ],
    ids=["nothing", "text", "a format that needs another program", "a strip", "bytes", "pixels", "a bomb"],
)
def test_what_is_refused(service: Service, body: bytes, status: int, said: str) -> None:
    response = service.client.post("/tags", content=body)
    assert (response.status_code, response.json()) == (status, {"detail": said})


def test_a_body_whose_length_is_not_declared(service: Service, bodies: list[bytes]) -> None:
    response = service.client.post("/tags", content=iter([b"x" * 2**18] * 16))
    assert response.status_code == 413 and "more than 1 MiB" in response.json()["detail"]
    service.check(service.client.post("/tags", content=iter([bodies[0][:100], bodies[0][100:]])), bodies[0])


def test_a_client_that_hangs_up_leaves_no_traceback(service: Service, bodies: list[bytes]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(handler)
    for _ in range(3):
        with socket.create_connection(service.socket.getsockname()) as connection:
            connection.sendall(b"POST /tags HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    service.check(*service.at_once(bodies[:1]), bodies[0])
    logging.getLogger("uvicorn.error").removeHandler(handler)
    assert [record for record in records if record.exc_info] == []


def test_a_form_is_told_how_to_send_a_picture(service: Service, bodies: list[bytes]) -> None:
    response = service.client.post("/tags", files={"file": bodies[0]})
    assert response.status_code == 415 and "--data-binary @FILE" in response.json()["detail"]


def test_number_of_tags(service: Service, bodies: list[bytes]) -> None:
    for top, count in (("2", 2), ("99", 5)):
        assert len(service.client.post("/tags", content=bodies[0], params={"top": top}).json()["tags"]) == count
    for top in ("0", "many"):
        response = service.client.post("/tags", content=bodies[0], params={"top": top})
        assert response.status_code == 422
        assert response.json()["detail"].startswith(f"top={top}: Input should be")
    assert service.client.get("/tags").status_code == 405


def test_health(service: Service, bodies: list[bytes]) -> None:
    before = service.client.get("/health").json()
    service.at_once(bodies[:2])
    after = service.client.get("/health").json()
    assert after["images"] == before["images"] + 2 and 1 <= after["batches"] - before["batches"] <= 2
    assert after["csra"] == {"version": 2, "lam": 0.4, "temperature": ["inf"], "scores": "log_softmax"}
    assert (after["model"], after["classes"]) == ("CSRAResNet", 5)


def test_the_command_listens_on_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: asked.append(options))
    main([saved(tmp_path)[0], "--lam", "0.2"])
    limits = {"limit_concurrency": 256, "timeout_graceful_shutdown": 5}
    assert asked == [{"host": "127.0.0.1", "port": 8000, **limits}]
    for arguments, said in {
        ("--port", "99999"): "--port 99999: expected 0 to 65535",
        ("--batch", "0"): "expected a positive --batch",
        ("--wait-ms", "-5"): "--wait-ms >= 0",
    }.items():
        with refused(said):
            main(["my-model", *arguments])
    with refused("my-modle: .*an existing folder"):
        main(["my-modle"])
