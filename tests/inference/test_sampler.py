"""Filters against their definitions, penalties by hand, seeds, validation."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wkv.errors import WkvError
from wkv.inference.sampler import Penalties, Sampler, draw, largest, nucleus, row_generators, typical_tokens
from wkv.tokenizers import ByteTokenizer

# Few different values, so that ties are common.
LOGITS = st.lists(st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=12)
SHARE = st.floats(0, 1)


def probabilities(logits: list[float]) -> list[float]:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1).exp().tolist()


def kept(sampler: Sampler, logits: list[float]) -> set[int]:
    log_p = sampler.log_probs(torch.tensor(logits))
    assert math.isclose(log_p.exp().sum(), 1, abs_tol=1e-12)
    return set(log_p.isfinite().nonzero().flatten().tolist())


def running_sums(values: list[float]) -> list[float]:
    sums, total = [], 0.0
    for value in values:
        total += value
        sums.append(total)
    return sums


def top_p_by_definition(p: list[float], top_p: float) -> set[int]:
    ordered = sorted(p, reverse=True)
    reached = [i for i, total in enumerate(running_sums(ordered)) if total >= top_p]
    cutoff = ordered[reached[0]] if reached else ordered[-1]
    return {i for i, value in enumerate(p) if value >= cutoff}


def top_k_by_definition(p: list[float], k: int) -> set[int]:
    return set(sorted(range(len(p)), key=lambda i: (-p[i], i))[:k])


def typical_by_definition(log_p: torch.Tensor, typical_p: float) -> set[int]:
    p = log_p.exp()
    distance = (-log_p - (-(p * log_p).sum())).abs().tolist()
    order = sorted(range(len(p)), key=lambda i: (distance[i], i))
    sums = running_sums([p[i].item() for i in order])
    return {order[n] for n in range(len(p)) if n == 0 or sums[n - 1] < typical_p}


@given(LOGITS, SHARE)
def test_top_p_keeps_the_likeliest_and_their_equals(logits: list[float], top_p: float) -> None:
    p = torch.tensor(probabilities(logits), dtype=torch.float64)
    assert set(nucleus(p, top_p).nonzero().flatten().tolist()) == top_p_by_definition(p.tolist(), top_p)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_of_a_flat_large_vocabulary(top_p: float) -> None:
    p = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    for row, found in zip(p.tolist(), nucleus(p, top_p), strict=True):
        assert set(found.nonzero().flatten().tolist()) == top_p_by_definition(row, top_p)


@given(LOGITS, st.integers(1, 14))
def test_top_k(logits: list[float], k: int) -> None:
    p = torch.tensor(probabilities(logits), dtype=torch.float64)
    if k <= len(logits):
        assert set(largest(p, k).nonzero().flatten().tolist()) == top_k_by_definition(p.tolist(), k)
    assert kept(Sampler(top_k=k), logits) == top_k_by_definition(p.tolist(), k)


@given(LOGITS, SHARE)
def test_min_p(logits: list[float], min_p: float) -> None:
    p = probabilities(logits)
    assert kept(Sampler(min_p=min_p), logits) == {i for i, value in enumerate(p) if value >= min_p * max(p)}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_typical_p(logits: list[float], typical_p: float) -> None:
    log_p = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    found = set(typical_tokens(log_p, typical_p).nonzero().flatten().tolist())
    assert found == typical_by_definition(log_p, typical_p)


@given(LOGITS, SHARE, st.integers(0, 14), SHARE, st.floats(0.1, 3))
def test_filters_combine_on_the_whole_distribution_then_temperature(
    logits: list[float], top_p: float, top_k: int, min_p: float, temperature: float
) -> None:
    p = probabilities(logits)
    left = top_p_by_definition(p, top_p) if top_p < 1 else set(range(len(p)))
    left &= top_k_by_definition(p, top_k or len(p))
    left &= {i for i, value in enumerate(p) if value >= min_p * max(p)}
    powers = [value ** (1 / temperature) if i in left else 0.0 for i, value in enumerate(p)]
    found = Sampler(temperature, top_k, top_p, min_p).log_probs(torch.tensor(logits)).exp()
    expected = torch.tensor(powers, dtype=torch.float64) / sum(powers)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


def test_typical_looks_at_what_the_other_filters_leave() -> None:
    # Alone, 0.4 and 0.3 are typical; of the two tokens top-k leaves (4/7, 3/7), the likelier one is.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept(Sampler(typical_p=0.45), logits) == {1, 2}
    assert kept(Sampler(typical_p=0.45, top_k=2), logits) == {0}


def test_temperature_is_applied_after_truncation() -> None:
    # At temperature 5 first, the second token would be needed to reach 0.7; after truncation one token is left.
    logits = torch.tensor([2.0, 0.0, 0.0])
    assert Sampler(temperature=5, top_p=0.7).log_probs(logits).exp().tolist() == [1.0, 0.0, 0.0]


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    assert Sampler(temperature=0).log_probs(torch.tensor([1.0, 3.0, 3.0])).exp().tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-8, 1e8, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    p = Sampler(temperature=temperature).log_probs(torch.tensor([1.0, 0.5, -torch.inf])).exp()
    expected = [1.0, 0.0, 0.0] if temperature < 1 else [0.5, 0.5, 0.0]
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64))


def test_rows_are_filtered_independently() -> None:
    sampler = Sampler(top_k=5, top_p=0.8, min_p=0.02, typical_p=0.9, temperature=0.7)
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(1))
    together = sampler.log_probs(logits)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(together[i, j], sampler.log_probs(logits[i, j]))


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(7)]
    counts = Counter(int(draw(p.log()[None], generators)) for _ in range(4000))
    assert set(counts) == {1, 3, 4}
    for token in counts:
        assert abs(counts[token] / 4000 - p[token]) < 0.03


@settings(max_examples=50)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=8), st.integers(0, 2**63 - 1))
def test_draws_never_take_a_removed_token(logits: list[float], seed: int) -> None:
    log_p = Sampler(top_p=0.9).log_probs(torch.tensor(logits))
    token = int(draw(log_p[None], row_generators(seed, [[1]])))
    assert log_p[token] > -math.inf


def test_penalties_by_hand() -> None:
    sampler = Sampler(presence_penalty=0.5, frequency_penalty=2.0, penalty_decay=0.5)
    logits = torch.zeros(2, 256)
    penalties = Penalties(sampler, ByteTokenizer(), logits)
    a, b, seven = ord("a"), ord("b"), ord("7")
    for tokens in ([a, b], [a, seven], [seven, b]):
        penalties.update(tokens)
    # Row 0: a counts 1, then 0.5 + 1 = 1.5, then 0.75; 7 is seen but counts 0. Row 1: b 1, 0.5, then 1.25.
    found = penalties.apply(logits)
    assert found[0, a].item() == -(0.5 + 2 * 0.75)
    assert found[0, seven].item() == -0.5
    assert found[1, b].item() == -(0.5 + 2 * 1.25)
    assert found[1, a].item() == 0
    penalties.select([1])
    assert penalties.apply(logits[:1])[0, b].item() == -3.0


def test_seeds_depend_on_prompt_and_repetition_only() -> None:
    def first(generators: list[torch.Generator]) -> list[float]:
        return [float(torch.rand((), generator=generator)) for generator in generators]

    a, b, a_again = first(row_generators(5, [[1, 2], [3], [1, 2]]))
    assert first(row_generators(5, [[3], [1, 2]])) == [b, a]
    assert len({a, b, a_again}) == 3
    assert first(row_generators(6, [[3]])) != [b]
    torch.manual_seed(1)
    unseeded = first(row_generators(None, [[3]]))
    assert first(row_generators(None, [[3]])) != unseeded
    torch.manual_seed(1)
    assert first(row_generators(None, [[3]])) == unseeded


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "temperature must be"),
        ("temperature", float("inf"), "temperature must be"),
        ("temperature", "hot", "found 'hot'"),
        ("temperature", True, "found True"),
        ("top_k", -1, "at least 0"),
        ("top_k", 1.5, "integer"),
        ("top_p", 1.01, "from 0 to 1"),
        ("top_p", None, "from 0 to 1"),
        ("min_p", -0.5, "from 0 to 1"),
        ("typical_p", 2, "from 0 to 1"),
        ("presence_penalty", float("inf"), "finite"),
        ("frequency_penalty", "x", "finite"),
        ("penalty_decay", 1.5, "from 0 to 1"),
        ("seed", -1, "seed must be"),
        ("seed", 2**63, "seed must be"),
        ("seed", 1.0, "seed must be"),
    ],
)
def test_bad_options_are_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(WkvError, match=option) as error:
        Sampler(**{option: value})
    assert message in str(error.value)
