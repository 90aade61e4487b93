"""Every model against the official implementations: logits, states, loss and gradients (tests/golden/<model>)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import wkv
from wkv.layers.language_model import LanguageModel
from wkv.ops import use_backend
from wkv.state import State
from wkv.training import next_token_loss

GOLDEN = Path(__file__).parent.parent / "golden"
# Folder of golden vectors -> registered name.
MODELS = {
    "rwkv4": "rwkv4",
    "rwkv5_0": "rwkv5_0",
    "rwkv5_1": "rwkv5_1",
    "rwkv5_2": "rwkv5",
    "rwkv6": "rwkv6",
    "rwkv7": "rwkv7",
    "rwkv7a": "rwkv7a",
}
TRAINED = [folder for folder in MODELS if (GOLDEN / folder / "train_step.safetensors").exists()]
BACKENDS = ("reference", "chunked", "native")
FIELDS = {
    "V": "vocab_size",
    "C": "hidden_size",
    "L": "num_layers",
    "F": "ffn_size",
    "Dm": "shift_rank",
    "Dd": "decay_rank",
    "Dw": "decay_rank",
    "Da": "iclr_rank",
    "Dv": "value_rank",
    "Dg": "gate_rank",
}
LOGIT_BARS = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_BARS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
STATE_BAR = 1e-4
# (gradient norm relative to itself, gradient sum and first entries relative to the norm)
GRADIENT_BARS = {torch.float32: (1e-4, 2e-4, 2e-4), torch.float64: (1e-6, 1e-6, 1e-6)}
# Where head outputs of the first tokens nearly cancel, the group norm magnifies float32 rounding.
RWKV7_FLOAT32_BARS = (1e-4, 5e-4, 2e-4)

Run = Callable[[LanguageModel, Tensor], tuple[Tensor, State]]

all_models = pytest.mark.parametrize("folder", MODELS)
trained_models = pytest.mark.parametrize("folder", TRAINED)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
wide_types = pytest.mark.parametrize("dtype", LOGIT_BARS, ids=str)


@functools.cache
def checkpoint(folder: str) -> dict[str, Tensor]:
    shards = sorted((GOLDEN / folder).glob("ckpt-*.safetensors"))
    return {key: value for shard in shards for key, value in load_file(shard).items()}


def golden_model(folder: str, dtype: torch.dtype) -> LanguageModel:
    config = json.loads((GOLDEN / folder / "info.json").read_text())["config"]
    fields = {FIELDS[key]: value for key, value in config.items() if key in FIELDS}
    if "H" in config:
        fields["head_size"] = config["C"] // config["H"]
    with torch.device("meta"):
        model = wkv.create_model(MODELS[folder], **fields)
    model.load_state_dict(checkpoint(folder), strict=True, assign=True)
    return model.to(dtype)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    error = found.double() - expected.double()
    return float(error.square().mean().sqrt() / expected.double().square().mean().sqrt())


def largest_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())


def state_error(state: State, golden: dict[str, Tensor]) -> float:
    """Largest difference of any state value from the reference package's final state."""
    errors = []
    for i, layer in enumerate(state.layers):
        expected = {name: golden[f"state.{i}.{name}"] for name in ("att_x_prev", "ffn_x_prev")}
        errors += [largest_difference(layer["att_shift"][0], expected["att_x_prev"])]
        errors += [largest_difference(layer["ffn_shift"][0], expected["ffn_x_prev"])]
        if "wkv" in layer:
            matrix = golden[f"state.{i}.att_kv"]
            # RWKV-5 and 6 store [H, N_key, N_value].
            matrix = matrix if "7" in state.model else matrix.mT
            errors += [largest_difference(layer["wkv"][0], matrix)]
        else:  # the running maximum is not unique, mean and logarithm of the denominator are
            num, den, top = (layer[name][0] for name in ("num", "den", "max"))
            aa, bb, pp = (golden[f"state.{i}.{name}"] for name in ("aa", "bb", "pp"))
            errors += [largest_difference(num / den, aa / bb), largest_difference(den.log() + top, bb.log() + pp)]
    return max(errors)


@torch.no_grad()
def run_whole(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, State]:
    logits, state = model(tokens[None])
    return logits[0], state


@torch.no_grad()
def run_split(model: LanguageModel, tokens: Tensor, first: int = 7) -> tuple[Tensor, State]:
    """The first tokens in one call, the rest one by one with carried state."""
    logits, state = model(tokens[None, :first])
    rows = [logits]
    for t in range(first, len(tokens)):
        logits, state = model(tokens[None, t : t + 1], state)
        rows.append(logits)
    return torch.cat(rows, 1)[0], state


