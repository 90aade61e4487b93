"""Recurrences as pure functions, time first: [B, T, ...]. They return `(y, state)`, states in float32; `bi_wkv` y.

`rosa` is about symbols and has no backends.
"""

from wkv.ops.bi_wkv import bi_wkv
from wkv.ops.dispatch import Backend, BackendStatus, backends, register, use_backend
from wkv.ops.linear_attention import linear_attention
from wkv.ops.rosa import rosa
from wkv.ops.taylor import taylor_attention, taylor_features
from wkv.ops.wkv4 import wkv4
from wkv.ops.wkv5 import wkv5
from wkv.ops.wkv6 import wkv6
from wkv.ops.wkv7 import wkv7

__all__ = [
    "Backend",
    "BackendStatus",
    "backends",
    "bi_wkv",
    "linear_attention",
    "register",
    "rosa",
    "taylor_attention",
    "taylor_features",
    "use_backend",
    "wkv4",
    "wkv5",
    "wkv6",
    "wkv7",
]
