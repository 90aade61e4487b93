"""WKV-4: golden vectors, both forms against each other, states, masks, resets, extreme keys, compilation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.helpers import golden, max_error, relative_rms
from wkv import ops
from wkv.errors import WkvError
from wkv.ops import use_backend, wkv4_chunked

INPUTS = ("log_w", "u", "k", "v")
STATE = ("num", "den", "max")

both_backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


@dataclass(frozen=True)
class Case:
    """Arguments of one call and the gradients that flow into its results."""

    log_w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    state: tuple[Tensor, ...] | None
    mask: Tensor | None
    reset: Tensor | None
    dy: Tensor
    d_num: Tensor
    d_den: Tensor

    def tokens(self, start: int, stop: int) -> Case:
        """The same call over tokens start .. stop only."""
        cut = {name: getattr(self, name) for name in ("k", "v", "dy", "mask", "reset")}
        return replace(self, **{name: None if x is None else x[:, start:stop] for name, x in cut.items()})

    def to(self, dtype: torch.dtype) -> Case:
        changes = {name: getattr(self, name).to(dtype) for name in (*INPUTS, "dy", "d_num", "d_den")}
        return replace(self, **changes, state=self.state and tuple(x.to(dtype) for x in self.state))


def random_case(
    length: int,
    *,
    batch: int = 2,
    channels: int = 5,
    state: bool = True,
    mask: bool = False,
    reset: bool = False,
    seed: int = 0,
) -> Case:
    """Keys of deviation 3, log-decays from -1e-3 to -50; about a third of the tokens masked, a tenth reset."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    row = (batch, channels)
    start = (normal(*row), normal(*row).exp(), 3 * normal(*row))
    return Case(
        log_w=-torch.exp(2 * normal(channels) - 1),
        u=normal(channels),
        k=3 * normal(batch, length, channels),
        v=normal(batch, length, channels),
        state=start if state else None,
        mask=torch.rand(batch, length, generator=g) < 0.7 if mask else None,
        reset=torch.rand(batch, length, generator=g) < 0.1 if reset else None,
        dy=normal(batch, length, channels),
        d_num=normal(*row),
        d_den=normal(*row),
    )


def leaves_of(case: Case) -> dict[str, Tensor]:
    tensors = {name: getattr(case, name) for name in INPUTS} | dict(zip(STATE, case.state or (), strict=False))
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def call(leaves: dict[str, Tensor], case: Case) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    state = None if case.state is None else tuple(leaves[name] for name in STATE)
    return ops.wkv4(*(leaves[name] for name in INPUTS), state, mask=case.mask, reset=case.reset)


def run(case: Case, backend: str, autocast: bool = False) -> dict[str, Tensor]:
    """y (0 where masked), log(den) + max, num / den, and the gradient of every input as "d" + name."""
    leaves = leaves_of(case)
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, (num, den, top) = call(leaves, case)
    assert not top.requires_grad
    assert all(x.isfinite().all() for x in (y, num, den, top))
    given_grads = [case.dy.to(y.dtype), case.d_num.to(num.dtype), case.d_den.to(den.dtype)]
    grads = torch.autograd.grad([y, num, den], list(leaves.values()), given_grads)
    if case.mask is not None:
        y = y.masked_fill(~case.mask[:, :, None], 0)
    result = {"y": y, "log_den": den.log() + top, "ratio": num / den}
    return result | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bar: float) -> None:
    """Every tensor within `bar` of its counterpart, relative to the counterpart's largest entry."""
    assert actual.keys() == expected.keys()
    errors = {name: max_error(actual[name], expected[name]) for name in expected}
    assert all(error <= bar for error in errors.values()), errors


@both_backends
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("name", ["normal", "zerostate", "extreme"])
def test_golden(name: str, dtype: torch.dtype, bar: float, backend: str) -> None:
    expected = golden("wkv4", name)
    x = {name: tensor.to(dtype) for name, tensor in expected.items()}
    log_w = -x["w"].exp()
    state = None if name == "zerostate" else (x["aa0"], x["bb0"], x["pp0"])
    none = torch.zeros_like(x["k"][:, 0])
    found = run(Case(log_w, x["u"], x["k"], x["v"], state, None, None, x["dy"], none, none), backend)
    renamed = {"log_den": "final_logden", "ratio": "final_ratio", "dnum": "daa0", "dden": "dbb0", "dmax": "dpp0"}
    found["dw"] = found.pop("dlog_w") * log_w
    found = {renamed.get(name, name): tensor for name, tensor in found.items()}
    assert_close(found, {name: expected[name] for name in found}, bar)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(
    length: int, batch: int, channels: int, flags: tuple[bool, bool, bool], seed: int
) -> None:
    state, mask, reset = flags
    case = random_case(length, batch=batch, channels=channels, state=state, mask=mask, reset=reset, seed=seed)
    if mask and case.mask is not None:
        case.mask[:, 0] = True  # a state without a token has no logarithm; see test_row_without_tokens
    assert_close(run(case, "chunked"), run(case, "reference"), 1e-11)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257])
