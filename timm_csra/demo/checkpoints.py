"""Load a checkpoint by its name, with its kind of head, its training loss and its class names."""

import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from ..accelerators import default_device, on_accelerator, to_device
from ..inspection import Explanation, explain
from ..installed import WHEELS, file_of, installed_wheels
from ..stored import CONFIG, FOREIGN_WEIGHTS, read_config
from ..trained import SIGMOID, SOFTMAX, class_names, read_trained
from .told import Refused, quoted

FILES = "file:"  # and ARCH@PATH
_HUB = "hf-hub:"
_NAME = re.compile(r"[\w.-]{1,80}", re.ASCII)
_REPOSITORY = re.compile(rf"{_HUB}[\w.-]{{1,96}}/[\w.-]{{1,96}}(@[\w.-]{{1,96}})?", re.ASCII)
ONLINE = ("resnet50.a1_in1k", "convnext_tiny.fb_in1k")
# Visitors can name any model. This many float32 parameters are 2.8 GB, twice that while they are loaded, and two
# checkpoints are kept: a free Space has 16 GB.
MOST_PARAMETERS = 700e6
MOST_BYTES = 3e9  # of a file of weights, which is in memory at once whatever the model is
# Training losses from publications: of EfficientNet-Lite, ConvNeXt, and the A recipes of "ResNet strikes back".
_SOFTMAX_TRAINED = {*WHEELS, "convnext_tiny.fb_in1k"}
_SIGMOID_TAG = re.compile(r"\.(rsb_)?a[123]h?_in1k$")


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model in eval mode, on the accelerator if there is one.

    Attributes:
        name: the name that the page shows.
        model: the plain model.
        explanation: result of `explain`, with the kind of head and the grid of locations.
        loss: training loss, `softmax` or `sigmoid`; "" if it is unknown.
    """

    name: str
    model: nn.Module
    explanation: Explanation
    loss: str

    def class_names(self, given: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the given names, else those of the model, each up to its first comma: `tabby` of `tabby, tabby cat`.

        Raises:
            Refused: the number of names differs from the number of classes.
        """
        count = self.explanation.num_classes
        if given and len(given) != count:
            raise Refused(f"{self.name}: --class-names has {len(given)} names, expected {count}.")
        try:
            return tuple(given) or tuple(name.split(",")[0] for name in class_names(self.model))
        except ValueError as error:
            raise Refused(str(error)) from error


def shown_names(offered: Sequence[str]) -> dict[str, str]:
    """Map the names that the page shows to the offered checkpoints. The name of a file has no folder in it."""
    found: dict[str, str] = {}
    for spec in offered:
        architecture, _, path = spec.partition("@")
        shown = f"{architecture}@{Path(path).name}" if spec.startswith(FILES) else spec
        same = sum(name.partition(" (")[0] == shown for name in found)
        found[f"{shown} ({same + 1})" if same else shown] = spec
    return found


def check_name(name: str, offered: Mapping[str, str]) -> None:
    """Check the name of a checkpoint. `offered` is the result of `shown_names`.

    Raises:
        Refused: the name is neither offered, nor a model name of timm, nor a repository on the Hub.
    """
    if name in offered or _REPOSITORY.fullmatch(name):
        return
    if not name:
        raise Refused("Choose a checkpoint first.")
    if name.startswith(FILES):
        raise Refused("Files are only read where the page was started with them: --model file:ARCH@PATH.")
    if not _NAME.fullmatch(name) or not timm.is_model(name):
        raise Refused(f"timm has no model called {quoted(name)}. Try resnet50.a1_in1k, or hf-hub:user/repository.")


def checkpoint(name: str, offered: Mapping[str, str]) -> Checkpoint:
    """Load a checkpoint by its name, once for all visitors. Only offered files are read, so a visitor learns nothing
    about other files on this machine. `offered` is the result of `shown_names`.

    Raises:
        Refused: there is no such checkpoint, it could not be downloaded, it cannot be wrapped, or it is not offered and
            has more than `MOST_PARAMETERS` or a file of weights of more than `MOST_BYTES`.
    """
    name = name.strip()
    check_name(name, offered)
    with _loading[name]:
        return _load(name, offered.get(name, name), name not in offered)


