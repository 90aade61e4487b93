"""Rows of a table or data set as documents: plain texts, conversations, prompts with their responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from wkv.data.conversations import conversation
from wkv.data.document import Document
from wkv.data.templates import find_template
from wkv.errors import DataError, WkvError

# Columns that are known besides those of `Fields`.
_SHAREGPT = ("conversations", "from", "value")  # messages, role, content
_ALPACA = ("instruction", "input", "output")  # prompt, input, response


@dataclass(frozen=True)
class Fields:
    """What the columns of rows are called, and how conversations are written. Of those a row has, the first counts:

    1. `messages`, a list of {`role`, `content`}: a conversation, of which the answers count;
    2. "conversations", a list of {"from", "value"}, as in ShareGPT: the same;
    3. `prompt` and `response`, perhaps `input`: a conversation of one turn, of which the response counts;
    4. "instruction" and "output", perhaps "input", as in Alpaca: the same;
    5. `text`: a plain document, which counts as a whole.

    A field that is there but None (a column that only other rows use) counts as missing.

    Args:
        text, messages, role, content, prompt, response, input: names of columns.
        template, think: of conversations, as in `wkv.inference.Chat`; see `wkv.data.conversation`.

    Raises:
        DataError: for names that are no texts.
        WkvError: for an unknown template, or a `think` that it does not know.
    """

    text: str = "text"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    prompt: str = "prompt"
    response: str = "response"
    input: str = "input"
    template: str = "chat"
    think: str = "none"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a reader has to read."""
        own = (self.messages, self.prompt, self.input, self.response, self.text)
        return tuple(dict.fromkeys((*own, _SHAREGPT[0], *_ALPACA)))

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) and name for name in astuple(self)):
            raise DataError(f"the names of fields must be texts that are not empty, found {self}")
        find_template(self.template).check_think(self.think)


def row_document(row: Any, name: str, fields: Fields, where: str | None = None) -> Document:
    """The document in one row.

    Args:
        row: column -> value.
        name: of the document.
        where: what an error calls the row; `name` by default.

    Raises:
        DataError: if the row has none of the fields, or something in it cannot be used.
    """
    try:
        document = _read(row, name, fields)
        document.text.encode()  # a text with half a surrogate pair cannot be written as UTF-8
    except UnicodeEncodeError as error:
        raise DataError(f"{where or name}: not UTF-8 text ({error.reason}); remove the character") from error
    except WkvError as error:
        raise DataError(f"{where or name}: {error}") from error
    return document


def _read(row: Any, name: str, fields: Fields) -> Document:
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with named fields, found {type(row).__name__}")
    for messages, *names in ((fields.messages, fields.role, fields.content), _SHAREGPT):
        if row.get(messages) is not None:
            return _conversation(_messages(row[messages], messages, *names), name, fields)
    for question, material, answer in ((fields.prompt, fields.input, fields.response), _ALPACA):
        if row.get(question) is not None and row.get(answer) is not None:
            return _conversation(_turn(row, question, material, answer), name, fields)
    if row.get(fields.text) is not None:
        return Document(name, _text(row[fields.text], fields.text))
    wanted = f"{fields.messages!r}, {fields.prompt!r} with {fields.response!r}, or {fields.text!r}"
    found = ", ".join(repr(str(key)) for key in list(row)[:8]) or "nothing"
    others = f"nor {_SHAREGPT[0]!r}, nor {_ALPACA[0]!r} with {_ALPACA[2]!r}"
    raise DataError(f"no field {wanted}; found {found}; {others}; name yours, as in Fields(text=...)")


def _conversation(messages: list[tuple[str, str]], name: str, fields: Fields) -> Document:
    return conversation(messages, name, fields.template, fields.think)


def _messages(messages: Any, field: str, role: str, content: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"field {field!r} must be a list of messages, found {type(messages).__name__}")
    for number, message in enumerate(messages, 1):
        missing = [key for key in (role, content) if key not in message]
        if missing:
            hint = f"Fields(messages={field!r}, role=, content=)"
            raise DataError(f"message {number} has no field {missing[0]!r}; name yours in {hint}")
    return [(_text(message[role], role), _text(message[content], content)) for message in messages]


def _turn(row: Mapping[str, Any], question: str, material: str, answer: str) -> list[tuple[str, str]]:
    messages = [("user", _text(row[question], question))]
    if row.get(material) is not None:
        messages.append(("input", _text(row[material], material)))
    return [*messages, ("assistant", _text(row[answer], answer))]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a text, found {type(value).__name__}")
    return value
