"""Who trains in training.py: our RWKV-7, that of the `rwkv7-hf` package, and a Llama of the same number of parameters.

All of them take the same plain step: logits, cross entropy in float32, backward, torch's fused AdamW over all
parameters. Without autocast it is float32 throughout; with it the matrix products of the model are bfloat16, as in
`wkv train` on a processor that has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wkv
from wkv.layers.norms import LayerNorm

HEAD_SIZE = 64
TOLERANCE = 0.01  # of the number of parameters, between ours and Llama
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Size:
    """Layers, width and vocabulary of a model."""

    layers: int
    width: int
    vocabulary: int

    @property
    def name(self) -> str:
        """As it is called in tables."""
        return f"{self.layers}x{self.width} V={self.vocabulary}"


class Contender:
    """A model, its optimiser and a batch to train on.

    Args:
        name: for results.
        model: in float32.
        logits: input tokens [B, T] -> logits [B, T, V].
        precision: "fp32" or "bf16".
    """

    def __init__(
        self, name: str, model: nn.Module, logits: Callable[[Tensor], Tensor], precision: str = "fp32"
    ) -> None:
        self.name, self.model, self.logits, self.precision = name, model.train(), logits, precision
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of tokens [B, T + 1]."""
        with self.autocast():
            logits = self.logits(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, tokens: Tensor) -> None:
        """Forward, loss, backward, update."""
        loss = self.loss(tokens)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def timed(self, tokens: Tensor, steps: int = 1) -> float:
        """Seconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step(tokens)
        return (time.perf_counter() - start) / steps


def batch(size: Size, rows: int, length: int, seed: int) -> Tensor:
    """Random tokens [rows, length + 1]; id 0 is left out, because rwkv7-hf takes it for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, size.vocabulary, (rows, length + 1), generator=generator)


def ours(size: Size, seed: int, precision: str = "fp32") -> Contender:
    """`wkv.create_model("rwkv7")` with random weights."""
    torch.manual_seed(seed)
    with torch.device("meta"):  # the orthogonal initial values of a large head take long
        model = wkv.create_model(
            "rwkv7",
            num_layers=size.layers,
            hidden_size=size.width,
            vocab_size=size.vocabulary,
            head_size=HEAD_SIZE,
        )
    fill(model.to_empty(device="cpu"))
    return Contender("wkv", model, lambda tokens: model(tokens).logits, precision)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random values everywhere, none of them zero: matrices keep the size of their inputs, norms start as usual."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LayerNorm):
                parameter.fill_(float(name == "weight"))
            elif parameter.squeeze().ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.1, 0.9)


def rwkv7_hf(size: Size, same_as: Contender, precision: str = "fp32") -> Contender:
    """The model of the rwkv7-hf package with the weights of `same_as`, renamed by the package's own converter."""
    from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM
    from rwkv7_hf.converter import translate_name

    config: Any = same_as.model.config
    model: Any = RWKV7ForCausalLM(
        RWKV7Config(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            head_dim=HEAD_SIZE,
            intermediate_size=config.ffn_size,
            decay_low_rank_dim=config.decay_rank,
            a_low_rank_dim=config.iclr_rank,
            v_low_rank_dim=config.value_rank,
            gate_low_rank_dim=config.gate_rank,
            use_cache=False,
        )
    )
    targets, given = model.state_dict(), {}
    for name, value in same_as.model.state_dict().items():
        target, transposed = translate_name(name, size.layers)
        if target:
            given[target] = (value.t() if transposed else value).reshape(targets[target].shape).clone()
    model.load_state_dict(given)  # strict: nothing is left as it was
    return Contender("rwkv7-hf", model, lambda tokens: model(input_ids=tokens).logits, precision)


def llama(size: Size, same_as: Contender, seed: int, precision: str = "fp32") -> Contender:
    """`transformers`' LlamaForCausalLM with as many parameters as `same_as`, attention by torch's fused kernel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=llama_inner(size, same_as.parameters),
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD_SIZE,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(config)
    found = Contender("llama", model, lambda tokens: model(input_ids=tokens).logits, precision)
    if abs(found.parameters / same_as.parameters - 1) > TOLERANCE:
        raise SystemExit(f"Llama has {found.parameters} parameters, ours {same_as.parameters}")
    return found


def llama_inner(size: Size, parameters: int) -> int:
    """The width of SwiGLU, a multiple of 16, that makes the number of parameters come out."""
    outside = 2 * size.vocabulary * size.width + size.width
    attention_and_norms = 4 * size.width**2 + 2 * size.width
    inner = ((parameters - outside) / size.layers - attention_and_norms) / (3 * size.width)
    return 16 * round(inner / 16)


@torch.no_grad()
def largest_difference(one: Contender, other: Contender, tokens: Tensor) -> float:
    """Between the logits of two models, relative to the largest logit."""
    first, second = one.logits(tokens), other.logits(tokens)
    return ((first - second).abs().max() / first.abs().max()).item()
