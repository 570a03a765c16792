"""A page to try it: `python -m timm_csra.demo`. Extra `demo`; also the app of a Hugging Face Space.

A photograph runs once. Its location scores are kept, and lam, T and the kind of scores only recombine them: the tags
change at once.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

for _name in ("gradio", "matplotlib"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"timm_csra.demo needs {_name}, which is not installed: pip install 'timm-csra[demo]'", name=_name
        )

import gradio as gr
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn

from . import score_maps
from .accelerators import AUTO, autocast, default_device, on_accelerator, precision, to_device
from .attention import add_attention, class_attention
from .config import LOG_SOFTMAX, LOGITS, SCORES, CSRAConfig
from .errors import UnsupportedModelError
from .installed import WHEELS, file_of, installed_examples, installed_wheels
from .pictures import in_rgb
from .trained import FORM, read_class_names, read_trained
from .visualize import overlay

ONLINE = ("resnet50.a1_in1k", "convnext_tiny.fb_in1k")
TOP = 6
PIXELS = 50_000_000  # of a picture; more is refused
MAX_FILE = "25mb"
FILES = "file:"  # and ARCH@PATH
USUAL_LAM = {LOGITS: 0.1, LOG_SOFTMAX: 0.3}


@dataclass(frozen=True)
class Seen:
    """What a model says of one picture, for every lam, T and kind of scores.

    Attributes:
        picture: as the model saw it.
        base: the plain model's logits, `(K,)`.
        maps: class scores of every location, logits, `(K, rows, columns)`.
        names: of the classes.
    """

    picture: Image.Image
    base: Tensor
    maps: Tensor
    names: tuple[str, ...]

    def logits(self, lam: float, temperature: float, scores: str = LOGITS) -> Tensor:
        """`(K,)`, what a wrapped model says."""
        config = CSRAConfig(lam, temperature, scores)
        if config.lam == 0:
            return self.base
        found = self.maps_of(config.scores).flatten(1).T[None]
        return add_attention(self.base[None], [class_attention(found, config.temperatures[0])], config.lam)[0]

    def maps_of(self, scores: str) -> Tensor:
        """`(K, rows, columns)`, the scores of this kind."""
        return self.maps.log_softmax(dim=0) if scores == LOG_SOFTMAX else self.maps


@lru_cache(maxsize=2)
def load(name: str) -> nn.Module:
    """A pretrained model in eval mode, on the accelerator if there is one; gr.Error, which the page shows, where it
    cannot be had."""
    device = default_device()
    return to_device(_created(name.strip()), device, on_accelerator(device))


def _created(name: str) -> nn.Module:
    if name.startswith(FILES):
        try:
            return read_trained(name.removeprefix(FILES)).create()
        except ValueError as error:
            raise gr.Error(str(error)) from error
    wheel = file_of(WHEELS[name], ".pth") if name in WHEELS else None
    if not timm.is_model(name.removeprefix("hf-hub:")) and not name.startswith("hf-hub:"):
        raise gr.Error(f"timm has no model called {name!r}. Try resnet50.a1_in1k, or hf-hub:user/repository.")
    try:
        if wheel is None:
            return timm.create_model(name, pretrained=True).eval()
        model = timm.create_model(name)
        tensors = torch.load(wheel, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
        return model.eval()
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        offline = ", ".join(installed_wheels()) or "none is installed"
        raise gr.Error(
            f"{name} could not be downloaded: the Hugging Face Hub did not give it ({type(error).__name__}). Without "
            f"network these work: {offline}."
        ) from error
    except (RuntimeError, ValueError) as error:
        raise gr.Error(f"{name} could not be loaded: {str(error).splitlines()[0]}") from error


def open_picture(path: str) -> Image.Image:
    """gr.Error where it is no picture, or too large a one."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > PIXELS:
                raise gr.Error(
                    f"The picture has {file.width} x {file.height} pixels; expected at most {PIXELS // 10**6} million. "
                    "Make it smaller first."
                )
            return in_rgb(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise gr.Error(f"This file cannot be read as a picture: {error}. Expected JPEG, PNG or WebP.") from error


def look(name: str, path: str | None, offered: Mapping[str, Sequence[str]] | None = None) -> Seen:
    """One forward pass: all that the page shows is made of what it gives. Files are read only where they are offered,
    so that a visitor learns nothing of what is on this machine; `offered` has the names of their classes."""
    if not path:
        raise gr.Error("Choose a picture first: upload one, or take an example.")
    offered = offered or {}
    if name.strip().startswith(FILES) and name.strip() not in offered:
        raise gr.Error("Files are only read where the page was started with them: --model file:ARCH@PATH.")
    model = load(name)
    device = next(model.parameters()).device
    config = resolve_data_config(model=model) | {"crop_mode": "squash", "crop_pct": 1.0}
    _, height, width = config["input_size"]
    picture = open_picture(path).resize((width, height), Image.Resampling.BICUBIC)
    x = create_transform(**config)(picture)[None].to(device)
    try:
        with torch.inference_mode(), autocast(device, precision(AUTO, device)):
            base, maps = (found[0].float().cpu() for found in (model(x), score_maps(model, x)))
    except UnsupportedModelError as error:
        raise gr.Error(str(error)) from error
    return Seen(picture, base, maps, class_names(model, len(base), offered.get(name.strip(), ())))


def class_names(model: nn.Module, count: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Of `count` logits: those given, else from the checkpoint, else ImageNet's, else numbers."""
    names = given or getattr(model, "pretrained_cfg", {}).get("label_names")
    if not names and count == 1000:
        info = ImageNetInfo()
        names = [info.index_to_description(index).split(",")[0] for index in range(count)]
    return tuple(names) if names and len(names) == count else tuple(map(str, range(count)))


def show(seen: Seen | None, lam: float, temperature: float, maximum: bool, scores: str) -> tuple[Any, ...]:
    """Tags of the plain and the wrapped model, and where each of the latter was seen."""
    if seen is None:
        return None, None, []
    wrapped = seen.logits(lam, math.inf if maximum else temperature, scores)
    plain_top, wrapped_top = (logits.topk(min(TOP, len(logits))).indices.tolist() for logits in (seen.base, wrapped))
    tables = [_table(seen, logits, top) for logits, top in ((seen.base, plain_top), (wrapped, wrapped_top))]
    order = [*dict.fromkeys([*wrapped_top, *plain_top])]
    maps = seen.maps_of(scores)
    shown = maps[order]
    low, high = float(shown.min()), float(shown.max())  # one scale, so that maps can be compared
    gallery = [
        (
            overlay(seen.picture, maps[index], low=low, high=high),
            f"{seen.names[index]} ({maps[index].max():.1f})",
        )
        for index in order
    ]
    return *tables, gallery


def _table(seen: Seen, logits: Tensor, top: Sequence[int]) -> list[list[Any]]:
    return [[place + 1, seen.names[index], round(float(logits[index]), 2)] for place, index in enumerate(top)]


def build(offered: Mapping[str, Sequence[str]] | None = None) -> gr.Blocks:
    """The page. `offered` are checkpoints to offer first, with the names of their classes, if there are any."""
    offline, examples = installed_wheels(), installed_examples()
    choices = [*(offered or {}), *offline, *ONLINE]
    with gr.Blocks(title="timm-csra", analytics_enabled=False) as page:
        gr.Markdown(
            "# Class-specific residual attention\n"
            "The classifier that is already there scores every place of a picture, and what the most convinced places "
            "say is added: `logit = base + lam * attention`. Meant for pictures with several objects; on many pictures "
            "it changes little, and it can do harm. Logits are for ranking: they are no probabilities, and no "
            "threshold fits those of log_softmax, which fall with lam."
        )
        source, seen = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                model = gr.Dropdown(
                    choices,
                    value=choices[0],
                    label="Checkpoint",
                    info="Any timm name or hf-hub:user/repository may be typed; those are downloaded."
                    + (f" Without network: {', '.join(offline)}." if offline else ""),
                    allow_custom_value=True,
                    elem_id="model",
                )
                file = gr.File(label="Picture", type="filepath", elem_id="upload", height=120)
                if examples:
                    example = gr.Radio(list(examples), label="Or an example", elem_id="examples")
                picture = gr.Image(label="As the model sees it", interactive=False, elem_id="picture", height=260)
            with gr.Column(min_width=280):
                scores = gr.Radio(
                    list(SCORES),
                    value=LOGITS,
                    label="Scores",
                    info="logits: the paper's, lam 0.1. log_softmax: for classifiers trained with softmax, lam 0.3",
                    elem_id="scores",
                )
                lam = gr.Slider(0, 2, value=0.1, step=0.01, label="lam", info="0 is the plain model", elem_id="lam")
                maximum = gr.Checkbox(True, label="T = infinity: the most convinced place alone", elem_id="maximum")
                temperature = gr.Slider(0.1, 20, value=1, step=0.1, label="T, if finite", elem_id="temperature")
                with gr.Row():
                    headers = ["#", "class", "logit"]
                    before = gr.Dataframe(headers=headers, label="Plain model", interactive=False, elem_id="before")
                    after = gr.Dataframe(headers=headers, label="Wrapped", interactive=False, elem_id="after")
        maps = gr.Gallery(label="Where each class was seen, and its highest score", columns=4, elem_id="maps")
        shown, outputs = [seen, lam, temperature, maximum, scores], [before, after, maps]
        file.upload(lambda path: path, file, source)
        if examples:
            example.change(examples.get, example, source)
        for changed in (source.change, model.change):
            changed(partial(_look, offered=offered), [model, source], [seen, picture]).success(show, shown, outputs)
        scores.change(USUAL_LAM.get, scores, lam)  # what each is meant to be used with
        for control in (lam, temperature, maximum, scores):
            control.change(show, shown, outputs, show_progress="hidden", queue=True)
    return page


def _look(
    name: str, path: str | None, offered: Mapping[str, Sequence[str]] | None = None
) -> tuple[Seen | None, Image.Image | None]:
    """Nothing where there is no picture yet."""
    seen = look(name, path, offered) if path else None
    return seen, seen.picture if seen else None


def main(arguments: list[str] | None = None) -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(prog="python -m timm_csra.demo", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for everybody (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="SPEC",
        help="offered first: a timm name, hf-hub:USER/REPO, or file:ARCH@PATH, what timm's train script saves, such as "
        f"{FILES}{FORM.rpartition(' ')[2]} (may be given several times)",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="names of the classes of --model, one a line in the head's order",
    )
    args = parser.parse_args(arguments)
    try:
        names = read_class_names(args.class_names) if args.class_names else ()
        for spec in args.model:
            if spec.startswith(FILES):
                trained = read_trained(spec.removeprefix(FILES))
                if names and len(names) != trained.num_classes:
                    count = trained.num_classes
                    raise ValueError(f"{args.class_names}: found {len(names)} names, expected one for each of {count}.")
                print(f"{spec}: {trained.weights_from}, {trained.num_classes} classes")
    except ValueError as error:
        parser.error(str(error))
    folders = sorted({str(Path(path).parent) for path in installed_examples().values()})
    build(dict.fromkeys(args.model, names)).launch(
        server_name=args.host, server_port=args.port, max_file_size=MAX_FILE, allowed_paths=folders
    )


if __name__ == "__main__":
    main()
