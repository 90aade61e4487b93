"""Conversations in the prompt format of the World and G1 models (RWKV-LM, `RWKV7-G1x-templates.txt`).

    System: {system}\\n\\nUser: {question}\\n\\nAssistant: {answer}\\n\\nUser: {question}\\n\\nAssistant:

The state is carried from turn to turn, so the history is read once only. A blank line separates turns and therefore
never stands inside one; `clean` sees to that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch

from wkv.errors import WkvError
from wkv.inference.engine import Generation, evaluating, read, take
from wkv.inference.generate import GenerationStream, generate
from wkv.inference.prompts import brief, find_tokenizer
from wkv.inference.sampler import Sampler
from wkv.layers.language_model import LanguageModel
from wkv.state import State, check_compatible
from wkv.tokenizers import Tokenizer

SEPARATOR = "\n\n"
STOPS = ("\n\nUser:", "\n\nSystem:")
# What follows "Assistant:" in the prompt. The models were trained to write the closing ">" themselves.
THINK = {"none": "", "fake": " <think>\n</think", "on": " <think"}
# The values pip `rwkv` uses for conversations.
CHAT_SAMPLER = Sampler(top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2)


def clean(text: str) -> str:
    """Text as it may stand inside a turn: Unix line ends, no blank lines, nothing around it."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def format_system(text: str) -> str:
    """The opening that tells the model how to behave."""
    return f"System: {clean(text)}{SEPARATOR}"


def format_turn(text: str, think: str = "none") -> str:
    """One question, up to where the model's answer begins. No blank follows "Assistant:": the model writes it.

    Args:
        text: what the user says. "(think a bit)" or "(think a lot)" at its end sets how long G1 models think.
        think: "none"; "on" makes the model think first; "fake" gives it a finished empty thought.

    Raises:
        WkvError: for an unknown `think`, or text that is empty once cleaned.
    """
    if think not in THINK:
        raise WkvError(f"think must be one of {', '.join(THINK)}, found {think!r}")
    if not isinstance(text, str) or not clean(text):
        raise WkvError(f"a message must be a text that is not empty, found {brief(text)}")
    return f"User: {clean(text)}{SEPARATOR}Assistant:{THINK[think]}"


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
        model: a model trained on the World format.
        system: how the model is to behave; read before the first turn.
        sampler: how tokens are chosen; penalties start anew with every answer.
        think: see `format_turn`.
        max_tokens: longest answer.
        tokenizer: as for `generate`.

    Attributes:
        state: the conversation up to and including the separator after the last answer; None before the first turn.
    """

    def __init__(
        self,
        model: LanguageModel,
        system: str | None = None,
        sampler: Sampler = CHAT_SAMPLER,
        think: str = "none",
        max_tokens: int = 1000,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    ) -> None:
        format_turn("check", think)
        self.model, self.system, self.sampler = model, system, sampler
        self.think, self.max_tokens = think, max_tokens
        self.tokenizer = find_tokenizer(model, tokenizer)
        self.state: State | None = None

    @overload
    def send(self, text: str, stream: Literal[False] = False) -> Reply: ...

    @overload
    def send(self, text: str, stream: Literal[True]) -> ReplyStream: ...

    def send(self, text: str, stream: bool = False) -> Reply | ReplyStream:
        """Say something; returns the answer, or with `stream` an iterator over its text.

        The turn becomes part of the conversation when the answer is complete; one broken off leaves no trace.
        """
        opening = format_system(self.system) if self.state is None and self.system else ""
        pieces = generate(
            self.model, opening + format_turn(text, self.think), self.max_tokens, self.sampler, self.state,
            stream=True, tokenizer=self.tokenizer, stop=STOPS,
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
    if think == "fake":
        return Reply(_without_lead(generation.text, think).strip(), "", generation)
    whole = (THINK[think] + generation.text).strip()
    if not whole.startswith("<think"):
        return Reply(whole, "", generation)
    thoughts, _, text = whole.partition("</think>")
    return Reply(text.strip(), thoughts.removeprefix("<think").removeprefix(">").strip(), generation)


def _without_lead(text: str, think: str) -> str:
    """The beginning of an answer without the blank after "Assistant:", or the ">" that closes an empty thought."""
    text = text.lstrip()
    return text.removeprefix(">").lstrip() if think == "fake" else text
