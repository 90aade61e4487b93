"""A number hidden in filler text: can a model that reads text still name it at the end?

The usual passkey test in our own words: an opening, blocks of five trivial sentences, between two of them a line that
states a number twice, and a question that ends right before the number. Decode a few tokens greedily and compare the
digits (`is_right`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from wkv.errors import WkvError
from wkv.layers.config import at_least, between
from wkv.tokenizers.base import Tokenizer

LARGEST = 50_000
DEPTHS = tuple(tenth / 10 for tenth in range(11))
OPENING = (
    "Most of the following notes do not matter. One of them holds a number; remember it, for it is asked at the end."
)
SENTENCES = (
    "Leaves move in the wind.",
    "The kettle stands on the stove.",
    "A dog sleeps beside the door.",
    "Rain may fall later today.",
    "The road leads into town.",
)
NEEDLE = "The number to remember is {number}. Keep it in mind: {number} is the number to remember."
QUESTION = "Which number was to be remembered? The number to remember is"


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt.

    Args:
        text: to be continued.
        tokens: the same as ids.
        answer: the digits that should follow, after a space.
        length: the largest number of tokens that was allowed.
        depth: place of the needle between the blocks of filler: 0 before all, 1 behind all.
        seed: of the number.
    """

    text: str
    tokens: list[int]
    answer: str
    length: int
    depth: float
    seed: int

    def is_right(self, continuation: str) -> bool:
        """Whether the first digits of a continuation are the answer and nothing but space stands before them."""
        found = re.match(r"\s*([0-9]+)", continuation)
        return found is not None and found[1] == self.answer


def needle_prompt(
    tokenizer: Tokenizer, length: int, depth: float = 0.5, seed: int = 0, prefix: str = "\n"
) -> NeedlePrompt:
    """A prompt of at most `length` tokens, and at most one sentence shorter.

    Args:
        tokenizer: of the model.
        length: tokens of the prompt.
        depth: in [0, 1].
        seed: another number for every seed, length and depth.
        prefix: comes first. RWKV-7 models tend to forget their very first token, which should therefore not matter.

    Raises:
        WkvError: for a depth out of range and a length that the words around the filler exceed.
    """
    for name, expected in (("length", at_least(1)(length)), ("depth", between(0, 1)(depth))):
        if expected is not None:
            raise WkvError(f"{name} must be {expected}, found {length if name == 'length' else depth!r}")
    number = random.Random(f"{seed} {length} {depth}").randint(1, LARGEST)

    def encode(sentences: int) -> tuple[str, list[int]]:
        text = prefix + _text(number, sentences, depth)
        return text, tokenizer.encode(text)

    text, tokens = _fill(encode, length)
    return NeedlePrompt(text, tokens, str(number), length, depth, seed)


def needle_grid(
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    seeds: Sequence[int] = range(5),
    prefix: str = "\n",
) -> Iterator[NeedlePrompt]:
    """Prompts of every length, depth and seed, in this order; see `needle_prompt`."""
    for length in lengths:
        for depth in depths:
            for seed in seeds:
                yield needle_prompt(tokenizer, length, depth, seed, prefix)


def _text(number: int, sentences: int, depth: float) -> str:
    """One line for the opening, each block of filler (the last may be shorter), the needle, and the question."""
    size = len(SENTENCES)
    filler = [SENTENCES[place % size] for place in range(sentences)]
    blocks = [" ".join(filler[start : start + size]) for start in range(0, sentences, size)]
    blocks.insert(round(depth * len(blocks)), NEEDLE.format(number=number))
    return "\n".join([OPENING, *blocks, QUESTION])


def _fill(encode: Callable[[int], tuple[str, list[int]]], length: int) -> tuple[str, list[int]]:
    """The text with as many sentences as fit, by bisection: more sentences never make fewer tokens."""
    text, tokens = encode(0)
    if len(tokens) > length:
        raise WkvError(f"the prompt without filler has {len(tokens)} tokens, length {length} is too small")
    fits, too_many = 0, length  # a sentence has more than one token
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        longer, more = encode(middle)
        if len(more) <= length:
            fits, text, tokens = middle, longer, more
        else:
            too_many = middle
    return text, tokens
