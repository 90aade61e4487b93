"""With which options tests build small models."""

from __future__ import annotations

import dataclasses
from typing import Any

from wkv.registry import entry

# Beside vocabulary, width and depth; every model works without, but tests should reach all of its parts.
OVERRIDES: dict[str, dict[str, Any]] = {
    "based": {"feature_size": 4, "window": 6},
    "hybrid": {"fusion": "additive", "state_heads": 2, "state_window": 5, "probes": 2, "key_value_heads": 2},
    "rrwkv": {"medium_period": 4},
}


def options(name: str, head_size: int) -> dict[str, Any]:
    """What a small model needs besides its sizes; `head_size` only where the model has one."""
    known = {field.name for field in dataclasses.fields(entry(name).config_class)}
    return {**({"head_size": head_size} if "head_size" in known else {}), **OVERRIDES.get(name, {})}