def is_here(name: str) -> bool:
    """Return whether this process has already loaded a checkpoint."""
    return name in _here


_loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
_here: set[str] = set()


@lru_cache(maxsize=2)
def _load(name: str, spec: str, limited: bool) -> Checkpoint:
    model, loss = _create(spec, _checked(spec) if limited else spec)
    explanation = explain(model)
    if explanation.unsupported:
        raise Refused(explanation.unsupported)
    device = default_device()
    _here.add(name)
    return Checkpoint(name, to_device(model, device, on_accelerator(device)), explanation, loss)


def _create(name: str, source: str) -> tuple[nn.Module, str]:
    if name.startswith(FILES):
        try:
            trained = read_trained(name.removeprefix(FILES))
            return trained.create(), trained.loss
        except ValueError as error:
            _, _, path = name.partition("@")
            raise Refused(str(error).replace(path, Path(path).name)) from error
    wheel = file_of(WHEELS[name], ".pth") if name in WHEELS else None
    loss = SOFTMAX if name in _SOFTMAX_TRAINED else SIGMOID if _SIGMOID_TAG.search(name) else ""
    with _failures(name):
        if wheel is None:
            return timm.create_model(source, pretrained=True).eval(), loss
        model = timm.create_model(name)
        tensors = torch.load(wheel, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
        return model.eval(), loss


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """Turn errors of timm, torch and the Hub into sentences for the visitor."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        offline = ", ".join(installed_wheels()) or "none is installed"
        raise Refused(
            f"{name} could not be downloaded: the Hugging Face Hub did not give it ({type(error).__name__}). Without "
            f"network these work: {offline}."
        ) from error
    except (RuntimeError, ValueError) as error:
        reason, _, _ = str(error).removeprefix(f"{name}: ").partition("\n")
        raise Refused(f"{name} could not be loaded: {reason}") from error
    except (TypeError, AttributeError, LookupError, AssertionError) as error:  # by architectures, for their arguments
        reason, _, _ = f"{type(error).__name__}: {error}".partition("\n")
        raise Refused(f"{name} could not be loaded: {reason}") from error


def _checked(name: str) -> str:
    """Check the size of a model before memory is allocated and weights are downloaded. Return the name to load it by:
    that of a repository has the commit that was checked, since its owner can change it at any time."""
    with _failures(name):
        source = _checked_repository(name) if name.startswith(_HUB) else name
        with torch.device("meta"):
            model = timm.create_model(source)
    found = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    if found > MOST_PARAMETERS:
        raise Refused(
            f"{name} has {found / 1e6:,.0f} million parameters; visitors can load models of up to "
            f"{MOST_PARAMETERS / 1e6:,.0f} million. Whoever runs this page can offer it with --model."
        )
    return source


def _checked_repository(name: str) -> str:
    repo, _, revision = name.removeprefix(_HUB).partition("@")
    path = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
    config, _ = read_config(path, name)
    commit = path.parent.name
    override = config.get("pretrained_cfg", config).get("hf_hub_filename")
    files = (override,) if override else FOREIGN_WEIGHTS
    if not any(isinstance(try_to_load_from_cache(repo, file, revision=commit), str) for file in files):
        _check_files(name, repo, commit, {Path(file).stem for file in files})
    return f"{_HUB}{repo}@{commit}"


def _check_files(name: str, repo: str, commit: str, stems: set[str]) -> None:
    for file in HfApi().model_info(repo, revision=commit, files_metadata=True).siblings or ():
        size = file.size or 0
        if Path(file.rfilename).stem in stems and size > MOST_BYTES:
            raise Refused(
                f"{name}: {file.rfilename} has {size / 1e9:,.1f} GB; visitors can load files of up to "
                f"{MOST_BYTES / 1e9:,.0f} GB. Whoever runs this page can offer it with --model."
            )
