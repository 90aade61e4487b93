"""The C++ kernels of WKV-7: every promise the torch forms keep, and what is theirs alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.native_helpers import assert_near, instruction_sets, needs_native, poisoned_memory, threads
from tests.ops.test_wkv7 import (  # noqa: F401  # run again here, with the `backend` below
    BARS,
    CASES,
    inputs,
    test_any_decay,
    test_bad_arguments,
    test_golden,
    test_gradient_of_complete_forgetting_is_zero,
    test_half_precision_inputs,
    test_mask_is_removal,
    test_mixed_types,
    test_reset_is_separate_runs,
    test_reset_of_a_masked_token_is_ignored,
    test_rows_do_not_touch_each_other,
    test_split_anywhere,
    test_state_may_be_absent,
)
from tests.ops.test_wkv7_chunked import assert_same, leaves, run
from wkv import native
from wkv.native import library
from wkv.ops import use_backend, wkv7
from wkv.ops.native_matrix import SEGMENT, wkv7_backward_op, wkv7_op
from wkv.ops.native_matrix import wkv7 as in_cpp
from wkv.ops.wkv7 import reference

pytestmark = needs_native
each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())


@pytest.fixture
def backend():
    with use_backend("native"):
        yield "native"


@each_instruction_set
@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_golden_on_every_instruction_set(case: str, dtype: torch.dtype, isa: str, backend: str) -> None:
    with native.use_instruction_set(isa):
        test_golden(backend, case, dtype)


def random_flags(batch: int, time: int, mask: bool, reset: bool) -> tuple[Tensor | None, Tensor | None]:
    exists = torch.rand(batch, time) < 0.8 if mask else None
    starts = torch.rand(batch, time) < 0.15 if reset else None
    return exists, starts & exists if starts is not None and exists is not None else starts


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 3, 8, 17, 33, 64])),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    steepness=st.sampled_from([1.0, 1.0, 8.0, 60.0, 1e4, math.inf]),
    seed=st.integers(0, 10**6),
)
def test_equals_reference(
    shape: tuple[int, int, int, int], has: tuple[bool, bool, bool], steepness: float, seed: int
) -> None:
    """Any shape, decay, state, mask and reset: outputs and all gradients, in float64 and float32."""
    torch.manual_seed(seed)
    xs = [x.float().double() for x in leaves(*shape)]
    xs[1] = xs[1] * steepness
    if not has[0]:
        xs[6] = torch.zeros_like(xs[6])
    flags = random_flags(*shape[:2], *has[1:])
    expected = run(reference, xs, flags)
    assert_same(run(in_cpp, xs, flags), expected)
    assert_near(named(run(in_cpp, [x.float() for x in xs], flags)), named(expected), 5e-6)


def named(results: list[Tensor]) -> dict[str, Tensor]:
    names = ("y", "final", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("time", [1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 257, 1000])
def test_lengths(time: int) -> None:
    torch.manual_seed(time)
    xs = leaves(1, time, 2, 16)
    expected = run(reference, xs)
    assert_same(run(in_cpp, xs), expected)
    assert_same(run(in_cpp, [x.float() for x in xs]), expected, 5e-6)


@each_instruction_set
@pytest.mark.parametrize("size", [2, 15, 16, 31, 32, 48, 100, 128, 256])
def test_sizes(size: int, isa: str) -> None:
    torch.manual_seed(size)
    xs = leaves(1, 40, 1, size)
    flags = random_flags(1, 40, True, True)
    expected = run(reference, xs, flags)
    with native.use_instruction_set(isa):
        assert_same(run(in_cpp, xs, flags), expected)
        assert_same(run(in_cpp, [x.float() for x in xs], flags), expected, 5e-6)


@pytest.mark.parametrize("shape", [(2, 70, 3, 16), (1, 40, 1, 64), (1, 40, 1, 100), (1, 1, 2, 64)])
def test_threads_change_nothing(shape: tuple[int, int, int, int]) -> None:
    """Not a bit, with more threads than heads too."""
    torch.manual_seed(0)
    xs, flags = [x.float() for x in leaves(*shape)], random_flags(*shape[:2], True, True)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(in_cpp, xs, flags))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_uninitialised_memory_is_never_read(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    xs, flags = [x.to(dtype) for x in leaves(2, 45, 3, 9)], random_flags(2, 45, True, True)
    plain = run(in_cpp, xs, flags)
    with poisoned_memory():
        poisoned = run(in_cpp, xs, flags)
    assert all(torch.equal(x, y) for x, y in zip(poisoned, plain, strict=True))


@each_instruction_set
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reset_clears_anything(bad: float, isa: str) -> None:
    """Behind a reset no trace of the state before it is left, nor in front of it of the gradients behind it."""
    torch.manual_seed(0)
    xs, reset = leaves(1, 50, 2, 8), torch.zeros(1, 50, dtype=torch.bool)
    reset[0, 40] = True
    clean = run(in_cpp, xs, (None, reset))
    broken = [x.clone() for x in xs]
    broken[6][:] = bad
    with native.use_instruction_set(isa):
        found = run(in_cpp, broken, (None, reset))
        broken = [*(x.clone() for x in xs[:6]), xs[6]]
        broken[0][:, 45:] = bad
        backwards = run(in_cpp, broken, (None, reset))
    assert_same([found[1], *(x[:, 40:] for x in (found[0], *found[2:8]))], after_reset(clean), 1e-14)
    assert_same([x[:, :40] for x in backwards[2:8]], [x[:, :40] for x in clean[2:8]], 1e-14)


def after_reset(results: list[Tensor]) -> list[Tensor]:
    return [results[1], *(x[:, 40:] for x in (results[0], *results[2:8]))]


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output: int) -> None:
    found = []
    for function in (in_cpp, reference):
        torch.manual_seed(0)
        xs = [x.requires_grad_() for x in leaves(2, 37, 2, 8)]
        out = function(*xs, None, None)[output]
        grads = torch.autograd.grad(out.square().sum(), xs, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads, strict=True)])
    assert_same(*found)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    xs = [x.requires_grad_() for x in leaves(2, 5, 1, 3)]
    mask, reset = torch.rand(2, 5) < 0.8, torch.rand(2, 5) < 0.3
    assert torch.autograd.gradcheck(lambda *a: in_cpp(*a, None, None), xs)
    assert torch.autograd.gradcheck(lambda *a: in_cpp(*a, mask, reset & mask), xs)


def test_inputs_of_any_layout() -> None:
    """Transposed, sliced and broadcast inputs and gradients."""
    torch.manual_seed(0)
    xs = leaves(3, 40, 2, 8)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs[:3]]
    strange += [torch.cat([x, x], -1)[..., :8] for x in xs[3:6]]
    strange.append(xs[6].mT.contiguous().mT)
    assert_same(run(in_cpp, strange), run(in_cpp, xs))
    one = xs[0].clone().requires_grad_()
    in_cpp(one, *xs[1:], None, None)[0].sum().backward()
    y, _ = in_cpp(one, *xs[1:], None, None)
    assert torch.equal(one.grad, torch.autograd.grad(y, one, torch.ones_like(y))[0])


def test_nothing_is_kept_without_gradients() -> None:
    xs = leaves(1, SEGMENT + 1, 2, 8)
    kept = [wkv7_op(*xs, None, None, keep)[2].shape for keep in (True, False)]
    assert kept == [(2 * 2, 8, 8), (0, 8, 8)]
    with torch.no_grad():
        y, final = in_cpp(*[x.requires_grad_() for x in xs], None, None)
    assert not y.requires_grad
    assert not final.requires_grad


def test_inputs_are_left_alone() -> None:
    xs = leaves(2, 40, 2, 8)
    before = [x.clone() for x in xs]
    run(in_cpp, xs)
    assert all(torch.equal(x, y) for x, y in zip(xs, before, strict=True))


@pytest.mark.parametrize("with_flags", [False, True])
def test_opcheck(with_flags: bool) -> None:
    torch.manual_seed(0)
    xs = [x.float().requires_grad_() for x in leaves(2, 40, 2, 4)]
    flags = random_flags(2, 40, with_flags, with_flags)
    torch.library.opcheck(wkv7_op, (*xs, *flags, True))
    detached = [x.detach() for x in xs]
    torch.library.opcheck(wkv7_op, (*detached[:6], None, *flags, False))
    starts = wkv7_op(*detached, *flags, True)[2]
    torch.library.opcheck(wkv7_backward_op, (detached[0], detached[6], starts, *detached[:6], *flags))
    torch.library.opcheck(wkv7_backward_op, (None, detached[6], starts, *detached[:6], *flags))


def test_compile(backend: str) -> None:
    """One graph, any batch and length, same numbers."""
    torch.manual_seed(0)
    torch.compiler.reset()
    compiled = torch.compile(lambda *xs: wkv7(*xs)[0].square().sum(), backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, time in ((2, 20), (3, 70)):
        xs = [x.requires_grad_() for x in leaves(batch, time, 2, 4)]
        found = torch.autograd.grad(compiled(*xs), xs)
        expected = torch.autograd.grad(wkv7(*xs)[0].square().sum(), xs)
        assert_same(list(found), list(expected))


def test_compile_may_come_before_the_first_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is then loaded while torch.compile traces, and must not be traced itself."""
    path = Path(library._Loaded.library._name)
    monkeypatch.setattr(library, "_find", lambda: path)
    monkeypatch.setattr(library._Loaded, "tried", False)
    torch.compiler.reset()
    compiled = torch.compile(wkv7, backend="aot_eager", fullgraph=True)
    xs = inputs(1, 20, 2, 4)
    assert_same(list(compiled(*xs)), list(wkv7(*xs)))


def test_export_with_any_batch_and_length(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return wkv7(r * 2, log_w, k, v, a, b)[0]

    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=2, max=65536)}
    exported = torch.export.export(Layer(), tuple(inputs(2, 20, 2, 4)), dynamic_shapes=(dims,) * 6)
    xs = inputs(3, 133, 2, 4)
    assert_same([exported.module()(*xs)], [Layer()(*xs)])


def test_autocast_does_not_reach_inside() -> None:
    torch.manual_seed(0)
    xs = [x.float() for x in leaves(2, 40, 2, 8)]
    plain = run(in_cpp, xs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(in_cpp, xs)
        half = in_cpp(*(x.bfloat16() for x in xs), None, None)
    assert all(torch.equal(x, y) for x, y in zip(inside, plain, strict=True))
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)
