"""The C++ kernels of linear and Taylor attention: every promise the torch forms keep, and what is theirs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import test_linear_attention, test_taylor
from tests.ops.native_helpers import assert_near, instruction_sets, needs_native, poisoned_memory, threads
from tests.ops.taylor_cases import OPERATORS, STATE, TOKENS, both_operators, random_case, run
from wkv import native, ops
from wkv.errors import WkvError
from wkv.ops import native_taylor
from wkv.ops.native_taylor import CHUNK

pytestmark = needs_native
each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())

PROMISES: list[Callable[[str, str], None]] = [
    test_taylor.test_step_by_step_equals_whole,
    test_taylor.test_mask_equals_tokens_removed,
    test_taylor.test_missing_tokens_may_hold_anything,
    test_taylor.test_row_without_tokens_keeps_its_state,
    test_taylor.test_missing_tokens_before_the_first,
    test_taylor.test_rows_are_independent,
    test_taylor.test_gradcheck,
    test_taylor.test_autocast_changes_nothing,
]
ALONE: list[Callable[[str], None]] = [
    test_taylor.test_golden_layer_and_its_gradients,
    test_taylor.test_golden_prefill_and_decoding,
    test_taylor.test_scale_and_eps,
    test_taylor.test_long_sequences_stay_exact,
    test_linear_attention.test_compile,
    test_linear_attention.test_equals_masked_weights,
    test_linear_attention.test_of_features_equals_taylor_attention,
    test_linear_attention.test_many_features_and_few_values,
]


@each_instruction_set
def test_golden(isa: str) -> None:
    with native.use_instruction_set(isa):
        test_taylor.test_golden("native")


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@both_operators
def test_promises(operator: str, promise: Callable[[str, str], None]) -> None:
    promise(operator, "native")


@pytest.mark.parametrize("promise", ALONE, ids=lambda promise: promise.__name__)
def test_promises_of_one_operator(promise: Callable[[str], None]) -> None:
    promise("native")


@both_operators
@pytest.mark.parametrize("split", [1, 40, 64, 139])
def test_split_with_carried_state_equals_whole(operator: str, split: int) -> None:
    test_taylor.test_split_with_carried_state_equals_whole(operator, "native", split)


@both_operators
@pytest.mark.parametrize("start", [0, 1, 63, 64, 127, 139])
def test_reset_equals_separate_runs(operator: str, start: int) -> None:
    test_taylor.test_reset_equals_separate_runs(operator, "native", start)


@each_instruction_set
@both_operators
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_reset_clears_anything(operator: str, bad: float, isa: str) -> None:
    with native.use_instruction_set(isa):
        test_taylor.test_reset_clears_anything(operator, "native", bad)


@both_operators
@pytest.mark.parametrize("loud", ["dy", "d_kv", "d_z"])
def test_gradient_from_one_result_only(operator: str, loud: str) -> None:
    test_taylor.test_gradient_from_one_result_only(operator, "native", loud)


@both_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(operator: str, dtype: torch.dtype) -> None:
    test_taylor.test_half_precision_inputs(operator, "native", dtype)


@both_operators
@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 150),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 3, 33])),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_equals_chunked(
    operator: str, length: int, shape: tuple[int, int, int, int], flags: tuple[bool, bool, bool], seed: int
) -> None:
    """Any shape, state, mask and reset: outputs and all gradients, in float64 and float32."""
    batch, heads, size, values = shape
    state, mask, reset = flags
    sizes = {"batch": batch, "heads": heads, "size": size, "values": values}
    case = random_case(operator, length, **sizes, state=state, mask=mask, reset=reset, seed=seed)
    case = case.to(torch.float32).to(torch.float64)
    expected = run(case, "chunked")
    assert_near(run(case, "native"), expected, 1e-11)
    assert_near(run(case.to(torch.float32), "native"), expected, 1e-5)


@both_operators
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 127, 130, 259])
def test_lengths(operator: str, length: int) -> None:
    case = random_case(operator, length, batch=1, size=8, values=8)
    expected = run(case, "reference")
    assert_near(run(case, "native"), expected, 1e-11)
    assert_near(run(case.to(torch.float32), "native"), expected, 5e-6)


@each_instruction_set
@both_operators
@pytest.mark.parametrize("sizes", [(2, 64), (16, 64), (15, 31), (24, 16), (1, 112), (33, 1)])
def test_sizes(operator: str, sizes: tuple[int, int], isa: str) -> None:
    case = random_case(operator, 70, batch=1, heads=1, size=sizes[0], values=sizes[1], mask=True, reset=True)
    expected = run(case, "chunked")
    with native.use_instruction_set(isa):
        assert_near(run(case, "native"), expected, 1e-11)
        assert_near(run(case.to(torch.float32), "native"), expected, 1e-5)


@each_instruction_set
@both_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_token(operator: str, dtype: torch.dtype, isa: str) -> None:
    """Decoding takes a way of its own when nothing is to be differentiated."""
    case = random_case(operator, 1, batch=6, size=5, values=7, dtype=dtype)
    case = replace(
        case,
        mask=torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.bool)[:, None],
        reset=torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.bool)[:, None],
    )
    for variant in (case, replace(case, mask=None, reset=None), replace(case, kv=None, z=None)):
        leaves = {name: x.detach() for name, x in variant.leaves().items()}
        results = []
        for backend in ("native", "reference"):
            with ops.use_backend(backend), native.use_instruction_set(isa):
                y, (kv, z) = variant.call(leaves)
            assert y.dtype == dtype
            results.append({"y": y, "kv": kv, "z": z})
        assert_near(*results, {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype])


@both_operators
@pytest.mark.parametrize("shape", [(70, 2, 3), (130, 1, 1), (1, 1, 2)])
def test_threads_change_nothing(operator: str, shape: tuple[int, int, int]) -> None:
    """Not a bit, with more threads than heads too."""
    length, batch, heads = shape
    case = random_case(operator, length, batch=batch, heads=heads, mask=True, dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(case, "native"))
    for other in results[1:]:
        assert all(torch.equal(other[name], x) for name, x in results[0].items())


@both_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 75])
def test_uninitialised_memory_is_never_read(operator: str, dtype: torch.dtype, length: int) -> None:
    case = random_case(operator, length, mask=True, reset=True, dtype=dtype)
    plain = run(case, "native")
    with poisoned_memory():
        poisoned = run(case, "native")
    assert all(torch.equal(poisoned[name], x) for name, x in plain.items())


@both_operators
def test_inputs_of_any_layout(operator: str) -> None:
    case = random_case(operator, 40, batch=3)
    names = (*TOKENS, "dy")
    turned = {name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in names}
    turned["kv"] = case.kv.mT.contiguous().mT
    assert_near(run(replace(case, **turned), "native"), run(case, "native"), 0)


def arguments(operator: str, length: int, **options: bool) -> list[Tensor | float | None]:
    case = random_case(operator, length, dtype=torch.float32, **options)
    scale = 0.0 if operator == "linear_attention" else 0.5
    return [*(getattr(case, name) for name in (*TOKENS, *STATE)), scale, 1e-12, case.mask, case.reset]


@both_operators
def test_nothing_is_kept_without_gradients(operator: str) -> None:
    kept = [native_taylor.forward_op(*arguments(operator, CHUNK + 1), keep)[3].shape[0] for keep in (True, False)]
    assert kept == [2 * 2 * 2, 0]


@test_linear_attention.in_turn
def test_opcheck(operator: str, flags: bool) -> None:
    shapes_only = ("test_schema", "test_faketensor")
    args = arguments(operator, 70, state=flags, mask=flags, reset=flags)
    torch.library.opcheck(native_taylor.forward_op, (*args, False), test_utils=shapes_only)
    *_, starts = native_taylor.forward_op(*args, True)
    case = random_case(operator, 70, dtype=torch.float32)
    for gradients in ((case.dy, case.d_kv, case.d_z), (None, None, case.d_z)):
        inputs = (*gradients, starts, *args[:3], *args[5:])
        torch.library.opcheck(native_taylor.backward_op, inputs, test_utils=shapes_only)
    learning = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    torch.library.opcheck(native_taylor.forward_op, (*learning, True))


@both_operators
def test_runs_on_the_cpu_only(operator: str) -> None:
    status = {status.name: status for status in ops.backends(operator, "cuda")}["native"]
    assert (status.usable, status.reason) == (False, "runs on the CPU only")
    assert {status.name for status in ops.backends(operator) if status.usable} >= {"native", "chunked", "reference"}
    assert set(OPERATORS) == {"linear_attention", "taylor_attention"}


@both_operators
def test_a_library_without_these_kernels_is_passed_over(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(name: str, parameters: str, returns: str = "i") -> None:
        raise WkvError(f"the native library has no function {name}")

    monkeypatch.setattr(native, "function", function)
    status = {status.name: status for status in ops.backends(operator)}["native"]
    assert (status.usable, status.reason) == (False, "the native library has no function wkv_taylor_forward")
    case = random_case(operator, 3, dtype=torch.float32)
    assert case.call(case.leaves())[0].isfinite().all()
    with ops.use_backend("native"), pytest.raises(WkvError, match="cannot run on cpu: the native library has no"):
        case.call(case.leaves())
