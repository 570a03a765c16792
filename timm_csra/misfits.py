"""Compare weights with those of an architecture as timm builds it, and advise how to make a model saveable."""

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

# Parts of weight names that show how a model was changed, and how to undo the change.
CHANGES = {
    ".parametrizations.": "Some layers are parametrized: undo that with torch.nn.utils.parametrize."
    "remove_parametrizations(layer, 'weight') for each of them, then save.",
    ".weight_g": "A layer has torch.nn.utils.weight_norm: undo that with torch.nn.utils.remove_weight_norm(layer), "
    "then save.",
    ".weight_orig": "A layer has torch.nn.utils.spectral_norm or prune: undo that with torch.nn.utils."
    "remove_spectral_norm(layer) or prune.remove(layer, 'weight'), then save.",
    "_orig_mod.": "One of its layers is compiled: save the model first, then compile.",
}
REPARAMETERISED = (
    "The model is reparameterised: save it as it was before timm.utils.reparameterize_model, and reparameterise the "
    "model that from_pretrained returns."
)


@dataclass(frozen=True)
class Misfits:
    """Differences between weights and those of an architecture; false if there are none.

    Attributes:
        missing: names of weights that the architecture has and that were not found.
        unexpected: names of weights that were found and that the architecture does not have.
        reshaped: names of weights with a wrong shape, with the shape that was found and the expected one.
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
        """List all differences by name, or at most `most` of each kind."""
        shapes = [f"{key} (found {found}, expected {expected})" for key, (found, expected) in self.reshaped.items()]
        kinds = {"missing": list(self.missing), "unexpected": list(self.unexpected), "of another shape": shapes}
        texts = []
        for kind, names in kinds.items():
            more = f" and {len(names) - most} more" if most is not None and len(names) > most else ""
            if names:
                texts.append(f"{kind}: {', '.join(names[:most])}{more}")
        return "; ".join(texts)

    def remedy(self, classes: int) -> str:
        """Advise what to do so that the model can be saved. `classes` is its `num_classes`."""
        counts = {found[0] for found, expected in self.reshaped.values() if found[1:] == expected[1:]}
        if len(counts) == 1 and all(expected[0] == classes for _, expected in self.reshaped.values()):
            (count,) = counts
            return (
                f"The classifier has {count} classes, but model.num_classes is {classes}: set model.num_classes = "
                f"{count}, or make the classifier with model.reset_classifier({count})."
            )
        for part, advice in CHANGES.items():
            if any(part in key for key in self.unexpected):
                return advice
        return (
            "timm's format cannot hold layers of your own: make the classifier with model.reset_classifier("
            f"{classes}), put back the layers that timm builds, or save model.state_dict() with torch.save and keep "
            "the code that changes the model."
        )
