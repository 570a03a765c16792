"""Check models and the images of a user's loader before they are run."""

from torch import Tensor, nn

from .errors import describe


def check_eval(model: nn.Module) -> None:
    """Raise ValueError if any module of the model is in training mode: a forward pass would change its statistics."""
    for name, module in model.named_modules():
        if module.training:
            where = f"`{name}`" if name else "a model"
            raise ValueError(
                f"{describe(model)}: found {where} in training mode, expected eval: call model.eval() first."
            )


def as_weights(model: nn.Module, images: Tensor) -> Tensor:
    """Return images `(N, C, H, W)` on the device and in the dtype of the model's weights.

    Raises:
        TypeError: the images have another shape, or are not floats (pixels that no transform has scaled).
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise TypeError(
            f"{describe(model)}: found images {tuple(images.shape)} of {images.dtype}; expected floats (N, C, H, W), "
            "as the model's transform gives them: timm.data.create_transform(**timm.data.resolve_model_data_config("
            "model))."
        )
    weight = next(model.parameters())
    dtype = weight.dtype if weight.is_floating_point() else images.dtype
    return images.to(weight.device, dtype, non_blocking=True)
