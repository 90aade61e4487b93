"""The Triton kernels of WKV-4 against golden vectors and the equation in float64: values, states and every gradient."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import test_wkv4
from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.native_helpers import assert_near, poisoned_memory
from tests.ops.test_wkv4 import INPUTS, STATE, Case, assert_close, call, leaves_of, run
from wkv import ops
from wkv.errors import WkvError
from wkv.ops.gpu import wkv4

pytestmark = needs_triton

BAR = 1e-5


@pytest.fixture(autouse=True)
def short_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens: short sequences have many borders. Not where the name says "whole_chunks"."""
    if "whole_chunks" not in request.node.name:
        for name, value in {"CHUNK": 4, "GROUP": 2, "AHEAD": 2, "BLOCK": 256}.items():
            monkeypatch.setattr(wkv4, name, value)


def on_device(case: Case) -> Case:
    """In float32, on the device of the tests."""
    given = {f.name: getattr(case, f.name) for f in fields(case)}
    moved: dict[str, Any] = {name: x.to(DEVICE) for name, x in given.items() if isinstance(x, Tensor)}
    return replace(case, **moved, state=case.state and tuple(x.to(DEVICE) for x in case.state)).to(torch.float32)


def random_case(length: int, *, all_flags: bool = False, **options: Any) -> Case:
    """As `test_wkv4.random_case`, in float32 on the device; the first token always exists."""
    flags = {"state": True, "mask": True, "reset": True} if all_flags else {}
    case = on_device(test_wkv4.random_case(length, **flags | options))
    if case.mask is not None:
        case.mask[:, 0] = True  # a state without a token has no logarithm
    return case


def reference(case: Case) -> dict[str, Tensor]:
    """What the equation says, in float64."""
    return run(case.to(torch.float64), "reference")


def forward(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    with ops.use_backend("triton"), torch.no_grad():
        return call(leaves_of(case), case)


@pytest.mark.parametrize("name", ["normal", "zerostate", "extreme"])
def test_golden(name: str) -> None:
    expected = golden("wkv4", name)
    x = {name: tensor.to(DEVICE, torch.float32) for name, tensor in expected.items()}
    log_w = -x["w"].exp()
    state = None if name == "zerostate" else (x["aa0"], x["bb0"], x["pp0"])
    none = torch.zeros_like(x["k"][:, 0])
    found = run(Case(log_w, x["u"], x["k"], x["v"], state, None, None, x["dy"], none, none), "triton")
    renamed = {"log_den": "final_logden", "ratio": "final_ratio", "dnum": "daa0", "dden": "dbb0", "dmax": "dpp0"}
    found["dw"] = found.pop("dlog_w") * log_w
    found = {renamed.get(name, name): tensor.cpu() for name, tensor in found.items()}
    assert_close(found, {name: expected[name] for name in found}, BAR)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17])
def test_lengths(length: int) -> None:
    case = random_case(length, batch=1, all_flags=length in (1, 5, 17))
    assert_close(run(case, "triton"), reference(case), BAR)


def test_whole_chunks() -> None:
    case = random_case(130, batch=1, all_flags=True)
    assert_close(run(case, "triton"), reference(case), BAR)


def test_many_channels_in_whole_chunks() -> None:
    """More than a program has."""
    case = random_case(3, channels=70, batch=1)
    assert_close(run(case, "triton"), reference(case), BAR)


@pytest.mark.parametrize(("scale", "flags"), [(60.0, False), (100.0, True)])
def test_extreme_keys(scale: float, flags: bool) -> None:
    """Keys up to +-100, where exp(k) overflows float32, that jump, rise and fall; decays from 0 to -1e4."""
    case = random_case(20, channels=8, state=False, mask=flags, reset=flags)
    k = scale * (2 * torch.rand(2, 20, 8, generator=torch.Generator().manual_seed(1)) - 1)
    k[..., 0] = torch.linspace(-scale, scale, 20)
    k[..., 1] = torch.linspace(scale, -scale, 20)
    k[..., 2], k[..., 3] = scale, -scale
    log_w = -torch.tensor([0.1, 0.1, 0.0, 0.0, 1e-4, 1.0, 30.0, 1e4])
    silent = torch.zeros_like(case.d_num)  # gradients of num and den would follow the rounding of max
    case = replace(case, k=k.to(DEVICE), log_w=log_w.to(DEVICE), d_num=silent, d_den=silent)
    assert_near(run(case, "triton"), reference(case), BAR)


