"""Who is measured, who is compared with whom, and what is aimed for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from wkv.errors import WkvError

LLAMA, RWKV, OURS = "llama.cpp", "rwkv", "wkv"
PEERS = {
    LLAMA: ("llama_cpp", "pip install llama-cpp-python"),
    RWKV: ("rwkv", "pip install rwkv==0.8.32"),
}  # name: (module, how to get it)
RWKV_BF16 = "rwkv bf16"
BEST_QUANTIZED = "llama.cpp best quantised"


@dataclass(frozen=True)
class Contender:
    """One program with one kind of weights.

    Args:
        name: as shown.
        program: "wkv", "rwkv" or "llama.cpp".
        weights: what `files` writes for it.
        bits: of most weights; contenders of similar size take their turns one after the other.
    """

    name: str
    program: str
    weights: str
    bits: float


CONTENDERS = (
    Contender("wkv fp32", OURS, "fp32", 32),
    Contender("rwkv fp32", RWKV, "fp32", 32),
    Contender("llama.cpp F32", LLAMA, "F32", 32),
    Contender("wkv bf16", OURS, "bf16", 16),
    Contender(RWKV_BF16, RWKV, "bf16", 16),
    Contender("llama.cpp F16", LLAMA, "F16", 16),
    Contender("wkv int8", OURS, "int8", 8),
    Contender("wkv int8, mapped", OURS, "int8 mapped", 8),
    Contender("wkv int8, no skipping", OURS, "int8 tiled", 8),
    Contender("llama.cpp Q8_0", LLAMA, "Q8_0", 8.5),
    Contender("wkv int4", OURS, "int4", 4.5),
    Contender("wkv int4, mapped", OURS, "int4 mapped", 4.5),
    Contender("wkv int4, int4 head", OURS, "int4 head", 4.5),
    Contender("llama.cpp Q4_0", LLAMA, "Q4_0", 4.5),
    Contender("llama.cpp Q4_0, Q4_0 head", LLAMA, "Q4_0 head", 4.5),
    Contender("llama.cpp Q4_K_M", LLAMA, "Q4_K_M", 4.8),
)
QUANTIZED_PEERS = tuple(c.name for c in CONTENDERS if c.program == LLAMA and c.bits < 16)

# (ours, the other, what is aimed for in decoding, in prefill); None: compared only
PAIRS: tuple[tuple[str, str, float | None, float | None], ...] = (
    ("wkv fp32", "rwkv fp32", 1.1, None),
    ("wkv fp32", "llama.cpp F32", None, 1.2),
    ("wkv bf16", "rwkv bf16", None, None),
    ("wkv bf16", "llama.cpp F16", None, None),
    ("wkv int8", "llama.cpp Q8_0", 1.4, None),
    ("wkv int8", BEST_QUANTIZED, None, 1.5),
    ("wkv int8, no skipping", "llama.cpp Q8_0", None, None),
    ("wkv int4", "llama.cpp Q4_0", 1.3, None),
    ("wkv int4", "llama.cpp Q4_K_M", None, None),
    ("wkv int8, mapped", "llama.cpp Q8_0", None, None),
    ("wkv int4, mapped", "llama.cpp Q4_0", None, None),
    ("wkv int4, int4 head", "llama.cpp Q4_0, Q4_0 head", 1.3, None),
)
FLOOR_TARGETS = {"wkv fp32": 0.9}  # share of the read bandwidth in decoding


def chosen(peers: str) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part.

    Args:
        peers: "auto" for those that are installed, "none", or names with commas between.

    Returns:
        the contenders, and those left out with the reason.

    Raises:
        WkvError: for an unknown name.
    """
    wanted = list(PEERS) if peers == "auto" else [name.strip() for name in peers.split(",") if peers != "none"]
    unknown = next((name for name in wanted if name not in PEERS), None)
    if unknown is not None:
        raise WkvError(f"peer {unknown!r} is unknown; auto, none, or some of {', '.join(PEERS)}")
    skipped = {}
    for name in PEERS:
        module, command = PEERS[name]
        if name not in wanted:
            skipped[name] = "not asked for"
        elif importlib.util.find_spec(module) is None:
            skipped[name] = f"not installed: {command}"
    if RWKV not in skipped and not _multiplies_bfloat16():
        skipped[RWKV_BF16] = "this processor has no bfloat16 products; torch emulates them a hundred times slower"
    return [c for c in CONTENDERS if c.program not in skipped and c.name not in skipped], skipped


def _multiplies_bfloat16() -> bool:
    """Whether torch's bfloat16 products on this CPU are more than an emulation."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
