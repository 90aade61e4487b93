"""WKV-6 against its golden vectors, and everything WKV-5 and WKV-6 promise together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.linear_cases import INPUTS, OPERATORS, assert_close, random_case, run, run_golden
from wkv import ops
from wkv.errors import WkvError
from wkv.ops import linear_chunked

CASES = [f"{shape}_{kind}" for shape in ("b2", "n32", "n64") for kind in ("normal", "nostate", "extreme")]

both_operators = pytest.mark.parametrize("operator", ["wkv5", "wkv6"])
both_backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


def bar_of(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-7
    return 2e-4 if "extreme" in name else 1e-5


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, dtype: torch.dtype, backend: str) -> None:
    found = run_golden("wkv6", golden("wkv6", f"{name}_in"), dtype, backend)
    assert_close(found, golden("wkv6", f"{name}_out"), bar_of(name, dtype))


@pytest.mark.parametrize("name", CASES)
def test_chunked_gradients_do_not_cancel(name: str) -> None:
    """The decay gradient is gathered from its own terms, so extreme decays cost no accuracy."""
    found = run_golden("wkv6", golden("wkv6", f"{name}_in"), torch.float32, "chunked")
    assert_close(found, golden("wkv6", f"{name}_out"), 2e-6)


@both_operators
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 70),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 16]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(
    operator: str, length: int, batch: int, heads: int, size: int, flags: tuple[bool, bool, bool], seed: int
) -> None:
    state, mask, reset = flags
    case = random_case(
        operator, length, batch=batch, heads=heads, size=size, state=state, mask=mask, reset=reset, seed=seed
    )
    assert_close(run(case, "chunked"), run(case, "reference"), 1e-11)


@both_operators
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257])
def test_lengths(operator: str, length: int) -> None:
    case = random_case(operator, length, batch=1, size=16)
    expected = run(case, "reference")
    assert_close(run(case, "chunked"), expected, 1e-11)
    assert_close(run(case.to(torch.float32), "chunked"), expected, 5e-6)


@both_operators
@both_backends
@pytest.mark.parametrize("split", [1, 16, 32, 47])
def test_split_with_carried_state_equals_whole(operator: str, backend: str, split: int) -> None:
    case = random_case(operator, 48, mask=True, reset=True)
    head, tail = case.tokens(0, split), case.tokens(split, 48)
    whole = run(case, backend)
    middle = run(head, backend)["final"]
    second = run(replace(tail, state=middle), backend)
    first = run(replace(head, d_state=second["dstate"]), backend)
    joined = {
        "y": torch.cat((first["y"], second["y"]), 1),
        "final": second["final"],
        "dstate": first["dstate"],
        "du": first["du"] + second["du"],
        "dlog_w": first["dlog_w"] + second["dlog_w"]
        if operator == "wkv5"
        else torch.cat((first["dlog_w"], second["dlog_w"]), 1),
        **{f"d{x}": torch.cat((first[f"d{x}"], second[f"d{x}"]), 1) for x in "rkv"},
    }
    assert_close(joined, whole, 1e-12)


@both_operators
@both_backends
def test_mask_equals_tokens_removed(operator: str, backend: str) -> None:
    case = random_case(operator, 40, batch=1, mask=True)
    kept = case.mask[0].nonzero()[:, 0]
    names = ("r", "k", "v", "dy") + (("log_w",) if operator == "wkv6" else ())
    short = run(replace(case, mask=None, **{name: getattr(case, name)[:, kept] for name in names}), backend)
    full = run(case, backend)
    for name in ("y", "dr", "dk", "dv", "dlog_w")[: 5 if operator == "wkv6" else 4]:
        missing = full[name][:, ~case.mask[0]]
        assert torch.equal(missing, torch.zeros_like(missing)), name
        full[name] = full[name][:, kept]
    assert_close(full, short, 1e-12)


@both_operators
@both_backends
def test_missing_tokens_may_hold_anything(operator: str, backend: str) -> None:
    case = random_case(operator, 40, mask=True)
    names = ("r", "k", "v") + (("log_w",) if operator == "wkv6" else ())
    spoiled = {x: getattr(case, x).masked_fill(~case.mask[:, :, None, None], float("nan")) for x in names}
    assert_close(run(replace(case, **spoiled), backend), run(case, backend), 1e-12)


@both_operators
@both_backends
def test_row_without_tokens_keeps_its_state(operator: str, backend: str) -> None:
    case = random_case(operator, 40)
    case = replace(case, mask=torch.zeros(2, 40, dtype=torch.bool))
    found = run(case, backend)
    assert torch.equal(found["final"], case.state)
    assert torch.equal(found["dstate"], case.d_state)


@both_operators
@both_backends
@pytest.mark.parametrize("start", [0, 1, 16, 31, 32, 39])
def test_reset_equals_separate_runs(operator: str, backend: str, start: int) -> None:
    case = random_case(operator, 40, batch=1)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, start] = True
    found = run(replace(case, reset=reset), backend)
    second = run(replace(case.tokens(start, 40), state=None), backend)
    assert max_error(found["y"][:, start:], second["y"]) <= 1e-12
    assert max_error(found["final"], second["final"]) <= 1e-12
    assert max_error(found["dk"][:, start:], second["dk"]) <= 1e-12
    if start:
        first = run(replace(case.tokens(0, start), d_state=torch.zeros_like(case.d_state)), backend)
        assert max_error(found["y"][:, :start], first["y"]) <= 1e-12
        assert max_error(found["dv"][:, :start], first["dv"]) <= 1e-12
        assert max_error(found["dstate"], first["dstate"]) <= 1e-12
    else:
        assert not found["dstate"].any()


@both_operators
@both_backends
def test_rows_are_independent(operator: str, backend: str) -> None:
    case = random_case(operator, 40, batch=3, mask=True, reset=True)
    other = random_case(operator, 40, batch=3, mask=True, reset=True, seed=1)
    mixed = {
        name: torch.cat((getattr(case, name)[:1], getattr(other, name)[1:]))
        for name in ("r", "k", "v", "dy", "state", "d_state", "mask", "reset")
    }
    if operator == "wkv6":
        mixed["log_w"] = torch.cat((case.log_w[:1], other.log_w[1:]))
    a, b = run(case, backend), run(replace(case, **mixed), backend)
    for name in ("y", "final", "dr", "dk", "dv", "dstate"):
        assert torch.equal(a[name][0], b[name][0]), name


@both_operators
@pytest.mark.parametrize("decay", [0.0, -1e-8, -1.0, -100.0, -1e4, float("-inf")])
def test_extreme_decays(operator: str, decay: float) -> None:
    """One channel in three forgets at `decay`, the others as usual; nothing overflows, nothing turns into NaN."""
    case = random_case(operator, 70, size=9, reset=True)
    log_w = case.log_w.clone()
    log_w[..., ::3] = decay
    expected = run(replace(case, log_w=log_w), "reference")
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(run(replace(case, log_w=log_w), "chunked"), expected, 1e-11)
    assert_close(run(replace(case, log_w=log_w).to(torch.float32), "chunked"), expected, 5e-6)


@both_operators
@both_backends
@pytest.mark.parametrize("silent", ["dy", "d_state"])
def test_gradient_from_one_result_only(operator: str, backend: str, silent: str) -> None:
    case = random_case(operator, 40)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in INPUTS}
    with ops.use_backend(backend):
        y, final = OPERATORS[operator](**leaves)
    result, gradient = (final, case.d_state) if silent == "dy" else (y, case.dy)
    grads = torch.autograd.grad(result, list(leaves.values()), gradient, allow_unused=True)
    expected = run(replace(case, **{silent: torch.zeros_like(getattr(case, silent))}), "reference")
    for name, grad in zip(leaves, grads, strict=True):
        assert max_error(torch.zeros_like(leaves[name]) if grad is None else grad, expected[f"d{name}"]) <= 1e-11


@both_operators
@both_backends
def test_gradcheck(operator: str, backend: str) -> None:
    case = random_case(operator, 5, batch=1, heads=1, size=2, mask=True, reset=True, seed=4)
    leaves = [getattr(case, name).clone().requires_grad_() for name in INPUTS]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with ops.use_backend(backend):
            return OPERATORS[operator](*tensors, mask=case.mask, reset=case.reset)

    assert torch.autograd.gradcheck(call, leaves)


@both_operators
@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(operator: str, backend: str, dtype: torch.dtype) -> None:
    case = random_case(operator, 128, batch=1, size=32, state=False, dtype=dtype)
    found, expected = run(case, backend), run(case.to(torch.float64), "reference")
    assert found["y"].dtype == found["dk"].dtype == found["du"].dtype == dtype
    assert found["final"].dtype == torch.float32
    assert relative_rms(found["y"], expected["y"]) <= 5e-3
    assert max_error(found["final"], expected["final"]) <= 5e-6
    for name in ("dr", "dk", "dv", "dlog_w", "du"):
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


@both_operators
@both_backends
def test_autocast_changes_nothing(operator: str, backend: str) -> None:
    case = random_case(operator, 40, dtype=torch.float32)
    expected = run(case, backend)
    assert_close(run(case, backend, autocast=True), expected, 0)
    half = run(replace(case, v=case.v.bfloat16()), backend, autocast=True)
    assert half["y"].dtype == half["dv"].dtype == torch.bfloat16


@both_operators
@pytest.mark.parametrize("flags", [False, True])
def test_opcheck(operator: str, flags: bool) -> None:
    case = random_case(operator, 33, size=4, state=flags, mask=flags, reset=flags, dtype=torch.float32)
    args = [getattr(case, name) for name in INPUTS]
    args = [None if x is None else x.requires_grad_() for x in args]
    torch.library.opcheck(linear_chunked.forward_op, (*args, case.mask, case.reset))
    *_, S = linear_chunked.forward_op(*args, case.mask, case.reset)
    inputs = [x.detach() for x in args[:5]]
    torch.library.opcheck(
        linear_chunked.backward_op,
        (case.dy, case.d_state, S.detach(), *inputs, case.mask, case.reset),
        test_utils=("test_schema", "test_faketensor"),
    )


def twice(operator: str) -> Callable[..., Any]:
    """Two calls in a row, the state carried, with something around them to compile."""

    def function(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        y, state = OPERATORS[operator](r, log_w, k.relu(), v, u, mask=mask)
        return OPERATORS[operator](r, log_w, y, v, u, state, mask=mask)[0].sum(-1)

    return function


def compile_arguments(operator: str, length: int = 33) -> tuple[Tensor, ...]:
    case = random_case(operator, length, size=4, mask=True, dtype=torch.float32)
    inputs = tuple(getattr(case, name).requires_grad_() for name in INPUTS[:-1])
    assert case.mask is not None
    return (*inputs, case.mask)


@both_operators
def test_compile(operator: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(twice(operator), backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (33, 50):
        args = compile_arguments(operator, length)
        found, expected = compiled(*args), twice(operator)(*args)
        assert max_error(found, expected) <= 1e-6
        grads = torch.autograd.grad(found.sum(), args[:5]), torch.autograd.grad(expected.sum(), args[:5])
        assert all(max_error(a, b) <= 1e-6 for a, b in zip(*grads, strict=True))


@both_operators
def test_export(operator: str) -> None:
    class Twice(torch.nn.Module):
        def forward(
            self, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, mask: Tensor
        ) -> Tensor:  # export wants a fixed signature
            return twice(operator)(r, log_w, k, v, u, mask)

    args = tuple(x.detach() for x in compile_arguments(operator))
    with ops.use_backend("chunked"):
        program = torch.export.export(Twice(), args)
    assert any("linear_chunked" in str(node.target) for node in program.graph.nodes)
    assert max_error(program.module()(*args), twice(operator)(*args)) <= 1e-6


def bad_arguments(operator: str) -> dict[str, dict[str, Any]]:
    """Arguments that do not fit, by the name the error must give."""
    case = random_case(operator, 4, dtype=torch.float32)
    x = case.r
    return {
        "k": {"k": x[:, :3]},
        "v": {"v": x.long()},
        "log_w": {"log_w": case.log_w[..., :3]},
        "u": {"u": case.u[:1]},
        "state": {"state": case.state[:, :, :3]},
        "mask": {"mask": torch.ones(2, 4)},
        "reset": {"reset": torch.ones(2, 5, dtype=torch.bool)},
        "r": {name: getattr(case, name)[:, :0] for name in ("r", "k", "v")}
        | ({"log_w": case.log_w[:, :0]} if operator == "wkv6" else {}),
    }


@both_operators
@pytest.mark.parametrize("name", ["r", "k", "v", "log_w", "u", "state", "mask", "reset"])
def test_bad_arguments_are_named(operator: str, name: str) -> None:
    case = random_case(operator, 4, dtype=torch.float32)
    good = {x: getattr(case, x) for x in (*INPUTS, "mask", "reset")}
    with pytest.raises(WkvError, match=rf"^{operator}: {name} "):
        OPERATORS[operator](**(good | bad_arguments(operator)[name]))


@both_operators
def test_tokens_must_have_heads(operator: str) -> None:
    flat = torch.zeros(1, 4, 8)
    log_w = flat if operator == "wkv6" else torch.zeros(8)
    with pytest.raises(WkvError, match=rf"^{operator}: r must be \[B, T, H, N\]"):
        OPERATORS[operator](flat, log_w, flat, flat, torch.zeros(8))
