"""WKV-5 against its golden vectors and against WKV-6; what both share is tested in test_wkv6.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.helpers import golden
from tests.ops.linear_cases import assert_close, random_case, run, run_golden

CASES = [f"{shape}_{kind}" for shape in ("b2", "n32", "n64") for kind in ("normal", "nostate", "extreme")]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 5e-6), (torch.float64, 1e-7)])
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, dtype: torch.dtype, bar: float, backend: str) -> None:
    expected = golden("wkv5", f"{name}_out")
    found = run_golden("wkv5", golden("wkv5", f"{name}_in"), dtype, backend)
    assert_close(found, expected, bar)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_wkv6_with_repeated_decay(backend: str) -> None:
    case = random_case("wkv5", 70)
    six = replace(case, operator="wkv6", log_w=case.log_w.expand_as(case.r))
    expected = run(six, backend)
    expected["dlog_w"] = expected["dlog_w"].sum((0, 1))
    assert_close(run(case, backend), expected, 1e-12)
