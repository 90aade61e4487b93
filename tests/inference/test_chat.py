"""Conversations: the prompt format, and states that have read exactly the transcript."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import wkv
from tests.inference.helpers import (
    PieceTokenizer,
    ScriptModel,
    assert_same_state,
    read_all,
    tiny_model,
    was_read,
)
from wkv.data.templates import TEMPLATES, find_template
from wkv.errors import CheckpointError, WkvError
from wkv.inference import Chat, Sampler
from wkv.state import State

GREEDY = Sampler(temperature=0)


class Answers(ScriptModel):
    """Gives each of several answers (token ids) after the prompt that stands before it; counts from the prompts."""

    def __init__(self, tokenizer: PieceTokenizer, answers: list[list[int]]) -> None:
        super().__init__(tokenizer.vocab_size, [], 0)
        self.tokenizer = tokenizer
        self.answers = itertools.chain(answers)

    def forward_features(self, tokens: Any, state: Any = None, mask: Any = None) -> Any:
        """A forward pass over a whole turn starts the next answer."""
        hidden, state = super().forward_features(tokens, state, mask)
        read = self.tokenizer.decode(tokens[0].tolist())
        if any(template.answer in read for template in TEMPLATES.values()):
            self.script = next(self.answers)
            self.prompt_length = int(hidden[0, -1, 0])
        return hidden, state


def talker(*answers: str, pieces: tuple[str, ...] = (), **options: Any) -> Chat:
    """A chat with a model that writes these answers; "$" is the end-of-text id."""
    tokenizer = PieceTokenizer(*pieces)
    scripts: list[list[int]] = []
    for answer in answers:
        text, end, _ = answer.partition("$")
        scripts.append(tokenizer.encode(text) + [tokenizer.end] * len(end))
    model: Any = Answers(tokenizer, scripts)
    return Chat(model, sampler=GREEDY, **options)


def transcript(chat: Chat) -> str:
    return chat.tokenizer.decode(was_read(chat.state))


@pytest.mark.parametrize(
    "pieces",
    [(), ("\n\n", "User"), ("d.\n", "\nUser:"), ("d.\n\nUser",), ("\n\nUser:", "?\n\nU"), ("Hello there. Good",)],
)
def test_the_state_has_read_the_transcript(pieces: tuple[str, ...]) -> None:
    chat = talker(" Hello\nthere. Good.\n\nUser: mine", " What?\n\nUser: x", pieces=pieces, system="Be brief.")
    assert str(chat.send("Hi!")) == "Hello\nthere. Good."
    first = "System: Be brief.\n\nUser: Hi!\n\nAssistant: Hello\nthere. Good.\n\n"
    assert transcript(chat) == first
    assert chat.send("And?").text == "What?"
    assert transcript(chat) == first + "User: And?\n\nAssistant: What?\n\n"
    model: Any = chat.model
    form = find_template("chat")
    prompts = [form.opening("Be brief.") + form.turn("Hi!"), form.turn("And?")]
    # Remainders and separators are shorter.
    read_at_once = [length for _, length in model.calls if length > 5]
    assert read_at_once == [len(chat.tokenizer.encode(prompt)) for prompt in prompts], "the history is not read again"


def test_other_templates_have_other_labels_and_ends() -> None:
    chat = talker(" Yes. User: me.\n\nQuestion:", " No.$", template="question", pieces=("\n\nQ",))
    assert [chat.send(text).text for text in ("Is it?", "Was it?")] == ["Yes. User: me.", "No."]
    assert transcript(chat) == "Question: Is it?\n\nAnswer: Yes. User: me.\n\nQuestion: Was it?\n\nAnswer: No.\n\n"
    chat = talker(" A b.\n\nInstruction:", " C.$", template="instruction")
    stream = chat.send("Sort.", stream=True, input_text="b\n\n a")
    assert "".join(stream) == "A b." == stream.reply.text
    chat.send("Go on.")
    assert transcript(chat) == (
        "Instruction: Sort.\n\nInput: b\n a\n\nResponse: A b.\n\nInstruction: Go on.\n\nResponse: C.\n\n"
    )


@pytest.mark.parametrize("ending", ["$", "\n$", "\n\n$", "\n\nUser:", "\n\nSystem: you"])
def test_one_separator_ends_a_turn_however_it_ended(ending: str) -> None:
    chat = talker(" Yes." + ending)
    assert chat.send("Hi!").text == "Yes."
    assert transcript(chat) == "User: Hi!\n\nAssistant: Yes.\n\n"


def test_an_answer_that_is_too_long_is_part_of_the_conversation() -> None:
    chat = talker(" one two three", max_tokens=8)
    reply = chat.send("Count.")
    assert (reply.text, reply.generation.finish_reason) == ("one two", "length")
    assert transcript(chat) == "User: Count.\n\nAssistant: one two\n\n"


def test_streams_show_the_answer_alone() -> None:
    chat = talker(" Hello you.\n\nUser:")
    stream = chat.send("Hi!", stream=True)
    assert chat.state is None
    assert "".join(stream) == "Hello you." == stream.reply.text
    assert transcript(chat) == "User: Hi!\n\nAssistant: Hello you.\n\n"


def test_a_stream_broken_off_leaves_no_trace() -> None:
    chat = talker(" First.\n\nUser:", " Never ending", " Second.$")
    chat.send("1")
    before = chat.state
    stream = chat.send("2", stream=True)
    assert next(stream) == "N"
    assert chat.state is before
    assert chat.send("3").text == "Second."
    assert transcript(chat).endswith("First.\n\nUser: 3\n\nAssistant: Second.\n\n")
    with pytest.raises(WkvError, match="the conversation went on"):
        _ = stream.reply


def test_thinking() -> None:
    chat = talker(">\nHm.\n</think>\nFour.$", think="on")
    stream = chat.send("2+2?", stream=True)
    assert "".join(stream) == "<think>\nHm.\n</think>\nFour."
    assert (stream.reply.text, stream.reply.thoughts) == ("Four.", "Hm.")
    assert transcript(chat) == "User: 2+2?\n\nAssistant: <think>\nHm.\n</think>\nFour.\n\n"
    for think, thought in (("fake", "<think>\n</think>"), ("empty", "<think></think>")):
        chat = talker(">\nFour.$", think=think)
        stream = chat.send("2+2?", stream=True)
        assert "".join(stream) == "Four." == stream.reply.text
        assert transcript(chat) == f"User: 2+2?\n\nAssistant: {thought}\nFour.\n\n"
    reply = talker(" <think>By itself.</think> Four.$").send("2+2?")
    assert (reply.text, reply.thoughts) == ("Four.", "By itself.")
    unfinished = talker(">Still at it", think="on", max_tokens=5).send("2+2?")
    assert (unfinished.text, unfinished.thoughts) == ("", "Stil")


def test_the_state_of_a_real_model_is_that_of_the_text() -> None:
    chat = Chat(tiny_model(), system="s", sampler=Sampler(seed=1), max_tokens=12)
    text = b"System: s\n\n"
    for message in ("Hi", "Go on"):
        generation = chat.send(message).generation
        text += f"User: {message}\n\nAssistant:".encode() + bytes(generation.tokens) + generation.remainder
        text += b"\n\n"[len(generation.text) - len(generation.text.rstrip("\n")) :]
        assert chat.state is not None
        assert_same_state(chat.state, read_all(tiny_model(), text)[1])


def test_save_load_reset(tmp_path: Path) -> None:
    chat = Chat(tiny_model(), sampler=Sampler(seed=1), max_tokens=6)
    with pytest.raises(WkvError, match="no conversation to save"):
        chat.save(tmp_path / "state")
    chat.send("One")
    chat.save(tmp_path / "state")
    expected = chat.send("Two").text
    chat.load(tmp_path / "state")
    assert chat.send("Two").text == expected
    fresh = Chat(tiny_model(), sampler=Sampler(seed=1), max_tokens=6)
    chat.reset()
    assert chat.send("Two").text == fresh.send("Two").text
    other = wkv.create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=1, head_size=16)
    other.init_state(1).save(tmp_path / "other")
    kept = chat.state
    with pytest.raises(WkvError, match="the state has 1 layers, expected 2"):
        chat.load(tmp_path / "other")
    State.stack([tiny_model().init_state(1)] * 2).save(tmp_path / "two")
    with pytest.raises(WkvError, match="2 sequences"):
        chat.load(tmp_path / "two")
    with pytest.raises(CheckpointError, match="no such state file"):
        chat.load(tmp_path / "missing")
    assert chat.state is kept


def test_bad_messages_and_options() -> None:
    chat = Chat(tiny_model(), max_tokens=2)
    bad: list[Any] = ["", " \n\n ", None]
    for message in bad:
        with pytest.raises(WkvError, match="a message must be a text that is not empty"):
            chat.send(message)
    with pytest.raises(WkvError, match="think must be one of none, fake, empty, on, found 'deep'"):
        Chat(tiny_model(), think="deep")
    with pytest.raises(WkvError, match="template must be one of chat, question, instruction, found 'raven'"):
        Chat(tiny_model(), template="raven")
    with pytest.raises(WkvError, match="'question' has no system message"):
        Chat(tiny_model(), "Be brief.", template="question")
    with pytest.raises(WkvError, match="'instruction' knows no thoughts"):
        Chat(tiny_model(), think="on", template="instruction")
    assert not torch.is_inference_mode_enabled()
