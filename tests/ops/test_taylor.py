"""Taylor attention against the golden vectors of BASED, and everything it promises together with linear attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.helpers import golden, max_error, relative_rms
from tests.ops.native_helpers import assert_near
from tests.ops.taylor_cases import STATE, TOKENS, both_operators, random_case, run
from wkv import ops
from wkv.errors import WkvError
from wkv.ops import taylor, taylor_chunked

both_backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


@both_backends
def test_golden(backend: str) -> None:
    x = {name: tensor.transpose(1, 2) for name, tensor in golden("based", "linear_attention").items() if "op." in name}
    with ops.use_backend(backend):
        y, _ = ops.taylor_attention(x["op.q"], x["op.k"], x["op.v"], eps=1e-6)
    assert (y - x["op.o_norm"]).abs().max() <= 1e-6


def based_layer(x: dict[str, Tensor], tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """BASED's linear attention layer: projections around the operator."""
    q, k, v = (
        (tokens @ x[f"param.proj_{name}.weight"].mT).unflatten(-1, (x["fmap_in"].shape[1], -1)) for name in "qkv"
    )
    y, state = ops.taylor_attention(q, k, v, state)
    return y.flatten(2) @ x["param.out_proj.weight"].mT, state


@both_backends
def test_golden_layer_and_its_gradients(backend: str) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in golden("based", "linear_attention").items()}
    names = ["x", *(name for name in x if name.startswith("param."))]
    with ops.use_backend(backend):
        y, _ = based_layer(x, x["x"], None)
    grads = torch.autograd.grad(y, [x[name] for name in names], x["dy"])
    assert (y - x["y_parallel"]).abs().max() <= 5e-6
    for name, grad in zip(names, grads, strict=True):
        assert max_error(grad, x["dx" if name == "x" else name.replace("param", "grad")]) <= 5e-6, name


@both_backends
def test_golden_prefill_and_decoding(backend: str) -> None:
    """From our state, and from the one that the official prefill has left."""
    x = golden("based", "linear_attention")
    half = x["prefill_y"].shape[1]
    with ops.use_backend(backend):
        y, state = based_layer(x, x["x"][:, :half], None)
        assert (y - x["prefill_y"]).abs().max() <= 5e-6
        official = dict(zip(("kv_state", "k_state"), taylor.to_official(state), strict=True))
        assert_near(official, {name: x[f"prefill_{name}"] for name in official}, 2e-6)
        for start in (state, taylor.from_official(x["prefill_kv_state"], x["prefill_k_state"])):
            outputs, running = [], start
            for t in range(half, x["x"].shape[1]):
                y, running = based_layer(x, x["x"][:, t : t + 1], running)
                outputs.append(y)
            assert (torch.cat(outputs, 1) - x["decode_y"]).abs().max() <= 5e-6
            official = dict(zip(("kv_state", "k_state"), taylor.to_official(running), strict=True))
            assert_near(official, {name: x[f"final_{name}"] for name in official}, 2e-6)


def test_golden_feature_map() -> None:
    x = golden("based", "linear_attention")
    found = ops.taylor_features(x["fmap_in"])
    assert (taylor.expand(found) - x["fmap_out"]).abs().max() <= 1e-6
    assert (found - taylor.compact(x["fmap_out"])).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_features_give_the_weights(size: int, scale: float | None) -> None:
    q, k = torch.randn(2, 5, size, dtype=torch.float64)
    s = (q * k).sum(-1) * (size**-0.5 if scale is None else scale)
    phi_q, phi_k = ops.taylor_features(q, scale), ops.taylor_features(k, scale)
    assert max_error((phi_q * phi_k).sum(-1), 1 + s + s**2 / 2) <= 1e-14
    assert max_error((taylor.expand(phi_q) * taylor.expand(phi_k)).sum(-1), 1 + s + s**2 / 2) <= 1e-14
    assert max_error(taylor.compact(taylor.expand(phi_q)), phi_q) <= 1e-15


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_scale_and_eps(backend: str) -> None:
    case = random_case("taylor_attention", 9)
    leaves = {name: getattr(case, name) for name in (*TOKENS, *STATE)}
    with ops.use_backend(backend):
        found, _ = case.call(leaves, scale=0.3, eps=2.0)
    q, k = (ops.taylor_features(x, 0.3) for x in (case.q, case.k))
    num, den = torch.zeros_like(case.kv), torch.zeros_like(case.z)
    num, den = num + case.kv, den + case.z
    for t in range(9):
        num, den = num + case.v[:, t, :, :, None] * k[:, t, :, None], den + k[:, t]
        expected = (num @ q[:, t, ..., None])[..., 0] / ((den * q[:, t]).sum(-1, keepdim=True) + 2)
        assert max_error(found[:, t], expected) <= 1e-13


