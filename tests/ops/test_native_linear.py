"""The C++ kernels of WKV-5 and WKV-6: every promise the torch forms keep, and what is theirs alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import test_wkv5, test_wkv6
from tests.ops.linear_cases import INPUTS, OPERATORS, Case, assert_close, random_case, run
from tests.ops.native_helpers import assert_near, instruction_sets, needs_native, poisoned_memory, threads
from wkv import native, ops
from wkv.ops.native_matrix import SEGMENT, linear, linear_backward_op, linear_op

pytestmark = needs_native
both_operators = pytest.mark.parametrize("operator", ["wkv5", "wkv6"])
each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())

PROMISES: list[Callable[[str, str], None]] = [
    test_wkv6.test_mask_equals_tokens_removed,
    test_wkv6.test_missing_tokens_may_hold_anything,
    test_wkv6.test_row_without_tokens_keeps_its_state,
    test_wkv6.test_rows_are_independent,
    test_wkv6.test_gradcheck,
    test_wkv6.test_autocast_changes_nothing,
]


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", test_wkv6.CASES)
def test_golden(name: str, dtype: torch.dtype, isa: str) -> None:
    with native.use_instruction_set(isa):
        test_wkv6.test_golden(name, dtype, "native")
        test_wkv5.test_golden(name, dtype, 5e-6 if dtype == torch.float32 else 1e-7, "native")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@both_operators
def test_promises(operator: str, promise: Callable[[str, str], None]) -> None:
    promise(operator, "native")


@both_operators
@pytest.mark.parametrize("split", [1, 16, 32, 47])
def test_split_with_carried_state_equals_whole(operator: str, split: int) -> None:
    test_wkv6.test_split_with_carried_state_equals_whole(operator, "native", split)


@both_operators
@pytest.mark.parametrize("start", [0, 1, 31, 32, 39])
def test_reset_equals_separate_runs(operator: str, start: int) -> None:
    test_wkv6.test_reset_equals_separate_runs(operator, "native", start)


@both_operators
@pytest.mark.parametrize("silent", ["dy", "d_state"])
def test_gradient_from_one_result_only(operator: str, silent: str) -> None:
    test_wkv6.test_gradient_from_one_result_only(operator, "native", silent)


@both_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(operator: str, dtype: torch.dtype) -> None:
    test_wkv6.test_half_precision_inputs(operator, "native", dtype)


def test_equals_wkv6_with_repeated_decay() -> None:
    test_wkv5.test_equals_wkv6_with_repeated_decay("native")


@both_operators
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 8, 17, 33, 64])),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    steepness=st.sampled_from([1.0, 1.0, 1e4, math.inf]),
    seed=st.integers(0, 2**16),
)
def test_equals_reference(
    operator: str, shape: tuple[int, int, int, int], flags: tuple[bool, bool, bool], steepness: float, seed: int
) -> None:
    """Any shape, decay, state, mask and reset: outputs and all gradients, in float64 and float32."""
    length, batch, heads, size = shape
    state, mask, reset = flags
    case = random_case(
        operator, length, batch=batch, heads=heads, size=size, state=state, mask=mask, reset=reset, seed=seed
    )
    case = replace(case, log_w=case.log_w * steepness).to(torch.float32).to(torch.float64)
    expected = run(case, "reference")
    assert_close(run(case, "native"), expected, 1e-11)
    assert_near(run(case.to(torch.float32), "native"), expected, 5e-6)


@both_operators
@pytest.mark.parametrize("length", [1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 257, 1000])
def test_lengths(operator: str, length: int) -> None:
    case = random_case(operator, length, batch=1, size=16)
    expected = run(case, "reference")
    assert_close(run(case, "native"), expected, 1e-11)
    # A decay that never changes is wrong by the same rounding at every token: the equation in float32 errs by 1.4e-5.
    bar = 2e-5 if operator == "wkv5" and length > 100 else 5e-6
    assert_close(run(case.to(torch.float32), "native"), expected, bar)


@each_instruction_set
@both_operators
@pytest.mark.parametrize("size", [2, 15, 16, 31, 32, 48, 100, 128, 256])
def test_sizes(operator: str, size: int, isa: str) -> None:
    case = random_case(operator, 40, batch=1, heads=1, size=size, mask=True, reset=True)
    expected = run(case, "reference")
    with native.use_instruction_set(isa):
        assert_close(run(case, "native"), expected, 1e-11)
        assert_close(run(case.to(torch.float32), "native"), expected, 5e-6)


@both_operators
@pytest.mark.parametrize("decay", [0.0, -1e-8, -100.0, -1e4, -math.inf])
def test_extreme_decays(operator: str, decay: float) -> None:
    case = random_case(operator, 70, size=9, reset=True)
    log_w = case.log_w.clone()
    log_w[..., ::3] = decay
    case = replace(case, log_w=log_w)
    expected = run(case, "reference")
    assert_close(run(case, "native"), expected, 1e-11)
    found = run(case.to(torch.float32), "native")
    assert_close(found, expected, 5e-6)
    if decay < -1000:
        assert not found["dlog_w"][..., ::3].any()


@both_operators
@pytest.mark.parametrize("shape", [(70, 2, 3, 16), (40, 1, 1, 64), (40, 1, 1, 100), (1, 1, 2, 64)])
def test_threads_change_nothing(operator: str, shape: tuple[int, int, int, int]) -> None:
    """Not a bit, with more threads than heads too."""
    length, batch, heads, size = shape
    case = random_case(operator, length, batch=batch, heads=heads, size=size, mask=True, dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(case, "native"))
    for other in results[1:]:
        assert all(torch.equal(other[name], x) for name, x in results[0].items())


@both_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_uninitialised_memory_is_never_read(operator: str, dtype: torch.dtype) -> None:
    case = random_case(operator, 45, size=9, mask=True, reset=True, dtype=dtype)
    plain = run(case, "native")
    with poisoned_memory():
        poisoned = run(case, "native")
    assert all(torch.equal(poisoned[name], x) for name, x in plain.items())


@each_instruction_set
@both_operators
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reset_clears_anything(operator: str, bad: float, isa: str) -> None:
    """Behind a reset no trace of the state before it is left, nor in front of it of the gradients behind it."""
    case = random_case(operator, 50)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, 40] = True
    case = replace(case, reset=reset)
    broken = replace(case, dy=case.dy.clone(), state=torch.full_like(case.state, bad))
    backwards = replace(case, d_state=torch.full_like(case.d_state, bad))
    with native.use_instruction_set(isa):
        clean, found, other = run(case, "native"), run(broken, "native"), run(backwards, "native")
    assert torch.equal(found["final"], clean["final"])
    assert torch.equal(found["dstate"], clean["dstate"])
    for name in ("y", "dr", "dk", "dv"):
        assert torch.equal(found[name][:, 40:], clean[name][:, 40:]), name
        assert torch.equal(other[name][:, :40], clean[name][:, :40]), name


def repeat_value(v: Tensor, scale: float) -> Tensor:
    """v [B, T, H, N] times `scale`, computed by WKV-6: a bonus alone, behind a reset."""
    one = torch.zeros_like(v, dtype=torch.float32)
    one[..., 0] = 1
    reset = torch.ones(v.shape[:2], dtype=torch.bool)
    u = torch.full(v.shape[2:], scale)
    return linear(one, -one, one, v, u, None, None, reset)[0]


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3, 1.7, 2**-7, 3e-5])
def test_half_types_are_read_and_rounded_as_torch_does(dtype: torch.dtype, scale: float, isa: str) -> None:
    """All 65536 values, but for NaN and infinity: they meet the state's zeros on their way."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1024, 1, 64)
    v = v.masked_fill(~v.isfinite(), 0)
    with native.use_instruction_set(isa):
        found = repeat_value(v, scale)
    assert torch.equal(found, (v.float() * torch.tensor(scale)).to(dtype))


