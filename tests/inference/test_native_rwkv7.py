"""RWKV-7 through the native kernels against the model's own forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import wkv
from tests.models.test_golden import GOLDEN, LOGIT_BARS, STATE_BAR, golden_model, largest_difference, state_error
from wkv import native
from wkv.errors import WkvError
from wkv.inference.engine import read
from wkv.inference.native_rwkv7 import NativeRWKV7, unsupported
from wkv.inference.reading import ModelReader, reader
from wkv.layers.language_model import LanguageModel
from wkv.ops import use_backend
from wkv.quantization.modules import QuantizedEmbedding, QuantizedLinear, quantize_linear
from wkv.state import State

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.unavailable()}")

LINEAR = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
# Largest difference of logits, relative to the largest logit, and of states. Kernels with integer weights round
# activations to 15 bits (tests/quantization/test_kernels.py has that to the last digit); here it is noise.
BARS = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6, "int8": 5e-4, "int4": 5e-4}


def random_model(seed: int = 0, **sizes: int) -> LanguageModel:
    """A model whose every parameter counts."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 90, "hidden_size": 128, "num_layers": 3, "head_size": 64, **sizes}
    model = wkv.create_model("rwkv7", **fields).eval()
    for parameter in model.parameters():
        vector = min(parameter.shape) == 1 or parameter.ndim < 2
        nn.init.normal_(parameter, std=0.3 if vector else parameter.shape[-1] ** -0.5)
    return model


def quantized(model: LanguageModel, kind: str) -> tuple[LanguageModel, LanguageModel]:
    """The model with weights of `kind`, and a float32 model with exactly the same values."""
    model, plain = copy.deepcopy(model), copy.deepcopy(model)
    if kind in ("float32", "bfloat16", "float16"):
        model = model.to(getattr(torch, kind))
        return model, copy.deepcopy(model).float()
    model.emb = QuantizedEmbedding.from_weight(model.emb.weight)
    model.head = quantize_linear(model.head, "int6" if kind == "int4" else "int8")
    for block in model.blocks:
        for name in LINEAR:
            parent, _, leaf = name.rpartition(".")
            layer = quantize_linear(block.get_submodule(name), kind, sparse=name == "ffn.value")  # type: ignore[arg-type]
            setattr(block.get_submodule(parent), leaf, layer)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            plain.get_submodule(name).weight.data = layer.dequantize()
    return model, plain


def errors(found: State, expected: State) -> float:
    pairs = zip(found.layers, expected.layers, strict=True)
    return max(
        float((a[name].float() - b[name].float()).abs().max() / b[name].abs().max().clamp_min(1e-3))
        for a, b in pairs
        for name in a
    )


