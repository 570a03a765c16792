"""The library's one error class, and the name under which error messages mention a model."""

from torch import nn


class UnsupportedModelError(ValueError):
    """Raised for a model that cannot be wrapped; the message names the model, what was found and what to do."""


def describe(model: nn.Module) -> str:
    """Return the name of a model for error messages: its timm architecture, else its class."""
    cfg = getattr(model, "pretrained_cfg", None)
    return (cfg.get("architecture") if isinstance(cfg, dict) else None) or type(model).__name__
