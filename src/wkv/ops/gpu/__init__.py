"""GPU kernels in Triton: when they can run, and how they are launched. Nothing here imports triton before a call.

Where there is no GPU the kernels run in Triton's interpreter, if the process was started with TRITON_INTERPRET=1:
slowly, for tests, and only where the backend is asked for with `use_backend("triton")`.

Matrix products take operands of the type that `operands` names, sums and states are float32.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from wkv.errors import WkvError

SIZES = (16, 32, 64, 128, 256)  # of heads
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# The oldest GPUs with bfloat16 and asynchronous copies.
LEAST_CAPABILITY = (8, 0)

Run = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_instead: list[Run] = []


def unusable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`; None where they can."""
    if device.type not in ("cuda", "cpu"):
        return "runs on GPUs only"
    if not installed():
        return "triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if interpreted() else "runs on GPUs only"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _old(device.index if device.index is not None else torch.cuda.current_device())


# What torch.compiler.assume_constant_result does, but for its slow import: torch.compile does not trace this.
unusable.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def installed() -> bool:
    """Whether the triton package is there; does not import it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _old(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(index)
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        None if found >= LEAST_CAPABILITY else f"needs compute capability {least}, this GPU has {found[0]}.{found[1]}"
    )


def unfit(tensors: Sequence[Tensor | None], size: int | None = None) -> str | None:
    """Why the kernels cannot take these arguments, of heads of `size` channels; None where they can."""
    for x in tensors:
        if x is not None and x.is_floating_point() and x.dtype not in TYPES:
            return f"takes float32, bfloat16 and float16, found {x.dtype}"
    if size is not None and size not in SIZES:
        return f"takes heads of {', '.join(map(str, SIZES))} channels, found {size}"
    return None


def operands(dtype: torch.dtype) -> str:
    """What matrix products of inputs of this type are made of, see `blocks.dot`.

    float16 has the digits of tf32 but not the range that products of decays need.
    """
    return {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}[dtype]


def flags(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """bool [B, T] as bytes, which kernels can load."""
    return tuple(None if x is None else x.contiguous().view(torch.uint8) for x in tensors)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel on the device of its first tensor.

    Args:
        kernel: made by `triton.jit`.
        grid: how many programs, up to three numbers.
        arguments: tensors, None, numbers.
        options: constants of the kernel, num_warps, num_stages.

    Raises:
        WkvError: if the grid is larger than a GPU takes.
    """
    if max(grid[1:], default=0) > 65535:
        raise WkvError(
            f"a batch of {grid[1]} x {grid[2:]} programs is more than a GPU takes at once; use a smaller one"
        )
    if _instead:
        _instead[-1](kernel, grid, arguments, options)
        return
    first = next(x for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, **options)


@contextmanager
def launching(run: Run) -> Iterator[None]:
    """Inside the `with` block `run(kernel, grid, arguments, options)` is called in place of every launch."""
    _instead.append(run)
    try:
        yield
    finally:
        _instead.pop()
