"""The generation loop for a batch of sequences: sample, keep the books, read the new tokens.

A sequence keeps its own books (`Row`); the engine holds what is common: the state and the logits of all running rows.
Rows that are finished leave the batch.

Shape letters: B running rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.inference.prompts import end_ids, left_pad
from wkv.inference.reading import Reader, reader
from wkv.inference.sampler import Penalties, Sampler, draw, row_generators, unsampleable
from wkv.inference.text import TextBuffer
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import wide
from wkv.state import State
from wkv.tokenizers import Tokenizer

SEGMENT = 512  # prompt tokens read at a time: bounds the memory of long prompts


@dataclass(frozen=True)
class Options:
    """What holds for every row of a batch; see `generate`."""

    max_tokens: int
    sampler: Sampler
    stops: tuple[bytes, ...]
    stop_ids: frozenset[int]
    alternatives: int
    keep_state: bool


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt. `str()` gives the text.

    Attributes:
        text: the new text, cut before the stop string if one ended it. Bytes that never became a character are U+FFFD.
        tokens: the ids the text consists of; the id that ended it and tokens of the stop string are not among them.
        logprobs: the model's own log-probability of each token, before penalties, filters and temperature.
        top_logprobs: for each token the most likely ids and their log-probabilities, as many as `logprobs=` asked for.
        finish_reason: "eos" (end-of-text id), "stop" (another stop id, or a stop string) or "length".
        state: the state of batch 1 after the prompt and exactly these tokens; None with `return_state=False`.
        prompt_tokens: number of prompt tokens read.
        remainder: bytes at the end of the text that no token of `tokens` covers, because a stop string began in the
            middle of a token; the state has not read them. Nearly always empty.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str
    state: State | None
    prompt_tokens: int
    remainder: bytes = b""

    def __str__(self) -> str:
        return self.text


class Choice(NamedTuple):
    """One sampled token: id, the model's log-probability, the most likely alternatives."""

    token: int
    logprob: float
    alternatives: list[tuple[int, float]]


class Mark(NamedTuple):
    """A place where the sequence may still be cut: tokens and bytes so far, and row `row` of the state there."""

    tokens: int
    size: int
    state: State | None
    row: int


class Row:
    """The books of one sequence: tokens, text, and the states it may have to go back to.

    A stop string is complete only some tokens after it began. Until it is clear that none has begun, the states since
    then are kept; they cost nothing but memory, because models never change a state in place.
    """

    def __init__(self, index: int, prompt_tokens: int, tokenizer: Tokenizer, options: Options) -> None:
        self.index, self.prompt_tokens = index, prompt_tokens
        self.choices: list[Choice] = []
        self.finish_reason: str | None = "length" if options.max_tokens == 0 else None
        self._tokenizer, self._options = tokenizer, options
        self._text = TextBuffer(options.stops)
        self._pieces: list[str] = []
        self._marks: list[Mark] = []
        self._remainder = b""
        self._state: State | None = None

    def accept(self, choice: Choice, state: State, row: int) -> str:
        """Take a sampled token into the books; `state` (row `row`) has read all before it. Returns certain text."""
        self._marks.append(Mark(len(self.choices), self._text.size, state if self._options.keep_state else None, row))
        if choice.token in self._options.stop_ids:
            reason = "eos" if choice.token == self._tokenizer.eos_id else "stop"
            return self._cut(reason, self._text.size)
        self.choices.append(choice)
        found = self._text.feed(self._tokenizer.decode_bytes([choice.token]))
        if found is not None:
            return self._cut("stop", found)
        if len(self.choices) == self._options.max_tokens:
            self.finish_reason = "length"
            return self._release(self._text.size, final=True)
        settled = self._text.settled
        while len(self._marks) > 1 and self._marks[1].size <= settled:
            del self._marks[0]
        return self._release(settled)

    def close(self, state: State, row: int) -> None:
        """The last tokens were read as well: keep row `row` of the state."""
        self._state = take(state, row)

    def result(self) -> Generation:
        """Everything about the finished sequence."""
        assert self.finish_reason is not None
        choices = self.choices
        return Generation(
            text="".join(self._pieces),
            tokens=[choice.token for choice in choices],
            logprobs=[choice.logprob for choice in choices],
            top_logprobs=[choice.alternatives for choice in choices] if self._options.alternatives else [],
            finish_reason=self.finish_reason,
            state=self._state,
            prompt_tokens=self.prompt_tokens,
            remainder=self._remainder,
        )

    def _cut(self, reason: str, end: int) -> str:
        """End the text at byte `end`, and go back to the last state that has read nothing beyond it."""
        mark = [mark for mark in self._marks if mark.size <= end][-1]
        self.finish_reason = reason
        self._remainder = self._text.slice(mark.size, end)
        del self.choices[mark.tokens :]
        if mark.state is not None:
            self._state = take(mark.state, mark.row)
        return self._release(end, final=True)

    def _release(self, end: int, final: bool = False) -> str:
        piece = self._text.release(end, final)
        self._pieces.append(piece)
        if final:
            self._marks.clear()
        return piece


