"""The Triton kernels of WKV-7: goldens, lengths, sizes, flags, decays, half precision, and what is theirs alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.native_helpers import poisoned_memory
from tests.ops.test_wkv7 import CASES, NAMES, gradients, inputs
from wkv import ops
from wkv.errors import WkvError
from wkv.ops import use_backend, wkv7
from wkv.ops.gpu.wkv7 import FEW, Sizes, forward_op, run
from wkv.ops.wkv7 import reference

pytestmark = needs_triton

BAR = 5e-6  # of the goldens, in float32
Flags = tuple[Tensor | None, Tensor | None]


def leaves(batch: int, time: int, heads: int = 1, size: int = 16, seed: int = 0) -> list[Tensor]:
    """r, log_w, k, v, a, b and a state, in float32."""
    torch.manual_seed(seed)
    xs = [*inputs(batch, time, heads, size), torch.randn(batch, heads, size, size)]
    return [x.float().to(DEVICE) for x in xs]


def random_flags(batch: int, time: int) -> Flags:
    exists = torch.rand(batch, time) < 0.8
    return exists.to(DEVICE), ((torch.rand(batch, time) < 0.1) & exists).to(DEVICE)


def results(function, xs: list[Tensor], flags: Flags = (None, None)) -> list[Tensor]:
    """y, final state and all gradients; y of masked tokens is left out."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    y, final = function(*xs, *flags)
    generator = torch.Generator().manual_seed(1)
    dy, ds = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, final))
    grads = torch.autograd.grad([y, final], xs, [dy, ds])
    y = y.detach() if flags[0] is None else y.detach().masked_fill(~flags[0][:, :, None, None], 0)
    return [y, final.detach(), *grads]


def assert_exact(xs: list[Tensor], flags: Flags = (None, None), bar: float = BAR) -> None:
    """As the equation in float64."""
    found, expected = results(run, xs, flags), results(reference, [x.double() for x in xs], flags)
    errors = [max_error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors) <= bar, errors


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    given = {name: x.float().to(DEVICE) for name, x in golden("wkv7", f"{case}_in").items()}
    expected = golden("wkv7", f"{case}_out")
    xs = [given[name].requires_grad_() for name in NAMES]
    state = given.get("s0", torch.zeros_like(given["dsT"])).requires_grad_()
    with use_backend("triton"):
        y, final = wkv7(*xs, state)
    names = ["dr", "dw_log", "dk", "dv", "da", "db", "ds0"]
    found = dict(zip(names, gradients([*xs, state], (y, final), given["dy"], given["dsT"]), strict=True))
    found |= {"y": y, "sT": final}
    errors = {name: max_error(x.cpu(), expected[name]) for name, x in found.items()}
    assert max(errors.values()) <= BAR, errors


@pytest.mark.parametrize("time", [1, 15, 17, 31, 32, 33, 64, 65])
def test_lengths(time: int) -> None:
    assert_exact(leaves(1, time, seed=time))


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_sizes(size: int) -> None:
    xs = leaves(1, 20, 1, size)
    assert_exact(xs, random_flags(1, 20))


def test_masks_and_resets() -> None:
    """Over several chunks; a row that does not exist at all keeps its state."""
    xs = leaves(2, 70)
    mask, reset = random_flags(2, 70)
    mask[1] = False
    flags = mask, reset & mask
    assert_exact(xs, flags)
    assert torch.equal(run(*xs, *flags)[1][1], xs[6][1])


def test_masked_tokens_may_hold_anything() -> None:
    xs, (mask, _) = leaves(1, 40), random_flags(1, 40)
    clean = results(run, xs, (mask, None))
    broken = [x.masked_fill(~mask[:, :, None, None], math.nan) for x in xs[:6]]
    found = results(run, [*broken, xs[6]], (mask, None))
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))
    assert all((x[~mask] == 0).all() for x in found[2:8])


@pytest.mark.parametrize(("steepness", "flags"), [(4.0, False), (60.0, True), (math.inf, False)])
def test_any_decay(steepness: float, flags: bool) -> None:
    """Decays too strong for products of two factors take another way, chunk by chunk."""
    xs = leaves(1, 50)
    strong = torch.rand_like(xs[1]) < 0.5
    strong[:, 32:] = False
    xs[1] = torch.where(strong, xs[1] * steepness, xs[1])
    xs[1][:, 20:26] = xs[1][:, 20:26] * steepness
    assert_exact(xs, random_flags(1, 50) if flags else (None, None))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str)