def test_extreme_decays() -> None:
    case = random_case(18, channels=6, all_flags=True)
    log_w = torch.tensor([0.0, -1e-8, -1.0, -100.0, -1e4, float("-inf")], device=DEVICE)
    case = replace(case, log_w=log_w)
    found = run(case, "triton")
    assert_close(found, reference(case), BAR)
    assert not found["dlog_w"][-1]  # what is forgotten whole has no gradient


def test_long_sequences_keep_their_precision_in_whole_chunks() -> None:
    """No exponent is rounded once per token: slow decays under large keys."""
    case = random_case(640, batch=1, channels=6, state=False)
    decays = -torch.logspace(-4, 1, 6).to(DEVICE)
    case = replace(case, log_w=decays, k=4 * case.k)
    y, (num, den, top) = forward(case)
    expected = run(case.to(torch.float64), "chunked")
    for name, found in (("y", y), ("log_den", den.log() + top), ("ratio", num / den)):
        assert max_error(found, expected[name]) <= 2e-6, name


@pytest.mark.parametrize("split", [1, 8])
def test_split_with_carried_state_equals_whole(split: int) -> None:
    case = random_case(18, batch=1, all_flags=True)
    whole = run(case, "triton")
    head, tail = case.tokens(0, split), case.tokens(split, 18)
    second = run(replace(tail, state=forward(head)[1]), "triton")
    first = run(replace(head, d_num=second["dnum"], d_den=second["dden"]), "triton")
    found = {name: second[name] for name in ("log_den", "ratio")} | {f"d{name}": first[f"d{name}"] for name in STATE}
    found |= {name: torch.cat((first[name], second[name]), 1) for name in ("y", "dk", "dv")}
    found |= {name: first[name] + second[name] for name in ("dlog_w", "du")}
    assert_close(found, whole, BAR)


def test_token_by_token_equals_whole() -> None:
    case = random_case(10, all_flags=True)
    expected, expected_state = forward(case)
    state, rows = case.state, []
    for t in range(10):
        y, state = forward(replace(case.tokens(t, t + 1), state=state))
        rows.append(y)
    assert state is not None
    assert max_error(torch.cat(rows, 1), expected) <= 1e-6
    assert max_error(state[0] / state[1], expected_state[0] / expected_state[1]) <= 1e-6


def test_missing_tokens_may_hold_anything() -> None:
    case = random_case(20, all_flags=True)
    assert case.mask is not None
    missing = ~case.mask[:, :, None]
    spoiled = {x: getattr(case, x).masked_fill(missing, float("nan")) for x in ("k", "v", "dy")}
    found = run(replace(case, **spoiled), "triton")
    assert_close(found, run(case, "triton"), 0)
    for name in ("dk", "dv"):
        assert not found[name].masked_select(missing).any()
    assert not forward(replace(case, **spoiled))[0].masked_select(missing).any()


@pytest.mark.parametrize("given_state", [False, True])
def test_row_without_tokens_keeps_its_state(given_state: bool) -> None:
    case = replace(random_case(20, state=given_state), mask=torch.zeros(2, 20, dtype=torch.bool, device=DEVICE))
    leaves = leaves_of(case)
    with ops.use_backend("triton"):
        y, state = call(leaves, case)
    assert not y.any()
    zeros = torch.zeros(2, 5, device=DEVICE)
    for found, expected in zip(state, case.state or (zeros, zeros, torch.full_like(zeros, -1e30)), strict=True):
        assert torch.equal(found, expected)
    if given_state:
        grads = torch.autograd.grad(state[:2], [leaves[x] for x in STATE], [case.d_num, case.d_den])
        assert torch.equal(grads[0], case.d_num)
        assert torch.equal(grads[1], case.d_den)
        assert max_error(grads[2], case.d_num * leaves["num"] + case.d_den * leaves["den"]) <= 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about NaN
@pytest.mark.parametrize("first", [1, 5])
def test_reset_wipes_whatever_the_state_holds(first: int) -> None:
    """Some tokens are missing, the next resets: nothing reads the state, and its gradient is 0."""
    mask, reset = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    mask[:, :first] = False
    reset[:, first] = True
    case = replace(random_case(9), mask=mask.to(DEVICE), reset=reset.to(DEVICE))
    state = tuple(torch.full_like(x, float("nan")) for x in case.state or ())
    for x in state:
        x[1] = float("inf")
    found, expected = run(replace(case, state=state), "triton"), run(replace(case, state=None), "triton")
    assert_close({name: found[name] for name in expected}, expected, 0)
    assert not any(found[f"d{name}"].any() for name in STATE)


