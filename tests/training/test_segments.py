"""Segmented training against one long pass: values, gradients, states, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wkv
from tests import small
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.training.losses import next_token_loss
from wkv.training.segments import SegmentResult, context_length_at, segmented_backward

V, B, T = 29, 3, 21
MODELS = wkv.list_models()

all_models = pytest.mark.parametrize("name", MODELS)


def build(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A small model with every parameter away from its special initial values."""
    torch.manual_seed(7)
    sizes = {"vocab_size": V, "hidden_size": 16, "num_layers": 2, "ffn_size": 24}
    model = wkv.create_model(name, **sizes, **small.options(name, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def batch(flags: str = "plain") -> dict[str, Any]:
    """Inputs, targets and flags; "everything" has masks that end inside segments and rows without a single target."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randint(V, (B, T), generator=generator) for _ in range(2))
    result = {"inputs": inputs, "targets": targets}
    if flags in ("packed", "everything"):
        result["reset"] = torch.rand(B, T, generator=generator) < 0.2
    if flags in ("ragged", "everything"):
        result["mask"] = torch.arange(T) < torch.tensor([[T], [9], [2]])
    if flags == "everything":
        result["loss_mask"] = torch.rand(B, T, generator=generator) < 0.4
        result["loss_mask"][:, 5:15] = False  # a segment without targets
    return result


def carried(model: LanguageModel, learns: bool = True) -> State:
    """A state that has read something, as leaves."""
    with torch.no_grad():
        _, state = model(torch.arange(2 * B).reshape(B, 2))
    return State(state.model, [{key: leaf(x, learns) for key, x in layer.items()} for layer in state.layers])


def leaf(x: Tensor, learns: bool = True) -> Tensor:
    """A copy that collects gradients if it can."""
    return x.detach().clone().requires_grad_(learns and x.is_floating_point())


def gradients(model: LanguageModel, state: State | None = None) -> list[Tensor]:
    """All gradients, which are then cleared."""
    leaves = [*model.parameters(), *(x for layer in state.layers for x in layer.values())] if state else [
        *model.parameters()
    ]  # fmt: skip
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def one_pass(model: LanguageModel, state: State | None, inputs: Tensor, targets: Tensor, **flags: Any) -> SegmentResult:
    """Loss, state and gradients of everything at once."""
    counts = flags.pop("loss_mask", torch.ones(B, T, dtype=torch.bool)) & flags.get("mask", torch.tensor(True))
    logits, final = model(inputs, state, **flags)
    there = flags.get("mask", torch.ones(B, T, dtype=torch.bool))  # the other tokens do not exist for L2Wrap either
    loss = next_token_loss(logits[there][None], targets[there][None], counts[there][None], l2wrap=0.3)
    loss.backward()
    return SegmentResult(loss.detach(), final.detach(), int(counts.sum()))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of all."""
    scale = max(float(x.abs().max()) for x in expected)
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)) / scale


def state_values(state: State) -> list[Tensor]:
    """What the state means: RWKV-4's numerator and denominator depend on its free normaliser."""
    values = []
    for layer in state.layers:
        if "max" in layer:
            scale = layer["max"].exp()
            layer = {**layer, "num": layer["num"] * scale, "den": layer["den"] * scale, "max": scale * 0}
        values += [layer[name] for name in sorted(layer)]
    return values


def assert_equal(found: SegmentResult, expected: SegmentResult, bar: float = 1e-12) -> None:
    assert error([found.loss], [expected.loss]) < bar
    assert error(state_values(found.state), state_values(expected.state)) < bar
    assert found.tokens == expected.tokens
    assert not any(x.requires_grad for x in (found.loss, *state_values(found.state)))


@all_models
@pytest.mark.parametrize(
    ("flags", "segment"), [("plain", 1), ("packed", 7), ("ragged", 5), ("everything", 5), ("everything", 50)]
)
def test_exact_equals_one_pass(name: str, flags: str, segment: int) -> None:
    model = build(name)
    state, data = carried(model), batch(flags)
    expected = one_pass(model, state, **data)
    wanted = gradients(model, state)
    found = segmented_backward(model, **data, segment=segment, mode="exact", state=state, l2wrap=0.3)
    assert_equal(found, expected)
    assert error(gradients(model, state), wanted) < 1e-11


