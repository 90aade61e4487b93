"""Tuned states as adapters: saved, loaded, merged, switched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import wkv
from tests.test_registry import build, tokens
from tests.tuning.test_state import QUOTIENTS, all_models, error, shake
from wkv.errors import WkvError
from wkv.tuning.state import StateAdapter, prompt_state

STARTS = [
    ("state", {"prompt": [1, 2, 3]}),
    ("fullstate", {}),
    ("fullstate", {"rank": 2, "seed": 5}),
    ("state", {"layers": [1]}),
]


@all_models
@pytest.mark.parametrize(("method", "options"), STARTS)
def test_an_adapter_is_saved_and_loaded(name: str, method: str, options: dict, tmp_path: Path) -> None:
    model, ids = build(name, torch.float32), tokens()
    if name in QUOTIENTS and "rank" in options:
        with pytest.raises(WkvError, match="rank is for matrix states"):
            wkv.tuning.create(method, model, **options)
        assert not model.adapters
        return
    adapter = wkv.tuning.create(method, model, **options)
    assert isinstance(adapter, StateAdapter)
    shake(adapter.initial)
    with torch.no_grad():
        expected = model(ids).logits
        adapter.save(tmp_path / "tuned.safetensors")
        other = build(name, torch.float32)
        plain = other(ids).logits
        again = wkv.tuning.load(tmp_path / "tuned.safetensors", other)
        assert torch.equal(other(ids).logits, expected)
        assert again.options == adapter.options
        assert again.num_parameters == adapter.num_parameters
        again.remove()
        assert torch.equal(other(ids).logits, plain)
    assert error(plain, expected) > 1e-3


@all_models
def test_merging_makes_it_the_tuned_state_of_the_model(name: str) -> None:
    model = build(name, torch.float32, vocab_size=256)
    adapter = wkv.tuning.create("fullstate", model, prompt=[9, 8])
    shake(adapter.initial)
    assert adapter.verify() == 0
    active = wkv.generate(model, b"some text", 8, wkv.Sampler(temperature=0))
    adapter.merge()
    assert model.initial_state is None
    merged = wkv.generate(model, b"some text", 8, wkv.Sampler(temperature=0))
    with pytest.raises(WkvError, match="merged already"):
        adapter.merge()
    adapter.unmerge()
    assert model.tuned_state is None
    assert model.initial_state is adapter.initial
    assert (active.tokens, active.text) == (merged.tokens, merged.text)
    with pytest.raises(WkvError, match="is not merged"):
        adapter.unmerge()


def test_two_adapters_take_turns_and_a_tuned_state_is_put_aside() -> None:
    model, ids = build("rwkv7", torch.float32), tokens()
    own = prompt_state(model, [4])
    model.tuned_state = own
    with pytest.raises(WkvError, match=r"pass init=model\.tuned_state"):
        wkv.tuning.create("state", model)
    first = wkv.tuning.create("state", model, name="first", init=own)
    assert model.tuned_state is None
    with torch.no_grad():
        expected = model(ids).logits
        second = wkv.tuning.create("fullstate", model, name="second", prompt=[7, 7])
        assert not torch.equal(model(ids).logits, expected)
        assert [p.requires_grad for p in first.named_parameters().values()] == [False] * 3
        first.activate()
        assert torch.equal(model(ids).logits, expected)
        first.deactivate()
        assert model.tuned_state is own
        second.remove()
        first.remove()
    assert model.tuned_state is own
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_refuse_what_does_not_fit() -> None:
    model = build("rwkv7", torch.float32)
    for options, message in (
        ({"targets": ["key"]}, "state has no option 'targets'; it has rank, layers, seed, init, prompt"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1], "init": model.init_state(1)}, "give init or prompt, not both"),
        ({"prompt": "text"}, "the model has no tokenizer"),
        ({"prompt": [99]}, "token id 99 is outside the vocabulary"),
        ({"layers": [5]}, "expected numbers from 0 to 2"),
    ):
        with pytest.raises(WkvError, match=message):
            wkv.tuning.create("state", model, **options)
        assert model.initial_state is None
        assert not model.adapters


def test_tensors_of_another_adapter_are_refused() -> None:
    model = build("rwkv7", torch.float32)
    adapter = wkv.tuning.create("state", model)
    good = adapter.tensors()
    for change, message in (
        ({"layers.7.wkv.value": torch.zeros(4, 8, 8)}, "layer 7, wkv"),
        ({"layers.1.wkv.value": torch.zeros(4, 4, 4)}, "has shape"),
        ({"layers.1.att_shift.value": torch.zeros(4)}, r"found \[4\], but rwkv7 has shape \[32\]"),
        ({"layers.1.other.value": torch.zeros(4)}, "no such slot"),
        ({"layers.one.wkv.value": torch.zeros(4)}, "unknown tensor"),
    ):
        with pytest.raises(WkvError, match=message):
            adapter.load_tensors({**good, **change})
    with pytest.raises(WkvError, match="is trained by method 'state' and cannot be held"):
        adapter.initial.hold(0, "wkv", torch.zeros(4, 8, 8))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/tuning/state_tuning.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert len(names["text"]) > 0
    for found, expected in zip(names["state"].layers, names["adapter"].initial.state().layers, strict=True):
        assert all(torch.equal(found[slot], expected[slot]) for slot in expected)
