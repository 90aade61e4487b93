"""RWKV-7 on the CPU through the native kernels: one call reads any number of tokens of any number of sequences.

Weights are used where they lie: float32, bfloat16 or float16 parameters of the model, or the codes of quantised
layers, be they in memory or in a mapped file. Activations and states are float32.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from wkv import native
from wkv.errors import WkvError
from wkv.inference.pages import give_back, read_singly
from wkv.layers.language_model import LanguageModel, Output
from wkv.models.rwkv7 import RWKV7, RWKV7Config
from wkv.quantization.frozen import is_frozen
from wkv.quantization.modules import QuantizedEmbedding, QuantizedLinear
from wkv.state import State

_HEAD_SIZES = (16, 32, 64, 128, 256)
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_COLUMNS = 3  # offset of the format numbers of matrices stored [K, N]
_LOW_RANK = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
_LINEAR = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
_VECTORS = (
    "ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias",
    *(f"att.x_{letter}" for letter in "rwkvag"), "ffn.x_k",
    "att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias",
)  # fmt: skip


def unsupported(model: LanguageModel) -> str | None:
    """None where `NativeRWKV7` can run `model`, else the reason in words."""
    if type(model) is not RWKV7 or not isinstance(model.config, RWKV7Config):
        return f"{model.name} has no native inference path"
    unmerged = [adapter.name for adapter in model.adapters.values() if not adapter.is_merged]
    if unmerged:
        return f"the adapter {unmerged[0]!r} is mounted and not merged"
    if is_frozen(model):
        return "the base is frozen in blocks"
    if model.ln_out.weight.device.type != "cpu":
        return f"the model is on {model.ln_out.weight.device}"
    if model.config.head_size not in _HEAD_SIZES:
        return f"head size {model.config.head_size} is not one of {', '.join(map(str, _HEAD_SIZES))}"
    if model.config.a_scale != 1:
        return f"a_scale is {model.config.a_scale:g}, and the kernels know only 1"
    types = {parameter.dtype for parameter in model.parameters()}
    if not types <= _FLOATS.keys():
        return f"parameters of type {', '.join(sorted(map(str, types - _FLOATS.keys())))}"
    return native.unavailable()


def copied_names(model: nn.Module) -> frozenset[str]:
    """Names of the matrices of `model` that `NativeRWKV7` reads once, to copy them; none where it cannot run it."""
    if not isinstance(model, LanguageModel) or unsupported(model) is not None:
        return frozenset()
    return frozenset(f"blocks.{index}.att.{name}" for index in range(len(model.blocks)) for name in _LOW_RANK)


class NativeRWKV7:
    """Runs the weights of an RWKV-7 model. Its large matrices are not copied: what training or merging does to them in
    place is seen. Low-rank maps and vectors (norms, token shift shares) are copied, and stay as they were; the pages of
    a mapped file in which they lie are given back.

    Args:
        model: an RWKV-7 language model on the CPU; see `unsupported`.

    Raises:
        WkvError: if the model cannot run here.
    """

    def __init__(self, model: LanguageModel) -> None:
        reason = unsupported(model)
        if reason is not None:
            raise WkvError(f"the native kernels cannot run this model: {reason}")
        assert isinstance(model.config, RWKV7Config)
        self.config = model.config
        self._kept: list[Tensor] = []  # what the library has addresses of
        self._copied: list[Tensor] = []  # what it copies when it is created
        self._name = model.name
        config = self.config
        sizes = [config.num_layers, config.hidden_size, config.num_heads, config.head_size, config.ffn_size]
        sizes += [config.vocab_size, *self._embedding(model.emb)]
        norms = (model.blocks[0].ln0, model.ln_out)
        sizes += [address for norm in norms for address in (self._vector(norm.weight), self._vector(norm.bias))]
        head = self._matrix(model.head)
        self._padded_vocabulary = head[1]
        tables = [number for block in model.blocks for number in self._layer(block)]
        sizes_table, tables_table = torch.tensor([*sizes, *head]), torch.tensor(tables)
        create = native.function("wkv_rwkv7_create", "ppff")
        self._handle = create(sizes_table.data_ptr(), tables_table.data_ptr(), config.norm_eps, config.head_norm_eps)
        if self._handle == 0:
            raise MemoryError("the native kernels could not allocate their work space")
        give_back(self._copied)
        del self._copied
        weakref.finalize(self, native.function("wkv_rwkv7_free", "i", ""), self._handle)
        self._forward = native.function("wkv_rwkv7_forward", "ippippppii")
        self._addresses: tuple[State | None, list[Tensor]] = (None, [])

    def read(
        self,
        tokens: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        inplace: bool = False,
        all_logits: bool = False,
    ) -> tuple[Tensor, State]:
        """Read tokens.

        Args:
            tokens: int64 [B, T], each in [0, V).
            state: where to go on from; None is the empty past.
            mask: bool [B, T]; False tokens do not exist.
            inplace: bring `state` itself up to date instead of a copy.
            all_logits: logits of every token instead of each sequence's last real one.

        Returns:
            logits float32 [B, V] (rows without a real token: zeros) or [B, T, V] (masked tokens: zeros), and the state.
        """
        batch, length = tokens.shape
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise WkvError(f"token id {bad} is outside the vocabulary [0, {self.config.vocab_size})")
        if mask is not None and bool(mask.all()):
            mask = None
        counts = [length] * batch if mask is None else mask.sum(1).tolist()
        flat = (tokens if mask is None else tokens[mask]).to(torch.int64).flatten().contiguous()
        offsets = torch.tensor([0, *counts]).cumsum(0)
        state = self._own_state(state, batch, inplace)
        rows = len(flat) if all_logits else sum(count > 0 for count in counts)
        logits = torch.empty(rows, self._padded_vocabulary)
        status = self._forward(
            self._handle, flat.data_ptr(), offsets.data_ptr(), batch, *(t.data_ptr() for t in self._addresses[1]),
            logits.data_ptr(), all_logits, native.num_threads(),
        )  # fmt: skip
        if status != 0:
            raise MemoryError("the native kernels could not allocate their work space")
        logits = logits[:, : self.config.vocab_size]
        return _spread(logits, mask, counts, tokens.shape, all_logits), state

    def __call__(self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None) -> Output:
        """As the model's own forward pass, without gradients."""
        return Output(*self.read(tokens, state, mask, all_logits=True))

    @property
    def skipped_share(self) -> float:
        """Share of the channel mix's hidden values that were zero, and whose weights were not read, so far."""
        counts = torch.zeros(2, dtype=torch.int64)
        address = counts.data_ptr()
        native.function("wkv_rwkv7_sparsity", "ipp", "")(self._handle, address, address + 8)
        return int(counts[0]) / max(1, int(counts[1]))

    def _own_state(self, state: State | None, batch: int, inplace: bool) -> State:
        """A state to write to; its addresses are listed for the library."""
        if inplace and state is not None and state is self._addresses[0]:
            return state
        if state is None or not inplace or not _is_plain(state):
            state = self._fresh(batch) if state is None else _plain(state)
        columns = [[layer[name].data_ptr() for layer in state.layers] for name in ("att_shift", "wkv", "ffn_shift")]
        self._addresses = (state, [torch.tensor(column) for column in columns])
        return state

    def _fresh(self, batch: int) -> State:
        config = self.config
        matrix = (batch, config.num_heads, config.head_size, config.head_size)
        row = (batch, config.hidden_size)
        return State(
            self._name,
            [
                {"att_shift": torch.zeros(row), "wkv": torch.zeros(matrix), "ffn_shift": torch.zeros(row)}
                for _ in range(config.num_layers)
            ],
        )

    # ---- addresses ----

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _copy(self, tensor: Tensor) -> int:
        self._copied.append(tensor)
        return tensor.data_ptr()

    def _vector(self, parameter: Tensor) -> int:
        return self._copy(parameter.detach().float().flatten().contiguous())

    def _embedding(self, layer: nn.Module) -> tuple[int, int, int]:
        if isinstance(layer, QuantizedEmbedding):
            read_singly(layer.codes)
            return 3, self._keep(layer.codes), self._keep(layer.scale)
        weight: Any = layer.weight
        return _FLOATS[weight.dtype], self._keep(weight.detach().contiguous()), 0

    def _matrix(self, layer: nn.Module) -> list[int]:
        """(format, rows, columns, data, scale) of a linear layer."""
        if isinstance(layer, QuantizedLinear):
            packed = layer.packed
            scale = 0 if packed.scale is None else self._keep(packed.scale)
            return [packed.format, *packed.padded, self._keep(packed.data), scale]
        weight: Any = layer.weight
        return [_FLOATS[weight.dtype], *weight.shape, self._keep(weight.detach().contiguous()), 0]

    def _layer(self, block: Any) -> list[int]:
        numbers = []
        for name in _LOW_RANK:
            weight = getattr(block.att, name).detach()
            numbers += [_FLOATS[weight.dtype] + _COLUMNS, weight.shape[1], weight.shape[0]]
            numbers += [self._copy(weight.contiguous()), 0]
        for name in _LINEAR:
            numbers += self._matrix(block.get_submodule(name))
        return numbers + [self._vector(block.get_parameter(name)) for name in _VECTORS]


def _is_plain(state: State) -> bool:
    return all(x.dtype == torch.float32 and x.is_contiguous() for layer in state.layers for x in layer.values())


def _plain(state: State) -> State:
    """A contiguous float32 copy."""
    copies = [{name: torch.empty(x.shape).copy_(x.detach()) for name, x in layer.items()} for layer in state.layers]
    return State(state.model, copies)


def _spread(logits: Tensor, mask: Tensor | None, counts: list[int], shape: torch.Size, all_logits: bool) -> Tensor:
    """Logits of the real tokens (or sequences) among those that have none."""
    if all_logits:
        if mask is None:
            return logits.unflatten(0, tuple(shape))
        return logits.new_zeros(*shape, logits.shape[-1]).masked_scatter_(mask[..., None], logits)
    if len(logits) == shape[0]:
        return logits
    result = logits.new_zeros(shape[0], logits.shape[-1])
    result[[row for row, count in enumerate(counts) if count > 0]] = logits
    return result
