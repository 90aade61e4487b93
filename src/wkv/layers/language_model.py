"""The frame all language models share: embedding, ln0, blocks, ln_out, head, and the books about states and masks.

Shape letters: B batch, T time, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wkv.errors import WkvError
from wkv.layers.config import LanguageModelConfig, MultiHeadConfig
from wkv.layers.head import TiedHead
from wkv.layers.initialisation import orthogonal_, tall_gain
from wkv.layers.norms import LayerNorm, RMSNorm
from wkv.layers.timeline import Timeline
from wkv.state import LayerState, State, check_compatible

Norm = type[LayerNorm] | type[RMSNorm]


class Output(NamedTuple):
    """What a model returns: logits [B, T, V] and the state after the last real token of every row."""

    logits: Tensor
    state: State


class Block(nn.Module):
    """One layer: layer norm and time mix, layer norm and channel mix, each added to the residual stream.

    `att` and `ffn` come from the model's own file. Values that later layers need from earlier ones, such as
    RWKV-7's first value, travel in `carry`, a dictionary that is replaced and never changed in place.

    Args:
        config: the model's sizes.
        layer: index of the layer.
        att: the time mix, or what stands in its place.
        ffn: the channel mix.
        norm: class of the norms; with layer norms the first layer has `ln0` for the embedding, too.
    """

    def __init__(
        self, config: LanguageModelConfig, layer: int, att: nn.Module, ffn: nn.Module, norm: Norm = LayerNorm
    ) -> None:
        super().__init__()
        if layer == 0 and norm is LayerNorm:
            self.ln0 = LayerNorm(config.hidden_size, config.norm_eps)
        self.ln1 = norm(config.hidden_size, config.norm_eps)
        self.ln2 = norm(config.hidden_size, config.norm_eps)
        self.att = att
        self.ffn = ffn

    def forward(
        self, x_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """x [B, T, C] -> x, carry and the layer's new state."""
        mixed, carry, att_state = self.att(self.ln1(x_BTC), carry, state, timeline)
        x_BTC = x_BTC + mixed
        mixed, ffn_state = self.ffn(self.ln2(x_BTC), carry, state, timeline)
        return x_BTC + mixed, carry, {**att_state, **ffn_state}


