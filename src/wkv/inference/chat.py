"""Conversations in the prompt formats of the World and G1 models (`wkv.data.templates`).

The state is carried from turn to turn, so the history is read once only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch

from wkv.data.templates import SEPARATOR, THINK, find_template
from wkv.errors import WkvError
from wkv.inference.engine import Generation, evaluating, read, take
from wkv.inference.generate import GenerationStream, generate
from wkv.inference.prompts import find_tokenizer
from wkv.inference.sampler import Sampler
from wkv.layers.language_model import LanguageModel
from wkv.state import State, check_compatible
from wkv.tokenizers import Tokenizer

# The values pip `rwkv` uses for conversations.
CHAT_SAMPLER = Sampler(top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2)


@dataclass(frozen=True)
class Reply:
    """One answer. `str()` gives the text.

    Attributes:
        text: what the model says to the user.
        thoughts: what it thought before, empty if it did not.
        generation: everything else about it.
    """

    text: str
    thoughts: str
    generation: Generation

    def __str__(self) -> str:
        return self.text


class Chat:
    """A conversation that remembers what was said in a state of constant size.

    Args:
        model: a model trained on the format of `template`.
        system: how the model is to behave; read before the first turn.
        sampler: how tokens are chosen; penalties start anew with every answer.
        think: "none" leaves it to the model; "on" makes it think first; "fake" and "empty" give it a finished thought
            with nothing in it, with and without a line end. See `wkv.data.templates`.
        max_tokens: longest answer.
        tokenizer: as for `generate`.
        template: the prompt format, a name from `wkv.data.templates.TEMPLATES`: "chat", "question" or "instruction".

    Raises:
        WkvError: for an unknown template, and for a `system` or `think` that it has no place for.

    Attributes:
        state: the conversation up to and including the separator after the last answer; None before the first turn.
        template: the prompt format, a `wkv.data.templates.Template`.
    """

    def __init__(
        self,
        model: LanguageModel,
        system: str | None = None,
        sampler: Sampler = CHAT_SAMPLER,
        think: str = "none",
        max_tokens: int = 1000,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        template: str = "chat",
    ) -> None:
        self.template = find_template(template)
        self.template.check_think(think)
        self.template.opening(system)
        self.model, self.system, self.sampler = model, system, sampler
        self.think, self.max_tokens = think, max_tokens
        self.tokenizer = find_tokenizer(model, tokenizer)
        self.state: State | None = None

    @overload
    def send(self, text: str, stream: Literal[False] = False, input_text: str = "") -> Reply: ...

    @overload
    def send(self, text: str, stream: Literal[True], input_text: str = "") -> ReplyStream: ...

    def send(self, text: str, stream: bool = False, input_text: str = "") -> Reply | ReplyStream:
        """Say something; returns the answer, or with `stream` an iterator over its text.

        The turn becomes part of the conversation when the answer is complete; one broken off leaves no trace.

        Args:
            text: a question or an instruction.
            input_text: the material it is about.
        """
        opening = self.template.opening(self.system) if self.state is None else ""
        pieces = generate(
            self.model, opening + self.template.turn(text, input_text, self.think), self.max_tokens, self.sampler,
            self.state, stream=True, tokenizer=self.tokenizer, stop=self.template.stops,
        )  # fmt: skip
        reply = ReplyStream(self, pieces)
        return reply if stream else reply.reply

    def reset(self) -> None:
        """Forget the conversation."""
        self.state = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation's state to a file of constant size."""
        if self.state is None:
            raise WkvError("there is no conversation to save yet")
        self.state.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a conversation that was saved. Raises `WkvError` if it is another model's."""
        template = self.model.init_state(1)
        state = State.load(path, template.device)
        check_compatible(state, template, template.device, batch_size=1)
        self.state = state

    def close_turn(self, before: State | None, generation: Generation) -> None:
        """Make a complete answer part of the conversation: read what is missing up to the next turn.

        Args:
            before: the state the answer started from.
        """
        if self.state is not before:
            raise WkvError("the conversation went on before this answer was complete; finish one before the next")
        assert generation.state is not None
        newlines = len(generation.text) - len(generation.text.rstrip("\n"))
        missing = generation.remainder + SEPARATOR[newlines:].encode()
        self.state = self._read(missing, generation.state) if missing else generation.state

    def _read(self, text: bytes, state: State) -> State:
        with evaluating(self.model), torch.inference_mode():
            return take(read(self.model, [self.tokenizer.encode(text)], state)[1], 0)


class ReplyStream:
    """Iterates over the text of an answer as it is written, thoughts included; `reply` is the whole answer."""

    def __init__(self, chat: Chat, pieces: GenerationStream) -> None:
        self._chat, self._pieces, self._think = chat, pieces, chat.think
        self._before = chat.state
        self._head = ""
        self._waiting = ["<think"] if chat.think == "on" else []
        self._started = chat.think == "on"
        self._reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._waiting:
            return self._waiting.pop()
        for piece in self._pieces:
            if self._started:
                return str(piece)
            self._head += piece
            if begun := _without_lead(self._head, self._think):
                self._started = True
                return begun
        self._finish()
        raise StopIteration

    @property
    def reply(self) -> Reply:
        """The answer; what is still missing of it is generated first."""
        return self._finish()

    def _finish(self) -> Reply:
        if self._reply is None:
            generation = self._pieces.result
            self._chat.close_turn(self._before, generation)
            self._reply = parse_reply(generation, self._think)
        return self._reply


def parse_reply(generation: Generation, think: str) -> Reply:
    """Tell an answer from the thoughts before it."""
    if _closes(think):
        return Reply(_without_lead(generation.text, think).strip(), "", generation)
    whole = (THINK[think] + generation.text).strip()
    if not whole.startswith("<think"):
        return Reply(whole, "", generation)
    thoughts, _, text = whole.partition("</think>")
    return Reply(text.strip(), thoughts.removeprefix("<think").removeprefix(">").strip(), generation)


def _without_lead(text: str, think: str) -> str:
    """The beginning of an answer without the blank after the label, or the ">" that closes an empty thought."""
    text = text.lstrip()
    return text.removeprefix(">").lstrip() if _closes(think) else text


def _closes(think: str) -> bool:
    """Whether the model begins with the ">" of a finished thought."""
    return THINK[think].endswith("</think")
