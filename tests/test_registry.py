"""Written once, run for every registered model: the promises every model keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import wkv
from tests import small
from wkv.checkpoints.official import has_official_layout
from wkv.layers.language_model import LanguageModel
from wkv.training.losses import next_token_loss

MODELS = wkv.list_models()
V, T = 37, 23
# Parameters that exist in the official files and never take part in a forward pass.
UNUSED = {"rwkv7": {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}}
UNUSED["rwkv7a"] = UNUSED["meta_state"] = UNUSED["rwkv7"]


def build(name: str, dtype: torch.dtype = torch.float64, **overrides: object) -> LanguageModel:
    """A small model with every parameter away from its special initial values."""
    torch.manual_seed(7)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_layers": 3, "ffn_size": 40, **small.options(name, 8), **overrides}
    model = wkv.create_model(name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_states_equal(actual: wkv.State, expected: wkv.State, atol: float = 1e-9) -> None:
    """Equal up to RWKV-4's free normaliser: numerator and denominator are compared under one running maximum."""
    assert actual.model == expected.model
    for found, wanted in zip(actual.layers, expected.layers, strict=True):
        if "max" in wanted:
            scale = (found["max"] - wanted["max"]).exp()
            found = {**found, "num": found["num"] * scale, "den": found["den"] * scale, "max": wanted["max"]}
        for key in wanted:
            torch.testing.assert_close(*aligned(key, found[key], wanted[key]), atol=atol, rtol=1e-9)


