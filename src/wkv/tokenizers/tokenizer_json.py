"""Reading a `tokenizer.json` that describes byte-level BPE: what is accepted, and what its ids stand for."""

from __future__ import annotations

import json
import re
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wkv.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
_LARGEST_ID = 1 << 22  # a damaged file must not make us reserve gigabytes
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def load_library() -> ModuleType:
    """The `tokenizers` package, which only byte-level BPE needs."""
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError('byte-level BPE needs the `tokenizers` library: pip install "wkv[train]"') from None
    return tokenizers


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte value.

    Visible Latin-1 characters stand for themselves; the other 68 bytes, in order, are U+0100 onwards.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(value) if value in visible else chr(next(hidden)) for value in range(256)]


def parse(definition: str) -> dict[str, Any]:
    """The JSON, once it is known to describe byte-level BPE."""
    try:
        parsed = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"not a tokenizer.json: invalid JSON ({error})") from None
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError("not a tokenizer.json: it has no 'model' entry")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise TokenizerError(f"the tokenizer model is {kind!r}; only byte-level BPE can be used here")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError("the tokenizer marks word parts with a prefix or suffix; byte-level BPE does not")
    if not any(step.get("type") == "ByteLevel" for step in _steps(parsed)):
        raise TokenizerError("the tokenizer is BPE over characters, not bytes (no 'ByteLevel' pre-tokenizer)")
    return parsed


def _steps(parsed: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer's steps: one, or those of a sequence."""
    step = parsed.get("pre_tokenizer")
    if not isinstance(step, dict):
        return []
    inner = step.get("pretokenizers") if step.get("type") == "Sequence" else [step]
    return [entry for entry in inner if isinstance(entry, dict)] if isinstance(inner, list) else []


def may_cut(parsed: dict[str, Any]) -> bool:
    """Whether long text may be cut before white space: the GPT-2 pattern alone, and no token that reaches across."""
    steps, normalizer = _steps(parsed), parsed.get("normalizer")
    plain = len(steps) == 1 and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space", True)
    added = [token for token in parsed.get("added_tokens") or [] if not token["special"]]
    across = any(
        re.search(r"\S\s", token["content"]) or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in added
    )
    return plain and not across and (normalizer is None or normalizer.get("type") == "NFC")


def build(definition: str) -> Backend:
    """The library's tokenizer, made to encode whole texts, always the same way, and no control tokens."""
    library = load_library()
    try:
        backend: Backend = library.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise TokenizerError(f"not a usable tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # that is: as the ordinary text they look like
    if backend.model.dropout is not None:
        backend.model.dropout = None  # random merges are for training only
    return backend


def check_added_ids(parsed: dict[str, Any], backend: Backend) -> None:
    """The library numbers added tokens itself; that must agree with the file, or the model would read other ids."""
    given = {token["content"]: token["id"] for token in parsed.get("added_tokens") or []}
    for content, index in given.items():
        found = backend.token_to_id(content)
        if found != index:
            raise TokenizerError(f"the added token {content!r} is id {index} in the file, but comes out as id {found}")


def control_tokens(backend: Backend) -> dict[str, int]:
    """Text -> id of the tokens marked special."""
    added = backend.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.special}


def end_of_text(control: dict[str, int]) -> int | None:
    """`<|endoftext|>` where there is one, else `</s>`, else a control token with id 0."""
    for name in (END_OF_TEXT, "</s>", "<|end_of_text|>"):
        if name in control:
            return control[name]
    return 0 if 0 in control.values() else None


def byte_ids(backend: Backend, control: set[int]) -> list[int | None]:
    """The id of each single byte. Only bytes that never occur in UTF-8 (C0, C1, F5 to FF) may have none."""
    ids = [backend.token_to_id(character) for character in byte_characters()]
    missing = [value for value, index in enumerate(ids) if index is None and value not in _NEVER_IN_UTF8]
    if missing:
        raise TokenizerError(f"{len(missing)} of the 243 bytes of UTF-8 are not in the vocabulary: text would be lost")
    if control.intersection(ids):
        raise TokenizerError("a control token takes the place of a byte: text would be lost")
    return ids


def table(backend: Backend, control: set[int]) -> list[bytes]:
    """`table[id] -> bytes`; empty for control tokens and unused ids."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
    values = {character: value for value, character in enumerate(byte_characters())}
    largest = max(vocabulary.values(), default=-1)
    if largest > _LARGEST_ID:
        raise TokenizerError(f"token id {largest} is larger than any vocabulary ({_LARGEST_ID})")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise TokenizerError("two tokens of the vocabulary have the same id")
    table = [b""] * (largest + 1)
    for token, index in vocabulary.items():
        if index in control:
            continue
        try:
            table[index] = added[index].encode("utf-8") if index in added else bytes(values[char] for char in token)
        except KeyError:
            raise TokenizerError(f"token {token!r} (id {index}) is not written in byte-level characters") from None
    return table
