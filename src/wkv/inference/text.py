"""The text of one sequence as it grows byte by byte: stop strings, and whole characters only.

Works on bytes, because a token may end in the middle of a character. UTF-8 is self-synchronising: a stop string found
among bytes starts and ends at character boundaries.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextBuffer:
    """Collects bytes, looks for stop strings, and releases text that is certain not to belong to one.

    Args:
        stops: non-empty byte strings; the text ends before the first of them.
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=1)
        self._data = bytearray()
        self._released = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def size(self) -> int:
        """Number of bytes collected."""
        return len(self._data)

    @property
    def settled(self) -> int:
        """How many bytes cannot be part of a stop string that is still to be completed."""
        held = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, self.size), held, -1):
                if self._data.endswith(stop[:length]):
                    held = length
                    break
        return self.size - held

    def feed(self, chunk: bytes) -> int | None:
        """Add bytes. Returns where the earliest complete stop string starts, None while there is none."""
        start = max(0, self.size - self._longest + 1)
        self._data += chunk
        places = [self._data.find(stop, start) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)

    def release(self, end: int, final: bool = False) -> str:
        """The text of the bytes up to `end` that was not released before.

        A character whose last byte is still missing waits; with `final` it comes out as U+FFFD.
        """
        piece = self._decoder.decode(bytes(self._data[self._released : end]), final)
        self._released = max(self._released, end)
        return piece

    def slice(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`."""
        return bytes(self._data[start:end])
