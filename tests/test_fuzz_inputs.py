"""Malformed tokens, masks, resets, sizes and options: one clear error each, nothing hangs, nothing changes."""

from __future__ import annotations

import random

import pytest
import torch

import wkv
from wkv.errors import WkvError

V, B, T = 13, 2, 6


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return wkv.create_model("rwkv7", vocab_size=V, hidden_size=16, num_layers=1, head_size=8).eval()


def bad_tokens(rng: random.Random) -> tuple[object, str]:
    """A random malformed `tokens` argument and a word its error must contain."""
    good = torch.randint(0, V, (B, T))
    kind = rng.randrange(7)
    if kind == 0:
        value = rng.choice([V, V + rng.randrange(1 << 40), -1, -rng.randrange(1, 1 << 40)])
        good[rng.randrange(B), rng.randrange(T)] = value
        return good, str(value)
    if kind == 1:
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.uint8, torch.complex64])
        return good.to(dtype), "int64"
    if kind == 2:
        return torch.zeros([B] + [T] * rng.choice([0, 2, 3]), dtype=torch.long), r"\[B, T\]"
    if kind == 3:
        return torch.zeros(rng.choice([(0, T), (B, 0), (0, 0)]), dtype=torch.long), "non-empty"
    if kind == 4:
        return rng.choice([None, good.tolist(), "text", 5, b"x", good.numpy()]), "tensor"
    if kind == 5:
        return torch.full((B, T), rng.choice([V, 2**31, -(2**62)])), "outside the vocabulary"
    return torch.zeros((), dtype=torch.long), r"\[B, T\]"


def bad_flags(rng: random.Random) -> object:
    kind = rng.randrange(5)
    if kind == 0:
        return torch.ones(B, T, dtype=rng.choice([torch.int64, torch.float32, torch.uint8]))
    if kind == 1:
        return torch.ones(B, T + rng.choice([-1, 1, 5]), dtype=torch.bool)
    if kind == 2:
        return torch.ones(B + rng.choice([-1, 1]), T, dtype=torch.bool)
    if kind == 3:
        return torch.ones(T if rng.random() < 0.5 else 1, dtype=torch.bool)
    return rng.choice(["mask", 1, [True] * T, True, {}])


@pytest.mark.parametrize("seed", range(60))
def test_tokens(model: torch.nn.Module, seed: int) -> None:
    tokens, word = bad_tokens(random.Random(seed))
    with pytest.raises(WkvError, match=word):
        model(tokens)


@pytest.mark.parametrize("name", ["mask", "reset"])
@pytest.mark.parametrize("seed", range(30))
def test_masks_and_resets(model: torch.nn.Module, name: str, seed: int) -> None:
    flags = bad_flags(random.Random(seed))
    with pytest.raises(WkvError, match=name):
        model(torch.zeros(B, T, dtype=torch.long), **{name: flags})


@pytest.mark.parametrize("seed", range(30))
def test_states(model: torch.nn.Module, seed: int) -> None:
    rng = random.Random(seed)
    state = model.init_state(B)
    layer = state.layers[0]
    key = rng.choice(list(layer))
    kind = rng.randrange(4)
    if kind == 0:
        del layer[key]
    elif kind == 1:
        layer[key] = layer[key][..., : layer[key].shape[-1] - rng.randrange(1, 8)]
    elif kind == 2:
        layer[key + "x"] = layer.pop(key)
    else:
        layer[key] = layer[key][..., None]
    with pytest.raises(WkvError, match="state"):
        model(torch.zeros(B, T, dtype=torch.long), state=state)


@pytest.mark.parametrize("size", [0, -1, 1.5, "8", None, True, [3]])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_layers", "head_size", "ffn_size", "decay_rank"])
def test_sizes(key: str, size: object) -> None:
    sizes = {"vocab_size": V, "hidden_size": 16, "num_layers": 1, "head_size": 8, key: size}
    if size is None and key in ("ffn_size", "decay_rank"):
        assert getattr(wkv.create_model("rwkv7", **sizes).config, key) > 0
        return
    with pytest.raises(WkvError, match=key):
        wkv.create_model("rwkv7", **sizes)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("rwkv9", {}, "rwkv9"),
        ("rwkv7", {"n_layer": 3}, "n_layer"),
        ("rwkv7", {"preset": "9b"}, "9b"),
        ("rwkv7", {"vocab_size": 5}, "hidden_size"),
        ("rwkv7", {"vocab_size": 5, "hidden_size": 20, "num_layers": 1, "head_size": 8}, "multiple of head_size"),
        ("rwkv7", {"vocab_size": 5, "hidden_size": 16, "num_layers": 1, "head_size": 8, "norm_eps": 0}, "norm_eps"),
        ("rwkv4", {"vocab_size": 5, "hidden_size": 16, "num_layers": 1, "head_size": 8}, "head_size"),
    ],
)
def test_options(name: str, options: dict[str, object], word: str) -> None:
    with pytest.raises(WkvError, match=word):
        wkv.create_model(name, **options)


@pytest.mark.parametrize("batch", [0, -1, 1.0, "2", None, True])
def test_batch_sizes(model: torch.nn.Module, batch: object) -> None:
    with pytest.raises(WkvError, match="batch_size"):
        model.init_state(batch)
