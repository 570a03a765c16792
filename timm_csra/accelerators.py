"""Run forward passes on a device: precision, memory format, asynchronous copies and timing."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"  # bf16 where the device has it


def default_device() -> str:
    """Return the device type of this machine's accelerator, `cpu` where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def on_accelerator(device: torch.device | str) -> bool:
    """Return whether the device is an accelerator; models on a CPU keep float32 and their memory format."""
    return torch.device(device).type != "cpu"


def precision(asked: str, device: torch.device | str) -> str:
    """Resolve a requested precision to a name in `AMP`: `auto` is `bf16` on an accelerator that computes in bf16, and
    `none` on accelerators that only emulate it and on a CPU."""
    if asked != AUTO:
        return asked
    kind = torch.device(device).type
    if kind == "cuda":
        with torch.cuda.device(device):  # is_bf16_supported looks at the current device
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = kind == "xpu" and torch.xpu.is_bf16_supported()
    return "bf16" if supported else "none"


def autocast(device: torch.device | str, amp: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision in `AMP`."""
    dtype = AMP[amp]
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


def is_convolutional(model: nn.Module) -> bool:
    """Return whether the model has a convolution with overlapping windows, unlike that of a patch embedding."""
    return any(
        isinstance(module, nn.Conv2d)
        and any(kernel > stride for kernel, stride in zip(module.kernel_size, module.stride, strict=True))
        for module in model.modules()
    )


def in_channels_last(model: nn.Module) -> nn.Module:
    """Convert the weights of a convolutional model to channels_last, in place. The outputs of its convolutions are then
    channels_last, too, for images in any memory format."""
    if is_convolutional(model):
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)  # type: ignore[arg-type]
    return model


def to_device(model: nn.Module, device: torch.device | str, channels_last: bool) -> nn.Module:
    """Move a model to a device, in place."""
    model = model.to(device)
    return in_channels_last(model) if channels_last else model


def runs_ahead(device: torch.device | str) -> bool:
    """Return whether the device works asynchronously and has events."""
    return torch.device(device).type in ("cuda", "xpu")


def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU; return a function that waits for the copy and returns it."""
    if not runs_ahead(tensor.device):
        return tensor.cpu
    copy = tensor.to("cpu", non_blocking=True)  # in pinned memory, which is scarce: `wait` returns a clone and frees it
    arrived = torch.Event(tensor.device)
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy.clone()

    return wait


class DeviceClock:
    """Measures how long a device works on batches: on a GPU by events, else by wall-clock time.

    Example:
        >>> clock = DeviceClock("cpu")
        >>> for batch in clock.over([1, 2]):
        ...     time.sleep(0.01)
        >>> clock.seconds() >= 0.02
        True
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device, self._ahead = torch.device(device), runs_ahead(device)
        self._marks: list[tuple[Any, Any]] = []

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure the time from each batch to the request for the next one."""
        for batch in batches:
            begin = self._now()
            yield batch
            self._marks.append((begin, self._now()))

    def seconds(self) -> float:
        """Wait for the device, and return the total time in seconds."""
        if not self._ahead:
            return sum(end - begin for begin, end in self._marks)
        torch.accelerator.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3

    def _now(self) -> Any:
        if not self._ahead:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event
