"""The Triton kernels of Bi-WKV against golden vectors and the definition over all pairs: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import test_bi_wkv
from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.native_helpers import assert_near, poisoned_memory
from tests.ops.test_bi_wkv import NAMES, Case, run, to
from wkv import ops
from wkv.errors import WkvError
from wkv.ops.gpu import bi_wkv, wkv4

pytestmark = needs_triton

BAR = 1e-5


@pytest.fixture(autouse=True)
def short_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens: short sequences have many borders. Not where the name says "whole_chunks"."""
    if "whole_chunks" not in request.node.name:
        for name, value in {"CHUNK": 4, "GROUP": 2, "AHEAD": 2, "BLOCK": 256}.items():
            monkeypatch.setattr(wkv4, name, value)


def random_case(length: int, **options: int | float) -> Case:
    """As `test_bi_wkv.random_case`, in float32 on the device."""
    case = test_bi_wkv.random_case(length, **options)  # type: ignore[arg-type]
    return {name: x.to(DEVICE, torch.float32) for name, x in case.items()}


def random_mask(length: int, batch: int = 2) -> Tensor:
    return (torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < 0.6).to(DEVICE)


def definition(case: Case, mask: Tensor | None = None) -> dict[str, Tensor]:
    """In float64."""
    on_cpu = {name: x.cpu().double() for name, x in case.items()}
    found = run(on_cpu, "pairs", mask=None if mask is None else mask.cpu())
    return {name: x.to(DEVICE) for name, x in found.items()}


@pytest.mark.parametrize("length", [20, 49, 70])
def test_golden(length: int) -> None:
    x = {name.split(".", 1)[1]: t for name, t in golden("vision_rwkv", "bi_wkv_op").items() if f"T{length}." in name}
    case = {"log_w": -x["w"], "u": x["u"], "k": x["k"], "v": x["v"], "dy": x["gy"]}
    found = run({name: t.to(DEVICE, torch.float32) for name, t in case.items()}, "triton")
    found = {"y": found["y"], "gw": -found["dlog_w"], "gu": found["du"], "gk": found["dk"], "gv": found["dv"]}
    errors = {name: max_error(t.cpu(), x[f"paper.{name}"]) for name, t in found.items()}
    assert all(error <= 2e-5 for error in errors.values()), errors


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 17])
def test_lengths(length: int) -> None:
    case = random_case(length)
    assert_near(run(case, "triton"), definition(case), BAR)


def test_whole_chunks() -> None:
    case, mask = random_case(130, batch=1), random_mask(130, 1)
    assert_near(run(case, "triton", mask=mask), definition(case, mask), BAR)


def test_many_channels_in_whole_chunks() -> None:
    """More than a program has."""
    case = random_case(3, channels=70, batch=1)
    assert_near(run(case, "triton"), definition(case), BAR)


@pytest.mark.parametrize(("span", "scale"), [(50.0, 30.0), (50.0, 80.0), (0.0, 80.0)])
def test_extreme_keys_and_decays(span: float, scale: float) -> None:
    """Keys of both signs over the whole range, and log_w T up to 50 of either sign."""
    case = random_case(22, channels=8, span=span)
    k = scale * (2 * torch.rand(2, 22, 8, generator=torch.Generator().manual_seed(1)) - 1)
    k[..., 0] = torch.linspace(-scale, scale, 22)
    k[..., 1] = torch.linspace(scale, -scale, 22)
    k[..., 2] = scale
    case |= {"k": k.to(DEVICE), "log_w": torch.linspace(-span, span, 8).to(DEVICE) / 22}
    assert_near(run(case, "triton"), definition(case), 5e-5)


def test_no_decay_is_an_average_and_full_decay_sees_neighbours() -> None:
    case = random_case(18, batch=1, channels=3)
    case["log_w"] = torch.tensor([0.0, -1e4, -1e4], device=DEVICE)
    expected = definition(case)
    case["log_w"] = torch.tensor([0.0, -1e4, float("-inf")], device=DEVICE)
    found = run(case, "triton")
    assert_near(found, expected, BAR)
    assert not found["dlog_w"][1:].any()


