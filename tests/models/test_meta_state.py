"""Meta-State against its equations token by token, against RWKV-7, and all its modes against every model's promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wkv
from tests import small, test_registry
from tests.test_registry import (  # noqa: F401  # run again here, with the `name` below
    run,
    test_a_fully_masked_segment_changes_nothing,
    test_chunked_and_reference_operators_agree,
    test_gradient_checkpointing_changes_nothing,
    test_half_precision_runs,
    test_masked_tokens_get_no_gradient_and_spread_none,
    test_padding_is_exact,
    test_resets_and_masks_together,
    test_save_and_load,
    test_step_by_step_equals_full,
)
from wkv.models.meta_state import MetaState, MetaStateConfig, consecutive
from wkv.models.rwkv7 import RWKV7
from wkv.quantization import quantize_model

V = 37
MODES: dict[str, dict[str, Any]] = {
    "own state": {"own_state": True, "meta_heads": [0, 2, 3]},
    "replace": {"mode": "replace"},
    "replace, own state": {"mode": "replace", "own_state": True},
    "pure": {"mode": "pure", "meta_heads": [0, 3]},
    "pure, own state": {"mode": "pure", "own_state": True},
}


@pytest.fixture(params=MODES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The registered name, while the tests' models are of another mode than residual."""
    monkeypatch.setitem(small.OVERRIDES, "meta_state", MODES[request.param])
    return "meta_state"


