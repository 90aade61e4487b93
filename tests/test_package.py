"""What a user meets first: a light import, a tidy face, a command line that explains itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import wkv
from wkv.cli import app


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light() -> None:
    """Importing wkv loads neither torch nor anything optional; the operators load torch alone."""
    heavy = "{'torch', 'accelerate', 'transformers', 'tokenizers', 'matplotlib', 'triton', 'omegaconf', 'typer'}"
    assert run_python(f"import sys, wkv; print(sorted({heavy} & sys.modules.keys()))").strip() == "[]"
    code = f"import sys, wkv; wkv.create_model; wkv.ops; wkv.State; print(sorted({heavy} & sys.modules.keys()))"
    assert run_python(code).strip() == "['torch']"


def test_import_reads_no_environment() -> None:
    code = """
import os, sys
names = []
class Watch(dict):
    def __getitem__(self, key): names.append(key); return super().__getitem__(key)
    def get(self, key, default=None): names.append(key); return super().get(key, default)
import torch, numpy, safetensors
before = set(sys.modules)
os.environ = Watch(os.environ)
import wkv; wkv.ops; wkv.State; wkv.list_models(); wkv.create_model; wkv.tokenizers; wkv.checkpoints
print([n for n in names if 'wkv' in n.lower() or 'rwkv' in n.lower()])
"""
    assert run_python(code).strip() == "[]"


def test_public_names() -> None:
    assert wkv.list_models("rwkv5*") == ["rwkv5", "rwkv5_0", "rwkv5_1"]
    for name in wkv.__all__:
        assert getattr(wkv, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wkv.nonsense


def test_help_lists_every_verb() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for verb in ("demo", "info", "generate", "chat", "train", "upgrade", "eval", "tokenizer", "doctor"):
        assert verb in text
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"wkv {wkv.__version__}"


def test_doctor() -> None:
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    for operator in ("wkv4", "wkv5", "wkv6", "wkv7"):
        rows = {row["name"]: row for row in report["backends"][operator]}
        assert rows["reference"]["usable"]
        assert rows["chunked"]["usable"]
        assert all(row["usable"] or row["reason"] for row in rows.values())
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "chunked" in shown.output


def test_errors_are_one_line(tmp_path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from wkv.cli import main; main()", "info", str(tmp_path / "missing.pth")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "missing.pth" in process.stderr
    assert "Traceback" not in process.stderr


def test_brackets_in_errors_are_shown(monkeypatch, capsys) -> None:
    """Error texts are shown as they are, also where they look like markup."""
    import wkv.cli

    def fail() -> None:
        raise wkv.WkvError('tokens must be [B, T]; run pip install "wkv[train]"')

    monkeypatch.setattr(wkv.cli, "app", fail)
    with pytest.raises(SystemExit):
        wkv.cli.main()
    assert capsys.readouterr().err == 'error: tokens must be [B, T]; run pip install "wkv[train]"\n'
