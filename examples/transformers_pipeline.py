"""Tag pictures with the image-classification pipeline of transformers and a wrapped timm model.

    python examples/transformers_pipeline.py timm/resnet50.a1_in1k photo.jpg --lam 0.3 --scores log_softmax --save out

transformers loads timm models as `TimmWrapperForImageClassification`; this script wraps the timm model inside it
(`timm_model`). --save writes the settings, too: this script and `timm_csra.from_pretrained` load such a folder wrapped,
while plain transformers and plain timm load the plain model. The scores rank classes and are not probabilities, so the
pipeline applies no softmax. Needs pip install '.[examples]'.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.image_utils import load_image

import timm_csra
from timm_csra.pictures import UNREADABLE, open_upright


def csra_pipeline(model: str, **settings: Any) -> transformers.ImageClassificationPipeline:
    """Create a pipeline with a wrapped timm model. Its settings are the saved ones, else the defaults of
    `timm_csra.wrap`; `settings` (lam, temperature, scores) override them.

    Raises:
        ValueError: the model is not a timm model, or cannot be wrapped.
        OSError: there is no such folder or repository.
    """
    config = AutoConfig.from_pretrained(model)
    (getattr(config, "model_args", None) or {}).pop("num_classes", None)  # timm 1.0.31 saves it twice: TypeError
    if config.model_type != "timm_wrapper":
        raise ValueError(f"found a {config.model_type} model, expected a timm model, such as timm/resnet50.a1_in1k.")
    loaded = AutoModelForImageClassification.from_pretrained(model, config=config)
    stored = getattr(loaded.config, "csra", None)
    csra = timm_csra.CSRAConfig.from_dict(stored) if stored else timm_csra.CSRAConfig()
    for name, value in settings.items():
        setattr(csra, name, value)
    timm_csra.wrap(loaded.timm_model, csra.lam, csra.temperature, csra.scores)
    return transformers.pipeline("image-classification", model=loaded, image_processor=model)


def save(pipe: transformers.ImageClassificationPipeline, folder: Path) -> None:
    """Write weights and configuration, with the current settings."""
    pipe.model.config.csra = pipe.model.timm_model.csra.to_dict()
    pipe.save_pretrained(folder)


def open_picture(place: str) -> Image.Image:
    """Open a file or URL. The pipeline itself would clip pictures of 16 bits to white."""
    return load_image(place) if place.startswith(("http://", "https://")) else open_upright(place)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a timm model on the Hub, such as timm/resnet50.a1_in1k, or a folder")
    parser.add_argument("photos", nargs="+", help="files or URLs")
    parser.add_argument("--lam", type=float, help="default: the saved one, else 0.1")
    parser.add_argument("--scores", choices=["logits", "log_softmax"], help="default: the saved one, else logits")
    parser.add_argument("--top", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the model with its settings")
    args = parser.parse_args(arguments)
    given = {key: value for key in ("lam", "scores") if (value := getattr(args, key)) is not None}
    if args.top < 1:
        parser.error(f"--top {args.top}: expected at least 1.")
    try:
        pipe = csra_pipeline(args.model, **given)
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"{error}" if args.model in f"{error}" else f"{args.model}: {error}")
    broken = 0
    for photo in args.photos:
        try:
            picture = open_picture(photo)
        except UNREADABLE as error:
            print(f"{photo}: not read: {error}", file=sys.stderr)
            broken += 1
            continue
        tags = pipe(picture, top_k=args.top, function_to_apply="none")
        print(photo, *(f"  {tag['score']:8.3f}  {tag['label']}" for tag in tags), sep="\n")
    if args.save:
        save(pipe, args.save)
        print(f"{args.save}: saved with {pipe.model.timm_model.csra}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
