"""`load_model`: every source, type and layout, without a hint."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wkv
from tests.checkpoints.helpers import GOLDEN, NAMES, assert_same, logits, official, tiny
from wkv.errors import CheckpointError, WkvError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GOLDEN_MODELS = {
    "rwkv4": "rwkv4", "rwkv5_0": "rwkv5_0", "rwkv5_1": "rwkv5_1", "rwkv5_2": "rwkv5", "rwkv6": "rwkv6",
    "rwkv7": "rwkv7", "rwkv7a": "rwkv7a",
}  # fmt: skip
FIRST_LAYER = {f"blocks.0.att.v{digit}" for digit in "012"}


def golden_shards(folder: str) -> list[Path]:
    shards = sorted((GOLDEN / folder).glob("ckpt-*"))
    assert shards, f"{folder}: the golden checkpoint is not there"
    return shards


@pytest.mark.parametrize("folder", GOLDEN_MODELS)
@pytest.mark.parametrize("how", ["folder", "list", "reversed list", "pth shards", "one file", "state dict"])
def test_golden_checkpoints_load_without_a_hint(folder: str, how: str, tmp_path: Path) -> None:
    shards = golden_shards(folder)
    weights = {key: value for shard in shards for key, value in load_file(shard).items()}
    if how == "folder":
        source = tmp_path
        for shard in shards:
            shutil.copy(shard, tmp_path)
    elif how == "pth shards":
        source = tmp_path
        for shard in shards:
            torch.save(load_file(shard), tmp_path / f"{shard.stem}.pth")
    elif how == "one file":
        source = tmp_path / "one.pth"
        torch.save(weights, source)
    else:
        source = {"list": shards, "reversed list": shards[::-1], "state dict": weights}[how]
    model = wkv.load_model(source)
    assert model.name == GOLDEN_MODELS[folder]
    assert_same(model, {key: weights[key] for key in model.state_dict()})
    assert set(weights) == set(model.state_dict())


@pytest.mark.parametrize("folder", GOLDEN_MODELS)
def test_golden_logits(folder: str) -> None:
    io = load_file(GOLDEN / folder / "io.safetensors")
    for dtype, bar in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        model = wkv.load_model(GOLDEN / folder, dtype=dtype)
        with torch.no_grad():
            error = (model(io["tokens"][None]).logits[0] - io["logits_f64"]).abs().max()
        assert error <= bar


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_the_type_of_the_file_is_kept(name: str, suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = official(name, dtype)
    path = tmp_path / f"model{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    model = wkv.load_model(path)
    assert model.config == tiny(name).config
    assert_same(model, weights)


@pytest.mark.parametrize("wanted", [*DTYPES, "bfloat16"], ids=str)
def test_another_type_can_be_asked_for(wanted: torch.dtype | str) -> None:
    weights = official("rwkv6", torch.float16)
    expected = torch.bfloat16 if wanted == "bfloat16" else wanted
    assert_same(wkv.load_model(weights, dtype=wanted), {key: value.to(expected) for key, value in weights.items()})


def test_mixed_files_take_the_type_of_the_large_matrices() -> None:
    weights = {k: v.bfloat16() if v.squeeze().ndim > 1 else v for k, v in official("rwkv7").items()}
    assert_same(wkv.load_model(weights), {key: value.bfloat16() for key, value in weights.items()})


@pytest.mark.parametrize("name", NAMES)
def test_key_order_and_layout_in_memory_play_no_part(name: str) -> None:
    weights = official(name)
    keys = list(weights)
    for seed in range(5):
        random.Random(seed).shuffle(keys)
        strided = {key: weights[key].mT.contiguous().mT if weights[key].ndim > 1 else weights[key] for key in keys}
        assert_same(wkv.load_model(strided), weights)


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_one_head_one_of_everything(name: str) -> None:
    ones = {"num_layers": 1, "hidden_size": 4, "attention_size": 4, "ffn_size": 1, "vocab_size": 1}
    assert_same(wkv.load_model(official(name, **ones)), official(name, **ones))


@pytest.mark.parametrize("prefix", ["_forward_module.", "module.", "_orig_mod.", "_forward_module.module.", "model."])
def test_prefixes_are_removed(prefix: str) -> None:
    weights = official("rwkv5")
    assert_same(wkv.load_model({prefix + key: value for key, value in weights.items()}), weights)


@pytest.mark.parametrize("wrap", [
    lambda w: {"model": w}, lambda w: {"state_dict": w}, lambda w: {"checkpoint": {"model": w}, "step": 1},
    lambda w: {"module": w, "epoch": 3, "optimizer": {"state": {}}}, lambda w: {"model": w, "loss": torch.zeros(1)},
])  # fmt: skip
def test_wrappers_are_removed(wrap, tmp_path: Path) -> None:
    weights = official("rwkv4")
    torch.save(wrap(weights), tmp_path / "m.pth")
    assert_same(wkv.load_model(tmp_path / "m.pth"), weights)
    assert_same(wkv.load_model(wrap(weights)), weights)
    assert "inside its entry" in wkv.checkpoints.inspect(tmp_path / "m.pth").notes[0]


def test_a_state_dict_is_copied_and_the_random_state_untouched() -> None:
    weights = official("rwkv7")
    before = torch.get_rng_state()
    model = wkv.load_model(weights)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        model.emb.weight.zero_()
    assert weights["emb.weight"].abs().sum() > 0


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    weights = official("rwkv4")
    torch.save(weights, tmp_path / "model.bin")
    save_file(weights, tmp_path / "model.dat")
    for name in ("model.bin", "model.dat"):
        assert_same(wkv.load_model(str(tmp_path / name)), weights)


@pytest.mark.parametrize("name", ["rwkv5_0", "rwkv5_1", "rwkv5", "rwkv6", "rwkv7"])
def test_shapes_that_squeeze_to_the_same_are_accepted(name: str) -> None:
    weights = official(name)
    squeezed = {key: value.squeeze() for key, value in weights.items()}
    padded = {key: value.reshape(*value.shape, 1, 1) for key, value in weights.items()}
    padded |= {key: value for key, value in weights.items() if value.ndim > 1}
    for other in (squeezed, padded):
        assert_same(wkv.load_model(other), weights)


@pytest.mark.parametrize("name", ["rwkv5_1", "rwkv5", "rwkv6"])
def test_time_first_is_the_logarithm_of_the_bonus(name: str) -> None:
    weights = official(name, torch.bfloat16)
    other = {key.replace("time_faaaa", "time_first"): value for key, value in weights.items()}
    for dtype in (None, torch.float64):
        model = wkv.load_model(other, dtype=dtype)
        found = model.blocks[1].att.time_faaaa
        assert torch.equal(found, weights["blocks.1.att.time_faaaa"].double().exp().to(found.dtype))
    assert any("exp(time_first)" in note for note in wkv.checkpoints.inspect(other).notes)


def test_rwkv5_0_with_the_bonus_itself() -> None:
    weights = official("rwkv5_0", torch.float64)
    other = {k.replace("time_first", "time_faaaa"): v.exp() if "time_first" in k else v for k, v in weights.items()}
    torch.testing.assert_close(logits(wkv.load_model(other)), logits(wkv.load_model(weights)))
    other["blocks.2.att.time_faaaa"][0] = -1
    with pytest.raises(CheckpointError, match=r"blocks\.2\.att\.time_faaaa holds a bonus that is not positive"):
        wkv.load_model(other)


@pytest.mark.parametrize("name", ["rwkv7", "rwkv7a"])
def test_the_first_layer_may_lack_its_unused_weights(name: str) -> None:
    weights = official(name)
    fewer = {key: value for key, value in weights.items() if key not in FIRST_LAYER}
    assert len(fewer) == len(weights) - 3
    model = wkv.load_model(fewer)
    assert model.blocks[0].att.v0[0, 0, 0].item() == pytest.approx(0.73 + 0.2)
    assert torch.equal(logits(model), logits(wkv.load_model(weights)))
    assert any("first layer" in note for note in wkv.checkpoints.inspect(fewer).notes)
    assert torch.equal(wkv.load_model(fewer).state_dict()["blocks.0.att.v2"], torch.zeros(2, 8))
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.att\.v1"):
        wkv.load_model({**fewer, "blocks.0.att.v0": weights["blocks.0.att.v0"]})


def tuned(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {f"blocks.{layer}.att.time_state": torch.randn(2, 4, 4) for layer in range(3)}


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_tuned_state_is_kept(name: str, tmp_path: Path) -> None:
    weights, state = official(name), tuned(name)
    torch.save(weights, tmp_path / "m.pth")
    torch.save(state, tmp_path / "s.pth")
    for source in ({**weights, **state}, [tmp_path / "m.pth", tmp_path / "s.pth"]):
        model = wkv.load_model(source, dtype=torch.bfloat16)
        assert_same(model, {key: value.bfloat16() for key, value in weights.items()})
        for layer, values in enumerate(model.tuned_state.layers):
            assert torch.equal(values["wkv"][0], state[f"blocks.{layer}.att.time_state"])
            assert not values["att_shift"].any()
    assert any("tuned_state" in note for note in wkv.checkpoints.inspect({**weights, **state}).notes)
    assert wkv.load_model(weights).tuned_state is None
    for form, file in (("wkv", "a.safetensors"), ("official", "a.pth")):
        wkv.save_model(model, tmp_path / file, form)
        again = wkv.load_model(tmp_path / file)
        for one, other in zip(again.tuned_state.layers, model.tuned_state.layers, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_tuned_state_with_token_shift() -> None:
    state = {f"blocks.{layer}.{part}.ts_state": torch.randn(12) for layer in range(3) for part in ("att", "ffn")}
    model = wkv.load_model({**official("rwkv7"), **tuned("rwkv7"), **state})
    assert torch.equal(model.tuned_state.layers[2]["ffn_shift"][0], state["blocks.2.ffn.ts_state"])


@pytest.mark.parametrize(("change", "word"), [
    ({"blocks.1.att.time_state": None}, r"missing blocks\.1\.att\.time_state"),
    ({"blocks.1.att.time_state": torch.zeros(4, 2, 4)}, r"blocks\.1\.att\.time_state has shape \[4, 2, 4\]"),
    ({"blocks.9.att.time_state": torch.zeros(2, 4, 4)}, r"unexpected blocks\.9\.att\.time_state"),
    ({"blocks.1.att.time_state": torch.zeros(2, 4, 4, dtype=torch.int8)}, r"blocks\.1\.att\.time_state .* type int8"),
])  # fmt: skip
def test_a_broken_tuned_state(change: dict, word: str) -> None:
    content = {**official("rwkv7"), **tuned("rwkv7"), **change}
    with pytest.raises(CheckpointError, match=word):
        wkv.load_model({key: value for key, value in content.items() if value is not None})


def test_a_tuned_state_alone() -> None:
    with pytest.raises(CheckpointError, match="a tuned state without its model"):
        wkv.load_model(tuned("rwkv7"))
    with pytest.raises(CheckpointError, match=r"unexpected blocks\.0\.att\.time_state: RWKV-4 has no such state"):
        wkv.load_model({**official("rwkv4"), **tuned("rwkv4")})


def test_overrides() -> None:
    weights = official("rwkv7")
    model = wkv.load_model(weights, head_norm_eps=1e-5, norm_eps=1e-6, head_size=4)
    assert model.config.head_norm_eps == model.blocks[0].att.ln_x.eps == 1e-5
    assert model.config.norm_eps == model.ln_out.eps == 1e-6
    with pytest.raises(CheckpointError, match="hidden_size is 12 in the file, it cannot be 13"):
        wkv.load_model(weights, hidden_size=13)
    with pytest.raises(WkvError, match="no option 'head_norm'"):
        wkv.load_model(weights, head_norm=1)
    with pytest.raises(WkvError, match="head_norm_eps must be a positive number"):
        wkv.load_model(weights, head_norm_eps=0)
    with pytest.raises(WkvError, match="dtype 'int8' is not one of"):
        wkv.load_model(weights, dtype="int8")
    with pytest.raises(WkvError, match=r"dtype torch\.int8 is not one of"):
        wkv.load_model(weights, dtype=torch.int8)
    with pytest.raises(WkvError, match="device 'abacus' cannot be used"):
        wkv.load_model(weights, device="abacus")


def test_loading_can_be_followed_by_training() -> None:
    model = wkv.load_model(official("rwkv7"))
    model.train()(torch.zeros(1, 4, dtype=torch.long)).logits.square().mean().backward()
    assert model.blocks[2].att.r_k.grad is not None
