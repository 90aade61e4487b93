"""Memory pages of mapped files that nobody needs any more.

Weights of a model that was loaded from a mapped file are the file's pages. Where they were copied for faster reading,
those pages would count as the process's own memory for no use. The same holds for the code of a large library that ran
once, while it was loaded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from torch import Tensor

_RANDOM, _DO_NOT_NEED = 1, 4  # <sys/mman.h>
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61  # bits of a page in /proc/PID/pagemap


def advise(address: int, length: int, advice: int) -> bool:
    """`madvise` of Linux; whether the system took the advice."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(libc.madvise(address, length, advice) == 0)


def read_singly(table: Tensor) -> None:
    """Say that few rows of a table will be read, here and there (Linux; elsewhere nothing).

    Where the table is in a mapped file, the system then fetches the pages of these rows and not their surroundings.
    """
    if sys.platform.startswith("linux"):
        for first, end in _whole_pages([table]):
            advise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, _RANDOM)


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let go of the pages of a mapped file in which these contiguous CPU tensors lie (Linux; elsewhere nothing).

    The tensors stay valid: when they are read again the pages come back from the file, which the system keeps in its
    cache while memory suffices. Memory that is not the file's own is left alone: tensors in ordinary memory, and
    weights of a mapped file that were changed.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for first, end in _whole_pages(tensors):
                if _are_clean(pagemap, first, end):
                    advise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, _DO_NOT_NEED)
    except OSError:
        return  # no /proc: pages stay where they are


def give_back_libraries(prefix: str = "libtorch") -> None:
    """Let go of the code pages of loaded libraries (Linux; elsewhere nothing).

    Loading torch touches some 50 MB of its code that generating text never runs. What is needed again comes back from
    the system's cache of the file, at a fault per 4 KiB page. The system could take these pages by itself when memory
    runs short; given back, they do not count for this process meanwhile.

    Args:
        prefix: of the libraries' file names.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        with (
            open("/proc/self/maps", encoding="utf-8") as maps,
            open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
        ):
            for line in maps.read().splitlines():
                span, access, *_, path = line.split(maxsplit=5)
                if access != "r-xp" or not os.path.basename(path).startswith(prefix):
                    continue
                first, end = (int(address, 16) // mmap.PAGESIZE for address in span.split("-"))
                if _are_clean(pagemap, first, end):
                    advise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, _DO_NOT_NEED)
    except OSError:
        return  # no /proc


def _whole_pages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Numbers of the pages [first, end) that lie in these tensors, neighbours in memory taken together."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    merged: list[list[int]] = []
    for begin, end in spans:
        if merged and begin - merged[-1][1] < 64:  # safetensors puts its tensors side by side
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    for begin, end in merged:
        first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
        if first < last:
            yield first, last


def _are_clean(pagemap: BinaryIO, first: int, end: int) -> bool:
    """Whether what lies in these pages is also in a file."""
    size = array("Q").itemsize
    pagemap.seek(first * size)
    pages = array("Q", pagemap.read((end - first) * size))
    return len(pages) == end - first and not any(
        page & _SWAPPED or (page & _PRESENT and not page & _OF_A_FILE) for page in pages
    )