def test_mask_equals_tokens_removed() -> None:
    case, mask = random_case(20, batch=1), random_mask(20, 1)
    full = run(case, "triton", mask=mask)
    short = run({n: x[:, mask[0]] if x.ndim == 3 else x for n, x in case.items()}, "triton")
    for name in ("y", "dk", "dv"):
        assert not full[name][:, ~mask[0]].any(), name
        full[name] = full[name][:, mask[0]]
    assert_near(full, short, BAR)


def test_missing_tokens_may_hold_anything() -> None:
    case, mask = random_case(18), random_mask(18)
    mask[1] = False  # and a row may have no tokens at all
    expected = run(case, "triton", mask=mask)
    spoiled = case | {n: case[n].masked_fill(~mask[:, :, None], float("nan")) for n in ("k", "v", "dy")}
    assert_near(run(spoiled, "triton", mask=mask), expected, 0)
    with ops.use_backend("triton"):
        y = ops.bi_wkv(*(spoiled[name] for name in NAMES), mask=mask)
    assert not y.masked_select(~mask[:, :, None]).any()


def test_rows_are_independent() -> None:
    case = random_case(18, batch=3)
    a = run(case, "triton")
    b = run({n: x[1:2] if x.ndim == 3 else x for n, x in case.items()}, "triton")
    for name in ("y", "dk", "dv"):
        assert torch.equal(a[name][1], b[name][0]), name


def test_results_are_overwritten_whole() -> None:
    case, mask = random_case(13), random_mask(13)
    expected = run(case, "triton", mask=mask)
    with poisoned_memory():
        found = run(case, "triton", mask=mask)
    assert_near(found, expected, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    case = to(random_case(24, channels=20), dtype)
    found, expected = run(case, "triton"), definition(case)
    for name in found:
        assert found[name].dtype == dtype
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


def test_mixed_types_and_strides() -> None:
    case = random_case(13)
    strided = case | {n: case[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("k", "v", "dy")}
    assert_near(run(strided, "triton"), run(case, "triton"), 0)
    mixed = case | {"k": case["k"].bfloat16(), "u": case["u"].half()}
    found = run(mixed, "triton")
    assert [found[n].dtype for n in ("y", "dk", "du")] == [torch.float32, torch.bfloat16, torch.float16]
    assert_near(found, definition(mixed), 5e-3)


def test_nothing_is_kept_without_gradients() -> None:
    case = random_case(13)
    arguments = [case[name] for name in NAMES]
    kept, lefts, _ = bi_wkv.forward_op(*arguments, None, True)
    y, *sums = bi_wkv.forward_op(*arguments, None, False)
    assert torch.equal(y, kept)
    assert lefts.shape == (2, 4, 3, 5)
    assert not any(x.numel() for x in sums)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    case, mask = random_case(2, batch=1), random_mask(2, 1) if masked else None
    inputs = [case[name] for name in NAMES]
    fast = ("test_schema", "test_faketensor")
    if masked:
        torch.library.opcheck(bi_wkv.forward_op, (*(x.clone().requires_grad_() for x in inputs), mask, True))
    torch.library.opcheck(bi_wkv.forward_op, (*inputs, mask, False), test_utils=fast)
    sums = bi_wkv.forward_op(*inputs, mask, True)[1:]
    torch.library.opcheck(bi_wkv.backward_op, (case["dy"], *inputs, mask, *sums), test_utils=fast)


def test_what_is_left_to_others() -> None:
    case = random_case(3)
    with ops.use_backend("triton"):
        with pytest.raises(WkvError, match=r"takes float32, .* found torch.float64"):
            ops.bi_wkv(*(case[name].double() for name in NAMES))
        with pytest.raises(WkvError, match="'triton' of bi_wkv_official"):
            ops.bi_wkv(*(case[name] for name in NAMES), form="official")
