"""Training text: documents, what is held out, token streams and batches."""

from wkv.data.documents import Document, load_documents, split_held_out
from wkv.data.stream import RandomWindows, tokenize

__all__ = ["Document", "RandomWindows", "load_documents", "split_held_out", "tokenize"]
