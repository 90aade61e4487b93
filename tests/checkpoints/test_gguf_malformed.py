"""Damaged and foreign GGUF files: one `CheckpointError` of one line, in little time and memory."""

from __future__ import annotations

import contextlib
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wkv
from tests.checkpoints.helpers import tiny
from wkv.checkpoints.gguf_file import GGUFFile, NewTensor, Value, write_gguf
from wkv.errors import CheckpointError

Change = tuple[dict[str, Value], list[NewTensor]]
SIZES = {"hidden_size": 32, "attention_size": 32, "ffn_size": 64, "num_layers": 2}
ABSURD = (2**16 + 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    wkv.save_model(tiny("rwkv7", **SIZES), path, "gguf", quantization="Q8_0")
    return path


def parts(sound: Path) -> Change:
    """Metadata and tensors of the sound file, to be changed."""
    file = GGUFFile(sound)
    contents = {name: file.raw(name).tobytes() for name in file.tensors}
    new = [NewTensor(*info[:3], lambda name=name: [contents[name]]) for name, info in file.tensors.items()]
    return dict(file.metadata), new


def write(path: Path, metadata: dict[str, Value], tensors: list[NewTensor]) -> Path:
    with open(path, "wb") as file:
        write_gguf(file, metadata, tensors)
    return path


def refused(path: Path, *words: str) -> str:
    """The message; loading must fail with it and describing must not call the file loadable."""
    with pytest.raises(CheckpointError) as caught:
        wkv.load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert any(word in message for word in words), message
    assert len(message) < 2000
    assert len(message.splitlines()) == 1
    with contextlib.suppress(CheckpointError):
        assert not wkv.checkpoints.inspect(path).loadable
    return message


def places(sound: Path) -> list[int]:
    """Ends of every part of the header, and places within and between the tensors."""
    data, file = sound.read_bytes(), GGUFFile(sound)
    keys = [data.index(key.encode()) for key in file.metadata]
    names = [data.index(name.encode()) for name in file.tensors]
    starts = [info.start for info in file.tensors.values()]
    ends = [info.start + info.size for info in file.tensors.values()]
    near = [spot + shift for spot in keys + names for shift in (-8, -1, 0, 3)]
    return sorted({4, 5, 8, 15, 16, 23, 24, 30, *near, *starts, *(end - 1 for end in ends), *(s + 1 for s in starts)})


def test_truncated_anywhere(sound: Path, tmp_path: Path) -> None:
    data, path = sound.read_bytes(), tmp_path / "m.gguf"
    cuts = places(sound)
    assert len(cuts) > 300
    for cut in cuts:
        path.write_bytes(data[:cut])
        refused(path, "truncated", "empty")


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    for start, word in ((b"", "empty"), (b"GGU", "not a checkpoint"), (b"GGUF", "truncated")):
        (tmp_path / "m.gguf").write_bytes(start)
        refused(tmp_path / "m.gguf", word)
    for content, word in ((b"", "empty"), (b"not GGUF at all", "it starts with b'not '")):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=word):
            GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(("version", "word"), [
    (0, "of version 0"), (1, "version 1"), (4, "version 4"), (3 << 24, "big-endian"), (2**32 - 1, "expected 2 or 3"),
])  # fmt: skip
def test_other_versions(version: int, word: str, sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    struct.pack_into("<I", data, 4, version)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", word)


@pytest.mark.parametrize("count", ABSURD)
@pytest.mark.parametrize("where", ["tensors", "entries", "key", "string", "array", "strings", "dimension", "name"])
def test_absurd_counts(where: str, count: int, sound: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(sound)
    extra = {"a.string": Value("str", "text"), "a.numbers": Value("i32[]", [1, 2]), "a.texts": Value("str[]", ["x"])}
    path = write(tmp_path / "m.gguf", {**metadata, **extra}, tensors)
    data = bytearray(path.read_bytes())
    after = {key: data.index(key.encode()) + len(key) for key in (*extra, "blk.0.channel_mix_key.weight")}
    first = data.index(b"token_embd.weight")
    offset = {
        "tensors": 8, "entries": 16, "key": 24, "string": after["a.string"] + 4, "array": after["a.numbers"] + 8,
        "strings": after["a.texts"] + 8, "dimension": after["blk.0.channel_mix_key.weight"] + 4, "name": first - 8,
    }[where]  # fmt: skip
    struct.pack_into("<Q", data, offset, count)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "truncated or damaged", "claims", "damaged", "needs")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kilobytes


@pytest.mark.parametrize("dimensions", [0, 5, 1000, 2**31, 2**32 - 1])
def test_absurd_numbers_of_dimensions(dimensions: int, sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    struct.pack_into("<I", data, data.index(b"output_norm.bias") + 16, dimensions)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", f"claims {dimensions} dimensions")


@pytest.mark.parametrize(("number", "word"), [
    (4, "type 4"), (9, "Q8_1"), (15, "Q8_K"), (19, "IQ1_S"), (26, "I32"), (28, "F64"), (39, "MXFP4"), (500, "type 500"),
    (2**32 - 1, "which wkv cannot read; expected one of F32, F16"), (14, "a multiple of 256"),
])  # fmt: skip
def test_types_that_cannot_be_read(number: int, word: str, sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    name = b"blk.1.time_mix_key.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, number)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", word)


@pytest.mark.parametrize(("offset", "word"), [
    (1, "no multiple of 32"), (16, "no multiple of 32"), (32, "overlap"), (2**20, "are left"),
    (2**63, "are left"), (2**64 - 32, "are left"), (0, "overlap"),
])  # fmt: skip
def test_bad_offsets(offset: int, word: str, sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    name = b"blk.1.time_mix_key.weight"
    struct.pack_into("<Q", data, data.index(name) + len(name) + 4 + 16 + 4, offset)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", word)


@pytest.mark.parametrize("size", [0, 33, 64, 2**20])
def test_other_sizes(size: int, sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    name = b"output_norm.bias"
    struct.pack_into("<Q", data, data.index(name) + len(name) + 4, size)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", "has shape", "overlap", "are left")


METADATA: list[tuple[str, Value | None, str]] = [
    ("general.architecture", None, "no architecture"),
    ("general.architecture", Value("u32", 7), "no architecture"),
    ("general.architecture", Value("str", "llama"), "architecture 'llama', expected one of rwkv7, rwkv6"),
    ("general.architecture", Value("str", "arwkv7"), "ARWKV-7"),
    ("general.architecture", Value("str", "rwkv6qwen2"), "Qwen2"),
    ("general.architecture", Value("str", "x" * 5000), "architecture"),
    ("general.architecture", Value("str", "a\nb"), "architecture"),
    ("general.architecture", Value("str", "rwkv6"), "its metadata have no rwkv6"),
    ("general.architecture", Value("str[]", ["rwkv7"]), "no architecture"),
    ("general.alignment", Value("u32", 0), "a power of two"),
    ("general.alignment", Value("u32", 48), "a power of two"),
    ("general.alignment", Value("u32", 2**31), "a power of two"),
    ("general.alignment", Value("str", "32"), "a power of two"),
    ("general.alignment", Value("f32[]", [1.0]), "an array of f32"),
    ("rwkv7.block_count", None, "have no rwkv7.block_count"),
    ("rwkv7.block_count", Value("u32", 0), "block_count = 0"),
    ("rwkv7.block_count", Value("u32", 1), "unexpected blk.1.attn_norm.weight"),
    ("rwkv7.block_count", Value("u32", 3), "blocks"),
    ("rwkv7.block_count", Value("u32", 2**32 - 1), "expected a whole number"),
    ("rwkv7.block_count", Value("u32", 2**30), "block_count = 1073741824"),
    ("rwkv7.block_count", Value("str", "2"), "expected a whole number"),
    ("rwkv7.block_count", Value("i32", -2), "expected a whole number"),
    ("rwkv7.block_count", Value("bool", True), "expected a whole number"),
    ("rwkv7.block_count", Value("u32[]", [2]), "an array of u32"),
    ("rwkv7.wkv.head_size", None, "have no rwkv7.wkv.head_size"),
    ("rwkv7.wkv.head_size", Value("u32", 0), "heads of 0"),
    ("rwkv7.wkv.head_size", Value("u32", 5), "heads of 5"),
    ("rwkv7.wkv.head_size", Value("f32", 4.0), "expected a whole number"),
    ("rwkv7.embedding_length", None, "have no rwkv7.embedding_length"),
    ("rwkv7.embedding_length", Value("u32", 33), "emb.weight has shape [11, 32]"),
    ("rwkv7.feed_forward_length", Value("u32", 32), "feed_forward_length = 32"),
    ("rwkv7.attention.gate_lora_rank", Value("u32", 8), "gate_lora_rank = 8"),
    ("rwkv7.attention.value_residual_mix_lora_rank", Value("u64", 2**40), "expected a whole number"),
    ("rwkv7.attention.layer_norm_epsilon", None, "have no rwkv7.attention.layer_norm_epsilon"),
    ("rwkv7.attention.layer_norm_epsilon", Value("f32", float("nan")), "expected a small number"),
    ("rwkv7.attention.layer_norm_epsilon", Value("f32", -1e-5), "expected a small number"),
    ("rwkv7.attention.layer_norm_epsilon", Value("u32", 1), "expected a small number"),
    ("split.count", Value("u16", 4), "one part of a split GGUF file"),
    ("split.count", Value("i32[]", [1, 2]), "an array of i32"),
    ("tokenizer.ggml.model", Value("u32", 5), "tokenizer.ggml.model has type u32"),
    ("tokenizer.ggml.tokens", Value("i32[]", [1, 2]), "tokenizer.ggml.tokens has type i32[]"),
    ("tokenizer.ggml.tokens", Value("str[]", ["a"]), "has 1 entries, but the embedding has 11 rows"),
    ("wkv.tokenizer", Value("str", "{"), "wkv.tokenizer is not JSON"),
    ("wkv.tokenizer", Value("str", "[" * 100_000), "wkv.tokenizer is not JSON"),
    ("wkv.tokenizer", Value("str", "[1]"), "does not describe a tokenizer"),
    ("wkv.tokenizer", Value("str", '{"kind": "runes"}'), "unknown tokenizer kind"),
    ("wkv.tokenizer", Value("u8", 1), "wkv.tokenizer has type u8"),
]


@pytest.mark.parametrize(("key", "value", "word"), METADATA)
def test_metadata_that_cannot_be(key: str, value: Value | None, word: str, sound: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(sound)
    metadata.pop(key, None)
    if value is not None:
        metadata[key] = value
    refused(write(tmp_path / "m.gguf", metadata, tensors), word)


def reshaped(tensor: NewTensor, shape: tuple[int, ...]) -> NewTensor:
    return tensor._replace(shape=shape, kind="F32", chunks=lambda: [np.zeros(shape, np.float32).tobytes()])


TENSORS: list[tuple[str, Callable[[NewTensor], list[NewTensor]], str]] = [
    ("blk.1.time_mix_w1.weight", lambda t: [], "missing blocks.1.att.w1"),
    ("output.weight", lambda t: [], "missing head.weight"),
    ("token_embd.weight", lambda t: [], "missing emb.weight"),
    ("blk.1.time_mix_lerp_fused.weight", lambda t: [], "missing blocks.1.att.x_r"),
    ("output_norm.bias", lambda t: [t._replace(name="output_norm.bios")], "unexpected output_norm.bios"),
    ("output_norm.bias", lambda t: [t._replace(name="rope_freqs.weight")], "unexpected rope_freqs.weight"),
    ("output_norm.bias", lambda t: [t._replace(name="blk.9.attn_norm.bias")], "unexpected blk.9.attn_norm.bias"),
    ("output_norm.bias", lambda t: [t._replace(name="a\nb\x1b[31m")], "unexpected 'a\\nb\\x1b[31m'"),
    ("output_norm.bias", lambda t: [t, t], "occurs twice"),
    ("output_norm.bias", lambda t: [t, t._replace(name="blk.0.time_mix_lerp_r.weight")], "unexpected"),
    ("output_norm.bias", lambda t: [t._replace(name="n" * 300)], "claims a length of 300 bytes"),
    ("blk.1.time_mix_lerp_fused.weight", lambda t: [reshaped(t, (5, 1, 1, 32))], "expected [6, 1, 1, C]"),
    ("blk.1.time_mix_lerp_fused.weight", lambda t: [reshaped(t, (6, 2, 1, 32))], "expected [6, 1, 1, C]"),
    ("blk.1.time_mix_w1.weight", lambda t: [reshaped(t, (96,))], "expected a matrix"),
    ("blk.1.time_mix_r_k.weight", lambda t: [reshaped(t, (31,))], "which heads of 4 do not divide"),
    ("blk.1.time_mix_r_k.weight", lambda t: [reshaped(t, (64,))], "blocks.1.att.r_k"),
    ("blk.1.attn_norm.weight", lambda t: [reshaped(t, (31,))], "blocks.1.ln1.weight has shape [31]"),
    ("blk.1.time_mix_key.weight", lambda t: [reshaped(t, (32, 33))], "blocks.1.att.key.weight has shape [32, 33]"),
    ("token_embd.weight", lambda t: [reshaped(t, (32,))], "emb.weight"),
]


@pytest.mark.parametrize(("name", "change", "word"), TENSORS)
def test_tensors_that_do_not_fit(name: str, change: Any, word: str, sound: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(sound)
    changed = [new for tensor in tensors for new in (change(tensor) if tensor.name == name else [tensor])]
    refused(write(tmp_path / "m.gguf", metadata, changed), word, "tokenizer.ggml.tokens")


def test_no_tensors_at_all(sound: Path, tmp_path: Path) -> None:
    refused(write(tmp_path / "m.gguf", parts(sound)[0], []), "it has 0 tensors")


@pytest.mark.parametrize("key", [b"general.name", b"RWKV-7 2x32", b"output_norm.bias"])
def test_text_that_is_not_utf_8(key: bytes, sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    assert key in data
    (tmp_path / "m.gguf").write_bytes(data.replace(key, b"\xff\xfe" + key[2:]))
    refused(tmp_path / "m.gguf", "is not UTF-8 text")


@pytest.mark.parametrize("number", [13, 100, 2**32 - 1])
def test_unknown_value_types(number: int, sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    struct.pack_into("<I", data, data.index(b"general.file_type") + 17, number)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", f"the unknown type {number}")


@pytest.mark.parametrize("depth", [1, 100, 100_000])
def test_arrays_of_arrays(depth: int, sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    key = b"general.nested"
    nested = struct.pack("<Q", len(key)) + key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth
    count = struct.unpack_from("<Q", data, 16)[0]
    (tmp_path / "m.gguf").write_bytes(data[:16] + struct.pack("<Q", count + 1) + nested + data[24:])
    refused(tmp_path / "m.gguf", "is an array of arrays")


def test_keys_that_occur_twice(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    key = b"general.name"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IB", 0, 1)
    count = struct.unpack_from("<Q", data, 16)[0]
    (tmp_path / "m.gguf").write_bytes(data[:16] + struct.pack("<Q", count + 1) + entry + data[24:])
    refused(tmp_path / "m.gguf", "general.name occurs twice")


def test_any_flipped_bit_gives_this_error_or_none(sound: Path, tmp_path: Path) -> None:
    """Damage in the values cannot be seen; whatever is seen is a `CheckpointError`."""
    data, rng, path = sound.read_bytes(), random.Random(3), tmp_path / "m.gguf"
    header = GGUFFile(sound).tensors["token_embd.weight"].start
    messages = []
    for _ in range(400):
        spoiled = bytearray(data)
        spoiled[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        try:
            wkv.load_model(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all(len(message.splitlines()) == 1 for message in messages)
