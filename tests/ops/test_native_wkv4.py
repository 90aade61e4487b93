"""The C++ kernels of WKV-4 against golden vectors and the reference: values, states and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.native_helpers import assert_near, instruction_sets, needs_native, poisoned_memory, threads
from tests.ops.test_wkv4 import (
    INPUTS,
    STATE,
    Case,
    assert_close,
    call,
    compile_arguments,
    leaves_of,
    random_case,
    run,
    twice,
)
from wkv import native, ops
from wkv.ops import native_wkv4

pytestmark = needs_native

each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())


@each_instruction_set
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("name", ["normal", "zerostate", "extreme"])
def test_golden(name: str, dtype: torch.dtype, bar: float, isa: str) -> None:
    expected = golden("wkv4", name)
    x = {name: tensor.to(dtype) for name, tensor in expected.items()}
    log_w = -x["w"].exp()
    state = None if name == "zerostate" else (x["aa0"], x["bb0"], x["pp0"])
    none = torch.zeros_like(x["k"][:, 0])
    with native.use_instruction_set(isa):
        found = run(Case(log_w, x["u"], x["k"], x["v"], state, None, None, x["dy"], none, none), "native")
    renamed = {"log_den": "final_logden", "ratio": "final_ratio", "dnum": "daa0", "dden": "dbb0", "dmax": "dpp0"}
    found["dw"] = found.pop("dlog_w") * log_w
    found = {renamed.get(name, name): tensor for name, tensor in found.items()}
    assert_close(found, {name: expected[name] for name in found}, bar)


def extreme_case(
    length: int, batch: int, channels: int, flags: tuple[bool, bool, bool], scale: float, seed: int
) -> Case:
    """Keys up to `scale`, decays from 0 to -1e4, all exactly representable in float32."""
    state, mask, reset = flags
    case = random_case(length, batch=batch, channels=channels, state=state, mask=mask, reset=reset, seed=seed)
    if case.mask is not None:
        case.mask[:, 0] = True  # a state without a token has no logarithm; see test_row_without_tokens
    g = torch.Generator().manual_seed(seed)
    exponents = 10 * torch.rand(channels, generator=g, dtype=torch.float64) - 6
    log_w = torch.where(torch.rand(channels, generator=g) < 0.2, 0.0, -(10**exponents))
    k = scale * (2 * torch.rand(case.k.shape, generator=g, dtype=torch.float64) - 1)
    return replace(case, log_w=log_w, k=k).to(torch.float32).to(torch.float64)


def in_float32(case: Case) -> Case:
    """The same call in float32, with the same gradients of num exp(max) and den exp(max): the max itself is rounded."""
    single = case.to(torch.float32)
    with ops.use_backend("native"):
        (_, (_, _, top)), (_, (_, _, rounded)) = call(leaves_of(case), case), call(leaves_of(single), single)
    scale = (rounded - top).exp()
    return replace(single, d_num=(case.d_num * scale).float(), d_den=(case.d_den * scale).float())


@settings(max_examples=60)
@given(
    length=st.integers(1, 70),
    batch=st.integers(1, 5),
    channels=st.integers(1, 70),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    scale=st.sampled_from([1.0, 10.0, 60.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_native_equals_reference(
    length: int, batch: int, channels: int, flags: tuple[bool, bool, bool], scale: float, seed: int
) -> None:
    case = extreme_case(length, batch, channels, flags, scale, seed)
    expected = run(case, "reference")
    assert_near(run(case, "native"), expected, 1e-11)
    assert_near(run(in_float32(case), "native"), expected, 1e-5)


@each_instruction_set
@pytest.mark.parametrize("flags", [(False, False, False), (True, True, True)])
def test_every_instruction_set_meets_the_bars(isa: str, flags: tuple[bool, bool, bool]) -> None:
    case = extreme_case(70, 2, 70, flags, 60.0, 1)
    expected = run(case, "reference")
    with native.use_instruction_set(isa):
        assert_near(run(case, "native"), expected, 1e-11)
        assert_near(run(in_float32(case), "native"), expected, 1e-5)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257, 1000])
def test_lengths(length: int) -> None:
    case = random_case(length, batch=1)
    expected = run(case, "chunked")
    assert_close(run(case, "native"), expected, 1e-11)
    assert_close(run(case.to(torch.float32), "native"), expected, 1e-5)


@pytest.mark.parametrize("isa", instruction_sets()[:1] + instruction_sets()[-1:])
def test_long_sequences_keep_their_precision(isa: str) -> None:
    """No exponent is rounded once per token: slow decays under large keys, over thousands of tokens, in float32."""
    case = random_case(3000, batch=1, channels=8, state=False)
    decays = -torch.logspace(-4, 1, 8, dtype=torch.float64)
    silent = torch.zeros_like(case.d_num)  # gradients of num and den would follow the rounding of max
    case = replace(case, log_w=decays, k=4 * case.k, d_num=silent, d_den=silent).to(torch.float32)
    expected = run(case.to(torch.float64), "chunked")
    with native.use_instruction_set(isa):
        found = run(case, "native")
    for name in ("y", "log_den", "ratio"):
        assert max_error(found[name], expected[name]) <= 2e-6, name
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    case = random_case(50, batch=5, channels=70, mask=True, reset=True).to(dtype)
    assert case.mask is not None
    case.mask[:, 0] = True
    first, *others = [_with_threads(case, count) for count in (1, 2, 3)]
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


def _with_threads(case: Case, count: int) -> dict[str, Tensor]:
    with threads(count):
        return run(case, "native")


@each_instruction_set
@pytest.mark.parametrize("flags", [False, True])
def test_results_are_overwritten_whole(isa: str, flags: bool) -> None:
    case = random_case(37, channels=37, state=flags, mask=flags, reset=flags).to(torch.float32)
    if case.mask is not None:
        case.mask[:, 0] = True
    with native.use_instruction_set(isa):
        expected = run(case, "native")
        with poisoned_memory():
            found = run(case, "native")
    assert_close(found, expected, 0)


@pytest.mark.parametrize("split", [1, 16, 32, 47])
def test_split_with_carried_state_equals_whole(split: int) -> None:
    case = random_case(48, mask=True, reset=True)
    whole = run(case, "native")
    head, tail = case.tokens(0, split), case.tokens(split, 48)
    with ops.use_backend("native"):
        _, state = call(leaves_of(head), head)
    second = run(replace(tail, state=state), "native")
    first = run(replace(head, d_num=second["dnum"], d_den=second["dden"]), "native")
    found = {name: second[name] for name in ("log_den", "ratio")} | {f"d{name}": first[f"d{name}"] for name in STATE}
    found |= {name: torch.cat((first[name], second[name]), 1) for name in ("y", "dk", "dv")}
    found |= {name: first[name] + second[name] for name in ("dlog_w", "du")}
    assert_close(found, whole, 1e-11)


def test_missing_tokens_may_hold_anything() -> None:
    case = random_case(40, mask=True, reset=True)
    assert case.mask is not None
    case.mask[:, 0] = True
    missing = ~case.mask[:, :, None]
    spoiled = {x: getattr(case, x).masked_fill(missing, float("nan")) for x in ("k", "v", "dy")}
    found = run(replace(case, **spoiled), "native")
    assert_close(found, run(case, "native"), 0)
    for name in ("dk", "dv"):
        assert not found[name].masked_select(missing).any()


@pytest.mark.parametrize("given_state", [False, True])
def test_row_without_tokens_keeps_its_state(given_state: bool) -> None:
    case = replace(random_case(40, state=given_state), mask=torch.zeros(2, 40, dtype=torch.bool))
    leaves = leaves_of(case)
    with ops.use_backend("native"):
        y, state = call(leaves, case)
    assert not y.any()
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    for found, expected in zip(state, case.state or (zeros, zeros, torch.full_like(zeros, -1e30)), strict=True):
        assert torch.equal(found, expected)
    if given_state:
        grads = torch.autograd.grad(state[:2], [leaves[x] for x in STATE], [case.d_num, case.d_den])
        assert torch.equal(grads[0], case.d_num)
        assert torch.equal(grads[1], case.d_den)
        assert max_error(grads[2], case.d_num * leaves["num"] + case.d_den * leaves["den"]) <= 1e-15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reset_wipes_whatever_the_state_holds(value: float) -> None:
    """The first token is missing, the second resets: nothing reads the state, and its gradient is 0."""
    mask, reset = torch.ones(2, 40, dtype=torch.bool), torch.zeros(2, 40, dtype=torch.bool)
    mask[:, 0] = False
    reset[:, 1] = True
    case = replace(random_case(40), mask=mask, reset=reset)
    state = tuple(torch.full_like(x, value) for x in case.state or ())
    found, expected = run(replace(case, state=state), "native"), run(replace(case, state=None), "native")
    assert_close({name: found[name] for name in expected}, expected, 0)
    assert not any(found[f"d{name}"].any() for name in STATE)


@pytest.mark.parametrize("decay", [0.0, -1e-8, -100.0, -1e4, float("-inf")])
def test_extreme_decays(decay: float) -> None:
    case = random_case(70, mask=True, reset=True)
    log_w = case.log_w.clone()
    log_w[::2] = decay
    case = replace(case, log_w=log_w)
    expected = run(case, "reference")
    assert_close(run(case, "native"), expected, 1e-11)
    assert_close(run(case.to(torch.float32), "native"), expected, 1e-5)


@pytest.mark.parametrize("result", ["y", "num", "den"])
def test_gradient_from_one_result_only(result: str) -> None:
    case = random_case(40)
    leaves = leaves_of(case)
    with ops.use_backend("native"):
        y, (num, den, _) = call(leaves, case)
    output, gradient = {"y": (y, case.dy), "num": (num, case.d_num), "den": (den, case.d_den)}[result]
    grads = torch.autograd.grad(output, list(leaves.values()), gradient)
    none = torch.zeros_like(case.d_num)
    others = {"y": torch.zeros_like(y), "num": none, "den": none} | {result: gradient}
    expected = run(replace(case, dy=others["y"], d_num=others["num"], d_den=others["den"]), "reference")
    for name, grad in zip(leaves, grads, strict=True):
        assert max_error(grad, expected[f"d{name}"]) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    case = random_case(128, channels=37, state=False).to(dtype)
    found, expected = run(case, "native"), run(case.to(torch.float64), "reference")
    assert found["y"].dtype == found["dk"].dtype == found["du"].dtype == dtype
    assert found["log_den"].dtype == torch.float32
    assert relative_rms(found["y"], expected["y"]) <= 5e-3
    assert max_error(found["log_den"], expected["log_den"]) <= 1e-5
    for name in ("dlog_w", "du", "dk", "dv"):
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_exactly(dtype: torch.dtype, isa: str) -> None:
    """The first token's y is its v: all 65536 numbers there are; later ones are rounded to nearest even."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None, None]
    zeros, k = torch.zeros(2**16), torch.zeros(1, 1, 2**16)
    g = torch.Generator().manual_seed(0)
    values = (torch.randn(1, 20, 100, generator=g) * 10 ** (12 * torch.rand(1, 20, 100, generator=g) - 8)).to(dtype)
    keys = torch.randn(1, 20, 100, generator=g)
    with native.use_instruction_set(isa), ops.use_backend("native"):
        y, _ = ops.wkv4(zeros, zeros, k, v)
        rounded, _ = ops.wkv4(-torch.ones(100), torch.ones(100), keys, values)
        exact, _ = ops.wkv4(-torch.ones(100), torch.ones(100), keys, values.float())
    assert torch.equal(y.isnan(), v.isnan())
    assert torch.equal(y.nan_to_num(0, 1, -1), v.nan_to_num(0, 1, -1))
    assert torch.equal(rounded, exact.to(dtype))


