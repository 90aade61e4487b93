"""Adapters of other programs on models, through `import_adapter` and `export_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from wkv import tuning
from wkv.errors import CheckpointError, WkvError

from .helpers import disturb, options, tiny, tokens

CASES = [
    ("bone-row", "a.pth", None), ("bone-row", "a.pth", "disha"), ("bone-col", "a.pth", "bone"),
    ("miss", "folder", None),
    ("bone-ab", "a.pth", None), ("miss-mini", "folder", None), ("bone-col", "folder", "peft-miss"),
    ("lora", "folder", None), ("dora", "folder", None), ("state", "a.pth", None), ("fullstate", "a.safetensors", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "form"), CASES)
def test_out_and_back(method: str, target: str, form: str | None, tmp_path: Path) -> None:
    model = tiny("rwkv7")
    x = tokens()
    adapter = tuning.create(method, model, **options(method))
    disturb(adapter)
    expected = model(x).logits.detach()
    tuning.export_adapter(adapter, tmp_path / target, form)
    other = tiny("rwkv7")
    again = tuning.import_adapter(tmp_path / target, other, "other", method if method.startswith("bone") else None)
    assert again.method == method
    assert again.is_active
    assert torch.equal(other(x).logits, expected)


def test_what_stays_open_must_be_said(tmp_path: Path) -> None:
    model = tiny("rwkv7")
    adapter = tuning.create("bone-row", model, rank=4, targets="att.key")
    tuning.export_adapter(adapter, tmp_path / "a.pth")
    other = tiny("rwkv7")
    with pytest.raises(WkvError, match="bone-col"):
        tuning.import_adapter(tmp_path / "a.pth", other)
    assert not other.adapters


def test_parameters_that_were_trained_along_are_not_forgotten(tmp_path: Path) -> None:
    model = tiny("rwkv7")
    adapter = tuning.create("bone-row", model, rank=4)
    tuning.export_adapter(adapter, tmp_path / "a.pth", "disha")
    content: dict[str, Any] = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({**content, "blocks.0.ln1.weight": torch.ones(32)}, tmp_path / "b.pth")
    other = tiny("rwkv7")
    with pytest.raises(WkvError, match=r"1 other trained parameters, such as blocks\.0\.ln1\.weight"):
        tuning.import_adapter(tmp_path / "b.pth", other)
    assert not other.adapters
    tuning.import_adapter(tmp_path / "b.pth", other, ignore_others=True)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    torch.save({"blocks.0.att.key.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no adapter that is known here"):
        tuning.import_adapter(tmp_path / "a.pth", tiny("rwkv7"))
    with pytest.raises(WkvError, match="nowhere"):
        tuning.import_adapter(tmp_path / "nowhere", tiny("rwkv7"))
    adapter = tuning.create("bone-col", tiny("rwkv7"), rank=4)
    with pytest.raises(WkvError):
        tuning.export_adapter(adapter, tmp_path / "b.pth", "runner")
    assert not (tmp_path / "b.pth").exists()
