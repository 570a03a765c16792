"""Serve tags over HTTP. Pictures that arrive within a few milliseconds share a forward pass.

    python examples/serve.py my-model
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/tags?top=3'

POST /tags takes a picture as the body and answers {"tags": [{"tag": ..., "score": ...}, ...]}, best first; GET /health
says which model it is and what it has done. What is wrong with a request is answered by 4xx and a sentence in "detail";
503 means that too many wait. There is no authentication: it listens on this machine alone unless --host says otherwise.
Needs pip install timm-csra pillow fastapi uvicorn.
"""

import argparse
import asyncio
import io
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

import timm
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import timm_csra
from timm_csra.pictures import in_rgb
from timm_csra.trained import class_names


class Batcher:
    """Collects inputs for `wait` seconds, or until there are `most`, and gives each its part of one call of `run`."""

    def __init__(self, run: Callable[[Tensor], Tensor], most: int, wait: float) -> None:
        self.run, self.most, self.wait = run, most, wait
        self.queue: asyncio.Queue[tuple[Tensor, asyncio.Future[Tensor]]] = asyncio.Queue()
        self.batches = self.images = 0

    async def __call__(self, image: Tensor) -> Tensor:
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((image, answer))
        return await answer

    async def work(self) -> None:
        with ThreadPoolExecutor(1) as thread:  # the event loop goes on taking requests meanwhile
            while True:
                images, answers = zip(*await self._collect(), strict=True)
                try:
                    found = await asyncio.get_running_loop().run_in_executor(thread, self.run, torch.stack(images))
                except Exception as error:  # of the model: whoever waits is told, and the service goes on
                    found = [error] * len(images)
                self.batches, self.images = self.batches + 1, self.images + len(images)
                for answer, result in zip(answers, found, strict=True):
                    if answer.done():  # its client has gone
                        continue
                    answer.set_exception(result) if isinstance(result, Exception) else answer.set_result(result)

    async def _collect(self) -> list[tuple[Tensor, asyncio.Future[Tensor]]]:
        found = [await self.queue.get()]
        try:
            async with asyncio.timeout(self.wait):
                while len(found) < self.most:
                    found.append(await self.queue.get())
        except TimeoutError:
            pass
        return found


def create_app(
    model: nn.Module, batch: int = 16, wait: float = 0.005, mib: float = 10, megapixels: float = 50
) -> FastAPI:
    """`wait` in seconds; `mib` and `megapixels` are what one picture may have."""
    transform, names = create_transform(**resolve_model_data_config(model)), class_names(model)
    device = next(model.parameters()).device

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images.to(device)).float().cpu()

    batcher, decoders = (
        Batcher(run, batch, wait),
        ThreadPoolExecutor(),
    )  # as many decoded at a time as there are threads

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()
        decoders.shutdown()

    def decode(body: bytes) -> Tensor:
        try:
            with Image.open(io.BytesIO(body)) as picture:
                if picture.width * picture.height > megapixels * 1e6:
                    found = f"{picture.width} x {picture.height} pixels"
                    raise HTTPException(
                        413, f"Found {found}, expected at most {megapixels:g} million: make it smaller."
                    )
                return transform(in_rgb(ImageOps.exif_transpose(picture)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
            raise HTTPException(
                415, f"The body cannot be read as a picture: {reason}. Expected JPEG, PNG or WebP."
            ) from error

    app = FastAPI(title="timm-csra", lifespan=lifespan)

    @app.post("/tags")
    async def tags(request: Request, top: Annotated[int, Query(ge=1)] = 5) -> dict[str, Any]:
        body = bytearray()
        async for chunk in request.stream():  # what is too large is not read to its end
            body += chunk
            if len(body) > mib * 2**20:
                raise HTTPException(413, f"Found a picture of more than {mib:g} MiB, the most that is taken.")
        image = await asyncio.get_running_loop().run_in_executor(decoders, decode, bytes(body))
        best = (await batcher(image)).topk(min(top, len(names)))
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
    parser.add_argument("--lam", type=float, help="default: what the model was saved with, else 0.1")
    parser.add_argument("--scores", choices=["logits", "log_softmax"], help="default: likewise, else logits")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for everybody (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a forward pass (default: %(default)s)")
    parser.add_argument("--wait-ms", type=float, default=5, help="for more of them (default: %(default)s)")
    parser.add_argument("--max-mib", type=float, default=10, help="of a picture (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="of a picture (default: %(default)s)")
    parser.add_argument("--max-waiting", type=int, default=256, help="connections; more get 503 (default: %(default)s)")
    args = parser.parse_args(arguments)
    given = {key: value for key in ("lam", "scores") if (value := getattr(args, key)) is not None}
    create = timm_csra.create_model if timm.is_model(args.model) else timm_csra.from_pretrained
    try:
        model = create(args.model, **given).eval()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{args.model}: {error}") from error
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    app = create_app(model, args.batch, args.wait_ms / 1000, args.max_mib, args.max_megapixels)
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=args.max_waiting)


if __name__ == "__main__":
    main()
