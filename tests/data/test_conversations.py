"""Conversations: inference reads and writes exactly the ids of training, and only answers count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.helpers import PieceTokenizer, ScriptModel, was_read
from wkv.data import Document, Part, conversation, encode_document
from wkv.errors import DataError
from wkv.inference import Chat, Sampler
from wkv.inference.chat import clean
from wkv.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, WorldTokenizer

BPE = BPETokenizer.train(["User: What?\n\nAssistant: That.\n\nUser: Is it: so\n\nAssistant: It is.\n\n"] * 3, 300)
PIECES = [(), ("\n\n", "User"), ("d.\n", "\nUser:"), ("d.\n\nUser",), ("\n\nUser:", "?\n\nU", ": "), (": a", ".\n\n")]
TOKENIZERS: list[Any] = [WorldTokenizer(), ByteTokenizer(), BPE, *(PieceTokenizer(*pieces) for pieces in PIECES)]

texts = st.text(st.sampled_from("ad.:?\n\t\"'> 。Uéß🙂") | st.characters(codec="utf-8"), max_size=12).filter(clean)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
systems = st.none() | texts


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
@settings(max_examples=10)
@given(system=systems, talk=turns)
def test_chat_reads_the_ids_of_training(tokenizer: Any, system: str | None, talk: list[tuple[str, str]]) -> None:
    document = conversation(messages_of(system, talk))
    ids, counts = encode_document(document, tokenizer)
    assert counts is not None
    model: Any = Learner(tokenizer, ids.tolist(), counts.tolist())
    chat = Chat(model, system, Sampler(temperature=0), max_tokens=200)
    for number, (question, answer) in enumerate(talk, 1):
        reply = chat.send(question)
        assert reply.text == clean(answer)
        assert reply.generation.finish_reason in ("stop", "eos")
        if number < len(talk):
            read = was_read(chat.state)
            assert read == ids[: len(read)].tolist()
    written = was_read(chat.state)
    assert tokenizer.decode(written) == document.text + "\n\n"


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
    for tokenizer in TOKENIZERS:
        document = conversation(messages_of(system, talk))
        ids, counts = encode_document(document, tokenizer)
        assert counts is not None
        assert "".join(part.text for part in document.parts) == document.text
        end = "" if tokenizer.eos_id is not None else "\n\nUser:"
        assert tokenizer.decode(ids) == document.text + end
        # A token that begins inside "User:" ends a turn too, even if it reaches into the question.
        reaches = [beyond("User:", part.text, tokenizer) for part in document.parts[2::2]]
        answers = [f" {clean(answer)}".encode() for _, answer in talk]
        between = [b"\n\nUser:" + reach for reach in reaches] + [end.encode()]
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


@pytest.mark.parametrize(
    "roles", [[], ["system"], ["user"], ["assistant"], ["user", "user", "assistant"], ["user", "assistant", "system"],
              ["user", "assistant", "user"], ["tool", "assistant"]],
)  # fmt: skip
def test_roles_have_an_order(roles: list[str]) -> None:
    with pytest.raises(DataError, match="the roles of a conversation"):
        conversation([(role, "text") for role in roles])
