"""One training document, and which parts of it a model learns to write."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A piece of a document that is tokenised by itself, as inference tokenises a prompt and generates an answer.

    Args:
        text: the piece.
        counts: the loss counts the tokens that begin within this many characters from its start: 0 for what is only
            read, `len(text)` for what the model is to write.
        start, stop: between these characters stands what may be shortened, from its beginning on, where a document is
            too long, such as a question between its labels.
    """

    text: str
    counts: int = 0
    start: int = 0
    stop: int = 0

    @property
    def written(self) -> bool:
        """Whether all of it counts."""
        return self.counts >= len(self.text)


@dataclass(frozen=True)
class Document:
    """One text.

    Args:
        name: the path below the folder it came from; for rows of a file, "path:line".
        text: the whole text.
        parts: how it divides into what is read and what is written, joined exactly `text`; empty: all of it counts.
        closing: what ends it, as part of what is written, where the vocabulary has no end-of-text id.
        opening: characters at its beginning, inside the first part, that stay where the oldest turns are cut off, such
            as a system message.
        keep: only the first so many of its tokens are used, without what ends it; None: all.
    """

    name: str
    text: str
    parts: tuple[Part, ...] = ()
    closing: str = ""
    opening: int = 0
    keep: int | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())