def test_half_precision(dtype: torch.dtype, bar: float) -> None:
    """y and the state within 5e-3; gradients, also that of the decay, a difference of larger sums, within `bar`."""
    xs = [x.to(dtype) if i not in (1, 6) else x for i, x in enumerate(leaves(1, 70, 1, 64))]
    found, expected = results(run, xs), results(reference, [x.double() for x in xs])
    assert [x.dtype for x in found] == [dtype, torch.float32, *(x.dtype for x in xs)]
    errors = [relative_rms(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors[:2]) <= 5e-3, errors
    assert max(errors[2:]) <= bar, errors


def test_split_anywhere() -> None:
    xs = leaves(1, 50)
    whole, final = run(*xs, None, None)
    for at in (13, 32):
        first, state = run(*(x[:, :at] for x in xs[:6]), xs[6], None, None)
        second, end = run(*(x[:, at:] for x in xs[:6]), state, None, None)
        assert max_error(torch.cat([first, second], 1), whole) <= BAR
        assert max_error(end, final) <= BAR


@pytest.mark.parametrize("time", [1, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients(time: int, dtype: torch.dtype) -> None:
    """Few tokens then go one by one; nothing is kept."""
    xs, flags = [x.to(dtype) for x in leaves(2, time)], random_flags(2, time)
    for state in (xs[6], None):
        y, final, kept = forward_op(*xs[:6], state, *flags, False)
        expected, end = reference(*(x.double() for x in xs[:6]), state, *flags)
        assert kept.numel() == 0
        y = y.masked_fill(~flags[0][:, :, None, None], 0)
        error, bar = (max_error, BAR) if dtype == torch.float32 else (relative_rms, 5e-3)
        assert error(y, expected) <= bar
        assert error(final, end) <= bar


def test_uninitialised_memory_is_never_read() -> None:
    xs, flags = leaves(1, 45), random_flags(1, 45)
    xs[1][0, :10] *= 60
    plain = results(run, xs, flags)
    with poisoned_memory():
        poisoned = results(run, xs, flags)
    assert all(torch.equal(x, y) for x, y in zip(poisoned, plain, strict=True))


def test_rows_do_not_touch_each_other() -> None:
    xs = leaves(2, 40)
    whole = run(*xs, None, None)
    for row in range(2):
        alone = run(*(x[row : row + 1] for x in xs), None, None)
        assert all(torch.equal(x, y[row : row + 1]) for x, y in zip(alone, whole, strict=True))


def test_inputs_of_any_layout() -> None:
    xs = leaves(1, 40, 2)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs[:3]]
    strange += [torch.cat([x, x], -1)[..., :16] for x in xs[3:6]]
    strange.append(xs[6].mT.contiguous().mT)
    assert all(torch.equal(x, y) for x, y in zip(run(*strange, None, None), run(*xs, None, None), strict=True))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output: int) -> None:
    found = []
    for function, dtype in ((run, torch.float32), (reference, torch.float64)):
        xs = [x.to(dtype).requires_grad_() for x in leaves(1, 37)]
        out = function(*xs, None, None)[output]
        grads = torch.autograd.grad(out.square().sum(), xs, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads, strict=True)])
    assert max(max_error(*pair) for pair in zip(*found, strict=True)) <= BAR


def test_opcheck() -> None:
    xs = [x.requires_grad_() for x in leaves(1, 20)]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward_op, (*xs, *random_flags(1, 20), True), test_utils=utilities)


def test_what_is_refused() -> None:
    with use_backend("triton"), pytest.raises(WkvError, match=r"heads of 16, 32, 64, 128, 256 channels, found 8"):
        wkv7(*(torch.randn(1, 2, 1, 8, device=DEVICE) for _ in range(6)))
    with use_backend("triton"), pytest.raises(WkvError, match=r"found torch\.float64"):
        wkv7(*(torch.randn(1, 2, 1, 16, device=DEVICE, dtype=torch.float64) for _ in range(6)))


def test_chosen_on_gpus_alone() -> None:
    """In the interpreter only where it is asked for."""
    status = {x.name: x for x in ops.backends("wkv7", DEVICE)}["triton"]
    assert status.usable
    chosen = ops.dispatch.select("wkv7", *leaves(1, 2)) is run
    assert chosen == (DEVICE.type == "cuda")


def test_sizes_of_a_call() -> None:
    sizes = Sizes(2, 65, 3, 64)
    assert (sizes.length, sizes.chunks, sizes.total) == (32, 3, 18)
