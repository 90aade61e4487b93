"""Method "peft": the other methods of peft, by their configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from wkv import tuning
from wkv.errors import WkvError
from wkv.quantization import quantize_model
from wkv.quantization.frozen import freeze_base
from wkv.tuning.any_peft import TYPES
from wkv.tuning.methods import METHODS

from .helpers import disturb, tiny, tokens

SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "ROAD": {"group_size": 8},
    "WAVEFT": {"n_frequency": 20},
}
CASES = [
    *((kind, SMALL.get(kind, {"r": 4})) for kind in TYPES),
    ("MISS", {"r": 4, "init_weights": "bat"}),
    ("LORA", {"r": 4, "init_lora_weights": "mica"}),
]
# Configs whose default start is not the model itself.
ELSEWHERE = ("C3A", "FOURIERFT")
# They start by division or decomposition, or go another way round: rounding.
ROUNDED = ("DEFT", "HRA", "OSF", "GLORA")


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_every_type(kind: str, settings: dict[str, Any], base: str, tmp_path: Path) -> None:
    model = tiny("rwkv7", dtype=torch.bfloat16 if base == "bfloat16" else torch.float32)
    model = {"nf4": freeze_base, "int8": quantize_model}.get(base, lambda same: same)(model)
    x, own = tokens(), {key: value.clone() for key, value in model.state_dict().items()}
    before = model(x).logits.detach()
    targets = ["blocks.0.att.key", "blocks.1.ffn"]
    adapter = tuning.create("peft", model, config={"peft_type": kind, **settings}, targets=targets)
    bar = {"bfloat16": 2e-2, "int8": 1e-3}.get(base, 1e-5 if kind in ROUNDED else 0)
    change = (model(x).logits - before).detach().abs().max() / before.abs().max()
    assert change <= bar or kind in ELSEWHERE

    disturb(adapter)
    after = model(x).logits
    assert not torch.equal(after, before)
    after.float().sum().backward()
    learns = {id(p) for p in model.parameters() if p.grad is not None}
    assert learns == {id(p) for p in adapter.named_parameters().values()}
    if base in ("float32", "bfloat16"):
        adapter.verify(x)
    adapter.save(tmp_path / "a.safetensors")
    adapter.remove()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    torch.manual_seed(5)
    tuning.load(tmp_path / "a.safetensors", model)
    assert torch.equal(model(x).logits, after)


def test_a_config_object_and_two_variants_on_one_layer() -> None:
    import peft

    model = tiny("rwkv7")
    logits = {}
    for name, config in {"a": peft.MissConfig(r=4), "b": peft.MissConfig(r=4, init_weights="bat")}.items():
        disturb(tuning.create("peft", model, name, config=config))
        logits[name] = model(tokens()).logits
    with tuning.using(model, "a"):
        assert torch.equal(model(tokens()).logits, logits["a"])
    assert torch.equal(model(tokens()).logits, logits["b"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "pass config=, a config of peft"),
        ({"r": 4}, "config is not one of peft"),
        ({"peft_type": "NONE"}, "config is not one of peft"),
        ({"peft_type": "VERA"}, "VERA does not work on one linear layer"),
        ({"peft_type": "LORA", "target_modules": ["key"]}, "config sets target_modules"),
        ({"peft_type": "LORA", "rank_pattern": {"key": 3}}, "config sets rank_pattern"),
        ({"peft_type": "LORA", "bias": "all"}, "biases to be trained"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, r"blocks\.0\.att\.receptance: .*\(pissa\); pissa, olora"),
        ({"peft_type": "ROAD", "group_size": 24}, r"blocks\.0\.att\.receptance: peft: .*divisible"),
    ],
)
def test_mistakes(config: Any, message: str) -> None:
    model = tiny("rwkv7")
    with pytest.raises(WkvError, match=message):
        tuning.create("peft", model, config=config)
    assert not model.adapters


def test_it_is_a_method() -> None:
    assert METHODS["peft"].place == ("wkv.tuning.any_peft", "AnyPeftAdapter")