def test_lengths(length: int) -> None:
    case = random_case(length, batch=1)
    expected = run(case, "reference")
    assert_close(run(case, "chunked"), expected, 1e-11)
    assert_close(run(case.to(torch.float32), "chunked"), expected, 1e-5)


def test_long_sequences_keep_their_precision() -> None:
    """No exponent is rounded once per token: slow decays under large keys, over many chunks, in float32."""
    case = random_case(1500, batch=1, channels=8, state=False)
    decays = -torch.logspace(-4, 1, 8, dtype=torch.float64)
    case = replace(case, log_w=decays, k=4 * case.k).to(torch.float32)
    found, expected = run(case, "chunked"), run(case.to(torch.float64), "chunked")
    for name in ("y", "log_den", "ratio"):
        assert max_error(found[name], expected[name]) <= 2e-6, name


@both_backends
@pytest.mark.parametrize("split", [1, 16, 32, 47])
def test_split_with_carried_state_equals_whole(backend: str, split: int) -> None:
    case = random_case(48, mask=True, reset=True)
    whole = run(case, backend)
    head, tail = case.tokens(0, split), case.tokens(split, 48)
    with ops.use_backend(backend):
        y_head, state = call(leaves_of(head), head)
    second = run(replace(tail, state=state), backend)
    first = run(replace(head, d_num=second["dnum"], d_den=second["dden"]), backend)
    joined = {name: second[name] for name in ("log_den", "ratio")} | {name: first[f"d{name}"] for name in STATE}
    assert max_error(torch.cat((first["y"], second["y"]), 1), whole["y"]) <= 1e-12
    assert max_error(joined["log_den"], whole["log_den"]) <= 1e-12
    assert max_error(joined["ratio"], whole["ratio"]) <= 1e-12
    for name in ("k", "v"):
        assert max_error(torch.cat((first[f"d{name}"], second[f"d{name}"]), 1), whole[f"d{name}"]) <= 1e-11
    for name in ("log_w", "u"):
        assert max_error(first[f"d{name}"] + second[f"d{name}"], whole[f"d{name}"]) <= 1e-11
    for name in STATE:
        assert max_error(joined[name], whole[f"d{name}"]) <= 1e-11
    assert y_head.shape[1] == split


@both_backends
def test_mask_equals_tokens_removed(backend: str) -> None:
    case = random_case(40, batch=1, mask=True)
    assert case.mask is not None
    kept = case.mask[0].nonzero()[:, 0]
    short = run(replace(case, mask=None, **{x: getattr(case, x)[:, kept] for x in ("k", "v", "dy")}), backend)
    full = run(case, backend)
    for name in ("y", "dk", "dv"):
        missing = full[name][:, ~case.mask[0]]
        assert torch.equal(missing, torch.zeros_like(missing)), name
        full[name] = full[name][:, kept]
    assert_close(full, short, 1e-12)


@both_backends
def test_missing_tokens_may_hold_anything(backend: str) -> None:
    case = random_case(40, mask=True)
    assert case.mask is not None
    spoiled = {x: getattr(case, x).masked_fill(~case.mask[:, :, None], float("nan")) for x in ("k", "v")}
    assert_close(run(replace(case, **spoiled), backend), run(case, backend), 1e-12)


@both_backends
@pytest.mark.parametrize("given_state", [False, True])
def test_row_without_tokens_keeps_its_state(backend: str, given_state: bool) -> None:
    case = replace(random_case(40, state=given_state), mask=torch.zeros(2, 40, dtype=torch.bool))
    leaves = leaves_of(case)
    with ops.use_backend(backend):
        y, state = call(leaves, case)
    assert y.isfinite().all()
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    for found, expected in zip(state, case.state or (zeros, zeros, torch.full_like(zeros, -1e30)), strict=True):
        assert torch.equal(found, expected)
    if given_state:
        grads = torch.autograd.grad(state[:2], [leaves[x] for x in STATE], [case.d_num, case.d_den])
        assert torch.equal(grads[0], case.d_num)
        assert torch.equal(grads[1], case.d_den)
        assert max_error(grads[2], case.d_num * leaves["num"] + case.d_den * leaves["den"]) <= 1e-15


