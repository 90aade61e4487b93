"""The official learning-rate curves (RWKV-LM trainers), and how far along a run is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wkv.errors import WkvError

KINDS = ("cosine", "exponential", "wsd")


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step and of the progress `p` in [0, 1].

    `cosine` falls on half a cosine from `initial` to `final`; `exponential` falls by a constant factor per step, and
    on a straight line where `final` is 0; `wsd` (warm-up, stable, decay) stays at `initial` and falls on a straight
    line in the last `decay` of the run. All are scaled by `0.01 + 0.99 * step / warmup_steps` during warm-up.
    """

    initial: float
    final: float
    warmup_steps: int = 0
    kind: str = "cosine"
    decay: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.initial < math.inf or not 0 <= self.final < math.inf:
            found = f"{self.initial} to {self.final}"
            raise WkvError(f"learning rates must be positive numbers (the final one may be 0), found {found}")
        if self.warmup_steps < 0 or self.kind not in KINDS:
            raise WkvError(f"a schedule is one of {', '.join(KINDS)} with warmup_steps >= 0, found {self}")
        if not 0 < self.decay <= 1:
            raise WkvError(f"the decay of a schedule is a part of the run in (0, 1], found {self.decay}")

    def learning_rate(self, step: int, progress: float) -> float:
        """The rate of step `step`, counted from 0."""
        rate = self._curve(min(1.0, max(0.0, progress)))
        return rate * (0.01 + 0.99 * step / self.warmup_steps) if step < self.warmup_steps else rate

    def _curve(self, p: float) -> float:
        if self.kind == "cosine":
            f = self.final / self.initial
            return self.initial * ((0.5 + f / 2) + (0.5 - f / 2) * math.cos(math.pi * p))
        if self.kind == "wsd":
            return self.initial + (self.final - self.initial) * max(0.0, p - (1 - self.decay)) / self.decay
        if self.final == 0:
            return self.initial * (1 - p)
        return self.initial * math.exp(math.log(self.final / self.initial) * p)


@dataclass(frozen=True)
class Budget:
    """How long to train: exactly one of steps, tokens, or seconds spent in training steps."""

    tokens_per_step: int
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.steps, self.tokens, self.seconds) if limit is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            found = f"steps={self.steps}, tokens={self.tokens}, seconds={self.seconds}"
            raise WkvError(f"a budget is one positive number of steps, tokens or seconds, found {found}")

    def progress(self, step: int, seconds: float, schedule: Schedule, tokens: int | None = None) -> float:
        """Where on its curve `schedule` stands before step `step`; may lie outside [0, 1].

        Cosine and wsd count tokens after the warm-up, the exponential curve steps after the warm-up (from 1), and a
        budget of seconds counts seconds on any.

        Args:
            step, seconds: finished steps, and the time they took.
            tokens: those read so far, where batches differ in size; `step * tokens_per_step` by default.
        """
        if self.seconds is not None:
            return seconds / self.seconds
        total = self.tokens if self.tokens is not None else (self.steps or 0) * self.tokens_per_step
        done, warmup = self._read(step, tokens), schedule.warmup_steps * self.tokens_per_step
        if schedule.kind == "exponential":
            done += self.tokens_per_step
        return (done - warmup) / (total - warmup) if total > warmup else 1.0

    def fraction(self, step: int, seconds: float, tokens: int | None = None) -> float:
        """Part of the budget that is used up, in [0, 1]; training ends at 1. Arguments as for `progress`."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, self._read(step, tokens) / (self.tokens or 1))

    def _read(self, step: int, tokens: int | None) -> int:
        """Tokens so far; a budget of steps counts every step alike."""
        return step * self.tokens_per_step if tokens is None or self.steps is not None else tokens
