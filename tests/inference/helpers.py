"""A tiny RWKV-7, and a model that writes a given text and whose state is the list of what it has read."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import wkv
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.tokenizers.base import TableTokenizer, as_bytes

HISTORY = 400


@functools.cache
def tiny_model() -> LanguageModel:
    """A byte model whose weights are random enough for its predictions to depend on all it has read."""
    model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=2, head_size=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def read_all(model: LanguageModel, ids: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
    """Log-probabilities [T, V] after every token, and the final state, by one plain forward pass."""
    with torch.no_grad():
        output = model(torch.tensor([list(ids)]), state)
    return output.logits[0].log_softmax(-1), output.state


def assert_same_state(found: State | None, expected: State, tolerance: float = 1e-5) -> None:
    """Equal tensors up to rounding."""
    assert found is not None
    for a, b in zip(found.layers, expected.layers, strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance)


class PieceTokenizer(TableTokenizer):
    """Ids 0..255 are bytes, then come pieces of several bytes, then the end-of-text id. Longest match."""

    def __init__(self, *pieces: str | bytes) -> None:
        super().__init__([bytes([value]) for value in range(256)] + [as_bytes(piece) for piece in pieces] + [b""])
        self.end = self.eos_id = 256 + len(pieces)

    def encode(self, text: str | bytes) -> list[int]:
        """Greedy longest match."""
        data, out = as_bytes(text), []
        ids = {piece: index for index, piece in enumerate(self._table) if piece}
        while data:
            piece = max((piece for piece in ids if data.startswith(piece)), key=len)
            out.append(ids[piece])
            data = data[len(piece) :]
        return out

    def to_dict(self) -> dict[str, Any]:
        """Not storable."""
        return {}


class ScriptModel(nn.Module):
    """Writes `script` (token ids) after a prompt of any length that starts anew at every `begin()`.

    Its state lists the tokens it has read: `history` [B, HISTORY], -1 where nothing was read, and `length` [B].
    Scripts are looked up by the first token of the prompt if a dictionary is given.
    """

    name = "script"

    def __init__(
        self, vocab_size: int, script: Sequence[int] | Mapping[int, Sequence[int]], prompt_length: int
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.emb = nn.Embedding(1, 1)
        self.tokenizer: Any = None
        self.tuned_state: Any = None
        self.initial_state: Any = None
        self.scripts = script if isinstance(script, Mapping) else {}
        self.script = [] if isinstance(script, Mapping) else list(script)
        self.prompt_length = prompt_length
        self.calls: list[tuple[int, int]] = []

    def init_state(self, batch_size: int) -> State:
        """Nothing read."""
        history = torch.full((batch_size, HISTORY), -1)
        return State(self.name, [{"history": history, "length": torch.zeros(batch_size, dtype=torch.long)}])

    def forward_features(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden values [B, T, 2]: number of tokens read before, and the first of them; only the last are right."""
        self.calls.append((tokens.shape[0], tokens.shape[1]))
        state = (state or self.init_state(tokens.shape[0])).clone()
        history, length = state.layers[0]["history"], state.layers[0]["length"]
        for row in range(tokens.shape[0]):
            real = tokens[row] if mask is None else tokens[row][mask[row]]
            history[row, length[row] : length[row] + len(real)] = real
            length[row] += len(real)
        last = torch.stack([length, history[:, 0]], -1).double()
        return last[:, None].expand(-1, tokens.shape[1], -1), state

    def forward_head(self, hidden: Tensor) -> Tensor:
        """Logits [B, V]: 30 for the next token of the script, else 0."""
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        for row, (length, first) in enumerate(hidden.tolist()):
            script = self.scripts.get(int(first), self.script)
            place = int(length) - self.prompt_length
            logits[row, script[place] if place < len(script) else 0] = 30.0
        return logits


def was_read(state: State | None) -> list[int]:
    """The tokens a `ScriptModel` has read."""
    assert state is not None
    layer = state.layers[0]
    return layer["history"][0, : int(layer["length"][0])].tolist()
