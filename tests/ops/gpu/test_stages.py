"""The fused stages of RWKV-7 against their torch forms in float64, alone and in whole models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wkv
from tests.ops.gpu.helpers import DEVICE, needs_triton
from tests.ops.helpers import max_error, relative_rms
from tests.ops.native_helpers import poisoned_memory
from wkv.layers.norms import HeadNorm, wide
from wkv.layers.timeline import Timeline
from wkv.models.rwkv7 import FusedVectors, lerp
from wkv.ops.gpu import stages

pytestmark = needs_triton

EPS = 64e-5
NAMES = ("mix", "keys", "reading")
Tensors = tuple[Tensor, ...]


def mix(fused: bool, z: Tensor, shifted: Tensor, *coefficients: Tensor) -> Tensors:
    return (stages.mix if fused else lerp)(z, shifted, coefficients)


def keys(fused: bool, k: Tensor, iclr: Tensor, k_k: Tensor, k_a: Tensor, heads: Tensor) -> Tensors:
    if fused:
        return stages.keys(k, iclr, k_k, k_a, heads.shape[-1])
    kk = F.normalize(wide(k * k_k).unflatten(-1, heads.shape), dim=-1, eps=1e-12)
    mixed = k * torch.addcmul(1 - k_a, iclr, k_a)
    return kk, -kk, kk * iclr.view(kk.shape), mixed.view(kk.shape)


def reading(
    fused: bool, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor
) -> Tensors:
    if fused:
        return (stages.reading(y, r, k, v, gate, r_k, weight, bias, EPS),)
    norm = HeadNorm(r_k.shape[0], weight.numel(), EPS)
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias  # type: ignore[assignment]
    out = norm(y) + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(-2)
    return ((out * gate).to(gate.dtype),)


class Case(NamedTuple):
    """A stage and its inputs: those of tokens first."""

    stage: Callable[..., Tensors]
    inputs: Tensors
    further: Tensors = ()

    def to(self, *types: torch.dtype) -> Case:
        """The inputs in these types, the last one for all that follow."""
        given = [*types, *[types[-1]] * len(self.inputs)]
        return self._replace(inputs=tuple(x.to(kind) for x, kind in zip(self.inputs, given, strict=False)))


def case(name: str, size: int = 16, batch: int = 2, time: int = 7, heads: int = 2) -> Case:
    """Random inputs; the width of "mix" is no multiple of anything."""
    torch.manual_seed(0)
    width, head = heads * size, (batch, time, heads, size)
    if name == "mix":
        rows = [torch.randn(batch, time, width + 3) for _ in range(2)]
        return on_device(Case(mix, (*rows, *(torch.rand(1, 1, width + 3) for _ in range(6)))))
    if name == "keys":
        k, iclr = torch.randn(batch, time, width), torch.rand(batch, time, width)
        return on_device(Case(keys, (k, iclr, torch.rand(1, 1, width), torch.rand(1, 1, width)), (k.new(heads, size),)))
    rows = [torch.randn(head) for _ in range(4)]
    gate, vectors = torch.randn(batch, time, width), (torch.randn(width) for _ in range(2))
    return on_device(Case(reading, (*rows, gate, torch.randn(heads, size), *vectors)))


def on_device(made: Case) -> Case:
    return made._replace(inputs=tuple(x.to(DEVICE) for x in made.inputs))


def run(made: Case, fused: bool, wanted: Sequence[int] | None = None) -> tuple[Tensors, Tensors]:
    """Results, and the gradients of all inputs by random gradients of the `wanted` results."""
    leaves = [x.detach().requires_grad_() for x in made.inputs]
    results = made.stage(fused, *leaves, *made.further)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    # In the type of bfloat16 results, so that both forms start from the same numbers.
    given = [g.bfloat16().to(DEVICE, x.dtype) for g, x in zip(given, results, strict=True)]
    chosen = range(len(results)) if wanted is None else wanted
    torch.autograd.backward([results[i] for i in chosen], [given[i] for i in chosen])
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return tuple(x.detach() for x in results), tuple(grads)


def assert_exact(made: Case, wanted: Sequence[int] | None = None) -> None:
    """Float32 results and gradients against the torch form in float64."""
    found, expected = run(made, True, wanted), run(made.to(torch.float64), False, wanted)
    errors = [[max_error(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(found, expected, strict=True)]
    assert max(map(max, errors)) <= 5e-6, errors
    assert all(x.dtype == torch.float32 for part in found for x in part)


@pytest.mark.parametrize("time", [1, 37])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "TILE", 16 * 16)  # several blocks of tokens
    monkeypatch.setattr(stages, "BLOCK", 16)
    with poisoned_memory():
        assert_exact(case(name, time=time))


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["keys", "reading"])
def test_head_sizes(name: str, size: int) -> None:
    assert_exact(case(name, size, batch=1, time=2048 // size + 1, heads=1))


@pytest.mark.parametrize(("name", "results"), [("mix", 6), ("keys", 4)])
def test_one_result_alone(name: str, results: int) -> None:
    """The others have no gradient."""
    with poisoned_memory():
        for i in range(results):
            assert_exact(case(name, time=3), [i])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    made = case(name, time=40).to(dtype)
    found, plain, expected = run(made, True), run(made, False), run(made.to(torch.float64), False)
    for part, types, exact in zip(found, plain, expected, strict=True):
        assert [x.dtype for x in part] == [x.dtype for x in types]
        errors = [relative_rms(x, y) for x, y in zip(part, exact, strict=True)]
        assert max(errors) <= 5e-3, errors


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("mix", (torch.bfloat16, torch.bfloat16, torch.float32)),
        ("keys", (torch.bfloat16, torch.float32)),  # as under autocast
        ("keys", (torch.float32, torch.float32, torch.bfloat16)),
        ("reading", (torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32)),
        ("reading", (torch.bfloat16, torch.float32, torch.float16, torch.float32)),
    ],
)
def test_mixed_types(name: str, types: tuple[torch.dtype, ...]) -> None:
    made = case(name).to(*types)
    found, plain, expected = run(made, True), run(made, False), run(made.to(torch.float64), False)
    for part, same, exact in zip(found, plain, expected, strict=True):
        assert [x.dtype for x in part] == [x.dtype for x in same]
        assert max(relative_rms(x, y) for x, y in zip(part, exact, strict=True)) <= 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(name: str) -> None:
    made = case(name, batch=3, time=4)
    strided = made._replace(inputs=tuple(torch.stack([x, x], -1)[..., 0] for x in made.inputs))
    assert not any(x.is_contiguous() for x in strided.inputs)
    for part, same in zip(run(strided, True), run(made, True), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(part, same, strict=True))


def test_keys_of_no_length() -> None:
    """Below eps a key is scaled, not normalised; a key of zeros has gradients, too."""
    made = case("keys")
    made.inputs[0][:, 0] = 0
    made.inputs[0][:, 1] *= 1e-14
    found, expected = run(made, True), run(made.to(torch.float64), False)
    for rows in (slice(2), slice(2, None)):
        for part, exact in zip(found, expected, strict=True):
            for x, y in zip(part, exact, strict=True):
                if x.dim() > 1 and x.shape[1] > 1:  # of tokens
                    assert max_error(x[:, rows], y[:, rows]) <= 5e-6


def tiny_model(**options: Any) -> Any:
    """Two layers, no parameter at its initial value."""
    torch.manual_seed(0)
    model: Any = wkv.create_model("rwkv7", vocab_size=19, hidden_size=32, num_layers=2, head_size=16, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(DEVICE)


def everything(model: Any, fused: bool, *, flags: bool = True) -> dict[str, Tensor]:
    """Logits, final state and every gradient."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(19, (2, 20), generator=generator).to(DEVICE)
    drawn = torch.rand(2, 2, 20, generator=generator).to(DEVICE)
    mask, reset = (drawn[0] > 0.2, drawn[1] < 0.2) if flags else (None, None)
    model.zero_grad()
    with stages.fused(fused):
        out = model(tokens, mask=mask, reset=reset)
        logits = out.logits if mask is None else out.logits[mask]
        state = {f"{i}.{name}": x for i, layer in enumerate(out.state.layers) for name, x in layer.items()}
        loss = (logits.sin() * torch.linspace(-1, 1, 19, device=DEVICE)).sum() + sum(
            x.sin().sum() for x in state.values()
        )
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{name: x.detach() for name, x in state.items()}, **grads}


