"""The LoRA family; what holds for every method on every model is in test_adapters.py."""

from __future__ import annotations

import ast
import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import wkv
from wkv import tuning
from wkv.data import Batch
from wkv.errors import WkvError
from wkv.quantization import quantize_model
from wkv.quantization.frozen import freeze_base, thaw
from wkv.training import create_optimizer
from wkv.tuning import lora
from wkv.tuning.lora import FROM_WEIGHT, OPTIONS
from wkv.tuning.mean_gradients import mean_gradients

from .helpers import VOCABULARY, batches, disturb, options, tiny, tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "lora_family" / "lora_family.safetensors"
with safe_open(GOLDEN, "pt") as file:
    T = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    CONFIG = json.loads(file.metadata()["config"])
PATH = "blocks.0.att.receptance"
SIZES = {"rank": CONFIG["r"], "alpha": CONFIG["alpha"], "targets": PATH}


def on_golden_layer(method: str, tag: str, **more: Any) -> tuple[tuning.Adapter, Any]:
    """An adapter on a model in which one layer has the golden weight; and that layer."""
    out_features, in_features = T[f"{tag}.W"].shape
    sizes = {"hidden_size": in_features, "attention_size": out_features, "head_size": 10}
    model: Any = wkv.create_model("rwkv7", vocab_size=8, num_layers=1, **sizes)
    model.get_submodule(PATH).weight.data.copy_(T[f"{tag}.W"])
    adapter = tuning.create(method, model, **SIZES, **more)
    return adapter, model.get_submodule(PATH)


def parameter(adapter: tuning.Adapter, name: str) -> nn.Parameter:
    return adapter.named_parameters()[f"{PATH}.{name}"]


def close(found: Tensor, golden: Tensor, bar: float) -> None:
    error = (found - golden).abs().max() / golden.abs().max()
    assert error <= bar, f"{error:.1e} > {bar:.0e}"


