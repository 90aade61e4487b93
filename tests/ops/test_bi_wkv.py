"""Bi-WKV: golden vectors, both backends against the equation written out over all pairs, masks, ranges, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.native_helpers import assert_near, instruction_sets, needs_native, poisoned_memory, threads
from wkv import native, ops
from wkv.errors import WkvError
from wkv.ops import native_bi_wkv

NAMES = ("log_w", "u", "k", "v")

each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
each_instruction_set = pytest.mark.parametrize("isa", instruction_sets())

Case = dict[str, Tensor]


def random_case(length: int, *, batch: int = 2, channels: int = 5, span: float = 5.0, seed: int = 0) -> Case:
    """log_w T from -span to span, keys of deviation 3; all exactly representable in float32."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    log_w = span * (2 * torch.rand(channels, generator=g) - 1) / length
    tokens = {name: normal(batch, length, channels) for name in ("k", "v", "dy")}
    case = {"log_w": log_w, "u": normal(channels), **tokens, "k": 3 * tokens["k"]}
    return {name: x.double() for name, x in case.items()}


def to(case: Case, dtype: torch.dtype) -> Case:
    return {name: x.to(dtype) for name, x in case.items()}


def run(case: Case, backend: str, form: str = "paper", mask: Tensor | None = None) -> dict[str, Tensor]:
    """y (0 where masked) and the gradient of every input as "d" + name."""
    leaves = [case[name].detach().clone().requires_grad_() for name in NAMES]
    if backend == "pairs":
        y = pairs(*leaves, form, mask)
    else:
        with ops.use_backend(backend):
            y = ops.bi_wkv(*leaves, form=form, mask=mask)
    assert y.isfinite().all()
    if mask is not None:
        y = y.masked_fill(~mask[:, :, None], 0)
    grads = torch.autograd.grad(y, leaves, case["dy"].to(y.dtype), materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(NAMES, grads, strict=True)}


