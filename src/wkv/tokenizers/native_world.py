"""The World encoder in native code: same ids as the Python one in `world.py`, which remains the reference."""

from __future__ import annotations

import ctypes
import sys
import weakref
from array import array
from typing import TYPE_CHECKING

from wkv.errors import TokenizerError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK = 1 << 18  # bytes per call: bounds the memory for ids, and how long Ctrl-C waits


def usable() -> bool:
    """Whether native code can be called. It is not looked for without torch, whose import `wkv.native` asks for:
    a program that only wants ids should not wait seconds for it."""
    if "torch" not in sys.modules:
        return False
    from wkv import native

    if not native.available():
        return False
    try:
        native.function("wkv_world_encode", "ppiipp")
    except AttributeError:
        return False  # a partial build, as kernel developers make it
    return True


class NativeWorld:
    """Greedy longest match over a fixed list of tokens. Immutable: threads may share it, and run at the same time.

    Args:
        joined: the bytes of all tokens, one after the other.
        offsets: uint32; the token with id i is `joined[offsets[i] : offsets[i + 1]]`.
        num_tokens: ids 1 .. num_tokens are encoded; id 0 and those above stand for nothing.

    Raises:
        TokenizerError: if the list cannot be used (see native/src/tokenizer.cpp).
    """

    def __init__(self, joined: bytes, offsets: array[int], num_tokens: int) -> None:
        from wkv import native

        self._joined, self._offsets = joined, offsets
        self._encode = native.function("wkv_world_encode", "ppiipp")
        self._decode = native.function("wkv_world_decode", "pppip")
        first = _address(offsets) + offsets.itemsize  # id 0 is no token
        self._table = native.function("wkv_world_create", "ppi", "p")(joined, first, num_tokens)
        if self._table is None:
            raise TokenizerError("the native World encoder cannot be made: damaged vocabulary, or too little memory")
        self.num_bytes: int = native.function("wkv_world_memory", "p")(self._table)
        weakref.finalize(self, native.function("wkv_world_free", "p", ""), self._table)

    def encode(self, data: bytes, stop: int) -> tuple[list[int], int]:
        """Ids of the tokens that begin in `data[:stop]`, and where the next one begins (from `stop` on)."""
        ids: list[int] = []
        position, block = ctypes.c_int64(0), array("H", bytes(2 * min(stop, _BLOCK)))
        while position.value < stop:
            count = self._block(data, min(position.value + _BLOCK, stop), position, _address(block))
            ids += block[:count].tolist()
        return ids, position.value

    def encode_array(self, data: bytes) -> NDArray[np.uint16]:
        """Ids as uint16 [T]."""
        import numpy as np

        ids = np.empty(len(data), np.uint16)  # most of it is never touched, so it takes no memory
        position, count = ctypes.c_int64(0), 0
        while position.value < len(data):
            stop = min(position.value + _BLOCK, len(data))
            count += self._block(data, stop, position, ids.ctypes.data + count * ids.itemsize)
        ids.resize(count, refcheck=False)
        return ids

    def decode(self, ids: array[int]) -> bytes:
        """The bytes of uint16 ids, joined."""
        tables = self._joined, _address(self._offsets), _address(ids), len(ids)
        out = array("B", bytes(self._decode(*tables, None)))
        self._decode(*tables, _address(out))
        return out.tobytes()

    def _block(self, data: bytes, stop: int, position: ctypes.c_int64, out: int) -> int:
        count: int = self._encode(self._table, data, len(data), stop, ctypes.byref(position), out)
        return count


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]