@all_models
def test_exact_in_float32(name: str) -> None:
    model = build(name, torch.float32)
    state, data = carried(model), batch("everything")
    expected = one_pass(model, state, **data)
    wanted = gradients(model, state)
    found = segmented_backward(model, **data, segment=5, mode="exact", state=state, l2wrap=0.3)
    assert_equal(found, expected, 1e-5)
    assert error(gradients(model, state), wanted) < 1e-5


def detached(model: LanguageModel, state: State | None, segment: int, through: int, **data: Any) -> SegmentResult:
    """Truncated backpropagation written down: one graph, cut where gradients must not pass."""
    counts = data.pop("loss_mask", torch.ones(B, T, dtype=torch.bool)) & data.get("mask", torch.tensor(True))
    inputs, targets, logits = data.pop("inputs"), data.pop("targets"), []
    for i, start in enumerate(range(0, T, segment)):
        if state is not None and i and i % through == 0:
            state = state.detach()
        part = {key: x[:, start : start + segment] for key, x in data.items()}
        out = model(inputs[:, start : start + segment], state, **part)
        state = out.state
        logits.append(out.logits)
    there = data.get("mask", torch.ones(B, T, dtype=torch.bool))
    loss = next_token_loss(torch.cat(logits, 1)[there][None], targets[there][None], counts[there][None], l2wrap=0.3)
    loss.backward()
    assert state is not None
    return SegmentResult(loss.detach(), state.detach(), int(counts.sum()))


@all_models
@pytest.mark.parametrize(
    ("flags", "segment", "through"),
    [("plain", 5, 1), ("packed", 4, 2), ("ragged", 3, 5), ("everything", 5, 1), ("everything", 7, 9)],
)
def test_truncated_cuts_gradients_between_groups(name: str, flags: str, segment: int, through: int) -> None:
    model = build(name)
    state, data = carried(model), batch(flags)
    expected = detached(model, state, segment, through, **data)
    wanted = gradients(model, state)
    found = segmented_backward(model, **data, segment=segment, through=through, state=state, l2wrap=0.3)
    assert_equal(found, expected)
    assert error(gradients(model, state), wanted) < 1e-11
    assert_equal(found, one_pass(model, state, **data))


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_a_frozen_model_with_a_state_that_learns(mode: str) -> None:
    """State tuning: one state for all rows, expanded by the caller."""
    model = build("rwkv7")
    model.requires_grad_(False)
    layers = [{k: leaf(x[:1]) for k, x in layer.items()} for layer in carried(model, learns=False).layers]
    tuned = [x for layer in layers for x in layer.values()]

    def expanded() -> State:
        return State("rwkv7", [{key: x.expand(B, *x.shape[1:]) for key, x in layer.items()} for layer in layers])

    data = batch("ragged")
    through = 1 if mode == "truncated" else 1000
    expected = detached(model, expanded(), 5, through, **data)
    wanted = [x.grad.clone() for x in tuned if x.grad is not None]
    for x in tuned:
        x.grad = None
    assert_equal(segmented_backward(model, **data, segment=5, mode=mode, state=expanded(), l2wrap=0.3), expected)
    assert error([x.grad for x in tuned if x.grad is not None], wanted) < 1e-11
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_two_calls_with_a_carried_state_go_on(mode: str) -> None:
    model, data = build("rwkv6"), batch("packed")
    expected = segmented_backward(model, **data, segment=4, mode=mode)
    model.zero_grad()
    first = segmented_backward(model, **{key: x[:, :8] for key, x in data.items()}, segment=4, mode=mode)
    second = segmented_backward(
        model, **{key: x[:, 8:] for key, x in data.items()}, segment=4, mode=mode, state=first.state
    )
    total = (first.loss * first.tokens + second.loss * second.tokens) / (first.tokens + second.tokens)
    assert error([total], [expected.loss]) < 1e-12
    assert error(state_values(second.state), state_values(expected.state)) < 1e-12


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_gradients_are_added(mode: str) -> None:
    model, data = build("rwkv7"), batch()
    segmented_backward(model, **data, segment=5, mode=mode)
    once = [x.clone() for x in gradients(model)]
    for _ in range(2):
        segmented_backward(model, **data, segment=5, mode=mode)
    assert error(gradients(model), [2 * x for x in once]) < 1e-12


