"""Initial values, sizes and optimizer rules of every model against the official ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wkv
from wkv.layers.language_model import LanguageModel

GOLDEN = Path(__file__).parent.parent / "golden"
DETERMINISTIC = {"rwkv4": "rwkv4", "rwkv5": "rwkv5_2", "rwkv6": "rwkv6", "rwkv7": "rwkv7"}
MODELS = ("rwkv4", "rwkv5", "rwkv5_0", "rwkv5_1", "rwkv6", "rwkv7", "rwkv7a")
LAYERS, HIDDEN, VOCAB = 4, 128, 200

# Parameter name endings -> gain of an orthogonal matrix (0: all zeros). Widths: V = 200, C = A = 128.
TALL_HEAD = 0.5 * math.sqrt(VOCAB / HIDDEN)
LATER = {
    "head.weight": TALL_HEAD,
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "att.gate.weight": 0.1,
    "att.output.weight": 0.0,
    "ffn.key.weight": 1.0,
    "ffn.value.weight": 0.0,
    "ffn.receptance.weight": 0.0,
}
FIRST = {**LATER, "att.receptance.weight": 0.0, "att.key.weight": 0.0, "ffn.key.weight": 2.0}  # F = 4 C
PREVIEW = {**LATER, "att.key.weight": 1.0, "att.gate.weight": 1.0, "ffn.key.weight": math.sqrt(3.5)}
LOW_RANK = {
    **{f"att.{letter}1": 0.0 for letter in "wavg"},
    **{f"att.{letter}2": 0.1 for letter in "wavg"},
}
GAINS: dict[str, dict[str, float]] = {
    "rwkv4": FIRST,
    "rwkv5": LATER,
    "rwkv5_0": PREVIEW,
    "rwkv5_1": PREVIEW,
    "rwkv6": {**LATER, "time_maa_w1": 0.0, "time_decay_w1": 0.0},
    "rwkv7": {**LATER, **LOW_RANK, "att.g2": 0.1 * math.sqrt(160 / 128)},  # gate rank 160 at C = 128 is made below
    "rwkv7a": {**LATER, **LOW_RANK, "att.g2": 0.1 * math.sqrt(160 / 128), "s1": 0.0, "s2": 0.1, "s_emb_x.weight": 1.0},
}
UNIFORM = {"emb.weight": 1e-4, "s_emb.weight": 1e-4, "time_maa_w2": 0.01, "time_decay_w2": 0.01}
CONSTANT = {"s0": 1.0, "time_first": -3.0}  # rwkv4's time_first is in the golden file

all_models = pytest.mark.parametrize("name", MODELS)


@functools.cache
def new_model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    ranks: dict[str, Any] = {"gate_rank": 160} if "7" in name else {}
    return wkv.create_model(name, vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=LAYERS, **ranks)


def head_size(name: str, size: int) -> dict[str, Any]:
    return {} if name == "rwkv4" else {"head_size": size}


def deterministic_values(name: str) -> dict[str, Tensor]:
    if name not in DETERMINISTIC:
        return {}
    return load_file(GOLDEN / DETERMINISTIC[name] / "init_deterministic.safetensors")


def ending(name: str, table: dict[str, float]) -> float | None:
    """The entry of `table` whose key ends `name` at a dot or an underscore, or is `name`; the longest counts."""
    keys = sorted((key for key in table if f".{name}".endswith(f".{key}")), key=len)
    return table[keys[-1]] if keys else None


def is_orthogonal(matrix: Tensor, gain: float) -> bool:
    matrix = matrix.detach().double()
    square = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return bool((square - gain**2 * torch.eye(len(square))).abs().max() <= 1e-5 * gain**2)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_values_are_the_official_ones(name: str) -> None:
    golden = deterministic_values(name)
    values = new_model(name).state_dict()
    assert {key.split(".")[1] for key in golden} == {"0", "1", str(LAYERS - 1)}
    for key, expected in golden.items():
        assert values[key].shape == expected.shape, key
        assert float((values[key].double() - expected.double()).abs().max()) <= 2e-6, key


@all_models
def test_matrices_are_orthogonal_or_zero(name: str) -> None:
    checked = set()
    for key, parameter in new_model(name).named_parameters():
        gain = ending(key, GAINS[name])
        if gain == 0:
            assert not parameter.any(), key
        elif gain is not None:
            assert is_orthogonal(parameter, gain), key
        if gain is not None:
            checked.add(key)
    weights = {key for key, p in new_model(name).named_parameters() if key.endswith(".weight") and p.ndim == 2}
    assert weights <= checked | {"emb.weight"} | {key for key in weights if "s_emb.weight" in key}


@all_models
@pytest.mark.parametrize(("vocab", "gain"), [(4, 0.5), (32, 0.5), (128, 1.0)])
def test_head_is_scaled_by_the_vocabulary(name: str, vocab: int, gain: float) -> None:
    sizes = head_size(name, 32)
    model = wkv.create_model(name, vocab_size=vocab, hidden_size=32, num_layers=1, **sizes)
    assert is_orthogonal(model.head.weight, gain)


@all_models
def test_embeddings_and_small_factors_are_uniform(name: str) -> None:
    for key, parameter in new_model(name).state_dict().items():
        bound = ending(key, UNIFORM)
        if bound is not None:
            assert 0.98 * bound < float(parameter.abs().max()) <= bound, key
            assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), key


@all_models
def test_norms(name: str) -> None:
    for key, parameter in new_model(name).named_parameters():
        if "ln" not in key:
            continue
        layer = int(key.split(".")[1]) if key.startswith("blocks") else 0
        expected = 0.0 if key.endswith("bias") else 1.0
        if key.endswith("ln_x.weight"):
            expected = ((1 + layer) / LAYERS) ** 0.7
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


@all_models
def test_every_parameter_has_an_official_value(name: str) -> None:
    """Layers 0, 1 and last: a golden vector, a gain, a range or a constant. Previews and 7a have tests of their own."""
    golden = deterministic_values(name) or deterministic_values({"rwkv7a": "rwkv7"}.get(name, "rwkv5"))
    for key, parameter in new_model(name).named_parameters():
        assert torch.isfinite(parameter).all(), key
        known = key in golden or key.startswith("blocks.2.") or "ln" in key
        tables = (GAINS[name], UNIFORM, CONSTANT)
        assert known or any(ending(key, table) is not None for table in tables), key


@pytest.mark.parametrize("name", ["rwkv5_0", "rwkv5_1"])
def test_previews_ramp_over_heads(name: str) -> None:
    torch.manual_seed(0)
    model = wkv.create_model(name, vocab_size=9, hidden_size=96, num_layers=3, head_size=32)
    heads = torch.arange(3) / 2
    for i in range(3):
        rho, eta = i / 2, 1 - i / 3
        values = {key.removeprefix(f"blocks.{i}.att."): p for key, p in model.state_dict().items()}
        torch.testing.assert_close(values["time_decay"], -6 + 5 * heads ** (0.7 + 1.3 * rho))
        torch.testing.assert_close(values["time_mix_v"].flatten(), (torch.arange(96) / 96) ** eta + 0.3 * rho)
        if name == "rwkv5_1":
            torch.testing.assert_close(values["time_faaaa"], rho * (1 - heads))
            torch.testing.assert_close(values["time_mix_g"].flatten(), (torch.arange(96) / 96) ** (0.5 * eta))
        else:
            assert torch.equal(values["time_first"], torch.full((3,), -3.0))
            assert "gate.weight" not in values
            assert "time_mix_g" not in values


def test_rwkv7a_starts_as_rwkv7() -> None:
    sizes: dict[str, Any] = {"vocab_size": 17, "hidden_size": 64, "num_layers": 2, "head_size": 32}
    deep, plain = wkv.create_model("rwkv7a", **sizes), wkv.create_model("rwkv7", **sizes)
    for key, parameter in deep.named_parameters():
        if not parameter.any() and not key.endswith("s1"):  # zero outputs would hide what a block computes
            torch.nn.init.normal_(parameter, std=0.1)
    shared = {key: value for key, value in deep.state_dict().items() if ".ffn.s" not in key}
    assert plain.load_state_dict(shared, strict=True)
    tokens = torch.arange(17)[None]
    torch.testing.assert_close(deep(tokens).logits, plain(tokens).logits)


@all_models
def test_one_layer_and_one_channel(name: str) -> None:
    sizes = head_size(name, 1)
    model = wkv.create_model(name, vocab_size=3, hidden_size=1, num_layers=1, **sizes)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.isfinite(model(torch.tensor([[0, 1, 2]])).logits).all()


@all_models
def test_attention_width_may_differ(name: str) -> None:
    sizes = head_size(name, 16)
    model = wkv.create_model(name, vocab_size=5, hidden_size=24, num_layers=2, attention_size=48, ffn_size=40, **sizes)
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    logits, state = model(tokens)
    assert logits.shape == (1, 5, 5)
    width = state.layers[0]["num"].shape[1] if name == "rwkv4" else 16 * state.layers[0]["wkv"].shape[1]
    assert width == 48


@all_models
def test_seed_decides_the_values(name: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 7, "hidden_size": 64, "num_layers": 1}
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(wkv.create_model(name, **sizes).state_dict())
    assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])
    assert not torch.equal(values[0]["emb.weight"], values[2]["emb.weight"])


@pytest.mark.parametrize(
    ("name", "per_layer", "ranks"),
    [
        ("rwkv4", lambda c: 13 * c**2 + 11 * c, {}),
        ("rwkv5", lambda c: 13 * c**2 + 14 * c, {}),
        ("rwkv6", lambda c: 13 * c**2 + 464 * c, {"shift_rank": 32, "decay_rank": 64}),
        ("rwkv7", lambda c: 12 * c**2 + (19 + 2 * (64 + 96 + 32 + 128)) * c,
         {"decay_rank": 64, "iclr_rank": 96, "value_rank": 32, "gate_rank": 128}),
    ],
)  # fmt: skip
def test_parameter_counts(name: str, per_layer: Callable[[int], int], ranks: dict[str, Any]) -> None:
    vocab, hidden, layers = 50, 256, 3
    with torch.device("meta"):
        model = wkv.create_model(name, vocab_size=vocab, hidden_size=hidden, num_layers=layers, **ranks)
    assert model.num_parameters == 2 * vocab * hidden + 4 * hidden + layers * per_layer(hidden)


PUBLISHED = {
    "rwkv4": {"169m": 0.169, "430m": 0.43, "1.5b": 1.515, "3b": 2.985, "7b": 7.393, "14b": 14.15},
    "rwkv5": {"0.4b": 0.46, "1.5b": 1.58, "3b": 3.06, "7b": 7.52},
    "rwkv6": {"1.6b": 1.6, "3b": 3.1, "7b": 7.6},
    "rwkv7": {"0.1b": 0.191, "0.4b": 0.45, "1.5b": 1.53, "2.9b": 2.95, "7.2b": 7.2},
}


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, sizes in PUBLISHED.items() for preset in sizes])
def test_presets_have_the_published_sizes(name: str, preset: str) -> None:
    with torch.device("meta"):
        model = wkv.create_model(name, preset)
    assert model.num_parameters / 1e9 == pytest.approx(PUBLISHED[name][preset], rel=0.02)


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [
        ("rwkv4", 768, {"ffn_size": 3072, "attention_size": 768}),
        ("rwkv5", 768, {"ffn_size": 2688, "num_heads": 12}),
        ("rwkv5", 320, {"ffn_size": 1120}),
        ("rwkv5", 192, {"ffn_size": 672}),
        ("rwkv6", 2560, {"ffn_size": 8960, "shift_rank": 32, "decay_rank": 64}),
        ("rwkv6", 4096, {"ffn_size": 14336, "shift_rank": 64, "decay_rank": 128}),
        ("rwkv7", 768, {"ffn_size": 3072, "decay_rank": 64, "iclr_rank": 64, "value_rank": 32, "gate_rank": 128}),
        ("rwkv7a", 768, {"embed_rank": 32, "gate_rank": 128}),
    ],
)
def test_default_sizes(name: str, hidden: int, expected: dict[str, int]) -> None:
    from wkv.registry import create_config

    config = create_config(name, vocab_size=8, hidden_size=hidden, num_layers=2)
    assert {field: getattr(config, field) for field in expected} == expected


@all_models
def test_optimizer_rules(name: str) -> None:
    model = new_model(name)
    doubled = "att.w0" if "7" in name else "att.time_decay"
    for key, parameter in model.named_parameters():
        factor, decays = model.parameter_rule(key, parameter)
        expected = 2.0 if key.endswith(doubled) else 3.0 if key.endswith("time_first") else 1.0
        assert factor == expected, key
        assert decays == (key.endswith(".weight") and parameter.ndim == 2), key
