"""Try the library on photographs in a browser: `python -m timm_csra.demo` (extra `demo`); also the app of a Hugging
Face Space.

The model runs once on each picture. lam and T only recombine its per-location scores, so the tags follow the sliders
immediately.
"""

from importlib.util import find_spec

for _name in ("gradio", "matplotlib"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"timm_csra.demo needs {_name}, which is not installed: pip install 'timm-csra[demo]'", name=_name
        )

from .page import build, launch

__all__ = ["build", "launch"]