@pytest.mark.parametrize("lesser", native.INSTRUCTION_SETS)
def test_golden(lesser: str) -> None:
    """The official logits and states, whole and token by token, with every instruction set of this machine."""
    golden = load_file(GOLDEN / "rwkv7" / "io.safetensors")
    tokens = golden["tokens"][None]
    run = NativeRWKV7(golden_model("rwkv7", torch.float32))
    try:
        switch = native.use_instruction_set(lesser)
        with switch:
            logits, state = run(tokens)
            steps, stepwise = [], None
            for token in tokens.split(1, 1):
                one, stepwise = run.read(token, stepwise, inplace=True)
                steps.append(one)
    except WkvError as error:
        pytest.skip(str(error))
    assert stepwise is not None
    assert largest_difference(logits[0], golden["logits_f64"]) <= LOGIT_BARS[torch.float32]
    assert largest_difference(torch.cat(steps), golden["logits_f64"]) <= LOGIT_BARS[torch.float32]
    assert state_error(state, golden) <= STATE_BAR
    assert state_error(stepwise, golden) <= STATE_BAR


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_the_model(kind: str, threads: int) -> None:
    """Prefill, decode, batches and blocks of more than 256 rows, whatever the weights; against float64."""
    model, plain = quantized(random_model(), kind)
    plain = plain.double()  # float32 itself is up to a bar away from it
    run = NativeRWKV7(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for batch, length in ((1, 1), (1, 5), (1, 300), (3, 7), (2, 140), (33, 1)):
                tokens, more = torch.randint(0, 90, (batch, length)), torch.randint(0, 90, (batch, 1))
                expected, expected_state = plain(tokens)
                logits, state = run(tokens)
                assert largest_difference(logits, expected) <= BARS[kind] * float(expected.abs().max())
                assert errors(state, expected_state) <= 2 * BARS[kind]
                last, _ = run.read(more, state)
                assert largest_difference(last, plain(more, expected_state).logits[:, -1]) <= BARS[kind] * float(
                    expected.abs().max()
                )
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25)
@given(
    head_size=st.sampled_from([16, 32, 64]),
    heads=st.integers(1, 3),
    ffn=st.integers(1, 200),
    vocabulary=st.integers(2, 70),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    kind=st.sampled_from(["float32", "int8", "int4"]),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_masks(
    head_size: int, heads: int, ffn: int, vocabulary: int, shape: tuple[int, int], kind: str, seed: int
) -> None:
    sizes = {"hidden_size": head_size * heads, "head_size": head_size, "ffn_size": ffn, "vocab_size": vocabulary}
    model, plain = quantized(random_model(seed, **sizes), kind)
    tokens, mask = torch.randint(0, vocabulary, shape), torch.rand(shape) > 0.3
    with torch.no_grad():
        expected, expected_state = plain(tokens, mask=mask)
    logits, state = NativeRWKV7(model)(tokens, mask=mask)
    difference = ((logits - expected) * mask[..., None]).abs().max()
    assert float(difference) <= BARS[kind] * max(1.0, float(expected.abs().max()))
    assert errors(state, expected_state) <= 5 * BARS[kind]


def test_states_are_values_unless_told_otherwise() -> None:
    run = NativeRWKV7(random_model())
    _, state = run.read(torch.tensor([[1, 2, 3]]))
    kept = state.clone()
    _, after = run.read(torch.tensor([[4]]), state)
    assert errors(state, kept) == 0
    assert errors(after, kept) > 0
    _, same = run.read(torch.tensor([[4]]), state, inplace=True)
    assert same is state
    assert errors(state, after) == 0


def test_rows_without_tokens_keep_their_state() -> None:
    run = NativeRWKV7(random_model())
    _, state = run.read(torch.tensor([[1, 2], [3, 4]]))
    mask = torch.tensor([[True, True], [False, False]])
    logits, after = run.read(torch.tensor([[5, 6], [7, 8]]), state, mask)
    assert errors(after.select(1), state.select(1)) == 0
    assert not logits[1].any()
    assert errors(after.select(0), run.read(torch.tensor([[5, 6]]), state.select(0))[1]) <= 1e-6


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    run = NativeRWKV7(random_model())
    for token in (-1, 90):
        with pytest.raises(WkvError, match="outside the vocabulary"):
            run.read(torch.tensor([[token]]))


def test_zero_activations_are_skipped_and_counted() -> None:
    model, plain = quantized(random_model(), "int4")
    run = NativeRWKV7(model)
    state, expected_state = None, None
    for token in range(20):
        logits, state = run.read(torch.tensor([[token]]), state, inplace=True)
        with torch.no_grad():
            expected, expected_state = plain(torch.tensor([[token]]), expected_state)
    assert largest_difference(logits, expected[:, -1]) <= BARS["int4"]
    assert 0.2 < run.skipped_share < 0.8  # random weights: about half of the squared ReLU is zero


def test_the_engine_reads_natively_where_it_can() -> None:
    model = random_model()
    assert isinstance(reader(model), NativeRWKV7)
    with use_backend("reference"):
        assert isinstance(reader(model), ModelReader)
    assert isinstance(reader(model.double()), ModelReader)
    assert isinstance(reader(wkv.create_model("rwkv6", vocab_size=9, hidden_size=64, num_layers=1)), ModelReader)


def test_reading_prompts_of_different_lengths() -> None:
    model = random_model()
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    logits, state = read(model, prompts, None, segment=2)
    expected, expected_state = read(model, prompts, None, by=ModelReader(model))
    assert largest_difference(logits, expected.detach()) <= 1e-5
    assert errors(state, expected_state.detach()) <= 1e-5


def test_models_it_cannot_run_are_named() -> None:
    assert "head size 8" in str(
        unsupported(wkv.create_model("rwkv7", vocab_size=9, hidden_size=64, num_layers=1, head_size=8))
    )
    with pytest.raises(WkvError, match="no native inference path"):
        NativeRWKV7(wkv.create_model("rwkv4", vocab_size=9, hidden_size=64, num_layers=1))
