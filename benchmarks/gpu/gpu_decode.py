"""Decoding of RWKV-7 with random weights: tokens per second with and without CUDA graphs, and in 8 and 4 bits.

Every token is the most likely one, chosen on the device: nothing waits for the host. The share of the bandwidth is the
time that the weights of a token, read once at the copy bandwidth of this device, would take, over the time it took; a
second share counts the states as well, read and written once.

In 8 and 4 bits are all linear layers: with the library's kernels, the values of the channel mix in the order that skips
inputs of zero, and with torch's own weight-only products on bfloat16 activations, to compare with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from gpu_models import TINY, random_model
from gpu_timing import Budget, Call, Device, Row, Save, reason_of, turns
from torch import Tensor, nn

from wkv.inference.graphs import AFTER, GraphReader, unfit
from wkv.inference.reading import ModelReader
from wkv.layers.language_model import LanguageModel
from wkv.quantization.modules import QuantizedLinear
from wkv.quantization.packed import Kind, quantize
from wkv.speed.files import bytes_per_token

PRESETS = ("0.1b", "1.5b")
BATCHES = (1, 64)
TOKENS = 16  # of a turn
GROUP = 128  # weights that share a scale in 4 bits


class Int8Linear(nn.Module):
    """y = x W^T with int8 weights and a scale per output, by torch."""

    def __init__(self, weight: Tensor, sparse: bool = False) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.register_buffer("codes", torch.round(weight.float() / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        return torch._weight_int8pack_mm(x.flatten(0, -2), self.codes, self.scale).unflatten(0, x.shape[:-1])


class Int4Linear(nn.Module):
    """y = x W^T with 4-bit weights and a scale per output and `GROUP` inputs, by torch."""

    def __init__(self, weight: Tensor, sparse: bool = False) -> None:
        super().__init__()
        groups = weight.float().unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-12)
        codes = (torch.round(groups / scale) + 8).clamp(0, 15).to(torch.uint8).flatten(1)
        self.register_buffer("codes", torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8))
        scales = scale.squeeze(-1).T.contiguous()
        self.register_buffer("scales", torch.stack([scales, torch.zeros_like(scales)], -1).to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        y = torch._weight_int4pack_mm(x.flatten(0, -2), self.codes, GROUP, self.scales)
        return y.unflatten(0, x.shape[:-1])


class Ours:
    """Makes layers of the library; matrices of one shape get the codes of the first, as quantising takes minutes."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.made = kind, {}  # type: ignore[var-annotated]

    def __call__(self, weight: Tensor, sparse: bool = False) -> QuantizedLinear:
        key = (weight.shape, sparse)
        if key not in self.made:
            self.made[key] = quantize(weight, self.kind, sparse)
        return copy.deepcopy(QuantizedLinear(self.made[key])).to(weight.device)


# The product, and how far it may be from that of the weights before they were rounded: 0.8 % and 11 % are usual.
KINDS: dict[str, tuple[Callable[[Tensor, bool], Any], float]] = {
    "int8": (Ours("int8"), 0.02),
    "int4": (Ours("int4"), 0.16),
    "int8, torch": (Int8Linear, 0.02),
    "int4, torch": (Int4Linear, 0.16),
}


def measure(device: Device, budget: Budget, limits: Row | None, save: Save) -> Row:
    """Every preset at every batch size."""
    rows: Row = {}
    for preset in ("tiny",) if device.quick else PRESETS:
        sizes = TINY if preset == "tiny" else {}
        dtype = torch.bfloat16 if device.is_gpu else torch.float32
        model = random_model(device.torch, dtype, None if preset == "tiny" else preset, **sizes).eval()
        variants: dict[str, LanguageModel] = {"bf16" if device.is_gpu else "fp32": model}
        skipped: Row = {}
        for kind in KINDS:
            try:
                variants[kind] = quantized(model, kind)
            except Exception as error:  # no such product in this torch, on this device, for these sizes
                skipped[kind] = reason_of(error)
        if skipped:
            rows[f"{preset} skipped"] = skipped
        for batch in (2,) if device.quick else BATCHES:
            for name, variant in variants.items():
                if budget.left() == 0:
                    rows[f"{preset} {name} B{batch}"] = {"skipped": "no time left"}
                    continue
                rows[f"{preset} {name} B{batch}"] = measure_case(variant, batch, device, budget, limits)
                save(rows)
        del model, variants
        device.clear()
    return rows


@torch.no_grad()
def quantized(model: LanguageModel, kind: str) -> LanguageModel:
    """A model with the same parameters but for its linear layers, after a check that the product is right.

    Raises:
        RuntimeError: if it is not, or does not run here.
    """
    product, bar = KINDS[kind]
    for sparse in (False, True):
        check(model.blocks[0].ffn.key.weight, product(model.blocks[0].ffn.key.weight, sparse), bar)
    result = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, layer in list(result.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, product(layer.weight, leaf == "value" and ".ffn" in parent))
    return result


@torch.no_grad()
def check(weight: Tensor, layer: Any, bar: float) -> None:
    """Raise RuntimeError unless the products with one token and with several are about those of the weights."""
    for shape in ((1, 1), (2, 3)):
        x = torch.randn(*shape, weight.shape[1], device=weight.device).to(weight.dtype)
        expected = x.float() @ weight.float().T
        error = float((layer(x).float() - expected).norm() / expected.norm())
        if not error <= bar:
            raise RuntimeError(f"the product is off by {error:.1%}")


def measure_case(model: LanguageModel, batch: int, device: Device, budget: Budget, limits: Row | None) -> Row:
    """Milliseconds per token of a batch, replayed and not."""
    plain = ModelReader(model)
    replayed = GraphReader(model, plain, None if device.is_gpu else lambda run: run)
    refused = unfit(model) if device.is_gpu else None
    row: Row = {"batch": batch, "skipped": {}}
    calls = {"graphs": decoding(replayed, batch, device), "no graphs": decoding(plain, batch, device)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for _ in range(AFTER // tokens_of(device) + 1):
                calls["graphs"]()  # until the step is recorded
        except Exception as error:
            refused = reason_of(error)
    refused = refused or next((str(x.message) for x in said if "CUDA graph" in str(x.message)), None)
    if refused is not None or replayed.recorded == 0:
        del calls["graphs"]
        row["skipped"]["graphs"] = refused or "nothing was recorded"
    found = turns(device, calls, budget, base=next(iter(calls)))
    row |= found | {"tokens_per_turn": tokens_of(device)}
    weights, states = bytes_per_token(model), 2 * model.init_state(batch).num_bytes
    row |= {"weight_bytes": weights, "state_bytes_read_and_written": states, "tokens_per_second": {}}
    for name, times in found["ms"].items():
        seconds = times["median"] / 1e3 / tokens_of(device)
        row["tokens_per_second"][name] = batch / seconds
        if limits is not None:
            row.setdefault("share_of_bandwidth", {})[name] = weights / limits["bytes_per_second"] / seconds
            both = (weights + states) / limits["bytes_per_second"] / seconds
            row.setdefault("share_of_bandwidth_with_states", {})[name] = both
    return row


def tokens_of(device: Device) -> int:
    """Tokens that a call of `decoding` reads."""
    return 2 if device.quick else TOKENS


def decoding(read: Any, batch: int, device: Device) -> Call:
    """A function that goes on decoding from where its last call ended."""
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device.torch)
    state = None

    @torch.inference_mode()
    def call() -> None:
        nonlocal tokens, state
        for _ in range(tokens_of(device)):
            logits, state = read.read(tokens, state, inplace=True)
            tokens = logits.argmax(-1, keepdim=True)

    return call
