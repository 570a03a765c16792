"""Load checkpoints of timm's train script, or files of weights alone, as plain timm models.

No code in such a file is run. The number of classes is read from the classifier's weights. Image size and preprocessing
are those of the training if the file contains its arguments, else the defaults of the architecture.
"""

import argparse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import PretrainedCfg, clean_state_dict, is_model, split_model_name_tag
from torch import Tensor, nn

from .errors import describe

FORM = "ARCH@PATH, such as resnet50@output/train/model_best.pth.tar"
SOFTMAX, SIGMOID = "softmax", "sigmoid"
WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the first that is there, as timm takes them
PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
# Entries of `pretrained_cfg` that describe the published weights and are wrong for other weights.
OF_THE_PUBLISHED = (
    *("url", "hf_hub_id", "hf_hub_filename", "source", "license", "label_offset", "label_names", "label_descriptions"),
    *("test_input_size", "test_crop_pct"),
)


@dataclass(frozen=True)
class Trained:
    """A file of weights, and how to create the model that they belong to.

    Attributes:
        file: the file with the weights.
        name: the architecture, with the tag of the pretrained checkpoint whose preprocessing is used, if any.
        weights: the entry of the file that holds the weights; "" where the file is weights alone.
        num_classes: number of classes of the classifier.
        arguments: arguments of `timm.create_model`: the architecture, its arguments in the training, and an overlay of
            its `pretrained_cfg` with the file and the preprocessing of the training.
        class_map: the order of classes in the training (`--class-map`); "" for the natural order of the folders.
        loss: `softmax` or `sigmoid`, how the training normalised the logits; "" if the file does not say.
    """

    file: Path
    name: str
    weights: str
    num_classes: int
    arguments: dict[str, Any]
    class_map: str
    loss: str = ""

    @property
    def weights_from(self) -> str:
        """Description of the weights that are used."""
        average = ", an exponential moving average" if self.weights.endswith("ema") else ""
        return f"{self.weights} of {self.file.name}{average}" if self.weights else f"{self.file.name}"

    def create(self, **arguments: Any) -> nn.Module:
        """Create the model with these weights, in eval mode. `arguments` replace those of `self.arguments`; a
        `pretrained_cfg_overlay` replaces single keys, and never the file.

        Raises:
            ValueError: the weights do not fit the architecture.
        """
        own = self.arguments["pretrained_cfg_overlay"]
        overlay = {**own, **(arguments.get("pretrained_cfg_overlay") or {}), "file": own["file"], "custom_load": False}
        arguments = {**self.arguments, **arguments, "pretrained_cfg_overlay": overlay}
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm 1.0.22 does not allow it itself
                return timm.create_model(**arguments, pretrained=True).eval()
        except (RuntimeError, KeyError) as error:  # keys or shapes do not fit, or cannot be resized to the image size
            reason = " ".join(line.strip() for line in str(error).splitlines()[:4])
            raise ValueError(
                f"{self.file}: the weights do not fit {self.name} with {self.num_classes} classes: {reason}"
            ) from error


def read_trained(spec: str) -> Trained:
    """Read how to create the model in a file, given as `ARCH@PATH`. The weights are read to check them, and not kept.

    Raises:
        ValueError: the file or the architecture does not exist, the file cannot be read without running code, or its
            weights are not those of a classifier of this architecture.
    """
    architecture, at, path = spec.partition("@")
    file = Path(path)
    if not at or not _is_known(architecture):
        raise ValueError(
            f"file:{spec}: found {architecture!r}, expected {FORM}, with ARCH a model name of timm.create_model."
        )
    if not file.is_file():
        raise ValueError(f"file:{spec}: {file} not found; expected a checkpoint of timm's train script, or weights.")
    content = read_weights_only(file)
    weights = next((key for key in WEIGHTS if content.get(key) is not None), "")
    state = clean_state_dict(content[weights] if weights else content)
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(
            f"{file}: found no weights; expected one of {', '.join(WEIGHTS)}, or a state dict and nothing else."
        )
    training = content.get("args")
    given = dict(vars(training)) if isinstance(training, argparse.Namespace) else dict(training or {})
    name = _name(architecture, str(given.get("model") or ""), file)
    config = (timm.get_pretrained_cfg(name) or PretrainedCfg()).to_dict()
    arguments = _arguments(given)
    size = arguments.pop("img_size", None)  # goes into the overlay, so that `create` can be given another size
    classes = _classes(file, state, config.get("classifier"))
    overlay: dict[str, Any] = dict.fromkeys(OF_THE_PUBLISHED)
    overlay |= {"file": str(file), "custom_load": False, "num_classes": classes}
    if given:
        if given.get("input_size") is None and given.get("img_size") is None:
            given["img_size"] = size
        resolved = resolve_data_config(given, pretrained_cfg=config)
        overlay |= {key: resolved[key] for key in PREPROCESSING}
    arguments |= {"model_name": name, "num_classes": classes, "pretrained_cfg_overlay": overlay}
    return Trained(file, name, weights, classes, arguments, str(given.get("class_map") or ""), _loss(given))


