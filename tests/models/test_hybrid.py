"""Hybrids against their equations token by token, against their bases, and variants against every model's promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import wkv
from tests import small, test_registry
from tests.test_registry import (  # noqa: F401  # run again here, with the `name` below
    run,
    test_a_fully_masked_segment_changes_nothing,
    test_gradients_flow_through_a_carried_state,
    test_gradients_reach_every_trained_parameter,
    test_half_precision_runs,
    test_masked_tokens_get_no_gradient_and_spread_none,
    test_padding_is_exact,
    test_resets_and_masks_together,
    test_save_and_load,
    test_step_by_step_equals_full,
)
from wkv.models.hybrid import Hybrid, added_parameters, added_share, train_added
from wkv.models.hybrid_config import FUSIONS, HybridConfig
from wkv.quantization import quantize_model
from wkv.training.losses import next_token_loss
from wkv.upgrade import upgrade_model

VARIANTS: dict[str, dict[str, Any]] = {
    "transformer, window": {"state_heads": 3, "key_value_heads": 2, "branch_norm": True, "window": 4, "a_scale": 2.0},
    "transformer, gated": {"fusion": "gated", "positions": "none", "layers": [0], "state_window": 7},
    "rwkv7, additive": {
        "base": "rwkv7", "fusion": "additive", "attention_heads": 2, "key_value_heads": 1, "state_window": 6,
    },
    "rwkv7, mean": {"base": "rwkv7", "fusion": "mean", "positions": "rotary", "attention_heads": 1, "window": 5},
}  # fmt: skip
SHARED = [{"fusion": fusion} for fusion in FUSIONS]


@pytest.fixture(params=VARIANTS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The registered name, while the tests' models are of other variants than in the registry's own run."""
    monkeypatch.setitem(small.OVERRIDES, "hybrid", VARIANTS[request.param])
    if "rwkv7" in request.param:
        monkeypatch.setitem(test_registry.UNUSED, "hybrid", test_registry.UNUSED["rwkv7"])
    return "hybrid"


@pytest.fixture(autouse=True)
def plain_options(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The other tests here say themselves what they need."""
    if "name" not in request.fixturenames:
        monkeypatch.setitem(small.OVERRIDES, "hybrid", {})


def build(model_name: str = "hybrid", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small model with every parameter away from its special initial values."""
    return test_registry.build(model_name, dtype, **options)


tokens = test_registry.tokens


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt()


def turned(x_N: Tensor, place: int, model: Hybrid) -> Tensor:
    """Rotary positions, as products of complex numbers."""
    config: Any = model.config
    if config.positions == "none":
        return x_N
    half = len(x_N) // 2
    angle = place * 10000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x_N[:half], x_N[half:]) * torch.polar(torch.ones(half).double(), angle)
    return torch.cat([z.real, z.imag])


def found(q_N: Tensor, lines: list[tuple[Tensor, Tensor, float | Tensor]]) -> Tensor:
    """Softmax attention to keys and values whose scores have a bias."""
    scores = torch.stack([q_N @ k / math.sqrt(len(q_N)) + bias for k, _, bias in lines])
    return torch.softmax(scores, 0) @ torch.stack([v for _, v, _ in lines])


def combined(middle: Any, j: int, a_N: Tensor, y_N: Tensor, look: Any, q_N: Tensor) -> Tensor:
    """One middle head."""
    both = torch.cat([a_N, y_N])
    if middle.fusion == "concat":
        return both @ middle.join[j]
    if middle.fusion == "additive":
        return look(q_N + y_N @ middle.steer[j])
    if middle.fusion == "additive_output":
        return a_N + middle.amount[j] * (y_N @ middle.steer[j])
    if middle.fusion == "gated":
        g = torch.sigmoid(both @ middle.join[j] + middle.bias[j])
        return g * a_N + (1 - g) * rms(y_N)
    return (rms(a_N) * middle.attention_scale[j] + rms(y_N) * middle.state_scale[j]) / 2


