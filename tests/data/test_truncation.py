"""Documents that are too long: every rule, and that nothing is lost without a word."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_conversations import BPE, TOKENIZERS, messages_of, texts
from wkv.data import Document, PaddedDocuments, Part, TokenStore, conversation, encode_document
from wkv.data.templates import clean
from wkv.data.truncation import FittedDocuments
from wkv.errors import DataError
from wkv.tokenizers import ByteTokenizer, WorldTokenizer

Message = tuple[str, str]
TALK: list[Message] = [
    ("system", "Be kind."), ("user", "First question?"), ("assistant", "First answer."),
    ("user", "Second?"), ("assistant", "<think>Hm.</think>\nSecond answer."), ("user", "Third?"),
    ("assistant", "Third."),
]  # fmt: skip


def length(document: Document, tokenizer: Any) -> int:
    return len(encode_document(document, tokenizer).ids)


def fit(document: Document, tokenizer: Any, size: int, rule: str | None) -> Document | None:
    """What becomes of it beside a document that always fits."""
    fitted = FittedDocuments([Document("other", "a"), document], tokenizer, max(size, 2), rule)
    found = list(fitted)[1:]
    assert fitted.num_documents == 2
    assert (fitted.num_dropped, len(found)) in ((1, 0), (0, 1))
    assert fitted.num_shortened == (bool(found) and found[0] is not document)
    return found[0] if found else None


@pytest.mark.parametrize("rule", [None, "error", "drop", "left", "right"])
def test_what_fits_stays(rule: str | None) -> None:
    for tokenizer in TOKENIZERS:
        document = conversation(TALK)
        assert fit(document, tokenizer, length(document, tokenizer), rule) is document


def test_errors_name_the_document_and_what_to_do() -> None:
    document = conversation(TALK, "talks.jsonl:7")
    for rule in (None, "error"):
        with pytest.raises(DataError, match=r"talks\.jsonl:7: it has 51 tokens, and 40 fit \(context_length \+ 1\)"):
            fit(document, WorldTokenizer(), 40, rule)
    with pytest.raises(DataError, match='raise context_length, or choose "drop", "left" or "right"'):
        fit(document, WorldTokenizer(), 40, None)
    text = Document("book.txt", "word " * 30)
    assert fit(text, ByteTokenizer(), 40, None) is text, "samplers cut plain texts"
    with pytest.raises(DataError, match=r"book\.txt: it has 150 tokens"):
        fit(text, ByteTokenizer(), 40, "error")


def test_dropped_documents_are_counted() -> None:
    talks = [conversation(TALK), Document("a", "a" * 500), conversation(TALK[5:]), Document("b", "b")]
    fitted = FittedDocuments(talks, ByteTokenizer(), 60, "drop")
    assert [list(fitted), list(fitted)] == [talks[2:]] * 2, "it may be read again"
    assert fitted.report() == "2 left out of 4 documents, to fit into 60 tokens"
    assert (fitted.num_documents, fitted.num_shortened, fitted.num_dropped) == (4, 0, 2)
    fitted = FittedDocuments(talks[1:], ByteTokenizer(), 60, "left")
    assert len(list(fitted)) == 3
    assert fitted.report() == "1 shortened of 3 documents, to fit into 60 tokens"
    fitted = FittedDocuments(talks[2:], ByteTokenizer(), 60, "left")
    assert (len(list(fitted)), fitted.report()) == (2, "")
    with pytest.raises(DataError, match="no document is left: 1 left out of 1 documents, to fit into 60 tokens; raise"):
        list(FittedDocuments(talks[:1], ByteTokenizer(), 60, "drop"))


def test_left_takes_the_oldest_turns_first_and_keeps_the_system_message() -> None:
    for tokenizer in TOKENIZERS:
        whole = conversation(TALK, template="chat")
        for first in (3, 5):
            shorter = conversation([TALK[0], *TALK[first:]])
            size = length(shorter, tokenizer)
            assert fit(whole, tokenizer, size, "left") == shorter, "exactly the conversation that is left"
            assert fit(whole, tokenizer, size + 1, "left") == shorter


def test_left_then_shortens_the_question_but_no_answer() -> None:
    talk: list[Message] = [("system", "s"), ("user", "Sort these words."), ("input", "b a  c d"), ("assistant", "ok")]
    bytes_ = ByteTokenizer()
    for template, kept in (("chat", "User: Sort these words.\n{}\n\nAssistant: ok"),
                           ("instruction", "Instruction: Sort these words.\n\nInput: {}\n\nResponse: ok")):  # fmt: skip
        system = "System: s\n\n" if template == "chat" else ""
        whole = conversation(talk if system else talk[1:], template=template)
        size = length(whole, bytes_)
        for less, rest in ((1, "a  c d"), (2, "a  c d"), (3, "c d"), (5, "c d"), (7, "d")):
            found = fit(whole, bytes_, size - less, "left")
            assert found is not None
            assert found.text == system + kept.format(rest)
            assert found == conversation([(role, rest if role == "input" else text) for role, text in talk
                                          if system or role != "system"], template=template)  # fmt: skip
        assert fit(whole, bytes_, size - 8, "left") is None, "the instruction stays as it is"
    whole = conversation([("user", "A long question?"), ("assistant", "An answer.")])
    found = fit(whole, bytes_, length(whole, bytes_) - 6, "left")
    assert found == conversation([("user", "question?"), ("assistant", "An answer.")])
    assert fit(whole, bytes_, 30, "left") is None


def test_right_takes_the_end_and_what_would_end_it() -> None:
    world = WorldTokenizer()
    document = conversation(TALK)
    ids, counts = encode_document(document, world)
    assert counts is not None
    for size in range(2, len(ids)):
        found = fit(document, world, size, "right")
        if found is None:
            assert not counts[:size].any(), "the first answer is gone as well"
            continue
        cut = encode_document(found, world)
        assert cut.counts is not None
        assert size >= len(cut.ids) == found.keep
        assert cut.ids.tolist() == ids[: len(cut.ids)].tolist()
        assert cut.counts.tolist() == counts[: len(cut.ids)].tolist()
        assert cut.counts[-1]
        assert not counts[len(cut.ids) : size].any(), "no target that fits is lost"
        assert 0 not in cut.ids, "the model does not learn to end here"


def test_plain_texts() -> None:
    text = Document("a", "one two three four")
    bytes_ = ByteTokenizer()
    left, right = fit(text, bytes_, 10, "left"), fit(text, bytes_, 10, "right")
    assert left is not None
    assert right is not None
    assert left.text == "three four"
    assert bytes(encode_document(right, bytes_).ids.tolist()) == b"one two th"
    assert fit(text, bytes_, 10, "drop") is None


@settings(max_examples=30)
@given(
    talk=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), system=st.none() | texts,
    share=st.floats(0.1, 0.99), number=st.integers(0, len(TOKENIZERS) - 1),
)  # fmt: skip
def test_rules_keep_what_they_promise(talk: list[Message], system: str | None, share: float, number: int) -> None:
    tokenizer: Any = TOKENIZERS[number]
    document = conversation(messages_of(system, talk))
    size = max(2, int(length(document, tokenizer) * share))
    for rule in ("left", "right"):
        found = fit(document, tokenizer, size, rule)
        if found is None:
            continue
        ids, counts = encode_document(found, tokenizer)
        assert len(ids) <= size
        assert counts is not None
        assert counts[1:].any()
        assert "".join(part.text for part in found.parts) == found.text
    if (found := fit(document, tokenizer, size, "left")) is not None:
        assert found.parts[-1].text == f" {clean(talk[-1][1])}"
        assert not system or found.text.startswith(f"System: {clean(system)}\n\nUser: ")
        kept = talk[len(talk) - len(found.parts) // 2 :]
        question = found.parts[0].text[found.parts[0].start : found.parts[0].stop]
        again = conversation(messages_of(system, [(question, kept[0][1]), *kept[1:]]))
        assert found == again, "what is left is a conversation that `Chat` might hold"


def test_nothing_that_counts() -> None:
    silent = Document("d", "ab", (Part("a"), Part("b")))
    first = Document("d", "a", (Part("a", 1),))  # the first token is no target
    with pytest.raises(DataError, match="d: nothing in it counts in the loss"):
        fit(silent, ByteTokenizer(), 9, None)
    assert fit(first, ByteTokenizer(), 9, "drop") is None
    assert fit(silent, BPE, 9, "left") is None


def test_documents_of_ones_own() -> None:
    parts = (Part("read "), Part("written ", 8), Part("read "), Part("on "), Part("end", 3))
    document = Document("d", "read written read on end", parts)
    found = fit(document, ByteTokenizer(), 14, "left")
    assert found == Document("d", "read on end", parts[2:])
    assert fit(document, ByteTokenizer(), 10, "left") is None, "nothing says what may be shortened"


def test_a_padded_row_holds_all_of_a_fitted_document() -> None:
    talks = [conversation(TALK), conversation(TALK[1:]), conversation(TALK[3:])]
    store = TokenStore.from_documents(FittedDocuments(talks, BPE, 60, "left"), BPE)
    assert int(store.lengths.max()) <= 60
    batch = PaddedDocuments(store, 59, 3, seed=1).next_batch()
    assert batch.mask is not None
    assert int((batch.targets * batch.mask == BPE.eos_id).sum()) >= 3, "every answer is there to its end"


def test_impossible_arguments() -> None:
    with pytest.raises(DataError, match="rule must be one of error, drop, left, right, or None, found 'middle'"):
        FittedDocuments([], ByteTokenizer(), 10, "middle")
    for size in (1, True, 2.5):
        with pytest.raises(DataError, match="max_tokens must be an integer of at least 2"):
            FittedDocuments([], ByteTokenizer(), size)  # type: ignore[arg-type]