def _loss(given: Mapping[str, Any]) -> str:
    """Read the loss from `--bce-loss` of the training; return "" for scripts that have other losses, too."""
    if given.get("bce_loss") is True or given.get("multi_label") is True:
        return SIGMOID
    return SOFTMAX if given.get("bce_loss") is False and not (given.get("loss") or given.get("loss_type")) else ""


def _is_known(name: str) -> bool:
    """Return whether timm has the architecture, and the tag if the name has one."""
    try:
        return is_model(name) and bool(timm.get_pretrained_cfg(name) or not split_model_name_tag(name)[1])
    except RuntimeError:  # raised by timm for an unknown tag
        return False


def _name(architecture: str, recorded: str, file: Path) -> str:
    """Return the name of the architecture with the tag that the training started from, which determines preprocessing,
    unless the user gave a tag.

    Raises:
        ValueError: the file records another architecture.
    """
    if not is_model(recorded):  # a model of the Hub or a folder, or none recorded
        return architecture
    if split_model_name_tag(recorded)[0] != split_model_name_tag(architecture)[0]:
        raise ValueError(f"{file}: holds a {recorded}, but {architecture} was given; use {recorded}@{file}.")
    return recorded if not split_model_name_tag(architecture)[1] else architecture


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that timm's train script passes to `timm.create_model`, without those for training alone."""
    input_size = given.get("input_size")
    arguments = {
        "in_chans": given.get("in_chans") or (input_size[0] if input_size else None),
        "global_pool": given.get("gp"),
        "bn_eps": given.get("bn_eps"),
        **(given.get("model_kwargs") or {}),
    }
    of_the_file = ("pretrained", "checkpoint", "num_classes", "cache_dir")
    return {key: v for key, v in arguments.items() if v is not None and not key.startswith(of_the_file)}


def _classes(file: Path, state: Mapping[str, Tensor], classifier: Any) -> int:
    """Return the number of classes, from the weights of the classifier or, where there are several, of the first."""
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    weight = next((state[key] for name in names if (key := f"{name}.weight") in state), None)
    if weight is None:
        wanted = " or ".join(f"{name}.weight" for name in names) or "a classifier, of which the architecture has none"
        raise ValueError(
            f"{file}: found {len(state)} weights, the first {', '.join(list(state)[:3])}; expected {wanted} among them."
        )
    return int(weight.shape[0])


def read_weights_only(file: Path, map_location: str = "cpu") -> dict[str, Any]:
    """Read a file of weights without running code in it. Tensors are memory-mapped where the format allows it.

    Raises:
        ValueError: the file is damaged, or needs full unpickling, which could run code.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file, device=map_location))
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training checkpoints hold one
            content = torch.load(
                file, map_location=map_location, weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
    except Exception as error:  # an arbitrary file can make the unpickler raise any error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{file}: cannot be read with weights_only=True: {reason} Reading it in full could run code, so it is "
            "refused. If you trust the file, load it yourself and save its state dict with safetensors; else ask its "
            "author for such a file."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: found a {type(content).__name__}, expected a state dict or a training checkpoint.")
    return content


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read names of classes from a text file, one per line: the name, or `index name` with the indices in order.

    Raises:
        ValueError: the file does not exist, is not text, or has indices in another order.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected one line for each class, its name or `index name`.")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not text in UTF-8 ({error.reason}); expected one line for each class.") from error
    numbered = [line.partition(" ") for line in lines]
    if not all(number.isdigit() and name for number, _, name in numbered):
        return tuple(lines)
    for expected, (number, _, _) in enumerate(numbered):
        if int(number) != expected:
            raise ValueError(f"{file}, line {expected + 1}: found index {number}; expected {expected}.")
    return tuple(name for _, _, name in numbered)


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a timm model's classes: those saved with it (`label_names`, replaced by
    `label_descriptions`), else ImageNet's if the number of classes is that of one of its subsets, else the indices.

    Raises:
        ValueError: the model's number of classes differs from the number of names.

    Example:
        >>> class_names(timm.create_model("test_resnet"))[281]
        'tabby, tabby cat'
    """
    count, config = int(cast(Any, model).num_classes), getattr(model, "pretrained_cfg", {})
    names, descriptions = list(config.get("label_names") or ()), config.get("label_descriptions") or {}
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        if not names or names == info.label_names():
            names = [info.index_to_description(index) for index in range(info.num_classes())]
    if names and len(names) != count:
        raise ValueError(f"{describe(model)}: found {len(names)} names of classes, expected {count}.")
    return tuple(descriptions.get(name, name) for name in names or map(str, range(count)))
