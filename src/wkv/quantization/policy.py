"""Which parameters are stored how: one kind for every group of parameters.

Defaults follow what is known about RWKV models (docs/quantization.md): vectors, norms and states keep their type,
low-rank maps 16 bits, the embedding 8 bits, the head 8 or 6.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wkv.errors import WkvError

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = ("int8", "int6", "int4")
KINDS = ("keep", *FLOATS, *INTEGERS)

_FFN = r"blocks\.\d+\.ffn\."
# Parameter name -> group. The first that matches counts; what remains is a vector.
_RULES = (
    (r"emb\.weight", "emb"),
    (rf"{_FFN}s_emb(_x)?\.weight", "emb"),  # RWKV-7a: the matrices of the tokens
    (r"head\.weight", "head"),
    # With the parts that a hybrid has within its mixer.
    (r"blocks\.\d+\.att\.(\w+\.)*(query|receptance|key|value|output|gate)\.weight", "att"),
    (rf"{_FFN}(key|gate|up)\.weight", "ffn_key"),
    (rf"{_FFN}(value|down)\.weight", "ffn_value"),
    (rf"{_FFN}receptance\.weight", "ffn_receptance"),
    (r"blocks\.\d+\.att\.([wavg]|time_maa_w|time_decay_w)[12]", "low_rank"),
    (rf"{_FFN}s[12]", "low_rank"),
)


@dataclass(frozen=True)
class Policy:
    """How each group is stored: "keep" (as it is), "float32", "bfloat16", "float16", "int8", "int6" or "int4".

    Args:
        emb: the embedding, and the token matrices of RWKV-7a; int8 is the only integer kind.
        head: the output matrix.
        att: query, receptance, key, value, output and gate matrices of the time mix, or of what is in its place.
        ffn_key, ffn_value, ffn_receptance: matrices of the channel mix.
        low_rank: factors of the low-rank maps; floating point only.
        vectors: all else: norms, token shift, decay, bonus; floating point only. Activations have their type.

    Raises:
        WkvError: for a kind that does not exist or does not fit its group.
    """

    emb: str = "keep"
    head: str = "keep"
    att: str = "keep"
    ffn_key: str = "keep"
    ffn_value: str = "keep"
    ffn_receptance: str = "keep"
    low_rank: str = "keep"
    vectors: str = "keep"

    def __post_init__(self) -> None:
        for group, kind in self.to_dict().items():
            allowed = allowed_kinds(group)
            if kind not in allowed:
                raise WkvError(f"{group} can be stored as {', '.join(allowed)}; found {kind!r}")

    def to_dict(self) -> dict[str, str]:
        """Group -> kind."""
        return dataclasses.asdict(self)

    def changed(self, changes: Mapping[str, str]) -> Policy:
        """The policy with other kinds for some groups.

        Raises:
            WkvError: for an unknown group or kind.
        """
        unknown = next((group for group in changes if group not in GROUPS), None)
        if unknown is not None:
            raise WkvError(f"unknown group {unknown!r}; one of {', '.join(GROUPS)}")
        return dataclasses.replace(self, **changes)

    def only(self, group: str) -> Policy:
        """The policy for one group, all others kept."""
        return Policy().changed({group: self.to_dict().get(group, "")})


GROUPS = tuple(field.name for field in dataclasses.fields(Policy))
_MATRICES = ("att", "ffn_key", "ffn_value", "ffn_receptance")


def allowed_kinds(group: str) -> tuple[str, ...]:
    """The kinds a group can have."""
    if group in ("low_rank", "vectors"):
        return ("keep", *FLOATS)
    return tuple(kind for kind in KINDS if kind not in ("int6", "int4")) if group == "emb" else KINDS


def default_policy(bits: int, dtype: torch.dtype = torch.float32) -> Policy:
    """The policy for 8 or 4 bits: the embedding in int8, the head in int8 or int6, other matrices in int8 or int4.

    Args:
        bits: 8 or 4.
        dtype: type of the model's parameters. Low-rank maps in more than 16 bits become float16.

    Raises:
        WkvError: for any other number of bits.
    """
    if isinstance(bits, bool) or bits not in (8, 4):
        raise WkvError(f"bits must be 8 or 4, found {bits!r}; a policy gives finer choices")
    low_rank = "float16" if dtype in (torch.float32, torch.float64) else "keep"
    return Policy(
        emb="int8", head="int8" if bits == 8 else "int6", low_rank=low_rank, **dict.fromkeys(_MATRICES, f"int{bits}")
    )


def group_of(name: str) -> str:
    """The group of a parameter, by its name: "blocks.3.att.key.weight" -> "att"."""
    return next((group for pattern, group in _RULES if re.fullmatch(pattern, name)), "vectors")
