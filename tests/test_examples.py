"""Every script in examples/ runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.head_size=32", "data.vocab_size=300"]
SMALL += ["train.steps=5", "train.warmup_steps=2"]


def run(script: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script", ["batch_generation.py", "chat_with_model.py", "generate_text.py", "quantize_model.py"]
)
def test_inference_examples(script: str, tmp_path: Path) -> None:
    output = run(script, cwd=tmp_path)
    assert output
    assert ": False" not in output


def test_training_example(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    assert "bits per byte" in run("train_on_text.py", "book.txt", "run", *SMALL, cwd=tmp_path)


def test_continuing_and_preparing_examples(tmp_path: Path) -> None:
    run("prepare_data.py", cwd=tmp_path)
    (tmp_path / "book.txt").write_text("What is 2 + 2? It is 4. Who wrote Faust? Goethe did. " * 200)
    run("train_on_text.py", "book.txt", "run", *SMALL, cwd=tmp_path)
    changes = ["train.steps=4", "train.warmup_steps=1", "train.context_length=64", "train.eval_every=2"]
    output = run("continue_training.py", "run/model.safetensors", "talks.jsonl", "more", *changes, cwd=tmp_path)
    assert "4 steps of" in output


def test_finetuning_example(tmp_path: Path) -> None:
    output = run("finetune_on_chats.py", "tuned", "train.epochs=0.5", cwd=tmp_path)
    assert "User: What do you say about the weather?\nAssistant: " in output
    assert (tmp_path / "tuned/run/best.safetensors").is_file()


def test_long_document_example(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("all is well; " * 200)
    assert "cosine of the two gradients" in run("long_document.py", "book.txt", cwd=tmp_path)


def test_comparison_of_mixers(tmp_path: Path) -> None:
    assert "previous_token" in run("compare_mixers.py", "4", cwd=tmp_path)
    assert (tmp_path / "compare_mixers.png").is_file()


def test_the_list_of_corpora() -> None:
    """What the script makes of them: tests/test_prepare_corpora.py."""
    assert "linux-doc-6.1" in run("prepare_corpora.py", "--list", cwd=EXAMPLES)


# ray_cluster.py: tests/training/test_engines.py


def test_no_example_is_forgotten() -> None:
    text = Path(__file__).read_text()
    assert all(path.name in text for path in EXAMPLES.glob("*.py"))
