"""The starter: a small RWKV-7 inside the package, for a first text right after installation.

>>> model = wkv.load_model("starter")
>>> wkv.starter.card()["held_out"]["bits_per_byte"]

`CARD.md` beside this file says what it was trained on, how good it is and what it cannot do; `card.json` has the same
figures for programs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wkv.errors import CheckpointError

NAME = "starter"
"""What `wkv.load_model` knows it by."""

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
"""Options of `wkv.Sampler` that suit it: a small model wanders off where it may take every token."""


def path() -> Path:
    """The checkpoint, a .safetensors file in bfloat16 with its tokenizer inside.

    Raises:
        CheckpointError: if this installation was made without it.
    """
    return _file("model.safetensors")


def card() -> dict[str, Any]:
    """What is known of the model: `model`, `data`, `training` and `held_out`, as `CARD.md` shows them.

    Raises:
        CheckpointError: if this installation was made without it.
    """
    found: dict[str, Any] = json.loads(_file("card.json").read_text(encoding="utf-8"))
    return found


def _file(name: str) -> Path:
    found = Path(__file__).with_name(name)
    if not found.is_file():
        raise CheckpointError(f"{found} is missing: this installation of wkv has no starter model; install wkv again")
    return found