@all_models
def test_parameter_names_and_shapes_are_the_official_ones(folder: str) -> None:
    shapes = json.loads((GOLDEN / folder / "info.json").read_text())["shapes"]
    found = {name: list(parameter.shape) for name, parameter in golden_model(folder, torch.float32).named_parameters()}
    assert found == shapes


@all_models
@all_backends
@wide_types
@pytest.mark.parametrize("run", [run_whole, run_split])
def test_logits_and_final_state(folder: str, backend: str, dtype: torch.dtype, run: Run) -> None:
    golden = load_file(GOLDEN / folder / "io.safetensors")
    with use_backend(backend):
        logits, state = run(golden_model(folder, dtype), golden["tokens"])
    assert logits.dtype == dtype
    assert largest_difference(logits, golden["logits_f64"]) <= LOGIT_BARS[dtype]
    assert state_error(state, golden) <= STATE_BAR


@all_models
@all_backends
@pytest.mark.parametrize("dtype", HALF_BARS, ids=str)
@pytest.mark.parametrize("run", [run_whole, run_split])
def test_half_precision(folder: str, backend: str, dtype: torch.dtype, run: Run) -> None:
    golden = load_file(GOLDEN / folder / "io.safetensors")
    with use_backend(backend):
        logits, state = run(golden_model(folder, dtype), golden["tokens"])
    assert logits.dtype == dtype
    assert relative_rms(logits, golden["logits_f64"]) <= HALF_BARS[dtype]
    for layer in state.layers:
        for name, tensor in layer.items():
            assert tensor.dtype == (dtype if name.endswith("shift") else torch.float32)


@all_models
def test_autocast(folder: str) -> None:
    golden = load_file(GOLDEN / folder / "io.safetensors")
    model = golden_model(folder, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = run_whole(model, golden["tokens"])
        loss = next_token_loss(model(golden["tokens"][None]).logits, golden["tokens"][None])
    loss.backward()
    assert relative_rms(logits, golden["logits_f64"]) <= HALF_BARS[torch.bfloat16]
    assert all(tensor.dtype == torch.float32 for layer in state.layers for tensor in layer.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def train_step(
    folder: str, dtype: torch.dtype, backend: str
) -> tuple[LanguageModel, Tensor, Tensor, dict[str, Tensor]]:
    """Model with gradients, loss, logits, and the official numbers."""
    golden = load_file(GOLDEN / folder / "train_step.safetensors")
    model = golden_model(folder, dtype)
    with use_backend(backend):
        logits = model(golden["idx"]).logits
        loss = next_token_loss(logits, golden["targets"])
        loss.backward()
    return model, loss.detach(), logits.detach(), golden


def gradient_errors(parameter: nn.Parameter, name: str, golden: dict[str, Tensor]) -> tuple[float, float, float]:
    """Errors of norm, sum and first entries of a gradient, all relative to its official norm."""
    assert parameter.grad is not None, name
    gradient, norm = parameter.grad.double(), float(golden[f"gradnorm.{name}"])
    head = golden[f"gradhead.{name}"]
    return (
        abs(float(gradient.norm()) - norm) / norm,
        abs(float(gradient.sum()) - float(golden[f"gradsum.{name}"])) / norm,
        largest_difference(gradient.flatten()[: len(head)], head) / norm,
    )


@trained_models
@all_backends
@wide_types
def test_train_step(folder: str, backend: str, dtype: torch.dtype) -> None:
    model, loss, logits, golden = train_step(folder, dtype, backend)
    assert abs(float(loss) - float(golden["ce_loss"])) <= LOGIT_BARS[dtype]
    assert largest_difference(logits, golden["logits"]) <= LOGIT_BARS[dtype]
    bars = RWKV7_FLOAT32_BARS if folder == "rwkv7" and dtype == torch.float32 else GRADIENT_BARS[dtype]
    untrained = {name for name, _ in model.named_parameters() if f"gradnorm.{name}" not in golden}
    assert untrained == ({f"blocks.0.att.v{i}" for i in range(3)} if folder == "rwkv7" else set())
    for name, parameter in model.named_parameters():
        if name in untrained:
            assert parameter.grad is None, name
            continue
        errors = gradient_errors(parameter, name, golden)
        assert all(error <= bar for error, bar in zip(errors, bars, strict=True)), (name, errors)


@all_models
def test_gradient_checkpointing_changes_nothing(folder: str) -> None:
    tokens = load_file(GOLDEN / folder / "io.safetensors")["tokens"][None]
    gradients = []
    for checkpointing in (False, True):
        model = golden_model(folder, torch.float64)
        model.gradient_checkpointing = checkpointing
        next_token_loss(model(tokens).logits, tokens.roll(-1, 1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-14)
