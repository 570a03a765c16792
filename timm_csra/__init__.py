"""Class-specific residual attention for any timm image classifier, without retraining."""

from .config import CSRAConfig
from .errors import UnsupportedModelError
from .inspection import Explanation, explain
from .patching import is_wrapped, score_maps, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "CSRAConfig",
    "Explanation",
    "UnsupportedModelError",
    "explain",
    "is_wrapped",
    "score_maps",
    "unwrap",
    "wrap",
]
