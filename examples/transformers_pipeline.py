"""Tag pictures with the image-classification pipeline of transformers and a wrapped timm model.

    python examples/transformers_pipeline.py timm/resnet50.a1_in1k photo.jpg --lam 0.3 --scores log_softmax --save out

transformers loads timm models as `TimmWrapperForImageClassification`; this script wraps the timm model inside it
(`timm_model`). --save writes the settings, too: this script and `timm_csra.from_pretrained` load such a folder wrapped,
while plain transformers and plain timm load the plain model. The scores rank classes and are not probabilities, so the
pipeline applies no softmax. Needs pip install timm-csra transformers pillow.
"""

import argparse
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForImageClassification, TimmWrapperForImageClassification

import timm_csra


def csra_pipeline(model: str, **settings: Any) -> transformers.ImageClassificationPipeline:
    """Create a pipeline with a wrapped timm model. Its settings are the saved ones, else the defaults of
    `timm_csra.wrap`; `settings` (lam, temperature, scores) override them.

    Raises:
        ValueError: the model is not a timm model, or cannot be wrapped.
        OSError: there is no such folder or repository.
    """
    config = AutoConfig.from_pretrained(model)
    (getattr(config, "model_args", None) or {}).pop("num_classes", None)  # timm 1.0.31 saves it twice: TypeError
    loaded = AutoModelForImageClassification.from_pretrained(model, config=config)
    if not isinstance(loaded, TimmWrapperForImageClassification):
        raise ValueError(f"found a {type(loaded).__name__}, expected a timm model, such as timm/resnet50.a1_in1k.")
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a timm model on the Hub, such as timm/resnet50.a1_in1k, or a folder")
    parser.add_argument("photos", nargs="+", help="files or URLs")
    parser.add_argument("--lam", type=float, help="default: the saved one, else 0.1")
    parser.add_argument("--scores", choices=["logits", "log_softmax"], help="default: the saved one, else logits")
    parser.add_argument("--top", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the model with its settings")
    args = parser.parse_args(arguments)
    given = {key: value for key in ("lam", "scores") if (value := getattr(args, key)) is not None}
    try:
        pipe = csra_pipeline(args.model, **given)
        found = pipe(args.photos, top_k=args.top, function_to_apply="none")
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"{args.model}: {error}")
    for photo, tags in zip(args.photos, found, strict=True):
        print(photo, *(f"  {tag['score']:8.3f}  {tag['label']}" for tag in tags), sep="\n")
    if args.save:
        save(pipe, args.save)
        print(f"{args.save}: saved with {pipe.model.timm_model.csra}")


if __name__ == "__main__":
    main()
