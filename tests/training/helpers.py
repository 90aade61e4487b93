"""A small corpus and a small recipe."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

import wkv
from wkv.training import Recipe, parse_recipe

TEXT = "the state of our union is strong and we will build a nation where people work for peace and learn"


def write_corpus(folder: Path, files: int = 22, words: int = 200) -> Path:
    """`files` text files of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(7)
    for i in range(files):
        (folder / f"{i:02}.txt").write_text(" ".join(generator.choices(TEXT.split(), k=words)) + "\n")
    return folder


def recipe_values(source: Path, **train: Any) -> dict[str, Any]:
    """A recipe of 20 steps for 2 layers x 32 over bytes; keyword arguments change its `train` section."""
    return {
        "model": {"name": "rwkv7", "num_layers": 2, "hidden_size": 32, "head_size": 16},
        "data": {"source": str(source), "tokenizer": "bytes"},
        "train": {
            "steps": 20, "context_length": 24, "batch_size": 4, "learning_rate": 5e-3, "final_learning_rate": 5e-4,
            "warmup_steps": 4, "weight_decay": 0.1, "eval_every": 10, "eval_bytes": 200, "checkpoint_every": 10,
            **train,
        },
    }  # fmt: skip


def tiny_recipe(source: Path, **train: Any) -> Recipe:
    """`recipe_values` as a recipe."""
    return parse_recipe(recipe_values(source, **train))


def tiny_model(seed: int = 0, vocab_size: int = 256) -> Any:
    """The model of `recipe_values`."""
    torch.manual_seed(seed)
    return wkv.create_model("rwkv7", vocab_size=vocab_size, num_layers=2, hidden_size=32, head_size=16)
