"""Quantised models in files: the way out, the way in, and damaged files."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wkv
from tests.quantization.helpers import LANGUAGE_MODELS, relative, small_model, tokens
from wkv.errors import CheckpointError, WkvError
from wkv.quantization import Policy, quantize_model
from wkv.quantization.model import quantized_layers


def saved(folder: Path, bits: int = 4, name: str = "rwkv7", **options: Any) -> Path:
    path = folder / "model.safetensors"
    wkv.save_model(quantize_model(small_model(name), bits), path, **options)
    return path


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_is_saved_comes_back(name: str, bits: int, tmp_path: Path) -> None:
    model = quantize_model(small_model(name), bits)
    path = saved(tmp_path, bits, name)
    loaded = wkv.load_model(path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert type(loaded.tokenizer) is type(model.tokenizer)
    second = tmp_path / "again.safetensors"
    wkv.save_model(loaded, second)
    assert second.read_bytes() == path.read_bytes()


def test_the_layout_of_the_file(tmp_path: Path) -> None:
    with safe_open(saved(tmp_path), "pt") as file:
        described = json.loads(file.metadata()["wkv"])["quantization"]
        keys = set(file.keys())
        assert file.get_tensor("emb.weight").dtype == torch.uint8
        assert list(file.get_tensor("emb.weight").shape) == [257, 64]
    assert described["blocks.0.ffn.value.weight"] == {"kind": "int4", "sparse": True, "shape": [64, 256]}
    assert described["head.weight"] == {"kind": "int6", "sparse": False, "shape": [257, 64]}
    assert "emb.weight.scale" in keys
    assert "head.weight.scale" not in keys
    assert "blocks.0.ffn.value.weight.scale" not in keys


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_converts_what_is_floating_point(dtype: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    loaded, plain = wkv.load_model(path, dtype=dtype), wkv.load_model(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    for name, layer in quantized_layers(loaded).items():
        assert all(
            torch.equal(a, b) for a, b in zip(layer.buffers(), quantized_layers(plain)[name].buffers(), strict=True)
        )
    logits = loaded(tokens()).logits
    assert logits.dtype == getattr(torch, dtype)
    assert relative(logits, plain(tokens()).logits) < 0.03
    wkv.save_model(plain, tmp_path / "converted.safetensors", dtype=dtype)
    again = wkv.load_model(tmp_path / "converted.safetensors")
    assert torch.equal(again(tokens()).logits, logits)


def test_mixed_floating_types_come_back(tmp_path: Path) -> None:
    policy = Policy().changed({"att": "int8", "head": "bfloat16", "emb": "float16"})
    model = quantize_model(small_model(), policy=policy)
    wkv.save_model(model, tmp_path / "model.safetensors")
    loaded = wkv.load_model(tmp_path / "model.safetensors")
    assert (loaded.head.weight.dtype, loaded.emb.weight.dtype) == (torch.bfloat16, torch.float16)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_shards(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = quantize_model(small_model(), 4)
    assert torch.equal(wkv.load_model(tmp_path)(tokens()).logits, whole(tokens()).logits)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_files_hold_the_floating_point_values(suffix: str, tmp_path: Path) -> None:
    model = quantize_model(small_model(), 4)
    path = tmp_path / f"official{suffix}"
    wkv.save_model(model, path, format="official")
    loaded = wkv.load_model(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, layer in quantized_layers(model).items():
        assert torch.equal(loaded.get_parameter(name), layer.dequantize())


def test_gguf_files_hold_ggml_blocks(tmp_path: Path) -> None:
    model = quantize_model(small_model(), 8)
    wkv.save_model(model, tmp_path / "model.gguf", format="gguf", quantization="Q8_0")
    loaded = wkv.load_model(tmp_path / "model.gguf")
    assert relative(loaded(tokens()).logits, model(tokens()).logits) < 0.05


def test_inspect_tells_kinds_and_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = wkv.checkpoints.inspect(path)
    assert found.loadable
    assert found.num_parameters == small_model().num_parameters
    assert found.dtypes["int4"] == 12
    assert (found.dtypes["int8"], found.dtypes["int6"]) == (1, 1)
    assert found.kind_bytes["int8"] == 257 * 64 + 4 * 257
    assert found.kind_bytes["int6"] == 272 * 64 * 13 // 16  # the head has padded rows
    assert abs(sum(found.kind_bytes.values()) - path.stat().st_size) < 16_000
    assert any("quantised" in note for note in found.notes)
    assert found.dtype == "float32"


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Addresses at which this process has mapped a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(path)]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_weights_stay_in_the_mapped_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = wkv.load_model(path)
    ranges = mapped_ranges(path.resolve())
    for tensor in model.state_dict().values():
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(low <= begin and end <= high for low, high in ranges)
    wide = wkv.load_model(path, dtype="bfloat16")
    assert all(
        any(low <= buffer.data_ptr() < high for low, high in mapped_ranges(path.resolve()))
        for layer in quantized_layers(wide).values()
        for buffer in layer.buffers()
    )


def test_changing_a_loaded_model_does_not_change_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    model = wkv.load_model(path)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert path.read_bytes() == before
    assert wkv.load_model(path)(tokens()).logits.any()


# ---------------------------------------------------------------- damaged files

Spoil = Callable[[random.Random, dict[str, torch.Tensor], dict[str, Any]], str]


def any_of(rng: random.Random, described: dict[str, Any], kind: str | None = None) -> str:
    return rng.choice([name for name, entry in described.items() if kind in (None, entry["kind"])])


def cut_codes(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    tensors[name] = tensors[name].flatten()[: -rng.randrange(1, 60)].clone()
    return name


def other_shape(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    sizes = described[name]["shape"]
    sizes[rng.randrange(2)] += 64 * rng.randrange(2, 9)
    return name


def both_shapes_agree_but_not_with_the_model(
    rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]
) -> str:
    name = rng.choice([f"blocks.{n}.att.{m}.weight" for n in (0, 1) for m in ("key", "value", "output")])
    described[name]["shape"] = [rng.randrange(49, 64), 64]  # the same number of tiles
    return name


def wrong_type(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.float16, torch.int32]))
    return name


def missing_scale(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described, "int8")
    del tensors[f"{name}.scale"]
    return f"{name}.scale"


def wrong_scale(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described, "int8")
    scale = tensors[f"{name}.scale"]
    tensors[f"{name}.scale"] = rng.choice([scale[1:].clone(), scale.half(), scale[None].clone()])
    return f"{name}.scale"


def scale_too_many(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described, "int4")
    tensors[f"{name}.scale"] = torch.ones(64)
    return f"{name}.scale"


def missing_codes(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    del tensors[name]
    return name


def unknown_kind(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    described[name]["kind"] = rng.choice(["int3", "", None, 8, ["int8"], {"a": 1}, "int8\n"])
    return name


def wrong_fields(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    described[name] = rng.choice([None, [], 3, "int8", {}, {**described[name], "more": 1}, {"kind": "int8"}])
    return name


def wrong_order(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    described[name]["sparse"] = rng.choice([0, 1, None, "yes", []])
    return name


def sparse_where_it_cannot_be(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = rng.choice([name for name in described if "ffn.value" not in name])
    described[name]["sparse"] = True
    return name


def wrong_shape_values(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    described[name]["shape"] = rng.choice(
        [[64], [64, 64, 1], [0, 64], [-64, 64], [64.0, 64], "64", None, [2**70, 64], [True, 64]]
    )
    return name


def not_described(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = any_of(rng, described)
    del described[name]
    return name


def described_but_no_weight(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    name = rng.choice(["ln_out.weight", "blocks.0.att.w1", "blocks.9.att.key.weight", "nothing", "\x1b[2J"])
    described[name] = {"kind": "int8", "sparse": False, "shape": [64, 64]}
    return "" if name == "\x1b[2J" else name


def embedding_in_4_bits(rng: random.Random, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    described["emb.weight"]["kind"] = "int4"
    return "emb.weight"


SPOILS: list[Spoil] = [
    cut_codes, other_shape, both_shapes_agree_but_not_with_the_model, wrong_type, missing_scale, wrong_scale,
    scale_too_many, missing_codes, unknown_kind, wrong_fields, wrong_order, sparse_where_it_cannot_be,
    wrong_shape_values, not_described, described_but_no_weight, embedding_in_4_bits,
]  # fmt: skip


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("intact"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_damaged_files(spoil: Spoil, seed: int, intact: Path, tmp_path: Path) -> None:
    tensors = load_file(intact)
    with safe_open(intact, "pt") as file:
        metadata = json.loads(file.metadata()["wkv"])
    word = spoil(random.Random(f"{spoil.__name__} {seed}"), tensors, metadata["quantization"])
    path = tmp_path / "spoiled.safetensors"
    save_file(tensors, path, {"wkv": json.dumps(metadata)})
    with pytest.raises(CheckpointError) as caught:
        wkv.load_model(path)
    message = str(caught.value)
    assert "spoiled.safetensors" in message
    assert word in message
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("value", [[], 3, "int8", None, True])
def test_a_description_of_another_type(value: object, intact: Path, tmp_path: Path) -> None:
    with safe_open(intact, "pt") as file:
        metadata = json.loads(file.metadata()["wkv"])
    save_file(load_file(intact), tmp_path / "x.safetensors", {"wkv": json.dumps({**metadata, "quantization": value})})
    with pytest.raises(CheckpointError, match="quantization"):
        wkv.load_model(tmp_path / "x.safetensors")


def test_infinite_scales_are_found_when_text_is_generated(intact: Path, tmp_path: Path) -> None:
    """As with floating-point files: values are not judged while loading."""
    tensors = load_file(intact)
    with safe_open(intact, "pt") as file:
        metadata = file.metadata()
    tensors["emb.weight.scale"][:] = torch.nan
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(WkvError, match="not finite"):
        wkv.generate(wkv.load_model(tmp_path / "x.safetensors"), "abc", max_tokens=3)
