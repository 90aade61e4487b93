"""Damaged, foreign and malicious checkpoints: one clear error that names the file or the key, and nothing else."""

from __future__ import annotations

import contextlib
import random
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wkv
from tests.checkpoints import spoil_files, spoil_keys
from tests.checkpoints.helpers import official, write_rwkv_cpp
from tests.checkpoints.spoil_keys import Spoil
from wkv.errors import CheckpointError

SPOILS: list[Spoil] = [
    value for module in (spoil_keys, spoil_files) for name, value in vars(module).items() if name.startswith("spoil_")
]
CASES = [(spoil, seed) for spoil in SPOILS for seed in range(10)]


@pytest.mark.parametrize(("spoil", "seed"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_bad_checkpoints(spoil: Spoil, seed: int, tmp_path: Path) -> None:
    source, words = spoil(random.Random(f"{spoil.__name__} {seed}"), tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        wkv.load_model(source)
    message = str(caught.value)
    assert any(word in message for word in ([words] if isinstance(words, str) else words))
    assert len(message) < 2000
    assert len(message.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
    with contextlib.suppress(CheckpointError):  # it reports some of them instead of raising, but never as loadable
        assert not wkv.checkpoints.inspect(source).loadable


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 250


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_any_flipped_byte_gives_this_error_or_none(suffix: str, tmp_path: Path) -> None:
    """Damage in the values cannot be seen; whatever is seen is a `CheckpointError`."""
    path = tmp_path / f"model{suffix}"
    weights = official("rwkv4", num_layers=1, hidden_size=2, attention_size=2, ffn_size=2, vocab_size=2)
    if suffix == ".bin":
        write_rwkv_cpp(path, "rwkv4", weights)
    else:
        torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    data = path.read_bytes()
    rng = random.Random(suffix)
    caught = 0
    for _ in range(300):
        spoiled = bytearray(data)
        spoiled[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        with contextlib.suppress(CheckpointError):
            caught += 1
            wkv.load_model(path)
            caught -= 1
    assert caught > 30


def test_absurd_claims_take_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spoils = (
        spoil_files.spoil_safetensors_claims, spoil_files.spoil_rwkv_cpp, spoil_files.spoil_description,
        spoil_keys.spoil_inflated, spoil_keys.spoil_far_layer,
    )  # fmt: skip
    for spoil in spoils:
        for seed in range(10, 20):
            folder = tmp_path / f"{spoil.__name__}{seed}"
            folder.mkdir()
            with pytest.raises(CheckpointError):
                wkv.load_model(spoil(random.Random(f"{spoil.__name__} {seed}"), folder)[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
