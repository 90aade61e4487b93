"""wkv: the RWKV family of recurrent language models as one library.

>>> import wkv
>>> model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=64, num_layers=2, head_size=32)
>>> logits, state = model(tokens)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import wkv` touches nothing heavy.
_PUBLIC = {
    "State": "wkv.state",
    "WkvError": "wkv.errors",
    "list_models": "wkv.registry",
    "create_model": "wkv.registry",
    "load_model": "wkv.checkpoints",
    "save_model": "wkv.checkpoints",
    "generate": "wkv.inference",
    "Sampler": "wkv.inference",
    "upgrade_model": "wkv.upgrade",
}
_MODULES = (
    "checkpoints", "data", "errors", "evaluation", "inference", "layers", "models", "native", "ops", "quantization",
    "registry", "starter", "state", "tokenizers", "training", "tuning",
)  # fmt: skip

__all__ = [*_PUBLIC, "__version__", *_MODULES]

if TYPE_CHECKING:
    from wkv import checkpoints as checkpoints
    from wkv import data as data
    from wkv import inference as inference
    from wkv import native as native
    from wkv import ops as ops
    from wkv import quantization as quantization
    from wkv import starter as starter
    from wkv import tokenizers as tokenizers
    from wkv import training as training
    from wkv import tuning as tuning
    from wkv.checkpoints import load_model as load_model
    from wkv.checkpoints import save_model as save_model
    from wkv.errors import WkvError as WkvError
    from wkv.inference import Sampler as Sampler
    from wkv.inference.generate import generate as generate
    from wkv.registry import create_model as create_model
    from wkv.registry import list_models as list_models
    from wkv.state import State as State
    from wkv.upgrade import upgrade_model as upgrade_model


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"wkv.{name}")
    else:
        raise AttributeError(f"module 'wkv' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