@both_operators
def test_inputs_of_any_layout(operator: str) -> None:
    case = random_case(operator, 40, batch=3)
    turned = {x: getattr(case, x).transpose(0, 1).contiguous().transpose(0, 1) for x in ("r", "k", "v", "dy")}
    sliced = {"u": torch.cat([case.u, case.u], -1)[:, :8], "state": case.state.mT.contiguous().mT}
    assert_close(run(replace(case, **turned, **sliced), "native"), run(case, "native"), 0)


def arguments(case: Case) -> list[Tensor | None]:
    return [getattr(case, name) for name in INPUTS]


@both_operators
def test_nothing_is_kept_without_gradients(operator: str) -> None:
    case = random_case(operator, SEGMENT + 1)
    kept = [linear_op(*arguments(case), None, None, keep)[2].shape for keep in (True, False)]
    assert kept == [(2 * 2 * 2, 8, 8), (0, 8, 8)]


@both_operators
@pytest.mark.parametrize("flags", [False, True])
def test_opcheck(operator: str, flags: bool) -> None:
    case = random_case(operator, 40, size=4, state=flags, mask=flags, reset=flags, dtype=torch.float32)
    args = [None if x is None else x.requires_grad_() for x in arguments(case)]
    torch.library.opcheck(linear_op, (*args, case.mask, case.reset, True))
    inputs = [x.detach() for x in args[:5] if x is not None]
    torch.library.opcheck(linear_op, (*inputs, None, case.mask, case.reset, False))
    starts = linear_op(*inputs, None, case.mask, case.reset, True)[2]
    for dy, d_final in ((case.dy, case.d_state), (None, case.d_state), (case.dy, None)):
        torch.library.opcheck(linear_backward_op, (dy, d_final, starts, *inputs, case.mask, case.reset))


@both_operators
def test_compile(operator: str) -> None:
    torch.compiler.reset()
    twice = test_wkv6.twice(operator)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)
    with ops.use_backend("native"):
        for length in (33, 70):
            args = test_wkv6.compile_arguments(operator, length)
            found, expected = compiled(*args), twice(*args)
            assert_close({"y": found}, {"y": expected}, 1e-6)
            grads = torch.autograd.grad(found.sum(), args[:5]), torch.autograd.grad(expected.sum(), args[:5])
            assert_close(*(dict(zip(INPUTS, grad, strict=False)) for grad in grads), 1e-6)


@both_operators
@pytest.mark.parametrize("name", ["r", "k", "v", "log_w", "u", "state", "mask", "reset"])
def test_bad_arguments_are_named(operator: str, name: str) -> None:
    with ops.use_backend("native"):
        test_wkv6.test_bad_arguments_are_named(operator, name)


def test_runs_on_the_cpu_only() -> None:
    status = {status.name: status for status in ops.backends("wkv6", "cuda")}["native"]
    assert (status.usable, status.reason) == (False, "runs on the CPU only")
    assert {status.name for status in ops.backends("wkv6") if status.usable} >= {"native", "chunked", "reference"}
    assert OPERATORS.keys() == {"wkv5", "wkv6"}
