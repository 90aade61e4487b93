"""Who takes part: four versions of RWKV and a Llama, all with the same number of parameters and one interface.

Notable choices:
- depth, width and vocabulary are the same for all; the inner width of the feed-forward part takes up the difference,
  because the versions spend more or less on their time mixes;
- RWKV: official initial values, ranks and parameter groups, heads of 64;
- Llama: `transformers`' class, RoPE, SwiGLU, RMSNorm, heads of 32 (two heads of 64 would be few), an untied head like
  RWKV's, and weight decay on its matrices. Its usual initial values (deviation 0.02) are meant for wide models, so
  there is a variant with the deviation 1 / sqrt(C) of RWKV's matrices; the sweep chooses.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import wkv
from wkv.training import create_optimizer

RWKV = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
LLAMA = "llama"
NAMES = (*RWKV, LLAMA)
# What the sweep may choose from for each contender.
LLAMA_WIDE = "llama_wide"
VARIANTS = {name: (name,) for name in RWKV} | {LLAMA: (LLAMA, LLAMA_WIDE)}
LABELS = {"rwkv4": "RWKV-4", "rwkv5": "RWKV-5.2", "rwkv6": "RWKV-6", "rwkv7": "RWKV-7", LLAMA: "Llama"}
MODEL_SIZE = "rwkv7"  # the others get its number of parameters
TOLERANCE = 0.02
HEAD_SIZE, LLAMA_HEAD_SIZE = 64, 32
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.1


@dataclass(frozen=True)
class Size:
    """Layers, width C and vocabulary V of every model."""

    layers: int
    width: int
    vocabulary: int


class Contender:
    """A model behind the one interface that training and measurements need.

    Args:
        name: one of `NAMES`.
        model: a `LanguageModel` or a `LlamaForCausalLM`, float32.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        self.head: nn.Module = model.lm_head if name == LLAMA else model.head
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def hidden(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T], each row from an empty past -> what the head reads [B, T, C]."""
        if self.name == LLAMA:
            found: Tensor = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
            return found
        hidden, _ = self.model.forward_features(tokens)
        return hidden

    def optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        """AdamW: the library's official groups, or for Llama decay on matrices alone; every group has a `factor`."""
        if self.name != LLAMA:
            return create_optimizer(self.model, learning_rate, WEIGHT_DECAY, BETAS)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        for group in groups:
            group["factor"] = 1.0
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=1e-8, fused=True)

    def memory_bytes(self, length: int) -> int:
        """What generation keeps for one sequence after `length` tokens, in bytes: the state, or keys and values."""
        if self.name != LLAMA:
            layers = self.model.init_state(1).layers
            return sum(tensor.nbytes for layer in layers for tensor in layer.values())
        config = self.model.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * 4


def build(name: str, size: Size, seed: int) -> Contender:
    """A new model with about as many parameters as `MODEL_SIZE` of this size.

    Args:
        name: one of `NAMES`, or a variant.
        size: depth, width, vocabulary.
        seed: of the initial values.

    Raises:
        SystemExit: if transformers is missing, or the number of parameters cannot be met within `TOLERANCE`.
    """
    wanted = _count(MODEL_SIZE, size, None)
    inner = None if name == MODEL_SIZE else fitting_inner_width(name, size, wanted)
    torch.manual_seed(seed)
    contender = Contender(LLAMA if name == LLAMA_WIDE else name, _model(name, size, inner))
    if abs(contender.parameters / wanted - 1) > TOLERANCE:
        sys.exit(f"{name} has {contender.parameters} parameters, {MODEL_SIZE} has {wanted}: too far apart to compare")
    return contender


def fitting_inner_width(name: str, size: Size, wanted: int) -> int:
    """The inner width of the feed-forward part, a multiple of 8, that comes nearest to `wanted` parameters."""
    at_64, at_128 = _count(name, size, 64), _count(name, size, 128)
    return 8 * round((64 + 64 * (wanted - at_64) / (at_128 - at_64)) / 8)


def _count(name: str, size: Size, inner: int | None) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _model(name, size, inner).parameters())


def _model(name: str, size: Size, inner: int | None) -> nn.Module:
    if name in VARIANTS[LLAMA]:
        return _llama(size, inner, 0.02 if name == LLAMA else size.width**-0.5)
    sizes: dict[str, Any] = {"num_layers": size.layers, "hidden_size": size.width, "vocab_size": size.vocabulary}
    if name != "rwkv4":
        sizes["head_size"] = HEAD_SIZE
    return wkv.create_model(name, **sizes, ffn_size=inner)


def _llama(size: Size, inner: int | None, deviation: float) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        sys.exit(f"the baseline needs Hugging Face transformers: pip install transformers ({error})")
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // LLAMA_HEAD_SIZE,
        initializer_range=deviation,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model
