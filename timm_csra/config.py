"""The settings of class-specific residual attention, validated wherever they are set."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any


def validate_lam(lam: Any) -> float:
    """Return `lam` as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is negative, infinite or NaN.
    """
    if isinstance(lam, bool) or not isinstance(lam, Real):
        raise TypeError(f"lam must be a real number, got {lam!r} ({type(lam).__name__}).")
    value = _as_float("lam", lam)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"lam must be finite and at least 0, got {lam!r}. lam=0 is the plain model; try lam=0.1.")
    return value


def validate_temperature(temperature: Any) -> tuple[float, ...]:
    """Return `temperature` as a non-empty tuple of positive floats (`inf` allowed).

    Raises:
        TypeError: a value is not a real number.
        ValueError: there is no value, or one is not positive.
    """
    values = tuple(temperature) if isinstance(temperature, (tuple, list)) else (temperature,)
    if not values:
        raise ValueError(
            f"temperature must hold at least one value, got {temperature!r}. Use math.inf for the maximum."
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                "temperature must be a positive number, math.inf, or a tuple of them, "
                f"got {value!r} ({type(value).__name__})."
            )
        if not _as_float("temperature", value) > 0:  # also catches NaN
            raise ValueError(
                f"temperature must be positive, got {value!r}. Use math.inf for the maximum over locations."
            )
    return tuple(float(value) for value in values)


def _as_float(name: str, value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, found a number above 1.8e308.") from None


LOGITS, LOG_SOFTMAX = SCORES = ("logits", "log_softmax")


def validate_scores(scores: Any) -> str:
    """Return `scores` unchanged if it is one of `SCORES`.

    Raises:
        TypeError: it is not a string.
        ValueError: it is another string.
    """
    if not isinstance(scores, str):
        raise TypeError(f"scores must be {_EITHER}, got {scores!r} ({type(scores).__name__}).")
    if scores not in SCORES:
        raise ValueError(f"scores must be {_EITHER}, got {scores!r}.")
    return scores


_EITHER = " or ".join(map(repr, SCORES))
VERSION = 2  # of the stored settings; version 1 has no `scores`, since logits were the only kind
_STORED = {1: ("version", "lam", "temperature"), 2: ("version", "lam", "temperature", "scores")}

_VALIDATORS = {"lam": validate_lam, "temperature": validate_temperature, "scores": validate_scores}


@dataclass
class CSRAConfig:
    """Settings of a wrapped model, stored in `model.csra`; every assignment is validated.

    Args:
        lam: weight of the attention term, finite and >= 0. 0 is the plain model.
        temperature: the paper's T, positive; `math.inf` takes the maximum over locations. With several values, their
            attention terms are averaged. Always stored as a tuple.
        scores: the scores that the attention is computed from: "logits", as in the paper, or "log_softmax", the
            log-probabilities at each location.

    Raises:
        TypeError: a value has the wrong type (`bool` included).
        ValueError: `lam` is negative, infinite or NaN; `temperature` is empty, NaN or not positive; `scores` is
            unknown.

    Example:
        >>> config = CSRAConfig(lam=0.1)
        >>> config.temperature
        (inf,)
        >>> config.temperature = (1, math.inf)
        >>> config
        CSRAConfig(lam=0.1, temperature=(1.0, inf), scores='logits')
    """

    lam: float = 0.1
    temperature: float | tuple[float, ...] = math.inf
    scores: str = LOGITS

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _VALIDATORS:
            raise AttributeError(f"CSRAConfig has no setting {name!r}; it has {', '.join(_VALIDATORS)}.")
        super().__setattr__(name, _VALIDATORS[name](value))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values with a version, for a configuration file."""
        temperatures = ["inf" if math.isinf(t) else t for t in self.temperatures]
        return {"version": VERSION, "lam": self.lam, "temperature": temperatures, "scores": self.scores}

    @classmethod
    def from_dict(cls, stored: Any) -> "CSRAConfig":
        """Create the settings from the output of `to_dict`. Everything in it is validated, since files may come from
        anyone.

        Raises:
            TypeError: a value has the wrong type.
            ValueError: the version is unknown, keys are missing or unknown, or a value is out of range.

        Example:
            >>> CSRAConfig.from_dict({"version": 2, "lam": 0.3, "temperature": ["inf"], "scores": "log_softmax"})
            CSRAConfig(lam=0.3, temperature=(inf,), scores='log_softmax')
        """
        if not isinstance(stored, dict):
            raise TypeError(f"found a {type(stored).__name__}, expected an object with {', '.join(_STORED[VERSION])}.")
        version = stored.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version not in _STORED:
            known = " or ".join(map(str, _STORED))
            raise ValueError(f"found version {version!r}, expected {known}. A newer timm_csra may read it.")
        if stored.keys() != set(_STORED[version]):
            raise ValueError(
                f"found {', '.join(map(str, stored))}; expected {', '.join(_STORED[version])} in version {version}."
            )
        temperatures = stored["temperature"]
        if not isinstance(temperatures, list):
            raise TypeError(f'found temperature {temperatures!r}, expected a list such as ["inf"].')
        temperature = tuple(math.inf if t == "inf" else t for t in temperatures)
        return cls(stored["lam"], temperature, stored.get("scores", LOGITS))  # version 1 has no `scores`

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """Kind of scores and temperature of each attention term; the terms are averaged."""
        return tuple((self.scores, temperature) for temperature in self.temperatures)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """`temperature` with the type in which it is stored, a tuple."""
        assert isinstance(self.temperature, tuple)
        return self.temperature
