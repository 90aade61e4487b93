"""Stop strings and whole characters, whatever pieces the bytes come in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wkv.inference.text import TextBuffer

WORDS = st.text(alphabet="ab\né漢", min_size=1, max_size=5).map(lambda text: text.encode())


def cut_at_first_stop(data: bytes, stops: list[bytes]) -> bytes:
    """The definition: read byte by byte until a stop string is complete, end before the earliest one."""
    for end in range(len(data) + 1):
        places = [data.find(stop, 0, end) for stop in stops]
        found = [place for place in places if place >= 0]
        if found:
            return data[: min(found)]
    return data


@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=3))
def test_byte_by_byte_is_the_definition(parts: list[bytes], stops: list[bytes]) -> None:
    data = b"".join(parts)
    buffer, text = TextBuffer(stops), ""
    for value in data:
        found = buffer.feed(bytes([value]))
        if found is not None:
            text += buffer.release(found, final=True)
            break
        text += buffer.release(buffer.settled)
        assert "\ufffd" not in text
    else:
        text += buffer.release(buffer.size, final=True)
    assert text == cut_at_first_stop(data, stops).decode()


@given(st.lists(st.binary(max_size=4), max_size=8))
def test_any_bytes_come_out_as_one_decode(parts: list[bytes]) -> None:
    buffer = TextBuffer()
    text = ""
    for part in parts:
        buffer.feed(part)
        text += buffer.release(buffer.settled)
    text += buffer.release(buffer.size, final=True)
    assert text == b"".join(parts).decode("utf-8", "replace")


def test_a_stop_string_inside_one_piece_and_over_three() -> None:
    buffer = TextBuffer([b"\n\nUser:"])
    assert buffer.feed(b"end.\n\nUser: more") == 4
    buffer = TextBuffer([b"\n\nUser:"])
    assert [buffer.feed(part) for part in (b"end.\n", b"\nUs", b"er:")] == [None, None, 4]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    buffer = TextBuffer([b"\n\nUser:", b"aab"])
    buffer.feed(b"x\n\nUse")
    assert buffer.settled == 1
    buffer.feed(b"d aa")
    assert buffer.settled == buffer.size - 2
    buffer.feed(b"a")
    assert buffer.settled == buffer.size - 2
