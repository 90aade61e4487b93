"""What holds for every method on every language model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import wkv
from wkv import tuning
from wkv.errors import CheckpointError, WkvError
from wkv.quantization import quantize_model
from wkv.tuning.files import read_adapter

from .helpers import QUOTIENTS, ROUNDED, disturb, options, pairs, tiny, tokens


def mounted(method: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, tuning.Adapter]:
    model = tiny(name, dtype=dtype)
    return model, tuning.create(method, model, **options(method))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("method", "name"), pairs())
def test_life_of_an_adapter(method: str, name: str, tmp_path: Path) -> None:
    model = tiny(name)
    x, own = tokens(), weights(model)
    before = model(x).logits.detach()
    adapter = tuning.create(method, model, **options(method))

    start = model(x).logits.detach()
    if method in ROUNDED or (name in QUOTIENTS and "state" in method):
        torch.testing.assert_close(start, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    else:
        assert torch.equal(start, before)

    disturb(adapter)
    after = model(x).logits
    assert not torch.allclose(after, before, atol=1e-3)
    after.sum().backward()
    learns = {id(p) for p in model.parameters() if p.grad is not None}
    assert learns == {id(p) for p in adapter.named_parameters().values()}
    model.zero_grad()

    if adapter.mergeable:
        assert adapter.verify(x) < 1e-4
        assert not adapter.is_merged
        adapter.merge()
        assert not any(".sides." in key or key.startswith("initial_state") for key in model.state_dict())
        wkv.save_model(model, tmp_path / "merged.safetensors")
        adapter.unmerge()
        assert torch.equal(model(x).logits, after)

    adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    assert same(weights(model), own)
    assert torch.equal(model(x).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())

    again = tuning.load(tmp_path / "adapter.safetensors", tiny(name))
    assert torch.equal(again.model(x).logits, after)
    assert same(again.tensors(), adapter.tensors())
    assert again.method == method


@pytest.mark.parametrize("method", tuning.METHODS)
def test_segments_and_steps_are_one_pass(method: str) -> None:
    model, adapter = mounted(method, "rwkv7")
    disturb(adapter)
    x = tokens(2, 12)
    whole = model(x)
    first = model(x[:, :5])
    second = model(x[:, 5:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=0, atol=2e-5)
    state = None
    for i in range(12):
        out = model(x[:, i : i + 1], state)
        state = out.state
        torch.testing.assert_close(out.logits[:, 0], whole.logits[:, i], rtol=0, atol=2e-5)


def from_the_start(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Logits from the tuned state on, if there is one."""
    state = model.tuned_state
    logits: torch.Tensor = model(x, None if state is None else state.select([0] * len(x))).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("method", [m for m in tuning.METHODS if m != "state-kernel"])
def test_bfloat16_base(method: str) -> None:
    model, adapter = mounted(method, "rwkv7", torch.bfloat16)
    assert {p.dtype for p in adapter.named_parameters().values()} == {torch.float32}
    disturb(adapter)
    kept = {key: value.clone() for key, value in adapter.tensors().items()}
    x = tokens()
    after = model(x).logits
    assert after.dtype == torch.bfloat16
    adapter.verify(x)
    adapter.merge()
    merged = from_the_start(model, x)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    adapter.unmerge()
    assert same(adapter.tensors(), kept)
    wide = tiny("rwkv7", dtype=torch.bfloat16).float()  # the same weights, exactly
    other = tuning.create(method, wide, **options(method))
    other.load_tensors(kept)
    exact = wide(x).logits
    size = float(exact.abs().max())
    assert float((after.float() - exact).abs().max()) < 0.06 * size
    assert float((merged.float() - exact).abs().max()) < 0.06 * size


@pytest.mark.parametrize("method", ["bone-row", "bone-col", "miss"])
def test_merging_in_bfloat16_rounds_once(method: str) -> None:
    model, adapter = mounted(method, "rwkv7", torch.bfloat16)
    disturb(adapter, size=1e-3)
    layer: Any = model.get_submodule("blocks.1.ffn.key")
    exact = layer.sides["default"].merged_weight(layer.base.weight.float())
    adapter.merge()
    found: Any = model.get_submodule("blocks.1.ffn.key")
    assert torch.equal(found.weight, exact.bfloat16())