def build(model_name: str = "meta_state", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small model with every parameter away from its special initial values."""
    return test_registry.build(model_name, dtype, **options)


def tokens(seed: int = 0) -> Tensor:
    return test_registry.tokens(seed=seed)


def slowly(model: MetaState, ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence [T], from the equations, token by token and head by head."""
    config: Any = model.config
    size, heads, length = config.head_size, config.meta_heads, len(ids)
    x_TC = model.embed(ids[None])[0]
    carry: dict[str, Tensor] = {}
    for block, state in zip(model.blocks, model.init_state(1).layers, strict=True):
        timeline = wkv.layers.timeline.Timeline()
        mixed, carry, _ = block.att(block.ln1(x_TC)[None], carry, state, timeline)
        x_TC = x_TC + mixed[0]
        y_TC = block.ln2(x_TC)
        w, k, v, kk, a = (carry[key][0] for key in ("log_w", "k", "v", "kk", "iclr"))
        states = {h: torch.zeros(size, size).double() for h in heads}
        before_C, out = torch.zeros_like(y_TC[0]), []
        for t in range(length):
            y_C = y_TC[t]
            u_C = y_C + (before_C - y_C) * block.ffn.x_k.flatten() if config.shifts_tokens else y_C
            z_C = torch.zeros_like(y_C)
            for h in heads:
                own = slice(h * size, (h + 1) * size)
                write, value = (F.normalize(u_C[own], dim=0), y_C[own]) if config.own_state else (k[t, h], v[t, h])
                move = torch.diag(w[t, h].exp()) - torch.outer(kk[t, h], a[t, h] * kk[t, h])
                states[h] = states[h] @ move + torch.outer(value, write)
                z = states[h] @ (y_C[own] / y_C[own].norm())
                z_C[own] = (z - z.mean()) / (z.var(unbiased=False) + 64e-5).sqrt()
            if config.mode == "residual":
                z_C = u_C + block.ffn.meta_gate.flatten() * z_C
            if config.mode != "pure":
                z_C = block.ffn.value.weight @ torch.relu(block.ffn.key.weight @ z_C) ** 2
            out.append(z_C)
            before_C = y_C
        x_TC = x_TC + torch.stack(out)
    return model.head(model.ln_out(x_TC))


@pytest.mark.parametrize("options", [{}, {"meta_heads": [0, 1, 2, 3]}, *MODES.values()], ids=str)
@torch.no_grad()
def test_equals_the_equations(options: dict[str, Any]) -> None:
    model, ids = build(**options), tokens()[0, :12]
    torch.testing.assert_close(model(ids[None]).logits[0], slowly(model, ids), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("own_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_rwkv7_becomes_one(dtype: torch.dtype, own_state: bool) -> None:
    """With gates of zeros the logits are equal, to the last bit; one vector per layer is all that is new."""
    base, ids = build("rwkv7", dtype), tokens()
    base.tuned_state = base(ids[:1]).state.detach()
    model = MetaState.from_base(base, own_state=own_state)
    assert torch.equal(run(model, ids)[0], run(base, ids)[0])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.num_parameters == base.num_parameters + 3 * 32
    assert not model.training
    own = model(ids[:1], state=model.tuned_state).logits
    assert torch.equal(own, base(ids[:1], state=base.tuned_state).logits)
    model.blocks[0].ffn.key.weight.data.zero_()
    assert base.blocks[0].ffn.key.weight.any()


def test_the_gates_learn() -> None:
    """Only the channels of meta heads: elsewhere nothing is read."""
    model = MetaState.from_base(build("rwkv7"), meta_heads=[1, 3])
    model(tokens()).logits.square().sum().backward()
    for block in model.blocks:
        moved = block.ffn.meta_gate.grad.view(4, 8).abs().sum(-1) > 0
        assert moved.tolist() == [False, True, False, True]


def test_later_layers_do_not_see_the_vectors() -> None:
    model = build()
    state, timeline = model.init_state(2).layers[0], wkv.layers.timeline.Timeline()
    _, carry, _ = model.blocks[0](model.embed(tokens()), {}, state, timeline)
    assert carry.keys() == {"first_value"}


def test_meta_heads_are_kept() -> None:
    """A number of heads added later does not change which are read: the rule is applied once."""
    sizes = {"vocab_size": 9, "num_layers": 1, "hidden_size": 64, "head_size": 8}
    config = MetaStateConfig(**sizes)
    assert config.meta_heads == [6, 7]
    assert MetaStateConfig(**{**config.to_dict(), "attention_size": 128}).meta_heads == [6, 7]
    assert MetaStateConfig(**sizes, attention_size=128).meta_heads == [6, 7]
    assert MetaStateConfig(**sizes, attention_size=16).meta_heads == [1]
    assert MetaStateConfig(**{**sizes, "hidden_size": 15}, attention_size=32).meta_heads == [0]


def test_widths_that_are_no_multiple_of_the_heads() -> None:
    model = build(hidden_size=36, attention_size=48, meta_heads=[0, 3])
    expected = slowly(model, tokens()[0, :9])
    torch.testing.assert_close(model(tokens()[:1, :9]).logits[0], expected, atol=1e-10, rtol=1e-9)


def test_state_slots() -> None:
    for options, slots in (
        ({}, {"att_shift", "wkv", "ffn_shift"}),
        ({"mode": "pure"}, {"att_shift", "wkv"}),
        ({"mode": "pure", "own_state": True}, {"att_shift", "wkv", "ffn_shift", "meta"}),
    ):
        layer = build(**options).init_state(2).layers[0]
        assert layer.keys() == slots
        if "meta" in slots:
            assert layer["meta"].shape == (2, 1, 8, 8)


def test_parameters_of_each_mode() -> None:
    keys = {mode: {key for key in build(mode=mode).state_dict() if ".1.ffn." in key} for mode in ("replace", "pure")}
    assert keys["pure"] == set()
    assert keys["replace"] == {"blocks.1.ffn.key.weight", "blocks.1.ffn.value.weight"}


def test_a_scale_is_that_of_rwkv7() -> None:
    base = build("rwkv7", a_scale=2.0)
    model = MetaState.from_base(base)
    assert model.config.a_scale == 2
    assert torch.equal(run(model, tokens())[0], run(base, tokens())[0])


def test_runs_of_heads() -> None:
    assert consecutive([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mixed"}, "mode must be one of 'residual', 'replace', 'pure'"),
        ({"meta_heads": []}, "meta_heads must be one or more of the heads 0 to 3, found"),
        ({"meta_heads": [4]}, "meta_heads must be one or more of the heads 0 to 3, found"),
        ({"meta_heads": [1, 1]}, "meta_heads must be a list of different indices in rising order"),
        ({"own_state": 1}, "own_state must be true or false"),
        ({"head_size": 64, "attention_size": 64}, "head_size 64 is above hidden_size 32"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wkv.WkvError, match=message):
        build(**options)


def test_bad_bases() -> None:
    for model_name in ("rwkv7a", "rwkv6", "meta_state"):
        with pytest.raises(wkv.WkvError, match=f"from_base takes an RWKV-7, found '{model_name}'"):
            MetaState.from_base(build(model_name))
    base: RWKV7 = build("rwkv7")
    with pytest.raises(wkv.WkvError, match="from_base has no option 'mode'"):
        MetaState.from_base(base, mode="replace")
    with pytest.raises(wkv.WkvError, match="quantised or carries an adapter"):
        MetaState.from_base(quantize_model(base.float(), 8))
