"""WKV-7: golden vectors, what masks, resets and states mean, bad arguments. All for both torch backends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.ops.helpers import golden, max_error, relative_rms
from wkv.errors import WkvError
from wkv.ops import backends, use_backend, wkv7

BACKENDS = ("reference", "chunked")
CASES = [f"{shape}_{kind}" for shape in ("b2", "n32", "n64") for kind in ("normal", "nostate", "extreme")]
BARS = {torch.float32: 5e-6, torch.float64: 1e-7}
NAMES = ("r", "w_log", "k", "v", "a", "b")


def inputs(batch: int, time: int, heads: int, size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(r, log_w, k, v, a, b) like a model's: unit removal keys, log-decays in (-0.61, 0)."""
    r, q, k, v, kk, iclr = torch.randn(6, batch, time, heads, size, dtype=dtype)
    kk = normalize(kk, dim=-1)
    return [r, -0.60653 * torch.sigmoid(2 * q), k, v, -kk, kk * torch.sigmoid(iclr)]


def gradients(leaves: list[Tensor], outputs: tuple[Tensor, Tensor], dy: Tensor, ds: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(list(outputs), leaves, [dy.to(outputs[0].dtype), ds.to(outputs[1].dtype)]))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_golden(backend: str, case: str, dtype: torch.dtype) -> None:
    """y, final state and all gradients, also through the model's decay transform, within the golden bars."""
    given, expected = golden("wkv7", f"{case}_in"), golden("wkv7", f"{case}_out")
    given = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
    zeros = torch.zeros_like(given["dsT"]).requires_grad_()
    state = given.get("s0", zeros)
    y, final = wkv7(*(given[name] for name in NAMES), state)
    leaves = [*(given[name] for name in NAMES), state]
    names = ["dr", "dw_log", "dk", "dv", "da", "db", "ds0"]
    found = dict(zip(names, gradients(leaves, (y, final), given["dy"], given["dsT"]), strict=True))
    found |= {"y": y, "sT": final}
    slope = torch.autograd.grad((-math.exp(-0.5) * torch.sigmoid(given["w_arg"])).sum(), given["w_arg"])[0]
    found["dw_arg"] = found["dw_log"] * slope
    assert found.keys() == expected.keys()
    errors = {name: max_error(found[name], x) for name, x in expected.items()}
    assert max(errors.values()) <= BARS[dtype], errors


def test_state_may_be_absent(backend: str) -> None:
    given, expected = golden("wkv7", "n32_nostate_in"), golden("wkv7", "n32_nostate_out")
    y, final = wkv7(*(given[name] for name in NAMES))
    assert max_error(y, expected["y"]) <= 5e-6
    assert max_error(final, expected["sT"]) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(backend: str, dtype: torch.dtype) -> None:
    """Only the inputs and y are rounded: y in the type of v, state float32, arithmetic far above half precision."""
    torch.manual_seed(0)
    xs = [x.to(dtype).requires_grad_() for x in inputs(2, 512, 2, 64)]
    exact = [x.detach().double().requires_grad_() for x in xs]
    with use_backend("reference"):
        y_exact, final_exact = wkv7(*exact)
    y, final = wkv7(*xs)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert relative_rms(y, y_exact) < 5e-3
    assert max_error(final, final_exact) < 5e-6
    dy, ds = torch.randn_like(y_exact).to(dtype), torch.randn_like(final_exact)
    found, expected = gradients(xs, (y, final), dy, ds), gradients(exact, (y_exact, final_exact), dy, ds)
    assert {x.dtype for x in found} == {dtype}
    assert max(map(relative_rms, found, expected)) < 5e-3


def test_mixed_types(backend: str) -> None:
    """One float64 argument makes the arithmetic float64; y follows v; every gradient follows its input."""
    types = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    xs = [x.to(t).requires_grad_() for x, t in zip(inputs(1, 20, 2, 8), types, strict=True)]
    state = torch.randn(1, 2, 8, 8, dtype=torch.float16).requires_grad_()
    y, final = wkv7(*xs, state)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float64)
    found = gradients([*xs, state], (y, final), torch.ones_like(y), torch.ones_like(final))
    assert [x.dtype for x in found] == [*types, torch.float16]


