"""The one error class of the library, and how its texts call a model."""

from torch import nn


class UnsupportedModelError(ValueError):
    """The model cannot be wrapped; the text says which model, what was found and what to do."""


def describe(model: nn.Module) -> str:
    """How error texts call a model: its timm architecture, else its class."""
    cfg = getattr(model, "pretrained_cfg", None)
    return (cfg.get("architecture") if isinstance(cfg, dict) else None) or type(model).__name__
