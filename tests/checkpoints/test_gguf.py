"""GGUF files: llama.cpp's are read exactly, ours have the same bytes, and every model comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import wkv
from tests.checkpoints.helpers import GOLDEN, logits, tiny
from wkv.checkpoints.gguf_file import GGUFFile, NewTensor, Value, write_gguf
from wkv.checkpoints.gguf_saving import RECIPES
from wkv.checkpoints.gguf_vocabulary import is_world, token_bytes, token_text
from wkv.cli import app
from wkv.errors import WkvError
from wkv.quantization.ggml_blocks import dequantize, quantize
from wkv.tokenizers import ByteTokenizer, WorldTokenizer

FOLDER = GOLDEN / "ggml_quants"
KINDS = ("F32", "F16", "Q8_0", "Q4_0")
MODELS = ("rwkv6", "rwkv7")
SQUARE = {"hidden_size": 12, "attention_size": 12}


def golden(kind: str) -> Path:
    return FOLDER / f"tiny_rwkv7_{kind}.gguf"


def said(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens.long()[None]).logits[0]


def is_matrix(key: str) -> bool:
    return key.endswith(".weight") and ".ln" not in key and not key.startswith("ln")


@pytest.mark.parametrize("kind", KINDS)
def test_golden_weights_are_exact(kind: str) -> None:
    model = wkv.load_model(golden(kind))
    assert {p.dtype for p in model.parameters()} == {torch.float16 if kind == "F16" else torch.float32}
    found = wkv.load_model(golden(kind), dtype="float32").state_dict()
    expected = load_file(FOLDER / "tiny_rwkv7_weights.safetensors")
    assert found.keys() - expected.keys() == {f"blocks.0.att.v{n}" for n in range(3)}
    for key, value in expected.items():
        wanted = torch.from_numpy(dequantize(kind, quantize(kind, value.numpy()))) if is_matrix(key) else value
        assert torch.equal(found[key], wanted.reshape(found[key].shape)), key
    assert not found["blocks.0.att.v1"].any()  # llama.cpp's copy of a1 is not taken over


def test_golden_logits_in_float32() -> None:
    golden_logits = load_file(FOLDER / "tiny_rwkv7_gguf_logits.safetensors")
    found = said(wkv.load_model(golden("F32")), golden_logits["tokens"])
    for reference in ("pip_fp32", "llamacpp_F32"):
        torch.testing.assert_close(found, golden_logits[f"{reference}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "bar"), [("F16", 5e-3), ("Q8_0", 0.15), ("Q4_0", 0.15)])
def test_golden_logits_of_rounded_weights(kind: str, bar: float) -> None:
    golden_logits = load_file(FOLDER / "tiny_rwkv7_gguf_logits.safetensors")
    wanted = golden_logits[f"llamacpp_{kind}.logits"]
    found = said(wkv.load_model(golden(kind), dtype="float32"), golden_logits["tokens"])
    assert (found - wanted).abs().max() < bar
    assert torch.cosine_similarity(found, wanted, dim=-1).min() > 0.999


@contextlib.contextmanager
def inputs_in_q8_0(model: Any) -> Iterator[None]:
    """llama.cpp rounds what enters a quantized matrix to Q8_0 blocks."""

    def rounded(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return torch.from_numpy(dequantize("Q8_0", quantize("Q8_0", inputs[0].numpy())))

    handles = [module.register_forward_pre_hook(rounded) for module in model.modules() if isinstance(module, nn.Linear)]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_golden_logits_with_the_inputs_rounded_too(kind: str) -> None:
    golden_logits = load_file(FOLDER / "tiny_rwkv7_gguf_logits.safetensors")
    model = wkv.load_model(golden(kind))
    with inputs_in_q8_0(model):
        found = said(model, golden_logits["tokens"])
    torch.testing.assert_close(found, golden_logits[f"llamacpp_{kind}.logits"], atol=1e-5, rtol=0)


def data_area(file: GGUFFile) -> bytes:
    return file.path.read_bytes()[file.tensors["token_embd.weight"].start :]


@pytest.mark.parametrize("kind", KINDS)
def test_our_files_have_the_golden_bytes(kind: str, tmp_path: Path) -> None:
    wkv.save_model(wkv.load_model(golden("F32")), tmp_path / "m.gguf", "gguf", quantization=kind)
    ours, theirs = GGUFFile(tmp_path / "m.gguf"), GGUFFile(golden(kind))
    assert list(ours.tensors) == list(theirs.tensors)
    for name, info in ours.tensors.items():
        wanted = theirs.tensors[name]
        assert (info.shape, info.kind, info.size) == (wanted.shape, wanted.kind, wanted.size)
        assert np.array_equal(ours.raw(name), theirs.raw(name)), name
    assert data_area(ours) == data_area(theirs)
    different = {"general.name", "tokenizer.ggml.model", "rwkv7.vocab_size"}
    for key, value in ours.metadata.items():
        assert key in different or value == theirs.metadata[key], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(name, dtype, **SQUARE, norm_eps=2e-5)
    model.tokenizer = ByteTokenizer()
    wkv.save_model(model, tmp_path / "m.gguf", "gguf")
    found = wkv.load_model(tmp_path / "m.gguf")
    assert found.config == model.config
    assert isinstance(found.tokenizer, ByteTokenizer)
    expected = model.state_dict()
    for key, value in found.state_dict().items():
        if not (name == "rwkv7" and key.startswith("blocks.0.att.v") and "value" not in key):
            assert torch.equal(value, expected[key]), key
    assert torch.equal(logits(found), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_one_layer_keeps_its_value_rank(tmp_path: Path) -> None:
    model = tiny("rwkv7", **SQUARE, num_layers=1)
    wkv.save_model(model, tmp_path / "m.gguf", "gguf")
    assert wkv.load_model(tmp_path / "m.gguf").config == model.config


@pytest.mark.parametrize("quantization", RECIPES)
@pytest.mark.parametrize("hidden", [256, 64, 12])
def test_types_and_what_takes_their_place(quantization: str, hidden: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": hidden, "attention_size": hidden, "ffn_size": 256, "num_layers": 1}
    model = tiny("rwkv7", **sizes)
    wkv.save_model(model, tmp_path / "m.gguf", "gguf", quantization=quantization)
    body, head, number = RECIPES[quantization]
    fallback = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"} if hidden % 256 else {}
    kinds = {kind: "F16" if hidden % 32 and kind[0] == "Q" else fallback.get(kind, kind) for kind in (body, head)}
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata["general.file_type"].value == number
    assert file.tensors["token_embd.weight"].kind == kinds[body]
    assert file.tensors["output.weight"].kind == kinds[head]
    assert file.tensors["blk.0.channel_mix_value.weight"].kind == body  # rows of 256
    assert {file.tensors[f"blk.0.time_mix_{name}.weight"].kind for name in ("w1", "g2", "k_k", "r_k")} == {"F32"}
    found = wkv.load_model(tmp_path / "m.gguf", dtype="float32").state_dict()
    wanted = dequantize(body, quantize(body, model.blocks[0].ffn.value.weight.detach().numpy()))
    assert torch.equal(found["blocks.0.ffn.value.weight"], torch.from_numpy(wanted))
    assert wkv.checkpoints.inspect(tmp_path / "m.gguf").loadable


def test_another_type_for_the_head(tmp_path: Path) -> None:
    model = tiny("rwkv6", **SQUARE, ffn_size=32)
    wkv.save_model(model, tmp_path / "m.gguf", "gguf", quantization="Q4_0", head_quantization="F32")
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.tensors["output.weight"].kind == "F32"
    assert file.tensors["blk.0.channel_mix_value.weight"].kind == "Q4_0"
    assert torch.equal(wkv.load_model(tmp_path / "m.gguf", dtype="float32").head.weight, model.head.weight)


def test_the_type_can_be_asked_for(tmp_path: Path) -> None:
    wkv.save_model(tiny("rwkv7", **SQUARE), tmp_path / "m.gguf", "gguf", dtype="bfloat16")
    assert {p.dtype for p in wkv.load_model(tmp_path / "m.gguf").parameters()} == {torch.bfloat16}
    double = tiny("rwkv7", torch.float64, **SQUARE)
    wkv.save_model(double, tmp_path / "d.gguf", "gguf")
    assert {p.dtype for p in wkv.load_model(tmp_path / "d.gguf").parameters()} == {torch.float32}


def test_the_world_vocabulary(tmp_path: Path) -> None:
    model = tiny("rwkv7", **SQUARE, num_layers=1, vocab_size=65536)
    wkv.save_model(model, tmp_path / "m.gguf", "gguf")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    tokens, types = metadata["tokenizer.ggml.tokens"].value, metadata["tokenizer.ggml.token_type"].value
    assert tokens[:3] == ["<s>", "\\x00", "\\x01"]
    assert (tokens[11], tokens[93], tokens[256], tokens[261]) == ("\\n", "\\\\", "\\xff", "\\n\\n")
    assert tokens[40] == "'"
    assert tokens[-1] == "[PAD65535]"
    assert types.tolist() == [3] + [1] * 65529 + [5] * 6
    ids = {name: metadata[f"tokenizer.ggml.{name}_token_id"].value for name in ("bos", "eos", "eot")}
    assert ids == {"bos": 0, "eos": 0, "eot": 261}
    assert isinstance(wkv.load_model(tmp_path / "m.gguf").tokenizer, WorldTokenizer)
    escaped = ["\\" + text if text in ("'", '"') else text for text in tokens]
    assert is_world(escaped)
    assert not is_world([*tokens[:100], "\\xfe\\xfe", *tokens[101:]])
    assert not is_world(tokens[:65000])


@pytest.mark.parametrize("token", [b"a", b"'", b'"', b"it's", b"'\"", b"\\'", b"\\", b"\x00\xff", "你".encode(), b"\n"])
def test_written_tokens_are_read_back(token: bytes) -> None:
    assert token_bytes(token_text(token)) == token


@pytest.mark.parametrize("text", ["\\", "\\x0", "a" * 5000, "你", "\n", "' + b'\"", "'\"", "\x00"])
def test_texts_that_are_no_tokens(text: str) -> None:
    assert token_bytes(text) is None


def test_other_vocabularies_are_left_out() -> None:
    info = wkv.checkpoints.inspect(golden("F32"))
    assert info.tokenizer is None
    assert any("not the World vocabulary" in note for note in info.notes)
    assert wkv.load_model(golden("F32")).tokenizer is None


def rewritten(path: Path, metadata: dict[str, Value], tensors: dict[str, tuple[Any, str]]) -> Path:
    """A file of float arrays."""
    new = [
        NewTensor(name, values.shape, kind, lambda values=values, kind=kind: [quantize(kind, values).tobytes()])
        for name, (values, kind) in tensors.items()
    ]
    with open(path, "wb") as file:
        write_gguf(file, metadata, new)
    return path


def test_older_rwkv6_files(tmp_path: Path) -> None:
    """Token-shift vectors apart, and matrices divided by a power of two for every so many layers."""
    model = tiny("rwkv6", **SQUARE)
    wkv.save_model(model, tmp_path / "m.gguf", "gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    arrays = {name: (dequantize("F32", file.raw(name)).reshape(t.shape), "F32") for name, t in file.tensors.items()}
    for layer in range(3):
        fused, _ = arrays.pop(f"blk.{layer}.time_mix_lerp_fused.weight")
        for index, letter in enumerate("wkvrg"):
            arrays[f"blk.{layer}.time_mix_lerp_{letter}.weight"] = (fused[index, 0], "F32")
        for name in ("time_mix_output", "channel_mix_value"):
            values, kind = arrays[f"blk.{layer}.{name}.weight"]
            arrays[f"blk.{layer}.{name}.weight"] = (values / 2 ** (layer // 2), kind)
    metadata = {**file.metadata, "rwkv6.rescale_every_n_layers": Value("u32", 2)}
    found = wkv.load_model(rewritten(tmp_path / "old.gguf", metadata, arrays))
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_is_read(kind: str, tmp_path: Path, monkeypatch) -> None:
    """Random blocks stand for the values, also of types that are not written."""
    blocks = load_file(GOLDEN / "ggml_quants" / "ggml_blocks.safetensors")
    model = tiny("rwkv7", hidden_size=256, attention_size=256, ffn_size=512, vocab_size=6, num_layers=1)
    file_path = tmp_path / "m.gguf"
    wkv.save_model(model, file_path, "gguf")
    file = GGUFFile(file_path)
    new = []
    for name, info in file.tensors.items():
        raw, info_kind = file.raw(name).tobytes(), info.kind
        if name == "blk.0.channel_mix_value.weight":
            wanted = blocks[f"{kind}.deq"].repeat(43, 1)[:256]
            raw, info_kind = blocks[f"{kind}.bytes"].repeat(43, 1)[:256].numpy().tobytes(), kind
        new.append(NewTensor(name, info.shape, info_kind, lambda raw=raw: [raw]))
    with open(tmp_path / "n.gguf", "wb") as out:
        write_gguf(out, file.metadata, new)
    found = wkv.load_model(tmp_path / "n.gguf")
    assert torch.equal(found.blocks[0].ffn.value.weight, wanted)
    assert wkv.checkpoints.inspect(tmp_path / "n.gguf").dtypes[kind] == 1


def test_values_are_not_read_to_say_what_it_is(monkeypatch) -> None:
    def forbidden(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(GGUFFile, "raw", forbidden)
    assert wkv.checkpoints.inspect(golden("Q4_0")).loadable


def test_the_verb() -> None:
    result = CliRunner().invoke(app, ["info", str(golden("Q4_0"))])
    assert result.exit_code == 0
    assert result.output.startswith("RWKV-7, 2 layers x 64, 71,744 parameters, float32: can be loaded")
    for words in ("gguf", "float32 (55 tensors), Q4_0 (14 tensors)", "GGUF version 3, name 'tiny', file type Q4_0"):
        assert words in result.output
    assert "official values" not in result.output


@pytest.mark.parametrize(("arguments", "word"), [
    ({"path": "m.bin"}, "ends in .gguf"),
    ({"quantization": "Q9"}, "quantization 'Q9' is unknown; one of F32, F16"),
    ({"quantization": "Q2_K"}, "unknown"),
    ({"quantization": "Q4_0", "head_quantization": "Q4_K_M"}, "head_quantization 'Q4_K_M' is unknown"),
    ({"quantization": "Q4_0", "dtype": "float16"}, "dtype or quantization, not both"),
    ({"format": "wkv", "path": "m.safetensors", "quantization": "Q4_0"}, "for format 'gguf', not for 'wkv'"),
    ({"max_shard_size": "1GB"}, "only .safetensors files"),
])  # fmt: skip
def test_wrong_arguments_write_nothing(arguments: dict[str, Any], word: str, tmp_path: Path) -> None:
    given = {"format": "gguf", "path": "m.gguf", **arguments}
    with pytest.raises(WkvError) as caught:
        wkv.save_model(tiny("rwkv7", **SQUARE), **{**given, "path": tmp_path / given["path"]})
    assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_models_that_the_format_cannot_hold(tmp_path: Path) -> None:
    tuned = tiny("rwkv7", **SQUARE)
    tuned.tuned_state = tuned.init_state(1)
    spoiled = tiny("rwkv7", hidden_size=32, attention_size=32)
    torch.nn.init.constant_(spoiled.emb.weight, torch.inf)
    headless = tiny("rwkv7", **SQUARE)
    headless.head = nn.Identity()
    cases = [
        (tiny("rwkv5"), "RWKV-6 and RWKV-7 only, not RWKV-5.2"), (tiny("rwkv7a", **SQUARE), "not RWKV-7a"),
        (tiny("rwkv7"), "attention_size 8, hidden_size 12"),
        (tiny("rwkv7", **SQUARE, head_norm_eps=1e-5), "head_norm_eps 0.00064 fixed"),
        (headless, "the model has no head.weight"), (tuned, "tuned initial state"),
        (spoiled, "token_embd.weight: the values are not all finite"),
        (tiny("rwkv7", **SQUARE).to("meta"), "has no values"),
    ]  # fmt: skip
    (tmp_path / "m.gguf").write_text("old")
    for model, word in cases:
        with pytest.raises(WkvError) as caught:
            wkv.save_model(model, tmp_path / "m.gguf", "gguf", quantization="Q8_0")
        assert word in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
        assert (tmp_path / "m.gguf").read_text() == "old"


def test_llama_cpp_says_the_same(tmp_path: Path) -> None:
    """benchmarks/cpu/check_gguf_against_llama_cpp.py does this for every type."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = tiny("rwkv7", hidden_size=64, attention_size=64, head_size=64, ffn_size=128, vocab_size=96)
    wkv.save_model(model, tmp_path / "m.gguf", "gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    tokens = list(range(1, 33))
    llama.eval(tokens)
    theirs = torch.from_numpy(np.array(llama.scores[: len(tokens)]))
    llama.close()
    torch.testing.assert_close(said(model, torch.tensor(tokens)), theirs, atol=1e-4, rtol=1e-5)
