"""Folders of peft, checked against peft itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wkv import tuning
from wkv.errors import CheckpointError, WkvError
from wkv.tuning.create import mount_file
from wkv.tuning.lora import OPTIONS, PeftAdapter
from wkv.tuning.peft_files import CONFIG, read_peft, write_peft

from .helpers import disturb, options, tiny, tokens

WEIGHTS = "adapter_model.safetensors"


def trained(method: str, **more: Any) -> PeftAdapter:
    adapter = tuning.create(method, tiny("rwkv7"), **{**options(method), **more})
    assert isinstance(adapter, PeftAdapter)
    disturb(adapter)
    return adapter


def mounted(path: Path) -> tuning.Adapter:
    model = tiny("rwkv7")
    return mount_file(read_peft(path, model), model, "theirs", str(path))


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize("method", OPTIONS)
def test_to_peft_and_back(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = trained(method, alpha=3)
    x = tokens()
    expected = adapter.model(x).logits.detach()
    write_peft(tmp_path / "ours", adapter)
    theirs: Any = PeftModel.from_pretrained(tiny("rwkv7"), tmp_path / "ours")  # type: ignore[arg-type]
    atol = 2e-6 * float(expected.abs().max())
    torch.testing.assert_close(theirs.base_model.model(x).logits, expected, rtol=0, atol=atol)

    theirs.save_pretrained(tmp_path / "theirs")
    again = mounted(tmp_path / "theirs")
    torch.testing.assert_close(again.model(x).logits, expected, rtol=0, atol=atol)
    assert again.method == (method if method in ("rslora", "dora") else "lora")
    twice = 2 if method in ("pissa", "olora", "lora-ga") else 1
    assert (again.options["rank"], again.options["alpha"]) == (4 * twice, 3 * twice)
    again.verify(x)
    again.save(tmp_path / "again.safetensors")
    assert torch.equal(
        tuning.load(tmp_path / "again.safetensors", tiny("rwkv7")).model(x).logits, again.model(x).logits
    )


def test_names_in_the_folder(tmp_path: Path) -> None:
    write_peft(tmp_path, trained("dora", targets=["blocks.1.att.key"]))
    assert sorted(load_file(tmp_path / WEIGHTS)) == [
        f"base_model.model.blocks.1.att.key.{name}"
        for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    ]
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["blocks.1.att.key"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.rwkv.", ""])
def test_what_stands_before_the_blocks_does_not_matter(prefix: str, tmp_path: Path) -> None:
    adapter = trained("lora")
    write_peft(tmp_path, adapter)
    tensors = {key.replace("base_model.model.", prefix): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    (tmp_path / WEIGHTS).unlink()
    torch.save({key: value.half() for key, value in tensors.items()}, tmp_path / "adapter_model.bin")
    again = mounted(tmp_path)
    torch.testing.assert_close(again.model(tokens()).logits, adapter.model(tokens()).logits, rtol=0, atol=5e-3)
    assert {value.dtype for value in again.tensors().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of peft_type 'IA3', expected LORA"),
        ({"rank_pattern": {"key": 8}}, "sets rank_pattern, which has no counterpart"),
        ({"alpha_pattern": {"key": 8}}, "sets alpha_pattern"),
        ({"modules_to_save": ["head"]}, "sets modules_to_save"),
        ({"bias": "all"}, "sets bias"),
        ({"target_parameters": ["att.w1"]}, "sets target_parameters"),
        ({"something_new": 3}, "sets something_new"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"use_dora": True, "use_rslora": True}, "DoRA with the scale of rsLoRA"),
        ({"use_dora": True}, "dora needs lora_A, lora_B, magnitude for each layer"),
        ({"r": None}, "rank must be a positive integer"),
        ({"r": 5}, "it is for another model or rank"),
    ],
)
def test_configs_that_cannot_be_followed(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_peft(tmp_path, trained("lora"))
    change(tmp_path, **settings)
    with pytest.raises(WkvError, match=message):
        mounted(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    write_peft(tmp_path, trained("lora"))
    good = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.blocks.0.att.key.lora_A.weight"
    wrong = [
        ({**good, "base_model.model.head.lora_embedding_A": torch.zeros(2)}, "no tensor of LoRA on a linear layer"),
        ({name: value for name, value in good.items() if name != key}, r"look at blocks\.0\.att\.key\.lora_A"),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(4, 4)}, r"it is for base_model\.model\.layers"),
        ({**good, key: torch.zeros(4, 4)}, "it is for another model or rank"),
        ({**good, key: torch.zeros(4, 32, dtype=torch.int32)}, "no tensor of LoRA"),
        ({}, "without tensors"),
    ]
    for tensors, message in wrong:
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(WkvError, match=message):
            mounted(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors in this folder"):
        read_peft(tmp_path, tiny("rwkv7"))
    write_peft(tmp_path, trained("lora"))
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_peft(tmp_path, tiny("rwkv7"))
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="holds list, expected an object"):
        read_peft(tmp_path, tiny("rwkv7"))
    (tmp_path / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read"):
        read_peft(tmp_path / WEIGHTS, tiny("rwkv7"))


def test_what_peft_has_no_place_for(tmp_path: Path) -> None:
    with pytest.raises(WkvError, match=r"blocks\.0\.att\.w1 is no layer"):
        write_peft(tmp_path / "a", trained("lora", targets=["key", "w1"]))
    with pytest.raises(WkvError, match="for the LoRA family, found bone-col"):
        write_peft(tmp_path / "a", tuning.create("bone-col", tiny("rwkv7"), rank=4))  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_peft(tmp_path / "file", trained("lora"))
