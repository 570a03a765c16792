"""Pack the gains in bootstrap resamples into text for a record, a third as long as JSON numbers."""

import base64

import numpy as np
from numpy.typing import NDArray


def packed(gains: NDArray[np.float64]) -> str:
    """Encode gains `(B,)` as Base64 of little-endian float16. Three digits are enough for a standard error.

    Example:
        >>> packed(np.array([0.5, -1.0]))
        'ADgAvA=='
    """
    return base64.b64encode(gains.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float64]:
    """Decode the gains `(B,)` from the text of `packed`.

    Raises:
        ValueError: the text is not one that `packed` returns.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float64)
