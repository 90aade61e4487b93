"""RRWKV against its equations token by token, against RWKV-4, and all its variants against every model's promises."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import wkv
from tests import small, test_registry
from tests.test_registry import (  # noqa: F401  # run again here, with the `name` below
    assert_states_equal,
    run,
    test_a_fully_masked_segment_changes_nothing,
    test_a_reset_forgets_the_carried_state,
    test_chunked_and_reference_operators_agree,
    test_gradients_flow_through_a_carried_state,
    test_gradients_reach_every_trained_parameter,
    test_half_precision_runs,
    test_masked_tokens_get_no_gradient_and_spread_none,
    test_padding_is_exact,
    test_resets_and_masks_together,
    test_save_and_load,
    test_step_by_step_equals_full,
)
from wkv.models.rrwkv import RRWKV, RRWKVConfig
from wkv.models.rwkv4 import RWKV4
from wkv.quantization import quantize_model
from wkv.training import next_token_loss

AGGREGATES, PLACES = ("last", "mean", "wkv"), ("time", "channel", "both")
VARIANTS: dict[str, dict[str, Any]] = {
    "last": {"aggregate": "last", "medium_period": 3},
    "mean, channel": {"aggregate": "mean", "medium_period": 5, "where": "channel"},
    "wkv, time": {"where": "time", "medium_period": 1},
}


@pytest.fixture(params=VARIANTS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The registered name, while the tests' models are variants that the registry's own run leaves out."""
    monkeypatch.setitem(small.OVERRIDES, "rrwkv", VARIANTS[request.param])
    return "rrwkv"


