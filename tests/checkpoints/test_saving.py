"""`save_model`: every model in every format comes back the same, and a failed save leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import wkv
from tests.checkpoints.helpers import NAMES, assert_same, tiny
from wkv.errors import CheckpointError, WkvError

FORMS = [("wkv", "m.safetensors"), ("official", "m.pth"), ("official", "m.pt"), ("official", "m.safetensors")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("form", "file"), FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, form: str, file: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(name, dtype)
    wkv.save_model(model, tmp_path / file, form)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    found = wkv.load_model(tmp_path / file)
    assert type(found) is type(model)
    assert found.config == model.config
    assert_same(found, dict(model.state_dict()))


def test_official_files_are_plain_dictionaries(tmp_path: Path) -> None:
    model = tiny("rwkv7")
    model.head.weight = model.emb.weight
    wkv.save_model(model, tmp_path / "m.pth", "official")
    wkv.save_model(model, tmp_path / "m.safetensors", "official")
    stored = torch.load(tmp_path / "m.pth", weights_only=True)
    assert type(stored) is dict
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in stored.values())
    other = load_file(tmp_path / "m.safetensors")
    assert stored.keys() == other.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[key], other[key]) for key in stored)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert not file.metadata()


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for form, file in FORMS:
        wkv.save_model(tiny("rwkv4"), tmp_path / file, form)
        wkv.save_model(tiny("rwkv4"), tmp_path / f"again-{file}", form)
        assert (tmp_path / file).read_bytes() == (tmp_path / f"again-{file}").read_bytes()


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    for form, file in FORMS:
        wkv.save_model(tiny("rwkv4"), tmp_path / file, form)
        assert (tmp_path / file).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_views_are_saved_alone(tmp_path: Path) -> None:
    model = tiny("rwkv4")
    large = torch.zeros(1000, 12)
    model.emb.weight = torch.nn.Parameter(large[:11])
    wkv.save_model(model, tmp_path / "m.pth", "official")
    assert (tmp_path / "m.pth").stat().st_size < large.nbytes


@pytest.mark.parametrize("form", ["wkv", "official"])
def test_a_type_to_save_in(form: str, tmp_path: Path) -> None:
    model = tiny("rwkv6")
    wkv.save_model(model, tmp_path / "m.safetensors", form, dtype=torch.bfloat16)
    found = wkv.load_model(tmp_path / "m.safetensors")
    assert_same(found, {key: value.bfloat16() for key, value in model.state_dict().items()})
    assert model.emb.weight.dtype == torch.float32


def test_the_own_format_keeps_configuration_and_tokenizer(tmp_path: Path) -> None:
    model = tiny("rwkv5_1", norm_eps=1e-6, head_norm_eps=1e-3, vocab_size=256)
    model.tokenizer = wkv.tokenizers.ByteTokenizer()
    wkv.save_model(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["wkv"])
    assert described["model"] == "rwkv5_1"
    assert described["version"] == wkv.__version__
    found = wkv.load_model(tmp_path / "m.safetensors")
    assert found.config == model.config
    assert found.tokenizer.to_dict() == {"kind": "bytes"}
    assert wkv.load_model(tmp_path / "m.safetensors", norm_eps=1e-4).config.norm_eps == 1e-4
    with pytest.raises(CheckpointError, match="ffn_size is 22 in the file"):
        wkv.load_model(tmp_path / "m.safetensors", ffn_size=23)


@pytest.mark.parametrize("form", ["wkv", "official"])
@pytest.mark.parametrize("limit", [2000, "3KB", "1GB"])
def test_shards(form: str, limit: int | str, tmp_path: Path) -> None:
    model = tiny("rwkv7")
    wkv.save_model(model, tmp_path / "m.safetensors", form, max_shard_size=limit)
    files = sorted(path.name for path in tmp_path.iterdir())
    if limit == "1GB":
        assert files == ["m.safetensors"]
    else:
        assert files[-1] == "m.safetensors.index.json"
        assert files[0] == f"m-00001-of-{len(files) - 1:05d}.safetensors"
        assert all((tmp_path / file).stat().st_size < 12_000 for file in files[:-1])
        assert_same(wkv.load_model(tmp_path / files[-1]), dict(model.state_dict()))
    assert_same(wkv.load_model(tmp_path), dict(model.state_dict()))
    assert wkv.checkpoints.inspect(tmp_path).loadable


@pytest.mark.parametrize(("arguments", "word"), [
    ({"path": "m.bin"}, "ends in .safetensors"),
    ({"path": "m.pth"}, "ends in .safetensors"),
    ({"path": "m.bin", "format": "official"}, "ends in .pth or .pt or .safetensors"),
    ({"path": "m.safetensors", "format": "hf"}, "'hf' is not available yet; one of wkv, official"),
    ({"path": "m.gguf", "format": "onnx"}, "'onnx' is unknown; one of wkv, official"),
    ({"path": "absent/m.safetensors"}, "absent does not exist"),
    ({"path": "folder.safetensors"}, "is a folder"),
    ({"path": "m.safetensors", "dtype": "int4"}, "dtype 'int4' is not one of"),
    ({"path": "m.safetensors", "max_shard_size": "many"}, "max_shard_size must be"),
    ({"path": "m.safetensors", "max_shard_size": 0}, "max_shard_size must be"),
    ({"path": "m.safetensors", "max_shard_size": -5}, "max_shard_size must be"),
    ({"path": "m.pth", "format": "official", "max_shard_size": 5}, "only .safetensors files"),
])  # fmt: skip
def test_wrong_arguments_write_nothing(arguments: dict, word: str, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WkvError) as caught:
        wkv.save_model(tiny("rwkv4"), **{**arguments, "path": tmp_path / arguments["path"]})
    assert word in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.safetensors"]


def test_only_models_with_values_are_saved(tmp_path: Path) -> None:
    with pytest.raises(WkvError, match="takes a model of this library, found Linear"):
        wkv.save_model(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(WkvError, match=r"emb\.weight has no values"):
        wkv.save_model(tiny("rwkv4").to("meta"), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("form", "file"), FORMS)
@pytest.mark.parametrize("limit", [None, 2000])
def test_a_failed_save_leaves_the_old_file(
    form: str, file: str, limit: int | None, tmp_path: Path, monkeypatch
) -> None:
    if limit and not file.endswith(".safetensors"):
        return
    (tmp_path / file).write_text("old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wkv.checkpoints.saving.os.replace", full)
    with pytest.raises(WkvError, match=r"could not be written .No space left on device"):
        wkv.save_model(tiny("rwkv4"), tmp_path / file, form, max_shard_size=limit)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "old"
    monkeypatch.undo()
    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WkvError, match="could not be written"):
        wkv.save_model(tiny("rwkv4"), tmp_path / file, form, max_shard_size=limit)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_an_unwritable_place() -> None:
    with pytest.raises(WkvError, match="could not be written"):
        wkv.save_model(tiny("rwkv4"), "/proc/m.pth", "official")
    with pytest.raises(WkvError, match="could not be written"):
        wkv.save_model(tiny("rwkv4"), "/proc/m.safetensors")