@both_backends
@pytest.mark.parametrize("start", [0, 1, 15, 16, 31, 39])
def test_reset_equals_separate_runs(backend: str, start: int) -> None:
    case = random_case(40, batch=1)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, start] = True
    found = run(replace(case, reset=reset), backend)
    second = run(replace(case.tokens(start, 40), state=None), backend)
    for name in ("log_den", "ratio"):
        assert max_error(found[name], second[name]) <= 1e-12
    for name in ("y", "dk", "dv"):
        assert max_error(found[name][:, start:], second[name]) <= 1e-12
    if start:
        silent = torch.zeros_like(case.d_num)
        first = run(replace(case.tokens(0, start), d_num=silent, d_den=silent), backend)
        for name in ("y", "dk", "dv"):
            assert max_error(found[name][:, :start], first[name]) <= 1e-12
        assert max_error(found["dlog_w"], first["dlog_w"] + second["dlog_w"]) <= 1e-12
    else:
        assert not any(found[f"d{name}"].any() for name in STATE)


@both_backends
def test_rows_are_independent(backend: str) -> None:
    case, other = (random_case(40, batch=3, mask=True, reset=True, seed=seed) for seed in (0, 1))
    names = ("k", "v", "dy", "d_num", "d_den", "mask", "reset")
    mixed = {name: torch.cat((getattr(case, name)[:1], getattr(other, name)[1:])) for name in names}
    assert case.state is not None
    assert other.state is not None
    state = tuple(torch.cat((a[:1], b[1:])) for a, b in zip(case.state, other.state, strict=True))
    a, b = run(case, backend), run(replace(case, state=state, **mixed), backend)
    for name in ("y", "log_den", "ratio", "dk", "dv", "dnum", "dden", "dmax"):
        assert torch.equal(a[name][0], b[name][0]), name


@pytest.mark.parametrize(("backend", "bar", "gradient_bar"), [("reference", 5e-6, 1e-4), ("chunked", 1e-6, 1e-5)])
@pytest.mark.parametrize("scale", [60.0, 100.0])
def test_extreme_keys(scale: float, backend: str, bar: float, gradient_bar: float) -> None:
    """Keys up to +-100, where exp(k) overflows float32; also keys that rise and fall over the whole range."""
    case = random_case(70, state=False, mask=True)
    assert case.mask is not None
    case.mask[:, 0] = True
    k = scale * (2 * torch.rand_like(case.k) - 1)
    k[..., 0] = torch.linspace(-scale, scale, 70)
    k[..., 1] = torch.linspace(scale, -scale, 70)
    k[..., 2] = scale
    k[..., 3] = -scale
    case = replace(case, k=k.float().double())
    found, expected = run(case.to(torch.float32), backend), run(case.to(torch.float32).to(torch.float64), "reference")
    assert all(x.isfinite().all() for x in found.values())
    assert_close(found, expected, gradient_bar)
    for name in ("y", "log_den", "ratio"):
        assert max_error(found[name], expected[name]) <= bar, name


@pytest.mark.parametrize("decay", [0.0, -1e-8, -100.0, -1e4, float("-inf")])
def test_extreme_decays(decay: float) -> None:
    case = random_case(70, mask=True, reset=True)
    log_w = case.log_w.clone()
    log_w[::2] = decay
    case = replace(case, log_w=log_w)
    expected = run(case, "reference")
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(run(case, "chunked"), expected, 1e-11)
    assert_close(run(case.to(torch.float32), "chunked"), expected, 1e-5)


@both_backends
@pytest.mark.parametrize("result", ["y", "num", "den"])
def test_gradient_from_one_result_only(backend: str, result: str) -> None:
    case = random_case(40)
    leaves = leaves_of(case)
    with ops.use_backend(backend):
        y, (num, den, _) = call(leaves, case)
    output, gradient = {"y": (y, case.dy), "num": (num, case.d_num), "den": (den, case.d_den)}[result]
    grads = torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True)
    none = torch.zeros_like(case.d_num)
    others = {"y": torch.zeros_like(y), "num": none, "den": none} | {result: gradient}
    expected = run(replace(case, dy=others["y"], d_num=others["num"], d_den=others["den"]), "reference")
    for name, grad in zip(leaves, grads, strict=True):
        assert max_error(torch.zeros_like(leaves[name]) if grad is None else grad, expected[f"d{name}"]) <= 1e-11