def test_several_adapters_take_turns(tmp_path: Path) -> None:
    model = tiny("rwkv7")
    x = tokens()
    alone = model(x).logits
    methods = ("bone-row", "miss", "lora", "pissa", "state")
    expected = {}
    for number, method in enumerate(methods):
        adapter = tuning.create(method, model, f"a{number}", **options(method))
        disturb(adapter, seed=number)
        with tuning.using(model, f"a{number}"):
            expected[f"a{number}"] = model(x).logits
    with tuning.using(model):
        assert torch.equal(model(x).logits, alone)
    for name, logits in reversed(expected.items()):
        with tuning.using(model, name):
            assert torch.equal(model(x).logits, logits)
            assert {a.name for a in model.adapters.values() if a.is_active} == {name}
    with tuning.using(model, "a1", "a4"):  # a state goes with weights
        both = model(x).logits
    assert not torch.equal(both, expected["a1"])
    assert model.adapters["a3"].is_active  # what was active before is so again
    with pytest.raises(WkvError, match="of each kind one adapter can be active"), tuning.using(model, "a0", "a1"):
        pass
    with pytest.raises(WkvError, match="no adapter 'b'; it has a0, a1"), tuning.using(model, "b"):
        pass
    model.adapters["a0"].activate()
    for adapter in list(model.adapters.values()):
        adapter.remove()
    assert torch.equal(model(x).logits, alone)


def test_adapters_of_a_request() -> None:
    model, adapter = mounted("miss", "rwkv7")
    disturb(adapter, size=0.5)
    bytes_tokenizer = "bytes"
    sampler = wkv.Sampler(temperature=0)

    def said(**extra: Any) -> list[int]:
        return list(wkv.generate(model, [1, 2, 3], 12, sampler, tokenizer=bytes_tokenizer, stop_ids=(), **extra).tokens)

    tuned = said()
    adapter.merge()  # through the native kernels where they are
    assert said() == tuned
    adapter.unmerge()
    with tuning.using(model):
        plain = said()
    assert plain != tuned
    adapter.remove()
    assert said() == plain


@pytest.mark.parametrize("method", ["bone-row", "bone-col", "bone-ab", "miss", "lora", "state"])
def test_quantised_base(method: str) -> None:
    model = quantize_model(tiny("rwkv7"), 8)
    x = tokens()
    before = model(x).logits
    adapter = tuning.create(method, model, **options(method))
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-5)
    disturb(adapter)
    model(x).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.named_parameters().values())
    if method != "state":
        with pytest.raises(WkvError, match=r"^blocks\.0\.att\.receptance: weights in QuantizedLinear cannot take up"):
            adapter.merge()
    assert not adapter.is_merged
    adapter.remove()
    assert torch.equal(model(x).logits, before)


def test_quantised_model_takes_the_adapter_of_its_base(tmp_path: Path) -> None:
    model, adapter = mounted("bone-row", "rwkv7")
    disturb(adapter)
    x = tokens()
    expected = model(x).logits.detach()
    adapter.save(tmp_path / "a.safetensors")
    quantised = quantize_model(tiny("rwkv7"), 8)
    tuning.load(tmp_path / "a.safetensors", quantised)
    assert float((quantised(x).logits.detach() - expected).abs().max()) < 0.05 * float(expected.abs().max())


# ---- refusals ----


def saved(path: Path, method: str = "bone-row") -> Path:
    _, adapter = mounted(method, "rwkv7")
    disturb(adapter)
    adapter.save(path / "a.safetensors")
    return path / "a.safetensors"


@pytest.mark.parametrize("method", ["bone-row", "lora", "state"])
def test_another_base_is_refused(method: str, tmp_path: Path) -> None:
    path = saved(tmp_path, method)
    other = tiny("rwkv7", seed=9)
    with pytest.raises(WkvError, match=r"was made for another base: .* differs"):
        tuning.load(path, other)
    assert not other.adapters
    assert all(p.requires_grad for p in other.parameters())
    tuning.load(path, other, check_base=False)
    with pytest.raises(WkvError, match="is an adapter of rwkv7, the model is rwkv6"):
        tuning.load(path, tiny("rwkv6"))
    wider = wkv.create_model("rwkv7", vocab_size=64, hidden_size=48, num_layers=2, head_size=16)
    with pytest.raises(WkvError, match="hidden_size 32, the model has 48"):
        tuning.load(path, wider)
    fine_tuned = tiny("rwkv7")
    with torch.no_grad():
        fine_tuned.blocks[1].att.key.weight.mul_(1.001)
    with pytest.raises(WkvError, match=r"blocks\.1\.att\.key\.weight differs"):
        tuning.load(path, fine_tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_type_is_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    tuning.load(saved(tmp_path), tiny("rwkv7", dtype=dtype))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="no such adapter file"):
        tuning.load(tmp_path / "b.safetensors", tiny("rwkv7"))
    tensors = load_file(path)
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="no adapter of this library"):
        tuning.load(tmp_path / "bare.safetensors", tiny("rwkv7"))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        tuning.load(tmp_path / "cut.safetensors", tiny("rwkv7"))
    for header in ("[", "{}", '{"method": 1, "options": {}, "model": "rwkv7", "config": {}}'):
        save_file(tensors, tmp_path / "bad.safetensors", {"wkv_adapter": header})
        with pytest.raises(CheckpointError, match="header is damaged"):
            tuning.load(tmp_path / "bad.safetensors", tiny("rwkv7"))
    file, model = read_adapter(path), tiny("rwkv7")
    del file.tensors["blocks.0.att.key.B"]
    with pytest.raises(WkvError, match=r"lacks blocks\.0\.att\.key\.B"):
        tuning.create.__globals__["mount_file"](file, model, "x", "the file")
    assert not model.adapters