def pairs(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, form: str, mask: Tensor | None) -> Tensor:
    """The definition: all weights [T, T] of every row and channel at once."""
    if mask is not None:
        rows = []
        for row, kept in enumerate(mask):
            y = 0 * v[row]
            if kept.any():
                y = y.index_put((kept.nonzero()[:, 0],), pairs(log_w, u, k[row, kept], v[row, kept], form, None))
            rows.append(y)
        return torch.stack(rows)
    length = k.shape[-2]
    t, i = torch.arange(length)[:, None, None], torch.arange(length)[None, :, None]
    distance = (t - i).abs()
    if form == "paper":
        exponents = torch.where(t == i, u, log_w * (distance - 1)) + k.unsqueeze(-3)
        return (exponents.softmax(-2) * v.unsqueeze(-3)).sum(-2)
    size = -(-length // 32)
    start = t // size * size
    inner, outer, grows = (log_w * (distance - 1)).exp(), (log_w * distance).exp(), (-log_w * distance).exp()
    bend = 1 - (-log_w).exp()
    weights = torch.where(i < start, outer, torch.where(i == start, inner, inner + bend * grows))
    weights = torch.where(i > t, outer, weights)
    weights = torch.where(i == t, u.exp() + bend * (t > start), weights) * k.unsqueeze(-3).exp()
    return (weights * v.unsqueeze(-3)).sum(-2) / weights.sum(-2)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize(
    ("form", "backend"),
    [("paper", "reference"), pytest.param("paper", "native", marks=needs_native), ("official", "reference")],
)
@pytest.mark.parametrize("length", [20, 49, 70])
def test_golden(length: int, form: str, backend: str, dtype: torch.dtype, bar: float) -> None:
    """The official kernel's gradients of k and v are not those of its own forward pass: not compared."""
    x = {name.split(".", 1)[1]: t for name, t in golden("vision_rwkv", "bi_wkv_op").items() if f"T{length}." in name}
    case = {"log_w": -x["w"], "u": x["u"], "k": x["k"], "v": x["v"], "dy": x["gy"]}
    found = run(to(case, dtype), backend, form)
    found = {"y": found["y"], "gw": -found["dlog_w"], "gu": found["du"], "gk": found["dk"], "gv": found["dv"]}
    names = ("y", "gw", "gu") if form == "official" else tuple(found)
    errors = {name: max_error(found[name], x[f"{form}.{name}"]) for name in names}
    assert all(error <= bar for error in errors.values()), errors


@each_backend
@settings(max_examples=25)
@given(
    length=st.integers(1, 70),
    batch=st.integers(1, 5),
    channels=st.integers(1, 70),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_definition(backend: str, length: int, batch: int, channels: int, masked: bool, seed: int) -> None:
    case = random_case(length, batch=batch, channels=channels, seed=seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=g) < 0.7 if masked else None
    expected = run(case, "pairs", mask=mask)
    assert_near(run(case, backend, mask=mask), expected, 1e-11)
    # Where few rows share a log_w, its gradient is small beside the terms it is the sum of.
    bar = 1e-5 if backend == "native" else 1e-4
    assert_near(run(to(case, torch.float32), backend, mask=mask), expected, bar)


@each_backend
@pytest.mark.parametrize("scale", [30.0, 80.0])
@pytest.mark.parametrize("span", [50.0, 0.0])
def test_extreme_keys_and_decays(span: float, scale: float, backend: str) -> None:
    """Keys of both signs over the whole range, and log_w T up to 50 of either sign."""
    case = random_case(70, channels=8, span=span)
    k = scale * (2 * torch.rand(2, 70, 8, generator=torch.Generator().manual_seed(1)) - 1)
    k[..., 0] = torch.linspace(-scale, scale, 70)
    k[..., 1] = torch.linspace(scale, -scale, 70)
    k[..., 2] = scale
    log_w = torch.linspace(-span, span, 8) / 70
    case |= {"k": k.double(), "log_w": log_w.double()}
    expected = run(case, "pairs")
    assert_near(run(case, backend), expected, 1e-11)
    assert_near(run(to(case, torch.float32), backend), expected, 5e-5)


@each_backend
def test_no_decay_is_an_average_and_full_decay_sees_neighbours(backend: str) -> None:
    case = random_case(40, batch=1, channels=2)
    case["log_w"] = torch.tensor([0.0, -1e4], dtype=torch.float64)
    assert_near(run(case, backend), run(case, "pairs"), 1e-11)
    expected = run(case, backend)
    case["log_w"] = torch.tensor([0.0, float("-inf")], dtype=torch.float64)
    assert_near(run(case, backend), expected, 1e-11)


@each_backend
@pytest.mark.parametrize("form", ["paper", "official"])
def test_one_token_is_its_value(form: str, backend: str) -> None:
    case = random_case(1)
    backend = "reference" if form == "official" else backend
    assert max_error(run(case, backend, form)["y"], case["v"]) <= 2e-6


@each_backend
def test_mask_equals_tokens_removed(backend: str) -> None:
    case = random_case(40, batch=1)
    mask = torch.rand(1, 40, generator=torch.Generator().manual_seed(2)) < 0.6
    full = run(case, backend, mask=mask)
    short = run({n: x[:, mask[0]] if x.ndim == 3 else x for n, x in case.items()}, backend)
    for name in ("y", "dk", "dv"):
        assert not full[name][:, ~mask[0]].any(), name
        full[name] = full[name][:, mask[0]]
    assert_near(full, short, 1e-12)


@each_backend
def test_missing_tokens_may_hold_anything(backend: str) -> None:
    case = random_case(40)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1] = False  # and a row may have no tokens at all
    expected = run(case, backend, mask=mask)
    spoiled = case | {n: case[n].masked_fill(~mask[:, :, None], float("nan")) for n in ("k", "v")}
    assert_near(run(spoiled, backend, mask=mask), expected, 0)
    with ops.use_backend(backend):
        y = ops.bi_wkv(*(spoiled[name] for name in NAMES), mask=mask)
    assert not y.masked_select(~mask[:, :, None]).any()


@pytest.mark.parametrize(("backend", "bar"), [("reference", 1e-4), pytest.param("native", 1e-5, marks=needs_native)])
@pytest.mark.parametrize("length", [196, 1000])
def test_long_sequences_keep_their_precision(length: int, backend: str, bar: float) -> None:
    case = random_case(length, channels=3)
    expected = run(case, "pairs" if length < 500 else "reference")
    assert_near(run(to(case, torch.float32), backend), expected, bar)


@needs_native
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 257])
def test_lengths(length: int) -> None:
    case = random_case(length, batch=1)
    assert_near(run(case, "native"), run(case, "pairs"), 1e-11)


@needs_native
def test_thousands_of_tokens_in_float32() -> None:
    case = random_case(3000, batch=1, channels=8)
    assert_near(run(to(case, torch.float32), "native"), run(case, "native"), 1e-5)