@all_models
@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_scaled_losses_scale_gradients(name: str, mode: str) -> None:
    model = build(name)
    state, data, values = carried(model), batch(), []

    def backward(loss: Tensor) -> None:
        values.append(loss.item())
        (loss * 1024).backward()

    segmented_backward(model, **data, segment=5, mode=mode, state=state)
    wanted = [1024 * x for x in gradients(model, state)]
    result = segmented_backward(model, **data, segment=5, mode=mode, state=state, backward=backward)
    assert error(gradients(model, state), wanted) < 1e-12
    assert len(values) == 5
    assert sum(values) == pytest.approx(result.loss.item(), rel=1e-12)


@all_models
def test_autocast_reaches_both_runs(name: str) -> None:
    model, data = build(name, torch.float32), batch("ragged")
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_pass(model, None, **data)
        wanted = gradients(model)
        found = segmented_backward(model, **data, segment=5, mode="exact", l2wrap=0.3)
    assert error([found.loss], [expected.loss]) < 1e-3
    found_gradients = gradients(model)
    assert error(found_gradients, wanted) < 3e-2
    full = one_pass(model, None, **data)  # without autocast: noticeably different, so it did reach them
    assert abs(full.loss - expected.loss) > 1e-5
    assert all(x.abs().sum() > 0 for x, y in zip(found_gradients, wanted, strict=True) if y.abs().sum() > 0)


def test_random_numbers_are_drawn_once() -> None:
    """Dropout: the second run of a segment repeats the first, and what follows goes on from there."""

    def run(do: Callable[[LanguageModel], Any]) -> tuple[list[Tensor], Tensor]:
        model = build("rwkv7")
        for block in model.blocks:
            block.ffn.register_forward_hook(lambda _, __, out: (torch.nn.functional.dropout(out[0], 0.5), out[1]))
        torch.manual_seed(5)
        do(model)
        return gradients(model), torch.rand(3)

    def one_graph(model: LanguageModel) -> None:
        detached(model, None, 5, 1000, **batch())

    wanted, then = run(one_graph)
    found, then_too = run(lambda model: segmented_backward(model, **batch(), segment=5, mode="exact", l2wrap=0.3))
    assert error(found, wanted) < 1e-11
    assert torch.equal(then, then_too)


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_gradient_checkpointing_goes_with_it(mode: str) -> None:
    model, data = build("rwkv7"), batch("everything")
    segmented_backward(model, **data, segment=5, mode=mode)
    wanted = gradients(model)
    model.gradient_checkpointing = True
    segmented_backward(model, **data, segment=5, mode=mode)
    assert error(gradients(model), wanted) < 1e-12


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_mapped_files(dtype: Any, tmp_path: Path) -> None:
    model, data = build("rwkv7"), batch()
    expected = segmented_backward(model, **data, segment=5)
    wanted = gradients(model)
    tokens = np.memmap(tmp_path / "tokens.bin", dtype, "w+", shape=(2, B, T))
    tokens[0], tokens[1] = data["inputs"], data["targets"]
    tokens.flush()
    mapped = np.memmap(tmp_path / "tokens.bin", dtype, "r", shape=(2, B, T))
    flags = {"mask": np.ones((B, T), bool), "reset": np.zeros((B, T), bool)}
    found = segmented_backward(model, mapped[0], mapped[1], segment=5, **flags)
    assert_equal(found, expected)
    assert error(gradients(model), wanted) < 1e-12


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_a_batch_without_targets_changes_nothing(mode: str) -> None:
    model, data = build("rwkv7"), batch()
    result = segmented_backward(model, **data, segment=5, mode=mode, loss_mask=torch.zeros(B, T, dtype=torch.bool))
    assert result.loss == 0
    assert result.tokens == 0
    assert all((x == 0).all() for x in gradients(model))


