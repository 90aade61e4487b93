"""`wkv tokenizer`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.tokenizers.helpers import PROSE, small_bpe
from wkv.cli.tokenizer import app
from wkv.errors import TokenizerError, WkvError
from wkv.tokenizers import BPETokenizer


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def output(*arguments: str | Path, stdin: bytes | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exception is None
    assert result.exit_code == 0
    return result.stdout


def error(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, TokenizerError)
    assert isinstance(result.exception, WkvError)
    return str(result.exception)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text(PROSE * 4, encoding="utf-8")
    (tmp_path / "texts" / "more" / "b.txt").write_text("banana bandana " * 9, encoding="utf-8")
    (tmp_path / "texts" / "ignored.bin").write_text("zzzz " * 99, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_train(folder: Path) -> None:
    out = folder / "tokenizer.json"
    printed = output("train", folder / "texts", "--vocab-size", "300", "--out", out)
    assert "300 ids" in printed
    assert "2 files" in printed
    assert BPETokenizer.load(out).vocab_size == 300
    assert sorted(entry.name for entry in folder.iterdir()) == ["empty", "texts", "tokenizer.json"]


def test_train_says_when_the_vocabulary_stays_smaller(folder: Path) -> None:
    out = folder / "tokenizer.json"
    assert "4000 asked for" in output("train", folder / "texts/more/b.txt", "--vocab-size", "4000", "--out", out)


def test_train_replaces_only_when_told(folder: Path) -> None:
    out = folder / "tokenizer.json"
    out.write_text("mine", encoding="utf-8")
    assert "--force" in error("train", folder / "texts", "--out", out)
    assert out.read_text(encoding="utf-8") == "mine"
    output("train", folder / "texts", "--out", out, "--vocab-size", "300", "--force")
    assert BPETokenizer.load(out).vocab_size == 300


def test_train_refuses(folder: Path) -> None:
    assert "no file or folder" in error("train", folder / "absent.txt", "--out", folder / "t.json")
    assert "no .txt file" in error("train", folder / "empty", "--out", folder / "t.json")
    assert "does not exist" in error("train", folder / "texts", "--out", folder / "absent" / "t.json")
    assert "at least 257" in error("train", folder / "texts", "--vocab-size", "5", "--out", folder / "t.json")
    assert not (folder / "t.json").exists()


def test_encode_and_decode(tmp_path: Path) -> None:
    small_bpe().save(tmp_path / "tokenizer.json")
    assert output("encode", "User: hi\n\n") == "24281 59 4571 261\n"
    assert output("decode", "24281", "59", "4571") == "User: hi\n"
    assert output("encode", "hé", "--tokenizer", "bytes") == "104 195 169\n"
    ids = output("encode", "quick brown", "-t", tmp_path).split()
    assert output("decode", "-t", tmp_path, *ids) == "quick brown\n"


def test_encode_reads_bytes_from_standard_input() -> None:
    assert output("encode", "-", stdin=b"a\xffb") == "98 256 99\n"


def test_errors() -> None:
    assert "99999 at position 1" in error("decode", "1", "99999")
    assert "'bytes', 'world'" in error("encode", "a", "--tokenizer", "wordl")
    assert run("decode", "one").exit_code == 2


def test_info() -> None:
    assert output("info") == "bytes, world, or the path of a tokenizer.json\n"
    world = output("info", "world")
    assert "65536 ids, 65529 of them" in world
    assert "33155 45 40213 34" in world
    assert "128 bytes" in world
    assert "none" in output("info", "bytes")