def test_what_cannot_be_created() -> None:
    model = tiny("rwkv7")
    own = weights(model)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bone", {}, "'bone' is the guided form"),
        ("bat", {}, "say which you mean"),
        ("lora2", {}, "method 'lora2' is unknown; one of bone-row"),
        ("bone-row", {"ranks": 4}, "bone-row has no option 'ranks'; it has rank, mini_rank, targets"),
        ("bone-row", {"rank": 0}, "rank must be a positive integer, found 0"),
        ("bone-row", {"rank": 5}, r"blocks\.0\.att\.receptance: .*5"),
        ("miss", {"targets": "nothing"}, "no linear layer of rwkv7 is called 'nothing'; there are att.key"),
        ("miss", {"name": "a.b"}, "text without dots"),
    ]
    for method, extra, message in cases:
        with pytest.raises(WkvError, match=message):
            tuning.create(method, model, **extra)
    with pytest.raises(WkvError, match="found Linear"):
        tuning.create("miss", torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert not model.adapters
    assert same(weights(model), own)
    assert all(p.requires_grad for p in model.parameters())
    tuning.create("miss", model, rank=4)
    with pytest.raises(WkvError, match="has an adapter 'default' already"):
        tuning.create("miss", model, rank=4)


def test_unmerged_adapters_are_not_lost_in_files(tmp_path: Path) -> None:
    model, adapter = mounted("bone-row", "rwkv7")
    with pytest.raises(WkvError, match="carries the adapter 'default': merge it"):
        wkv.save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(WkvError, match="carries an adapter; merge or remove it first"):
        quantize_model(model)
    adapter.merge()
    for action in (adapter.merge, adapter.deactivate, adapter.remove):
        with pytest.raises(WkvError, match=r"is merged into the model; call unmerge\(\) first"):
            action()
    with pytest.raises(WkvError, match=r"call unmerge\(\) first"):
        tuning.create("miss", model, "second", rank=4)
    assert quantize_model(model)(tokens()).logits.isfinite().all()
    adapter.unmerge()
    with pytest.raises(WkvError, match="is not merged"):
        adapter.unmerge()
    assert not list(tmp_path.iterdir())


def test_verify_finds_a_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = mounted("miss", "rwkv7")
    disturb(adapter)
    side = adapter.sides["blocks.0.att.value"]  # type: ignore[attr-defined]
    monkeypatch.setattr(side, "merged_weight", lambda weight: 2 * weight)
    with pytest.raises(WkvError, match="merging 'default' changes logits by"):
        adapter.verify()
    assert not adapter.is_merged


def test_targets() -> None:
    model = tiny("rwkv7")
    cases: list[tuple[Any, int]] = [
        (None, 12), ("key", 4), ("att.key", 2), ("att", 8), ("blocks.1", 6), (["blocks.0.ffn.value"], 1),
        ("blocks.*.att.[rk]*", 4), (["key", "value"], 8),
    ]  # fmt: skip
    for targets, count in cases:
        adapter = tuning.create("miss", model, rank=4, targets=targets)
        assert len(adapter.sides) == count, targets  # type: ignore[attr-defined]
        adapter.remove()


def test_adapted_models_can_be_copied() -> None:
    model, adapter = mounted("bone-col", "rwkv7")
    disturb(adapter)
    other = copy.deepcopy(model)
    x = tokens()
    assert torch.equal(other(x).logits, model(x).logits)
    assert other.adapters["default"].model is other
    other.adapters["default"].remove()
    assert model.adapters
