"""Gains in resamples of the images, as a record keeps them: text that is a third of what JSON numbers would take."""

import base64

import numpy as np
from numpy.typing import NDArray


def packed(gains: NDArray[np.float64]) -> str:
    """Base64 of half-precision numbers, lowest byte first: three digits, of which a standard error is taken.

    Example:
        >>> packed(np.array([0.5, -1.0]))
        'ADgAvA=='
    """
    return base64.b64encode(gains.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float64]:
    """What `packed` has made text of, `(B,)`.

    Raises:
        ValueError: it was made by something else.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float64)
