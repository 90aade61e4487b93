"""Conversations as training documents, in the formats in which `wkv.inference.Chat` holds them (`wkv.data.templates`).

    System: {system}\\n\\nUser: {question}\\n\\nAssistant: {answer}\\n\\nUser: {question}\\n\\nAssistant: {answer}

`Chat` tokenises every question up to "Assistant:" by itself and lets the model generate the rest. A document is divided
at the same places, so that a trained model meets the ids in inference that it met in training.

What counts in the loss is what the model has to write: the answer, and what ends it. The last answer is followed by
the end-of-text id; one before it by the separator and "User:", at which generation stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wkv.data.document import Document, Part
from wkv.data.templates import SEPARATOR, THINK, THOUGHT, Template, clean, find_template
from wkv.errors import DataError

# What the roles are called, and which may follow which. The second names are those of ShareGPT.
ROLES = {"system": "system", "user": "user", "human": "user", "input": "input", "assistant": "assistant",
         "gpt": "assistant"}  # fmt: skip
_NEXT = {"": ("system", "user"), "system": ("user",), "user": ("input", "assistant"), "input": ("assistant",),
         "assistant": ("user",)}  # fmt: skip


class Turn(NamedTuple):
    """A question, its answer, and perhaps the material the question is about."""

    question: str
    answer: str
    input_text: str = ""


def conversation(
    messages: Sequence[tuple[str, str]], name: str = "conversation", template: str = "chat", think: str = "none"
) -> Document:
    """A conversation as a document of which the answers count.

    Line ends and blank lines inside a message are cleaned as `Chat` cleans them. An answer that begins with "<think>"
    is one that `Chat(think="on")` asks for, if the template knows thoughts.

    Args:
        messages: (role, text) pairs: perhaps one "system", then "user" and "assistant" in turn, ending with an answer;
            after a "user" perhaps an "input", the material of the question. "human" and "gpt" are other names of them.
        name: of the document.
        template: a name from `wkv.data.templates.TEMPLATES`, as in `Chat(template=...)`.
        think: how the other answers are asked for, as in `Chat(think=...)`; with "on" there must be none.

    Raises:
        DataError: for other roles or another order, for answers that are empty, or lack a thought with `think="on"`.
        WkvError: for questions that are empty, an unknown template, and what the template has no place for.
    """
    form = find_template(template)
    form.check_think(think)
    system, turns = _turns(messages)
    opening = form.opening(system)
    parts: list[Part] = []
    for number, turn in enumerate(turns, 1):
        asked, written = _written(turn.answer, number, form, think)
        parts.append(_asked(turn, form, asked, opening if number == 1 else None))
        written += SEPARATOR if number < len(turns) else ""
        parts.append(Part(written, len(written)))
    return Document(name, "".join(part.text for part in parts), tuple(parts), form.stops[0], len(opening))


def _asked(turn: Turn, form: Template, think: str, opening: str | None) -> Part:
    """A question. By writing its label the model ended the answer before; the first has an `opening` instead."""
    text = (opening or "") + form.turn(turn.question, turn.input_text, think)
    stop = len(text) - len(SEPARATOR + form.answer + THINK[think])
    loose = clean(turn.input_text) or clean(turn.question)
    return Part(text, len(form.question) if opening is None else 0, stop - len(loose), stop)


def _written(answer: str, number: int, form: Template, think: str) -> tuple[str, str]:
    """How the model is asked (`think`), and what it then writes."""
    text = clean(answer)
    if not text:
        raise DataError(f"answer {number} is empty; remove the conversation, or end it before that answer")
    if form.thinks and text.startswith(THOUGHT):
        return "on", text.removeprefix(THINK["on"].strip())
    if think == "on":
        raise DataError(f"answer {number} does not begin with {THOUGHT}, and think='on' asks for a thought")
    return think, f" {text}" if think == "none" else f">\n{text}"


def _turns(messages: Sequence[tuple[str, str]]) -> tuple[str, list[Turn]]:
    """The system message, and the turns."""
    before, wrong = "", 0
    for number, (role, _) in enumerate(messages, 1):
        if ROLES.get(role) not in _NEXT[before]:
            wrong = number
            break
        before = ROLES[role]
    if wrong or before != "assistant":
        order = 'perhaps "system", then "user" and "assistant" in turn, ending with "assistant"'
        found = ", ".join(role for role, _ in messages[:8]) or "no message"
        place = f"; message {wrong} ({messages[wrong - 1][0]}) is out of place" if wrong else ""
        raise DataError(f"the roles of a conversation are {order}; found {found}{place}")
    system, turns = "", []
    for role, text in messages:
        if ROLES[role] == "system":
            system = text
        elif ROLES[role] == "user":
            turns.append(Turn(text, ""))
        else:
            turns[-1] = turns[-1]._replace(**{"input_text" if ROLES[role] == "input" else "answer": text})
    return system, turns
