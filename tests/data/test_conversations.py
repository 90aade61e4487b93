"""Conversations: inference reads and writes exactly the ids of training, and only answers count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.helpers import PieceTokenizer, ScriptModel, was_read
from wkv.data import Document, Part, conversation, encode_document
from wkv.data.templates import TEMPLATES, clean
from wkv.errors import DataError, WkvError
from wkv.inference import Chat, Sampler
from wkv.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, WorldTokenizer

BPE = BPETokenizer.train(["User: What?\n\nAssistant: That.\n\nUser: Is it: so\n\nAssistant: It is.\n\n"] * 3, 300)
PIECES = [(), ("\n\n", "User"), ("d.\n", "\nUser:"), ("d.\n\nUser",), ("\n\nUser:", "?\n\nU", ": "), (": a", ".\n\n")]
TOKENIZERS: list[Any] = [WorldTokenizer(), ByteTokenizer(), BPE, *(PieceTokenizer(*pieces) for pieces in PIECES)]

texts = st.text(st.sampled_from("ad.:?\n\t\"'> 。Uéß🙂") | st.characters(codec="utf-8"), max_size=12).filter(clean)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
systems = st.none() | texts
# Template and think of a conversation.
MANNERS = [("chat", "none"), ("chat", "fake"), ("chat", "empty"), ("chat", "on"), ("question", "none"),
           ("instruction", "none")]  # fmt: skip
materials = st.just("") | texts


def messages_of(system: str | None, talk: list[tuple[str, str]]) -> list[tuple[str, str]]:
    out = [("system", system)] if system else []
    return out + [message for q, a in talk for message in (("user", q), ("assistant", a))]


class Learner(ScriptModel):
    """Writes, after every prompt, what counted in training after exactly the ids it has read."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int], counts: list[bool]) -> None:
        super().__init__(tokenizer.vocab_size, [], 0)
        self.tokenizer, self.ids, self.counts = tokenizer, ids, counts

    def forward_head(self, hidden: torch.Tensor) -> torch.Tensor:
        place = int(hidden[0, 0])
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, self.ids[place] if place < len(self.ids) and self.counts[place] else 0] = 30.0
        return logits


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
@settings(max_examples=15)
@given(manner=st.sampled_from(MANNERS), system=systems, talk=st.lists(st.tuples(texts, texts, materials), min_size=1,
                                                                      max_size=3))  # fmt: skip
def test_chat_reads_the_ids_of_training(
    tokenizer: Any, manner: tuple[str, str], system: str | None, talk: list[tuple[str, str, str]]
) -> None:
    """For every tokenizer, template and way to ask."""
    template, think = manner
    system = system if TEMPLATES[template].system else None
    thought = "<think>\nHm.\n</think>\n" if think == "on" else ""
    messages = [("system", system)] if system else []
    for question, answer, material in talk:
        messages += [("user", question), ("input", material), ("assistant", thought + answer)]
    document = conversation(messages, "talk", template, think)
    ids, counts = encode_document(document, tokenizer)
    assert counts is not None
    model: Any = Learner(tokenizer, ids.tolist(), counts.tolist())
    chat = Chat(model, system, Sampler(temperature=0), think, max_tokens=200, template=template)
    for number, (question, answer, material) in enumerate(talk, 1):
        reply = chat.send(question, input_text=material)
        assert (reply.text, reply.thoughts) == (clean(answer), "Hm." if thought else "")
        assert reply.generation.finish_reason in ("stop", "eos")
        if number < len(talk):
            read = was_read(chat.state)
            assert read == ids[: len(read)].tolist()
    assert tokenizer.decode(was_read(chat.state)) == document.text + "\n\n"


def beyond(start: str, text: str, tokenizer: Any) -> bytes:
    """What the token that completes `start` at the beginning of `text` holds besides."""
    read = b""
    for token in tokenizer.encode(text):
        read += tokenizer.decode_bytes([token])
        if len(read) >= len(start):
            break
    return read[len(start) :]


@settings(max_examples=30)
@given(system=systems, talk=turns)
def test_what_counts(system: str | None, talk: list[tuple[str, str]]) -> None:
    for number, tokenizer in enumerate(TOKENIZERS):
        template = TEMPLATES[("chat", "question", "instruction")[number % 3]]
        label = template.question
        document = conversation(messages_of(system if template.system else None, talk), "talk", template.name)
        ids, counts = encode_document(document, tokenizer)
        assert counts is not None
        assert "".join(part.text for part in document.parts) == document.text
        end = "" if tokenizer.eos_id is not None else f"\n\n{label}"
        assert tokenizer.decode(ids) == document.text + end
        # A token that begins inside "User:" ends a turn too, even if it reaches into the question.
        reaches = [beyond(label, part.text, tokenizer) for part in document.parts[2::2]]
        answers = [f" {clean(answer)}".encode() for _, answer in talk]
        between = [f"\n\n{label}".encode() + reach for reach in reaches] + [end.encode()]
        expected = b"".join(answer + stop for answer, stop in zip(answers, between, strict=True))
        assert tokenizer.decode_bytes(ids[counts].tolist()) == expected
        if tokenizer.eos_id is not None:
            assert (ids[-1], counts[-1]) == (tokenizer.eos_id, True)


