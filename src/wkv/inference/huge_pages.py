"""Weights in large memory pages.

Decoding reads every weight once per token, and on many machines memory in pages of 2 MiB is read faster than memory in
pages of 4 KiB: fewer address translations, and the processor's prefetching stops at the end of a page. Mapped files lie
in small pages. On Linux `use_huge_pages` moves weights to memory for which the system is asked for large ones
(transparent huge pages, `madvise`); elsewhere it does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wkv.inference.native_rwkv7 import copied_names
from wkv.inference.pages import advise, give_back

_PAGE = 1 << 21
_SMALLEST = 1 << 14  # bytes; smaller tensors are not worth moving
_SLAB = 1 << 20
_HUGE_PAGE = 14  # <sys/mman.h>


def use_huge_pages(model: nn.Module) -> int:
    """Move the weights of a model on the CPU to large pages, in place.

    Embeddings, of which few rows are read, and what the native kernels copy anyway stay where they are. Pages of a
    mapped file that were read on the way are given back, so the resident size hardly changes. Parameters stay the same
    objects with new memory; views taken before keep the old.

    Returns:
        bytes moved; 0 where the system has no such pages.
    """
    if not sys.platform.startswith("linux"):
        return 0
    found = list(_weights(model))
    sizes = [-(-tensor.nbytes // 64) * 64 for _, _, tensor in found]
    arena = torch.empty(sum(sizes) + 2 * _PAGE, dtype=torch.uint8)
    at = -arena.data_ptr() % _PAGE
    # Whole large pages alone are asked for: most of another one might be memory that nothing uses.
    if not found or not advise(arena.data_ptr() + at, sum(sizes) // _PAGE * _PAGE, _HUGE_PAGE):
        return 0
    moved: dict[tuple[int, int], Tensor] = {}  # tied weights stay tied
    for (owner, name, tensor), size in zip(found, sizes, strict=True):
        key = (tensor.data_ptr(), tensor.nbytes)
        if key not in moved:
            moved[key] = _copy(tensor, arena[at : at + tensor.nbytes])
            at += size
        if name in owner._parameters:
            tensor.data = moved[key].view(tensor.shape)
        else:
            owner._buffers[name] = moved[key].view(tensor.shape)
    return sum(sizes)


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    copied = copied_names(model)
    for path, module in model.named_modules():
        if path.split(".")[0] == "emb":
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or tensor.device.type != "cpu" or tensor.nbytes < _SMALLEST:
                continue
            if f"{path}.{name}" not in copied:
                yield module, name, tensor


def _copy(tensor: Tensor, to: Tensor) -> Tensor:
    """The same values in `to` (bytes), slab by slab, so that file and copy are never resident together as a whole."""
    source = tensor.detach().contiguous().flatten().view(torch.uint8)
    for begin in range(0, len(source), _SLAB):
        part = source[begin : begin + _SLAB]
        to[begin : begin + _SLAB] = part
        give_back([part])
    return to.view(tensor.dtype)