@pytest.mark.parametrize("options", [{}, {"a_scale": 2.0, "attention_size": 48}], ids=["plain", "options"])
def test_whole_model(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**options)
    calls = []
    for name in NAMES:
        stage = getattr(stages, name)
        monkeypatch.setattr(stages, name, lambda *given, of=stage: calls.append(of) or of(*given))
    plain = everything(model, False)
    assert not calls
    found = everything(model, True)
    assert len(calls) == 6  # three stages of two layers
    errors = {name: max_error(found[name], x) for name, x in plain.items()}
    assert found.keys() == plain.keys()
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("name", ["meta_state", "hybrid"])
def test_models_that_reuse_the_time_mix(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 19, "hidden_size": 32, "num_layers": 2, "head_size": 16}
    model: Any = wkv.create_model(name, **options, **({"base": "rwkv7"} if name == "hybrid" else {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(19, (1, 5)).to(DEVICE)
    model = model.to(DEVICE)
    with torch.no_grad():
        expected = model(tokens).logits
        with stages.fused():
            assert max_error(model(tokens).logits, expected) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_in_a_model(autocast: bool, dtype: torch.dtype) -> None:
    """Everything between the stages has the types that the torch forms give."""
    time_mix = tiny_model().to(dtype).blocks[1].att
    z = torch.randn(1, 3, 32, device=DEVICE, dtype=dtype)
    carry = {"first_value": torch.randn_like(z)}
    state = {"wkv": torch.randn(1, 2, 16, 16, device=DEVICE)}

    def types(fused: bool) -> list[torch.dtype]:
        with stages.fused(fused), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast), torch.no_grad():
            vectors, gate, _ = time_mix.vectors(z, z.flip(1), carry)
            assert isinstance(vectors, FusedVectors) == fused
            y, _ = time_mix.remember(vectors, state, Timeline())
            return [x.dtype for x in (*vectors, gate, y, time_mix.read(y, vectors, gate))]

    assert types(True) == types(False)


def test_a_memory_beside_the_heads() -> None:
    """It is given the vectors of the torch form, in this order."""
    time_mix = tiny_model().blocks[0].att
    z, state = torch.randn(1, 4, 32, device=DEVICE), {"wkv": torch.zeros(1, 2, 16, 16, device=DEVICE)}
    state["att_shift"] = torch.zeros(1, 32, device=DEVICE)
    seen: list[Tensors] = []
    time_mix.side_memory = lambda y, vectors, *_: (seen.append(tuple(vectors)) or y + 1, {})
    with torch.no_grad():
        for fused in (False, True):
            with stages.fused(fused):
                seen.append(time_mix(z, {}, state, Timeline())[:1])
    plain, out, found, fused_out = seen
    assert len(found) == 6
    assert all(max_error(x, y) <= 5e-6 for x, y in zip((*found, *fused_out), (*plain, *out), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    made = case(name, time=3)
    leaves = [x.detach().requires_grad_() for x in made.inputs]
    op = getattr(stages, f"{name}_op")
    last = {"mix": (), "keys": (16,), "reading": (EPS,)}[name]
    torch.library.opcheck(op, (*leaves, *last))
    results = op(*made.inputs, *last)
    backward: dict[str, tuple[Any, ...]] = {
        "mix": (list(results), *made.inputs[:2], list(made.inputs[2:])),
        "keys": (*results, *made.inputs, 16),
        "reading": (results, list(made.inputs), EPS),
    }
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(stages, f"{name}_backward_op"), backward[name], test_utils=checks)


def test_compile() -> None:
    time_mix, z = tiny_model().blocks[0].att, torch.randn(1, 4, 32, device=DEVICE)

    def call(z: Tensor) -> Tensor:
        vectors, gate, _ = time_mix.vectors(z, z.flip(1), {})
        y, _ = time_mix.remember(vectors, {"wkv": None}, Timeline())
        return time_mix.read(y, vectors, gate)  # type: ignore[no-any-return]

    torch.compiler.reset()
    with stages.fused():
        found, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(z), call(z)
        assert max_error(found, expected) <= 1e-6
        gradients = [torch.autograd.grad(x.sum(), list(time_mix.parameters())[:6]) for x in (found, expected)]
        assert all(max_error(x, y) <= 1e-6 for x, y in zip(*gradients, strict=True))


def test_switch() -> None:
    x = torch.randn(1, 1, 16, device=DEVICE)
    assert not stages.active(x, 16)
    with stages.fused():
        assert stages.active(x, 16)
        assert not stages.active(x, 8)
        assert not stages.active(x.double(), 16)
        with stages.fused(False):
            assert not stages.active(x, 16)
    assert not stages.active(x, 16)
