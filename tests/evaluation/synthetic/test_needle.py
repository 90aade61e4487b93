"""A number in filler text."""

from __future__ import annotations

import pytest

from wkv.errors import WkvError
from wkv.evaluation.synthetic import needle_grid, needle_prompt
from wkv.evaluation.synthetic.needle import OPENING, QUESTION, SENTENCES
from wkv.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer

TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "world": WorldTokenizer()}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [320, 1000, 4000])
def test_as_long_as_possible(name: str, length: int) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = needle_prompt(tokenizer, length, depth=0.3, seed=4)
    assert prompt.tokens == tokenizer.encode(prompt.text)
    longest = max(len(tokenizer.encode(" " + sentence)) for sentence in SENTENCES)
    assert length - longest - 1 <= len(prompt.tokens) <= length
    assert prompt.text.startswith(f"\n{OPENING}\n")
    assert prompt.text.endswith(f"\n{QUESTION}")
    assert prompt.text.count(f" {prompt.answer}") == 2
    assert 1 <= int(prompt.answer) <= 50_000


@pytest.mark.parametrize(("depth", "share"), [(0, 0), (0.25, 0.25), (1, 1)])
def test_depth(depth: float, share: float) -> None:
    prompt = needle_prompt(ByteTokenizer(), 20_000, depth)
    lines = prompt.text.strip().split("\n")[1:-1]
    (place,) = [number for number, line in enumerate(lines) if prompt.answer in line]
    assert abs(place / (len(lines) - 1) - share) < 0.01
    del lines[place]
    assert all(line == " ".join(SENTENCES) for line in lines[:-1])
    assert " ".join(SENTENCES).startswith(lines[-1])


def test_grid() -> None:
    lengths, depths, seeds = (400, 600), (0.0, 0.5, 1.0), (0, 1)
    prompts = list(needle_grid(ByteTokenizer(), lengths, depths, seeds, prefix=""))
    settings = [(prompt.length, prompt.depth, prompt.seed) for prompt in prompts]
    assert settings == [(length, depth, seed) for length in lengths for depth in depths for seed in seeds]
    assert len({prompt.answer for prompt in prompts}) == 12
    assert all(prompt.text.startswith(OPENING) for prompt in prompts)
    again = needle_grid(ByteTokenizer(), lengths, depths, seeds, prefix="")
    assert list(again) == prompts


def test_answers() -> None:
    prompt = needle_prompt(ByteTokenizer(), 400, seed=3)
    answer = prompt.answer
    assert all(prompt.is_right(text) for text in (answer, f" {answer}", f" {answer}.", f"\n{answer} is"))
    assert not any(prompt.is_right(text) for text in ("", f" {answer}1", f" not {answer}", f" {answer[:-1]}", "?"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 100}, "the prompt without filler has .* tokens, length 100 is too small"),
        ({"length": 0}, "length must be a positive integer, found 0"),
        ({"length": 400, "depth": 1.5}, r"depth must be a number in \[0, 1\], found 1.5"),
    ],
)
def test_bad_requests(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(WkvError, match=words):
        needle_prompt(ByteTokenizer(), **arguments)  # type: ignore[arg-type]
