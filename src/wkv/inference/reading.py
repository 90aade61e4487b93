"""How tokens are read: by the model itself, on a GPU through CUDA graphs, on the CPU by native kernels that know it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from wkv.inference import graphs
from wkv.inference.native_rwkv7 import NativeRWKV7, unsupported
from wkv.layers.language_model import LanguageModel
from wkv.ops.dispatch import forced_backend
from wkv.state import State


class Reader(Protocol):
    """Reads tokens [B, T] (mask [B, T]: False tokens do not exist), returns the last logits [B, V] and the state."""

    def read(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """`inplace` allows to write to `state` instead of making a new one; logits belong to each row's last token."""
        ...


class ModelReader:
    """Reads with the model's own forward pass; the last token of every row must be real."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def read(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """See `Reader`."""
        hidden_BTC, state = self._model.forward_features(tokens, state, mask=mask)
        return self._model.forward_head(hidden_BTC[:, -1]), state


def reader(model: LanguageModel) -> Reader:
    """The fastest reader for `model` as it is now; `wkv.ops.use_backend` with any name but "native" rules that out."""
    if forced_backend() in (None, "native") and unsupported(model) is None:
        return NativeRWKV7(model)
    plain = ModelReader(model)
    return plain if graphs.unfit(model) is not None else graphs.GraphReader(model, plain)
