"""States: copies, rows, files, and errors that name what does not fit."""

from __future__ import annotations

import pytest
import torch

import wkv
from tests import small
from wkv.errors import CheckpointError, WkvError

SIZES = {"vocab_size": 11, "hidden_size": 16, "num_layers": 2}


def make(name: str = "rwkv7", batch: int = 3) -> tuple[torch.nn.Module, wkv.State]:
    torch.manual_seed(0)
    model = wkv.create_model(name, **SIZES, **small.options(name, 8)).eval()
    with torch.no_grad():
        return model, model(torch.randint(0, 11, (batch, 5))).state


def equal(a: wkv.State, b: wkv.State) -> bool:
    return all(torch.equal(x[k], y[k]) for x, y in zip(a.layers, b.layers, strict=True) for k in y)


@pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])
def test_save_and_load(name: str, tmp_path) -> None:
    _, state = make(name)
    state.save(tmp_path / "s.safetensors")
    loaded = wkv.State.load(tmp_path / "s.safetensors")
    assert loaded.model == name
    assert equal(loaded, state)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_clone_is_independent_and_models_do_not_change_their_input() -> None:
    model, state = make()
    copy = state.clone()
    with torch.no_grad():
        model(torch.zeros(3, 2, dtype=torch.long), state=state)
    assert equal(state, copy)
    copy.layers[0]["wkv"].zero_()
    assert not equal(state, copy)


def test_select_and_stack() -> None:
    _, state = make()
    rows = [state.select(i) for i in range(3)]
    assert equal(wkv.State.stack(rows), state)
    assert equal(state.select([2, 0]), wkv.State.stack([rows[2], rows[0]]))
    assert equal(state.select(torch.tensor([True, False, True])), state.select([0, 2]))
    assert equal(state.select(slice(1, None)), state.select([1, 2]))
    assert equal(state.select(-1), rows[2])


def test_types_and_sizes() -> None:
    _, state = make()
    half = state.to(dtype=torch.bfloat16)
    assert half.layers[0]["att_shift"].dtype == torch.bfloat16
    assert half.layers[0]["wkv"].dtype == torch.float32
    assert state.to(dtype=torch.float64).layers[0]["wkv"].dtype == torch.float64
    assert state.num_bytes == 2 * 3 * (16 + 16 + 2 * 8 * 8) * 4
    assert state.batch_size == 3
    assert "rwkv7" in repr(state)


@pytest.mark.parametrize("rows", [3, [0, 5], [], -4, torch.tensor([7])])
def test_rows_out_of_range(rows: object) -> None:
    with pytest.raises(WkvError, match="rows"):
        make()[1].select(rows)


def test_stack_refuses_strangers() -> None:
    with pytest.raises(WkvError, match="rwkv4"):
        wkv.State.stack([make("rwkv7")[1], make("rwkv4")[1]])
    with pytest.raises(WkvError, match="at least one"):
        wkv.State.stack([])


def broken(state: wkv.State, kind: str) -> object:
    layers = [dict(layer) for layer in state.layers]
    if kind == "layers":
        return wkv.State("rwkv7", layers[:1])
    if kind == "model":
        return wkv.State("rwkv6", layers)
    if kind == "key":
        layers[1]["extra"] = layers[1].pop("wkv")
    if kind == "shape":
        layers[1]["wkv"] = layers[1]["wkv"][..., :4]
    if kind == "batch":
        return state.select([0, 1])
    if kind == "type":
        return layers
    return wkv.State("rwkv7", layers)


@pytest.mark.parametrize(
    ("kind", "word"),
    [("layers", "1 layers"), ("model", "rwkv6"), ("key", "extra"), ("shape", "wkv"), ("batch", "2 sequences"),
     ("type", "list")],
)  # fmt: skip
def test_models_refuse_states_that_do_not_fit(kind: str, word: str) -> None:
    model, state = make()
    with pytest.raises(WkvError, match=word):
        model(torch.zeros(3, 2, dtype=torch.long), state=broken(state, kind))


@pytest.mark.parametrize("cut", [0, 1, 7, 40, 200, -1])
def test_truncated_files_are_refused(cut: int, tmp_path) -> None:
    make()[1].save(tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        wkv.State.load(tmp_path / "cut.safetensors")


def test_a_foreign_file_is_not_a_state(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a state"):
        wkv.State.load(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no such"):
        wkv.State.load(tmp_path / "missing.safetensors")


def test_saving_into_nowhere_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        make()[1].save(tmp_path / "missing" / "s.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        make()[1].save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