def meetings(model: Hybrid, att: Any, qkv: Any, vectors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What attention heads, state heads and middle heads find at every token, head by head; each [T, ...]."""
    config: Any = model.config
    (q, k, v), (r, log_w, key, value, kk, iclr) = ([x[0] for x in group] for group in (qkv, vectors))
    meeting, size, groups = att.meeting, config.head_size, config.attention_heads // config.key_value_heads
    states = torch.zeros(config.state_heads, size, size).double()
    lines: list[list[Any]] = [[] for _ in range(config.attention_heads)]
    heads: tuple[list[Tensor], ...] = ([], [], [])
    for t in range(len(q)):
        for e in range(config.state_heads):
            move = torch.diag(log_w[t, e].exp()) - torch.outer(kk[t, e], iclr[t, e] * kk[t, e])
            states[e] = states[e] @ move + torch.outer(value[t, e], key[t, e])
        y = torch.stack([states[e] @ r[t, e] for e in range(config.state_heads)]) / math.sqrt(size)
        a, m = [], []
        for h, line in enumerate(lines):
            line.append((turned(k[t, h // groups], t, model), v[t, h // groups], 0.0))

            def look(query: Tensor, line: Any = line, t: int = t) -> Tensor:
                return found(turned(query, t, model), line)

            a.append(look(q[t, h]))
            if h < config.middle_heads:
                m.append(combined(meeting.middle, h, a[h], y[h], look, q[t, h]))
        if config.state_window and (t + 1) % config.state_window == 0:
            for h, line in enumerate(lines):
                g = h // groups
                S = states[g % config.state_heads]
                for u, w in zip(meeting.tokens.key_probe[:, g], meeting.tokens.value_probe[:, g], strict=True):
                    line.append((rms(u @ S), rms(S @ w), meeting.tokens.bias[h]))
        for place, what in zip(heads, (torch.stack(a), y, torch.stack(m)), strict=True):
            place.append(what)
    a, y, m = (torch.stack(x).flatten(1) for x in heads)
    return a, y, m


def slowly(model: Hybrid, ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence [T], from the equations."""
    config: Any = model.config
    x, carry, timeline = model.embed(ids[None]), {}, wkv.layers.timeline.Timeline()
    for block, state in zip(model.blocks, model.init_state(1).layers, strict=True):
        att, z = block.att, block.ln1(x)
        if config.base == "transformer":
            qkv = [p(z).unflatten(-1, (-1, config.head_size)) for p in (att.query, att.key, att.value)]
            a, y, m = meetings(model, att, qkv, att.state_heads.vectors(z))
            out = att.output(a) + att.state_heads.output(att.state_heads.norm(y))
        else:
            infused = att.infused
            before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
            vectors, gate, carry = att.vectors(z, before, carry)
            q, k, v = (p(z).unflatten(-1, (-1, config.head_size)) for p in (infused.query, infused.key, infused.value))
            a, y, m = meetings(model, att, (infused.q_norm(q), infused.k_norm(k), v), vectors)
            read = att.ln_x(y.unflatten(-1, (-1, config.head_size))[None] * math.sqrt(config.head_size))
            bonus = (vectors.r * vectors.k * att.r_k).sum(-1, keepdim=True) * vectors.v
            out = att.output((read + bonus.flatten(-2)) * gate)
            out = out + infused.output(a * torch.sigmoid(infused.g0 + z @ infused.g1 @ infused.g2))
        x = x + out + att.meeting.middle.output(att.meeting.middle.norm(m))
        x = x + block.ffn(block.ln2(x), carry, state, timeline)[0]
    logits: Tensor = model.head(model.ln_out(x))[0]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("options", SHARED, ids=str)
@pytest.mark.parametrize("base", ["transformer", "rwkv7"])
def test_equals_the_equations(base: str, options: dict[str, Any]) -> None:
    heads = {"state_heads": 3, "key_value_heads": 2} if base == "transformer" else {"attention_heads": 2}
    sizes = {"state_window": 4, "probes": 2, "num_layers": 2, "a_scale": 1.5, "branch_norm": base == "transformer"}
    model, ids = build(base=base, **options, **heads, **sizes), tokens()[0, :11]
    torch.testing.assert_close(model(ids[None]).logits[0], slowly(model, ids), atol=1e-10, rtol=1e-9)


def of_base(base: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(base, dtype, **({"key_value_heads": 2} if base == "transformer" else {}))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((torch.float32, options) for options in SHARED),
        (torch.float32, {"middle_heads": 0}),
        (torch.bfloat16, {"layers": [1], "branch_norm": True}),
        (torch.float64, {"fusion": "gated"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["transformer", "rwkv7"])
def test_a_base_becomes_one(base: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The logits are equal, to the last bit: padded, and from a state, too."""
    old, ids = of_base(base, dtype), tokens()
    model = Hybrid.from_base(old, **options)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    (wanted, before), (logits, state) = run(old, ids, mask=mask), run(model, ids, mask=mask)
    assert torch.equal(logits[mask], wanted[mask])
    assert torch.equal(run(model, ids, state=state)[0], run(old, ids, state=before)[0])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    assert model.num_parameters - sum(p.numel() for p in added_parameters(model).values()) == old.num_parameters
    model.blocks[0].ffn.get_parameter("key.weight" if base == "rwkv7" else "up.weight").data.zero_()
    assert not torch.equal(run(model, ids)[0], wanted)
    assert torch.equal(run(old, ids, mask=mask)[0], wanted)


def test_window_and_tied_head_are_kept() -> None:
    old = build("transformer", torch.float32, window=4, tied_head=True)
    model = upgrade_model(old, "hybrid", state_heads=1)
    assert torch.equal(run(model, tokens())[0], run(old, tokens())[0])
    assert "head.weight" not in dict(model.named_parameters())


def test_a_tuned_state_is_kept() -> None:
    old, ids = of_base("rwkv7"), tokens(batch=1)
    old.tuned_state = old(ids).state.detach()
    model = Hybrid.from_base(old, state_window=4)
    own = run(model, ids, state=model.tuned_state)[0]
    torch.testing.assert_close(own, run(old, ids, state=old.tuned_state)[0], atol=1e-5, rtol=1e-5)


def test_state_tokens_are_nearly_unseen_at_first() -> None:
    """Exactly unseen if their bias is far below all scores; nearly with the initial one; plainly without."""
    old, ids = of_base("transformer", torch.float64), tokens(length=40)
    model, distance = Hybrid.from_base(old, state_window=4, fusion="concat"), []
    for bias in (-1e4, -8.0, 0.0):
        for block in model.blocks:
            torch.nn.init.constant_(block.att.meeting.tokens.bias, bias)
        distance.append((run(model, ids)[0] - run(old, ids)[0]).square().mean().sqrt() / run(old, ids)[0].std())
    assert distance[0] < 1e-12
    assert 1e-12 < distance[1] < 1e-2 < distance[2]
    silent = Hybrid.from_base(of_base("rwkv7"), state_window=4)
    gap = run(silent, ids)[0] - run(of_base("rwkv7"), ids)[0]
    assert gap.abs().max() <= 1e-6


def test_states_count_chunks_and_not_tokens() -> None:
    """Two state tokens after every 5 tokens stand in the cache, of each row as many as it has chunks."""
    model = build(state_window=5, probes=2, key_value_heads=2)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:] = False
    _, state = run(model, tokens(length=13), mask=mask)
    assert state.layers[0]["count"].tolist() == [13 + 4, 9 + 2]
    assert state.layers[0]["key_cache"].shape == (2, 17, 2, 9)
    assert (state.layers[0]["key_cache"][..., -1] == 1).sum(1)[:, 0].tolist() == [4, 2]


@pytest.mark.parametrize("options", [*SHARED[:-1], {"fusion": "mean", "branch_norm": True, "state_window": 5}], ids=str)
@pytest.mark.parametrize("base", ["transformer", "rwkv7"])
def test_everything_added_learns(base: str, options: dict[str, Any]) -> None:
    """The first step moves what is zero, after the second everything has a gradient."""
    model = Hybrid.from_base(of_base(base), **options)
    ids = torch.arange(74).remainder(37).reshape(2, 37)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        next_token_loss(model(ids).logits, ids.roll(-1, 1)).backward()
        optimizer.step()
    silent = {key for key, p in added_parameters(model).items() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == set()


def test_what_is_added_is_counted() -> None:
    config = {"vocab_size": 9, "hidden_size": 32, "num_layers": 2, "head_size": 8, "state_heads": 2}
    plain = wkv.create_model("transformer", vocab_size=9, hidden_size=32, num_layers=2, head_size=8)
    model: Any = wkv.create_model("hybrid", **config)
    ranks = 2 * (32 * 32 + 32 * 16 + 16)
    expected = 2 * (4 * 32 * 16 + ranks + 2 * 16 * 8 + 16 * 32)  # r, k, v, W_y; w, a; U; W_m
    assert sum(p.numel() for p in added_parameters(model).values()) == expected
    assert model.num_parameters == plain.num_parameters + expected
    assert added_share(model) == pytest.approx(expected / plain.num_parameters)
    assert train_added(model) == pytest.approx(expected / model.num_parameters)
    assert not model.emb.weight.requires_grad
    assert model.blocks[1].att.meeting.middle.join.requires_grad
    with pytest.raises(wkv.WkvError, match="only a hybrid has added parts, found 'transformer'"):
        added_parameters(plain)


def test_the_base_trains_as_it_would_alone() -> None:
    """Initial values of the base's part come from the same rules."""
    model: Any = wkv.create_model("hybrid", vocab_size=99, hidden_size=64, num_layers=2, head_size=16)
    for matrix, std in ((model.emb, 0.02), (model.head, 0.02), (model.blocks[0].att.output, 0.01)):
        assert matrix.weight.std().item() == pytest.approx(std, rel=0.1)
    assert isinstance(model.ln_out, wkv.layers.norms.RMSNorm)
    assert (
        model.config.ffn_size
        == wkv.registry.create_config("transformer", vocab_size=99, hidden_size=64, num_layers=2).ffn_size
    )
    other: Any = wkv.create_model("hybrid", base="rwkv7", vocab_size=99, hidden_size=64, num_layers=2, head_size=16)
    assert other.config.ffn_size == 256
    assert (other.config.attention_heads, other.config.positions) == (4, "none")
    assert other.emb.weight.abs().max() < 2e-4
    assert not other.blocks[1].att.output.weight.any()
    assert HybridConfig(**other.config.to_dict()) == other.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "rwkv6"}, "base must be one of 'transformer', 'rwkv7', found 'rwkv6'"),
        ({"fusion": "sum"}, "fusion must be one of 'concat', 'additive', 'additive_output', 'gated', 'mean'"),
        ({"state_heads": 2, "middle_heads": 3}, "middle_heads must be at most 2, the fewer of both kinds, found 3"),
        ({"attention_heads": 3}, "attention_heads of a transformer are its 4 heads, found 3"),
        ({"base": "rwkv7", "state_heads": 2}, "state_heads of a rwkv7 are its 4 heads, found 2"),
        ({"key_value_heads": 3}, "key_value_heads 3 does not divide the 4 heads"),
        ({"layers": [3]}, r"layers \[3\] are not all below num_layers 3"),
        ({"state_window": 4, "window": 8}, "state_window needs attention that sees all tokens; leave window out"),
        ({"state_window": -1}, "state_window must be an integer of at least 0, found -1"),
        ({"probes": 0}, "probes must be a positive integer, found 0"),
        ({"head_size": 1, "state_heads": 1}, "rotary positions turn pairs of channels, found head_size 1"),
        ({"branch_norm": 1}, "branch_norm must be true or false, found 1"),
        ({"a_scale": 3.0}, r"a_scale must be a number in \(0, 2\]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wkv.WkvError, match=message):
        build(**options)


def test_bad_bases() -> None:
    for other in ("rwkv7a", "rwkv6", "hybrid"):
        with pytest.raises(wkv.WkvError, match=f"from_base takes a transformer or an RWKV-7, found '{other}'"):
            Hybrid.from_base(build(other))
    old = of_base("transformer")
    for option in ({"window": 3}, {"base": "rwkv7"}, {"tied_head": True}):
        with pytest.raises(wkv.WkvError, match=f"from_base has no option '{next(iter(option))}'"):
            Hybrid.from_base(old, **option)
    old.tuned_state = old(tokens(batch=1)).state.detach()
    assert Hybrid.from_base(old).tuned_state.layers[0]["count"].tolist() == [23]
    with pytest.raises(wkv.WkvError, match="cannot have state tokens"):
        Hybrid.from_base(old, state_window=4)
    with pytest.raises(wkv.WkvError, match="quantised or carries an adapter"):
        Hybrid.from_base(quantize_model(of_base("rwkv7"), 8))
