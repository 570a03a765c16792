"""Write a CSV table of the tags of all pictures in a folder, with the location of each tag.

    python examples/tag_folder.py photos --model resnet50.a1_in1k --lam 0.3 --scores log_softmax --out tags.csv

Each row has file, tag, score, x and y. x and y are the centre of the location with the highest score, from 0 to 1 of
the picture's width and height after EXIF rotation. The whole picture is resized to the model's input size, so that
nothing at its borders is cut off. Scores rank the tags of a picture; they are not probabilities.

The script names pictures that it cannot read on stderr, skips them, and exits with 1; it exits with 2 if it writes no
table. It writes OUT.part and renames that to OUT at the end. Needs pip install '.[examples]'.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

import timm_csra
from timm_csra.pictures import FORMATS, UNREADABLE, open_upright
from timm_csra.trained import class_names, read_class_names


def load(name: str, names: Path | None = None, **settings: Any) -> nn.Module:
    """Load a wrapped model in eval mode, by a name of timm or of `timm_csra.from_pretrained`."""
    given = {key: value for key, value in settings.items() if value is not None}
    if names:
        given["pretrained_cfg_overlay"] = {"label_names": read_class_names(names)}
    if timm.is_model(name):
        return timm_csra.create_model(name, **given).eval()
    return timm_csra.from_pretrained(name, **given)


def read(file: Path, transform: Any) -> Tensor | str:
    """Read and transform a picture, `(3, H, W)`; return the reason if that fails."""
    try:
        return transform(open_upright(file))
    except UNREADABLE as error:
        return str(error)


def tags(model: nn.Module, images: list[Tensor], top: int) -> Iterator[list[tuple[int, float, float, float]]]:
    """Yield class, score, x and y of the `top` highest classes of each image, from one forward pass."""
    x = torch.stack(images).to(next(model.parameters()).device)
    with torch.inference_mode():
        maps, scores = timm_csra.score_maps(model, x, model.csra.scores, return_logits=True)
    rows, columns = maps.shape[2:]
    best, places = scores.topk(min(top, scores.shape[1])), maps.flatten(2).argmax(2)
    for values, classes, place in zip(best.values.tolist(), best.indices.tolist(), places.tolist(), strict=True):
        yield [
            (k, value, (place[k] % columns + 0.5) / columns, (place[k] // columns + 0.5) / rows)
            for k, value in zip(classes, values, strict=True)
        ]


def tag(
    model: nn.Module, names: Sequence[str], folder: Path, files: Sequence[Path], out: Path, top: int, size: int
) -> list[Path]:
    """Write the table; return the files that could not be read."""
    transform = create_transform(**resolve_model_data_config(model) | {"crop_mode": "squash", "crop_pct": 1.0})
    broken, part = [], out.with_name(f"{out.name}.part")
    with (
        part.open("w", encoding="utf-8", newline="") as file,
        ThreadPoolExecutor() as threads,
        tqdm(files, disable=None) as progress,
    ):
        table = csv.writer(file)
        table.writerow(["file", "tag", "score", "x", "y"])
        for some in (files[start : start + size] for start in range(0, len(files), size)):
            found = dict(zip(some, threads.map(lambda name: read(name, transform), some), strict=True))
            for name in [name for name, image in found.items() if isinstance(image, str)]:
                tqdm.write(f"{name}: not read: {found.pop(name)}", file=sys.stderr)
                broken.append(name)
            images = [*found.values()]
            for name, of_image in zip(found, tags(model, images, top) if images else (), strict=True):
                for k, score, x, y in of_image:
                    row = [name.relative_to(folder).as_posix(), names[k], f"{score:.4f}", f"{x:.4f}", f"{y:.4f}"]
                    table.writerow(row)
            progress.update(len(some))
    os.replace(part, out)
    return broken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="searched recursively")
    parser.add_argument("--model", required=True, help="a timm name, a folder, hf-hub:USER/NAME or file:ARCH@PATH")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="one name per line, in the order of the head")
    parser.add_argument("--lam", type=float, help="default: the saved one, else 0.1")
    parser.add_argument("--scores", choices=["logits", "log_softmax"], help="default: the saved one, else logits")
    parser.add_argument("--top", type=int, default=5, help="tags per picture (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tags.csv"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    files = sorted(file for file in args.folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        found = "no pictures" if args.folder.is_dir() else "a file" if args.folder.exists() else "no such folder"
        parser.error(f"{args.folder}: found {found}; expected a folder with files such as .jpg or .png.")
    if args.out.is_dir() or not args.out.parent.is_dir():
        found = "a folder" if args.out.is_dir() else "no folder that it could be written to"
        parser.error(f"--out {args.out}: found {found}; expected the name of a file in an existing folder.")
    if min(args.top, args.batch_size) < 1:
        parser.error(f"found --top {args.top} --batch-size {args.batch_size}; expected at least 1 of each.")
    try:
        model = load(args.model, args.class_names, lam=args.lam, scores=args.scores)
        names = class_names(model)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(f"{error}" if args.model in f"{error}" else f"{args.model}: {error}")
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    broken = tag(model, names, args.folder, files, args.out, args.top, args.batch_size)
    print(f"{args.out}: tags of {len(files) - len(broken)} pictures; {len(broken)} could not be read")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
