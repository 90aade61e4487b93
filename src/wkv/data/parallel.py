"""Tokenising many documents, in this process or in several, in their order and in bounded memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from wkv.data.document import Document
from wkv.data.encoding import Encoded, encode_document
from wkv.errors import DataError, TokenizerError
from wkv.tokenizers import Tokenizer, from_dict

_CHUNK = 1 << 20  # characters that go to a worker at a time
_MOST = 1 << 10  # documents
_ALONE = 64  # chunks that this process does by itself before it starts others, which takes seconds


Pieces = Generator[list[Encoded], None, None]


def encode_all(documents: Iterable[Document], tokenizer: Tokenizer, workers: int | None) -> Pieces:
    """`encode_document` for all, some documents at a time; closing it ends the workers. `workers`: see `build_cache`.

    Raises:
        DataError: for an impossible number of workers, or if one dies.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise DataError(f"workers must be a positive integer or None, found {workers!r}")
    chunks = _chunks(documents)
    if workers is None:
        for chunk in itertools.islice(chunks, _ALONE):
            yield _encode_chunk(chunk, tokenizer)
        workers = _cores()
    if workers == 1:
        yield from (_encode_chunk(chunk, tokenizer) for chunk in chunks)
    else:
        yield from _encode_elsewhere(chunks, tokenizer, workers)


def _cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK or len(chunk) == _MOST:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_elsewhere(chunks: Iterator[list[Document]], tokenizer: Tokenizer, workers: int) -> Pieces:
    description = _description(tokenizer)
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (description,))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        hint = 'guard the script with if __name__ == "__main__", or use workers=1 if memory is short'
        raise DataError(f"a process that tokenises has ended by itself; {hint}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _description(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a worker makes the same tokenizer from."""
    description = tokenizer.to_dict()
    try:
        from_dict(description)
    except TokenizerError as error:
        raise DataError(f"{tokenizer!r} cannot be sent to other processes ({error}); use workers=1") from error
    return description


_tokenizer: Tokenizer  # of a worker process


def _start_worker(description: dict[str, Any]) -> None:
    global _tokenizer
    if description.get("kind") == "world":
        import torch  # noqa: F401 (the native World encoder is only looked for where torch is loaded)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one worker per core already
    _tokenizer = from_dict(description)


def _work(chunk: list[Document]) -> list[Encoded]:
    return _encode_chunk(chunk, _tokenizer)


def _encode_chunk(chunk: list[Document], tokenizer: Tokenizer) -> list[Encoded]:
    return [encode_document(document, tokenizer) for document in chunk]
