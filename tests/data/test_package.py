"""The public names, and the pages that show them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import wkv.data

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there_and_described() -> None:
    page = (ROOT / "docs/data.md").read_text() + (ROOT / "docs/training.md").read_text()
    for name in wkv.data.__all__:
        assert getattr(wkv.data, name).__doc__, name
    mentioned = {name for name in wkv.data.__all__ if re.search(rf"\b{name}\b", page)}
    assert set(wkv.data.__all__) - mentioned <= {"Sampler", "conversation", "encode_document", "magic_prime",
                                                 "tokenizer_fingerprint"}  # fmt: skip


def test_tokenising_needs_no_torch() -> None:
    """A worker process starts in a moment."""
    code = "import sys; from wkv.data import parallel; from wkv.tokenizers import ByteTokenizer; "
    command = [sys.executable, "-c", code + "print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "False\n"


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"prompt": "Hi!", "response": "Hello, who are you?"}\n' * 100)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)[0]
    Path("script.py").write_text(code)
    batch = runpy.run_path("script.py", run_name="__main__")["batch"]
    assert batch.inputs.shape == (8, 512)
    assert batch.num_targets > 0


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples/prepare_data.py"))["main"]()
    assert re.search(r"and learns  ' (It is 4\.|Goethe did\.|Hello!)'", capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "talks.jsonl", "token_cache", "token_cache_binidx.bin", "token_cache_binidx.idx",
    ]  # fmt: skip
