"""From the `data` section of a recipe to tokens, held-out texts and batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wkv.data import (
    Batch,
    Document,
    FittedDocuments,
    MagicPrimeWindows,
    PackedDocuments,
    PaddedDocuments,
    Sampler,
    StreamingDocuments,
    TokenStore,
    UniformWindows,
    WholeDocuments,
    iter_documents,
    load_documents,
    open_cache,
    read_binidx,
    split_held_out,
)
from wkv.data.sampling import Integers
from wkv.errors import DataError, RecipeError
from wkv.evaluation.bits_per_byte import Text, scored_bytes
from wkv.tokenizers import Tokenizer
from wkv.training.sections import DataRecipe, TrainRecipe

_PIECE = 1 << 24  # tokens that are compared with the vocabulary at a time

ChooseTokenizer = Callable[[Iterable[Document] | None], Tokenizer]


@dataclass
class Corpus:
    """What a run reads.

    Args:
        store: the training tokens.
        held_out: texts for evaluations; may be empty.
        tokenizer: what made the tokens.
        num_bytes: of the training text; None if only its tokens are known.
        note: how many documents were shortened or left out; empty if none was.
    """

    store: TokenStore
    held_out: list[Text]
    tokenizer: Tokenizer
    num_bytes: int | None = None
    note: str = ""

    @property
    def held_out_bytes(self) -> int:
        """How many bytes are scored: all of a text in UTF-8, of a conversation the answers."""
        return sum(map(scored_bytes, self.held_out))


def load_corpus(recipe: DataRecipe, choose: ChooseTokenizer, context_length: int | None = None) -> Corpus:
    """Read what `data.source` names, all of it in memory unless it holds tokens.

    Args:
        recipe: where, and what is held out.
        choose: gives the tokenizer, perhaps trained on the training documents it is given (None: there are only
            tokens).
        context_length: of the rows that documents have to fit into, where the recipe says so; None: they need not.

    Raises:
        DataError: if it cannot be used; the message names the file and the place in it.
    """
    if holds_tokens(recipe.source):
        return _from_tokens(recipe, choose(None))
    documents = load_documents(recipe.source, recipe.row_fields())
    train, held_out = divide(documents, recipe)
    tokenizer = choose(train)
    size = sum(document.num_bytes for document in train)
    fitted = fit(train, tokenizer, recipe, context_length)
    return Corpus(TokenStore.from_documents(fitted, tokenizer), held_out, tokenizer, size, report(fitted))


def fit(
    documents: Iterable[Document], tokenizer: Tokenizer, recipe: DataRecipe, context_length: int | None
) -> Iterable[Document]:
    """The documents as `data.too_long` wants them, if they have to fit into rows of this length."""
    if context_length is None or not recipe.fits:
        return documents
    return FittedDocuments(documents, tokenizer, context_length + 1, recipe.too_long)


def report(documents: Iterable[Document]) -> str:
    """What `fit` did, once they have been read."""
    return documents.report() if isinstance(documents, FittedDocuments) else ""


def sample_corpus(
    recipe: DataRecipe, choose: ChooseTokenizer, characters: int, context_length: int | None = None
) -> Corpus:
    """The first documents of a source of text, at least one, until there are this many characters; none is held out."""
    documents: list[Document] = []
    for document in iter_documents(recipe.source, recipe.row_fields()):
        documents.append(document)
        characters -= len(document.text)
        if characters <= 0:
            break
    tokenizer = choose(documents)
    fitted = fit(documents, tokenizer, recipe, context_length)
    return Corpus(TokenStore.from_documents(fitted, tokenizer), [], tokenizer)


def divide(documents: list[Document], recipe: DataRecipe) -> tuple[list[Document], list[Text]]:
    """Training documents and held-out texts."""
    own = own_held_out(recipe)
    if own is not None:
        return documents, own
    train, held_out = split_held_out(documents, recipe.held_out_every, recipe.held_out_fraction)
    return train, [scored(document) for document in held_out]


def scored(document: Document) -> Text:
    """What an evaluation needs of a document: its text, or all of it where only parts count."""
    return document if document.parts else document.text


def own_held_out(recipe: DataRecipe) -> list[Text] | None:
    """The held-out texts where they are not a part of the source; None where they are."""
    if recipe.held_out is not None:
        return [scored(document) for document in iter_documents(recipe.held_out, recipe.row_fields())]
    return [] if recipe.held_out_fraction == 0 else None


class HoldOut:
    """Divides documents as they come, exactly as `divide` does, and keeps the held-out texts.

    Args:
        recipe: what is held out.
    """

    def __init__(self, recipe: DataRecipe) -> None:
        self._recipe = recipe
        self.texts: list[Text] = []
        self.num_bytes = 0

    def training(self) -> Iterator[Document]:
        """The training documents of the source, read anew; `texts` and `num_bytes` are complete at its end."""
        self.texts, self.num_bytes = [], 0
        for document in self._divided():
            self.num_bytes += document.num_bytes
            yield document

    def _divided(self) -> Iterator[Document]:
        recipe, every = self._recipe, self._recipe.held_out_every
        documents = iter_documents(recipe.source, recipe.row_fields())
        own = own_held_out(recipe)
        if own is not None:
            self.texts = own
            yield from documents
            return
        first = list(itertools.islice(documents, every))
        if len(first) < every:
            train, self.texts = divide(first, recipe)
            yield from train
            return
        for number, document in enumerate(itertools.chain(first, documents), 1):
            if number % every:
                yield document
            else:
                self.texts.append(scored(document))


def holds_tokens(source: str) -> bool:
    """Whether it is a binidx pair or a token cache."""
    path = Path(source)
    return _is_cache(path) or _is_binidx(path)


def _is_cache(path: Path) -> bool:
    return (path / "cache.json").is_file()


def _is_binidx(path: Path) -> bool:
    return path.suffix in (".bin", ".idx") or (not path.exists() and path.with_name(path.name + ".idx").is_file())


def _from_tokens(recipe: DataRecipe, tokenizer: Tokenizer) -> Corpus:
    if recipe.cache is not None:
        raise RecipeError(f"data.cache is for text, and {recipe.source} holds tokens already; leave it out")
    path = Path(recipe.source)
    store = open_cache(path, tokenizer) if _is_cache(path) else read_binidx(path)
    check_vocabulary(store, tokenizer.vocab_size, recipe.source)
    own = own_held_out(recipe)
    if own is not None:
        return Corpus(store, own, tokenizer)
    count = len(store) - max(1, round(len(store) * recipe.held_out_fraction))
    if count < 1:
        raise DataError(f"{recipe.source}: one document leaves nothing to hold out; give data.held_out, or set "
                        "data.held_out_fraction to 0")  # fmt: skip
    held_out = [_text(store.document(i), tokenizer) for i in range(count, len(store))]
    end = int(store.starts[count])
    mask = None if store.loss_mask is None else store.loss_mask[:end]
    return Corpus(TokenStore(store.tokens[:end], store.starts[:count], mask), [x for x in held_out if x], tokenizer)


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode_bytes([int(i) for i in ids if i != tokenizer.eos_id])


def check_vocabulary(store: TokenStore, vocab_size: int, name: str) -> None:
    """Raise `DataError`, naming the document, if a token is outside the vocabulary."""
    limits = np.iinfo(store.tokens.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    for begin in range(0, store.num_tokens, _PIECE):
        piece = store.tokens[begin : begin + _PIECE]
        wrong = np.flatnonzero((piece < 0) | (piece >= vocab_size))
        if len(wrong):
            place = begin + int(wrong[0])
            document = int(np.searchsorted(store.starts, place, side="right")) - 1
            found = f"id {store.tokens[place]} in document {document} (token {place})"
            raise DataError(f"{name}: {found} is outside the vocabulary of {vocab_size} entries; which tokenizer made "
                            "this file?")  # fmt: skip


class UnbrokenStream(StreamingDocuments):
    """`StreamingDocuments` whose states go on where documents begin."""

    def read(self, rows: Integers) -> Batch:
        """The batch of these rows."""
        return replace(super().read(rows), reset=None)


def create_sampler(
    store: TokenStore, data: DataRecipe, train: TrainRecipe, rank: int = 0, world_size: int = 1
) -> Sampler:
    """Batches in the order the recipe asks for; this process is number `rank` of `world_size` that share the rows."""
    length, rows, seed = train.context_length, train.batch_size // world_size, train.seed
    if data.order == "prime":
        return MagicPrimeWindows(store, length, rows, rank, world_size)
    if data.order == "packed":
        return PackedDocuments(store, length, rows, seed, data.reset, rank, world_size)
    if data.order == "whole":
        return WholeDocuments(store, length, rows, seed, rank, world_size)
    if data.order == "padded":
        return PaddedDocuments(store, length, rows, seed, rank, world_size)
    if data.order == "stream":
        stream = StreamingDocuments if data.reset else UnbrokenStream
        return stream(store, length, rows, seed, rank, world_size)
    return UniformWindows(store, length, rows, seed, rank, world_size)
