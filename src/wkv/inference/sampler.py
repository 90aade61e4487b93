"""Choosing the next token: logits [V] -> filtered log-probabilities [V] -> one id.

The order is RWKV's (pip `rwkv`, `PIPELINE.sample_logits`), which differs from that of most other libraries:

1. penalties are subtracted from the logits;
2. top-p, top-k and min-p each look at the model's whole distribution, and a token stays if all three keep it;
3. typical-p looks at what is left, scaled to sum 1;
4. the temperature comes last: what is left is raised to the power 1 / temperature and scaled to sum 1.

The most likely token always survives step 2, so something is always left.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.tokenizers import Tokenizer

# Tokens written with nothing but these are not counted by the frequency penalty: numbers and tables must repeat.
UNCOUNTED = " \t0123456789"
_HEAD = 1024  # so many of the most likely tokens nearly always hold `top_p`; finding them is 10x faster than sorting V
_INFINITY = float("inf")


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    Args:
        temperature: after truncation, p becomes p^(1 / temperature); 0 always takes the most likely token.
        top_k: keep the k most likely tokens (of equal ones, the lowest ids); 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability, and all as likely as the last of
            them; 0 keeps only the most likely, 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        typical_p: of the tokens left, keep those whose surprise -log p is nearest to the entropy, until they reach
            this probability (Meister et al., arXiv 2202.00666); 1 keeps all.
        presence_penalty: subtracted from the logit of every token generated before.
        frequency_penalty: subtracted times the token's count; the prompt does not count, and neither do tokens made
            of blanks, tabs and digits.
        penalty_decay: all counts are multiplied by this after every token.
        seed: makes the choice reproducible; None draws one from torch's global generator.

    Raises:
        WkvError: for an option of a wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, _INFINITY, "0 takes the most likely token")
        _check_integer("top_k", self.top_k, "0 keeps all tokens")
        _check_number("top_p", self.top_p, 0, 1, "1 keeps all tokens")
        _check_number("min_p", self.min_p, 0, 1, "0 keeps all tokens")
        _check_number("typical_p", self.typical_p, 0, 1, "1 keeps all tokens")
        _check_number("presence_penalty", self.presence_penalty, -_INFINITY, _INFINITY, "0 is off")
        _check_number("frequency_penalty", self.frequency_penalty, -_INFINITY, _INFINITY, "0 is off")
        _check_number("penalty_decay", self.penalty_decay, 0, 1, "1 never forgets")
        check_seed(self.seed)

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on the tokens generated before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities the next token is drawn with.

        Args:
            logits: [..., V], floating point, penalties already subtracted; -inf forbids a token.

        Returns:
            float64 [..., V], exp sums to 1; -inf where a filter removed the token.
        """
        log_p = torch.log_softmax(logits.double(), -1)
        if self.temperature == 0:
            best = log_p.argmax(-1, keepdim=True)
            return torch.full_like(log_p, -_INFINITY).scatter(-1, best, 0.0)
        log_p = log_p.masked_fill(~self._kept(log_p.exp()), -_INFINITY)
        if self.typical_p < 1:
            log_p = torch.log_softmax(log_p, -1)
            log_p = log_p.masked_fill(~typical_tokens(log_p, self.typical_p), -_INFINITY)
        return torch.log_softmax((log_p - log_p.amax(-1, keepdim=True)) / self.temperature, -1)

    def _kept(self, p: Tensor) -> Tensor:
        kept = p > 0
        if self.top_p < 1:
            kept &= nucleus(p, self.top_p)
        if 0 < self.top_k < p.shape[-1]:
            kept &= largest(p, self.top_k)
        if self.min_p > 0:
            kept &= p >= self.min_p * p.amax(-1, keepdim=True)
        return kept


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Which of the probabilities p [..., V] are at least the one at which the sorted sum reaches `top_p`: bool."""
    head = p.topk(min(_HEAD, p.shape[-1])).values
    if bool((head.sum(-1) < top_p).any()):
        head = p.sort(-1, descending=True).values
    place = (head.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=head.shape[-1] - 1)
    return p >= head.gather(-1, place)


def largest(p: Tensor, k: int) -> Tensor:
    """Which of p [..., V] are the k largest; of equal ones, those that come first: bool [..., V]."""
    smallest = p.topk(k).values[..., -1:]
    above, equal = p > smallest, p == smallest
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def typical_tokens(log_p: Tensor, typical_p: float) -> Tensor:
    """Which tokens are the most typical ones that together reach `typical_p`: bool [..., V]; at least one.

    Args:
        log_p: log-probabilities [..., V] that sum to 1; -inf where a token is not available.
    """
    p = log_p.exp()
    surprise = -log_p
    entropy = (p * surprise.masked_fill(p == 0, 0)).sum(-1, keepdim=True)
    order = (surprise - entropy).abs().sort(dim=-1, stable=True).indices
    reached = p.gather(-1, order).cumsum(-1)
    before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
    kept = before < typical_p
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def draw(log_probs_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One id per row, int64 [B], by inverting the distribution function at one random number per row.

    Every row uses its own (CPU) generator, so rows do not influence one another.
    """
    numbers = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
    u_B = torch.stack(numbers).to(log_probs_BV.device)
    sums_BV = log_probs_BV.exp().cumsum(-1)
    # Divided by itself the last sum is exactly 1, so that every u < 1 falls on a token of positive probability.
    return torch.searchsorted(sums_BV / sums_BV[:, -1:], u_B[:, None], right=True).squeeze(-1)


