"""The Triton kernels of Taylor attention: every promise the torch forms keep, and what is theirs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import taylor_cases, test_taylor
from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import golden, relative_rms
from tests.ops.native_helpers import assert_near, poisoned_memory
from tests.ops.taylor_cases import STATE, TOKENS, Case, run
from wkv import ops
from wkv.errors import WkvError
from wkv.ops.gpu import taylor

pytestmark = needs_triton
BAR = 5e-6
BLOCK = taylor.BLOCKS["tf32x3"][0]


def random_case(length: int, **options: Any) -> Case:
    """As `taylor_cases.random_case`, small and on the device of the tests, float32."""
    given: dict[str, Any] = {"batch": 1, "heads": 1, "size": 3, "dtype": torch.float32} | options
    case = taylor_cases.random_case("taylor_attention", length, **given)
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, Tensor)})


def check(case: Case, bar: float = BAR, **options: Any) -> dict[str, Tensor]:
    """Outputs and all gradients against what the torch form makes in float64."""
    found = run(case, "triton", **options)
    assert_near(found, run(case.to(torch.float64), "chunked", **options), bar)
    return found


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one block: many of them in few tokens."""
    monkeypatch.setattr(taylor, "SEGMENT", BLOCK)


@pytest.mark.parametrize(
    "promise",
    [
        test_taylor.test_golden,
        test_taylor.test_golden_layer_and_its_gradients,
        test_taylor.test_golden_prefill_and_decoding,
    ],
    ids=lambda promise: promise.__name__,
)
def test_golden(promise: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        test_taylor, "golden", lambda *names: {name: x.to(DEVICE) for name, x in golden(*names).items()}
    )
    promise("triton")


@pytest.mark.parametrize("length", [1, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1])
def test_lengths(length: int) -> None:
    check(random_case(length, size=2, mask=length % 2 == 0))


def test_segments() -> None:
    """Those of the real length, with the real blocks of half precision."""
    case = random_case(taylor.SEGMENT + 2, size=2, mask=True, reset=True, dtype=torch.float16)
    found, expected = run(case, "triton"), run(case.to(torch.float64), "chunked")
    for name, x in expected.items():
        assert relative_rms(found[name], x) <= 1e-3, name


@pytest.mark.parametrize("flags", [{"state": False, "reset": True}, {"mask": True, "reset": True}])
@pytest.mark.usefixtures("short_segments")
def test_masks_and_resets_over_segments(flags: dict[str, Any]) -> None:
    case = random_case(2 * BLOCK + 5, **flags)
    assert case.reset is not None
    case.reset[:, 2 * BLOCK] = True
    check(case)


@pytest.mark.parametrize("sizes", [(1, 16), (4, 32), (8, 64), (7, 112), (2, 128), (3, 256), (17, 1)])
def test_sizes(sizes: tuple[int, int]) -> None:
    """Of queries and of values, padded or not."""
    check(random_case(2, size=sizes[0], values=sizes[1]))


def test_bfloat16_inputs() -> None:
    case = random_case(70, size=8, values=16, state=False, dtype=torch.bfloat16)
    found, expected = run(case, "triton"), run(case.to(torch.float64), "reference")
    assert found["y"].dtype == found["dq"].dtype == found["dk"].dtype == found["dv"].dtype == torch.bfloat16
    assert found["kv"].dtype == found["z"].dtype == torch.float32
    for name in ("y", "kv", "z"):
        assert relative_rms(found[name], expected[name]) <= 5e-3, name
    for name in ("dq", "dk", "dv"):
        assert relative_rms(found[name], expected[name]) <= 1e-2, name


def test_mixed_types() -> None:
    """Products keep the digits of the widest type; a state may be of any."""
    case = random_case(20)
    half = {name: getattr(case, name).bfloat16() for name in ("v", "kv", "z", "dy")}
    found, exact = run(replace(case, **half), "triton"), run(replace(case, **half).to(torch.float64), "reference")
    assert [found[name].dtype for name in ("y", "dv", "dkv", "dq")] == [torch.bfloat16] * 3 + [torch.float32]
    for name, bar in {"y": 4e-3, "kv": 1e-6, "z": 1e-6, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3}.items():
        assert_near({name: found[name]}, {name: exact[name]}, bar)


