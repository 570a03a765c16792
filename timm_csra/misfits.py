"""Weights that an architecture does not take, as timm builds it; and what to do about them before they are saved."""

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

# What the names of weights tell of what was done to a model, and how to undo it.
CHANGES = {
    ".parametrizations.": "Its layers are parametrized: undo that with torch.nn.utils.parametrize."
    "remove_parametrizations(layer, 'weight') for each of them, then save.",
    ".weight_g": "It has torch.nn.utils.weight_norm: undo that with torch.nn.utils.remove_weight_norm(layer), then "
    "save.",
    ".weight_orig": "It has torch.nn.utils.spectral_norm or prune: undo that with torch.nn.utils.remove_spectral_norm("
    "layer) or prune.remove(layer, 'weight'), then save.",
    "_orig_mod.": "One of its layers is compiled: save the model first, then compile.",
}
REPARAMETERISED = (
    "It is reparameterised: save the model as it was before timm.utils.reparameterize_model, and reparameterise what "
    "from_pretrained gives."
)


@dataclass(frozen=True)
class Misfits:
    """How weights differ from those of an architecture; false where they fit.

    Attributes:
        missing: names of weights that the architecture has and that were not found.
        unexpected: names of weights that were found and that the architecture does not have.
        reshaped: names of weights of another shape, with the shape that was found and the one that was expected.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, tuple[Shape, Shape]]

    @classmethod
    def of(cls, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> "Misfits":
        return cls(
            tuple(sorted(expected.keys() - found.keys())),
            tuple(sorted(found.keys() - expected.keys())),
            {
                key: (found[key], expected[key])
                for key in sorted(found.keys() & expected.keys())
                if found[key] != expected[key]
            },
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def listed(self, most: int | None = None) -> str:
        """All of them by name, or `most` of each kind."""
        shapes = [f"{key} (found {found}, expected {expected})" for key, (found, expected) in self.reshaped.items()]
        kinds = {"missing": list(self.missing), "unexpected": list(self.unexpected), "of another shape": shapes}
        texts = []
        for kind, names in kinds.items():
            more = f" and {len(names) - most} more" if most is not None and len(names) > most else ""
            if names:
                texts.append(f"{kind}: {', '.join(names[:most])}{more}")
        return "; ".join(texts)

    def remedy(self, classes: int) -> str:
        """What to do, so that the model can be saved. `classes` is what its `num_classes` says."""
        counts = {found[0] for found, expected in self.reshaped.values() if found[1:] == expected[1:]}
        if len(counts) == 1 and all(expected[0] == classes for _, expected in self.reshaped.values()):
            (count,) = counts
            return (
                f"The classifier gives {count} classes and model.num_classes says {classes}: set model.num_classes = "
                f"{count} too, or make the classifier with model.reset_classifier({count})."
            )
        for part, advice in CHANGES.items():
            if any(part in key for key in self.unexpected):
                return advice
        return (
            "Layers of your own cannot be saved in timm's format: make the classifier with model.reset_classifier("
            f"{classes}), put back the layers that timm builds, or keep the model with torch.save(model.state_dict()) "
            "and the code that changes it."
        )