def row_generators(seed: int | None, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
    """One random generator per prompt (token ids), seeded by `seed`, the prompt, and how often it came before.

    So a prompt's result depends neither on its neighbours in the batch nor on its place, while the same prompt
    given several times is continued in several ways.
    """
    base = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    repeats: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in prompts:
        ids = tuple(prompt)
        packed = struct.pack(f"<{len(ids) + 2}q", base, repeats[ids], *ids)
        digest = hashlib.blake2b(packed, digest_size=8).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
        repeats[ids] += 1
    return generators


class Penalties:
    """What presence and frequency penalties remember: which tokens each row has generated, and how often of late.

    As in pip `rwkv`, `logit -= presence + count * frequency` for every token seen; after each token all counts are
    multiplied by the decay, then the new token's count grows by 1 (by 0 if it is only blanks, tabs and digits).
    """

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, like_BV: Tensor) -> None:
        self._sampler, self._tokenizer = sampler, tokenizer
        self._seen_BV = torch.zeros_like(like_BV, dtype=torch.bool)
        self._count_BV = torch.zeros_like(like_BV, dtype=torch.float32)

    def apply(self, logits_BV: Tensor) -> Tensor:
        """The logits less the penalties."""
        penalty = self._sampler.presence_penalty + self._count_BV * self._sampler.frequency_penalty
        return logits_BV - torch.where(self._seen_BV, penalty, 0.0)

    def update(self, tokens: Sequence[int]) -> None:
        """Count one new token per row."""
        self._count_BV *= self._sampler.penalty_decay
        for row, token in enumerate(tokens):
            self._seen_BV[row, token] = True
            self._count_BV[row, token] += float(self._tokenizer.decode([token]) not in UNCOUNTED)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(rows, device=self._seen_BV.device)
        self._seen_BV, self._count_BV = self._seen_BV[index], self._count_BV[index]


def unsampleable(tokenizer: Any, vocab_size: int, control_ids: frozenset[int]) -> Tensor | None:
    """Ids that must never be chosen: those that stand for no text and are no control id in use. bool [V], or None.

    They are the padding of the vocabulary (World: 65530..65535) and ids the tokenizer does not have.
    """
    silent = [token for token in _silent_ids(tokenizer, vocab_size) if token not in control_ids]
    if not silent:
        return None
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, torch.tensor(silent), True)


@lru_cache(maxsize=8)  # looking at all 65,536 ids takes tens of milliseconds
def _silent_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    known = min(vocab_size, tokenizer.vocab_size)
    silent = [token for token in range(known) if not tokenizer.decode_bytes([token])]
    return [*silent, *range(known, vocab_size)]


def check_seed(seed: object) -> None:
    """Raise `WkvError` unless `seed` is None or an integer in [0, 2^63)."""
    valid = seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63)
    if not valid:
        raise WkvError(f"seed must be None or an integer from 0 to 2^63 - 1, found {seed!r}")


def _check_number(name: str, value: object, low: float, high: float, hint: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(float(value)) or not low <= float(value) <= high:  # type: ignore[arg-type]
        span = "a finite number" if low == -_INFINITY else f"a number of at least {low:g}"
        span = f"a number from {low:g} to {high:g}" if math.isfinite(high) else span
        raise WkvError(f"{name} must be {span} ({hint}), found {value!r}")


def _check_integer(name: str, value: object, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WkvError(f"{name} must be an integer of at least 0 ({hint}), found {value!r}")
