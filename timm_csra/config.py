"""The two settings of class-specific residual attention, validated wherever they are set."""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any


def validate_lam(lam: Any) -> float:
    """Return `lam` as a float. TypeError if it is no real number, ValueError unless finite and >= 0."""
    if isinstance(lam, bool) or not isinstance(lam, Real):
        raise TypeError(f"lam must be a real number, got {lam!r} ({type(lam).__name__}).")
    value = float(lam)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"lam must be finite and at least 0, got {lam!r}. lam=0 is the plain model; try lam=0.1.")
    return value


def validate_temperature(temperature: Any) -> tuple[float, ...]:
    """Return `temperature` as a non-empty tuple of positive floats (`inf` allowed), one per head."""
    heads = tuple(temperature) if isinstance(temperature, (tuple, list)) else (temperature,)
    if not heads:
        raise ValueError(
            f"temperature must hold at least one value, got {temperature!r}. Use math.inf for the maximum."
        )
    for head in heads:
        if isinstance(head, bool) or not isinstance(head, Real):
            raise TypeError(
                "temperature must be a positive number, math.inf, or a tuple of them, "
                f"got {head!r} ({type(head).__name__})."
            )
        if not float(head) > 0:  # also catches NaN
            raise ValueError(
                f"temperature must be positive, got {head!r}. Use math.inf for the maximum over locations."
            )
    return tuple(float(head) for head in heads)


SCORES = ("logits", "log_softmax")


def validate_scores(value: Any) -> str:
    """Return `value` if it is one of `SCORES`. ValueError otherwise."""
    if value not in SCORES:
        raise ValueError(f"scores must be one of {', '.join(map(repr, SCORES))}, got {value!r}.")
    return str(value)


VERSION = 1  # of the form in which settings are stored

_VALIDATORS = {"lam": validate_lam, "temperature": validate_temperature, "scores": validate_scores}


@dataclass
class CSRAConfig:
    """Settings of a wrapped model, kept in `model.csra`; every assignment is validated.

    Args:
        lam: weight of the attention term, finite and >= 0. 0 is the plain model.
        temperature: the paper's T, positive; `math.inf` takes the maximum over locations. Several values are
            several heads whose attention terms are averaged. Always stored as a tuple.

    Raises:
        TypeError: a value of the wrong type (`bool` included).
        ValueError: `lam` negative, infinite or NaN; `temperature` empty, NaN or not positive.

    Example:
        >>> config = CSRAConfig(lam=0.1)
        >>> config.temperature
        (inf,)
        >>> config.temperature = (1, math.inf)
        >>> config
        CSRAConfig(lam=0.1, temperature=(1.0, inf))
    """

    lam: float = 0.1
    temperature: float | tuple[float, ...] = math.inf
    scores: str = field(default="logits", repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _VALIDATORS:
            raise AttributeError(f"CSRAConfig has no setting {name!r}; it has {', '.join(_VALIDATORS)}.")
        super().__setattr__(name, _VALIDATORS[name](value))

    def to_dict(self) -> dict[str, Any]:
        """For a configuration file: plain JSON values, with the version of this form."""
        return {"version": VERSION, "lam": self.lam, "temperature": ["inf" if math.isinf(t) else t for t in self.heads]}

    @classmethod
    def from_dict(cls, stored: Any) -> "CSRAConfig":
        """From what `to_dict` gave; nothing in it is trusted.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: another version, keys missing or unknown, or a value out of range.

        Example:
            >>> CSRAConfig.from_dict({"version": 1, "lam": 0.1, "temperature": ["inf"]})
            CSRAConfig(lam=0.1, temperature=(inf,))
        """
        if not isinstance(stored, dict):
            raise TypeError(f"found a {type(stored).__name__}, expected an object with version, lam and temperature.")
        if (version := stored.get("version")) != VERSION or isinstance(version, bool):
            raise ValueError(f"found version {version!r}, expected {VERSION}. A newer timm_csra may read it.")
        if stored.keys() != {"version", "lam", "temperature"}:
            raise ValueError(f"found {', '.join(map(str, stored))}; expected version, lam and temperature.")
        heads = stored["temperature"]
        if not isinstance(heads, list):
            raise TypeError(f'found temperature {heads!r}, expected a list such as ["inf"].')
        return cls(stored["lam"], tuple(math.inf if head == "inf" else head for head in heads))

    @property
    def heads(self) -> tuple[float, ...]:
        """`temperature` as it is stored: one value per head."""
        assert isinstance(self.temperature, tuple)
        return self.temperature
