"""What watches over a run: steps that must not change the model, and evaluations that no longer improve."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

WINDOW, LEAST = 100, 20  # gradient norms a median is taken of


class Guard:
    """Tells bad steps from good ones. A bad step is skipped: the model stays as it was, the batch is used up.

    Args:
        limit: bad steps in a row that may be skipped.
        spike: a gradient norm of more than this many times the median of the last 100 good ones is bad, once there
            are 20; None: only what is not finite is bad.
    """

    def __init__(self, limit: int = 0, spike: float | None = None) -> None:
        self.limit, self.spike = limit, spike
        self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def problem(self, loss: float, norm: float) -> str | None:
        """Why the step is bad, None if it is good. Counts it."""
        found = self._problem(loss, norm)
        if found is None:
            self._norms.append(norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
        return found

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were bad."""
        return self.in_a_row > self.limit

    def _problem(self, loss: float, norm: float) -> str | None:
        numbers = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if not math.isfinite(loss + norm):
            return numbers
        if self.spike is None or len(self._norms) < LEAST:
            return None
        median = statistics.median(self._norms)
        return f"{numbers}, {norm / median:.1f} times its median" if norm > self.spike * median else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"in_a_row": self.in_a_row, "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.in_a_row = state["in_a_row"]
        self._norms = deque(state["norms"], WINDOW)


@dataclass
class Best:
    """The best evaluation so far: its score (lower is better) and step, and how many evaluations came since."""

    score: float = math.inf
    step: int = 0
    waited: int = 0

    def update(self, score: float, step: int) -> bool:
        """Take note of an evaluation; True if it is the best."""
        better = score < self.score
        self.waited = 0 if better else self.waited + 1
        if better:
            self.score, self.step = score, step
        return better

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
