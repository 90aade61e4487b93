"""Byte-level byte-pair encoding through the `tokenizers` library: small vocabularies trained on one's own text, and
foreign `tokenizer.json` files of the same kind, such as the GPT-NeoX one of the RWKV-4 Pile models.

Byte-level means: text is split into words by a pattern, each word becomes its UTF-8 bytes, every byte is written as
one printable character, and learned merges join those characters. All bytes are in the vocabulary, so that any text
can be encoded and comes back exactly.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wkv.errors import TokenizerError
from wkv.files import replacing
from wkv.tokenizers import tokenizer_json
from wkv.tokenizers.base import TableTokenizer, as_bytes
from wkv.tokenizers.tokenizer_json import END_OF_TEXT

_BLOCK = 1 << 13  # characters in a block
_GROUP = 16  # blocks given to the library at a time, to be encoded in parallel
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # what errors="surrogateescape" makes of bytes that are not UTF-8
_CUT = re.compile(r"(?<=[!-~])[ \n]")  # the GPT-2 pattern always starts a new word here


class BPETokenizer(TableTokenizer):
    """A byte-level BPE vocabulary. Make one with `train`, `load` or `from_dict`; `BPETokenizer(text)` takes the
    content of a tokenizer.json.

    Control tokens such as `<|endoftext|>` are never read from text, unless `encode(text, special=True)` asks for it,
    and decode to nothing. Encoding follows the file, its normaliser included: round trips are exact for vocabularies
    trained here, on any bytes, and for foreign files up to what their normaliser changes (GPT-NeoX: Unicode NFC).
    """

    def __init__(self, definition: str) -> None:
        parsed = tokenizer_json.parse(definition)
        self._backend = tokenizer_json.build(definition)
        tokenizer_json.check_added_ids(parsed, self._backend)
        self._control = tokenizer_json.control_tokens(self._backend)
        control = set(self._control.values())
        super().__init__(tokenizer_json.table(self._backend, control))
        self.eos_id = tokenizer_json.end_of_text(self._control)
        self._byte_ids = tokenizer_json.byte_ids(self._backend, control)
        self._may_cut = tokenizer_json.may_cut(parsed)
        self._ids = list(range(self.vocab_size))  # one integer object per id: long results share them

    @classmethod
    def train(
        cls, texts: Iterable[str | Path], vocab_size: int, end_of_text: bool = True, progress: bool = False
    ) -> BPETokenizer:
        """Learns a vocabulary of `vocab_size` ids; the same texts in the same order give the same vocabulary.

        Items are texts, or `Path`s of text files (whose bytes that are not UTF-8 teach nothing). With `end_of_text`,
        id 0 is the control token that ends a document, as in the World vocabulary, and so `eos_id`; then come the 256
        bytes, then the merges. Little text gives fewer ids than asked for: see `vocab_size` of the result.
        """
        smallest = 256 + end_of_text
        if not isinstance(vocab_size, int) or vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size is {vocab_size!r}; BPE over bytes needs an integer of at least {smallest}"
            )
        if isinstance(texts, (str, bytes, Path)):
            raise TokenizerError(f"train takes an iterable of texts or Paths, got one {type(texts).__name__}: use [it]")
        library = tokenizer_json.load_library()
        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT] if end_of_text else [],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        backend.train_from_iterator(_training_texts(texts), trainer)
        return cls(backend.to_str())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BPETokenizer:
        """Reads a tokenizer.json. Raises TokenizerError if it is missing, damaged or not byte-level BPE."""
        try:
            definition = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise TokenizerError(f"cannot read the tokenizer file {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is not a tokenizer.json: it is not UTF-8 text") from None
        try:
            return cls(definition)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json, readable by `load` and by the `tokenizers` library; all of it or nothing."""
        try:
            with replacing([Path(path)]) as [temporary]:
                temporary.write_text(self._definition(), encoding="utf-8")
        except OSError as error:
            raise TokenizerError(f"cannot write the tokenizer file {path}: {error.strerror}") from None

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        """Ids of a text or of any bytes; bytes that are not UTF-8 (and lone surrogates) become their single-byte ids.

        `special=True` turns control tokens written in the text (`<|endoftext|>`) into their ids: for text that one
        has put together oneself, never for a user's. Raises TokenizerError for other types.
        """
        plain = as_bytes(text).decode("utf-8", "surrogateescape")
        if not special or not self._control:
            return self._encode(plain)
        pattern = "|".join(re.escape(token) for token in sorted(self._control, key=len, reverse=True))
        out: list[int] = []
        for part in re.split(f"({pattern})", plain):
            out += [self._control[part]] if part in self._control else self._encode(part)
        return out

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "bpe", "json": content of the tokenizer.json}`."""
        return {"kind": "bpe", "json": self._definition()}

    def _definition(self) -> str:
        definition: str = self._backend.to_str()
        return definition

    def _encode(self, text: str) -> list[int]:
        """Ids of text whose lone surrogates U+DC80..U+DCFF stand for bytes 0x80..0xFF that are not UTF-8."""
        out: list[int] = []
        for part in _NOT_UTF8.split(text):
            if not part:
                continue
            if "\udc80" <= part[0] <= "\udcff":
                out += [self._byte_id(ord(character) - 0xDC00) for character in part]
            elif len(part) <= _BLOCK or not self._may_cut:
                out += self._backend.encode(part, add_special_tokens=False).ids
            else:
                self._encode_blocks(part, out)
        return out

    def _byte_id(self, value: int) -> int:
        index = self._byte_ids[value]
        if index is None:  # GPT-NeoX has no token for the bytes that never occur in UTF-8
            raise TokenizerError(f"this vocabulary has no token for byte 0x{value:02X}: it encodes text, not any bytes")
        return index

    def _encode_blocks(self, text: str, out: list[int]) -> None:
        """Appends the ids of long text: several times faster than in one go, and in a fraction of the memory."""
        blocks = _blocks(text)
        while group := list(itertools.islice(blocks, _GROUP)):
            for encoding in self._backend.encode_batch_fast(group, add_special_tokens=False):
                out += map(self._ids.__getitem__, encoding.ids)

    def __reduce__(self) -> tuple[type[BPETokenizer], tuple[str]]:
        return BPETokenizer, (self._definition(),)

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size}, eos_id={self.eos_id})"


def _training_texts(texts: Iterable[str | Path]) -> Iterator[str]:
    empty = True
    for item in texts:
        if isinstance(item, Path):
            try:
                data = item.read_bytes()
            except OSError as error:
                raise TokenizerError(f"cannot read the text file {item}: {error.strerror}") from None
        elif isinstance(item, str):
            data = item.encode("utf-8", "surrogatepass")
        else:
            raise TokenizerError(f"train takes texts (str) or files (Path), got {type(item).__name__}")
        empty = empty and not data
        yield data.decode("utf-8", "ignore")
    if empty:
        raise TokenizerError("there is no text to train a tokenizer on")


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces of at least `_BLOCK` characters (but the last), cut where no word can cross."""
    start = 0
    while cut := _CUT.search(text, start + _BLOCK):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
