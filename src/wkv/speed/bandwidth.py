"""How fast this machine reads memory: the limit of decoding, which reads every weight once per token."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import torch
from torch import Tensor

from wkv import native
from wkv.errors import WkvError

MEBIBYTE = 2**20
HUGE_PAGE = 2 * MEBIBYTE


def buffer(size: int | None = None, huge_pages: bool = False) -> Tensor:
    """Memory to read: `size` bytes, by default at least 512 MiB and 8 times the last-level cache.

    Args:
        huge_pages: ask for pages of 2 MiB (Linux; elsewhere the same as without). With pages of 4 KiB, in which mapped
            files lie, part of the time goes into finding the pages.
    """
    size = size or max(512 * MEBIBYTE, 8 * last_level_cache())
    size -= size % 512
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
    else:
        memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % HUGE_PAGE :][:size]
    return aligned.fill_(1)  # pages that were never written are all one page of zeros


def read_seconds(memory: Tensor, threads: int, passes: int = 5) -> list[float]:
    """Seconds of each of `passes` passes over `memory`, after one that is not counted.

    Raises:
        WkvError: without the native library, or if it did not read everything.
    """
    read = native.function("wkv_read_memory", "pii")
    expected = memory.numel() // 8 * 0x0101010101010101 % 2**64
    times = []
    for _ in range(passes + 1):
        started = time.perf_counter()
        found = read(memory.data_ptr(), memory.numel(), threads)
        times.append(time.perf_counter() - started)
        if found % 2**64 != expected:
            raise WkvError("the native library did not read the whole buffer; reinstall wkv")
    return times[1:]


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core (Linux); 0 where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=0)
