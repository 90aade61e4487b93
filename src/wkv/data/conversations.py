"""Conversations as training documents, in the format in which `wkv.inference.Chat` holds them.

    System: {system}\\n\\nUser: {question}\\n\\nAssistant: {answer}\\n\\nUser: {question}\\n\\nAssistant: {answer}

`Chat` tokenises every question up to "Assistant:" by itself and lets the model generate the rest. A document is divided
at the same places, so that a trained model meets the ids in inference that it met in training.

What counts in the loss is what the model has to write: the answer, and what ends it. The last answer is followed by
the end-of-text id; one before it by the separator and "User:", at which generation stops.
"""

from __future__ import annotations

from collections.abc import Sequence

from wkv.data.document import Document, Part
from wkv.errors import DataError
from wkv.inference.chat import SEPARATOR, STOPS, THINK, clean, format_system, format_turn

_STOP = STOPS[0].removeprefix(SEPARATOR)  # "User:"
_THOUGHT = THINK["on"].strip()  # "<think": how an answer that begins with a thought opens


def conversation(messages: Sequence[tuple[str, str]], name: str = "conversation") -> Document:
    """A conversation as a document of which the answers count.

    Line ends and blank lines inside a message are cleaned as `Chat` cleans them. An answer that begins with "<think>"
    is one that `Chat(think="on")` asks for.

    Args:
        messages: (role, text) pairs: perhaps one "system", then "user" and "assistant" in turn, ending with an answer.
        name: of the document.

    Raises:
        DataError: for other roles or another order, and for empty messages.
    """
    system, turns = _turns(messages)
    opening = format_system(system) if clean(system) else ""
    parts = []
    for number, (question, answer) in enumerate(turns, 1):
        think, written = _written(answer, number)
        head = len(_STOP) if number > 1 else 0  # by writing this the model ended the answer before
        parts.append(Part((opening if number == 1 else "") + format_turn(question, think), head))
        written += SEPARATOR if number < len(turns) else ""
        parts.append(Part(written, len(written)))
    return Document(name, "".join(part.text for part in parts), tuple(parts), STOPS[0])


def _written(answer: str, number: int) -> tuple[str, str]:
    """How the model is asked (`think`), and what it then writes."""
    text = clean(answer)
    if not text:
        raise DataError(f"answer {number} is empty; remove the conversation, or end it before that answer")
    if text.startswith(_THOUGHT + ">"):
        return "on", text.removeprefix(_THOUGHT)
    return "none", f" {text}"


def _turns(messages: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    """(system, [(question, answer)])."""
    rest = list(messages)
    system = rest.pop(0)[1] if rest and rest[0][0] == "system" else ""
    expected = ["user", "assistant"] * ((len(rest) + 1) // 2)
    roles = [role for role, _ in rest]
    if not rest or roles != expected:
        order = 'perhaps "system", then "user" and "assistant" in turn, ending with "assistant"'
        found = ", ".join(role for role, _ in messages[:8]) or "no message"
        raise DataError(f"the roles of a conversation are {order}; found {found}")
    texts = [text for _, text in rest]
    return system, list(zip(texts[::2], texts[1::2], strict=True))