def test_scale_eps_and_large_scores() -> None:
    case = random_case(20)
    check(replace(case, q=8 * case.q, k=8 * case.k), scale=0.3, eps=2.0)


@pytest.mark.parametrize("split", [45])
@pytest.mark.usefixtures("short_segments")
def test_split_with_carried_state_equals_whole(split: int) -> None:
    case = random_case(2 * BLOCK, mask=True, reset=True)
    head, tail = case.tokens(0, split), case.tokens(split, 2 * BLOCK)
    middle = run(head, "triton")
    second = run(replace(tail, kv=middle["kv"], z=middle["z"]), "triton")
    first = run(replace(head, d_kv=second["dkv"], d_z=second["dz"]), "triton")
    tokens = {name: torch.cat((first[name], second[name]), 1) for name in ("y", "dq", "dk", "dv")}
    expected = run(case.to(torch.float64), "chunked")
    assert_near({**second, **tokens, "dkv": first["dkv"], "dz": first["dz"]}, expected, BAR)


def test_missing_tokens_may_hold_anything() -> None:
    case = random_case(20, mask=True, reset=True)
    assert case.mask is not None
    clean = run(case, "triton")
    missing = ~case.mask[:, :, None, None]
    spoiled = {name: getattr(case, name).masked_fill(missing, float("nan")) for name in (*TOKENS, "dy")}
    found = run(replace(case, **spoiled), "triton")
    assert all(torch.equal(found[name], x) for name, x in clean.items())
    with ops.use_backend("triton"):
        for tokens in (case.tokens(0, 20), case.tokens(0, 10)):
            y, _ = tokens.call({**{name: getattr(tokens, name) for name in TOKENS}, "kv": case.kv, "z": case.z})
            assert y.isfinite().all()


def test_missing_tokens_before_the_first() -> None:
    """With eps 0 and no state a missing first token would be 0 / 0; a row without tokens keeps its state."""
    case = random_case(5, batch=2)
    mask = torch.tensor([[False, False, True, True, True], [False] * 5], device=DEVICE)
    found = run(replace(case, mask=mask, kv=None, z=None), "triton", eps=0.0)
    assert all(x.isfinite().all() for x in found.values())
    found = run(replace(case, mask=mask), "triton")
    for name, expected in {"kv": case.kv, "z": case.z, "dkv": case.d_kv, "dz": case.d_z}.items():
        assert expected is not None
        assert torch.equal(found[name][1], expected[1])


def test_reset_clears_anything() -> None:
    """Behind a reset no trace of the state before it is left, nor in front of it of the gradients behind it."""
    case, start = random_case(24), 20
    reset = torch.zeros(1, 24, dtype=torch.bool, device=DEVICE)
    reset[:, start] = True
    case, bad = replace(case, reset=reset), float("nan")
    broken = replace(case, kv=torch.full_like(case.d_kv, bad), z=torch.full_like(case.d_z, bad))
    backwards = replace(case, d_kv=torch.full_like(case.d_kv, bad), d_z=torch.full_like(case.d_z, bad))
    clean, found, other = check(case), run(broken, "triton"), run(backwards, "triton")
    for name in STATE:
        assert torch.equal(found[name], clean[name])
        assert torch.equal(other[f"d{name}"], clean[f"d{name}"])
    assert torch.equal(found["y"][:, start:], clean["y"][:, start:])
    for name in ("y", "dq", "dk", "dv"):
        assert torch.equal(other[name][:, :start], clean[name][:, :start]), name


def test_rows_are_independent() -> None:
    case, other = (random_case(20, batch=2, mask=True, reset=True, seed=seed) for seed in (0, 1))
    names = (*TOKENS, *STATE, "dy", "d_kv", "d_z", "mask", "reset")
    mixed = {name: torch.cat((getattr(case, name)[:1], getattr(other, name)[1:])) for name in names}
    a, b = run(case, "triton"), run(replace(case, **mixed), "triton")
    for name, x in a.items():
        assert torch.equal(x[0], b[name][0]), name