def test_a_whole_conversation() -> None:
    document = conversation([("system", "Be\n\nkind."), ("user", "Hi!"), ("assistant", "Hello\r\n\r\nyou"),
                             ("user", "And?"), ("assistant", "<think>\nHm.\n</think>\nYes.")], "talk")  # fmt: skip
    assert document.text == (
        "System: Be\nkind.\n\nUser: Hi!\n\nAssistant: Hello\nyou\n\n"
        "User: And?\n\nAssistant: <think>\nHm.\n</think>\nYes."
    )
    assert [part.text[: part.counts] for part in document.parts] == [
        "", " Hello\nyou\n\n", "User:", ">\nHm.\n</think>\nYes.",
    ]  # fmt: skip
    world = WorldTokenizer()
    ids, counts = encode_document(document, world)
    assert counts is not None
    assert world.decode(ids[counts]) == " Hello\nyou\n\nUser:>\nHm.\n</think>\nYes."
    assert ids.tolist() == [*world.encode(document.text), 0], "as in a text of the official corpora"


def test_how_answers_are_asked_for() -> None:
    talk = [("user", "2+2?"), ("assistant", "Four."), ("user", "Sure?"), ("assistant", "<think>Hm.</think>\nYes.")]
    for think, asked, written in (
        ("none", "Assistant:", " Four.\n\n"),
        ("fake", "Assistant: <think>\n</think", ">\nFour.\n\n"),
        ("empty", "Assistant: <think></think", ">\nFour.\n\n"),
    ):
        parts = conversation(talk, think=think).parts
        assert [parts[0].text, parts[1].text] == [f"User: 2+2?\n\n{asked}", written]
        assert [parts[2].text, parts[3].text] == ["User: Sure?\n\nAssistant: <think", ">Hm.</think>\nYes."]
    assert conversation(talk[2:], think="on").parts == conversation(talk[2:]).parts
    with pytest.raises(DataError, match=r"answer 1 does not begin with <think>, and think='on'"):
        conversation(talk, think="on")
    without = conversation(talk[2:], template="question")
    assert without.text == "Question: Sure?\n\nAnswer: <think>Hm.</think>\nYes.", "no thought, just a text"


def test_names_of_roles_and_material() -> None:
    talk = [("system", "s"), ("human", "q"), ("input", "i"), ("gpt", "a"), ("user", "r"), ("assistant", "b")]
    expected = "System: s\n\nUser: q\ni\n\nAssistant: a\n\nUser: r\n\nAssistant: b"
    assert conversation(talk).text == expected
    found = conversation(talk[1:], template="instruction")
    assert found.text == "Instruction: q\n\nInput: i\n\nResponse: a\n\nInstruction: r\n\nResponse: b"
    assert [part.text[part.start : part.stop] for part in found.parts] == ["i", "", "r", ""]
    assert (conversation(talk).opening, found.opening) == (len("System: s\n\n"), 0)
    assert encode_document(found, ByteTokenizer()).ids.tobytes().decode("utf-32") == found.text + "\n\nInstruction:"
    with pytest.raises(DataError, match=r"found user, assistant, tool; message 3 \(tool\) is out of place"):
        conversation([("user", "a"), ("assistant", "b"), ("tool", "c")])


def test_what_a_template_has_no_place_for() -> None:
    talk = [("system", "s"), ("user", "q"), ("assistant", "a")]
    with pytest.raises(WkvError, match="'question' has no system message; leave it out, or use 'chat'"):
        conversation(talk, template="question")
    with pytest.raises(WkvError, match="'instruction' knows no thoughts"):
        conversation(talk[1:], template="instruction", think="fake")
    assert conversation([("system", " \n"), *talk[1:]], template="question").opening == 0


def test_parts_keep_to_their_boundary_where_one_encoding_would_not() -> None:
    world = WorldTokenizer()
    document = Document("a", 'say:"yes"', (Part("say:"), Part('"yes"', 5)))
    ids, counts = encode_document(document, world)
    assert counts is not None
    assert ids.tolist() == [*world.encode("say:"), *world.encode('"yes"'), 0]
    assert ids.tolist() != [*world.encode(document.text), 0]
    assert world.decode(ids[counts]) == '"yes"'
    _, counts = encode_document(Document("a", "größe", (Part("größe", 3),)), ByteTokenizer())
    assert counts is not None
    assert counts.tolist() == [True] * 4 + [False] * 3


def test_only_the_first_tokens_are_kept() -> None:
    talk = conversation([("user", "q"), ("assistant", "answer")])
    whole = encode_document(talk, BPE)
    ids, counts = encode_document(replace(talk, keep=len(whole.ids) - 3), BPE)
    assert counts is not None
    assert whole.counts is not None
    assert (ids.tolist(), counts.tolist()) == (whole.ids[:-3].tolist(), whole.counts[:-3].tolist())
    assert BPE.eos_id not in ids
    assert encode_document(Document("a", "text", keep=2), ByteTokenizer()).ids.tolist() == [116, 101]


@pytest.mark.parametrize(
    "roles", [[], ["system"], ["user"], ["assistant"], ["user", "user", "assistant"], ["user", "assistant", "system"],
              ["user", "assistant", "user"], ["tool", "assistant"], ["input", "assistant"], ["user", "input"],
              ["user", "assistant", "input", "assistant"]],
)  # fmt: skip
def test_roles_have_an_order(roles: list[str]) -> None:
    with pytest.raises(DataError, match="the roles of a conversation"):
        conversation([(role, "text") for role in roles])
