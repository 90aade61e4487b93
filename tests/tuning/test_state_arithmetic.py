"""Sums of states."""

from __future__ import annotations

import pytest
import torch

from tests.test_registry import build, tokens
from tests.tuning.test_state import all_models
from wkv.errors import WkvError
from wkv.state import State
from wkv.tuning.state import empty_state, prompt_state
from wkv.tuning.state_arithmetic import interpolate, mix, subtract


@all_models
def test_mixtures(name: str) -> None:
    model, ids = build(name), tokens(2)
    a, b = (prompt_state(model, [seed, 3, seed + 1, 5]) for seed in (1, 9))
    for t, wanted in ((0.0, a), (1.0, b)):
        found = interpolate(a, b, t)
        torch.testing.assert_close(model(ids[:1], found).logits, model(ids[:1], wanted).logits, rtol=1e-9, atol=1e-9)
    restored = mix([(b, 1.0), (subtract(a, b), 1.0)])
    torch.testing.assert_close(model(ids[:1], restored).logits, model(ids[:1], a).logits, rtol=1e-9, atol=1e-9)
    half, quarter = interpolate(a, b, 0.5), mix([(a, 0.75), (b, 0.25)])
    again = interpolate(a, half, 0.5)
    for one, other in zip(again.layers, quarter.layers, strict=True):
        for slot in one:
            torch.testing.assert_close(one[slot], other[slot], rtol=1e-9, atol=1e-9)


def test_mixtures_of_rwkv4_add_numerators_and_denominators() -> None:
    model = build("rwkv4")
    a, b = (prompt_state(model, [seed, 3, 5]) for seed in (1, 9))
    b.layers[0]["max"] += 50  # another normaliser of the same past
    b.layers[0]["num"] *= torch.tensor(-50.0).double().exp()
    b.layers[0]["den"] *= torch.tensor(-50.0).double().exp()
    found = mix([(a, 0.25), (b, 2)])
    for i, layer in enumerate(found.layers):
        for slot in ("num", "den"):
            pasts = [s.layers[i][slot] * s.layers[i]["max"].exp() for s in (a, b)]
            torch.testing.assert_close(
                layer[slot] * layer["max"].exp(), 0.25 * pasts[0] + 2 * pasts[1], rtol=1e-9, atol=0
            )
    empty = empty_state(model)
    assert torch.equal(mix([(empty, 3), (empty, 1)]).layers[0]["max"], empty.layers[0]["max"])


def test_mixtures_refuse_what_does_not_fit() -> None:
    state = build("rwkv7").init_state(1)
    for parts, message in (
        ([], "at least one pair"),
        ([(state, 1.0), (build("rwkv6").init_state(1), 1.0)], "belongs to 'rwkv6'"),
        ([(state, 1.0), (build("rwkv7").init_state(2), 1.0)], "2 sequences"),
        ([(state, float("nan"))], "weights must be finite numbers"),
        ([(state, "1")], "weights must be finite numbers"),
    ):
        with pytest.raises(WkvError, match=message):
            mix(parts)
    counters = [State("odd", [{"count": torch.tensor([n])}]) for n in (1, 2)]
    assert int(mix([(counters[0], 0.5), (counters[0], 0.5)]).layers[0]["count"]) == 1
    with pytest.raises(WkvError, match="count cannot be mixed"):
        mix([(counter, 0.5) for counter in counters])