@pytest.mark.parametrize("loud", ["dy", "d_kv", "d_z"])
def test_gradient_from_one_result_only(loud: str) -> None:
    case = random_case(20)
    leaves = case.leaves()
    with ops.use_backend("triton"):
        y, (kv, z) = case.call(leaves)
    result = {"dy": y, "d_kv": kv, "d_z": z}[loud]
    grads = torch.autograd.grad(result, list(leaves.values()), getattr(case, loud))
    silent = {name: torch.zeros_like(getattr(case, name)) for name in ("dy", "d_kv", "d_z") if name != loud}
    expected = run(replace(case, **silent).to(torch.float64), "reference")
    names = [f"d{name}" for name in leaves]
    assert_near(dict(zip(names, grads, strict=True)), {name: expected[name] for name in names}, BAR)


@pytest.mark.usefixtures("short_segments")
def test_uninitialised_memory_is_never_read() -> None:
    case = random_case(BLOCK + 3, mask=True, reset=True)
    plain = run(case, "triton")
    with poisoned_memory():
        poisoned = run(case, "triton")
    assert all(torch.equal(poisoned[name], x) for name, x in plain.items())


def test_inputs_of_any_layout() -> None:
    case = random_case(5, heads=2)
    turned = {name: getattr(case, name).mT.contiguous().mT for name in (*TOKENS, "dy")}
    turned["kv"] = case.kv.mT.contiguous().mT if case.kv is not None else case.d_kv
    assert_near(run(replace(case, **turned), "triton"), run(case, "triton"), 0)


@pytest.mark.parametrize("flags", [{}, {"state": False, "mask": True, "reset": True, "batch": 2}])
@pytest.mark.parametrize("length", [5, taylor.FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients(length: int, flags: dict[str, Any], dtype: torch.dtype) -> None:
    """Few tokens take a way of their own when nothing is to be differentiated."""
    case = random_case(length, dtype=dtype, **flags)
    results = []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            y, (kv, z) = case.call({name: x.detach() for name, x in case.leaves().items()})
        assert y.dtype == dtype
        results.append({"y": y, "kv": kv, "z": z})
    assert_near(*results, BAR if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("sizes", [(16, 64), (7, 112), (32, 32)])
def test_steps_of_all_sizes(sizes: tuple[int, int]) -> None:
    case = random_case(2, size=sizes[0], values=sizes[1], reset=True, mask=True)
    given = {name: x.detach() for name, x in case.leaves().items()}
    with ops.use_backend("triton"), poisoned_memory():
        y, (kv, z) = case.call(given)
    with ops.use_backend("reference"):
        expected, (expected_kv, expected_z) = case.call(given)
    assert_near({"y": y, "kv": kv, "z": z}, {"y": expected, "kv": expected_kv, "z": expected_z}, BAR)


def arguments(length: int, **options: bool) -> list[Any]:
    case = random_case(length, **options)
    return [*(getattr(case, name) for name in (*TOKENS, *STATE)), 0.5, 1e-12, case.mask, case.reset]


def test_nothing_is_kept_without_gradients() -> None:
    kept = [[x.shape[0] for x in taylor.forward_op(*arguments(20), keep)[3:]] for keep in (True, False)]
    assert kept == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("flags", [True, False])
def test_opcheck(flags: bool) -> None:
    """What `torch.compile` and `torch.export` rely on."""
    shapes_only = ("test_schema", "test_faketensor")
    args = arguments(2, state=flags, mask=flags, reset=flags)
    y, _, _, *kept = taylor.forward_op(*args, True)
    case = random_case(2)
    gradients = (case.dy, case.d_kv, case.d_z) if flags else (None, None, case.d_z)
    inputs = (*gradients, y, *kept, *args[:3], args[5], *args[7:])
    torch.library.opcheck(taylor.backward_op, inputs, test_utils=shapes_only)
    learning = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and flags else x for x in args]
    utilities = (*shapes_only, "test_autograd_registration")
    torch.library.opcheck(taylor.forward_op, (*learning, flags), test_utils=utilities)


def test_cases_of_other_backends() -> None:
    """They are named, and run elsewhere by default."""
    bad = {
        "float64": {"dtype": torch.float64},
        "queries of up to 32": {"size": 33},
        "values of up to 256": {"values": 257},
    }
    for words, options in bad.items():
        case = random_case(2, **options)
        with ops.use_backend("triton"), pytest.raises(WkvError, match=words):
            case.call(case.leaves())
        assert case.call(case.leaves())[0].isfinite().all()
    with ops.use_backend("triton"), pytest.raises(WkvError, match="not part of this installation"):
        ops.linear_attention(case.q, case.k, case.v)