# ---------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("tag", ["a", "b"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_forward_gradients_and_merged_weight(method: str, tag: str) -> None:
    adapter, layer = on_golden_layer(method, tag)
    names = {"A": "lora_A", "B": "lora_B", **({"m": "magnitude"} if method == "dora" else {})}
    for name, ours in names.items():
        value = T.get(f"{tag}.{method}.{name}", T.get(f"{tag}.{name}"))
        assert value is not None
        parameter(adapter, ours).data.copy_(value)
    x = T[f"{tag}.x"].clone().requires_grad_()
    y = layer(x)
    y.backward(T[f"{tag}.gy"])
    assert x.grad is not None
    close(y, T[f"{tag}.{method}.y"], 2e-6)
    close(x.grad, T[f"{tag}.{method}.gx"], 2e-6)
    for name, ours in names.items():
        grad = parameter(adapter, ours).grad
        assert grad is not None
        close(grad, T[f"{tag}.{method}.g{name}"], 1e-5)
    close(layer.merged("default").weight, T[f"{tag}.{method}.W_merged"], 2e-6)
    assert adapter.scale == pytest.approx(T[f"{tag}.{method}.scaling"].item(), 1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tag", ["a", "b"])
@pytest.mark.parametrize(("method", "bar"), [("pissa", 2e-4), ("olora", 2e-6)])
def test_starts_that_are_a_part_of_the_weight(method: str, bar: float, tag: str) -> None:
    adapter, layer = on_golden_layer(method, tag)
    a, b = parameter(adapter, "lora_A").detach(), parameter(adapter, "lora_B").detach()
    close(a.abs(), T[f"{tag}.{method}.A"].abs(), bar)
    close(b.abs(), T[f"{tag}.{method}.B"].abs(), bar)
    close(2 * b @ a, T[f"{tag}.{method}.BA"], bar)
    residual = layer.sides["default"].start.residual(layer.base.weight)
    close(residual, T[f"{tag}.{method}.W_res"], bar)
    assert torch.equal(layer.base.weight, T[f"{tag}.W"])
    close(layer.merged("default").weight, T[f"{tag}.W"], 2e-6)


@pytest.mark.parametrize("tag", ["a", "b"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("scale", "bar"), [("stable", 1e-5), ("gd_scale", 1e-5), ("unit", 1e-5), ("weight_svd", 5e-3)])
def test_start_from_a_gradient(
    direction: str, scale: str, bar: float, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "mean_gradients", lambda *_: {PATH: T[f"{tag}.loraga.grad"]})
    gamma = CONFIG["loraga_gamma"]
    settings = {"direction": direction, "scale": scale, "stable_gamma": gamma, "batches": batches()}
    adapter, layer = on_golden_layer("lora-ga", tag, **settings)
    a, b = parameter(adapter, "lora_A").detach(), parameter(adapter, "lora_B").detach()
    close(a.abs(), T[f"{tag}.loraga.{direction}.{scale}.A"].abs(), bar)
    close(b.abs(), T[f"{tag}.loraga.{direction}.{scale}.B"].abs(), bar)
    close(layer.sides["default"].start.residual(layer.base.weight), T[f"{tag}.W"] - 2 * b @ a, 2e-6)


def test_lora_plus_learns_as_the_reference() -> None:
    settings = CONFIG["loraplus"]
    adapter, layer = on_golden_layer("lora-plus", "a", learning_rate_ratio=settings["ratio"])
    parameter(adapter, "lora_A").data.copy_(T["a.A"])
    optimizer = create_optimizer(adapter.model, settings["lr"], 0.0, settings["betas"], settings["eps"])
    for group in optimizer.param_groups:
        group["weight_decay"] = settings["weight_decay"]
    losses = []
    for _ in range(3):
        loss = (layer(T["loraplus.X"]) - T["loraplus.Y"]).square().mean()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(torch.stack(losses), T["loraplus.losses"], 1e-6)
    close(parameter(adapter, "lora_A"), T["loraplus.A3"], 1e-6)
    close(parameter(adapter, "lora_B"), T["loraplus.B3"], 1e-6)


# ---------------------------------------------------------------- bases


@pytest.mark.parametrize("method", OPTIONS)
def test_parameters_stay_in_32_bits_on_bases_of_16(method: str) -> None:
    model = tiny("rwkv6", dtype=torch.bfloat16)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = tuning.create(method, model, **options(method))
    disturb(adapter)
    adapter.model.half().to(torch.bfloat16)
    tensors = adapter.tensors().values()
    assert {value.dtype for value in tensors} == {torch.float32}
    out = model(tokens()).logits
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.named_parameters().values())
    adapter.verify(tokens())
    layer: Any = model.get_submodule("blocks.1.ffn.key")
    weight = layer.sides["default"].merged_weight(layer.base.weight.float())
    assert weight.dtype == torch.float32
    assert torch.equal(layer.base.weight, own["blocks.1.ffn.key.weight"].half().to(torch.bfloat16))


@pytest.mark.parametrize("method", [name for name in OPTIONS if name != "lora-ga"])
def test_a_quantised_base_acts_as_its_dequantised_weights(method: str) -> None:
    frozen = freeze_base(tiny("rwkv7"), "nf4", targets=["att.key", "ffn"])
    adapter = tuning.create(method, frozen, **options(method))
    plain = tuning.create(method, thaw(_without(frozen)), **options(method))
    plain.load_tensors(adapter.tensors())
    results = []
    for one in (adapter, plain):
        disturb(one)
        logits = one.model(tokens()).logits
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in one.named_parameters().values()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)
    with pytest.raises(WkvError, match="FrozenLinear cannot take up an adapter"):
        adapter.merge()


def _without(model: Any) -> Any:
    """A copy without its adapters."""
    made = copy.deepcopy(model)
    for adapter in list(made.adapters.values()):
        adapter.remove()
    return made


def test_native_quantised_bases_learn_too() -> None:
    model = quantize_model(tiny("rwkv7"))
    before = model(tokens()).logits
    adapter = tuning.create("lora", model, rank=4)
    assert torch.equal(model(tokens()).logits, before)
    disturb(adapter)
    model(tokens()).logits.sum().backward()
    assert all(bool(p.grad.any()) for p in adapter.named_parameters().values() if p.grad is not None)


