"""Sizes and options of `wkv.models.hybrid`."""

from __future__ import annotations

import dataclasses

from wkv.errors import WkvError
from wkv.layers.config import at_least, flag, indices, one_of, option, positive
from wkv.models.rwkv7 import RWKV7Config
from wkv.models.transformer import TransformerConfig

FUSIONS = ("concat", "additive", "additive_output", "gated", "mean")


@dataclasses.dataclass(kw_only=True)
class HybridConfig(RWKV7Config):
    """Sizes and options of a hybrid: those of RWKV-7, those of the transformer, and

    Args:
        base: "transformer" or "rwkv7", what is extended. `attention_size` and `ffn_size` are the base's.
        layers: indices of the layers that are extended; all of them by default.
        state_heads: E of a transformer; the fewer of 4 and H by default. An RWKV-7's are its own heads.
        attention_heads: H of the attention path of an RWKV-7; the fewer of 4 and E by default. A transformer's are its
            own.
        middle_heads: at most the fewer of H and E, the default; 0: none.
        fusion: how they combine both: "concat", "additive", "additive_output", "gated" or "mean".
        branch_norm: RMS norms before the output matrices of state heads and middle heads.
        state_window: M, tokens between state tokens; 0: there are none.
        probes: state tokens at a time.
        key_value_heads: a divisor of H; H by default.
        positions: "rotary" (default of a transformer) or "none" (default beside RWKV-7).
        rotary_base, window, tied_head: as in `TransformerConfig`.
    """

    base: str = option("transformer", one_of("transformer", "rwkv7"))
    layers: list[int] | None = option(None, indices)  # noqa: RUF009 (a field, not a list)
    state_heads: int | None = None
    attention_heads: int | None = None
    middle_heads: int | None = option(None, at_least(0))
    fusion: str = option("concat", one_of(*FUSIONS))
    branch_norm: bool = option(False, flag)
    state_window: int = option(0, at_least(0))
    probes: int = 1
    key_value_heads: int | None = None
    positions: str | None = option(None, one_of("rotary", "none"))
    rotary_base: float = option(10000.0, positive)
    window: int | None = option(None, at_least(1))
    tied_head: bool = option(False, flag)

    def __post_init__(self) -> None:
        wanted_ffn = self.ffn_size
        super().__post_init__()
        self._fill_heads()
        self.positions = self.positions or ("rotary" if self.base == "transformer" else "none")
        self.layers = list(range(self.num_layers)) if self.layers is None else self.layers
        if self.layers and self.layers[-1] >= self.num_layers:
            raise WkvError(f"layers {self.layers} are not all below num_layers {self.num_layers}")
        if self.state_window and self.window:
            raise WkvError("state_window needs attention that sees all tokens; leave window out")
        attention = self.attention_config(wanted_ffn)
        self.key_value_heads = attention.key_value_heads
        if self.base == "transformer":
            self.ffn_size = attention.ffn_size

    def _fill_heads(self) -> None:
        """The base's own heads are what its sizes say; the others are free."""
        own, new = ("attention_heads", "state_heads")[:: 1 if self.base == "transformer" else -1]
        if getattr(self, own) not in (None, self.num_heads):
            raise WkvError(f"{own} of a {self.base} are its {self.num_heads} heads, found {getattr(self, own)}")
        setattr(self, own, self.num_heads)
        setattr(self, new, getattr(self, new) or min(4, self.num_heads))
        assert self.attention_heads is not None
        assert self.state_heads is not None
        most = min(self.attention_heads, self.state_heads)
        self.middle_heads = most if self.middle_heads is None else self.middle_heads
        if self.middle_heads > most:
            raise WkvError(f"middle_heads must be at most {most}, the fewer of both kinds, found {self.middle_heads}")

    def attention_config(self, ffn_size: int | None = None) -> TransformerConfig:
        """Sizes of the attention heads, as those of a transformer."""
        assert self.attention_heads is not None
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        fields = {name: getattr(self, name) for name in names}
        width = self.attention_heads * self.head_size
        return TransformerConfig(**{**fields, "ffn_size": ffn_size, "attention_size": width})