@pytest.mark.parametrize("split", [1, 15, 16, 30])
def test_split_anywhere(backend: str, split: int) -> None:
    torch.manual_seed(1)
    xs, state = inputs(2, 40, 2, 8), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    y, final = wkv7(*xs, state)
    y1, middle = wkv7(*(x[:, :split] for x in xs), state)
    y2, end = wkv7(*(x[:, split:] for x in xs), middle)
    assert max_error(torch.cat([y1, y2], 1), y) < 1e-13
    assert max_error(end, final) < 1e-13


def test_rows_do_not_touch_each_other(backend: str) -> None:
    torch.manual_seed(2)
    xs, state = inputs(5, 37, 3, 8, torch.float32), torch.randn(5, 3, 8, 8)
    y, final = wkv7(*xs, state)
    for row in range(5):
        y_row, final_row = wkv7(*(x[row : row + 1] for x in xs), state[row : row + 1])
        assert max_error(y_row, y[row : row + 1]) < 1e-6
        assert max_error(final_row, final[row : row + 1]) < 1e-6


def test_mask_is_removal(backend: str) -> None:
    """Masked tokens, whatever they hold, change nothing and get zero gradients."""
    torch.manual_seed(3)
    xs, state = inputs(3, 50, 2, 8), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    mask = torch.rand(3, 50) < 0.6
    mask[1] = False
    garbage = [x.masked_fill(~mask[:, :, None, None], math.nan).requires_grad_() for x in xs]
    dy, ds = torch.randn_like(xs[0]), torch.randn_like(state)
    y, final = wkv7(*garbage, state, mask=mask)
    assert y.isfinite().all()
    found = gradients(garbage, (y, final), dy, ds)
    assert all((x[~mask] == 0).all() for x in found)
    assert torch.equal(final[1], state[1])
    for row in (0, 2):
        kept = [x[row : row + 1, mask[row]].requires_grad_() for x in xs]
        y_row, final_row = wkv7(*kept, state[row : row + 1])
        assert max_error(y[row, mask[row]], y_row[0]) < 1e-13
        assert max_error(final[row], final_row[0]) < 1e-13
        expected = gradients(kept, (y_row, final_row), dy[row : row + 1, mask[row]], ds[row : row + 1])
        for one, other in zip(found, expected, strict=True):
            assert max_error(one[row, mask[row]], other[0]) < 1e-12


def test_reset_is_separate_runs(backend: str) -> None:
    torch.manual_seed(4)
    starts = (0, 1, 2, 17, 32, 40, 49)
    xs, state = inputs(1, 50, 2, 8), torch.randn(1, 2, 8, 8, dtype=torch.float64).requires_grad_()
    xs = [x.requires_grad_() for x in xs]
    reset = torch.zeros(1, 50, dtype=torch.bool)
    reset[0, list(starts[1:])] = True
    y, final = wkv7(*xs, state, reset=reset)
    pieces = [(i, j) for i, j in zip(starts, (*starts[1:], 50), strict=True)]
    runs = [wkv7(*(x[:, i:j] for x in xs), state if i == 0 else None) for i, j in pieces]
    separate = torch.cat([run[0] for run in runs], 1), runs[-1][1]
    assert max_error(y, separate[0]) < 1e-13
    assert max_error(final, separate[1]) < 1e-13
    dy, ds = torch.randn_like(y), torch.randn_like(final)
    found = gradients([*xs, state], (y, final), dy, ds)
    for one, other in zip(found, gradients([*xs, state], separate, dy, ds), strict=True):
        assert max_error(one, other) < 1e-12


