"""Rows of a table or data set as documents: plain texts, conversations, prompts with their responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from wkv.data.conversations import conversation
from wkv.data.document import Document
from wkv.errors import DataError, WkvError


@dataclass(frozen=True)
class Fields:
    """What the columns of rows are called. Of those a row has, the first of these kinds is taken:

    1. `messages`, a list of {`role`, `content`}: a conversation, of which the answers count;
    2. `prompt` and `response`: a conversation of one turn, of which the response counts;
    3. `text`: a plain document, which counts as a whole.

    A field that is there but None (a column that only other rows use) counts as missing.
    """

    text: str = "text"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    prompt: str = "prompt"
    response: str = "response"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns a reader has to read."""
        return self.messages, self.prompt, self.response, self.text

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) and name for name in astuple(self)):
            raise DataError(f"the names of fields must be texts that are not empty, found {self}")


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
    messages, prompt, response, text = (row.get(column) for column in fields.columns)
    if messages is not None:
        return conversation(_messages(messages, fields), name)
    if prompt is not None and response is not None:
        turn = (("user", _text(prompt, fields.prompt)), ("assistant", _text(response, fields.response)))
        return conversation(turn, name)
    if text is not None:
        return Document(name, _text(text, fields.text))
    wanted = f"{fields.messages!r}, {fields.prompt!r} with {fields.response!r}, or {fields.text!r}"
    found = ", ".join(repr(str(key)) for key in list(row)[:8]) or "nothing"
    raise DataError(f"no field {wanted}; found {found}; name yours, as in Fields(text=...)")


def _messages(messages: Any, fields: Fields) -> list[tuple[str, str]]:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"field {fields.messages!r} must be a list of messages, found {type(messages).__name__}")
    wanted = fields.role, fields.content
    for number, message in enumerate(messages, 1):
        missing = [key for key in wanted if key not in message]
        if missing:
            raise DataError(f"message {number} has no field {missing[0]!r}; name yours in Fields(role=, content=)")
    return [(_text(m[fields.role], fields.role), _text(m[fields.content], fields.content)) for m in messages]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a text, found {type(value).__name__}")
    return value
