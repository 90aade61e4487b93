"""The chunked form of WKV-7 against the equation, and as a torch.library operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.ops.helpers import max_error
from tests.ops.test_wkv7 import inputs
from wkv.ops import use_backend, wkv7, wkv7_chunked
from wkv.ops.wkv7 import chunked, reference
from wkv.ops.wkv7_chunked import backward_op, forward_op
from wkv.ops.wkv7_segment import _constants, _inverse


def run(
    function: Callable[..., tuple[Tensor, Tensor]],
    leaves: list[Tensor],
    flags: tuple[Tensor | None, Tensor | None] = (None, None),
    seed: int = 0,
) -> list[Tensor]:
    """y, final state and the gradients of all leaves (r, log_w, k, v, a, b, state) under fixed random dy and ds."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y, final = function(*leaves, *flags)
    generator = torch.Generator().manual_seed(seed)
    dy, ds = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, final))
    return [y, final, *torch.autograd.grad([y, final], leaves, [dy, ds])]


def assert_same(one: list[Tensor], other: list[Tensor], bar: float = 1e-11) -> None:
    errors = [max_error(x, y) for x, y in zip(one, other, strict=True)]
    assert max(errors) < bar, errors


def leaves(batch: int, time: int, heads: int, size: int) -> list[Tensor]:
    return [*inputs(batch, time, heads, size), torch.randn(batch, heads, size, size, dtype=torch.float64)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 5), st.integers(1, 70), st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 8, 16, 64])
    ),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    steepness=st.sampled_from([1.0, 1.0, 8.0, 60.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_reference(
    shape: tuple[int, int, int, int], has: tuple[bool, bool, bool], steepness: float, seed: int
) -> None:
    """Any shape, decay, state, mask and reset: outputs and all gradients in float64."""
    torch.manual_seed(seed)
    xs = leaves(*shape)
    xs[1] = xs[1] * steepness
    if not has[0]:
        xs[6] = torch.zeros_like(xs[6])
    mask = torch.rand(shape[:2]) < 0.8 if has[1] else None
    reset = torch.rand(shape[:2]) < 0.15 if has[2] else None
    flags = mask, reset & mask if mask is not None and reset is not None else reset
    assert_same(run(chunked, xs, flags), run(reference, xs, flags))


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 63, 64, 65, 257])
def test_lengths(time: int) -> None:
    torch.manual_seed(time)
    xs = leaves(2, time, 2, 16)
    assert_same(run(chunked, xs), run(reference, xs))


@pytest.mark.parametrize("length", [1, 8, 32, 64])
def test_chunk_lengths_and_many_segments(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small segments: sequences are grouped and every state is handed on; a GPU's chunks hold 64 tokens."""
    monkeypatch.setitem(wkv7_chunked.CHUNK, "cpu", length)
    monkeypatch.setitem(wkv7_chunked.SEGMENT, "cpu", 2 * 8 * 128)
    torch.manual_seed(length)
    xs, reset = leaves(7, 150, 2, 8), torch.rand(7, 150) < 0.02
    assert_same(run(chunked, xs), run(reference, xs))
    assert_same(run(chunked, xs, (None, reset)), run(reference, xs, (None, reset)))


def test_default_segments_at_full_size() -> None:
    """Large enough for several segments and groups of sequences."""
    torch.manual_seed(0)
    single = [x.float() for x in leaves(6, 200, 4, 64)]
    assert_same(run(chunked, single), run(reference, single), 5e-6)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    xs = [x.requires_grad_() for x in leaves(2, 5, 1, 3)]
    mask, reset = torch.rand(2, 5) < 0.8, torch.rand(2, 5) < 0.3
    assert torch.autograd.gradcheck(lambda *a: chunked(*a, None, None), xs)
    assert torch.autograd.gradcheck(lambda *a: chunked(*a, mask, reset & mask), xs)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output: int) -> None:
    torch.manual_seed(0)
    found = []
    for function in (chunked, reference):
        xs = [x.requires_grad_() for x in leaves(2, 37, 2, 8)]
        out = function(*xs, None, None)[output]
        grads = torch.autograd.grad(out.square().sum(), xs, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads, strict=True)])
        torch.manual_seed(0)
    assert_same(*found)


def test_only_some_inputs_need_gradients() -> None:
    torch.manual_seed(0)
    xs = leaves(1, 20, 2, 8)
    full = run(chunked, xs)
    xs[3].requires_grad_()
    y, final = chunked(*xs, None, None)
    generator = torch.Generator().manual_seed(0)
    dy, ds = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, final))
    assert torch.equal(torch.autograd.grad([y, final], xs[3], [dy, ds])[0], full[5])


def test_inputs_of_any_layout() -> None:
    """Transposed, sliced and broadcast inputs and gradients."""
    torch.manual_seed(0)
    xs = leaves(3, 40, 2, 8)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs[:3]]
    strange += [torch.cat([x, x], -1)[..., :8] for x in xs[3:6]]
    strange.append(xs[6].mT.contiguous().mT)
    assert_same(run(chunked, strange), run(chunked, xs))
    one = xs[0].clone().requires_grad_()
    y, _ = chunked(one, *xs[1:], None, None)
    y.sum().backward()
    other = torch.autograd.grad(chunked(one, *xs[1:], None, None)[0], one, torch.ones_like(y))[0]
    assert torch.equal(one.grad, other)
    same = chunked(*(x[:1].expand(3, -1, -1, -1) for x in xs[:6]), None, None, None)[0]
    assert max_error(same[2], same[0]) < 1e-14