class Engine:
    """Generates for a batch of prompts, one token for every running row per `step`.

    Args:
        prompts: token ids, at least one each.
        state: where to go on from, of as many sequences as there are prompts; None is the empty past.
        seed: see `row_generators`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        state: State | None,
        options: Options,
        seed: int | None,
    ) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._model, self._reader = model, reader(model)
        self._prompts, self._state = prompts, state
        self._logits_BV: Tensor | None = None
        self._penalties: Penalties | None = None
        self._generators = row_generators(seed, prompts)
        self.rows = [Row(index, len(ids), tokenizer, options) for index, ids in enumerate(prompts)]
        self.running = list(self.rows)
        vocab_size = model.config.vocab_size
        self._forbidden = unsampleable(tokenizer, vocab_size, options.stop_ids | end_ids(tokenizer, vocab_size))

    @torch.inference_mode()
    def step(self) -> list[tuple[int, str]]:
        """One more token for every running row. Returns (row, text) where text has become certain."""
        if self._logits_BV is None or self._state is None:
            self._start()
            return []
        state = self._state
        choices = self._choose(self._logits_BV)
        pieces = [
            (row.index, row.accept(choice, state, place))
            for place, (row, choice) in enumerate(zip(self.running, choices, strict=True))
        ]
        if self._penalties is not None:
            self._penalties.update([choice.token for choice in choices])
        self._advance([choice.token for choice in choices])
        return [(index, piece) for index, piece in pieces if piece]

    def _start(self) -> None:
        """Read the prompts."""
        self._logits_BV, self._state = read(self._model, self._prompts, self._state, by=self._reader)
        if self._options.sampler.penalises:
            self._penalties = Penalties(self._options.sampler, self._tokenizer, self._logits_BV)
        if self._forbidden is not None:
            self._forbidden = self._forbidden.to(self._logits_BV.device)
        self._retire(self._state)

    def _choose(self, logits_BV: Tensor) -> list[Choice]:
        """Sample one token per running row."""
        self._check(logits_BV)
        logits_BV = wide(logits_BV)
        log_p_BV = torch.log_softmax(logits_BV, -1)
        if self._penalties is not None:
            logits_BV = self._penalties.apply(logits_BV)
        if self._forbidden is not None:
            logits_BV = logits_BV.masked_fill(self._forbidden, -torch.inf)
        if self._options.sampler.temperature == 0:
            tokens_B = logits_BV.argmax(-1)
        else:
            tokens_B = draw(self._options.sampler.log_probs(logits_BV), self._generators)
        chosen_B = log_p_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
        alternatives = top_tokens(log_p_BV, self._options.alternatives)
        return list(map(Choice, tokens_B.tolist(), chosen_B.tolist(), alternatives))

    def _advance(self, tokens: list[int]) -> None:
        """Read the new tokens of all rows that still need it, and let finished rows go."""
        wanted = ("length", None) if self._options.keep_state else (None,)
        reading = [place for place, row in enumerate(self.running) if row.finish_reason in wanted]
        self._keep(reading)
        if not reading:
            return
        assert self._state is not None
        fed = torch.tensor([[tokens[place]] for place in reading], device=self._state.device)
        # Rows go back to an earlier state only when a stop string turns out to have begun there.
        self._logits_BV, self._state = self._reader.read(fed, self._state, inplace=not self._options.stops)
        self._retire(self._state)

    def _retire(self, state: State) -> None:
        """Close rows whose length is reached now that `state` has read all their tokens."""
        for place, row in enumerate(self.running):
            if row.finish_reason is not None and self._options.keep_state:
                row.close(state, place)
        self._keep([place for place, row in enumerate(self.running) if row.finish_reason is None])

    def _keep(self, places: list[int]) -> None:
        """Drop all other rows from the batch."""
        if len(places) == len(self.running):
            return
        self.running = [self.running[place] for place in places]
        self._generators = [self._generators[place] for place in places]
        if not places:
            return
        assert self._state is not None
        assert self._logits_BV is not None
        self._state, self._logits_BV = self._state.select(places), self._logits_BV[places]
        if self._penalties is not None:
            self._penalties.select(places)

    def _check(self, logits_BV: Tensor) -> None:
        largest_B = logits_BV.amax(-1).tolist()
        if all(map(math.isfinite, largest_B)):
            return
        row = self.running[[math.isfinite(largest) for largest in largest_B].index(False)]
        raise WkvError(
            f"the model's logits for prompt {row.index} are not finite after {len(row.choices)} new tokens: "
            "its weights are damaged or its half precision overflows; check the file, or load it with dtype float32"
        )


def read(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    state: State | None,
    segment: int = SEGMENT,
    by: Reader | None = None,
) -> tuple[Tensor, State]:
    """Read prompts of any lengths together, `segment` tokens at a time.

    Args:
        prompts: B lists of token ids, none empty; shorter ones are padded on the left and masked.
        state: where to go on from, of B sequences; None is the empty past.
        by: what reads them; None picks the fastest.

    Returns:
        logits after the last token [B, V], and the state.
    """
    by = by or reader(model)
    tokens, mask = left_pad(prompts, next(model.parameters()).device)
    for start in range(0, tokens.shape[1], segment):
        part = mask[:, start : start + segment]
        logits, state = by.read(
            tokens[:, start : start + segment], state, None if bool(part.all()) else part, inplace=start > 0
        )
    assert state is not None
    return logits, state


def top_tokens(log_p_BV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For every row the `count` most likely ids and their log-probabilities."""
    if count == 0:
        return [[] for _ in range(len(log_p_BV))]
    values_BK, ids_BK = log_p_BV.topk(min(count, log_p_BV.shape[-1]))
    pairs = zip(ids_BK.tolist(), values_BK.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in pairs]


def take(state: State, row: int) -> State:
    """One row of a state, as ordinary tensors that may also take part in training."""
    with torch.inference_mode(False):
        return state.select(row).clone()


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Put the model in evaluation mode, and every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