class LanguageModel(nn.Module):
    """Embedding, ln0, L blocks, ln_out and a head.

    Parameter names and shapes are those of the official checkpoints. Subclasses name themselves (`name`), build one
    block (`build_block`) and describe one layer's state (`init_layer_state`). Those with RMS norms (`norm`) have no
    ln0. A configuration with `tied_head` lets the head be the embedding's matrix.

    Attributes:
        config: the model's sizes.
        gradient_checkpointing: recompute each block in the backward pass to save memory (off by default).
        tokenizer: the tokenizer the model was trained with, or None.
        tuned_state: an initial state of one sequence that state tuning found, or None; generation starts from it.
        initial_state: makes the state before the first token out of the empty one while a state is tuned, or None.
        adapters, active_adapters: what `wkv.tuning` has mounted: name -> adapter, kind -> name.
    """

    name: ClassVar[str]
    # Recipe: parts of parameter names -> factor on the learning rate; the first that matches counts.
    learning_rate_factors: ClassVar[Mapping[str, float]] = {}
    norm: ClassVar[Norm] = LayerNorm
    blocks: Any  # nn.ModuleList of Block
    ln_out: Any  # of class `norm`
    head: Any  # nn.Linear, TiedHead, or what quantisation puts there

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(self.build_block(config, layer) for layer in range(config.num_layers))
        self.ln_out = self.norm(config.hidden_size, config.norm_eps)
        tied = getattr(config, "tied_head", False)
        self.head = TiedHead(self.emb) if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.tokenizer: Any = None
        self.tuned_state: State | None = None
        self.initial_state: nn.Module | None = None
        self.adapters: dict[str, Any] = {}
        self.active_adapters: dict[str, str] = {}
        self._state_template = self.init_state(1, device="meta")
        if not self.ln_out.weight.is_meta:  # a model built on the meta device is about to be loaded
            self.reset_parameters()

    def build_block(self, config: Any, layer: int) -> Block:
        """The block of layer `layer`."""
        raise AttributeError(f"{type(self).__name__} must define build_block")

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """Zero state of layer `layer`, by `shift.new_zeros` (activations: names that end in "shift" or "cache") and
        `wide.new_zeros` (float32)."""
        raise AttributeError(f"{type(self).__name__} must define init_layer_state")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every parameter its official initial value."""
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        if isinstance(self.head, nn.Linear):
            orthogonal_(self.head.weight, tall_gain(self.head.weight, 0.5))
        for module in self.modules():
            if isinstance(module, LayerNorm | RMSNorm):
                module.reset_parameters()
        for block in self.blocks:
            block.att.reset_parameters()
            block.ffn.reset_parameters()

    def start_carry(self, tokens_BT: Tensor, x_BTC: Tensor) -> dict[str, Tensor]:
        """What every layer may need besides x: nothing by default."""
        return {}

    def parameter_rule(self, name: str, parameter: nn.Parameter) -> tuple[float, bool]:
        """(factor on the learning rate, whether weight decay applies) by the official recipe."""
        factor = next((f for part, f in self.learning_rate_factors.items() if part in name), 1.0)
        return factor, factor == 1.0 and name.endswith(".weight") and parameter.squeeze().ndim >= 2

    @property
    def num_parameters(self) -> int:
        """Number of stored values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def set_initial_state(self, initial_state: nn.Module | None) -> None:
        """Let sequences start from `initial_state(empty)` in place of the empty state; None: from that again."""
        self.initial_state = initial_state
        self._state_template = self.init_state(1, device="meta")

    def init_state(
        self, batch_size: int, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token: empty, or what `initial_state` makes of it.

        Args:
            batch_size: number of sequences.
            device, dtype: where, and the type of token-shift states; those of the parameters by default.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise WkvError(f"batch_size must be a positive integer, found {batch_size!r}")
        weight = self.ln_out.weight  # never quantised
        shift = torch.empty(0, device=device or weight.device, dtype=dtype or weight.dtype)
        wide = shift.to(torch.float64 if shift.dtype == torch.float64 else torch.float32)
        layers = [self.init_layer_state(batch_size, shift, wide, layer) for layer in range(self.config.num_layers)]
        empty = State(self.name, layers)
        return empty if self.initial_state is None else self.initial_state(empty)

    def forward(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Output:
        """Read tokens, predict the next one at every position.

        Args:
            tokens: int64 [B, T], each in [0, V).
            state: where to go on from; None is the empty past.
            mask: bool [B, T]; a False token does not exist: it changes neither token shift nor state, wherever it
                stands, and its logits are unspecified.
            reset: bool [B, T]; everything before a True token is forgotten (packed documents).

        Returns:
            Output with logits [B, T, V] and the state after the last real token of every row.

        Raises:
            WkvError: for tokens, masks or states that do not fit.
        """
        hidden, state = self.forward_features(tokens, state, mask, reset)
        return Output(self.forward_head(hidden), state)

    def forward_features(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `forward`, without the head: hidden values after ln_out [B, T, C], and the state."""
        self._check_inputs(tokens, mask, reset)
        if reset is not None and self.initial_state is not None:
            raise WkvError("reset empties the state, but the model starts from a tuned one; read documents apart")
        if state is None:
            state = self.init_state(tokens.shape[0])
        else:
            check_compatible(state, self._state_template, tokens.device, tokens.shape[0])
        timeline = Timeline.build(mask, reset)
        x_BTC = self.embed(tokens)
        carry = self.start_carry(tokens, x_BTC)
        layers = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x_BTC, carry, new_state = self._run_block(block, x_BTC, carry, layer_state, timeline)
            layers.append(new_state)
        return self.ln_out(x_BTC), State(self.name, layers)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> what the first layer reads [B, T, C]."""
        x_BTC: Tensor = self.emb(tokens)
        return self.blocks[0].ln0(x_BTC) if self.norm is LayerNorm else x_BTC

    def forward_head(self, hidden: Tensor) -> Tensor:
        """Hidden values [..., C] -> logits [..., V]."""
        logits: Tensor = self.head(hidden)
        return logits

    def _run_block(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _check_inputs(self, tokens: Tensor, mask: Tensor | None, reset: Tensor | None) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.numel() == 0:
            kind = str(list(tokens.shape)) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise WkvError(f"tokens must be a non-empty int64 tensor [B, T], found {kind}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise WkvError(f"tokens must be int64, found {tokens.dtype}")
        if not torch.compiler.is_compiling() and tokens.device.type == "cpu":
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise WkvError(f"token id {bad} is outside the vocabulary [0, {self.config.vocab_size})")
        for name, flags in (("mask", mask), ("reset", reset)):
            if flags is None:
                continue
            if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.shape != tokens.shape:
                found = f"{flags.dtype} {list(flags.shape)}" if isinstance(flags, Tensor) else type(flags).__name__
                raise WkvError(f"{name} must be bool {list(tokens.shape)} like the tokens, found {found}")


class MatrixStateModel(LanguageModel):
    """A language model whose layers keep one matrix per head, S [B, H, N_value, N_key]."""

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """Zero token-shift and wkv states of one layer."""
        config = self.config
        assert isinstance(config, MultiHeadConfig)
        return {
            "att_shift": shift.new_zeros(batch_size, config.hidden_size),
            "wkv": wide.new_zeros(batch_size, config.num_heads, config.head_size, config.head_size),
            "ffn_shift": shift.new_zeros(batch_size, config.hidden_size),
        }
