"""The app of a Hugging Face Space: what `python -m timm_csra.demo` serves."""

from timm_csra.demo import launch

launch()