def test_rows_are_independent() -> None:
    case = random_case(18, batch=3, all_flags=True)
    names = ("k", "v", "dy", "d_num", "d_den", "mask", "reset")
    single = replace(
        case,
        **{name: getattr(case, name)[1:2] for name in names},
        state=case.state and tuple(x[1:2] for x in case.state),
    )
    a, b = run(case, "triton"), run(single, "triton")
    for name in ("y", "log_den", "ratio", "dk", "dv", "dnum", "dden", "dmax"):
        assert torch.equal(a[name][1], b[name][0]), name


@pytest.mark.parametrize("flags", [False, True])
def test_results_are_overwritten_whole(flags: bool) -> None:
    case = random_case(13, state=flags, mask=flags, reset=flags)
    expected = run(case, "triton")
    with poisoned_memory():
        found = run(case, "triton")
    assert_close(found, expected, 0)


@pytest.mark.parametrize("result", ["y", "num", "den"])
def test_gradient_from_one_result_only(result: str) -> None:
    case = random_case(13)
    leaves = leaves_of(case)
    with ops.use_backend("triton"):
        y, (num, den, _) = call(leaves, case)
    output, gradient = {"y": (y, case.dy), "num": (num, case.d_num), "den": (den, case.d_den)}[result]
    grads = torch.autograd.grad(output, list(leaves.values()), gradient)
    none = torch.zeros_like(case.d_num)
    others = {"y": torch.zeros_like(y), "num": none, "den": none} | {result: gradient}
    expected = reference(replace(case, dy=others["y"], d_num=others["num"], d_den=others["den"]))
    for name, grad in zip(leaves, grads, strict=True):
        assert max_error(grad, expected[f"d{name}"]) <= BAR, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    case = random_case(24, channels=20, state=False).to(dtype)
    found, expected = run(case, "triton"), reference(case)
    assert found["y"].dtype == found["dk"].dtype == found["du"].dtype == dtype
    assert found["log_den"].dtype == torch.float32
    assert relative_rms(found["y"], expected["y"]) <= 5e-3
    assert max_error(found["log_den"], expected["log_den"]) <= 1e-5
    for name in ("dlog_w", "du", "dk", "dv"):
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


def test_mixed_types_and_strides() -> None:
    case = random_case(13, channels=6, all_flags=True)
    expected = run(case, "triton")
    names = ("k", "v", "dy", "mask", "reset")
    strided = {name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in names}
    channels_first = strided["k"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(run(replace(case, **strided | {"k": channels_first}), "triton"), expected, 0)
    state = case.state and (case.state[0].bfloat16(), *case.state[1:])
    mixed = replace(case, k=case.k.bfloat16(), u=case.u.half(), state=state)
    found = run(mixed, "triton")
    assert (found["y"].dtype, found["dk"].dtype, found["du"].dtype) == (torch.float32, torch.bfloat16, torch.float16)
    assert (found["dnum"].dtype, found["dden"].dtype) == (torch.bfloat16, torch.float32)
    assert_close(found, run(mixed.to(torch.float64), "reference"), 5e-3)


def test_nothing_is_kept_without_gradients() -> None:
    case = random_case(13, all_flags=True)
    with ops.use_backend("triton"):
        expected, expected_state = call(leaves_of(case), case)
    y, state = forward(case)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))
    arguments = [getattr(case, name) for name in INPUTS]
    assert wkv4.forward_op(*arguments, *[None] * 5, False)[-1].numel() == 0


def test_autocast_changes_nothing() -> None:
    case = random_case(9)
    case = replace(case, v=case.v.bfloat16())
    expected = forward(case)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = forward(case)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("flags", [False, True])
def test_opcheck(flags: bool) -> None:
    case = random_case(2, batch=1, state=flags, mask=flags, reset=flags)
    leaves = leaves_of(case)
    args = (*(leaves.get(name) for name in (*INPUTS, *STATE)), case.mask, case.reset)
    inputs = [None if x is None else x.detach() for x in args]
    fast = ("test_schema", "test_faketensor")
    if flags:
        torch.library.opcheck(wkv4.forward_op, (*args, True))
    torch.library.opcheck(wkv4.forward_op, (*inputs, False), test_utils=fast)
    saved = [x.detach() for x in wkv4.forward_op(*args, True)[3:]]
    torch.library.opcheck(wkv4.backward_op, (case.dy, case.d_num, None, *inputs, *saved), test_utils=fast)


def test_double_precision_is_left_to_others() -> None:
    case = random_case(3).to(torch.float64)
    with ops.use_backend("triton"), pytest.raises(WkvError, match=r"takes float32, .* found torch.float64"):
        call(leaves_of(case), case)