def test_lora_ga_needs_gradients_of_the_weights() -> None:
    with pytest.raises(WkvError, match=r"blocks\.0\.att\.receptance: FrozenLinear has no gradient"):
        tuning.create("lora-ga", freeze_base(tiny("rwkv7")), **options("lora-ga"))


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_under_autocast(method: str) -> None:
    model = tiny("rwkv7")
    adapter = tuning.create(method, model, **options(method))
    disturb(adapter)
    exact = model(tokens()).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens()).logits
    logits.float().sum().backward()
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.named_parameters().values())


# ---------------------------------------------------------------- several, copies, modes


def test_adapters_of_all_kinds_share_a_layer() -> None:
    model = tiny("rwkv7")
    x, logits = tokens(), {}
    base = model(x).logits.detach()
    for seed, method in enumerate(OPTIONS):
        adapter = tuning.create(method, model, method, **options(method))
        disturb(adapter, seed)
        logits[method] = model(x).logits.detach()
    for method in reversed(OPTIONS):
        with tuning.using(model, method):
            assert torch.equal(model(x).logits, logits[method])
    with tuning.using(model):
        assert torch.equal(model(x).logits, base)
    model.adapters["pissa"].remove()
    model.adapters["dora"].activate()
    assert torch.equal(model(x).logits, logits["dora"])


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_copies_of_a_model_have_adapters_of_their_own(method: str) -> None:
    model = tiny("rwkv5")
    adapter = tuning.create(method, model, **options(method))
    disturb(adapter)
    before = model(tokens()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, before)
    disturb(twin.adapters["default"], seed=9)
    assert torch.equal(model(tokens()).logits, before)
    assert not torch.equal(twin(tokens()).logits, before)
    twin.adapters["default"].verify(tokens())


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_dropout_is_for_training_alone(method: str) -> None:
    model = tiny("rwkv7")
    adapter = tuning.create(method, model, **options(method), dropout=0.5)
    disturb(adapter)
    torch.manual_seed(0)
    first, second = model(tokens()).logits, model(tokens()).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    adapter.verify(tokens())


def test_the_model_has_each_weight_once_and_adapters_are_not_its_own() -> None:
    model = tiny("rwkv7")
    names = set(model.state_dict())
    tuning.create("pissa", model, rank=4, targets="att.key")
    added = {key for key in model.state_dict() if ".sides." in key}
    mounted = {key.replace(".base.", ".") for key in model.state_dict()} - added
    assert mounted == names
    parts = ("start.initial_A", "start.initial_B", "lora_A.default.weight", "lora_B.default.weight")
    assert added == {f"blocks.{i}.att.key.sides.default.{part}" for i in range(2) for part in parts}


def test_names_in_files() -> None:
    adapter = tuning.create("dora", tiny("rwkv7"), rank=4, targets=["blocks.1.att.key"])
    assert list(adapter.tensors()) == [f"blocks.1.att.key.{name}" for name in ("lora_A", "lora_B", "magnitude")]
    adapter = tuning.create("olora", tiny("rwkv7"), rank=4, targets=["blocks.1.att.key"])
    names = ("lora_A", "lora_B", "initial_A", "initial_B")
    assert list(adapter.tensors()) == [f"blocks.1.att.key.{name}" for name in names]
    assert list(adapter.named_parameters()) == [f"blocks.1.att.key.{name}" for name in names[:2]]


@pytest.mark.parametrize("method", FROM_WEIGHT)
def test_files_bring_the_start(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tuning.create(method, tiny("rwkv7"), **options(method))
    disturb(adapter)
    adapter.save(tmp_path / "a.safetensors")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a start that the file brings was computed again")

    fresh = tiny("rwkv7")
    for name in ("linalg.svd", "linalg.qr", "svd_lowrank"):
        monkeypatch.setattr(f"torch.{name}", forbidden)
    monkeypatch.setattr(lora, "mean_gradients", forbidden)
    again = tuning.load(tmp_path / "a.safetensors", fresh)
    assert torch.equal(again.model(tokens()).logits, adapter.model(tokens()).logits)


def test_the_approximate_decomposition_also_starts_as_the_model() -> None:
    model = tiny("rwkv7")
    before = model(tokens()).logits.detach()
    tuning.create("pissa", model, rank=4, niter=2)
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-5 * float(before.abs().max()))