def build(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small model with every parameter away from its special initial values."""
    return test_registry.build("rrwkv", dtype, **options)


def base(dtype: torch.dtype = torch.float32) -> RWKV4:
    """A small RWKV-4 of that kind."""
    model: Any = test_registry.build("rwkv4", dtype)
    return model


def tokens(length: int = 23, seed: int = 0) -> Tensor:
    return test_registry.tokens(length=length, seed=seed)


def readings(mediums: Any, z_TC: Tensor) -> Tensor:
    """What every token of one sequence reads, from the equations: M [T, C]."""
    period, out = mediums.period, []
    made: list[Tensor] = []
    for t in range(len(z_TC)):
        if t >= period and t % period == 0:
            s = z_TC[t - period : t].mean(0)
            gate = torch.relu(mediums.reduce.weight @ s + mediums.reduce.bias)
            made.append(torch.sigmoid(mediums.excite.weight @ gate + mediums.excite.bias) * s)
        if not made:
            out.append(torch.zeros_like(z_TC[0]))
        elif mediums.aggregate == "last":
            out.append(made[-1])
        elif mediums.aggregate == "mean":
            out.append(torch.stack(made).mean(0))
        else:
            weight = torch.stack([(mediums.key.weight @ m).exp() for m in made])
            out.append((weight * torch.stack(made)).sum(0) / weight.sum(0))
    return torch.stack(out)


def slowly(model: RRWKV, ids: Tensor) -> Tensor:
    """Logits [T, V] of one sequence [T], from the equations."""
    x_TC = model.embed(ids[None])[0]
    for block in model.blocks:
        for norm, part, side in ((block.ln1, block.att, "time"), (block.ln2, block.ffn, "channel")):
            z_TC = norm(x_TC)
            before_TC = torch.cat([torch.zeros_like(z_TC[:1]), z_TC[:-1]])
            reads = hasattr(part, "mediums")
            assert reads == (model.config.where in (side, "both"))
            m_TC = readings(part.mediums, z_TC) if reads else torch.zeros_like(z_TC)

            def mix(letter: str, part: Any = part, now: Tensor = z_TC, then: Tensor = before_TC, m: Tensor = m_TC,
                    reads: bool = reads) -> Tensor:  # fmt: skip
                share = getattr(part, f"time_mix_{letter}").flatten()
                nu = getattr(part.mediums, f"mix_{letter}").flatten() if reads else 0.0
                return share * now + (1 - share) * then + nu * m

            r_TC, k_TC = torch.sigmoid(part.receptance(mix("r"))), part.key(mix("k"))
            if side == "time":
                y_TC = average(k_TC, part.value(mix("v")), -part.time_decay.exp(), part.time_first)
                x_TC = x_TC + part.output(r_TC * y_TC)
            else:
                x_TC = x_TC + r_TC * part.value(torch.relu(k_TC) ** 2)
    return model.head(model.ln_out(x_TC))


def average(k_TC: Tensor, v_TC: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    """WKV-4 without a running maximum."""
    num, den, out = torch.zeros_like(u), torch.zeros_like(u), []
    for k, v in zip(k_TC, v_TC, strict=True):
        out.append((num + (u + k).exp() * v) / (den + (u + k).exp()))
        num, den = log_w.exp() * num + k.exp() * v, log_w.exp() * den + k.exp()
    return torch.stack(out)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@torch.no_grad()
def test_equals_the_equations(aggregate: str, where: str) -> None:
    for period, length in ((4, 23), (1, 6), (5, 20), (7, 6)):
        model, ids = build(aggregate=aggregate, where=where, medium_period=period), tokens(length)[0]
        torch.testing.assert_close(model(ids[None]).logits[0], slowly(model, ids), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@torch.no_grad()
def test_steps_and_pieces_equal_the_parallel_form(aggregate: str) -> None:
    """In float32, with lengths that are no multiples of the period, and mediums that pieces cut in two."""
    model, ids = build(torch.float32, aggregate=aggregate, medium_period=4), tokens(26)
    expected, final = model(ids)
    bar = 1e-5 * expected.abs().max()
    for cuts in (list(range(27)), [0, 1, 4, 5, 11, 12, 26], [0, 3, 26]):
        state, parts = None, []
        for start, end in itertools.pairwise(cuts):
            logits, state = model(ids[:, start:end], state)
            parts.append(logits)
        assert (torch.cat(parts, 1) - expected).abs().max() <= bar
        assert_states_equal(state, final, atol=1e-4)
        assert torch.equal(state.layers[0]["att_count"], torch.full((2,), 2))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_causal_and_blind_within_a_segment(aggregate: str) -> None:
    """A token changes nothing before it; what it changes through mediums begins with the next segment."""
    mediums = build(aggregate=aggregate).blocks[0].att.mediums
    segments = wkv.layers.segments.Segments.build(
        torch.zeros(1, dtype=torch.int64), wkv.layers.timeline.Timeline(), 23, 4
    )
    z = torch.randn(1, 23, 32, dtype=torch.float64, requires_grad=True)
    own = {name[4:]: x for name, x in build(aggregate=aggregate).init_state(1).layers[0].items() if name[:4] == "att_"}
    reading, _ = mediums.reading(z, own, segments)
    for t in (0, 3, 4, 9, 22):
        (gradient,) = torch.autograd.grad(reading[0, t].sum(), z, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        first = 0 if aggregate != "last" else max(0, t // 4 - 1) * 4
        assert seen.nonzero().flatten().tolist() == list(range(first, t // 4 * 4))


@torch.no_grad()
def test_logits_before_a_change_stay() -> None:
    model, ids = build(), tokens()
    expected = model(ids).logits
    for t in (0, 5, 7, 8, 22):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % test_registry.V
        changed = (model(other).logits - expected).abs().amax((0, 2)) > 1e-12
        assert changed.tolist() == [i >= t for i in range(23)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@torch.no_grad()
def test_an_rwkv4_becomes_one(aggregate: str, dtype: torch.dtype) -> None:
    source, ids = base(dtype), tokens()
    source.tuned_state = source(ids[:1]).state
    model = RRWKV.from_base(source, aggregate=aggregate, medium_period=4)
    assert torch.equal(model(ids).logits, source(ids).logits)
    assert torch.equal(model(ids[:1], model.tuned_state).logits, source(ids[:1], source.tuned_state).logits)
    assert {p.dtype for p in model.parameters()} == {dtype}
    excite = 2 * 32 * 8 + 8 + 32 + (32 * 32 if aggregate == "wkv" else 0)
    assert model.num_parameters == source.num_parameters + 3 * (2 * excite + 5 * 32)
    model.head.weight.zero_()
    assert source.head.weight.any()


@torch.no_grad()
def test_no_segment_is_complete_where_the_period_is_the_length() -> None:
    model, ids = build(medium_period=23), tokens()
    plain = base(torch.float64)
    plain.load_state_dict({key: x for key, x in model.state_dict().items() if ".mediums." not in key})
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-12, rtol=1e-12)
    more = tokens(24)
    assert (model(more).logits - plain(more).logits)[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_what_learns_at_first(aggregate: str) -> None:
    """While nothing is read only the coefficients get a gradient; after one step the rest follows."""
    model, ids = RRWKV.from_base(base(), aggregate=aggregate, medium_period=4), tokens()
    learns = []
    for _ in range(2):
        model.zero_grad()
        next_token_loss(model(ids).logits, ids.roll(-1, 1)).backward()
        own = {key: p for key, p in model.named_parameters() if ".mediums." in key}
        learns.append({key for key, p in own.items() if p.grad.any()})
        with torch.no_grad():
            for p in own.values():
                p.sub_(0.1 * p.grad)
    assert learns[0] == {key for key in own if ".mix_" in key}
    assert learns[1] == own.keys()


@torch.no_grad()
def test_half_precision_keeps_sums_in_float32() -> None:
    """A sum of hundreds of tokens in bfloat16 would be off by some percent."""
    torch.manual_seed(0)
    model = build(torch.bfloat16, medium_period=300)
    layer = model(tokens(290)).state.layers[0]
    assert layer["att_sum"].dtype == torch.float32
    z = model.blocks[0].ln1(model.embed(tokens(290)))
    torch.testing.assert_close(layer["att_sum"], z.float().sum(1), atol=1e-3, rtol=1e-4)


def test_large_keys() -> None:
    """Weights of e^100 and more: no exponential overflows, neither do gradients."""
    model = build(torch.float32)
    for block in model.blocks:
        block.att.mediums.key.weight.data.mul_(400)
    loss = next_token_loss(model(tokens()).logits, tokens(seed=1))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_state_is_constant_and_holds_what_is_read() -> None:
    pool = {"sum", "count", "pool_num", "pool_den", "pool_max"}
    for aggregate, where in itertools.product(AGGREGATES, PLACES):
        model = build(aggregate=aggregate, where=where)
        slots = {"sum", "count", "medium"} if aggregate == "last" else pool
        sides = {"time": ("att",), "channel": ("ffn",), "both": ("att", "ffn")}[where]
        plain = {"att_shift", "num", "den", "max", "ffn_shift"}
        assert model.init_state(2).layers[0].keys() == plain | {f"{side}_{slot}" for side in sides for slot in slots}
        assert model(tokens(50)).state.num_bytes == model.init_state(2).num_bytes
        assert any(".key." in key and ".mediums." in key for key in model.state_dict()) == (aggregate == "wkv")


def test_initial_values() -> None:
    torch.manual_seed(0)
    model: Any = wkv.create_model("rrwkv", vocab_size=20, hidden_size=64, num_layers=2)
    assert model.config.medium_period == 32
    mediums = model.blocks[1].ffn.mediums
    product = mediums.reduce.weight @ mediums.reduce.weight.T
    torch.testing.assert_close(product, torch.eye(16), atol=1e-5, rtol=0)
    assert 0.008 < mediums.excite.weight.std() < 0.012
    for zero in (mediums.mix_k, mediums.mix_r, mediums.reduce.bias, mediums.excite.bias, mediums.key.weight):
        assert not zero.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": "max"}, "aggregate must be one of 'last', 'mean', 'wkv'"),
        ({"where": "ffn"}, "where must be one of 'time', 'channel', 'both'"),
        ({"medium_period": 0}, "medium_period must be a positive integer"),
        ({"reduction": 0}, "reduction must be a positive integer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wkv.WkvError, match=message):
        build(**options)


def test_bad_bases() -> None:
    for model_name in ("rwkv7", "rrwkv"):
        with pytest.raises(wkv.WkvError, match=f"from_base takes an RWKV-4, found '{model_name}'"):
            RRWKV.from_base(test_registry.build(model_name))
    with pytest.raises(wkv.WkvError, match="from_base has no option 'ffn_size'; one of aggregate, medium_period"):
        RRWKV.from_base(base(), ffn_size=8)
    with pytest.raises(wkv.WkvError, match="quantised or carries an adapter"):
        RRWKV.from_base(quantize_model(base(), 8))


def test_a_narrow_excite_network() -> None:
    assert RRWKVConfig(vocab_size=9, hidden_size=8, num_layers=1, reduction=100).reduction == 100
    assert build(reduction=100).blocks[0].att.mediums.reduce.out_features == 1
