"""Tuned states in the layouts of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import wkv
from tests.models.test_golden import GOLDEN, MODELS, golden_model
from tests.test_registry import build, tokens
from tests.tuning.test_state import error, golden
from wkv.errors import CheckpointError, WkvError
from wkv.inference.generate import starting_state
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.tuning.state import InitialState, empty_state, prompt_state
from wkv.tuning.state_files import export_state, from_rwkv_pip, import_state, to_rwkv_pip

TUNING = GOLDEN / "state_tuning"
FILES = ("state_x070", "state_x060", "fullstate_x070")
MATRIX_MODELS = [name for name in wkv.list_models() if name != "rwkv4" and name in MODELS.values()]


def official(file: str, prefix: str = "") -> dict[str, Tensor]:
    """The keys that RWKV-PEFT writes."""
    return {prefix + key.removeprefix("s0."): value for key, value in golden(file).items() if key.startswith("s0.")}


def random_state(model: LanguageModel, shift: bool = True) -> State:
    state = prompt_state(model, [3, 1, 2])
    if not shift:
        for layer in state.layers:
            layer["att_shift"].zero_()
            layer["ffn_shift"].zero_()
    return state


def assert_equal(found: State, expected: State) -> None:
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.keys() == other.keys()
        for slot in one:
            assert torch.equal(one[slot], other[slot]), slot


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_foreign_file_gives_the_logits_of_training(file: str, prefix: str, suffix: str, tmp_path: Path) -> None:
    weights, path, data = TUNING / f"model_{file[-4:]}.safetensors", tmp_path / f"tuned.{suffix}", golden(file)
    if suffix == "pth":
        torch.save(official(file, prefix), path)
    else:
        save_file(official(file, prefix), path)
    model = wkv.load_model(weights)
    model.tuned_state = import_state(path, model)
    logits = model(data["idx"], starting_state(model, None, 2)).logits
    assert error(logits, data["logits"]) < 5e-6
    assert_equal(wkv.load_model([weights, path]).tuned_state, model.tuned_state)
    ids = data["idx"][0].tolist()
    tokenizer = wkv.tokenizers.load("bytes")
    made = wkv.generate(model, ids, 1, wkv.Sampler(temperature=0), tokenizer=tokenizer, stop_ids=(), logprobs=1)
    assert made.logprobs[0] == pytest.approx(float(data["logits"][0, -1].log_softmax(-1).max()), abs=1e-5)


@pytest.mark.parametrize("name", MATRIX_MODELS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    model = build(name, torch.float32)
    for layout, suffix in (("rwkv", "pth"), ("rwkv", "safetensors"), ("runner", "pth")):
        state, path = random_state(model, shift=layout == "rwkv"), tmp_path / f"{layout}.{suffix}"
        export_state(state, path, layout)
        assert_equal(import_state(path, model), state)
    runner = torch.load(tmp_path / "runner.pth", weights_only=True)
    assert list(runner) == [f"blocks.{layer}.att.time_state" for layer in range(3)]
    assert torch.equal(runner["blocks.1.att.time_state"], state.layers[1]["wkv"][0])
    export_state(state, tmp_path / "half.pth", dtype="bfloat16")
    half = import_state(tmp_path / "half.pth", model).layers[2]["wkv"]
    assert torch.equal(half, state.layers[2]["wkv"].bfloat16().float())


@pytest.mark.parametrize("name", MATRIX_MODELS)
def test_eight_bits(name: str, tmp_path: Path) -> None:
    model = build(name, torch.float32)
    state = random_state(model)
    state.layers[1]["wkv"][0, 2] = 0  # a head without a scale
    state.layers[0]["wkv"][0, 1] *= 1e3  # heads have scales of their own
    export_state(state, tmp_path / "small.safetensors", "int8")
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        assert file.get_slice("blocks.0.att.time_state").get_dtype() == "I8"
        assert file.get_slice("blocks.0.att.time_state.scale").get_shape() == [4]
    found = import_state(tmp_path / "small.safetensors", model)
    for one, other in zip(found.layers, state.layers, strict=True):
        scale = other["wkv"].abs().amax((-2, -1), keepdim=True) / 127
        assert ((one["wkv"] - other["wkv"]).abs() <= 0.5001 * scale).all()
        assert torch.equal(one["att_shift"], other["att_shift"])
    assert not found.layers[1]["wkv"][0, 2].any()
    torch.save(load_file(tmp_path / "small.safetensors"), tmp_path / "small.pth")
    assert_equal(import_state(tmp_path / "small.pth", model), found)


def test_a_quarter_of_the_size(tmp_path: Path) -> None:
    model = build("rwkv7", torch.float32, hidden_size=128, head_size=64)
    state = random_state(model, shift=False)
    export_state(state, tmp_path / "whole.safetensors")
    export_state(state, tmp_path / "small.safetensors", "int8")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.27 * (tmp_path / "whole.safetensors").stat().st_size


@pytest.mark.parametrize("folder", MODELS)
def test_lists_of_the_rwkv_package(folder: str) -> None:
    """States that the package itself returned after the same tokens."""
    data, model = load_file(GOLDEN / folder / "io.safetensors"), golden_model(folder, torch.float32)
    with torch.no_grad():
        _, state = model(data["tokens"][None])
    names = (
        ("att_x_prev", "att_kv", "ffn_x_prev") if folder != "rwkv4" else ("att_x_prev", "aa", "bb", "pp", "ffn_x_prev")
    )
    theirs = [data[f"state.{layer}.{name}"] for layer in range(len(state.layers)) for name in names]
    mine = to_rwkv_pip(state)
    assert [x.shape for x in mine] == [x.shape for x in theirs]
    if folder != "rwkv4":  # whose normaliser is not unique
        assert all(float((a - b).abs().max()) < 1e-4 for a, b in zip(mine, theirs, strict=True))
    ids = data["tokens"][None, :5]
    with torch.no_grad():
        expected, found = model(ids, state).logits, model(ids, from_rwkv_pip(theirs, model)).logits
    assert error(found, expected) < 1e-4
    assert_equal(from_rwkv_pip(mine, model), state)
    assert all(x.is_contiguous() for x in mine)


def test_lists_that_do_not_fit_are_refused() -> None:
    model = build("rwkv7", torch.float32)
    tensors = to_rwkv_pip(random_state(model))
    with pytest.raises(WkvError, match="found 8 tensors, expected 3 for each of 3 layers"):
        from_rwkv_pip(tensors[1:], model)
    with pytest.raises(WkvError, match="att_shift has shape"):
        from_rwkv_pip([tensors[1], tensors[0], *tensors[2:]], model)
    with pytest.raises(WkvError, match="expected the state of one sequence, found 2"):
        to_rwkv_pip(model.init_state(2))
    with pytest.raises(WkvError, match="the rwkv package knows no states of odd"):
        to_rwkv_pip(State("odd", [{"memory": torch.zeros(1, 3)}]))


def test_weights_beside_the_state(tmp_path: Path) -> None:
    """A merged checkpoint: the state and all weights in one file."""
    weights = load_file(TUNING / "model_x070.safetensors")
    model, path = wkv.load_model(weights), tmp_path / "merged.pth"
    torch.save({**weights, **official("state_x070")}, path)
    with pytest.raises(CheckpointError, match=r"holds weights beside the state .* pass ignore_weights=True"):
        import_state(path, model)
    expected = import_state(official("state_x070"), model)
    assert_equal(import_state(path, model, ignore_weights=True), expected)
    model.tuned_state = expected
    wkv.save_model(model, tmp_path / "ours.safetensors")
    assert_equal(import_state(tmp_path / "ours.safetensors", model, ignore_weights=True), expected)
    extra = {"blocks.0.att.time_offset": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"unexpected blocks\.0\.att\.time_offset"):
        import_state({**official("state_x070"), **extra}, model, ignore_weights=True)
    other = wkv.load_model(TUNING / "model_x060.safetensors")
    with pytest.raises(CheckpointError, match="holds RWKV-7, expected a state of RWKV-6"):
        import_state(path, other, ignore_weights=True)
    with pytest.raises(CheckpointError, match="no tuned state in it"):
        import_state(weights, model, ignore_weights=True)


def test_states_of_other_models_are_refused() -> None:
    state = official("state_x070")  # 3 layers, 4 heads of 8
    for name, sizes, message in (
        ("rwkv7", {"num_layers": 4}, r"3 layers \(layers 0 to 2\), expected 4 layers; load the model it was tuned on"),
        ("rwkv7", {"num_layers": 2}, r"3 layers .*, expected 2 layers"),
        ("rwkv7", {"hidden_size": 64}, "has 4 heads of size 8, expected 8 of size 8; load the model it was tuned on"),
        ("rwkv7", {"head_size": 16}, "has 4 heads of size 8, expected 2 of size 16"),
        ("rwkv4", {}, "holds states of RWKV-5, 6 or 7; rwkv4 keeps others"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_state(state, build(name, torch.float32, **sizes))


@pytest.mark.parametrize(("change", "message"), [
    ({"blocks.1.att.time_state": None}, r"2 layers \(layers 0 to 2\), expected 3"),
    ({"blocks.1.att.time_state": torch.zeros(4, 64)}, r"has shape \[4, 64\], expected \[4, 8, 8\]"),
    ({"blocks.1.att.time_state": torch.zeros(4, 8, 8, dtype=torch.int8)}, "type int8"),
    ({"blocks.1.att.time_state": torch.full((4, 8, 8), torch.nan)}, "layer 1: wkv holds values that are not finite"),
    ({"blocks.1.att.time_state": 3}, "unexpected blocks.1.att.time_state"),
    ({"blocks.1.att.ts_state": torch.zeros(32)}, r"missing blocks\.0\.att\.ts_state"),
    ({"blocks.1.att.time_state.scale": torch.ones(4)}, r"scale is float32 \[4\], and blocks.* float32"),
    ({"blocks.5.att.time_state.scale": torch.ones(4)}, "nothing; expected float32"),
    ({"blocks.1.att.state": torch.zeros(4, 8, 8)}, r"unexpected blocks\.1\.att\.state"),
    ({"model.blocks.1.att.time_state": torch.zeros(4, 8, 8)}, "occurs twice"),
])  # fmt: skip
def test_damaged_files_are_refused(change: dict, message: str) -> None:
    content = {**official("state_x070"), **change}
    with pytest.raises(CheckpointError, match=message):
        import_state({k: v for k, v in content.items() if v is not None}, build("rwkv7", torch.float32))


def test_our_files_say_what_they_are_for(tmp_path: Path) -> None:
    model = build("rwkv6", torch.float32)
    state = random_state(model)
    export_state(state, tmp_path / "six.safetensors")
    with pytest.raises(CheckpointError, match="holds a state of RWKV-6, expected RWKV-7"):
        import_state(tmp_path / "six.safetensors", build("rwkv7", torch.float32))
    state.save(tmp_path / "saved.safetensors")
    with pytest.raises(CheckpointError, match=r"written by State\.save"):
        import_state(tmp_path / "saved.safetensors", model)
    wkv.tuning.create("state", model).save(tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="an adapter of this library"):
        import_state(tmp_path / "adapter.safetensors", model)
    for text in ("{", "[]", json.dumps({"version": 1})):
        save_file({"blocks.0.att.time_state": torch.zeros(1)}, tmp_path / "odd.safetensors", {"wkv_tuned_state": text})
        with pytest.raises(CheckpointError, match="its metadata 'wkv_tuned_state' is damaged"):
            import_state(tmp_path / "odd.safetensors", model)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = build("rwkv7", torch.float32)
    state = random_state(model)
    for args, message in (
        ((state, "a.pth", "blink"), "layout 'blink' is unknown; one of rwkv, runner, int8"),
        ((state, "a.bin"), "a file of layout 'rwkv' ends in .pth or .safetensors"),
        ((state, "a.pth", "int8"), "ends in .safetensors"),
        (
            (state, "a.pth", "runner"),
            r"starts token shift at zero, but the state has blocks\.0\.att\.ts_state and 5 more",
        ),
        ((state, "a.pth", "rwkv", torch.int8), "dtype"),
        ((model.init_state(2), "a.pth"), "holds the state of one sequence, found 2"),
        ((state, "nowhere/a.pth"), "there is no folder"),
    ):
        with pytest.raises(WkvError, match=message):
            export_state(args[0], tmp_path / args[1], *args[2:])
    assert not list(tmp_path.iterdir())


def test_quotients_of_rwkv4_have_names_of_ours(tmp_path: Path) -> None:
    model = build("rwkv4", torch.float32)
    model.tuned_state = random_state(model)
    wkv.save_model(model, tmp_path / "model.safetensors")
    export_state(model.tuned_state, tmp_path / "state.pth")
    found = wkv.load_model(tmp_path / "model.safetensors")
    assert found.tuned_state is not None
    assert_equal(found.tuned_state, model.tuned_state)
    assert_equal(import_state(tmp_path / "state.pth", found), model.tuned_state)
    with pytest.raises(CheckpointError, match="RWKV-7 has no such state"):
        import_state(tmp_path / "state.pth", build("rwkv7", torch.float32))


def test_import_into_a_model_whose_state_is_being_tuned() -> None:
    model = wkv.load_model(TUNING / "model_x070.safetensors")
    adapter = wkv.tuning.create("fullstate", model)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.fill_(7)
    assert_equal(import_state(official("state_x070"), model), golden_start(model))
    start = InitialState(model, init=import_state(official("state_x070"), model))
    model.set_initial_state(start)
    assert error(model(golden("state_x070")["idx"]).logits, golden("state_x070")["logits"]) < 5e-6


def golden_start(model: LanguageModel) -> State:
    state = empty_state(model)
    for layer, values in enumerate(state.layers):
        values["wkv"] = golden("state_x070")[f"s0.blocks.{layer}.att.time_state"][None]
    return state


def test_another_copy_of_the_model_reads_on_in_the_same_way(tmp_path: Path) -> None:
    model, ids = build("rwkv6", torch.float32), tokens(1)
    state = random_state(model)
    export_state(state, tmp_path / "tuned.pth")
    with torch.no_grad():
        again = build("rwkv6", torch.float32)
        assert torch.equal(again(ids, import_state(tmp_path / "tuned.pth", again)).logits, model(ids, state).logits)