@both_operators
@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 150),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 5]), st.sampled_from([1, 3, 17])),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_reference(
    operator: str, length: int, shape: tuple[int, int, int, int], flags: tuple[bool, bool, bool], seed: int
) -> None:
    batch, heads, size, values = shape
    state, mask, reset = flags
    sizes = {"batch": batch, "heads": heads, "size": size, "values": values}
    case = random_case(operator, length, **sizes, state=state, mask=mask, reset=reset, seed=seed)
    assert_near(run(case, "chunked"), run(case, "reference"), 1e-11)


@both_operators
@pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65, 127, 128, 129, 130, 259])
def test_lengths(operator: str, length: int) -> None:
    case = random_case(operator, length, batch=1, size=8, values=8)
    expected = run(case, "reference")
    assert_near(run(case, "chunked"), expected, 1e-11)
    assert_near(run(case.to(torch.float32), "chunked"), expected, 5e-6)


@both_operators
@pytest.mark.parametrize("reset", [False, True])
def test_groups_of_chunks(operator: str, reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many chunks are worked on at a time changes nothing."""
    case = random_case(operator, 530, batch=1, mask=True, reset=reset)
    expected = run(case, "chunked")
    monkeypatch.setattr(taylor_chunked, "CPU_GROUP", 2 * taylor_chunked.CHUNK * 2)
    assert_near(run(case, "chunked"), expected, 1e-13)


@both_operators
@both_backends
@pytest.mark.parametrize("split", [1, 40, 128, 139])
def test_split_with_carried_state_equals_whole(operator: str, backend: str, split: int) -> None:
    case = random_case(operator, 140, batch=1, mask=True, reset=True)
    head, tail = case.tokens(0, split), case.tokens(split, 140)
    whole = run(case, backend)
    middle = run(head, backend)
    second = run(replace(tail, kv=middle["kv"], z=middle["z"]), backend)
    first = run(replace(head, d_kv=second["dkv"], d_z=second["dz"]), backend)
    tokens = {name: torch.cat((first[name], second[name]), 1) for name in ("y", "dq", "dk", "dv")}
    assert_near({**second, **tokens, "dkv": first["dkv"], "dz": first["dz"]}, whole, 1e-12)


@both_operators
@both_backends
def test_step_by_step_equals_whole(operator: str, backend: str) -> None:
    case = random_case(operator, 20, mask=True, reset=True)
    leaves = {name: getattr(case, name) for name in (*TOKENS, *STATE)}
    with ops.use_backend(backend):
        whole, (kv, z) = case.call(leaves)
        running = leaves
        for t in range(20):
            part = case.tokens(t, t + 1)
            running = {**{name: getattr(part, name) for name in TOKENS}, "kv": running["kv"], "z": running["z"]}
            y, (running["kv"], running["z"]) = part.call(running)
            assert max_error(y[part.mask], whole[:, t : t + 1][part.mask]) <= 1e-12 if part.mask.any() else True
    assert_near({"kv": running["kv"], "z": running["z"]}, {"kv": kv, "z": z}, 1e-12)


@both_operators
@both_backends
def test_mask_equals_tokens_removed(operator: str, backend: str) -> None:
    case = random_case(operator, 140, batch=1, mask=True)
    kept = case.mask[0].nonzero()[:, 0]
    short = run(replace(case, mask=None, **{name: getattr(case, name)[:, kept] for name in (*TOKENS, "dy")}), backend)
    full = run(case, backend)
    for name in ("y", "dq", "dk", "dv"):
        missing = full[name][:, ~case.mask[0]]
        assert torch.equal(missing, torch.zeros_like(missing)), name
        full[name] = full[name][:, kept]
    assert_near(full, short, 1e-12)


@both_operators
@both_backends
def test_missing_tokens_may_hold_anything(operator: str, backend: str) -> None:
    case = random_case(operator, 140, mask=True, reset=True)
    spoiled = {
        name: getattr(case, name).masked_fill(~case.mask[:, :, None, None], float("nan")) for name in (*TOKENS, "dy")
    }
    if backend == "reference":  # autograd multiplies what flows into a missing y by 0
        del spoiled["dy"]
    assert_near(run(replace(case, **spoiled), backend), run(case, backend), 1e-12)
    with ops.use_backend(backend):
        y, _ = replace(case, **spoiled).call(
            {name: spoiled.get(name, getattr(case, name)) for name in (*TOKENS, *STATE)}
        )
    assert y.isfinite().all()


@both_operators
@both_backends
def test_row_without_tokens_keeps_its_state(operator: str, backend: str) -> None:
    case = random_case(operator, 40)
    found = run(replace(case, mask=torch.zeros(2, 40, dtype=torch.bool)), backend)
    assert torch.equal(found["kv"], case.kv)
    assert torch.equal(found["z"], case.z)
    assert torch.equal(found["dkv"], case.d_kv)
    assert torch.equal(found["dz"], case.d_z)


@both_operators
@both_backends
def test_missing_tokens_before_the_first(operator: str, backend: str) -> None:
    """With eps 0 and no state a missing first token would be 0 / 0."""
    case = random_case(operator, 5, state=False)
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])
    found = run(replace(case, mask=mask), backend, eps=0.0)
    assert all(x.isfinite().all() for x in found.values())


@both_operators
@both_backends
@pytest.mark.parametrize("start", [0, 1, 63, 64, 127, 128, 139])
def test_reset_equals_separate_runs(operator: str, backend: str, start: int) -> None:
    case = random_case(operator, 140, batch=1)
    reset = torch.zeros(1, 140, dtype=torch.bool)
    reset[0, start] = True
    found = run(replace(case, reset=reset), backend)
    second = run(replace(case.tokens(start, 140), kv=None, z=None), backend)
    for name in ("y", "dq", "dk", "dv"):
        assert_near({name: found[name][:, start:]}, {name: second[name]}, 1e-12)
    assert_near({"kv": found["kv"], "z": found["z"]}, {"kv": second["kv"], "z": second["z"]}, 1e-12)
    if start:
        silent = {"d_kv": torch.zeros_like(case.d_kv), "d_z": torch.zeros_like(case.d_z)}
        first = run(replace(case.tokens(0, start), **silent), backend)
        for name in ("y", "dq", "dk", "dv"):
            assert_near({name: found[name][:, :start]}, {name: first[name]}, 1e-12)
        assert_near({"dkv": found["dkv"], "dz": found["dz"]}, {"dkv": first["dkv"], "dz": first["dz"]}, 1e-12)
    else:
        assert not found["dkv"].any()
        assert not found["dz"].any()


@both_operators
@both_backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_reset_clears_anything(operator: str, backend: str, bad: float) -> None:
    """Behind a reset no trace of the state before it is left, nor in front of it of the gradients behind it."""
    case = random_case(operator, 140)
    reset = torch.zeros(2, 140, dtype=torch.bool)
    reset[:, 70] = True
    case = replace(case, reset=reset)
    broken = replace(case, kv=torch.full_like(case.kv, bad), z=torch.full_like(case.z, bad))
    backwards = replace(case, d_kv=torch.full_like(case.d_kv, bad), d_z=torch.full_like(case.d_z, bad))
    clean, found, other = run(case, backend), run(broken, backend), run(backwards, backend)
    assert torch.equal(found["kv"], clean["kv"])
    assert torch.equal(found["z"], clean["z"])
    for name in ("y", "dq", "dk", "dv"):
        assert torch.equal(other[name][:, :70], clean[name][:, :70]), name
        # The chunked form multiplies the gradients of a chunk's tokens in one product: their own NaN spreads there.
        if backend != "chunked" or name == "y":
            assert torch.equal(found[name][:, 70:], clean[name][:, 70:]), name


@both_operators
@both_backends
def test_rows_are_independent(operator: str, backend: str) -> None:
    case = random_case(operator, 140, batch=3, mask=True, reset=True)
    other = random_case(operator, 140, batch=3, mask=True, reset=True, seed=1)
    names = (*TOKENS, *STATE, "dy", "d_kv", "d_z", "mask", "reset")
    mixed = {name: torch.cat((getattr(case, name)[:1], getattr(other, name)[1:])) for name in names}
    a, b = run(case, backend), run(replace(case, **mixed), backend)
    for name in ("y", "kv", "z", "dq", "dk", "dv", "dkv", "dz"):
        assert torch.equal(a[name][0], b[name][0]), name


@both_operators
@both_backends
@pytest.mark.parametrize("loud", ["dy", "d_kv", "d_z"])
def test_gradient_from_one_result_only(operator: str, backend: str, loud: str) -> None:
    case = random_case(operator, 140, batch=1)
    leaves = case.leaves()
    with ops.use_backend(backend):
        y, (kv, z) = case.call(leaves)
    result = {"dy": y, "d_kv": kv, "d_z": z}[loud]
    grads = torch.autograd.grad(result, list(leaves.values()), getattr(case, loud), allow_unused=True)
    silent = {name: torch.zeros_like(getattr(case, name)) for name in ("dy", "d_kv", "d_z") if name != loud}
    expected = run(replace(case, **silent), "reference")
    for name, grad in zip(leaves, grads, strict=True):
        found = torch.zeros_like(leaves[name]) if grad is None else grad
        assert_near({name: found}, {name: expected[f"d{name}"]}, 1e-11)


@both_operators
@both_backends
def test_gradcheck(operator: str, backend: str) -> None:
    case = random_case(operator, 5, batch=1, heads=1, size=2, values=2, mask=True, reset=True, seed=4)
    leaves = case.leaves()

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with ops.use_backend(backend):
            y, (kv, z) = case.call(dict(zip(leaves, tensors, strict=True)))
        return y, kv, z

    assert torch.autograd.gradcheck(call, list(leaves.values()))


@both_operators
@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(operator: str, backend: str, dtype: torch.dtype) -> None:
    case = random_case(operator, 130, batch=1, size=16, values=32, state=False, dtype=dtype)
    found, expected = run(case, backend), run(case.to(torch.float64), "reference")
    assert found["y"].dtype == found["dk"].dtype == found["dv"].dtype == dtype
    assert found["kv"].dtype == found["z"].dtype == torch.float32
    assert relative_rms(found["y"], expected["y"]) <= 5e-3
    assert_near({name: found[name] for name in STATE}, {name: expected[name] for name in STATE}, 5e-6)
    for name in ("dq", "dk", "dv"):
        assert relative_rms(found[name], expected[name]) <= 5e-3, name


@both_operators
@both_backends
def test_autocast_changes_nothing(operator: str, backend: str) -> None:
    case = random_case(operator, 40, dtype=torch.float32)
    assert_near(run(case, backend, autocast=True), run(case, backend), 0)
    half = run(replace(case, v=case.v.bfloat16()), backend, autocast=True)
    assert half["y"].dtype == half["dv"].dtype == torch.bfloat16


@both_backends
def test_long_sequences_stay_exact(backend: str) -> None:
    """The denominator sums thousands of positive terms."""
    length = 600 if backend == "reference" else 4000
    case = random_case("taylor_attention", length, batch=1, heads=1, size=8, values=4)
    expected = run(case, "chunked")
    assert_near(run(case.to(torch.float32), backend), expected, 1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(scale: float) -> None:
    x = torch.randn(1, 2, 1, 4)
    with pytest.raises(WkvError, match=r"^taylor_attention: scale must be positive"):
        ops.taylor_attention(x, x, x, scale=scale)


def test_layouts_must_fit() -> None:
    with pytest.raises(WkvError, match="22 features are not 1"):
        taylor.compact(torch.zeros(2, 22))
    with pytest.raises(WkvError, match="16 features are not 1"):
        taylor.expand(torch.zeros(2, 16))
    with pytest.raises(WkvError, match=r"an official state is \[B, H, 1, N, E\]"):
        taylor.from_official(torch.zeros(1, 2, 5, 21), torch.zeros(1, 2, 21))
