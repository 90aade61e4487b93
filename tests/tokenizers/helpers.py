"""A naive World encoder to compare with, the text form of the vocabulary, and text for hypothesis to draw."""

from __future__ import annotations

import functools

from hypothesis import strategies as st

from wkv.tokenizers import BPETokenizer, WorldTokenizer

# Letters, digits, punctuation, every kind of white space, control characters, accents, CJK, emoji, U+FFFD, combining.
ALPHABET = "aeZ019 \t\n\r\x0b\x0c'-.,\"({\x00\x1f\x7f\x85\xa0éßжक가日本、。…，»\u2028\u3000😀\ufffd\u0301"
PROSE = (
    "The quick brown fox jumps over the lazy dog. It's 1,234 times 'round the block!\n\nUser: hello\n\nAssistant: hi."
    "\n\tdef f(self, x):\n        return \"x\" + 'y'  # naïve café, 東京は日本の首都です。\n"
)


def token_bytes(index: int) -> bytes:
    return WorldTokenizer().decode_bytes([index])


@functools.cache
def tokens() -> list[bytes]:
    """The 65,529 tokens; `tokens()[i]` has id i + 1."""
    return [token_bytes(index) for index in range(1, 65530)]


def vocabulary_text() -> str:
    """The file rwkv_vocab_v20230424.txt with LF line ends, written anew from the shipped vocabulary."""
    return "".join(f"{index} {literal(token)} {len(token)}\n" for index, token in enumerate(tokens(), start=1))


def literal(token: bytes) -> str:
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)


class Trie:
    """One node per prefix; greedy matching remembers the last terminal node passed."""

    def __init__(self) -> None:
        self.children: dict[int, Trie] = {}
        self.token: int | None = None

    def add(self, token: bytes, index: int) -> None:
        node = self
        for value in token:
            node = node.children.setdefault(value, Trie())
        node.token = index

    def longest(self, data: bytes, start: int) -> tuple[int, int]:
        """Id and end of the longest token that begins at `start`."""
        node, found = self, (-1, start)
        for position in range(start, len(data)):
            child = node.children.get(data[position])
            if child is None:
                break
            node = child
            if node.token is not None:
                found = node.token, position + 1
        return found

    def encode(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            index, at = self.longest(data, at)
            ids.append(index)
        return ids

    def count(self) -> int:
        return 1 + sum(child.count() for child in self.children.values())


@functools.cache
def trie() -> Trie:
    root = Trie()
    for index, token in enumerate(tokens(), start=1):
        root.add(token, index)
    return root


@functools.cache
def small_bpe() -> BPETokenizer:
    """1,000 ids at most, end of text at 0."""
    return BPETokenizer.train([PROSE * 4, "banana bandana " * 9], 1000)


def mixed_bytes() -> st.SearchStrategy[bytes]:
    """Arbitrary bytes, arbitrary text, and whole or cut-off vocabulary entries, in any order."""
    pieces = st.one_of(
        st.binary(max_size=12),
        st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.text(ALPHABET, max_size=16).map(str.encode),
        fragments(),
    )
    return st.lists(pieces, max_size=12).map(b"".join)


def fragments() -> st.SearchStrategy[bytes]:
    """A vocabulary entry, sometimes without its last bytes, so that matches run into non-terminal nodes."""
    entries = st.one_of(st.integers(0, 65528), st.integers(62000, 65528)).map(lambda index: tokens()[index])
    return st.tuples(entries, st.integers(0, 3)).map(lambda pair: pair[0][: max(1, len(pair[0]) - pair[1])])
