"""Checkpoints: load any official file, save, and say what a file is.

>>> model = wkv.load_model("RWKV-x070-World-0.1B.pth")
>>> wkv.save_model(model, "model.safetensors")
>>> print(wkv.checkpoints.inspect("model.safetensors").verdict)
"""

from __future__ import annotations

from wkv.checkpoints.info import CheckpointInfo, inspect
from wkv.checkpoints.loading import load_model
from wkv.checkpoints.saving import save_model

__all__ = ["CheckpointInfo", "inspect", "load_model", "save_model"]
