"""A page to try the library on photographs: `python -m timm_csra.demo`. Extra `demo`; also the app of a Hugging Face
Space.

A picture runs through the model once. Its per-location scores are kept, and lam and T only recombine them, so the tags
follow a slider at once.
"""

from importlib.util import find_spec

for _name in ("gradio", "matplotlib"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"timm_csra.demo needs {_name}, which is not installed: pip install 'timm-csra[demo]'", name=_name
        )

from .page import build, launch

__all__ = ["build", "launch"]
