"""Meta-State: RWKV-7 whose channel mix reads the time mix's state as weights (after arXiv 2504.08247).

Only the abstract of "Millions of States" was at hand: the equations are our reconstruction, and experimental.

Notable features:
- the time mix is that of RWKV-7, taken from there as it is;
- self-state encoder: in some heads, the meta heads, the state that the time mix has just updated is a matrix that is
  applied to the token a second time, by the channel mix. Weights that were learned in context, without new matrices;
- what was read joins the input of the channel mix, whose rows and columns are parameter tokens: linear scores, squared
  ReLU, no softmax. A gate vector of zeros makes the model RWKV-7 exactly, so that any RWKV-7 can become one;
- that state is never written out for every token: a second run of the operator reads it;
- optionally the channel mix keeps a state of its own, which the same decay and removal keys update.

Shape letters: B batch, T time, H heads, N head size, M meta heads, C channels, F ffn width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers import initialisation as init
from wkv.layers.channel_mix import squared_relu
from wkv.layers.config import flag, indices, one_of, option
from wkv.layers.language_model import Block
from wkv.layers.meta import without_values
from wkv.layers.norms import wide
from wkv.layers.timeline import Timeline
from wkv.models import rwkv7
from wkv.models.rwkv7 import RWKV7, RWKV7Config, Vectors
from wkv.ops import wkv7
from wkv.registry import register_model
from wkv.state import LayerState, State


@dataclasses.dataclass(kw_only=True)
class MetaStateConfig(RWKV7Config):
    """Sizes and options of a Meta-State model.

    Args:
        mode: what the channel mix computes from the token's input u and the reading z of the state: "residual"
            W_v relu(W_k (u + g z))^2, "replace" W_v relu(W_k z)^2, "pure" z itself (no parameters at all).
        meta_heads: indices of the heads whose states are read, all below C / N; the last quarter of them by default.
        own_state: the channel mix reads a state of its own in place of the time mix's.
    """

    mode: str = option("residual", one_of("residual", "replace", "pure"))
    meta_heads: list[int] | None = option(None, indices)  # noqa: RUF009 (a field, not a list)
    own_state: bool = option(False, flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = min(self.num_heads, self.hidden_size // self.head_size)
        if usable == 0:
            raise WkvError(f"head_size {self.head_size} is above hidden_size {self.hidden_size}: no head can be read")
        if self.meta_heads is None:
            self.meta_heads = list(range(usable - max(1, usable // 4), usable))
        if not self.meta_heads or self.meta_heads[-1] >= usable:
            raise WkvError(f"meta_heads must be one or more of the heads 0 to {usable - 1}, found {self.meta_heads}")

    @property
    def shifts_tokens(self) -> bool:
        """Whether the channel mix has a token shift."""
        return self.mode == "residual" or self.own_state


class TimeMix(rwkv7.TimeMix):
    """That of RWKV-7, which shows its vectors to the channel mix of the same layer."""

    def vectors(
        self, z_BTC: Tensor, shifted_BTC: Tensor, carry: dict[str, Tensor]
    ) -> tuple[Vectors, Tensor, dict[str, Tensor]]:
        """As there; carry has the vectors, too."""
        vectors, gate_BTA, carry = super().vectors(z_BTC, shifted_BTC, carry)
        return vectors, gate_BTA, {**carry, **vectors._asdict()}


class ChannelMix(nn.Module):
    """A channel mix that applies states to the token before it applies its own matrices."""

    def __init__(self, config: MetaStateConfig, layer: int) -> None:
        super().__init__()
        assert config.ffn_size is not None
        assert config.meta_heads is not None
        self.layer, self.num_layers, self.config = layer, config.num_layers, config
        self.runs = consecutive(config.meta_heads)
        if config.shifts_tokens:
            self.x_k = init.blank(1, 1, config.hidden_size)
        if config.mode == "residual":
            self.meta_gate = init.blank(1, 1, config.hidden_size)
        if config.mode != "pure":
            self.key = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
            self.value = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(
        self, y_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Layer-normed input [B, T, C] -> output [B, T, C] and new state."""
        u_BTC, slots = y_BTC, {}
        if self.config.shifts_tokens:
            shifted_BTC, slots["ffn_shift"] = timeline.shift(y_BTC, state["ffn_shift"])
            u_BTC = torch.addcmul(y_BTC, shifted_BTC - y_BTC, self.x_k)
        z_BTC, after = self.read(y_BTC, u_BTC, carry, state, timeline)
        if self.config.own_state:
            slots["meta"] = after
        if self.config.mode == "pure":
            return z_BTC, slots
        if self.config.mode == "residual":
            z_BTC = u_BTC + self.meta_gate.to(z_BTC.dtype) * z_BTC
        return self.value(squared_relu(self.key(z_BTC))), slots

    def read(
        self, y_BTC: Tensor, u_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, Tensor]:
        """The self-state encoder: z [B, T, C], zero outside of the meta heads, and the states [B, M, N, N] afterwards.

        The operator starts from the state before these tokens and gives S_t y_t in place of S_t r_t.
        """
        vectors = Vectors(**{name: self.of_heads(carry[name], 2) for name in Vectors._fields})
        direction_BTMN = F.normalize(wide(self.split(y_BTC)), dim=-1, eps=1e-12)
        k_BTMN, v_BTMN = vectors.k, vectors.v
        before = state["meta"] if self.config.own_state else self.of_heads(state["wkv"], 1)
        if self.config.own_state:
            k_BTMN, v_BTMN = F.normalize(wide(self.split(u_BTC)), dim=-1, eps=1e-12), self.split(y_BTC)
        z_BTMN, after = wkv7(
            direction_BTMN, vectors.log_w, k_BTMN, v_BTMN, -vectors.kk, vectors.kk * vectors.iclr, before,
            mask=timeline.mask, reset=timeline.reset,
        )  # fmt: skip
        with torch.autocast(y_BTC.device.type, enabled=False):
            z_BTMN = F.layer_norm(wide(z_BTMN), z_BTMN.shape[-1:], eps=self.config.head_norm_eps).to(y_BTC.dtype)
        return self.join(z_BTMN, y_BTC), after

    def of_heads(self, x: Tensor, dim: int) -> Tensor:
        """The meta heads of a tensor with all heads along `dim`."""
        parts = [x.narrow(dim, start, count) for start, count in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def split(self, y_BTC: Tensor) -> Tensor:
        """The channels of the meta heads [B, T, M, N]; head h has channels h N to (h + 1) N - 1."""
        size = self.config.head_size
        return self.of_heads(y_BTC[..., : y_BTC.shape[-1] // size * size].unflatten(-1, (-1, size)), 2)

    def join(self, z_BTMN: Tensor, like_BTC: Tensor) -> Tensor:
        """The inverse of `split`; other channels are zero."""
        z_BTC, done = torch.zeros_like(like_BTC), 0
        size = self.config.head_size
        for start, count in self.runs:
            part = z_BTMN[:, :, done : done + count].flatten(-2)
            z_BTC[..., start * size : (start + count) * size] = part
            done += count
        return z_BTC

    def reset_parameters(self) -> None:
        """RWKV-7's values, and a gate of zeros."""
        _, eta = init.depth(self.layer, self.num_layers)
        if self.config.shifts_tokens:
            init.fill_(self.x_k, 1 - init.ramp(self.x_k.shape[-1]) ** (eta**4))
        if self.config.mode == "residual":
            nn.init.zeros_(self.meta_gate)
        if self.config.mode != "pure":
            init.orthogonal_(self.key.weight, 1.0)
            init.orthogonal_(self.value.weight, 0.0)


def consecutive(heads: list[int]) -> list[tuple[int, int]]:
    """Rising indices as (first, how many) of unbroken runs: [0, 1, 2, 5] gives [(0, 3), (5, 1)]."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and head == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((head, 1))
    return runs


class MetaBlock(Block):
    """A block whose time mix tells its own channel mix more than it tells later layers."""

    def forward(
        self, x_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, dict[str, Tensor], LayerState]:
        """x [B, T, C] -> x, carry and the layer's new state."""
        x_BTC, carry, new_state = super().forward(x_BTC, carry, state, timeline)
        return x_BTC, {name: x for name, x in carry.items() if name not in Vectors._fields}, new_state


@register_model("meta_state", MetaStateConfig)
class MetaState(RWKV7):
    """Meta-State language model (our reconstruction)."""

    name = "meta_state"

    def build_block(self, config: Any, layer: int) -> Block:
        """Time mix of RWKV-7 and the channel mix that reads states."""
        return MetaBlock(config, layer, TimeMix(config, layer), ChannelMix(config, layer))

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> LayerState:
        """Zero token-shift and wkv states, and the states of the channel mix where it has some."""
        slots = super().init_layer_state(batch_size, shift, wide, layer)
        config: Any = self.config
        if not config.shifts_tokens:
            del slots["ffn_shift"]
        if config.own_state:
            slots["meta"] = wide.new_zeros(batch_size, len(config.meta_heads), config.head_size, config.head_size)
        return slots

    @classmethod
    def from_base(cls, base: RWKV7, **options: Any) -> MetaState:
        """A Meta-State model that computes what an RWKV-7 computes: its weights (copied), and gates of zeros.

        Args:
            base: an RWKV-7 in floating point without adapters; its type and device are kept.
            options: `meta_heads`, `own_state`.

        Raises:
            WkvError: for another model, or options that would change what it computes.
        """
        if type(base) is not RWKV7:
            raise WkvError(f"from_base takes an RWKV-7, found {getattr(base, 'name', type(base).__name__)!r}")
        for option_name in options.keys() - {"meta_heads", "own_state"}:
            raise WkvError(f"from_base has no option {option_name!r}; one of meta_heads, own_state")
        config = MetaStateConfig(**base.config.to_dict(), **options)
        with without_values():
            model = cls(config)
        values = {key: value.detach().clone() for key, value in base.state_dict().items()}
        gates = {key: value for key, value in model.state_dict().items() if key.endswith("ffn.meta_gate")}
        if base.adapters or values.keys() != model.state_dict().keys() - gates.keys():
            raise WkvError("the base is quantised or carries an adapter: dequantise it, or merge the adapter, first")
        like = base.ln_out.weight
        values |= {key: torch.zeros(gate.shape, dtype=like.dtype, device=like.device) for key, gate in gates.items()}
        model.load_state_dict(values, assign=True)
        model.tokenizer = base.tokenizer
        if base.tuned_state is not None:
            model.tuned_state = _with_own_states(base.tuned_state, model)
        return model.train(base.training)


def _with_own_states(state: State, model: MetaState) -> State:
    """The state of an RWKV-7 as one of `model`; states of channel mixes are zero."""
    empty = model.init_state(state.batch_size)
    return State(model.name, [{**fresh, **old} for fresh, old in zip(empty.layers, state.layers, strict=True)])
