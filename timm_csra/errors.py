"""The one error class of the library."""


class UnsupportedModelError(ValueError):
    """The model cannot be wrapped; the text says which model, what was found and what to do."""
