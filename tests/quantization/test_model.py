"""Whole models in 8 and 4 bits, every version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wkv
from tests import small
from tests.quantization.helpers import LANGUAGE_MODELS, relative, small_model, tokens
from wkv import native
from wkv.errors import WkvError
from wkv.quantization import Policy, default_policy, dequantize_model, is_quantized, quantize_model, resident_bytes
from wkv.quantization.model import plan, quantized_layers
from wkv.quantization.modules import QuantizedEmbedding, QuantizedLinear
from wkv.quantization.policy import GROUPS, KINDS, allowed_kinds, group_of

# Relative change of the logits of an untrained model.
BARS = {8: 0.04, 4: 0.3}


def test_every_version_is_covered() -> None:
    assert set(wkv.list_models("rwkv*")) <= set(LANGUAGE_MODELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_stay_close(name: str, bits: int, dtype: torch.dtype) -> None:
    model = small_model(name)
    expected = model(tokens()).logits.detach()
    model = model.to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize_model(model, bits)
    out = quantized(tokens())
    assert out.logits.dtype == dtype
    assert relative(out.logits, expected) < BARS[bits]
    assert {key: value.shape for key, value in out.state.layers[0].items()}.keys() == model.init_state(1).layers[
        0
    ].keys()
    assert resident_bytes(quantized) < resident_bytes(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [name for name in wkv.list_models() if name not in LANGUAGE_MODELS])
def test_descendants(name: str, bits: int, tmp_path: Path) -> None:
    model = small_model(name, **small.options(name, 32))
    expected = model(tokens()).logits.detach()
    quantized = quantize_model(model, bits)
    found = quantized(tokens()).logits
    assert relative(found, expected) < BARS[bits]
    assert resident_bytes(quantized) < resident_bytes(model)
    wkv.save_model(quantized, tmp_path / "m.safetensors")
    assert torch.equal(wkv.load_model(tmp_path / "m.safetensors")(tokens()).logits, found)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_dequantized_model_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize_model(small_model(name), 4)
    plain = dequantize_model(quantized)
    assert not is_quantized(plain)
    assert type(plain) is type(quantized)
    expected = plain(tokens()).logits
    assert relative(quantized(tokens()).logits, expected) < 1e-3  # inputs are rounded to 15 bits
    monkeypatch.setattr(native, "available", lambda: False)
    assert relative(quantized(tokens()).logits, expected) < 1e-3  # factors in float16 against float32


def test_what_is_shared_and_what_is_not() -> None:
    model = small_model()
    quantized = quantize_model(model, 8)
    shared = dict(model.named_parameters())
    for name, parameter in quantized.named_parameters():
        low_rank = group_of(name) == "low_rank"
        assert (parameter.data_ptr() == shared[name].data_ptr()) != low_rank
        assert parameter.dtype == (torch.float16 if low_rank else torch.float32)
    assert quantized.tokenizer is model.tokenizer
    assert quantize_model(model.train(), 8).training
    assert all(not layer.sparse for name, layer in quantized_layers(quantized).items() if "ffn.value" not in name
               if isinstance(layer, QuantizedLinear))  # fmt: skip
    assert quantized.blocks[0].ffn.value.sparse
    assert isinstance(quantized.emb, QuantizedEmbedding)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("emb.weight", "emb"), ("blocks.1.ffn.s_emb.weight", "emb"), ("blocks.1.ffn.s_emb_x.weight", "emb"),
        ("head.weight", "head"), ("blocks.11.att.gate.weight", "att"), ("blocks.0.att.key.weight", "att"),
        ("blocks.0.ffn.key.weight", "ffn_key"), ("blocks.0.ffn.value.weight", "ffn_value"),
        ("blocks.0.ffn.receptance.weight", "ffn_receptance"), ("blocks.0.att.time_maa_w2", "low_rank"),
        ("blocks.0.att.g1", "low_rank"), ("blocks.0.ffn.s2", "low_rank"), ("blocks.0.att.w0", "vectors"),
        ("blocks.0.att.r_k", "vectors"), ("ln_out.bias", "vectors"),
    ],
)  # fmt: skip
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_every_group_runs(group: str, kind: str) -> None:
    if kind not in allowed_kinds(group):
        with pytest.raises(WkvError, match=group):
            Policy().changed({group: kind})
        return
    model = small_model("rwkv6", num_layers=1)
    quantized = quantize_model(model, policy=Policy().changed({group: kind}))
    out = quantized(tokens())
    assert relative(out.logits, model(tokens()).logits) < 0.3
    again = quantized(tokens(), out.state)
    assert again.logits.dtype == out.logits.dtype


def test_float16_that_would_lose_values_is_not_used() -> None:
    model = small_model()
    with torch.no_grad():
        model.blocks[0].att.w1[0, 0] = 1e5
        model.blocks[0].att.w2.mul_(1e-8)
    parts = {part.name: part for part in plan(model, default_policy(8))}
    for name in ("w1", "w2"):
        assert parts[f"blocks.0.att.{name}"].kind == "keep"
        assert "float16" in parts[f"blocks.0.att.{name}"].note
    assert parts["blocks.0.att.a1"].kind == "float16"
    assert quantize_model(model, 8).blocks[0].att.w1.dtype == torch.float32


def test_an_unknown_matrix_is_kept_and_reported() -> None:
    model = small_model()
    model.blocks[0].att.extra = torch.nn.Linear(4, 4, bias=False)
    part = next(part for part in plan(model, default_policy(4)) if "extra" in part.name)
    assert (part.kind, part.note) == ("keep", "a matrix of no known group")


@pytest.mark.parametrize("bits", [0, 2, 16, True, "8"])
def test_other_numbers_of_bits(bits: object) -> None:
    with pytest.raises(WkvError, match="bits must be 8 or 4"):
        quantize_model(small_model(), bits)  # type: ignore[arg-type]


def test_models_that_cannot_be_quantised() -> None:
    with pytest.raises(WkvError, match="quantised already"):
        quantize_model(quantize_model(small_model(), 8), 4)
    model = small_model()
    with torch.no_grad():
        model.blocks[1].ffn.key.weight[0, 0] = torch.nan
    with pytest.raises(WkvError, match=r"blocks\.1\.ffn\.key\.weight"):
        quantize_model(model, 8)
    with torch.device("meta"):
        empty = wkv.create_model("rwkv7", vocab_size=8, hidden_size=32, num_layers=1, head_size=32)
    with pytest.raises(WkvError, match="meta"):
        quantize_model(empty, 8)
    with pytest.raises(WkvError, match="unknown group"):
        Policy().changed({"attention": "int8"})


def test_progress_and_generation() -> None:
    seen: list[tuple[int, int, str]] = []
    quantized = quantize_model(small_model(), 4, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(seen[0][1]))
    first = wkv.generate(quantized, "abc", max_tokens=8, seed=1)
    assert len(first.tokens) == 8
    assert wkv.generate(quantized, "abc", max_tokens=8, seed=1).tokens == first.tokens


def test_importing_the_package_imports_nothing() -> None:
    code = "import sys, wkv.quantization; assert 'torch' not in sys.modules; wkv.quantization.Policy()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_loading_does_not_import_the_compiler(tmp_path: str) -> None:
    path = f"{tmp_path}/model.safetensors"
    wkv.save_model(quantize_model(small_model(), 8), path)
    code = f"import sys, wkv; wkv.load_model({path!r}); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
