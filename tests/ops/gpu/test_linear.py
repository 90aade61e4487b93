"""The Triton kernels of WKV-5 and WKV-6: every promise the torch forms keep, and what is theirs alone."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import linear_cases
from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.linear_cases import INPUTS, OPERATORS, Case, assert_close, run
from tests.ops.native_helpers import poisoned_memory
from tests.ops.test_wkv6 import CASES
from wkv import ops
from wkv.errors import WkvError
from wkv.ops import gpu
from wkv.ops.gpu import linear

pytestmark = needs_triton
both_operators = pytest.mark.parametrize("operator", ["wkv5", "wkv6"])
BAR = 5e-6
LENGTH = linear.FLOAT32_BLOCKS[16].length


def random_case(operator: str, length: int, **options: Any) -> Case:
    """As `linear_cases.random_case`, small and on the device of the tests, float32."""
    given: dict[str, Any] = {"batch": 1, "heads": 1, "size": 16, "dtype": torch.float32} | options
    case = linear_cases.random_case(operator, length, **given)
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, Tensor)})


def reference(case: Case) -> dict[str, Tensor]:
    """What the equation says, in float64."""
    return run(case.to(torch.float64), "reference")


@pytest.mark.parametrize("name", CASES)
@both_operators
def test_golden(operator: str, name: str) -> None:
    inputs = {key: x.to(DEVICE) for key, x in golden(operator, f"{name}_in").items()}
    found = linear_cases.run_golden(operator, inputs, torch.float32, "triton")
    assert_close({key: x.cpu() for key, x in found.items()}, golden(operator, f"{name}_out"), BAR)


@pytest.mark.parametrize(
    ("operator", "length"),
    [("wkv6", n) for n in (1, 15, 16, 17, LENGTH - 1, LENGTH, LENGTH + 1, 130)] + [("wkv5", LENGTH + 1)],
)
def test_lengths(operator: str, length: int) -> None:
    case = random_case(operator, length, state=length % 2 == 1)
    assert_close(run(case, "triton"), reference(case), BAR)


@pytest.mark.parametrize(
    ("operator", "flags"), [("wkv6", ("mask",)), ("wkv6", ("reset",)), ("wkv5", ("mask", "reset"))], ids=str
)
def test_masks_and_resets(operator: str, flags: tuple[str, ...]) -> None:
    case = random_case(operator, 40, **dict.fromkeys(flags, True))
    found = run(case, "triton")
    assert_close(found, reference(case), BAR)
    if case.mask is not None:
        for name in ("dr", "dk", "dv") + (("dlog_w",) if operator == "wkv6" else ()):
            assert not found[name][~case.mask].any(), name


def test_masks_and_resets_over_chunks() -> None:
    case = random_case("wkv6", LENGTH + 6, mask=True, reset=True)
    assert_close(run(case, "triton"), reference(case), BAR)


@both_operators
def test_missing_tokens_may_hold_anything(operator: str) -> None:
    case = random_case(operator, 17, mask=True)
    names = ("r", "k", "v", "dy") + (("log_w",) if operator == "wkv6" else ())
    spoiled = replace(case, **{x: getattr(case, x).masked_fill(~case.mask[..., None, None], math.nan) for x in names})
    expected, found = run(case, "triton"), run(spoiled, "triton")
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    with torch.no_grad(), ops.use_backend("triton"):
        y, final = call(spoiled.tokens(0, 9))
    assert y.isfinite().all()
    assert final.isfinite().all()
    assert not y[~case.mask[:, :9]].any()


def test_row_without_tokens_keeps_its_state() -> None:
    case = random_case("wkv6", 17)
    case = replace(case, mask=torch.zeros(1, 17, dtype=torch.bool, device=DEVICE))
    found = run(case, "triton")
    assert torch.equal(found["final"], case.state)
    assert torch.equal(found["dstate"], case.d_state)


def test_rows_are_independent() -> None:
    case = random_case("wkv6", 17, batch=2, mask=True, reset=True)
    names = ("r", "log_w", "k", "v", "dy", "state", "d_state", "mask", "reset")
    alone = run(replace(case, **{name: getattr(case, name)[1:] for name in names}), "triton")
    together = run(case, "triton")
    for name in ("y", "final", "dr", "dlog_w", "dk", "dv", "dstate"):
        assert torch.equal(together[name][1:], alone[name]), name


@pytest.mark.parametrize("split", [LENGTH, LENGTH + 3])
def test_split_with_carried_state_equals_whole(split: int, whole: tuple[Case, dict[str, Tensor]]) -> None:
    case, expected = whole
    head, tail = case.tokens(0, split), case.tokens(split, LENGTH + 6)
    with torch.no_grad(), ops.use_backend("triton"):
        y, middle = call(head)
    second = run(replace(tail, state=middle), "triton")
    first = run(replace(head, d_state=second["dstate"]), "triton")
    assert max_error(y, expected["y"][:, :split]) <= BAR
    assert max_error(second["final"], expected["final"]) <= BAR
    assert max_error(first["dstate"], expected["dstate"]) <= BAR
    for name in ("y", "dr", "dk", "dv", "dlog_w"):
        assert max_error(torch.cat((first[name], second[name]), 1), expected[name]) <= BAR, name


@pytest.fixture(scope="module")
def whole() -> tuple[Case, dict[str, Tensor]]:
    """A call over two chunks and what the equation says."""
    case = random_case("wkv6", LENGTH + 6, mask=True, reset=True)
    return case, reference(case)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_reset_clears_anything() -> None:
    """Behind a reset no trace of the state before it is left, nor in front of it of the gradients behind it."""
    case = random_case("wkv6", LENGTH + 6)
    reset = torch.zeros(1, LENGTH + 6, dtype=torch.bool, device=DEVICE)
    reset[:, 40] = True
    case = replace(case, reset=reset)
    broken = replace(case, state=torch.full_like(case.state, math.nan))
    backwards = replace(case, d_state=torch.full_like(case.d_state, math.inf))
    clean, found, other = (run(x, "triton") for x in (case, broken, backwards))
    assert torch.equal(found["final"], clean["final"])
    assert torch.equal(other["dstate"], clean["dstate"])
    for name in ("y", "dr", "dk", "dv"):
        assert torch.equal(found[name][:, 40:], clean[name][:, 40:]), name
        assert torch.equal(other[name][:, :40], clean[name][:, :40]), name


@pytest.mark.parametrize(
    ("operator", "decay"), [("wkv6", x) for x in (0.0, -1e-8, -100.0, -1e4, -math.inf)] + [("wkv5", -math.inf)]
)
def test_extreme_decays(operator: str, decay: float) -> None:
    """One channel in three forgets at `decay`, the others as usual; nothing overflows, nothing turns into NaN."""
    case = random_case(operator, 40 if decay == -100 else 20, reset=True)
    log_w = case.log_w.clone()
    log_w[..., ::3] = decay
    case = replace(case, log_w=log_w)
    found = run(case, "triton")
    assert_close(found, reference(case), BAR)
    if decay < -1000:
        assert not found["dlog_w"][..., ::3].any()


@pytest.mark.parametrize("strength", [3.0, 15.0])
def test_gradients_of_decays_do_not_cancel(strength: float) -> None:
    """Where every token nearly forgets, those gradients are small beside the products of which they are parts."""
    case = random_case("wkv6", 40)
    case = replace(case, log_w=-strength * (1 + case.log_w.sigmoid()))
    assert max_error(run(case, "triton")["dlog_w"], reference(case)["dlog_w"]) <= BAR


@pytest.mark.parametrize("silent", ["dy", "d_state"])
def test_gradient_from_one_result_only(silent: str) -> None:
    case = random_case("wkv6", 17)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in INPUTS}
    with ops.use_backend("triton"):
        y, final = OPERATORS["wkv6"](**leaves)
    result, gradient = (final, case.d_state) if silent == "dy" else (y, case.dy)
    grads = torch.autograd.grad(result, list(leaves.values()), gradient)
    expected = reference(replace(case, **{silent: torch.zeros_like(getattr(case, silent))}))
    for name, grad in zip(leaves, grads, strict=True):
        assert max_error(grad, expected[f"d{name}"]) <= BAR, name


@pytest.mark.parametrize("size", gpu.SIZES)
def test_sizes(size: int) -> None:
    case = random_case("wkv5" if size == 32 else "wkv6", 5, size=size)
    assert_close(run(case, "triton"), reference(case), BAR)


@pytest.mark.parametrize(("operator", "dtype"), [("wkv6", torch.bfloat16), ("wkv5", torch.float16)], ids=str)
def test_half_precision_inputs(operator: str, dtype: torch.dtype) -> None:
    case = random_case(operator, 70, size=32, dtype=dtype)
    found, expected = run(case, "triton"), reference(case)
    assert found["y"].dtype == found["dk"].dtype == found["du"].dtype == found["dlog_w"].dtype == dtype
    assert found["final"].dtype == torch.float32
    errors = {name: relative_rms(found[name], x) for name, x in expected.items()}
    assert all(error <= (5e-3 if name in ("y", "final") else 1e-2) for name, error in errors.items()), errors


def test_mixed_types() -> None:
    case = random_case("wkv6", 17)
    case = replace(case, r=case.r.bfloat16(), k=case.k.half(), u=case.u.half(), state=case.state.bfloat16())
    found = run(case, "triton")
    assert found["y"].dtype == found["dlog_w"].dtype == torch.float32
    assert (found["dr"].dtype, found["dk"].dtype, found["dstate"].dtype) == (case.r.dtype, case.k.dtype, case.r.dtype)
    expected = reference(case)
    assert max_error(found["y"], expected["y"]) <= BAR
    assert max_error(found["dlog_w"], expected["dlog_w"]) <= BAR


@pytest.mark.parametrize(("operator", "dtype"), [("wkv5", torch.bfloat16), ("wkv6", torch.float32)], ids=str)
def test_uninitialised_memory_is_never_read(operator: str, dtype: torch.dtype) -> None:
    case = random_case(operator, 17, mask=True, reset=True, dtype=dtype)
    plain = run(case, "triton")
    with poisoned_memory():
        poisoned = run(case, "triton")
    assert all(torch.equal(poisoned[name], x) for name, x in plain.items())


@both_operators
def test_inputs_of_any_layout(operator: str) -> None:
    case = random_case(operator, 5, batch=2, mask=True)
    turned = {x: getattr(case, x).transpose(0, 1).contiguous().transpose(0, 1) for x in ("r", "k", "v", "dy", "mask")}
    sliced = {"u": torch.cat([case.u, case.u], -1)[:, :16], "state": case.state.mT.contiguous().mT}
    assert_close(run(replace(case, **turned, **sliced), "triton"), run(case, "triton"), 0)


def call(case: Case) -> tuple[Tensor, Tensor]:
    """The operator alone."""
    arguments = {name: getattr(case, name) for name in (*INPUTS, "mask", "reset")}
    return OPERATORS[case.operator](**arguments)


@both_operators
@pytest.mark.parametrize(("length", "size"), [(1, 16), (linear.SHORT, 64)])
def test_short_sequences_without_gradients(operator: str, length: int, size: int) -> None:
    """They run token by token."""
    case = random_case(operator, length, size=size, mask=length > 1, reset=length > 1, state=length > 1)
    with torch.no_grad(), ops.use_backend("triton"):
        y, final = call(case)
    expected = reference(case)
    assert max_error(y, expected["y"]) <= 1e-6
    assert max_error(final, expected["final"]) <= 1e-6
    log_w = torch.full_like(case.log_w, -math.inf)
    with torch.no_grad(), ops.use_backend("triton"):
        y, final = call(replace(case, log_w=log_w))
    assert y.isfinite().all()
    assert final.isfinite().all()


@pytest.mark.parametrize(
    ("length", "grad", "names"),
    [
        (linear.SHORT, False, ["recur"]),
        (linear.SHORT + 1, False, ["pass_states", "mix"]),
        (1, True, ["pass_states", "mix"]),
    ],
)
def test_kernels_launched(length: int, grad: bool, names: list[str]) -> None:
    case, launched = random_case("wkv6", length), []
    case.r.requires_grad_(grad)
    with gpu.launching(lambda kernel, *_: launched.append(kernel.fn.__name__)), ops.use_backend("triton"):
        call(case)
    assert launched == names


@pytest.mark.parametrize(("operator", "flags"), [("wkv5", False), ("wkv6", True)])
def test_opcheck(operator: str, flags: bool) -> None:
    case = random_case(operator, 2, state=flags, mask=flags, reset=flags)
    args = [None if x is None else x.requires_grad_() for x in (getattr(case, name) for name in INPUTS)]
    torch.library.opcheck(linear.forward_op, (*args, case.mask, case.reset))
    plain = [None if x is None else x.detach() for x in args]
    starts = linear.forward_op(*plain, case.mask, case.reset)[2]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear.recurrent_op, (*plain, case.mask, case.reset), test_utils=tests)
    dy, d_final = (case.dy, None) if flags else (None, case.d_state)
    backward = (dy, d_final, starts, *plain[:5], case.mask, case.reset)
    torch.library.opcheck(linear.backward_op, backward, test_utils=tests)


@both_operators
def test_what_does_not_fit_is_refused(operator: str) -> None:
    for options, message in (({"size": 8}, "heads of 16"), ({"dtype": torch.float64}, "float64")):
        case = random_case(operator, 2, **options)
        with ops.use_backend("triton"), pytest.raises(WkvError, match=message):
            call(case)
