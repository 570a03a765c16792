"""Class-specific residual attention for any timm image classifier, without retraining."""

from .config import CSRAConfig
from .errors import UnsupportedModelError
from .hub import create_model, from_pretrained, push_to_hub, save_pretrained
from .inspection import Explanation, explain
from .patching import is_wrapped, score_maps, unwrap, wrap
from .version import __version__ as __version__

__all__ = [
    "CSRAConfig",
    "Explanation",
    "UnsupportedModelError",
    "create_model",
    "explain",
    "from_pretrained",
    "is_wrapped",
    "push_to_hub",
    "save_pretrained",
    "score_maps",
    "unwrap",
    "wrap",
]
