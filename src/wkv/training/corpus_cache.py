"""The corpus of a recipe in a folder: tokens in mapped files, beside the held-out texts and where they come from.

    tokens/         a token cache (`wkv.data.build_cache`);
    held_out.jsonl  one held-out text per line;
    corpus.json     the source, what was held out, and the checksum of held_out.jsonl.

The folder gets its name when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from wkv.data import Document, Part, build_cache, open_cache
from wkv.errors import DataError, RecipeError
from wkv.evaluation.bits_per_byte import Text
from wkv.tokenizers import Tokenizer
from wkv.training.sections import DataRecipe
from wkv.training.source import ChooseTokenizer, Corpus, HoldOut, fit, holds_tokens, report

TOKENS, HELD_OUT, META = "tokens", "held_out.jsonl", "corpus.json"
_LATER = {"template": "chat", "think": "none"}  # what caches from before these keys were made with
# What makes it another corpus.
SETTINGS = ("source", "fields", "template", "think", "held_out", "held_out_every", "held_out_fraction")


def cached_corpus(
    recipe: DataRecipe, choose: ChooseTokenizer, progress: Any = None, context_length: int | None = None
) -> Corpus:
    """The corpus in `data.cache`, which is made if it is not there; documents are read one after the other.

    Args:
        recipe: with `cache`.
        choose: gives the tokenizer, perhaps trained on the training documents.
        progress: see `build_cache`.
        context_length: see `load_corpus`.

    Raises:
        DataError: if it was made of something else, is damaged, or cannot be made.
    """
    folder = Path(recipe.cache or "")
    if holds_tokens(recipe.source):
        raise RecipeError(f"data.cache is for text, and {recipe.source} holds tokens already; leave it out")
    settings = _settings(recipe, context_length)
    built = None if is_built(folder) else _build(folder, recipe, choose, progress, context_length)
    meta = _read_meta(folder, settings)
    tokenizer = built or choose(HoldOut(recipe).training())
    texts = _read_texts(folder / HELD_OUT, meta["held_out_sha256"])
    return Corpus(open_cache(folder / TOKENS, tokenizer), texts, tokenizer, meta["train_bytes"], meta["note"])


def is_built(folder: Path) -> bool:
    """Whether there is a corpus in `folder`."""
    return (folder / META).is_file()


def _build(
    folder: Path, recipe: DataRecipe, choose: ChooseTokenizer, progress: Any, context_length: int | None
) -> Tokenizer:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} holds something other than a corpus of `wkv train`; choose another data.cache")
    temporary = folder.absolute().with_name(f".{secrets.token_hex(4)}.{folder.absolute().name}")
    held_out = HoldOut(recipe)
    try:
        temporary.mkdir(parents=True)
        tokenizer = choose(HoldOut(recipe).training())
        fitted = fit(held_out.training(), tokenizer, recipe, context_length)
        build_cache(fitted, tokenizer, temporary / TOKENS, progress=progress)
        content = "".join(json.dumps(_as_json(text)) + "\n" for text in held_out.texts).encode()
        (temporary / HELD_OUT).write_bytes(content)
        meta = {**_settings(recipe, context_length), "train_bytes": held_out.num_bytes, "note": report(fitted),
                "held_out_sha256": hashlib.sha256(content).hexdigest()}  # fmt: skip
        (temporary / META).write_text(json.dumps(meta, indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
        return tokenizer
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}; nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_json(text: Text) -> Any:
    """A text, or a conversation with its parts."""
    if isinstance(text, Document):
        return dataclasses.asdict(text)
    return text if isinstance(text, str) else text.decode()


def _from_json(value: Any) -> Text:
    if isinstance(value, str):
        return value
    return Document(**{**value, "parts": tuple(Part(**part) for part in value["parts"])})


def _settings(recipe: DataRecipe, context_length: int | None) -> dict[str, Any]:
    """Values that a later run must agree with; shortened documents are those of one context length."""
    fitted = recipe.fits and context_length is not None
    limit = f"{recipe.too_long or 'error'} (context_length {context_length})" if fitted else None
    chosen = {key: value for key, value in dataclasses.asdict(recipe).items() if key in SETTINGS}
    return {**chosen, "too_long": limit}


def _read_meta(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_bytes())
        known = {"train_bytes": int(meta["train_bytes"]), "held_out_sha256": str(meta["held_out_sha256"]),
                 "note": str(meta.get("note", ""))}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); delete {folder} to build it anew") from error
    for key, value in settings.items():
        if meta.get(key, _LATER.get(key)) != value:
            found = f"data.{key} {meta.get(key)!r}, the recipe says {value!r}"
            raise DataError(f"{folder} was made with {found}; choose another data.cache, or delete it")
    return known


def _read_texts(path: Path, checksum: str) -> list[Text]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); build the cache anew") from error
    if hashlib.sha256(content).hexdigest() != checksum:
        raise DataError(f"{path}: damaged (its checksum has changed); delete {path.parent} to build it anew")
    return [_from_json(json.loads(line)) for line in content.decode().splitlines()]
