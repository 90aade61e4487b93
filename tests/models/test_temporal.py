"""Temporal perspectives against the official code's vectors, against RWKV-4 once per perspective, and the upgrade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wkv
from tests import small, test_registry
from tests.test_registry import (  # noqa: F401  # run again here, with the `name` below
    run,
    test_gradients_reach_every_trained_parameter,
    test_half_precision_runs,
    test_padding_is_exact,
    test_resets_and_masks_together,
    test_save_and_load,
    test_step_by_step_equals_full,
)
from wkv.layers.meta import without_values
from wkv.models.rwkv4 import RWKV4
from wkv.models.temporal import Temporal, TemporalConfig, perspective_parameters, train_perspectives
from wkv.quantization import quantize_model
from wkv.training import head_loss, next_token_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "temporal_perspectives"
FORWARD, GRADIENT = 2e-5, 1e-4
SLOTS = {"att.xx": "att_shift", "att.aa": "num", "att.bb": "den", "att.pp": "max", "ffn.xx": "ffn_shift"}


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """The registered name, while the tests' models are of the variant that the registry's own run leaves out."""
    monkeypatch.setitem(small.OVERRIDES, "temporal", {"perspectives": 3, "ffn_pre": True})
    return "temporal"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "temporal_perspectives_lm.safetensors")


@pytest.fixture
def official(golden: dict[str, Tensor]) -> Temporal:
    """The model of the vectors."""
    sizes = json.loads((GOLDEN / "config.json").read_text())
    config = {"vocab_size": sizes["V"], "hidden_size": sizes["d"], "num_layers": sizes["L"]}
    model: Any = wkv.create_model("temporal", **config, perspectives=sizes["P"])
    model.load_state_dict({key[6:]: x for key, x in golden.items() if key.startswith("param.")})
    return model


def base(dtype: torch.dtype = torch.float32, **options: Any) -> RWKV4:
    """A small RWKV-4 with every parameter away from its initial values."""
    model: Any = test_registry.build("rwkv4", dtype, **options)
    return model


def test_logits_equal_the_official_ones(official: Temporal, golden: dict[str, Tensor]) -> None:
    logits = official(golden["input_ids"]).logits
    for reference in ("logits_parallel", "logits_rnn"):
        torch.testing.assert_close(logits, golden[reference], atol=FORWARD, rtol=0)


@torch.no_grad()
def test_steps_and_states_equal_the_official_ones(official: Temporal, golden: dict[str, Tensor]) -> None:
    state, steps = None, []
    for token in golden["input_ids"].split(1, 1):
        logits, state = official(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), golden["logits_rnn"], atol=FORWARD, rtol=0)
    for final in (state, official(golden["input_ids"]).state):
        for i, layer in enumerate(final.layers):
            scale = (layer["max"] - golden[f"state_b0.att.{i}.pp"]).exp()
            found = {**layer, "num": layer["num"] * scale, "den": layer["den"] * scale}
            for key, slot in SLOTS.items():
                side, own = key.split(".")
                if slot != "max":  # which normaliser an operator chooses is its own affair
                    expected = golden[f"state_b0.{side}.{i}.{own}"]
                    torch.testing.assert_close(found[slot][0], expected, atol=FORWARD, rtol=0)


def test_loss_and_gradients_equal_the_official_ones(official: Temporal, golden: dict[str, Tensor]) -> None:
    ids = golden["input_ids"]
    loss = next_token_loss(official(ids[:, :-1]).logits, ids[:, 1:], l2wrap=0.0)
    torch.testing.assert_close(loss, golden["loss"], atol=FORWARD, rtol=0)
    loss.backward()
    checked = 0
    for key, parameter in official.named_parameters():
        assert parameter.grad is not None
        whole, norm = golden.get(f"grad.{key}"), golden.get(f"gradnorm.{key}")
        found, expected = (parameter.grad, whole) if whole is not None else (parameter.grad.norm(), norm)
        assert expected is not None
        assert (found - expected).abs().max() <= GRADIENT * expected.abs().max(), key
        checked += 1
    assert checked == sum(key.startswith("grad") for key in golden)


def alone(model: Temporal, perspective: int) -> RWKV4:
    """The RWKV-4 that one perspective is."""
    sizes = {key: x for key, x in model.config.to_dict().items() if key in RWKV4_FIELDS}
    single: Any = wkv.create_model("rwkv4", **sizes)
    values = {key: x for key, x in model.state_dict().items() if key != "convert3.weight"}
    values = {key: x[perspective] if ".time_mix_" in key else x for key, x in values.items()}
    single.load_state_dict(values)
    return single.double()


RWKV4_FIELDS = {"vocab_size", "hidden_size", "num_layers", "attention_size", "ffn_size", "norm_eps"}


@torch.no_grad()
def test_equals_one_model_per_perspective_and_a_mixture_of_logits() -> None:
    """Folding the perspectives into the batch changes nothing, and neither does mixing before the head."""
    model: Any = test_registry.build("temporal", attention_size=48)
    ids, past = test_registry.tokens(), test_registry.tokens(seed=1)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    logits, state = model(ids, model(past).state, mask)
    singles = [alone(model, p) for p in range(4)]
    runs = [single.forward_features(ids, single(past).state, mask) for single in singles]
    hidden = torch.stack([h for h, _ in runs], 2)
    alpha = torch.softmax(hidden.mean(2) @ model.convert3.weight.T, -1)
    expected = (alpha[..., None] * model.head(hidden)).sum(2)
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-10, rtol=1e-10)
    for i, layer in enumerate(state.layers):
        for slot, value in layer.items():
            torch.testing.assert_close(value, torch.stack([s.layers[i][slot] for _, s in runs], 1))


@torch.no_grad()
def test_a_first_layer_without_time_mix() -> None:
    model: Any = test_registry.build("temporal", ffn_pre=True, perspectives=2)
    keys = {key.split(".", 2)[2] for key in model.state_dict() if key.startswith("blocks.0.") and ".ln" not in key}
    mix = {"time_mix_k", "time_mix_r", "key.weight", "receptance.weight", "value.weight"}
    assert keys == {f"{side}.{key}" for side in ("ffnPre", "ffn") for key in mix}
    assert model.init_state(1).layers[0].keys() == {"att_shift", "ffn_shift"}
    x = model.embed(test_registry.tokens())
    block, pre, z = model.blocks[0], model.blocks[0].ffnPre, model.blocks[0].ln1(x)
    before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
    xk, xr = (z * share.squeeze(1).repeat(2, 1, 1) + before * (1 - share.squeeze(1).repeat(2, 1, 1))
              for share in (pre.time_mix_k, pre.time_mix_r))  # fmt: skip
    x = x + torch.sigmoid(pre.receptance(xr)) * pre.value(torch.relu(pre.key(xk)) ** 2)
    state = model.init_state(2).layers[0]
    timeline = wkv.layers.timeline.Timeline()
    mixed, _ = block.ffn(block.ln2(x), {}, {"ffn_shift": state["ffn_shift"].flatten(0, 1)}, timeline)
    found, _, _ = block(model.embed(test_registry.tokens()), {}, state, timeline)
    torch.testing.assert_close(found, x + mixed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_exact_copies_compute_what_rwkv4_computes(dtype: torch.dtype) -> None:
    source, ids = base(dtype), test_registry.tokens()
    source.tuned_state = source(ids[:1]).state
    model = Temporal.from_base(source, init_jitter=0.0)
    expected = source(ids).logits
    bar = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype] * expected.abs().max()
    assert (model(ids).logits - expected).abs().max() <= bar
    assert model.tuned_state is not None
    own, wanted = model(ids[:1], model.tuned_state).logits, source(ids[:1], source.tuned_state).logits
    assert (own - wanted).abs().max() <= bar
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.num_parameters == source.num_parameters + 3 * 5 * 32 * 3 + 4 * 32
    assert not model.training
    model.head.weight.zero_()
    assert source.head.weight.any()


@torch.no_grad()
def test_noise_moves_the_logits_a_little() -> None:
    source, ids = base(), test_registry.tokens()
    model = Temporal.from_base(source, init_jitter=0.02)
    expected = source(ids).logits
    error = (model(ids).logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.05
    noise = model.blocks[1].att.time_mix_k - source.blocks[1].att.time_mix_k
    assert 0.01 < noise.std() < 0.03


def test_copies_teach_the_gate_nothing_and_noise_lets_it_learn() -> None:
    ids, gradients = test_registry.tokens(), []
    for jitter in (0.0, 0.02):
        model = Temporal.from_base(base(), init_jitter=jitter)
        next_token_loss(model(ids).logits, ids.roll(-1, 1)).backward()
        gradients.append(model.convert3.weight.grad.abs().max())
    assert gradients[0] <= 1e-6
    assert gradients[1] > 1e-5


def test_only_the_perspectives_train() -> None:
    source, ids = base(), test_registry.tokens()
    model = Temporal.from_base(source)
    share = train_perspectives(model)
    own = perspective_parameters(model)
    assert {key.split(".")[-1] for key in own if key != "convert3.weight"} == {f"time_mix_{x}" for x in "kvr"}
    assert share == pytest.approx((4 * 5 * 32 * 3 + 4 * 32) / model.num_parameters)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = next_token_loss(model(ids).logits, ids.roll(-1, 1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {key for key, x in model.state_dict().items() if not torch.equal(x, before[key])}
    assert moved == own.keys()


@pytest.mark.parametrize(("perspectives", "added"), [(2, 47_616), (3, 94_464), (4, 141_312)])
def test_parameters_added_to_the_published_size(perspectives: int, added: int) -> None:
    """The figures of 169M: 0.028, 0.056 and 0.083 %."""
    sizes = {"vocab_size": 50277, "hidden_size": 768, "num_layers": 12}
    with without_values():
        single = wkv.create_model("rwkv4", **sizes)
        several = Temporal(TemporalConfig(**sizes, perspectives=perspectives))
    assert several.num_parameters - single.num_parameters == added
    assert added / single.num_parameters == pytest.approx({2: 2.8e-4, 3: 5.6e-4, 4: 8.3e-4}[perspectives], rel=0.02)


def test_the_loss_of_the_head_in_chunks() -> None:
    model: Any = test_registry.build("temporal")
    ids = test_registry.tokens()
    hidden, _ = model.forward_features(ids)
    assert hidden.shape == (2, ids.shape[1], 32)
    found = head_loss(hidden, model.head, ids.roll(-1, 1), chunk=5)
    torch.testing.assert_close(found, next_token_loss(model(ids).logits, ids.roll(-1, 1)), atol=1e-12, rtol=1e-12)


def test_generation() -> None:
    model: Any = test_registry.build("temporal", torch.float32, vocab_size=256)
    found = wkv.generate(model, b"abc", max_tokens=4, sampler=wkv.Sampler(temperature=0.0), tokenizer="bytes")
    ids = list(b"abc")
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(found.tokens) == ids[3:]


def test_initial_values() -> None:
    """RWKV-4's for every perspective, up to the noise."""
    sizes = {"vocab_size": 20, "hidden_size": 64, "num_layers": 2}
    torch.manual_seed(0)
    single, exact = (
        wkv.create_model(kind, **sizes, **more) for kind, more in (("rwkv4", {}), ("temporal", {"init_jitter": 0.0}))
    )
    noisy: Any = wkv.create_model("temporal", **sizes)
    for key, value in single.named_parameters():
        if "time_mix_" in key:
            own = exact.get_parameter(key)
            assert torch.equal(own, value.expand(4, 1, 1, 64)), key
            assert 0.01 < (noisy.get_parameter(key) - value).std() < 0.03
    assert 0.008 < noisy.convert3.weight.std() < 0.012


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perspectives": 0}, "perspectives must be a positive integer"),
        ({"init_jitter": -0.1}, r"init_jitter must be a number in \[0, 1\]"),
        ({"ffn_pre": 1}, "ffn_pre must be true or false"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wkv.WkvError, match=message):
        test_registry.build("temporal", **options)


def test_bad_bases() -> None:
    for model_name in ("rwkv5", "temporal"):
        with pytest.raises(wkv.WkvError, match=f"from_base takes an RWKV-4, found '{model_name}'"):
            Temporal.from_base(test_registry.build(model_name))
    with pytest.raises(wkv.WkvError, match="from_base has no option 'ffn_pre'"):
        Temporal.from_base(base(), ffn_pre=True)
    with pytest.raises(wkv.WkvError, match="from_base has no option 'head_size'"):
        Temporal.from_base(base(), head_size=8)
    with pytest.raises(wkv.WkvError, match="quantised or carries an adapter"):
        Temporal.from_base(quantize_model(base(), 8))
    with pytest.raises(wkv.WkvError, match="only a temporal model has perspectives, found 'rwkv4'"):
        perspective_parameters(base())
