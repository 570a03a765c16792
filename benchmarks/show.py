"""Show how wrapping changes the top classes of one picture, with a score map for each class.

The picture has the top classes of the plain model, of the model wrapped with logits (as in the paper), and with
log-probabilities. Without IMAGE the input is a mosaic of the first four photographs of the embedded sample.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_input_data_config, str_to_pil_interp

import timm_csra
from timm_csra.accelerators import AMP, autocast, on_accelerator, precision, to_device
from timm_csra.config import LOG_SOFTMAX, LOGITS, SCORES
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, Setting, score

from .argument_types import only
from .arguments import add_device, add_names
from .asked import asked_names
from .checkpoints import find
from .checkpoints.find import CheckpointError, find_checkpoints
from .data import sample
from .data.classes import Classifier, NotApplicableError, head_classes
from .data.datasets import DataError, open_image
from .data.presented import mosaic
from .reporting.tables import origins
from .sizes import check_sizes, size_of
from .workers import usable_device

TOP = 6


def main(arguments: list[str] | None = None) -> int:
    """Write the picture. Returns 0, or 2 if the model or the image cannot be loaded or used."""
    args = _parser().parse_args(arguments)
    try:
        _show(args)
    except (CheckpointError, DataError, NotApplicableError, ValueError) as error:
        print(f"benchmarks.show: {error}", file=sys.stderr)
        return 2
    return 0


def _show(args: argparse.Namespace) -> None:
    lams = {LOGITS: args.lam, LOG_SOFTMAX: args.lam_log_softmax}
    wrapped = [Setting(timm_csra.CSRAConfig(lam).lam, PLAIN.temperature, scores) for scores, lam in lams.items()]
    out = _file(args.out)
    checkpoint = only(find_checkpoints(args.model), "checkpoints")
    check_sizes(args.img_size)
    size, _ = size_of(checkpoint, args.img_size)
    device = usable_device(args.device)
    amp = precision(args.amp, device)
    model = to_device(checkpoint.create(size), device, args.channels_last and on_accelerator(device))
    requested = {"input_size": (3, *size), "crop_mode": "squash", "crop_pct": 1.0}
    config = resolve_input_data_config(model, args=requested)
    tiles = [_path(args.image)] if args.image else [sample.path_of(photo) for photo in sample.PHOTOGRAPHS[:4]]
    interpolation = str_to_pil_interp(config["interpolation"])
    picture = mosaic([open_image(path) for path in tiles], 1 if args.image else 2, size, interpolation)

    x = create_transform(**config)(picture)[None]
    scores, _ = score(model, [(x, torch.zeros(1))], [PLAIN, *wrapped], device=device, amp_dtype=AMP[amp])
    with torch.inference_mode(), autocast(device, amp):
        maps = timm_csra.score_maps(model, x.to(device), scores=args.scores)[0].float().cpu()
    classifier = Classifier.of(len(maps), getattr(model, "pretrained_cfg", {}))
    head = head_classes(classifier, asked_names(args.class_names))
    names = [_readable(names) for names in head.names] if head else [str(index) for index in range(len(maps))]
    top = min(TOP, len(names))
    order = {
        heading: scores.logits(setting)[0].topk(top).indices.tolist()
        for heading, setting in (("plain", PLAIN), *((setting.scores, setting) for setting in wrapped))
    }
    title = f"{checkpoint.id}, lam = {lams[LOGITS]:g} and {lams[LOG_SOFTMAX]:g}; maps of {args.scores}"
    _draw(picture, names, order, args.scores, maps, title, out)
    for heading, classes in order.items():
        print(f"{heading:11} {', '.join(names[index] for index in classes)}")
    origin = {"classes_from": head and head.classes_from, "weights_from": checkpoint.weights_from}
    for line in origins([{"model": checkpoint.name, **origin}]):
        print(line)
    print(f"written to {out}")


def _file(out: Path) -> Path:
    """Return the file to write, with the extension `.png` if there is none.

    Raises:
        ValueError: the path is a folder, or has the extension of an unknown format.
    """
    file = out if out.suffix or out.is_dir() else out.with_name(f"{out.name}.png")
    if file.is_dir():
        raise ValueError(f"--out {file}: found a folder; expected a file to write, such as {out / 'effect.jpg'}.")
    formats = sorted(f".{name}" for name in Figure().canvas.get_supported_filetypes())
    if file.suffix.lower() not in formats:
        raise ValueError(f"--out {file}: found {file.suffix}; expected one of {', '.join(formats)}.")
    return file


def _path(image: str) -> Path:
    """Return the path of an image; `sample:coffee` names a photograph of the embedded sample."""
    if not image.startswith("sample:"):
        return Path(image)
    photographs = {Path(photo.file).stem: photo for photo in sample.PHOTOGRAPHS}
    name = image.removeprefix("sample:")
    if name not in photographs:
        raise DataError(f"{image}: no such photograph in the sample; expected one of {', '.join(photographs)}.")
    return sample.path_of(photographs[name])


def _readable(names: set[str]) -> str:
    """Return the shortest name that is not a synset, if there is one."""
    words = [name for name in names if not (name[0] == "n" and name[1:].isdigit())]
    return min(words or names, key=lambda name: (len(name), name))


def _draw(
    picture: Image.Image,
    names: list[str],
    order: dict[str, list[int]],
    scores: str,
    maps: torch.Tensor,
    title: str,
    out: Path,
) -> None:
    ratios = [1.6, 1, 1, 1]
    figure, axes = plt.subplots(2, 4, figsize=(12.4, 5.4), layout="constrained", width_ratios=ratios)
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("input", fontsize=9)
    _rank(axes[1, 0], names, order, title)
    for axis, index in zip(axes[:, 1:].flat, order[scores], strict=False):
        axis.imshow(timm_csra.overlay(picture, maps[index]))
        axis.set_title(f"{names[index]} ({maps[index].max():.1f})", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=100)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _rank(axis: Axes, names: list[str], order: dict[str, list[int]], title: str) -> None:
    axis.set_title(title, fontsize=9)
    for place, (heading, classes) in enumerate(order.items()):
        axis.text(0.36 * place, 0.95, heading, weight="bold", fontsize=9, transform=axis.transAxes)
        for row, index in enumerate(classes):
            new = index not in order["plain"]
            axis.text(
                0.36 * place,
                0.82 - 0.14 * row,
                names[index],
                fontsize=9,
                color="tab:green" if new else "black",
                transform=axis.transAxes,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.show", description=__doc__)
    parser.add_argument(
        "image",
        nargs="?",
        help="a picture that Pillow can read, squashed to the input size; or sample:NAME, such as sample:coffee",
    )
    parser.add_argument("--model", default="pypi:tf_efficientnet_lite0", metavar="SPEC", help=find.HELP)
    add_names(parser)
    parser.add_argument("--lam", type=float, default=DEFAULT.lam, help="lam with logits (default: %(default)s)")
    parser.add_argument(
        "--lam-log-softmax",
        type=float,
        default=DEFAULT_LOG_SOFTMAX.lam,
        help="lam with log-probabilities (default: %(default)s)",
    )
    parser.add_argument(
        "--scores", choices=SCORES, default=LOGITS, help="kind of scores of the maps (default: %(default)s)"
    )
    parser.add_argument(
        "--img-size",
        default="1x",
        metavar="SIZE",
        help="pixels, a multiple of the checkpoint's own size, or test: the size at which timm validates it (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/effect.jpg"),
        metavar="FILE",
        help="file to write; PNG if its name has no extension (default: %(default)s)",
    )
    add_device(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
