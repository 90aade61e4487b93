"""BASED files under the released names (golden vectors of the official language model)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wkv
from wkv.checkpoints.archive import Archive, Stored
from wkv.checkpoints.based_names import is_released, read_released, to_released
from wkv.errors import CheckpointError, WkvError

GOLDEN = Path(__file__).parent.parent / "golden" / "based"
SIZES = json.loads((GOLDEN / "config.json").read_text())
UNTOLD = {"head_size": SIZES["lm_d"] // SIZES["lm_h"], "feature_size": SIZES["f"], "window": SIZES["w"] // 2}
EMBEDDING = "transformer.embeddings.word_embeddings.weight"


def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "based_lm.safetensors")


def released(**changes: Any) -> dict[str, Tensor]:
    """The state dict of the official language model, with tensors added, replaced or (None) left out."""
    values = {key.removeprefix("param."): value for key, value in golden().items() if key.startswith("param.")}
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def test_a_released_file_gives_the_official_logits(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    decay = {"model.transformer.decay.decay": torch.ones(2), "model.train_metrics.total": torch.zeros(3)}
    save_file({f"model.{key}": value for key, value in released().items()} | decay, file)
    model: Any = wkv.load_model(file, **UNTOLD)
    assert model.name == "based"
    assert model.config.layout == ["convolution", "linear", "window", "convolution"]
    values = golden()
    with torch.no_grad():
        logits = model(values["input_ids"]).logits
    torch.testing.assert_close(logits, values["logits"], atol=2e-5, rtol=0)


def test_released_names_and_back(tmp_path: Path) -> None:
    expected = released()
    model = wkv.load_model(expected, **UNTOLD)
    found = to_released(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    wkv.save_model(model, tmp_path / "m.safetensors")
    loaded = wkv.load_model(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_half_precision_files_keep_their_type() -> None:
    model = wkv.load_model({key: value.bfloat16() for key, value in released().items()}, **UNTOLD)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_head_in_the_file_must_be_the_embedding() -> None:
    embedding = released()[EMBEDDING]
    wkv.load_model(released(**{"lm_head.weight": embedding.clone()}), **UNTOLD)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding"):
        wkv.load_model(released(**{"lm_head.weight": embedding + 1}), **UNTOLD)


def test_what_no_tensor_tells_must_be_given() -> None:
    with pytest.raises(CheckpointError, match="head_size, feature_size, window"):
        wkv.load_model(released())
    with pytest.raises(CheckpointError, match="no tensor tells its window"):
        wkv.load_model(released(), head_size=8, feature_size=4)
    with pytest.raises(CheckpointError, match=r"att\.query\.weight has shape \[8, 16\], expected \[16, 16\]"):
        wkv.load_model(released(), **{**UNTOLD, "feature_size": 8})
    with pytest.raises(CheckpointError, match="num_layers is 4 in the file, it cannot be 5"):
        wkv.load_model(released(), **UNTOLD, num_layers=5)


@pytest.mark.parametrize(("changes", "message"), [
    ({EMBEDDING: None}, r"emb\.weight, which should tell a size of it, is missing"),
    ({EMBEDDING: torch.zeros(4)}, r"emb\.weight, which should tell a size of it, has shape \[4\]"),
    ({"transformer.layers.6.norm1.weight": torch.ones(16)}, "layer 4 is missing"),
    ({"transformer.layers.0.mixer.in_proj.bias": torch.zeros(63)}, "expected rows for 2 equal parts"),
    ({"transformer.layers.3.mlp.fc2.weight": None}, r"missing blocks\.3\.ffn\.down\.weight"),
    ({"transformer.layers.3.mixer.g_norm.weight": torch.ones(8)}, r"unexpected transformer\.layers\.3\.mixer\.g_norm"),
    ({"model.transformer.ln_f.weight": torch.ones(16)}, r"unexpected model\.transformer\.ln_f\.weight"),
    ({"transformer.layers.2.mixer.proj_q.weight": torch.ones(8, 16)}, "layer 2 is in more than one of linear_layers"),
])  # fmt: skip
def test_damaged_files_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        wkv.load_model(released(**changes), **UNTOLD)


@pytest.mark.parametrize("preset", ["360m", "1b"])
def test_released_sizes_are_known(preset: str) -> None:
    with torch.device("meta"):
        model: Any = wkv.create_model("based", preset)
    archive = Archive("file", "safetensors", {
        key: Stored(tuple(value.shape), torch.float32, "float32", "file", lambda: torch.empty(0))
        for key, value in to_released(model).items()
    })  # fmt: skip
    assert is_released(archive.tensors)
    tensors, fields, untold = read_released(archive)
    assert not untold
    assert wkv.registry.create_config("based", **fields) == model.config
    assert {key: stored.shape for key, stored in tensors.items()} == {
        key: tuple(value.shape) for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize(("options", "message"), [
    ({"attention_layers": [0]}, r"released files have attention_layers = \[\], found \[0\]"),
    ({"conv_form": "zoology"}, "released files have conv_form = 'gated', found 'zoology'"),
    ({"tied_head": False}, "released files have tied_head = True, found False"),
    ({"ffn_size": 0}, "released files have a gated network in each layer"),
])  # fmt: skip
def test_what_released_names_cannot_hold(options: dict[str, Any], message: str) -> None:
    model = wkv.create_model("based", vocab_size=8, hidden_size=16, num_layers=2, head_size=8, **options)
    with pytest.raises(WkvError, match=message):
        to_released(model)


def test_only_based_has_these_names() -> None:
    with pytest.raises(WkvError, match="only a BASED model has these names, found 'rwkv4'"):
        to_released(wkv.create_model("rwkv4", vocab_size=8, hidden_size=16, num_layers=1))