def test_errors_say_what_was_found() -> None:
    model, data = build("rwkv7"), batch()
    inputs, targets = data["inputs"], data["targets"]
    frozen = build("rwkv7")
    frozen.requires_grad_(False)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((model, inputs, targets), {"segment": 0}, "segment must be a positive integer, found 0"),
        ((model, inputs, targets), {"segment": 2.0}, "segment must be a positive integer, found 2.0"),
        ((model, inputs, targets), {"through": True}, "through must be a positive integer, found True"),
        ((model, inputs, targets), {"mode": "full"}, "mode 'full' is unknown; one of truncated, exact"),
        ((model, inputs, targets), {"mode": "exact", "through": 2}, "through=2 .* mode 'exact'"),
        ((model, inputs[0], targets), {}, r"inputs must be non-empty integers \[B, T\], found \[21\]"),
        ((model, inputs.tolist(), targets), {}, "inputs must be .* found list"),
        ((model, inputs, targets[:, 1:]), {}, r"targets must be integers \[3, 21\], found torch.int64 \[3, 20\]"),
        ((model, inputs.double(), targets), {}, r"inputs must be integers .*float64"),
        ((model, inputs, targets), {"mask": inputs}, r"mask must be bool \[3, 21\], found torch.int64"),
        ((model, inputs, targets), {"reset": [True]}, r"reset must be bool .*found list"),
        ((model, inputs, targets), {"loss_mask": torch.ones(B, 2).bool()}, r"loss_mask must be bool .*\[3, 2\]"),
        ((model, inputs, targets), {"state": model.init_state(2)}, "holds 2 sequences, the tokens are a batch of 3"),
        ((model, inputs, targets + V), {}, "is outside the vocabulary"),
        ((model, inputs + V, targets), {}, "is outside the vocabulary"),
        ((frozen, inputs, targets), {}, "nothing to train: neither"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(WkvError, match=message):
            segmented_backward(*arguments, **{"segment": 5, **options})
    with pytest.raises(WkvError, match="gradients are switched off"), torch.no_grad():
        segmented_backward(model, inputs, targets, segment=5)


def test_the_context_grows_in_a_straight_line() -> None:
    lengths = [context_length_at(step, 128, 1024, 100) for step in range(120)]
    assert lengths[0] == 128
    assert lengths[50] == 576
    assert lengths[100:] == [1024] * 20
    assert all(x % 16 == 0 for x in lengths)
    assert lengths == sorted(lengths)
    assert context_length_at(0, 100, 1001, 10) == 100
    assert context_length_at(10, 100, 1001, 10) == 1001
    assert context_length_at(0, 64, 512, 0) == 512
    for arguments in ((-1, 128, 1024, 100), (0, 2048, 1024, 100), (0, 128, 1024, -1), (0, 0, 1024, 10)):
        with pytest.raises(WkvError):
            context_length_at(*arguments)


MEASURE = """
import torch, wkv
from wkv.training.segments import segmented_backward

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
torch.manual_seed(0)
model = wkv.create_model("rwkv7", vocab_size=64, hidden_size=32, num_layers=1, head_size=32)
tokens = torch.randint(64, (1, 65537))
for length, segment in ((8, 4), (8192, 512), (65536, 512), (8192, 8192)):
    segmented_backward(model, tokens[:, :length], tokens[:, 1 : length + 1], segment=segment)
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_is_flat_in_length() -> None:
    """64k tokens take no more than 8k, whose graph in one piece takes several times as much (KiB)."""
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    before, short, long, whole = map(int, done.stdout.split())
    assert long < 1.1 * short
    assert whole - before > 3 * (long - before)
