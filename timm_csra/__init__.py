"""Class-specific residual attention for any timm image classifier, without retraining."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .agreement import LamChoice, choose_lam
from .config import CSRAConfig
from .errors import UnsupportedModelError
from .hub import create_model, from_pretrained, push_to_hub, save_pretrained
from .inspection import Explanation, explain
from .patching import is_wrapped, score_maps, unwrap, wrap
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .evaluation.tuning import TuneResult, tune
    from .visualize import overlay

_WITH_EXTRAS = {"tune": ".evaluation.tuning", "TuneResult": ".evaluation.tuning", "overlay": ".visualize"}


def __getattr__(name: str) -> Any:
    """Import names that need an extra when they are first used."""
    if name in _WITH_EXTRAS:
        return getattr(import_module(_WITH_EXTRAS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CSRAConfig",
    "Explanation",
    "LamChoice",
    "TuneResult",
    "UnsupportedModelError",
    "choose_lam",
    "create_model",
    "explain",
    "from_pretrained",
    "is_wrapped",
    "overlay",
    "push_to_hub",
    "save_pretrained",
    "score_maps",
    "tune",
    "unwrap",
    "wrap",
]