@each_instruction_set
def test_every_instruction_set_meets_the_bars(isa: str) -> None:
    case = random_case(70, channels=70)
    expected = run(case, "pairs")
    with native.use_instruction_set(isa):
        assert_near(run(case, "native"), expected, 1e-11)
        single = run(to(case, torch.float32), "native")
        assert_near(single, expected, 1e-5)
        with poisoned_memory():
            poisoned = run(to(case, torch.float32), "native")
    assert_near(poisoned, single, 0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    case = to(random_case(50, batch=5, channels=70), dtype)
    mask = torch.rand(5, 50, generator=torch.Generator().manual_seed(2)) < 0.8
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(case, "native", mask=mask))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend: str, dtype: torch.dtype) -> None:
    case = to(random_case(128, channels=37), dtype)
    found, expected = run(case, backend), run(to(case, torch.float64), "pairs")
    for name in found:
        assert found[name].dtype == dtype
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


@each_backend
def test_mixed_types_and_strides(backend: str) -> None:
    case = random_case(33)
    strided = case | {n: case[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("k", "v", "dy")}
    assert_near(run(strided, backend), run(case, backend), 1e-14)
    mixed = case | {"k": case["k"].bfloat16(), "v": case["v"].float(), "u": case["u"].half()}
    found, expected = run(mixed, backend), run(to(mixed, torch.float64), "pairs")
    assert [found[n].dtype for n in ("y", "dk", "du")] == [torch.float32, torch.bfloat16, torch.float16]
    assert_near(found, expected, 5e-3)


@settings(max_examples=15)
@given(length=st.integers(1, 200), seed=st.integers(0, 2**16))
def test_official_equals_its_definition(length: int, seed: int) -> None:
    """Up to the kernel's 1e-6 exp(max) in the denominator, which the definition here leaves out."""
    case = random_case(length, batch=1, channels=3, seed=seed)
    assert_near(run(case, "reference", "official"), run(case, "pairs", "official"), 2e-5)


def test_official_gradients() -> None:
    case = random_case(40, batch=1, channels=2)
    leaves = tuple(case[name].requires_grad_() for name in NAMES)
    assert torch.autograd.gradcheck(lambda *x: ops.bi_wkv(*x, form="official"), leaves)


def test_official_stays_finite() -> None:
    case = random_case(196, channels=8)
    case["log_w"] = torch.linspace(-50, 50, 8).double() / 196
    case["k"] = (80 * (2 * torch.rand(2, 196, 8, generator=torch.Generator().manual_seed(1)) - 1)).double()
    run(to(case, torch.float32), "reference", "official")


@needs_native
def test_opcheck() -> None:
    case = to(random_case(17), torch.float32)
    mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(2)) < 0.6
    for given_mask in (None, mask):
        inputs = [case[name] for name in NAMES]
        torch.library.opcheck(native_bi_wkv.forward_op, (*(x.clone().requires_grad_() for x in inputs), given_mask))
        states = native_bi_wkv.forward_op(*inputs, given_mask)[1]
        torch.library.opcheck(
            native_bi_wkv.backward_op,
            (case["dy"], *inputs, given_mask, states),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_native
def test_compile() -> None:
    torch.compiler.reset()

    def function(*x: Tensor) -> Tensor:
        return ops.bi_wkv(x[0], x[1], x[2].relu(), x[3]).sum(-1)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (33, 50):
        leaves = [to(random_case(length), torch.float32)[name].requires_grad_() for name in NAMES]
        found, expected = compiled(*leaves), function(*leaves)
        assert max_error(found, expected) <= 1e-6
        grads = torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        assert all(max_error(a, b) <= 1e-6 for a, b in zip(*grads, strict=True))


@needs_native
def test_autocast_changes_nothing() -> None:
    case = to(random_case(40), torch.float32)
    expected = run(case, "native")
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(run(case, "native"), expected, 0)


GOOD = {name: torch.zeros(5) for name in ("log_w", "u")} | {name: torch.zeros(2, 4, 5) for name in ("k", "v")}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("log_w", {"log_w": torch.zeros(4)}),
    ("u", {"u": torch.zeros(5).long()}),
    ("k", {"k": torch.zeros(2, 0, 5), "v": torch.zeros(2, 0, 5)}),
    ("k", {"k": torch.zeros(2, 4, 5, 1), "v": torch.zeros(2, 4, 5, 1)}),
    ("v", {"v": torch.zeros(2, 3, 5)}),
    ("mask", {"mask": torch.ones(2, 4)}),
    ("mask", {"mask": torch.ones(2, 4, dtype=torch.bool), "form": "official"}),
    ("form", {"form": "exact"}),
]


@pytest.mark.parametrize(("name", "changes"), BAD)
def test_bad_arguments_are_named(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(WkvError, match=f"^bi_wkv: {name} "):
        ops.bi_wkv(**(GOOD | changes))


def test_a_backend_without_the_official_form_says_so() -> None:
    with ops.use_backend("native"), pytest.raises(WkvError, match="'native' of bi_wkv_official"):
        ops.bi_wkv(**GOOD, form="official")
