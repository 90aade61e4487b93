"""The table of prompt formats."""

from __future__ import annotations

from typing import Any

import pytest

from wkv.data.templates import TEMPLATES, THINK, clean, find_template
from wkv.errors import WkvError

CHAT = find_template("chat")


def test_text_is_cleaned() -> None:
    assert clean("  one\r\n\r\n\ntwo\nthree\n\n ") == "one\ntwo\nthree"
    assert CHAT.opening(" Be\n\nkind. ") == "System: Be\nkind.\n\n"
    assert CHAT.opening(None) == CHAT.opening(" \n") == ""
    assert CHAT.turn("a\n\n\nb ") == "User: a\nb\n\nAssistant:"


def test_the_documented_prompts() -> None:
    """As they stand in the sources: nothing follows the last label, and ">" is left to the model."""
    assert CHAT.turn("a", think="on") == "User: a\n\nAssistant: <think"
    assert CHAT.turn("a (think a bit)", think="fake") == "User: a (think a bit)\n\nAssistant: <think>\n</think"
    assert CHAT.turn("a", think="empty") == "User: a\n\nAssistant: <think></think"
    assert TEMPLATES["question"].turn("a") == "Question: a\n\nAnswer:"
    assert TEMPLATES["instruction"].turn("a") == "Instruction: a\n\nResponse:"
    assert TEMPLATES["instruction"].turn("a", "b\n\nc") == "Instruction: a\n\nInput: b\nc\n\nResponse:"
    assert CHAT.turn("a", "b\n\nc") == TEMPLATES["chat"].turn("a\nb\nc")


def test_what_ends_an_answer() -> None:
    assert [template.stops for template in TEMPLATES.values()] == [
        ("\n\nUser:", "\n\nSystem:"), ("\n\nQuestion:",), ("\n\nInstruction:",),
    ]  # fmt: skip
    assert [name for name, template in TEMPLATES.items() if template.name == name] == list(TEMPLATES)


def test_no_message_can_end_an_answer() -> None:
    for template in TEMPLATES.values():
        for stop in template.stops:
            assert stop not in template.turn(f"a{stop} b", f"c\r\n{stop}")
            assert stop not in clean(f"a{stop}")


def test_errors() -> None:
    bad: list[Any] = ["", " \n\n ", None, 3]
    for text in bad:
        with pytest.raises(WkvError, match="a message must be a text that is not empty, found"):
            CHAT.turn(text)
    with pytest.raises(WkvError, match="a message must be a text"):
        CHAT.turn("a", bad[2])
    with pytest.raises(WkvError, match="template must be one of chat, question, instruction, found 'bob'"):
        find_template("bob")
    for think in THINK:
        CHAT.check_think(think)
    with pytest.raises(WkvError, match="think must be one of none, fake, empty, on, found 'deep'"):
        TEMPLATES["question"].check_think("deep")
    with pytest.raises(WkvError, match="the template 'question' knows no thoughts"):
        TEMPLATES["question"].turn("a", think="on")
    with pytest.raises(WkvError, match="the template 'instruction' has no system message"):
        TEMPLATES["instruction"].opening("Be kind.")
