"""From the name of a checkpoint to a model with what can be said of it: its kind of head, its loss, its classes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import gradio as gr
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from ..accelerators import default_device, on_accelerator, to_device
from ..inspection import Explanation, explain
from ..installed import WHEELS, file_of, installed_wheels
from ..trained import SIGMOID, SOFTMAX, class_names, read_trained

FILES = "file:"  # and ARCH@PATH
ONLINE = ("resnet50.a1_in1k", "convnext_tiny.fb_in1k")
# Known losses: EfficientNet-Lite and ConvNeXt of their publications, the A recipes of "ResNet strikes back".
_SOFTMAX_TRAINED = {*WHEELS, "convnext_tiny.fb_in1k"}
_SIGMOID_TAG = re.compile(r"\.(rsb_)?a[123]h?_in1k$")


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model in eval mode, on the accelerator if there is one.

    Attributes:
        name: as it was asked for.
        model: plain.
        explanation: of `explain`: the kind of head and the grid of locations.
        loss: `softmax` or `sigmoid`, what it was trained with; "" where that is not known.
    """

    name: str
    model: nn.Module
    explanation: Explanation
    loss: str

    def class_names(self, given: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the given names, else those of the model, each up to its first comma: `tabby` of `tabby, tabby cat`.

        Raises:
            gr.Error: there are more or fewer names than classes. The page shows the text.
        """
        count = self.explanation.num_classes
        if given and len(given) != count:
            raise gr.Error(f"{self.name}: --class-names has {len(given)} names, expected {count}.")
        try:
            return tuple(given) or tuple(name.split(",")[0] for name in class_names(self.model))
        except ValueError as error:
            raise gr.Error(str(error)) from error


def checkpoint(name: str, offered: Mapping[str, Sequence[str]]) -> Checkpoint:
    """Load a checkpoint by its name. Files are read only where they are offered, so that a visitor learns nothing of
    what is on this machine.

    Raises:
        gr.Error: no such checkpoint, it could not be downloaded, or it cannot be wrapped. The page shows the text.
    """
    name = name.strip()
    if not name:
        raise gr.Error("Choose a checkpoint first.")
    if name.startswith(FILES) and name not in offered:
        raise gr.Error("Files are only read where the page was started with them: --model file:ARCH@PATH.")
    return _load(name)


@lru_cache(maxsize=2)
def _load(name: str) -> Checkpoint:
    model, loss = _create(name)
    explanation = explain(model)
    if explanation.unsupported:
        raise gr.Error(explanation.unsupported)
    device = default_device()
    return Checkpoint(name, to_device(model, device, on_accelerator(device)), explanation, loss)


def _create(name: str) -> tuple[nn.Module, str]:
    if name.startswith(FILES):
        try:
            trained = read_trained(name.removeprefix(FILES))
            return trained.create(), trained.loss
        except ValueError as error:
            raise gr.Error(str(error)) from error
    wheel = file_of(WHEELS[name], ".pth") if name in WHEELS else None
    if not timm.is_model(name.removeprefix("hf-hub:")) and not name.startswith("hf-hub:"):
        raise gr.Error(f"timm has no model called {name!r}. Try resnet50.a1_in1k, or hf-hub:user/repository.")
    loss = SOFTMAX if name in _SOFTMAX_TRAINED else SIGMOID if _SIGMOID_TAG.search(name) else ""
    try:
        if wheel is None:
            return timm.create_model(name, pretrained=True).eval(), loss
        model = timm.create_model(name)
        tensors = torch.load(wheel, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
        return model.eval(), loss
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        offline = ", ".join(installed_wheels()) or "none is installed"
        raise gr.Error(
            f"{name} could not be downloaded: the Hugging Face Hub did not give it ({type(error).__name__}). Without "
            f"network these work: {offline}."
        ) from error
    except (RuntimeError, ValueError) as error:
        raise gr.Error(f"{name} could not be loaded: {str(error).splitlines()[0]}") from error
