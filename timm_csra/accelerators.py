"""How forward passes run on a device: in which precision, and how images lie in its memory."""

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
    """Name the accelerator of this machine, `cpu` where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def on_accelerator(device: torch.device | str) -> bool:
    """Whether it is one: a CPU keeps float32, and the layout of its models."""
    return torch.device(device).type != "cpu"


def precision(asked: str, device: torch.device | str) -> str:
    """Give the name in `AMP` that is meant by it on a device: `auto` is `bf16` on an accelerator that computes in it,
    `none` on those that only emulate it, and on a CPU."""
    if asked != AUTO:
        return asked
    kind = torch.device(device).type
    if kind == "cuda":
        with torch.cuda.device(device):  # the question is of the current one
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = kind == "xpu" and torch.xpu.is_bf16_supported()
    return "bf16" if supported else "none"


def autocast(device: torch.device | str, amp: str) -> AbstractContextManager[Any]:
    """Make operations run in the precision called so."""
    dtype = AMP[amp]
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


def is_convolutional(model: nn.Module) -> bool:
    """Whether windows of a convolution overlap: those of a patch embedding do not."""
    return any(
        isinstance(module, nn.Conv2d)
        and any(kernel > stride for kernel, stride in zip(module.kernel_size, module.stride, strict=True))
        for module in model.modules()
    )


def in_channels_last(model: nn.Module) -> nn.Module:
    """Lay out the weights of a convolutional model so, in place. What its convolutions make of images follows, however
    the images lie in memory."""
    if is_convolutional(model):
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)  # type: ignore[arg-type]
    return model


def to_device(model: nn.Module, device: torch.device | str, channels_last: bool) -> nn.Module:
    """Move a model, in place."""
    model = model.to(device)
    return in_channels_last(model) if channels_last else model


def runs_ahead(device: torch.device | str) -> bool:
    """Whether Python goes on while the device computes, and can be told by an event when it is done."""
    return torch.device(device).type in ("cuda", "xpu")


def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU; calling what is returned waits for it and gives the copy."""
    if not runs_ahead(tensor.device):
        return tensor.cpu
    copy = tensor.to("cpu", non_blocking=True)  # pinned memory, which is scarce and slow to get
    arrived = torch.Event(tensor.device)
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy.clone()

    return wait


class DeviceClock:
    """Measures how long a device works on batches: on a GPU by its own events, else while Python handles them.

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
        """Give the batches; what the loop's body does with one, up to asking for the next, is measured."""
        for batch in batches:
            begin = self._now()
            yield batch
            self._marks.append((begin, self._now()))

    def seconds(self) -> float:
        """Wait for the device, and add up."""
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
