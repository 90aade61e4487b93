"""`wkv.upgrade_model` and `wkv upgrade`: every path, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import wkv
from tests.test_registry import build, tokens
from wkv.cli import app
from wkv.errors import WkvError

PATHS = [("rwkv4", "temporal"), ("rwkv4", "rrwkv"), ("rwkv7", "meta_state"), ("rwkv7", "hybrid"),
         ("transformer", "hybrid")]  # fmt: skip


@pytest.mark.parametrize(("base", "name"), PATHS)
def test_the_logits_stay(base: str, name: str) -> None:
    source, ids = build(base, torch.float32), tokens()
    upgraded = wkv.upgrade_model(source, name)
    assert upgraded.name == name
    with torch.no_grad():
        expected = source(ids).logits
        assert (upgraded(ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_is_refused() -> None:
    model: Any = build("rwkv7", torch.float32)
    for argument, name, message in (
        (model, "rwkv6", "rwkv6 is not made of other models; one of hybrid, meta_state, rrwkv, temporal"),
        (model, "temporal", "from_base takes an RWKV-4, found 'rwkv7'"),
        (model, "nonsense", "model 'nonsense' is unknown"),
        (model.head, "hybrid", "upgrade_model takes a model of this library, found Linear"),
    ):
        with pytest.raises(WkvError, match=message):
            wkv.upgrade_model(argument, name)
    wkv.tuning.create("lora", model, rank=2)
    with pytest.raises(WkvError, match="the model carries the adapter"):
        wkv.upgrade_model(model, "hybrid")


def test_the_command(tmp_path: Path) -> None:
    source, target = tmp_path / "base.safetensors", tmp_path / "new.safetensors"
    wkv.save_model(build("rwkv4", torch.float32), source)
    words = ["upgrade", str(source), "temporal", str(target), "perspectives=2"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "rwkv4 has become temporal, with" in done.stderr
    assert wkv.load_model(target).config.perspectives == 2
    with pytest.raises(WkvError, match="is there already"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    with pytest.raises(WkvError, match="expected KEY=VALUE, found 'perspectives'"):
        CliRunner().invoke(app, [*words[:-1], "perspectives", "--replace"], catch_exceptions=False)