@pytest.mark.parametrize("length", [16, 64])
def test_repeated_direction_is_solved_accurately(length: int) -> None:
    """One key removed by every token: the powers of the score matrix hold huge binomials, its inverse only +-1."""
    lower = -torch.ones(length, length).tril(-1)
    inverse = _inverse(lower[None], _constants(length, torch.float32, torch.device("cpu")).blocks)[0]
    assert torch.equal(inverse, torch.eye(length) - torch.eye(length).roll(1, 0).tril())
    torch.manual_seed(0)
    xs = leaves(1, 64, 1, 16)
    direction = normalize(torch.randn(16, dtype=torch.float64), dim=0).expand_as(xs[0])
    xs[1], xs[4], xs[5] = xs[1] * 1e-4, -direction, direction.clone()
    single = [x.float() for x in xs]
    assert_same(run(chunked, single), run(reference, [x.double() for x in single]), 5e-6)


def test_uninitialised_memory_is_never_read() -> None:
    """torch fills fresh memory with NaN in this mode."""
    torch.manual_seed(0)
    xs, mask, reset = leaves(3, 45, 2, 8), torch.rand(3, 45) < 0.7, torch.rand(3, 45) < 0.1
    plain = [run(chunked, xs), run(chunked, xs, (mask, reset & mask))]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = [run(chunked, xs), run(chunked, xs, (mask, reset & mask))]
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(poisoned, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_nothing_is_kept_without_gradients() -> None:
    xs = leaves(1, 20, 2, 8)
    kept = [forward_op(*xs, None, None, keep)[2].numel() for keep in (True, False)]
    assert kept == [2 * 8 * 8, 0]
    with torch.no_grad():
        y, final = chunked(*[x.requires_grad_() for x in xs], None, None)
    assert not y.requires_grad
    assert not final.requires_grad


def test_inputs_are_left_alone() -> None:
    xs = leaves(2, 20, 2, 8)
    before = [x.clone() for x in xs]
    run(chunked, xs)
    starts = forward_op(*xs, None, None, True)[2]
    copy = starts.clone()
    backward_op(torch.randn_like(xs[0]), None, starts, *xs[:6], None, None)
    assert all(torch.equal(x, y) for x, y in zip([*xs, starts], [*before, copy], strict=True))


@pytest.mark.parametrize("with_flags", [False, True])
def test_opcheck(with_flags: bool) -> None:
    torch.manual_seed(0)
    xs = [x.float().requires_grad_() for x in leaves(2, 20, 2, 4)]
    mask, reset = torch.rand(2, 20) < 0.8, torch.rand(2, 20) < 0.2
    flags = (mask, reset) if with_flags else (None, None)
    torch.library.opcheck(forward_op, (*xs, *flags, True))
    detached = [x.detach() for x in xs]
    torch.library.opcheck(forward_op, (*detached[:6], None, *flags, False))
    starts = forward_op(*detached, *flags, True)[2]
    torch.library.opcheck(backward_op, (detached[0], detached[6], starts, *detached[:6], *flags))
    torch.library.opcheck(backward_op, (None, detached[6], starts, *detached[:6], *flags))


def test_compile() -> None:
    """One graph, any batch and length, same numbers."""
    torch.manual_seed(0)
    compiled = torch.compile(lambda *xs: wkv7(*xs)[0].square().sum(), backend="aot_eager", fullgraph=True, dynamic=True)
    with use_backend("chunked"):
        for batch, time in ((2, 20), (3, 33)):
            xs = [x.requires_grad_() for x in leaves(batch, time, 2, 4)]
            found = torch.autograd.grad(compiled(*xs), xs)
            expected = torch.autograd.grad(wkv7(*xs)[0].square().sum(), xs)
            assert_same(list(found), list(expected))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return wkv7(r * self.scale, log_w, k, v, a, b)


def test_export_with_any_batch_and_length() -> None:
    torch.manual_seed(0)
    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=2, max=65536)}
    exported = torch.export.export(Layer(), tuple(inputs(2, 20, 2, 4)), dynamic_shapes=(dims,) * 6)
    xs = inputs(3, 133, 2, 4)
    assert_same(list(exported.module()(*xs)), list(wkv7(*xs)))


def test_autocast_does_not_reach_inside() -> None:
    torch.manual_seed(0)
    xs = [x.float() for x in leaves(2, 40, 2, 8)]
    plain = run(chunked, xs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(chunked, xs)
        half = chunked(*(x.bfloat16() for x in xs), None, None)
        equation = reference(*xs, None, None)
    assert all(torch.equal(x, y) for x, y in zip(inside, plain, strict=True))
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)
    assert_same(list(equation), plain[:2], 5e-6)
