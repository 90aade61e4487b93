"""rwkv.cpp files of every version and type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wkv
from tests.checkpoints.helpers import official, write_rwkv_cpp
from wkv.errors import CheckpointError

VERSIONS = ("rwkv4", "rwkv5", "rwkv5_0", "rwkv5_1", "rwkv6", "rwkv7")
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WIDE = {"hidden_size": 32, "attention_size": 32, "ffn_size": 64}


@pytest.mark.parametrize("version", [100, 101])
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("name", VERSIONS)
def test_unquantised(name: str, kind: str, version: int, tmp_path: Path) -> None:
    weights = official(name)
    expected = write_rwkv_cpp(tmp_path / "m.bin", name, weights, kind, version)
    model = wkv.load_model(tmp_path / "m.bin", dtype=torch.float32)
    assert model.name == name
    for key, value in model.state_dict().items():
        exact = "time_decay" not in key and "time_first" not in key
        torch.testing.assert_close(value, expected[key], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VERSIONS)
def test_quantised(name: str, kind: str, tmp_path: Path) -> None:
    expected = write_rwkv_cpp(tmp_path / "m.bin", name, official(name, **WIDE), kind)
    model = wkv.load_model(tmp_path / "m.bin")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for key in ("att.key", "att.output", "ffn.value"):
        assert torch.equal(model.state_dict()[f"blocks.1.{key}.weight"], expected[f"blocks.1.{key}.weight"])
    info = wkv.checkpoints.inspect(tmp_path / "m.bin")
    assert info.format == "rwkv.cpp"
    assert info.dtypes[kind] >= 15


def test_decays_at_the_end_of_the_range(tmp_path: Path) -> None:
    """A stored decay of exactly 0 or 1 (rounded) stays finite and stays a decay of 0 or 1."""
    weights = official("rwkv5")
    weights["blocks.0.att.time_decay"][0] = torch.tensor([-40.0, -20.0, 6.0, 20.0])
    write_rwkv_cpp(tmp_path / "m.bin", "rwkv5", weights)
    found = wkv.load_model(tmp_path / "m.bin").blocks[0].att.time_decay[0].detach()
    assert found.isfinite().all()
    torch.testing.assert_close((-found.exp()).exp(), torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("name", "key", "word"), [
    ("rwkv4", "blocks.1.att.time_decay", "expected negative values"),
    ("rwkv5", "blocks.1.att.time_decay", "expected values between 0 and 1"),
    ("rwkv5_0", "blocks.1.att.time_first", "expected exp"),
])  # fmt: skip
def test_values_that_no_transform_can_make(name: str, key: str, word: str, tmp_path: Path, monkeypatch) -> None:
    from tests.checkpoints import helpers

    before = helpers.to_rwkv_cpp

    def spoiled(model_name, name, weights):
        stored_key, value = before(model_name, name, weights)
        return stored_key, value * 0 + (-2 if "first" in key else 2) if name == key else value

    monkeypatch.setattr(helpers, "to_rwkv_cpp", spoiled)
    write_rwkv_cpp(tmp_path / "m.bin", name, official(name))
    with pytest.raises(CheckpointError, match=f"{key} holds .*{word}"):
        wkv.load_model(tmp_path / "m.bin")


def test_old_quantised_files_are_refused(tmp_path: Path) -> None:
    write_rwkv_cpp(tmp_path / "m.bin", "rwkv4", official("rwkv4", **WIDE), "Q4_0", version=100)
    with pytest.raises(CheckpointError, match="before its block layout changed"):
        wkv.load_model(tmp_path / "m.bin")
