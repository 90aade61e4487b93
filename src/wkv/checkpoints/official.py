"""The keys and shapes of official checkpoints, version by version (RWKV-LM `RWKV-v4neo`, `RWKV-v5`, `RWKV-v7`).

Shapes are written in the letters of the papers; every letter is a size that can be read from a file:

    V vocabulary, C hidden, A attention, F ffn, H heads, N head size,
    M rank of RWKV-6's token shift (5M: five of them), W decay, I in-context learning rate, R value, G gate,
    E side of RWKV-7a's token matrices (EE: its square), P temporal perspectives.

Numbers are sizes that never vary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Letter -> the configuration field it fills.
FIELDS = {
    "V": "vocab_size", "C": "hidden_size", "A": "attention_size", "F": "ffn_size", "H": "number of heads",
    "N": "head_size", "M": "shift_rank", "W": "decay_rank", "I": "iclr_rank", "R": "value_rank", "G": "gate_rank",
    "E": "embed_rank", "P": "perspectives",
}  # fmt: skip

TITLES = {
    "rwkv4": "RWKV-4", "rwkv5_0": "RWKV-5.0", "rwkv5_1": "RWKV-5.1", "rwkv5": "RWKV-5.2", "rwkv6": "RWKV-6",
    "rwkv7": "RWKV-7", "rwkv7a": "RWKV-7a", "temporal": "RWKV-4 with temporal perspectives",
}  # fmt: skip

_FRAME = {
    "emb.weight": "V C", "head.weight": "V C", "ln_out.weight": "C", "ln_out.bias": "C",
    "blocks.0.ln0.weight": "C", "blocks.0.ln0.bias": "C",
}  # fmt: skip
_FRAMES = {"temporal": {**_FRAME, "convert3.weight": "P C"}}
_NORMS = {"ln1.weight": "C", "ln1.bias": "C", "ln2.weight": "C", "ln2.bias": "C"}
_MATRICES = {
    "att.receptance.weight": "A C", "att.key.weight": "A C", "att.value.weight": "A C", "att.output.weight": "C A",
}  # fmt: skip
_HEAD_NORM = {"att.ln_x.weight": "A", "att.ln_x.bias": "A"}
_GATE = {"att.gate.weight": "A C"}
_CHANNEL_MIX = {"ffn.key.weight": "F C", "ffn.value.weight": "C F"}
_MIX_4 = {
    "att.time_mix_k": "1 1 C", "att.time_mix_v": "1 1 C", "att.time_mix_r": "1 1 C",
    "ffn.time_mix_k": "1 1 C", "ffn.time_mix_r": "1 1 C", "ffn.receptance.weight": "C C",
}  # fmt: skip
_MIX_TEMPORAL = {key: shape.replace("1 1 C", "P 1 1 C") for key, shape in _MIX_4.items()}
# In place of a time mix; the first layer alone may have it.
_FFN_PRE = {
    "ffnPre.time_mix_k": "P 1 1 C", "ffnPre.time_mix_r": "P 1 1 C",
    "ffnPre.key.weight": "F C", "ffnPre.receptance.weight": "C C", "ffnPre.value.weight": "C F",
}  # fmt: skip
_MIX_5 = {**_MIX_4, **_GATE, "att.time_mix_g": "1 1 C"}
_MIX_6 = {
    **{f"att.time_maa_{name}": "1 1 C" for name in "xwkvrg"},
    "att.time_maa_w1": "C 5M", "att.time_maa_w2": "5 M C",
    "att.time_decay": "1 1 A", "att.time_decay_w1": "C W", "att.time_decay_w2": "W A", "att.time_faaaa": "H N",
    "ffn.time_maa_k": "1 1 C", "ffn.time_maa_r": "1 1 C", "ffn.receptance.weight": "C C",
}  # fmt: skip
_MIX_7 = {
    **{f"att.x_{name}": "1 1 C" for name in "rwkvag"},
    **{f"att.{name}": "1 1 A" for name in ("w0", "a0", "v0", "k_k", "k_a")},
    "att.w1": "C W", "att.w2": "W A", "att.a1": "C I", "att.a2": "I A",
    "att.v1": "C R", "att.v2": "R A", "att.g1": "C G", "att.g2": "G A",
    "att.r_k": "H N", "ffn.x_k": "1 1 C",
}  # fmt: skip
_DEEP_EMBED = {
    "ffn.s_emb.weight": "V EE", "ffn.s_emb_x.weight": "EE C", "ffn.s0": "1 1 F", "ffn.s1": "C E", "ffn.s2": "E F",
}  # fmt: skip

_EVERY = {**_NORMS, **_MATRICES, **_CHANNEL_MIX}
_EVERY_5 = {**_EVERY, **_HEAD_NORM}

# Model -> key within a layer -> shape.
LAYER_SHAPES = {
    "rwkv4": {**_EVERY, **_MIX_4, "att.time_decay": "A", "att.time_first": "A"},
    "rwkv5_0": {**_EVERY_5, **_MIX_4, "att.time_decay": "H", "att.time_first": "H"},
    "rwkv5_1": {**_EVERY_5, **_MIX_5, "att.time_decay": "H", "att.time_faaaa": "H"},
    "rwkv5": {**_EVERY_5, **_MIX_5, "att.time_decay": "H N", "att.time_faaaa": "H N"},
    "rwkv6": {**_EVERY_5, **_GATE, **_MIX_6},
    "rwkv7": {**_EVERY_5, **_MIX_7},
    "rwkv7a": {**_EVERY_5, **_MIX_7, **_DEEP_EMBED},
    "temporal": {**_EVERY, **_MIX_TEMPORAL, **_FFN_PRE, "att.time_decay": "A", "att.time_first": "A"},
}

# Initial states that state tuning has learned: key within a layer -> slot of the model's state. The files keep
# [H, N_value, N_key] for every version, as `State` does, and [C] for token shift. Nobody else tunes RWKV-4: its names
# are ours, and so is "state." before the name of any other slot.
TUNED_SLOTS = {
    "att.time_state": "wkv", "att.ts_state": "att_shift", "ffn.ts_state": "ffn_shift",
    "att.num_state": "num", "att.den_state": "den", "att.max_state": "max",
}  # fmt: skip

_LAYER_KEY = re.compile(r"^blocks\.(0|[1-9]\d{0,5})\.(.+)$", re.DOTALL)


def has_official_layout(name: str) -> bool:
    """Whether files of other programs hold this model."""
    return name in LAYER_SHAPES


def split_key(key: str) -> tuple[int, str] | None:
    """ "blocks.3.att.key.weight" -> (3, "att.key.weight"); None for keys outside the layers."""
    match = _LAYER_KEY.match(key)
    return (int(match[1]), match[2]) if match else None


def is_tuned_key(key: str) -> bool:
    """Whether `key` is that of a tuned initial state, such as "blocks.3.att.time_state"."""
    parts = split_key(key)
    return parts is not None and tuned_slot(parts[1]) is not None


def tuned_slot(name: str) -> str | None:
    """ "att.time_state" -> "wkv", the slot of the model's state; None for keys of other things."""
    own = name.removeprefix("state.")
    return TUNED_SLOTS.get(name) or (own if own != name else None)


def symbolic_shape(name: str, key: str) -> list[str] | None:
    """The letters of the shape of `key` in model `name`; None if the model has no such key."""
    parts = split_key(key)
    text = _FRAMES.get(name, _FRAME).get(key) or (LAYER_SHAPES[name].get(parts[1]) if parts else None)
    return text.split() if text else None


def official_keys(name: str, fields: Mapping[str, Any]) -> list[str]:
    """All keys of model `name` with `fields["num_layers"]` layers; none for models without an official layout."""
    layers = fields.get("num_layers", 0)
    if name not in LAYER_SHAPES or not isinstance(layers, int):
        return []
    keys = [
        *_FRAMES.get(name, _FRAME),
        *(f"blocks.{layer}.{key}" for layer in range(layers) for key in LAYER_SHAPES[name]),
    ]
    absent = "blocks.0.att." if fields.get("ffn_pre") else "blocks.0.ffnPre."
    return [
        key for key in keys if not key.startswith(absent) and (".ffnPre." not in key or key.startswith("blocks.0."))
    ]
