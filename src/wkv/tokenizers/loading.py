"""Tokenizers by name, by file, and from what a checkpoint remembers of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wkv.errors import TokenizerError
from wkv.tokenizers.base import Tokenizer
from wkv.tokenizers.bpe import BPETokenizer
from wkv.tokenizers.byte import ByteTokenizer
from wkv.tokenizers.world import WorldTokenizer

_NAMED: dict[str, type[WorldTokenizer] | type[ByteTokenizer]] = {"bytes": ByteTokenizer, "world": WorldTokenizer}


def available() -> list[str]:
    """The names that `load` knows."""
    return sorted(_NAMED)


def load(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by name (`available()`), or from a tokenizer.json file or a folder that holds one.

    Raises TokenizerError for an unknown name and for a file that cannot be used.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TokenizerError(f"load takes a name or a path, got {type(name_or_path).__name__}")
    if isinstance(name_or_path, str) and name_or_path in _NAMED:
        return _NAMED[name_or_path]()
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"no tokenizer {str(name_or_path)!r}: use {_choices()} or the path of a tokenizer.json")
    return BPETokenizer.load(path)


def from_dict(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises TokenizerError if the description is not one."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if isinstance(kind, str) and kind in _NAMED:
        return _NAMED[kind]()
    if kind != "bpe":
        raise TokenizerError(f"unknown tokenizer kind {kind!r}: expected {_choices()} or 'bpe'")
    definition = description.get("json")
    if not isinstance(definition, str):
        raise TokenizerError("a 'bpe' tokenizer needs its tokenizer.json text under 'json'")
    return BPETokenizer(definition)


def _choices() -> str:
    return ", ".join(repr(name) for name in available())