def test_mixed_types_and_strides() -> None:
    case = random_case(33, channels=6, mask=True, reset=True)
    assert case.mask is not None
    case.mask[:, 0] = True
    expected = run(case, "native")
    names = ("k", "v", "dy", "mask", "reset")
    strided = {name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in names}
    assert_close(run(replace(case, **strided), "native"), expected, 0)
    channels_first = case.k.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(run(replace(case, k=channels_first), "native"), expected, 0)
    mixed = replace(case, v=case.v.float(), k=case.k.bfloat16(), u=case.u.half())
    found = run(mixed, "native")
    assert (found["y"].dtype, found["dk"].dtype, found["du"].dtype) == (torch.float32, torch.bfloat16, torch.float16)
    assert found["log_den"].dtype == torch.float64
    expected = run(mixed, "reference")
    assert_close(found, expected, 5e-3)
    assert max_error(found["log_den"], expected["log_den"]) <= 1e-14


def test_autocast_changes_nothing() -> None:
    case = random_case(40).to(torch.float32)
    assert_close(run(case, "native", autocast=True), run(case, "native"), 0)
    half = run(replace(case, v=case.v.bfloat16()), "native", autocast=True)
    assert half["y"].dtype == half["dv"].dtype == torch.bfloat16


def test_nothing_is_kept_without_gradients() -> None:
    case = random_case(40)
    leaves = leaves_of(case)
    arguments = [getattr(case, name) for name in INPUTS]
    with ops.use_backend("native"):
        expected, expected_state = call(leaves, case)
        with torch.no_grad():
            y, state = call(leaves, case)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))
    assert native_wkv4.forward_op(*arguments, *[None] * 5, False)[-1].numel() == 0


