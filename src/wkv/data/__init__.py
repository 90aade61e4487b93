"""Training text: documents from files and data sets, tokens in memory or in mapped files, and batches.

Sources (`iter_documents`) give documents; `TokenStore` holds their tokens, whether they come from memory
(`TokenStore.from_documents`), a cache (`build_cache`, `open_cache`) or a binidx pair (`read_binidx`); samplers draw
batches from a store.

Nothing is imported before it is asked for: a process that only tokenises needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wkv.data.batch import Batch, Sampler
    from wkv.data.binidx import read_binidx, write_binidx
    from wkv.data.cache import build_cache, open_cache, tokenizer_fingerprint
    from wkv.data.conversations import conversation
    from wkv.data.document import Document, Part
    from wkv.data.documents import iter_documents, load_documents, split_held_out
    from wkv.data.encoding import encode_document
    from wkv.data.packing import PackedDocuments, PaddedDocuments, StreamingDocuments
    from wkv.data.rows import Fields
    from wkv.data.store import TokenStore
    from wkv.data.stream import RandomWindows, tokenize
    from wkv.data.truncation import FittedDocuments
    from wkv.data.whole import WholeDocuments
    from wkv.data.windows import MagicPrimeWindows, UniformWindows, magic_prime

_HOMES = {
    "Batch": "batch", "Sampler": "batch",
    "read_binidx": "binidx", "write_binidx": "binidx",
    "build_cache": "cache", "open_cache": "cache", "tokenizer_fingerprint": "cache",
    "conversation": "conversations",
    "Document": "document", "Part": "document",
    "iter_documents": "documents", "load_documents": "documents", "split_held_out": "documents",
    "encode_document": "encoding",
    "PackedDocuments": "packing", "PaddedDocuments": "packing", "StreamingDocuments": "packing",
    "Fields": "rows",
    "TokenStore": "store",
    "RandomWindows": "stream", "tokenize": "stream",
    "FittedDocuments": "truncation", "WholeDocuments": "whole",
    "MagicPrimeWindows": "windows", "UniformWindows": "windows", "magic_prime": "windows",
}  # fmt: skip

__all__ = [
    "Batch",
    "Document",
    "Fields",
    "FittedDocuments",
    "MagicPrimeWindows",
    "PackedDocuments",
    "PaddedDocuments",
    "Part",
    "RandomWindows",
    "Sampler",
    "StreamingDocuments",
    "TokenStore",
    "UniformWindows",
    "WholeDocuments",
    "build_cache",
    "conversation",
    "encode_document",
    "iter_documents",
    "load_documents",
    "magic_prime",
    "open_cache",
    "read_binidx",
    "split_held_out",
    "tokenize",
    "tokenizer_fingerprint",
    "write_binidx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
