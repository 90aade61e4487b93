"""LoRA of matrices that are no linear layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wkv
from wkv import tuning
from wkv.errors import WkvError
from wkv.quantization import default_policy, quantize_model

from .helpers import disturb, tiny, tokens

TARGETS = {
    "rwkv7": ["att.w1", "att.g2", "blocks.1.att.v[12]", "key"],
    "rwkv7a": ["att.a2", "ffn.s1", "s2"],
    "rwkv6": ["time_maa_w1", "att.time_maa_w2", "time_decay_w1", "ffn.value"],
}


def paths(adapter: tuning.Adapter) -> set[str]:
    return {name.rpartition(".")[0] for name in adapter.named_parameters()}


@pytest.mark.parametrize("method", ["lora", "rslora", "lora-plus"])
@pytest.mark.parametrize("name", TARGETS)
def test_life_beside_parameters(name: str, method: str, tmp_path: Path) -> None:
    model = tiny(name)
    x, before = tokens(), tiny(name)(tokens()).logits.detach()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    adapter = tuning.create(method, model, rank=4, targets=TARGETS[name])
    assert torch.equal(model(x).logits, before)
    mounted = {key.replace(".base.", ".") for key in model.state_dict() if ".sides." not in key}
    assert mounted == own.keys()

    disturb(adapter)
    after = model(x).logits
    after.sum().backward()
    learns = {id(p) for p in model.parameters() if p.grad is not None}
    assert learns == {id(p) for p in adapter.named_parameters().values()}
    assert adapter.verify(x) < 1e-5
    adapter.merge()
    assert model.state_dict().keys() == own.keys()
    wkv.save_model(model, tmp_path / "merged.safetensors")
    merged = wkv.load_model(tmp_path / "merged.safetensors")
    torch.testing.assert_close(merged(x).logits, after, rtol=0, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(model(x).logits, after)

    adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x).logits, before)
    again = tuning.load(tmp_path / "adapter.safetensors", tiny(name))
    assert torch.equal(again.model(x).logits, after)


def test_names_of_targets() -> None:
    found = paths(tuning.create("lora", tiny("rwkv7"), rank=2, targets=["w1", "blocks.0.att.[ag]2", "att.key"]))
    assert found == {
        "blocks.0.att.w1", "blocks.1.att.w1", "blocks.0.att.a2", "blocks.0.att.g2", "blocks.0.att.key",
        "blocks.1.att.key",
    }  # fmt: skip
    # A name of layers means layers alone.
    found = paths(tuning.create("lora", tiny("rwkv7"), rank=2, targets=["blocks.1.att.*"]))
    assert found == {f"blocks.1.att.{name}" for name in ("receptance", "key", "value", "output")}


def test_the_same_as_peft_computes() -> None:
    import peft

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(weight.clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w1

    model: Any = tiny("rwkv7")
    adapter = tuning.create("rslora", model, rank=4, alpha=3, targets=["w1"])
    disturb(adapter)
    att, own = model.blocks[0].att, adapter.named_parameters()
    weight = att._parameters["w1"].detach()
    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=[], target_parameters=["inner.w1"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"inner": Holder()}))["inner"]
    theirs.lora_A.default.weight.data.copy_(own["blocks.0.att.w1.lora_A"])
    theirs.lora_B.default.weight.data.copy_(own["blocks.0.att.w1.lora_B"])
    x = torch.randn(3, 32)
    torch.testing.assert_close(x @ att.w1, theirs(x), rtol=1e-5, atol=1e-5)


def test_adapters_share_a_module() -> None:
    model = tiny("rwkv7")
    x, before = tokens(), tiny("rwkv7")(tokens()).logits
    logits = {}
    for seed, (name, targets) in enumerate({"a": ["w1", "g2"], "b": ["g2"], "c": ["key"], "d": ["a1", "key"]}.items()):
        disturb(tuning.create("lora", model, name, rank=4, targets=targets), seed)
        logits[name] = model(x).logits
    for name in "acdb":
        with tuning.using(model, name):
            assert torch.equal(model(x).logits, logits[name])
    with tuning.using(model):
        assert torch.equal(model(x).logits, before)
    model.adapters["a"].verify(x)
    model.adapters["a"].merge()
    model.adapters["a"].unmerge()
    model.adapters["a"].remove()
    for name in "db":
        model.adapters[name].activate()
        assert torch.equal(model(x).logits, logits[name])


def test_copies_have_sides_of_their_own() -> None:
    model = tiny("rwkv7")
    disturb(tuning.create("lora", model, rank=4, targets=["w1"]))
    before = model(tokens()).logits
    twin = copy.deepcopy(model)
    disturb(twin.adapters["default"], seed=8)
    assert torch.equal(model(tokens()).logits, before)
    assert not torch.equal(twin(tokens()).logits, before)


def test_in_sixteen_bits_the_sides_stay_in_thirty_two() -> None:
    model = tiny("rwkv6", dtype=torch.bfloat16)
    adapter = tuning.create("lora", model, rank=4, targets=["time_maa_w2", "key"])
    disturb(adapter)
    model.half().bfloat16()
    assert {p.dtype for p in adapter.named_parameters().values()} == {torch.float32}
    adapter.verify(tokens())
    model(tokens()).logits.float().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.named_parameters().values())


def test_beside_quantised_layers() -> None:
    model = quantize_model(tiny("rwkv7"), policy=default_policy(8, torch.float32))
    adapter = tuning.create("lora", model, rank=4, targets=["w1", "g2"])
    disturb(adapter)
    logits = model(tokens()).logits
    adapter.merge()
    torch.testing.assert_close(model(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(model(tokens()).logits, logits)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("lora", {"targets": ["att.x_r"]}, r"LoRA is for matrices, and blocks\.0\.att\.x_r is \[1, 1, 32\]"),
        ("lora", {"targets": ["w9"]}, r"neither layer nor matrix 'w9'; there are .*att\.w1"),
        ("lora", {"targets": ["w1"], "dropout": 0.1}, r"dropout is for linear layers, and blocks\.0\.att\.w1"),
        ("dora", {"targets": ["w1"]}, "dora is for linear layers, .* lora, rslora, lora-plus can adapt it"),
        ("pissa", {"targets": ["key", "w1"]}, "pissa is for linear layers"),
    ],
)
def test_mistakes(method: str, given: dict[str, Any], message: str) -> None:
    model = tiny("rwkv7")
    with pytest.raises(WkvError, match=message):
        tuning.create(method, model, **given)
    assert not model.adapters