@pytest.mark.parametrize("flags", [False, True])
def test_opcheck(flags: bool) -> None:
    case = random_case(17, state=flags, mask=flags, reset=flags).to(torch.float32)
    leaves = leaves_of(case)
    args = (*(leaves.get(name) for name in (*INPUTS, *STATE)), case.mask, case.reset)
    torch.library.opcheck(native_wkv4.forward_op, (*args, True))
    torch.library.opcheck(
        native_wkv4.forward_op,
        (*(None if x is None else x.detach() for x in args), False),
        test_utils=("test_schema", "test_faketensor"),
    )
    saved = [x.detach() for x in native_wkv4.forward_op(*args, True)[3:]]
    inputs = [None if x is None else x.detach() for x in args]
    torch.library.opcheck(
        native_wkv4.backward_op,
        (case.dy, case.d_num, case.d_den, *inputs, *saved),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile() -> None:
    torch.compiler.reset()
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)
    with ops.use_backend("native"):
        for length in (33, 50):
            args = compile_arguments(length)
            found, expected = compiled(*args), twice(*args)
            assert max_error(found, expected) <= 1e-6
            grads = torch.autograd.grad(found.sum(), args[:4]), torch.autograd.grad(expected.sum(), args[:4])
            assert all(max_error(a, b) <= 1e-6 for a, b in zip(*grads, strict=True))


def test_export() -> None:
    class Twice(torch.nn.Module):
        def forward(self, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return twice(log_w, u, k, v, mask)

    args = tuple(x.detach() for x in compile_arguments())
    with ops.use_backend("native"):
        program = torch.export.export(Twice(), args)
        assert any("wkv4_native" in str(node.target) for node in program.graph.nodes)
        assert max_error(program.module()(*args), twice(*args)) <= 1e-6


def test_it_is_the_default_on_the_cpu_alone() -> None:
    assert ops.dispatch.would_run("wkv4") == "native"
    reasons = {status.name: status.reason for status in ops.backends("wkv4", "meta")}
    assert reasons["native"] == "runs on the CPU only"
