"""Documents from rows: JSON lines, Parquet, data sets, iterables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wkv.data import Document, Fields, build_cache, iter_documents, load_documents, split_held_out
from wkv.errors import DataError, WkvError
from wkv.tokenizers import ByteTokenizer

CHAT = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
ROWS: list[dict[str, Any]] = [
    {"text": "größer", "other": 1},
    {"messages": CHAT},
    {"prompt": "Hi!", "response": "Hello.", "text": "not this"},
    {"text": ""},
]
TEXTS = ["größer", "User: Hi!\n\nAssistant: Hello.", "User: Hi!\n\nAssistant: Hello.", ""]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines_of_all_kinds(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    documents = load_documents(path)
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"rows.jsonl:{line}" for line in (1, 2, 3, 4)]
    assert [bool(document.parts) for document in documents] == [False, True, True, False]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert [document.text for document in load_documents(path)] == TEXTS


def test_fields_have_the_names_one_gives_them() -> None:
    fields = Fields("body", "talk", "from", "value", "q", "a")
    talk = [{"from": "user", "value": "Hi!"}, {"from": "assistant", "value": "Hello."}]
    rows = [{"body": "größer"}, {"talk": talk, "body": "no"}, {"q": "Hi!", "a": "Hello."}, {"body": "", "talk": None}]
    assert [document.text for document in iter_documents(rows, fields)] == TEXTS
    with pytest.raises(DataError, match="names of fields"):
        Fields(text="")


SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi!"},
    {"from": "gpt", "value": "Hello."},
]


def test_known_columns_of_other_collections() -> None:
    alpaca = {"instruction": "Sort.", "input": "b a", "output": "a b", "text": "Below is an instruction ..."}
    rows = [{"conversations": SHAREGPT}, alpaca, {**alpaca, "input": ""}, {**alpaca, "input": None},
            {"prompt": "Sort.", "input": "b a", "response": "a b"},
            {"instruction": "Sort.", "text": "a text"}]  # fmt: skip
    documents = load_documents(rows)
    assert [document.text for document in documents] == [
        "System: Be kind.\n\nUser: Hi!\n\nAssistant: Hello.",
        "User: Sort.\nb a\n\nAssistant: a b",
        *["User: Sort.\n\nAssistant: a b"] * 2,
        "User: Sort.\nb a\n\nAssistant: a b",
        "a text",
    ]
    fields = Fields(prompt="q", response="a", input="context", template="instruction")
    own = {"q": "Sort.", "context": "b a", "a": "a b"}
    for document in load_documents([own, alpaca], fields):
        assert document.text == "Instruction: Sort.\n\nInput: b a\n\nResponse: a b"


def test_templates_and_thoughts_are_chosen_by_name() -> None:
    row = {"prompt": "Hi!", "response": "Hello."}
    assert load_documents([row], Fields(template="question"))[0].text == "Question: Hi!\n\nAnswer: Hello."
    assert load_documents([row], Fields(think="fake"))[0].text == "User: Hi!\n\nAssistant: <think>\n</think>\nHello."
    with pytest.raises(WkvError, match="template must be one of chat, question, instruction, found 'alpaca'"):
        Fields(template="alpaca")
    with pytest.raises(WkvError, match="'question' knows no thoughts"):
        Fields(template="question", think="on")
    with pytest.raises(DataError, match="row 1: the template 'question' has no system message"):
        load_documents([{"conversations": SHAREGPT}], Fields(template="question"))


def test_a_folder_may_mix_texts_and_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"text": "second"}, {"text": "third"}])
    (tmp_path / "a.txt").write_text("first")
    assert [document.text for document in load_documents(tmp_path)] == ["first", "second", "third"]


def test_documents_are_read_one_after_the_other(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, {"wrong": 1}])
    documents = iter_documents(path)
    assert next(documents).text == "fine"
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        next(documents)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut off', "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b'{"text": "\xff"}', r"line 2: not UTF-8 text \(byte 10"),
        (b'{"text": "\\ud800"}', "line 2: not UTF-8 text"),
        (b'["text"]', "line 2: a row must be an object with named fields, found list"),
        (b'{"txt": "a"}', r"line 2: no field 'messages', 'prompt' with 'response', or 'text'; found 'txt'"),
        (b'{"prompt": "a"}', "line 2: no field"),
        (b'{"txt": "a"}', "nor 'conversations', nor 'instruction' with 'output'; name yours, as in Fields"),
        (b'{"conversations": [{"from": "bing", "value": "a"}]}', r"line 2: the roles .*; message 1 \(bing\) is out of"),
        (b'{"conversations": [{"role": "user"}]}', "line 2: message 1 has no field 'from'; name yours in Fields"),
        (b'{"instruction": "a", "input": [], "output": "b"}', "line 2: field 'input' must be a text, found list"),
        (b'{"text": 3}', "line 2: field 'text' must be a text, found int"),
        (b'{"messages": "a"}', "line 2: field 'messages' must be a list of messages, found str"),
        (b'{"messages": [1]}', "line 2: field 'messages' must be a list"),
        (b'{"messages": []}', "line 2: the roles of a conversation .* found no message"),
        (b'{"messages": [{"role": "user"}]}', "line 2: message 1 has no field 'content'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2: the roles .* ending with .*; found user"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "line 2: the roles .* found bot"),
        (b'{"prompt": "a", "response": " \\n"}', "line 2: answer 1 is empty"),
        (b'{"prompt": " ", "response": "a"}', "line 2: a message must be a text that is not empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, .*{message}"):
        load_documents(path)


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DataError, match=r"rows\.jsonl: the file is empty"):
        load_documents(tmp_path)
    with pytest.raises(DataError, match="the corpus has no rows"):
        load_documents([])
    for source in (3, b"text", {"text": "a"}):
        with pytest.raises(DataError, match="an iterable of rows; found"):
            load_documents(source)


def test_conversations_are_held_out_whole() -> None:
    documents = load_documents([{"messages": CHAT}] * 10)
    train, held_out = split_held_out(documents)
    assert (len(train), len(held_out)) == (9, 1)
    assert held_out[0].parts
    with pytest.raises(DataError, match="at least two"):
        split_held_out(documents[:1])


def test_absent_packages_say_how_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="Parquet files needs the package pyarrow: pip install pyarrow"):
        load_documents(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets: pip install datasets"):
        load_documents("hf:someone/something")
    with pytest.raises(DataError, match='expected "hf:NAME"'):
        load_documents("hf:")


def test_a_data_set_is_streamed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert streaming
        if name == "missing":
            raise FileNotFoundError("no such data set\nmore")
        return [{"text": f"{name} {split}"}] * (0 if split == "none" else 2)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [d.text for d in load_documents("hf:someone/something")] == ["someone/something train"] * 2
    documents = load_documents("hf:name:test[:10%]")
    assert [(d.name, d.text) for d in documents] == [("name:1", "name test[:10%]"), ("name:2", "name test[:10%]")]
    with pytest.raises(DataError, match=r"hf:missing: cannot be loaded \(no such data set\)"):
        load_documents("hf:missing")
    with pytest.raises(DataError, match="this split has no rows"):
        load_documents("hf:name:none")
    with pytest.raises(DataError, match="hf:name, row 1: no field"):
        load_documents("hf:name", Fields(text="body"))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"text {i}", "unread": i} for i in range(600)] + [{"messages": CHAT}]
    parquet.write_table(arrow.Table.from_pylist(rows, arrow.schema({
        "text": arrow.string(), "unread": arrow.int64(),
        "messages": arrow.list_(arrow.struct({"role": arrow.string(), "content": arrow.string()})),
    })), tmp_path / "rows.parquet")  # fmt: skip
    documents = load_documents(tmp_path)
    assert [d.text for d in documents] == [*(f"text {i}" for i in range(600)), TEXTS[1]]
    assert documents[599].name == "rows.parquet:600"
    assert documents[600].parts
    with pytest.raises(DataError, match=r"rows\.parquet, row 1: no field .*; found"):
        load_documents(tmp_path / "rows.parquet", Fields(text="unseen", messages="unseen2"))
    whole = (tmp_path / "rows.parquet").read_bytes()
    for damaged in (whole[:-20], b"PAR1" + whole[40:], b""):
        (tmp_path / "rows.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as a Parquet file"):
            load_documents(tmp_path / "rows.parquet")
    parquet.write_table(arrow.Table.from_pylist([], arrow.schema({"text": arrow.string()})), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has no rows"):
        load_documents(tmp_path)


@pytest.mark.filterwarnings("default")  # of that package
def test_the_package_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    source = f"hf:{tmp_path / 'rows'}"
    assert [d.text for d in iter_documents(source)] == ["a", "b"]
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train", streaming=True)
    store = build_cache(iter_documents(rows), ByteTokenizer(), tmp_path / "cache")
    assert store.document(1).tolist() == [98]
    with pytest.raises(DataError, match="rows:test: cannot be loaded"):
        load_documents(f"{source}:test")


def test_documents_pass_through() -> None:
    document = Document("a", "text")
    assert load_documents([document]) == [document]