@both_backends
def test_gradcheck(backend: str) -> None:
    """Of y and of num exp(max), den exp(max): the quantities whose gradients are defined."""
    case = random_case(6, batch=1, channels=2, mask=True, reset=True, seed=3)
    assert case.state is not None
    case = replace(case, state=(*case.state[:2], case.state[2] / 3), k=case.k / 3)
    leaves = leaves_of(case)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        with ops.use_backend(backend):
            y, (num, den, top) = call(dict(zip(leaves, tensors, strict=True)), case)
        return y, num * top.exp(), den * top.exp()

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend: str, dtype: torch.dtype) -> None:
    case = random_case(128, channels=32, state=False).to(dtype)
    found, expected = run(case, backend), run(case.to(torch.float64), "reference")
    assert found["y"].dtype == found["dk"].dtype == found["du"].dtype == dtype
    assert found["log_den"].dtype == torch.float32
    assert relative_rms(found["y"], expected["y"]) <= 5e-3
    assert max_error(found["log_den"], expected["log_den"]) <= 1e-5
    for name in ("dlog_w", "du", "dk", "dv"):
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


@both_backends
def test_autocast_changes_nothing(backend: str) -> None:
    case = random_case(40).to(torch.float32)
    assert_close(run(case, backend, autocast=True), run(case, backend), 0)
    half = run(replace(case, v=case.v.bfloat16()), backend, autocast=True)
    assert half["y"].dtype == half["dv"].dtype == torch.bfloat16


@pytest.mark.parametrize("flags", [False, True])
def test_opcheck(flags: bool) -> None:
    case = random_case(17, state=flags, mask=flags, reset=flags).to(torch.float32)
    leaves = leaves_of(case)
    args = (*(leaves.get(name) for name in (*INPUTS, *STATE)), case.mask, case.reset)
    torch.library.opcheck(wkv4_chunked.forward_op, args)
    saved = [x.detach() for x in wkv4_chunked.forward_op(*args)[3:]]
    inputs = [leaves[name].detach() for name in INPUTS]
    torch.library.opcheck(
        wkv4_chunked.backward_op,
        (case.dy, case.d_num, case.d_den, *inputs, case.mask, case.reset, *saved),
        test_utils=("test_schema", "test_faketensor"),
    )


def twice(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Two calls in a row, the state carried, with something around them to compile."""
    y, state = ops.wkv4(log_w, u, k.relu(), v, mask=mask)
    return ops.wkv4(log_w, u, k, y, state, mask=mask)[0].sum(-1)


def compile_arguments(length: int = 33) -> tuple[Tensor, ...]:
    case = random_case(length, mask=True).to(torch.float32)
    assert case.mask is not None
    return (*leaves_of(replace(case, state=None)).values(), case.mask)


def test_compile() -> None:
    torch.compiler.reset()
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)
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
    with use_backend("chunked"):
        program = torch.export.export(Twice(), args)
    assert any("wkv4_chunked" in str(node.target) for node in program.graph.nodes)
    assert max_error(program.module()(*args), twice(*args)) <= 1e-6


GOOD = {name: torch.zeros(5) for name in ("log_w", "u")} | {name: torch.zeros(2, 4, 5) for name in ("k", "v")}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("log_w", {"log_w": torch.zeros(4)}),
    ("u", {"u": torch.zeros(5).long()}),
    ("k", {"k": torch.zeros(2, 0, 5), "v": torch.zeros(2, 0, 5)}),
    ("k", {"k": torch.zeros(2, 4, 5, 1), "v": torch.zeros(2, 4, 5, 1)}),
    ("v", {"v": torch.zeros(2, 3, 5)}),
    ("state", {"state": (torch.zeros(2, 5), torch.zeros(2, 5))}),
    ("state", {"state": torch.zeros(3, 2, 5)}),
    ("state max", {"state": (torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 4))}),
    ("mask", {"mask": torch.ones(2, 4)}),
    ("reset", {"reset": torch.ones(2, 5, dtype=torch.bool)}),
]


@pytest.mark.parametrize(("name", "changes"), BAD)
def test_bad_arguments_are_named(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(WkvError, match=f"^wkv4: {name} "):
        ops.wkv4(**(GOOD | changes))
