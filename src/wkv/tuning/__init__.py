"""Fine-tuning: adapters that are trained in place of a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wkv.tuning.adapter import Adapter, WeightAdapter, active_adapter
from wkv.tuning.create import create, load, using
from wkv.tuning.foreign import export_adapter, import_adapter
from wkv.tuning.methods import METHODS, Method, canonical

if TYPE_CHECKING:
    from wkv.tuning.guidance import Guidance, guided_generate
    from wkv.tuning.observer import Observer, ObserverWeights, observe
    from wkv.tuning.state_arithmetic import interpolate, mix, subtract

# Loaded on first use: some of them need the training loop, which needs this package.
_HOMES = {
    "Guidance": "guidance", "guided_generate": "guidance",
    "Observer": "observer", "ObserverWeights": "observer", "observe": "observer",
    "interpolate": "state_arithmetic", "mix": "state_arithmetic", "subtract": "state_arithmetic",
}  # fmt: skip

__all__ = [
    "METHODS",
    "Adapter",
    "Guidance",
    "Method",
    "Observer",
    "ObserverWeights",
    "WeightAdapter",
    "active_adapter",
    "canonical",
    "create",
    "export_adapter",
    "guided_generate",
    "import_adapter",
    "interpolate",
    "load",
    "methods",
    "mix",
    "observe",
    "subtract",
    "using",
]


def methods() -> dict[str, str]:
    """Canonical name of every method -> one line about it."""
    return {name: method.about for name, method in METHODS.items()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
