"""What result files say about where their numbers come from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import wkv
from wkv.speed.evidence import commit, evidence

ROOT = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def test_it_names_command_commit_versions_and_machine() -> None:
    found = evidence(ROOT / "benchmarks/decode.py", ["--out", "/home/me/x.json", "--seed", "1"], ("torch", "not-there"))
    if (ROOT / ".git").exists():
        assert found["command"] == "python benchmarks/decode.py --out x.json --seed 1"
        assert (found["commit"] or "").rstrip("+") == git("rev-parse", "HEAD")
    assert found["versions"].keys() == {"wkv", "torch", "python"}
    assert found["versions"]["wkv"] == wkv.__version__
    assert found["hardware"]["threads"] >= 1
    again = evidence(ROOT / "benchmarks/decode.py")  # a resumed run compares these
    assert (again["hardware"], again["commit"]) == (found["hardware"], found["commit"])


def test_outside_a_repository_there_is_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path / "script.py") is None
    assert evidence(tmp_path / "script.py")["command"] == "python script.py"