# ---------------------------------------------------------------- the gradient of LoRA-GA


def test_mean_gradient_is_that_of_the_frozen_model() -> None:
    model: Any = tiny("rwkv7")
    path = "blocks.1.ffn.key"
    x, y = tokens(2, 12, seed=5), tokens(2, 12, seed=6)
    mask = torch.rand(2, 12) < 0.5
    expected = torch.zeros_like(model.get_submodule(path).weight)
    for counted in (torch.ones_like(mask), mask):
        loss = nn.functional.cross_entropy(model(x).logits[counted], y[counted])
        expected += torch.autograd.grad(loss, model.get_submodule(path).weight)[0] / 2

    disturb(tuning.create("lora", model, rank=4, targets=["key", "att"]))
    model.emb.weight.grad = torch.ones_like(model.emb.weight)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = mean_gradients(model, [path, "blocks.0.att.value"], [(x, y), Batch(x, y, loss_mask=mask)])
    close(found[path], expected, 1e-5)
    assert found.keys() == {path, "blocks.0.att.value"}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model.emb.weight.grad, torch.ones(VOCABULARY, 32))
    assert model.adapters["default"].is_active
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "emb.weight")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "pass batches"),
        ({"batches": []}, "found none"),
        ({"batches": [3]}, "found int"),
        ({"batches": [Batch(tokens(), tokens(), loss_mask=tokens() < 0)]}, "no target that counts"),
        ({"batches": batches(), "direction": "AB"}, "direction must be one of ArB2r, A2rBr, ArBr, random"),
        ({"batches": batches(), "scale": "big"}, "scale must be one of stable"),
        ({"batches": batches(), "stable_gamma": 0}, "stable_gamma must be a number above 0"),
        ({"batches": batches(), "rank": 17}, r"needs a rank of at most 16"),
    ],
)
def test_mistakes_with_lora_ga(given: dict[str, Any], message: str) -> None:
    model = tiny("rwkv7")
    with pytest.raises(WkvError, match=message):
        tuning.create("lora-ga", model, **given)
    assert not model.adapters
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("lora", {"rank": 0}, "rank must be a positive integer"),
        ("lora", {"alpha": 0}, "alpha must be a number above 0"),
        ("lora", {"alpha": float("nan")}, "alpha must be"),
        ("lora", {"dropout": 1.0}, "dropout must be a number from 0 up to, not including, 1"),
        ("lora", {"batches": []}, "lora has no option 'batches'; it has rank, alpha, dropout, targets"),
        ("lora-plus", {"learning_rate_ratio": -1}, "learning_rate_ratio must be"),
        ("pissa", {"niter": 0}, "niter must be a positive integer"),
        ("olora", {"rank": 33}, r"blocks\.0\.att\.receptance: olora of a matrix \[32, 32\] needs a rank of at most 32"),
        ("lora", {"targets": "no"}, "neither layer nor matrix 'no'"),
        ("lora", {"targets": []}, "name at least one layer"),
    ],
)
def test_mistakes(method: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        tuning.create(method, tiny("rwkv7"), **given)


@pytest.mark.parametrize(("method", "message"), [("dora", "norms of the rows"), ("pissa", "it is zero")])
def test_weights_from_which_nothing_can_start(method: str, message: str) -> None:
    model: Any = tiny("rwkv7")
    with torch.no_grad():
        model.get_submodule("blocks.1.att.output").weight.zero_()
    with pytest.raises(WkvError, match=rf"blocks\.1\.att\.output: .*{message}"):
        tuning.create(method, model, rank=4)
    assert "base" not in dict(model.get_submodule("blocks.0.att").named_children())
    tuning.create(method, model, rank=4, targets=["key", "value"])


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(WkvError, match=r'pip install "wkv\[tune\]"'):
        tuning.create("lora", tiny("rwkv7"))


def test_peft_is_imported_when_it_is_needed() -> None:
    for path in Path(tuning.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("peft", "transformers") for name in names), path
