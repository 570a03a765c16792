"""What is in a folder of timm's format: read and checked before it is loaded, pushed, or replaces other files."""

import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import is_model
from timm.utils import reparameterize_model
from torch import nn

from .config import CSRAConfig
from .misfits import REPARAMETERISED, Misfits, Shape
from .trained import read_weights_only

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FOREIGN_WEIGHTS = (WEIGHTS, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PICKLES = (".bin", ".pth", ".pt", ".tar", ".ckpt")
RECORDS_ARGUMENTS = hasattr(timm.models, "resolve_model_input_args")  # this timm writes `model_args` such as img_size
SHOWN = 4  # how many weights of each kind the error of saving lists: a reparameterised model has hundreds


def read_config(file: Path, name: str) -> tuple[dict[str, Any], CSRAConfig | None]:
    """Read and validate a configuration; return it with its settings of timm_csra, or None where it has none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name}: {CONFIG} holds a {type(config).__name__}, expected an object.")
    try:
        stored = CSRAConfig.from_dict(config["csra"]) if "csra" in config else None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {CONFIG}, csra: {error}") from error
    if not isinstance(config.get("pretrained_cfg", {}), dict):
        raise ValueError(f"{name}: {CONFIG} has pretrained_cfg {config['pretrained_cfg']!r}; expected an object.")
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"{name}: {CONFIG} has no architecture; expected the name of a timm model.")
    if not is_model(architecture):
        raise ValueError(
            f"{name}: {CONFIG} names the architecture {architecture!r}, which timm {timm.__version__} does not have. A "
            "newer timm may have it."
        )
    arguments = config.get("model_args", {})
    # A device would allocate the memory of a model that is only to be looked at.
    refused = ("pretrained", "checkpoint", "device")
    if not isinstance(arguments, dict) or any(key.startswith(refused) for key in arguments):
        raise ValueError(f"{name}: {CONFIG} has model_args {arguments!r}; expected arguments of the architecture.")
    return config, stored


def no_weights(ours: bool) -> str:
    """Return what to say where there are no weights: `ours` if settings of timm_csra are stored."""
    if not ours:
        return f"found no weights; expected one of {', '.join(FOREIGN_WEIGHTS)}."
    return (
        f"found no {WEIGHTS}, which has to be there because {CONFIG} holds settings of timm_csra: pickled weights are "
        "not read. Save the model again with timm_csra.save_pretrained."
    )


def refuse_code(name: str, folder: Path) -> None:
    """Raise ValueError if a pickle of weights contains code, which older timm versions would run."""
    for file in sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
        try:
            read_weights_only(file, "meta")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def check_weights(name: str, file: Path, config: dict[str, Any], saving: bool = False) -> None:
    """Raise ValueError for weights that do not fit the architecture in the configuration: before loading, and, with
    `saving`, before files are replaced or pushed."""
    if not file.is_file():
        raise ValueError(f"{name}: {no_weights(ours=True)}")
    try:
        with safe_open(file, "pt") as stored:
            found = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{name}: {WEIGHTS} is damaged: {error}. Download or save it again.") from error
    arguments = dict(config.get("model_args") or {})
    classes = config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes"))
    if classes is not None:
        arguments["num_classes"] = classes
    try:
        with torch.device("meta"):
            model = timm.create_model(config["architecture"], pretrained=False, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # architectures raise different errors
        raise ValueError(f"{name}: timm cannot build the model that {CONFIG} describes: {error}") from error
    misfits = Misfits.of(found, _shapes(model))
    if misfits and saving:
        raise ValueError(
            f"{name}: cannot be saved, because from_pretrained could not load it: its weights are not those of "
            f"{config['architecture']} with {classes} classes as timm builds it. {misfits.listed(SHOWN)}. "
            f"{_remedy(misfits, model, found, cast(int, classes))}"
        )
    if misfits:
        raise ValueError(f"{name}: the weights do not fit {config['architecture']}. {misfits.listed()}.")


def _remedy(misfits: Misfits, expected: nn.Module, found: dict[str, Shape], classes: int) -> str:
    with torch.device("meta"):
        fused = reparameterize_model(expected.eval())
    if not Misfits.of(found, _shapes(fused)):
        return REPARAMETERISED
    older = f" timm {timm.__version__} does not record arguments of the model such as img_size; timm 1.0.31 does."
    return misfits.remedy(classes) + ("" if RECORDS_ARGUMENTS else older)


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
