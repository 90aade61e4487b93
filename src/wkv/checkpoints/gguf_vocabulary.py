"""The vocabulary in a GGUF file: tokenizer.ggml.model "rwkv", tokens as the inside of Python's repr of bytes."""

from __future__ import annotations

import ast
import json
from typing import Any

from wkv.checkpoints.gguf_file import GGUFFile, Value
from wkv.tokenizers import Tokenizer, WorldTokenizer
from wkv.tokenizers.world import NUM_TOKENS

_MODEL, _TOKENS, _TYPES = (f"tokenizer.ggml.{key}" for key in ("model", "tokens", "token_type"))
# Our own entry, for tokenizers that llama.cpp does not know.
_OWN = "wkv.tokenizer"
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_LONGEST = 4096  # characters of one token; a damaged file must not feed more to the parser
_NEW_LINES = b"\n\n"


def read_vocabulary(file: GGUFFile, num_rows: int) -> tuple[dict[str, Any] | None, list[str]]:
    """Description of the tokenizer, or None and the reason as a note.

    Args:
        file: the file.
        num_rows: rows of its embedding.

    Raises:
        CheckpointError: if the entries have wrong types, or the vocabulary does not fit the embedding.
    """
    own = _typed(file, _OWN, "str")
    if own is not None:
        return _own_description(file, own), []
    model, tokens = _typed(file, _MODEL, "str"), _typed(file, _TOKENS, "str[]")
    if tokens is not None and len(tokens) != num_rows:
        raise file.error(f"{_TOKENS} has {len(tokens)} entries, but the embedding has {num_rows} rows")
    if model in (None, "none", "no_vocab"):
        return None, []
    if model != "rwkv" or tokens is None:
        return None, ["its vocabulary is not one of RWKV and is left out"]
    if is_world(tokens):
        return {"kind": "world"}, []
    return None, ["its vocabulary is not the World vocabulary and is left out; give a tokenizer where text is used"]


def _typed(file: GGUFFile, key: str, kind: str) -> Any:
    found = file.metadata.get(key)
    if found is None:
        return None
    if found.type != kind:
        raise file.error(f"damaged: {key} has type {found.type}, expected {kind}")
    return found.value


def _own_description(file: GGUFFile, text: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise file.error(f"damaged: {_OWN} is not JSON") from error
    if not isinstance(described, dict):
        raise file.error(f"damaged: {_OWN} does not describe a tokenizer")
    return described


def token_text(token: bytes) -> str:
    """How a token is written: b"it's\\n" -> "it's\\\\n"."""
    return repr(token)[2:-1]


def token_bytes(text: str) -> bytes | None:
    """The bytes of a written token; None if it is not one."""
    if len(text) > _LONGEST:
        return None
    quote = "'" if '"' in text else '"'
    try:
        value = ast.literal_eval(f"b{quote}{text}{quote}")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, bytes) else None


def _world_tokens() -> list[bytes]:
    """The bytes of ids 1, 2, ..."""
    tokenizer = WorldTokenizer()
    return [tokenizer.decode_bytes([number]) for number in range(1, NUM_TOKENS + 1)]


def is_world(tokens: list[str]) -> bool:
    """Whether these are the World vocabulary, however they are escaped. What pads it does not count."""
    expected = _world_tokens()
    found = tokens[1 : len(expected) + 1]
    if len(found) < len(expected):
        return False
    return all(
        text == token_text(token) or token_bytes(text) == token for text, token in zip(found, expected, strict=True)
    )


def write_vocabulary(tokenizer: Tokenizer | None, vocab_size: int, arch: str) -> dict[str, Value]:
    """The metadata entries of a tokenizer.

    The World vocabulary is written as llama.cpp reads it. Any other goes into an entry of our own beside the model
    "none", with which llama.cpp takes and gives token ids only.
    """
    if isinstance(tokenizer, WorldTokenizer) and tokenizer.vocab_size <= vocab_size:
        return _world(tokenizer, vocab_size)
    entries = {_MODEL: Value("str", "none"), f"{arch}.vocab_size": Value("u32", vocab_size)}
    if tokenizer is not None:
        entries[_OWN] = Value("str", json.dumps(tokenizer.to_dict()))
    return entries


def _world(tokenizer: WorldTokenizer, vocab_size: int) -> dict[str, Value]:
    table = _world_tokens()
    padding = range(len(table) + 1, vocab_size)
    texts = ["<s>", *map(token_text, table), *(f"[PAD{number}]" for number in padding)]
    types = [_CONTROL, *[_NORMAL] * len(table), *[_UNUSED] * len(padding)]
    ids = {"eot": tokenizer.encode(_NEW_LINES)[0], "bos": 0, "eos": 0}
    return {
        _MODEL: Value("str", "rwkv"),
        _TOKENS: Value("str[]", texts),
        _TYPES: Value("i32[]", types),
        **{f"tokenizer.ggml.{name}_token_id": Value("u32", number) for name, number in ids.items()},
    }
