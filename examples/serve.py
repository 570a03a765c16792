"""Serve tags over HTTP. Pictures that arrive within a few milliseconds share one forward pass.

    python examples/serve.py my-model
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/tags?top=3'

POST /tags takes a picture as the body and answers {"tags": [{"tag": ..., "score": ...}, ...]}, highest score first.
GET /health describes the model and counts pictures and batches. A bad request gets 4xx and a sentence in "detail"; 503
means that too many clients are waiting. There is no authentication and no limit on idle connections: only this machine
can connect, and with --host a proxy in front has to provide both. Needs pip install '.[examples]'.
"""

import argparse
import asyncio
import io
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import timm
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps
from starlette.requests import ClientDisconnect
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import timm_csra
from timm_csra.pictures import UNREADABLE, WEB_FORMATS, in_rgb
from timm_csra.trained import class_names

LONGEST = 20  # times the shorter side: timm resizes the shorter side to the model's size, and the longer one with it
logger = logging.getLogger("uvicorn.error")


class Batcher:
    """Collects images for `wait` seconds, or until there are `most`, and runs them as one batch."""

    def __init__(self, run: Callable[[Tensor], Tensor], most: int, wait: float) -> None:
        self.run, self.most, self.wait = run, most, wait
        self.queue: asyncio.Queue[tuple[Tensor, asyncio.Future[Tensor | None]]] = asyncio.Queue()
        self.batches = self.images = 0

    async def __call__(self, image: Tensor) -> Tensor | None:
        """Return the row of `run` for one image, or None if `run` failed."""
        answer: asyncio.Future[Tensor | None] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((image, answer))
        return await answer

    async def work(self) -> None:
        with ThreadPoolExecutor(1) as thread:  # the event loop goes on taking requests meanwhile
            while True:
                images, answers = zip(*await self._collect(), strict=True)
                try:
                    found = await asyncio.get_running_loop().run_in_executor(thread, self.run, torch.stack(images))
                except Exception:  # a model may raise anything; the service has to go on
                    logger.exception("The forward pass of %d pictures failed.", len(images))
                    found = [None] * len(images)
                self.batches, self.images = self.batches + 1, self.images + len(images)
                for answer, result in zip(answers, found, strict=True):
                    if not answer.done():  # it is cancelled if the client has disconnected
                        answer.set_result(result)

    async def _collect(self) -> list[tuple[Tensor, asyncio.Future[Tensor | None]]]:
        found = [await self.queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.wait):
                while len(found) < self.most:
                    found.append(await self.queue.get())
        return found


def decode(body: bytes, transform: Callable[[Image.Image], Tensor], megapixels: float) -> Tensor:
    """Decode and transform a picture. Raises HTTPException if the body is not a picture, or too large a one."""
    try:
        with Image.open(io.BytesIO(body), formats=WEB_FORMATS) as picture:  # reads only the header
            if (found := picture.width * picture.height / 1e6) > megapixels:
                raise HTTPException(413, f"Found {found:g} million pixels, expected at most {megapixels:g} million.")
            if max(picture.size) > LONGEST * min(picture.size):
                size = f"{picture.width} x {picture.height}"
                raise HTTPException(413, f"Found {size} pixels, expected sides of a ratio of at most {LONGEST}.")
            return transform(in_rgb(ImageOps.exif_transpose(picture)))
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"Found too many pixels, expected at most {megapixels:g} million.") from error
    except UNREADABLE as error:
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise HTTPException(
            415, f"This is not a picture that can be read: {reason}. Expected JPEG, PNG or WebP."
        ) from error


def create_app(
    model: nn.Module, batch: int = 16, wait: float = 0.005, mib: float = 10, megapixels: float = 50
) -> FastAPI:
    """Create the service. `batch` pictures at most share a forward pass, which waits at most `wait` seconds for them;
    `mib` and `megapixels` limit the size of a picture."""
    transform, names = create_transform(**resolve_model_data_config(model)), class_names(model)
    device = next(model.parameters()).device

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images.to(device)).float().cpu()

    batcher = Batcher(run, batch, wait)
    threads = ThreadPoolExecutor()  # limits how many pictures are decoded at the same time

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()
        threads.shutdown()

    app = FastAPI(title="timm-csra", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = "; ".join(f"{e['loc'][-1]}={e.get('input')}: {e['msg']}" for e in error.errors())
        return JSONResponse({"detail": f"{found}."}, status_code=422)

    @app.post("/tags")
    async def tags(request: Request, top: Annotated[int, Query(ge=1)] = 5) -> dict[str, Any]:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "Found a form, expected the picture itself as the body: curl --data-binary @FILE.")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > mib * 2**20:
                    raise HTTPException(413, f"Found more than {mib:g} MiB, expected at most that for a picture.")
        except ClientDisconnect:
            raise HTTPException(400, "The client disconnected.") from None
        if not body:
            raise HTTPException(415, "Found no body, expected a picture.")
        loop = asyncio.get_running_loop()
        scores = await batcher(await loop.run_in_executor(threads, decode, bytes(body), transform, megapixels))
        if scores is None:
            raise HTTPException(500, "The model failed; the reason is in the log of the service.")
        best = scores.topk(min(top, len(names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {"tags": [{"tag": names[k], "score": score} for k, score in pairs]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        done = {"images": batcher.images, "batches": batcher.batches}
        return {"model": type(model).__name__, "classes": len(names), "csra": model.csra.to_dict(), **done}

    return app


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a timm name, a folder, hf-hub:USER/NAME or file:ARCH@PATH")
    parser.add_argument("--lam", type=float, help="default: the saved one, else 0.1")
    parser.add_argument("--scores", choices=["logits", "log_softmax"], help="default: the saved one, else logits")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 to listen on all interfaces (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=16, help="pictures per forward pass at most (default: %(default)s)"
    )
    parser.add_argument(
        "--wait-ms", type=float, default=5, help="milliseconds to wait for more pictures (default: %(default)s)"
    )
    parser.add_argument("--max-mib", type=float, default=10, help="largest picture (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="largest picture (default: %(default)s)")
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="connections at most; others get 503 (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if min(args.batch, args.max_mib, args.max_megapixels, args.max_waiting) <= 0 or not args.wait_ms >= 0:
        parser.error("expected a positive --batch, --max-mib, --max-megapixels and --max-waiting, and --wait-ms >= 0.")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: expected 0 to 65535.")
    given = {key: value for key in ("lam", "scores") if (value := getattr(args, key)) is not None}
    create = timm_csra.create_model if timm.is_model(args.model) else timm_csra.from_pretrained
    try:
        model = create(args.model, **given).eval()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(f"{error}" if args.model in f"{error}" else f"{args.model}: {error}")
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    app = create_app(model, args.batch, args.wait_ms / 1000, args.max_mib, args.max_megapixels)
    limits = {"limit_concurrency": args.max_waiting, "timeout_graceful_shutdown": 5}
    uvicorn.run(app, host=args.host, port=args.port, **limits)


if __name__ == "__main__":
    main()
