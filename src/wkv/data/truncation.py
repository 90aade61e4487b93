"""What becomes of documents that are longer than a row: a rule, and a count of what it did."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from wkv.data.document import Document, Part
from wkv.data.encoding import Encoded, encode_document
from wkv.errors import DataError
from wkv.tokenizers import Tokenizer

RULES = ("error", "drop", "left", "right")


@dataclass(eq=False)
class FittedDocuments:
    """The documents of a corpus with at most `max_tokens` tokens each. Iterating reads it anew and counts anew.

    A conversation of which nothing is left that counts in the loss is an error, or with the other rules left out.

    Args:
        documents: read one after the other.
        tokenizer: the one that will make the tokens.
        max_tokens: per document, its end included. For rows of T inputs it is T + 1: the last is a target only.
        rule: for documents that are longer:
            "error" refuses them;
            "drop" leaves them out;
            "left" takes away the oldest turns, then of the last one the beginning of the question (of its input if it
            has one), but never the system message or a part of the answer; of a plain text the beginning;
            "right" takes away the end, so that the model does not learn to end there, and what was a question last;
            None refuses conversations and lets plain texts pass, which samplers cut themselves.

    Attributes:
        num_documents, num_shortened, num_dropped: how many have been read, were cut, and were left out.

    Raises:
        DataError: for an unknown rule or an impossible size; while iterating, for what the rule refuses, and if all
            documents are left out.
    """

    documents: Iterable[Document]
    tokenizer: Tokenizer
    max_tokens: int
    rule: str | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in RULES:
            raise DataError(f"rule must be one of {', '.join(RULES)}, or None, found {self.rule!r}")
        size = self.max_tokens
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise DataError(f"max_tokens must be an integer of at least 2, found {size!r}")
        self.num_documents = self.num_shortened = self.num_dropped = 0

    def __iter__(self) -> Iterator[Document]:
        self.num_documents = self.num_shortened = self.num_dropped = 0
        for document in self.documents:
            fitting = self._fit(document)
            self.num_documents += 1
            self.num_dropped += fitting is None
            self.num_shortened += fitting is not None and fitting is not document
            if fitting is not None:
                yield fitting
        if self.num_documents and self.num_dropped == self.num_documents:
            raise DataError(f"no document is left: {self.report()}; raise context_length, or give shorter ones")

    def report(self) -> str:
        """What was done, in a line; empty if nothing was."""
        done = [f"{count} {what}" for count, what in ((self.num_shortened, "shortened"), (self.num_dropped, "left out"))
                if count]  # fmt: skip
        if not done:
            return ""
        return f"{' and '.join(done)} of {self.num_documents} documents, to fit into {self.max_tokens} tokens"

    def _fit(self, document: Document) -> Document | None:
        encoded = encode_document(document, self.tokenizer)
        if len(encoded.ids) <= self.max_tokens:
            return document if _learns(encoded) else self._refuse(document, "nothing in it counts in the loss")
        if self.rule is None and not document.parts:
            return document
        if self.rule == "left":
            return self._without_beginning(document)
        if self.rule == "right":
            return self._without_end(document, encoded)
        found = f"it has {len(encoded.ids)} tokens, and {self.max_tokens} fit (context_length + 1)"
        return self._refuse(document, f'{found}; raise context_length, or choose "drop", "left" or "right" for such')

    def _refuse(self, document: Document, problem: str) -> Document | None:
        if self.rule in (None, "error"):
            raise DataError(f"{document.name}: {problem}")
        return None

    def _fits(self, document: Document) -> bool:
        return len(encode_document(document, self.tokenizer).ids) <= self.max_tokens

    def _without_end(self, document: Document, encoded: Encoded) -> Document | None:
        if encoded.counts is None:
            return replace(document, keep=self.max_tokens)
        learnt = np.flatnonzero(encoded.counts[: self.max_tokens])
        return replace(document, keep=int(learnt[-1]) + 1) if _learns(encoded, self.max_tokens) else None

    def _without_beginning(self, document: Document) -> Document | None:
        """Without as few of the oldest turns as possible; where the last one alone is too long, it is cut itself."""
        if not document.parts:
            return self._first(len(document.text), lambda start: replace(document, text=document.text[start:]))
        turns = [place for place, part in enumerate(document.parts) if _begins_turn(document, place)]
        shorter = self._first(len(turns), lambda number: _from_part(document, turns[number]))
        if shorter is not None:
            return shorter
        last = _from_part(document, turns[-1])
        loose = last.parts[0].stop - last.parts[0].start
        return self._first(loose, lambda count: _without_loose(last, count))

    def _first(self, end: int, cut: Callable[[int], Document]) -> Document | None:
        """`cut(n)` for the smallest n in 1 .. end - 1 with which it fits; None if none does.

        Found by bisection, which takes for granted that more cut away means fewer tokens. Where that is not so by a
        token, a document that fits is found all the same.
        """
        places = range(1, end)
        found = bisect.bisect_left(places, True, key=lambda place: self._fits(cut(place)))
        return cut(places[found]) if found < len(places) else None


def _begins_turn(document: Document, place: int) -> bool:
    """Whether a turn begins with this part: what is read, after what is written."""
    parts = document.parts
    return place == 0 or (parts[place - 1].written and not parts[place].written)


def _from_part(document: Document, place: int) -> Document:
    """From this part on, after the opening of the document."""
    if place == 0:
        return document
    part, shift = document.parts[place], document.opening
    first = Part(document.text[:shift] + part.text, 0, part.start + shift, part.stop + shift)
    return _with_parts(document, (first, *document.parts[place + 1 :]))


def _without_loose(document: Document, count: int) -> Document:
    """Without so many characters of what may be shortened in the first part, and without blanks after them."""
    part = document.parts[0]
    rest = part.text[part.start + count : part.stop].lstrip()
    text = part.text[: part.start] + rest + part.text[part.stop :]
    first = replace(part, text=text, stop=part.start + len(rest))
    return _with_parts(document, (first, *document.parts[1:]))


def _with_parts(document: Document, parts: tuple[Part, ...]) -> Document:
    return replace(document, text="".join(part.text for part in parts), parts=parts)


def _learns(encoded: Encoded, length: int | None = None) -> bool:
    """Whether a target counts; the first token is none. Plain texts are judged by the samplers."""
    return encoded.counts is None or bool(encoded.counts[1:length].any())
