"""Arithmetic modulo five, without and with brackets: the value of an expression is due after an equals sign.

Source: as in `languages`. The draws without brackets repeat the original's with `compat="xlstm"`; the grammar with
brackets is ours.

Shape letters: B rows, T time, D digits of an expression, E tokens of an expression, S places of a stack.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from wkv.evaluation.synthetic.languages import Language
from wkv.evaluation.synthetic.task import Samples, register

MODULUS = 5
PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = range(1, 7)
OPERATORS = (PLUS, MINUS, TIMES)


@register("modular_arithmetic")
@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Language):
    """Digits with + - * between; products first. Tokens: 1 +, 2 -, 3 *, 4 =, 5 ... 9 the digits.

    A row of s tokens asks at place 2 * ((s - 1) // 2), so that its expression has an odd number of tokens.
    """

    shortest: ClassVar[int] = 3
    first_digit: ClassVar[int] = 5

    @property
    def vocab_size(self) -> int:
        return self.first_digit + MODULUS

    @property
    def chance(self) -> float:
        highest = {count: _value_odds(count).max() for count in {(length - 1) // 2 for length in self.lengths}}
        return float(np.mean([highest[(length - 1) // 2] for length in self.lengths]))

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        digits_BT = torch.randint(self.first_digit, self.vocab_size, (n, self.width), generator=generator)
        operators = torch.randint(1, 4, (n, self.width // 2), generator=generator)
        digits_BT[:, 1::2] = operators
        return self.answer(digits_BT, self.draw_lengths(n, generator))

    def symbols_as_xlstm(self, n: int, random: np.random.Generator) -> Tensor:
        symbols_BT = torch.from_numpy(random.integers(0, MODULUS, (n, self.width))).long() + self.first_digit
        symbols_BT[:, 1::2] = torch.from_numpy(random.integers(0, 3, (n, self.width // 2))).long() + 1
        return symbols_BT

    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        lengths_B = 2 * ((lengths_B - 1) // 2) + 1
        values_B = self._values(symbols_BT, lengths_B // 2)
        inputs_BT = symbols_BT.scatter(1, lengths_B[:, None] - 2, EQUALS)
        return self.ask(inputs_BT, lengths_B, values_B + self.first_digit)

    def _values(self, symbols_BT: Tensor, digits_B: Tensor) -> Tensor:
        """Values of the expressions in the first 2 D - 1 columns, each row with its own D."""
        total = torch.zeros_like(digits_B)
        term = symbols_BT[:, 0] - self.first_digit
        for place in range(1, int(digits_B.max())):
            operator, digit = symbols_BT[:, 2 * place - 1], symbols_BT[:, 2 * place] - self.first_digit
            exists, product = place < digits_B, operator == TIMES
            total = torch.where(exists & ~product, total + term, total)
            changed = torch.where(product, term * digit, torch.where(operator == MINUS, -digit, digit)) % MODULUS
            term = torch.where(exists, changed, term)
        return (total + term) % MODULUS


@register("modular_arithmetic_brackets")
@dataclass(frozen=True, kw_only=True)
class BracketArithmetic(Language):
    """Nested expressions. Tokens: 1 +, 2 -, 3 *, 4 =, 5 (, 6 ), 7 ... 11 the digits.

    An expression of 1 token is a digit, of 2 a digit with a minus before it, of 3 or 4 such a one in brackets; a longer
    one is two expressions with an operator between, in brackets, every split of the length being equally likely.
    """

    compat: ClassVar[tuple[str, ...]] = ()
    shortest: ClassVar[int] = 3
    first_digit: ClassVar[int] = 7

    @property
    def vocab_size(self) -> int:
        return self.first_digit + MODULUS

    @property
    def chance(self) -> float:
        return float(np.mean([_nested_odds(length - 2).max() for length in self.lengths]))

    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        lengths_B = self.draw_lengths(n, generator)
        symbols_BT = torch.zeros(n, self.width, dtype=torch.int64)
        longest = self.max_length - 2
        symbols_BT[:, :longest] = expressions(lengths_B - 2, longest, self.first_digit, generator)
        return self.answer(symbols_BT, lengths_B)

    def answer(self, symbols_BT: Tensor, lengths_B: Tensor) -> Samples:
        values_B = nested_values(symbols_BT, self.first_digit)
        inputs_BT = symbols_BT.scatter(1, lengths_B[:, None] - 2, EQUALS)
        return self.ask(inputs_BT, lengths_B, values_B + self.first_digit)


def expressions(sizes_B: Tensor, width: int, first_digit: int, generator: torch.Generator) -> Tensor:
    """Random nested expressions of the given numbers of tokens, int64 [B, E], 0 behind their ends.

    Every step writes one token and replaces the top of the row's stack by what must follow: a token, or minus the size
    of an expression.
    """
    n = len(sizes_B)
    stack_BS = torch.zeros(n, width + 4, dtype=torch.int64)  # nothing on it but becomes a token: width + 1 are used
    stack_BS[:, 1] = -sizes_B  # place 0 stays empty and is read when a row is finished
    depth_B1 = torch.ones(n, 1, dtype=torch.int64)
    out = []
    for _ in range(width):
        top_B = stack_BS.gather(1, depth_B1)[:, 0]
        token_B, follow_B4, count_B = _expand(top_B, first_digit, generator)
        out.append(token_B)
        stack_BS.scatter_(1, depth_B1 + torch.arange(4), follow_B4)
        depth_B1 = (depth_B1 + count_B[:, None] - 1).clamp(min=0)
    return torch.stack(out, 1)


def _expand(top_B: Tensor, first_digit: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The next token, what follows it (up to four things, the next one last), and how many those are."""
    n, size = len(top_B), -top_B
    digit = torch.randint(first_digit, first_digit + MODULUS, (n,), generator=generator)
    operator = torch.randint(1, 4, (n,), generator=generator)
    left = 1 + (torch.rand(n, generator=generator) * (size - 4)).long()
    none, close = torch.zeros_like(top_B), torch.full_like(top_B, CLOSE)
    cases = [
        (size <= 0, top_B, [none] * 4, 0),
        (size == 1, digit, [none] * 4, 0),
        (size == 2, torch.full_like(top_B, MINUS), [none - 1, none, none, none], 1),
        ((size == 3) | (size == 4), torch.full_like(top_B, OPEN), [close, 2 - size, none, none], 2),
        (size >= 5, torch.full_like(top_B, OPEN), [close, left + 3 - size, operator, -left], 4),
    ]
    token, follow, count = none, torch.stack([none] * 4, 1), none
    for applies, emitted, after, number in cases:
        token = torch.where(applies, emitted, token)
        follow = torch.where(applies[:, None], torch.stack(after, 1), follow)
        count = torch.where(applies, number, count)
    return token, follow, count


def nested_values(symbols_BT: Tensor, first_digit: int) -> Tensor:
    """Values of nested expressions, int64 [B].

    Each bracket has a frame: the value so far, the operator that waits for an operand, the sign before that operand.
    """
    n, width = symbols_BT.shape
    rows, depth = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    value, operator = torch.zeros(2, n, width + 2, dtype=torch.int64)
    sign = torch.ones(n, width + 2, dtype=torch.int64)
    operator[:, 0] = PLUS  # a frame starts as 0 +
    for token in symbols_BT.T:
        opens, closes, is_digit = token == OPEN, token == CLOSE, token >= first_digit
        operand = torch.where(closes, value[rows, depth], token - first_digit)
        depth = depth + opens.long() - closes.long()
        here = rows, depth
        old, waiting, minus = value[here], operator[here], sign[here]
        found = _apply(waiting, old, operand * minus)
        complete, is_operator = closes | is_digit, (token > 0) & (token <= TIMES)
        negates = is_operator & (waiting > 0)
        value[here] = torch.where(complete, found, torch.where(opens, 0, old))
        waiting = torch.where(is_operator & ~negates, token, waiting)
        operator[here] = torch.where(complete, 0, torch.where(opens, PLUS, waiting))
        sign[here] = torch.where(complete | opens, 1, torch.where(negates, -1, minus))
    return value[:, 0]


def _apply(operator: Tensor, left: Tensor, right: Tensor) -> Tensor:
    sums = torch.where(operator == MINUS, left - right, left + right)
    return torch.where(operator == TIMES, left * right, sums) % MODULUS


@functools.cache
def _odds(operator: int) -> np.ndarray:
    """[left, right, value]: 1 where the operation has this value."""
    left, right = torch.meshgrid(torch.arange(MODULUS), torch.arange(MODULUS), indexing="ij")
    return np.eye(MODULUS)[_apply(torch.tensor(operator), left, right).numpy()]


def _combined(left: np.ndarray, right: np.ndarray, *operators: int) -> np.ndarray:
    """Distribution of the value of an operation, each of the operators being equally likely."""
    table: np.ndarray = sum(_odds(operator) for operator in operators) / len(operators)  # type: ignore[assignment]
    return np.einsum("l,r,lrv->v", left, right, table)


@functools.cache
def _value_odds(digits: int) -> np.ndarray:
    """Distribution of the value without brackets: a product of some digits, then a sum, a difference or nothing."""
    product = np.full(MODULUS, 1 / MODULUS)
    total = np.zeros(MODULUS)
    for size in range(1, digits):
        rest = _value_odds(digits - size)
        # a - b has the distribution of a + b here: products of uniform digits are symmetric
        total += (1 / 3) ** (size - 1) * (2 / 3) * _combined(product, rest, PLUS)
        product = _combined(product, np.full(MODULUS, 1 / MODULUS), TIMES)
    return total + (1 / 3) ** (digits - 1) * product


@functools.cache
def _nested_odds(size: int) -> np.ndarray:
    """Distribution of the value of a nested expression."""
    if size < 5:
        return np.full(MODULUS, 1 / MODULUS)
    splits = [(left, size - 3 - left) for left in range(1, size - 3)]
    parts = [_combined(_nested_odds(left), _nested_odds(right), *OPERATORS) for left, right in splits]
    return np.mean(parts, axis=0)
