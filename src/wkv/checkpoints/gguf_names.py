"""How the tensors of RWKV-6 and RWKV-7 are called and shaped in GGUF files (architectures "rwkv6" and "rwkv7").

Tables in the order in which the files list them. GGUF lists dimensions fastest first; shapes here are PyTorch's.
"""

from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """One tensor of a GGUF file.

    Args:
        gguf: its name, within its layer.
        official: the official names it stands for, within the layer; several are stacked.
        form: "matrix" (the only ones stored in half precision or quantized), "as is", "vector" ([C]), "mix"
            ([1, 1, C]), "stack" ([n, 1, 1, C]), "transposed" (last two dimensions), "heads" ([H N] for [H, N]).
    """

    gguf: str
    official: tuple[str, ...]
    form: str


def _both(gguf: str, official: str) -> tuple[Name, Name]:
    names = (Name(f"{gguf}.{part}", (f"{official}.{part}",), "as is") for part in ("weight", "bias"))
    return tuple(names)  # type: ignore[return-value]


def _matrix(gguf: str, official: str) -> Name:
    return Name(f"{gguf}.weight", (f"{official}.weight",), "matrix")


def _low_rank(letter: str) -> tuple[Name, Name]:
    first, second = (
        Name(f"time_mix_{letter}{n}.weight", (f"att.{letter}{n}",), "transposed") for n in (1, 2)
    )  # fmt: skip
    return first, second


def _vector(gguf: str, official: str, form: str = "vector") -> Name:
    return Name(f"{gguf}.weight", (official,), form)


FRAME = (
    _matrix("token_embd", "emb"),
    *_both("token_embd_norm", "blocks.0.ln0"),
    *_both("output_norm", "ln_out"),
    _matrix("output", "head"),
)
_NORMS = (*_both("attn_norm", "ln1"), *_both("attn_norm_2", "ln2"))
_MATRICES = tuple(_matrix(f"time_mix_{name}", f"att.{name}") for name in ("key", "value", "receptance"))
_OUTPUT = (_matrix("time_mix_output", "att.output"), *_both("time_mix_ln", "att.ln_x"))
_CHANNEL_MIX = (_matrix("channel_mix_key", "ffn.key"), _matrix("channel_mix_value", "ffn.value"))

LAYER = {
    "rwkv7": (
        *_NORMS,
        Name("time_mix_lerp_fused.weight", tuple(f"att.x_{letter}" for letter in "rwkvag"), "stack"),
        *(name for letter in "wav" for name in (_vector(f"time_mix_{letter}0", f"att.{letter}0"), *_low_rank(letter))),
        *_low_rank("g"),
        *(_vector(f"time_mix_{name}", f"att.{name}") for name in ("k_k", "k_a")),
        _vector("time_mix_r_k", "att.r_k", "heads"),
        *_MATRICES,
        *_OUTPUT,
        _vector("channel_mix_lerp_k", "ffn.x_k", "mix"),
        *_CHANNEL_MIX,
    ),
    "rwkv6": (
        *_NORMS,
        _vector("time_mix_lerp_x", "att.time_maa_x", "mix"),
        Name("time_mix_lerp_fused.weight", tuple(f"att.time_maa_{letter}" for letter in "wkvrg"), "stack"),
        *(_vector(f"time_mix_{name}", f"att.time_maa_{name}", "transposed") for name in ("w1", "w2")),
        _vector("time_mix_decay", "att.time_decay"),
        *(_vector(f"time_mix_{name}", f"att.time_{name}", "transposed") for name in ("decay_w1", "decay_w2")),
        _vector("time_mix_first", "att.time_faaaa", "as is"),
        *_MATRICES,
        _matrix("time_mix_gate", "att.gate"),
        *_OUTPUT,
        *(_vector(f"channel_mix_lerp_{letter}", f"ffn.time_maa_{letter}", "mix") for letter in "kr"),
        *_CHANNEL_MIX,
        _matrix("channel_mix_receptance", "ffn.receptance"),
    ),
}  # fmt: skip

# Files of 2024 keep the token-shift vectors of RWKV-6 apart.
OLD_LAYER = {
    "rwkv7": (),
    "rwkv6": tuple(_vector(f"time_mix_lerp_{letter}", f"att.time_maa_{letter}", "mix") for letter in "wkvrg"),
}

# llama.cpp wants these in the first layer too, where nothing reads them: copies of a0, a1, a2 by its convention.
UNUSED = {"rwkv6": (), "rwkv7": tuple(f"blk.0.time_mix_v{n}.weight" for n in range(3))}

# Metadata key after the architecture -> the tensor and axis that tell the same.
SIZES = {
    "embedding_length": ("emb.weight", 1),
    "feed_forward_length": ("blocks.0.ffn.key.weight", 0),
    "attention.decay_lora_rank": ("blocks.0.att.w1", 1),
    "attention.iclr_lora_rank": ("blocks.0.att.a1", 1),
    "attention.value_residual_mix_lora_rank": ("blocks.1.att.v1", 1),
    "attention.gate_lora_rank": ("blocks.0.att.g1", 1),
    "wkv.head_size": ("blocks.0.att.time_faaaa", 1),
    "time_mix_extra_dim": ("blocks.0.att.time_maa_w2", 1),
    "time_decay_extra_dim": ("blocks.0.att.time_decay_w1", 1),
}

# general.file_type -> what most matrices are.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 32: "BF16",
}  # fmt: skip