def aligned(key: str, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one length if they are caches: a row of a batch may have zeros before its first token."""
    if key.endswith("cache"):
        longest = max(found.shape[1], wanted.shape[1])
        found, wanted = (torch.nn.functional.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0)) for x in (found, wanted))
    return found, wanted


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def run(model: LanguageModel, ids: Tensor, **kwargs: object) -> tuple[Tensor, wkv.State]:
    return model(ids, **kwargs)


def test_chunked_and_reference_operators_agree(name: str) -> None:
    model, ids = build(name), tokens(length=67)
    with wkv.ops.use_backend("reference"):
        expected, state = run(model, ids)
    with wkv.ops.use_backend("chunked"):
        actual, chunked_state = run(model, ids)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    assert_states_equal(chunked_state, state)


def test_step_by_step_equals_full(name: str) -> None:
    model, ids = build(name), tokens()
    expected, final = run(model, ids)
    state, steps = model.init_state(len(ids)), []
    for t in range(T):
        logits, state = run(model, ids[:, t : t + 1], state=state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-9, rtol=1e-9)
    assert_states_equal(state, final)


def test_split_anywhere_equals_full(name: str) -> None:
    model, ids = build(name), tokens()
    expected, final = run(model, ids)
    for cut in range(1, T):
        first, state = run(model, ids[:, :cut])
        second, state = run(model, ids[:, cut:], state=state)
        torch.testing.assert_close(torch.cat([first, second], 1), expected, atol=1e-9, rtol=1e-9)
        assert_states_equal(state, final)


def test_gradients_flow_through_a_carried_state(name: str) -> None:
    model, ids = build(name), tokens()
    targets = tokens(seed=1)
    next_token_loss(model(ids).logits, targets).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    first = model(ids[:, :9])
    second = model(ids[:, 9:], state=first.state)
    next_token_loss(torch.cat([first.logits, second.logits], 1), targets).backward()
    for key, parameter in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(parameter.grad, expected[key], atol=1e-9, rtol=1e-7)


def test_rows_are_independent(name: str) -> None:
    model, ids = build(name), tokens(batch=4)
    expected, state = run(model, ids)
    for row in range(4):
        alone, alone_state = run(model, ids[row : row + 1])
        torch.testing.assert_close(alone[0], expected[row], atol=1e-9, rtol=1e-9)
        assert_states_equal(alone_state, state.select(row))


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_is_exact(name: str, side: str) -> None:
    model, ids, lengths = build(name), tokens(batch=3), (T, 14, 1)
    mask = torch.zeros(3, T, dtype=torch.bool)
    for row, length in enumerate(lengths):
        if side == "inside":
            mask[row, torch.randperm(T, generator=torch.Generator().manual_seed(row))[:length]] = True
        else:
            mask[row, slice(T - length, None) if side == "left" else slice(length)] = True
    logits, state = run(model, ids, mask=mask)
    for row in range(3):
        expected, alone = run(model, ids[row][mask[row]][None])
        torch.testing.assert_close(logits[row][mask[row]], expected[0], atol=1e-9, rtol=1e-9)
        assert_states_equal(state.select(row), alone)


def test_a_fully_masked_segment_changes_nothing(name: str) -> None:
    model, ids = build(name), tokens()
    _, state = run(model, ids)
    logits, after = run(model, ids, state=state, mask=torch.zeros(2, T, dtype=torch.bool))
    assert logits.isfinite().all()
    assert_states_equal(after, state)


def test_masked_tokens_get_no_gradient_and_spread_none(name: str) -> None:
    model, ids = build(name), tokens(batch=1)
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, [0, 5, 6, T - 1]] = False
    targets = tokens(batch=1, seed=1)
    next_token_loss(model(ids, mask=mask).logits, targets, mask, l2wrap=0.0).backward()
    masked = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    next_token_loss(model(ids[mask][None]).logits, targets[mask][None], l2wrap=0.0).backward()
    for key, parameter in model.named_parameters():
        if key in masked and parameter.grad is not None:
            torch.testing.assert_close(masked[key], parameter.grad, atol=1e-9, rtol=1e-7)


def test_packed_documents_equal_separate_runs(name: str) -> None:
    model, ids = build(name), tokens()
    starts = [0, 1, 6, 17, T]
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, starts[1:-1]] = True
    logits, state = run(model, ids, reset=reset)
    for begin, end in itertools.pairwise(starts):
        expected, last = run(model, ids[:, begin:end])
        torch.testing.assert_close(logits[:, begin:end], expected, atol=1e-9, rtol=1e-9)
    assert_states_equal(state, last)


def test_a_reset_forgets_the_carried_state(name: str) -> None:
    model, ids = build(name), tokens()
    _, carried = run(model, tokens(seed=5))
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, 0] = True
    logits, state = run(model, ids, state=carried, reset=reset)
    expected, final = run(model, ids)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert_states_equal(state, final)


def test_resets_and_masks_together(name: str) -> None:
    model, ids = build(name), tokens()
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, T, generator=generator) < 0.7
    reset = torch.rand(2, T, generator=generator) < 0.2
    logits, state = run(model, ids, mask=mask, reset=reset)
    for row in range(2):
        kept = mask[row]
        expected, alone = run(model, ids[row][kept][None], reset=reset[row][kept][None])
        torch.testing.assert_close(logits[row][kept], expected[0], atol=1e-9, rtol=1e-9)
        assert_states_equal(state.select(row), alone)


def test_gradients_reach_every_trained_parameter(name: str) -> None:
    model = build(name)
    ids = torch.arange(V * 2).remainder(V).reshape(2, V)
    next_token_loss(model(ids).logits, ids.roll(-1, 1)).backward()
    dead = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert dead == UNUSED.get(name, set())


def test_official_initial_values_train(name: str) -> None:
    """From the official initial values one optimiser step lowers the loss."""
    torch.manual_seed(0)
    model = wkv.create_model(name, vocab_size=V, hidden_size=32, num_layers=3, **small.options(name, 16))
    ids = tokens(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-18)
    losses = []
    for _ in range(2):
        loss = next_token_loss(model(ids[:, :-1]).logits, ids[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model, ids, targets = build(name), tokens(), tokens(seed=1)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        next_token_loss(model(ids).logits, targets).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(name: str, dtype: torch.dtype) -> None:
    model, ids = build(name, dtype), tokens()
    logits, state = run(model, ids)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    wide = {key for layer in state.layers for key, x in layer.items() if x.dtype == torch.float32}
    assert wide == {key for layer in state.layers for key in layer if not key.endswith(("shift", "cache", "count"))}
    expected, _ = run(build(name, dtype).double(), ids)
    error = (logits.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (1e-1 if dtype == torch.bfloat16 else 1e-2)  # the golden tests hold the strict bars


def test_bfloat16_trains(name: str) -> None:
    model, ids = build(name, torch.bfloat16), tokens()
    next_token_loss(model(ids).logits, tokens(seed=1)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast_runs(name: str) -> None:
    model, ids = build(name, torch.float32), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
        loss = next_token_loss(out.logits, tokens(seed=1))
    loss.backward()
    expected, _ = run(model, ids)
    error = (out.logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 1e-1
    kept = {key: x.dtype for layer in out.state.layers for key, x in layer.items() if x.is_floating_point()}
    assert all(dtype == torch.float32 for key, dtype in kept.items() if not key.endswith("shift"))


@pytest.mark.parametrize(("form", "file"), [("wkv", "m.safetensors"), ("official", "m.pth"),
                                            ("official", "m.safetensors")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(name: str, form: str, file: str, dtype: torch.dtype, tmp_path) -> None:
    model, ids = build(name, dtype), tokens()
    if form == "official" and not has_official_layout(name):
        with pytest.raises(wkv.WkvError, match="format 'official' is not written for"):
            wkv.save_model(model, tmp_path / file, format=form)
        assert not list(tmp_path.iterdir())
        return
    wkv.save_model(model, tmp_path / file, format=form)
    loaded = wkv.load_model(tmp_path / file)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    for (key, wanted), (other, found) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(wanted, found), key
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])


def test_attention_width_may_differ_from_hidden_size(name: str) -> None:
    model, ids = build(name, attention_size=48), tokens()
    expected, final = run(model, ids)
    state = None
    for t in range(T):
        logits, state = run(model, ids[:, t : t + 1], state=state)
        torch.testing.assert_close(logits[:, 0], expected[:, t], atol=1e-9, rtol=1e-9)
    assert_states_equal(state, final)


def test_a_single_layer_and_a_single_token(name: str) -> None:
    model = build(name, num_layers=1)
    logits, _ = run(model, tokens(batch=1, length=1))
    assert logits.shape == (1, 1, V)
    assert logits.isfinite().all()