def test_reset_of_a_masked_token_is_ignored(backend: str) -> None:
    xs, state = inputs(1, 20, 1, 4), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    mask, reset = torch.ones(1, 20, dtype=torch.bool), torch.zeros(1, 20, dtype=torch.bool)
    mask[0, 7], reset[0, 7] = False, True
    assert torch.equal(wkv7(*xs, state, mask=mask, reset=reset)[1], wkv7(*xs, state, mask=mask)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_w", [-1.0, -5.0, -20.0, -60.0, -1e4, -math.inf])
def test_any_decay(backend: str, log_w: float, dtype: torch.dtype) -> None:
    """From 0 to complete forgetting, in turn and mixed, with exact values and finite gradients."""
    torch.manual_seed(5)
    xs, state = inputs(2, 70, 2, 8), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    xs[1] = torch.where(torch.rand(2, 70, 2, 8) < 0.5, log_w, -torch.rand(2, 70, 2, 8, dtype=torch.float64))
    xs[1][:, 40:60] = log_w
    leaves = [x.to(dtype).requires_grad_() for x in (*xs, state)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    outputs = wkv7(*leaves)
    with use_backend("reference"):
        expected = wkv7(*exact)
    bar = BARS[dtype] if dtype == torch.float32 else 1e-12
    assert max_error(outputs[0], expected[0]) < bar
    assert max_error(outputs[1], expected[1]) < bar
    dy, ds = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    for one, other in zip(gradients(leaves, outputs, dy, ds), gradients(exact, expected, dy, ds), strict=True):
        assert max_error(one, other) < bar


def test_gradient_of_complete_forgetting_is_zero(backend: str) -> None:
    xs = inputs(1, 20, 1, 4, torch.float32)
    xs[1] = torch.full_like(xs[1], -math.inf).requires_grad_()
    torch.autograd.backward(wkv7(*xs)[0].sum())
    assert torch.equal(xs[1].grad, torch.zeros_like(xs[1]))


def bad_calls() -> dict[str, tuple[str, dict[str, Tensor]]]:
    """What is wrong: (words the message must hold, arguments to replace)."""
    x, flags = torch.randn(2, 5, 3, 4), torch.ones(2, 5, dtype=torch.bool)
    return {
        "shape of k": ("k has shape (2, 5, 3, 5), expected (2, 5, 3, 4)", {"k": torch.randn(2, 5, 3, 5)}),
        "length of b": ("b has shape", {"b": x[:, :4]}),
        "integers": ("log_w must be a floating-point tensor, found torch.int64", {"log_w": x.long()}),
        "device": ("v is on meta", {"v": x.to("meta")}),
        "state shape": ("state has shape (2, 4, 4), expected (2, 3, 4, 4)", {"state": torch.randn(2, 4, 4)}),
        "state type": ("state must be a floating-point", {"state": torch.ones(2, 3, 4, 4, dtype=torch.long)}),
        "mask type": ("mask must be bool", {"mask": flags.long()}),
        "mask shape": ("mask has shape (2, 4)", {"mask": flags[:, :4]}),
        "reset type": ("reset must be bool", {"reset": flags.float()}),
        "reset shape": ("reset has shape (1, 5)", {"reset": flags[:1]}),
        "no token": ("r must be [B, T, H, N]", {name: x[:, :0] for name in ("r", "log_w", "k", "v", "a", "b")}),
        "flat heads": ("r must be [B, T, H, N]", {name: x[..., 0] for name in ("r", "log_w", "k", "v", "a", "b")}),
        "no time": ("r must be [B, T", {name: x[0, 0] for name in ("r", "log_w", "k", "v", "a", "b")}),
    }


@pytest.mark.parametrize("what", bad_calls())
def test_bad_arguments(backend: str, what: str) -> None:
    words, replaced = bad_calls()[what]
    arguments = {name: torch.randn(2, 5, 3, 4) for name in ("r", "log_w", "k", "v", "a", "b")}
    with pytest.raises(WkvError) as error:
        wkv7(**(arguments | replaced))
    assert "wkv7" in str(error.value)
    assert words in str(error.value)


def test_both_backends_run_everywhere() -> None:
    usable = {status.name for status in backends("wkv7") if status.usable}
    assert usable >= set(BACKENDS)
