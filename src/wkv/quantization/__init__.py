"""Quantised weights: whole models in 8 or 4 bits, and the block types of ggml (`ggml_blocks`, `k_quants`).

>>> model = wkv.quantization.quantize_model(wkv.load_model("model.pth"), bits=4)
>>> wkv.save_model(model, "model-int4.safetensors")

Nothing is imported before it is asked for: `wkv.checkpoints` uses the block types, and what quantises whole models
uses `wkv.checkpoints`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wkv.quantization.blockwise import Blocks, quantize_blocks
    from wkv.quantization.frozen import freeze_base, is_frozen, thaw
    from wkv.quantization.model import dequantize_model, is_quantized, quantize_model, resident_bytes
    from wkv.quantization.policy import Policy, default_policy
    from wkv.quantization.report import compare_models, quality_report

_HOMES = {
    "quantize_model": "model", "dequantize_model": "model", "is_quantized": "model", "resident_bytes": "model",
    "Policy": "policy", "default_policy": "policy",
    "Blocks": "blockwise", "quantize_blocks": "blockwise",
    "freeze_base": "frozen", "is_frozen": "frozen", "thaw": "frozen",
    "compare_models": "report", "quality_report": "report",
}  # fmt: skip

__all__ = [
    "Blocks",
    "Policy",
    "compare_models",
    "default_policy",
    "dequantize_model",
    "freeze_base",
    "is_frozen",
    "is_quantized",
    "quality_report",
    "quantize_blocks",
    "quantize_model",
    "resident_bytes",
    "thaw",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
