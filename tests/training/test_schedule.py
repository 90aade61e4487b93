"""Learning rates against the rows of the official trainer; budgets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from wkv.errors import WkvError
from wkv.training import Budget, Schedule, create_optimizer, set_learning_rate

from .helpers import tiny_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/rwkv_training/data_and_schedule.json").read_text())["lr"]


def official(args: dict[str, float]) -> tuple[Budget, Schedule]:
    budget = Budget(int(args["ctx_len"] * args["real_bsz"]), tokens=int(args["my_exit_tokens"]))
    return budget, Schedule(args["lr_init"], args["lr_final"], int(args["warmup_steps"]))


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: f"step{row[0]}")
def test_cosine_reproduces_the_official_rows(row: list[float]) -> None:
    budget, schedule = official(GOLDEN["args"])
    step, rate, rate_1x, rate_2x, decay = row
    found = schedule.learning_rate(int(step), budget.progress(int(step), 0.0, schedule))
    assert found == pytest.approx(rate, rel=1e-12, abs=0)
    optimizer = create_optimizer(tiny_model(), found, GOLDEN["args"]["weight_decay"])
    set_learning_rate(optimizer, found)
    rates = {group["factor"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({1.0: rate_1x, 2.0: rate_2x}, rel=1e-12, abs=0)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, decay}


def test_warmup_starts_at_one_percent_and_the_end_is_the_final_rate() -> None:
    budget, schedule = official(GOLDEN["args"])
    assert schedule.learning_rate(0, budget.progress(0, 0.0, schedule)) == pytest.approx(6e-6, rel=1e-12)
    assert schedule.learning_rate(10**9, 5.0) == pytest.approx(6e-5, rel=1e-12)


@pytest.mark.parametrize("final", [1e-5, 0.0])
def test_exponential_and_linear_curves_count_steps_after_the_warmup(final: float) -> None:
    schedule = Schedule(1e-3, final, 10, "exponential")
    budget = Budget(64, steps=110)
    for step in (10, 59, 108):
        p = (step - 10 + 1) / 100
        expected = 1e-3 * math.exp(math.log(1e-2) * p) if final else 1e-3 * (1 - p)
        assert schedule.learning_rate(step, budget.progress(step, 0.0, schedule)) == pytest.approx(expected, rel=1e-12)


def test_wsd_stays_and_then_falls_on_a_straight_line() -> None:
    schedule, budget = Schedule(1e-3, 1e-4, 10, "wsd", decay=0.25), Budget(64, steps=110)
    rates = [schedule.learning_rate(step, budget.progress(step, 0.0, schedule)) for step in range(110)]
    assert rates[0] == pytest.approx(1e-5)
    assert set(rates[10:86]) == {1e-3}
    assert rates[85:] == pytest.approx([1e-3 - 9e-4 * i / 25 for i in range(25)], rel=1e-12)
    assert schedule.learning_rate(110, 1.0) == pytest.approx(1e-4)


def test_a_budget_of_tokens_counts_those_read_and_one_of_steps_does_not() -> None:
    schedule = Schedule(1e-3, 1e-4)
    assert Budget(64, tokens=1000).fraction(3, 0.0, tokens=250) == 0.25
    assert Budget(64, tokens=1000).progress(3, 0.0, schedule, tokens=250) == 0.25
    assert Budget(64, steps=10).fraction(3, 0.0, tokens=250) == 0.3
    assert Budget(64, steps=10).progress(3, 0.0, schedule, tokens=250) == 0.3


def test_steps_and_the_same_number_of_tokens_are_one_budget() -> None:
    steps, tokens = Budget(512, steps=300), Budget(512, tokens=300 * 512)
    schedule = Schedule(1e-3, 1e-4, 10)
    for step in (0, 10, 150, 299):
        assert steps.progress(step, 0.0, schedule) == tokens.progress(step, 0.0, schedule)
        assert steps.fraction(step, 0.0) == tokens.fraction(step, 0.0) < 1
    assert steps.fraction(300, 0.0) == tokens.fraction(300, 0.0) == 1


def test_a_budget_of_seconds_counts_seconds() -> None:
    budget = Budget(512, seconds=90.0)
    assert budget.progress(7, 45.0, Schedule(1e-3, 1e-4, 10)) == budget.fraction(7, 45.0) == 0.5
    assert budget.fraction(7, 91.0) == 1.0


@pytest.mark.parametrize("limits", [{}, {"steps": 1, "tokens": 1}, {"steps": 0}, {"seconds": math.inf}])
def test_impossible_budgets(limits: dict[str, float]) -> None:
    with pytest.raises(WkvError, match="a budget is one positive number"):
        Budget(8, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [(0, 0), (-1, 0), (1e-3, -1), (math.nan, 0), (1, 0, -1), (1, 0, 0, "step"), (1, 0, 0, "wsd", 0.0)]
)
def test_impossible_schedules(arguments: tuple[float, ...]) -> None:
    with pytest.raises(WkvError, match=r"learning rates must be|a schedule is one of|the decay of a schedule"):
        Schedule(*arguments)  # type: ignore[arg-type]
