"""Every command and every line of Python in the README runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The demo and the tiny recipe with a model and a budget that fit a test.
QUICK = (
    "model.num_layers=1 model.hidden_size=32 model.head_size=32 train.steps=12 train.seconds=null train.eval_bytes=2000"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with conversations, after the demo."""
    folder = tmp_path_factory.mktemp("readme")
    chats = [{"prompt": f"What is {i}?", "response": "A number."} for i in range(24)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    if (ROOT / ".venv" / ".train").is_file() and shutil.which("make"):
        run(["make", "demo", f"DEMO=--out {folder}/runs/demo {QUICK}"], ROOT)
    else:
        run([sys.executable, "-m", "wkv.cli", "demo", *QUICK.split()], folder)
    return folder


def test_the_demo_leaves_what_it_promises(folder: Path) -> None:
    for name in ("model.safetensors", "loss.png", "log.csv", "recipe.yaml", "result.json"):
        assert (folder / "runs/demo" / name).is_file()


def test_make_commands_exist() -> None:
    assert {"make demo", "make test"} <= set(commands())
    if shutil.which("make"):
        assert "pytest" in run(["make", "--dry-run", "test"], ROOT)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("wkv")])
def test_commands(command: str, folder: Path) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "train":
        words += [*QUICK.split(), "data.source=chats.jsonl"]
    if words[0] == "finetune":
        words += ["--epochs", "0.5"]
    if words[0] == "eval":
        words += ["train.steps=2"]
    assert run([sys.executable, "-m", "wkv.cli", *words], folder).strip()


def test_python(folder: Path) -> None:
    for block in blocks("python"):
        run([sys.executable, "-W", "error", "-c", block], folder)


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
