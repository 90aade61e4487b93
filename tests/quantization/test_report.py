"""What quantisation costs, measured."""

from __future__ import annotations

import math

import pytest
import torch

from tests.quantization.helpers import small_model
from wkv.errors import WkvError
from wkv.evaluation import bits_per_byte
from wkv.quantization import Policy, compare_models, default_policy, quality_report, quantize_model
from wkv.quantization.report import alone_models

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 30, "Zebra.", ""]


def test_bits_per_byte_are_those_of_the_evaluation() -> None:
    model = small_model()
    quantized = quantize_model(model, 8)
    found = compare_models(model, {"int8": quantized}, TEXTS)
    assert found.num_bytes == sum(map(len, TEXTS))
    assert found.tokens == found.num_bytes
    assert math.isclose(found.bits_per_byte, bits_per_byte(model, TEXTS), rel_tol=1e-5)
    assert math.isclose(found.others["int8"].bits_per_byte, bits_per_byte(quantized, TEXTS), rel_tol=1e-5)


def test_differences() -> None:
    model = small_model()
    models = {"same": model, "int8": quantize_model(model, 8), "int4": quantize_model(model, 4)}
    others = compare_models(model, models, TEXTS[:1], max_tokens=200).others
    same, int8, int4 = others["same"], others["int8"], others["int4"]
    assert same.change == 0
    assert abs(same.kl) < 1e-7
    assert same.largest_logit_change == 0
    assert 0 < int8.kl < int4.kl
    assert 0 < int8.rms_logit_change < int8.largest_logit_change
    assert int8.rms_logit_change < int4.rms_logit_change


def test_logit_changes_by_hand() -> None:
    model = small_model()
    quantized = quantize_model(model, 4)
    found = compare_models(model, {"q": quantized}, ["abcdefgh"]).others["q"]
    ids = torch.tensor([model.tokenizer.encode("abcdefg")])  # no end-of-text id: the first byte is given
    with torch.no_grad():
        before, after = model(ids).logits, quantized(ids).logits
    assert math.isclose(found.largest_logit_change, float((after - before).abs().max()), rel_tol=1e-3)
    assert math.isclose(found.rms_logit_change, float((after - before).square().mean().sqrt()), rel_tol=1e-3)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    assert math.isclose(found.kl, float((p.exp() * (p - q)).sum() / 8), rel_tol=1e-3)


def test_max_tokens_and_progress() -> None:
    model = small_model()
    seen = []
    found = compare_models(model, {}, TEXTS, max_tokens=40, progress=lambda *step: seen.append(step))
    assert (found.tokens, found.num_bytes) == (40, 40)
    assert seen[0] == (0, 40, "document 1 of 1")


def test_report_with_ablation() -> None:
    model = small_model()
    policy = default_policy(4)
    found = quality_report(model, quantize_model(model, policy=policy), policy, TEXTS, ablation=True, max_tokens=300)
    others = found["quality"]["others"]
    names = ["emb int8", "head int6", "att int4", "ffn_key int4", "ffn_value int4", "low_rank float16"]
    assert list(others) == ["all", *names]
    assert all(others[name]["kl"] < others["all"]["kl"] for name in names)
    assert found["resident_bytes"]["after"] < found["resident_bytes"]["before"]
    assert "file_bytes" not in found


def test_report_without_text() -> None:
    model = small_model()
    found = quality_report(model, quantize_model(model, 8), default_policy(8))
    assert "quality" not in found


def test_one_group_alone() -> None:
    models = alone_models(small_model("rwkv4"), Policy(ffn_receptance="int8", head="bfloat16"))
    assert list(models) == ["head bfloat16", "ffn_receptance int8"]
    assert models["head bfloat16"].head.weight.dtype == torch.bfloat16


def test_errors() -> None:
    model = small_model()
    with pytest.raises(WkvError, match="list of texts"):
        compare_models(model, {}, "text")
    with pytest.raises(WkvError, match="found none"):
        compare_models(model, {}, [""])
