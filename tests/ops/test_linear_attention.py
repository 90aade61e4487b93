"""Linear attention beside its Taylor form, and how both meet torch's compiler, export and wrong arguments.

What both compute is tested in test_taylor.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import max_error
from tests.ops.native_helpers import assert_near
from tests.ops.taylor_cases import OPERATORS, TOKENS, both_operators, random_case, run
from wkv import ops
from wkv.errors import WkvError
from wkv.ops import taylor_chunked


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_masked_weights(backend: str) -> None:
    """The quadratic form: all products of queries and keys at once."""
    case = random_case("linear_attention", 70, state=False)
    weights = torch.einsum("bthe,bshe->bhts", case.q, case.k).tril()
    expected = torch.einsum("bhts,bshn->bthn", weights / (weights.sum(-1, keepdim=True) + 1e-12), case.v)
    assert max_error(run(case, backend)["y"], expected) <= 1e-13


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_of_features_equals_taylor_attention(backend: str) -> None:
    """The two operators share their state, too."""
    case = random_case("taylor_attention", 70, mask=True, reset=True)
    expected = run(case, backend)
    phi = {name: ops.taylor_features(getattr(case, name)) for name in ("q", "k")}
    found = run(replace(case, operator="linear_attention", **phi), backend)
    same = ("y", "kv", "z", "dv", "dkv", "dz")
    assert_near({name: found[name] for name in same}, {name: expected[name] for name in same}, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_many_features_and_few_values(backend: str) -> None:
    case = random_case("linear_attention", 70, size=40, values=2)
    assert_near(run(case.to(torch.float32), backend), run(case, "reference"), 5e-6)


def test_the_default_backend_runs() -> None:
    case = random_case("linear_attention", 3, state=False, dtype=torch.float32)
    y, (kv, z) = ops.linear_attention(case.q, case.k, case.v)
    assert (y.shape, kv.shape, z.shape) == (case.v.shape, (2, 2, 5, 4), (2, 2, 4))


# Both operators are one custom operator each in torch form and in C++: the slow checks take turns.
in_turn = pytest.mark.parametrize(("operator", "flags"), [("linear_attention", False), ("taylor_attention", True)])


@in_turn
def test_opcheck(operator: str, flags: bool) -> None:
    case = random_case(operator, 33, state=flags, mask=flags, reset=flags, dtype=torch.float32)
    scale = None if operator == "linear_attention" else 0.5
    args = [None if x is None else x.requires_grad_() for x in (case.q, case.k, case.v, case.kv, case.z)]
    torch.library.opcheck(taylor_chunked.forward_op, (*args, scale, 1e-12, case.mask, case.reset))
    *_, S = taylor_chunked.forward_op(*args, scale, 1e-12, case.mask, case.reset)
    tokens = [x.detach() for x in args[:3] if x is not None]
    torch.library.opcheck(
        taylor_chunked.backward_op,
        (case.dy, case.d_kv, case.d_z, S.detach(), *tokens, scale, 1e-12, case.mask, case.reset),
        test_utils=("test_schema", "test_faketensor"),
    )


def twice(operator: str) -> Callable[..., Any]:
    """Two calls in a row, the state carried, with something around them to compile."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        y, state = OPERATORS[operator](q, k.abs(), v, mask=mask)
        return OPERATORS[operator](q, k, y.sin(), state, mask=mask)[0].sum(-1)

    return function


def compile_arguments(operator: str, length: int = 33) -> tuple[Tensor, ...]:
    case = random_case(operator, length, size=4, mask=True, dtype=torch.float32)
    assert case.mask is not None
    return (*(getattr(case, name).requires_grad_() for name in TOKENS), case.mask)


@pytest.mark.parametrize("backend", ["chunked"])
def test_compile(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(twice("taylor_attention"), backend="aot_eager", fullgraph=True, dynamic=True)
    with ops.use_backend(backend):
        for length in (33, 150):
            args = compile_arguments("taylor_attention", length)
            found, expected = compiled(*args), twice("taylor_attention")(*args)
            present = args[3][:, :, None]
            assert max_error(found * present, expected * present) <= 1e-6
            grads = [torch.autograd.grad((x * present).sum(), args[:3]) for x in (found, expected)]
            for a, b in zip(*grads, strict=True):
                assert_near({"grad": a}, {"grad": b}, 1e-6)


@both_operators
def test_export(operator: str) -> None:
    class Twice(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # export wants a fixed signature
            return twice(operator)(q, k, v, mask)

    args = tuple(x.detach() for x in compile_arguments(operator))
    with ops.use_backend("chunked"):
        program = torch.export.export(Twice(), args)
        assert max_error(program.module()(*args), twice(operator)(*args)) <= 1e-6
    assert any("taylor_chunked" in str(node.target) for node in program.graph.nodes)


def bad_arguments(operator: str) -> dict[str, dict[str, Any]]:
    """Arguments that do not fit, by the words the error must give."""
    case = random_case(operator, 4, dtype=torch.float32)
    q, v, kv, z = case.q, case.v, case.kv, case.z
    return {
        "q must be": {"q": q[:, :0], "k": q[:, :0], "v": v[:, :0]},
        "k has shape": {"k": q[:, :3]},
        "k must be": {"k": q.long()},
        "v has shape": {"v": v[:, :3]},
        "v must be": {"v": v.long()},
        "state must be": {"state": kv},
        "state kv has": {"state": (kv[..., :-1], z)},
        "state z has": {"state": (kv, z[..., :-1])},
        "state z must": {"state": (kv, z.long())},
        "eps": {"eps": -1.0},
        "mask": {"mask": torch.ones(2, 4)},
        "reset": {"reset": torch.ones(2, 5, dtype=torch.bool)},
    }


@both_operators
@pytest.mark.parametrize("words", list(bad_arguments("taylor_attention")))
def test_bad_arguments_are_named(operator: str, words: str) -> None:
    case = random_case(operator, 4, dtype=torch.float32)
    good = {name: getattr(case, name) for name in (*TOKENS, "mask", "reset")} | {"state": (case.kv, case.z)}
    with pytest.raises(WkvError, match=rf"^{operator}: {words} "):
        OPERATORS[operator](**(good | bad_arguments(operator)[words]))
