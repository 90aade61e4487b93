"""`inspect` and `wkv info`: what a file is, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import wkv
from tests.checkpoints.helpers import GOLDEN, NAMES, official, tiny, write_rwkv_cpp
from wkv.checkpoints import inspect
from wkv.checkpoints.official import LAYER_SHAPES, TITLES, official_keys, symbolic_shape
from wkv.cli import app
from wkv.errors import CheckpointError


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_official_shapes_is_that_of_the_models(name: str) -> None:
    model = tiny(name)
    config = model.config.to_dict()
    letters = {"V": "vocab_size", "C": "hidden_size", "A": "attention_size", "F": "ffn_size", "N": "head_size",
               "M": "shift_rank", "W": "decay_rank", "I": "iclr_rank", "R": "value_rank", "G": "gate_rank",
               "E": "embed_rank", "P": "perspectives"}  # fmt: skip
    sizes = {letter: config.get(field) for letter, field in letters.items()} | {"1": 1, "5": 5, "H": 2}
    sizes |= {"5M": 5 * config.get("shift_rank", 0), "EE": config.get("embed_rank", 0) ** 2}
    assert sorted(official_keys(name, config)) == sorted(model.state_dict())
    for key, value in model.state_dict().items():
        assert list(value.shape) == [sizes[letter] for letter in symbolic_shape(name, key) or []], key


def test_every_official_version_has_a_title() -> None:
    assert set(TITLES) == set(LAYER_SHAPES) == set(NAMES) <= set(wkv.list_models())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_complete_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(name, dtype)
    for form, file, called in (
        ("wkv", "m.safetensors", "wkv"), ("official", "m.pth", "pth"), ("official", "o.safetensors", "safetensors")
    ):  # fmt: skip
        wkv.save_model(model, tmp_path / file, form)
        info = inspect(tmp_path / file)
        assert (info.format, info.model, info.title) == (called, name, TITLES[name])
        assert info.config == model.config.to_dict()
        assert info.num_parameters == model.num_parameters
        assert info.dtypes == {str(dtype)[6:]: len(model.state_dict())}
        assert info.file_bytes == (tmp_path / file).stat().st_size
        assert info.state_bytes == model.init_state(1).num_bytes
        assert info.loadable
        assert info.missing == info.unexpected == info.misfits == []
        assert info.verdict.endswith("can be loaded")
        json.dumps(info.to_dict())


def test_an_incomplete_file_is_described_too(tmp_path: Path) -> None:
    weights = official("rwkv7")
    del weights["blocks.1.att.k_a"]
    weights |= {"blocks.1.att.k_b": torch.zeros(3), "blocks.0.ln1.bias": torch.zeros(12, dtype=torch.long)}
    torch.save({**weights, "epoch": 5}, tmp_path / "m.pth")
    info = inspect(tmp_path / "m.pth")
    assert not info.loadable
    assert info.missing == ["blocks.1.att.k_a"]
    assert info.unexpected == ["blocks.1.att.k_b", "epoch (int)"]
    assert info.misfits == ["blocks.0.ln1.bias has type int64, expected float32, bfloat16, float16 or float64"]
    assert "cannot be loaded" in info.verdict
    with pytest.raises(CheckpointError) as caught:
        wkv.load_model(tmp_path / "m.pth")
    for word in ("m.pth", "RWKV-7", "k_a", "k_b", "epoch", "ln1.bias", "int64"):
        assert word in str(caught.value)


def test_values_are_not_read(tmp_path: Path, monkeypatch) -> None:
    weights = official("rwkv7")
    save_file(weights, tmp_path / "m.safetensors")
    torch.save(weights, tmp_path / "m.pth")
    write_rwkv_cpp(tmp_path / "m.bin", "rwkv7", weights)

    def forbidden(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("wkv.checkpoints.loading._materialise", forbidden)
    monkeypatch.setattr("wkv.checkpoints.rwkv_cpp.np.frombuffer", forbidden)
    for suffix in ("safetensors", "pth", "bin"):
        assert inspect(tmp_path / f"m.{suffix}").loadable


def test_states_are_described(tmp_path: Path) -> None:
    model = tiny("rwkv6")
    state = model.init_state(2)
    state.save(tmp_path / "s.state")
    info = inspect(tmp_path / "s.state")
    assert (info.format, info.model) == ("state", "rwkv6")
    assert info.config == {"num_layers": 3, "batch_size": 2}
    assert info.state_bytes * 2 == state.num_bytes
    assert info.verdict == "a saved RWKV-6 state of 2 sequences, 3 layers"
    with pytest.raises(CheckpointError, match=r"a saved state, not a model; read it with wkv\.State\.load"):
        wkv.load_model(tmp_path / "s.state")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["info", *map(str, arguments)])
    if isinstance(result.exception, CheckpointError):
        return 1, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_verb_prints_the_verdict_first() -> None:
    code, text = run(GOLDEN / "rwkv6")
    assert code == 0
    assert text.splitlines()[0].startswith("RWKV-6, 2 layers x 128, 336,640 parameters, bfloat16: can be loaded")
    for word in ("vocab size 97", "ranks", "shift", "stored as", "66.6 kB (66,560 bytes) per sequence"):
        assert word in text


def test_the_verb_takes_shards_and_prints_json() -> None:
    code, text = run(*sorted((GOLDEN / "rwkv7").glob("ckpt-*")), "--json")
    assert code == 0
    assert json.loads(text)["model"] == "rwkv7"
    assert json.loads(text)["loadable"] is True


def test_the_verb_on_a_state(tmp_path: Path) -> None:
    tiny("rwkv4").init_state(1).save(tmp_path / "s.safetensors")
    code, text = run(tmp_path / "s.safetensors")
    assert code == 0
    assert text.startswith("a saved RWKV-4 state of 1 sequence, 3 layers")


def test_the_verb_on_bad_files(tmp_path: Path) -> None:
    weights = official("rwkv4")
    torch.save({key: value for key, value in weights.items() if "ln1" not in key}, tmp_path / "m.pth")
    code, text = run(tmp_path / "m.pth")
    assert code == 1
    assert "cannot be loaded, missing blocks.0.ln1.weight" in text
    (tmp_path / "page.pth").write_text("<html>404</html>")
    code, text = run(tmp_path / "page.pth")
    assert code == 1
    assert "a web page" in text
    assert len(text.strip().splitlines()) == 1
