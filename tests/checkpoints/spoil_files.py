"""Bad files: truncated, damaged, foreign or malicious. The functions are as in `spoil_keys`."""

from __future__ import annotations

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from tests.checkpoints.helpers import NAMES, official, tiny, write_rwkv_cpp
from tests.checkpoints.spoil_keys import Spoiled, any_key, model, write


def whole_file(rng: random.Random, folder: Path) -> Path:
    name, weights = model(rng)
    if rng.random() < 0.4 and name != "rwkv7a":
        write_rwkv_cpp(folder / "model.bin", name, weights)
        return folder / "model.bin"
    return write(rng, folder, weights)


def spoil_truncated(rng: random.Random, folder: Path) -> Spoiled:
    path = whole_file(rng, folder)
    data = path.read_bytes()
    cut = rng.choice([0, 1, 4, 7, 8, 23, 24, 30, len(data) - 1, len(data) // 2, rng.randrange(len(data))])
    path.write_bytes(data[:cut])
    return path, path.name


def spoil_appended(rng: random.Random, folder: Path) -> Spoiled:
    name, weights = model(rng)
    path = folder / rng.choice(["model.bin", "model.safetensors"])
    if path.suffix == ".bin" and name != "rwkv7a":
        write_rwkv_cpp(path, name, weights)
    else:
        path.write_bytes(save(weights))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 60)))
    return path, path.name


def spoil_safetensors_header(rng: random.Random, folder: Path) -> Spoiled:
    """One flipped bit in the length or the header."""
    _, weights = model(rng)
    data = bytearray(save(weights))
    length = len(json.dumps(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]), separators=(",", ":")))
    data[rng.choice([rng.randrange(8), rng.randrange(8, 8 + length)])] ^= 1 << rng.randrange(7)
    (folder / "model.safetensors").write_bytes(data)
    return folder / "model.safetensors", "model.safetensors"


def spoil_safetensors_claims(rng: random.Random, folder: Path) -> Spoiled:
    """A header that is valid JSON and claims what cannot be."""
    _, weights = model(rng)
    data = save(weights)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    entry = header[any_key(rng, weights)]
    kind = rng.randrange(6)
    if kind == 0:
        entry["shape"] = [2**40, 2**40]
    elif kind == 1:
        entry["shape"] = [-1, *entry["shape"]]
    elif kind == 2:
        entry["data_offsets"] = [0, 2**62]
    elif kind == 3:
        entry["dtype"] = rng.choice(["F7", "", None, 5])
    elif kind == 4:
        entry["data_offsets"] = entry["data_offsets"][::-1]
    else:
        header = rng.choice([[], {}, None, "x", {"a": {}}, {"__metadata__": {"wkv": 3}}])
    text = json.dumps(header).encode()
    length = rng.choice([len(text), len(text), 2**63, 99_000_000])
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + body)
    return folder / "model.safetensors", "model.safetensors"


def spoil_pickle(rng: random.Random, folder: Path) -> Spoiled:
    """One flipped bit in the pickle of a .pth file."""
    _, weights = model(rng)
    path = folder / "model.pth"
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        member = next(member for member in archive.infolist() if member.filename.endswith("data.pkl"))
    data = bytearray(path.read_bytes())
    start = data.index(b"\x80\x02}")
    data[start + rng.randrange(member.file_size)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path, "model.pth"


def spoil_archive(rng: random.Random, folder: Path) -> Spoiled:
    """A zip archive that torch.save did not write."""
    path = folder / "model.pth"
    compression = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    names = rng.choice([["a.txt"], [], ["m/data.pkl", "n/data.pkl"], ["m/data.pkl"], ["m/data.pkl", "m/constants.pkl"]])
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, rng.choice([b"", b"text", pickle.dumps({"a": 1}), b"\x80\x02}q\x00."]))
    return path, "model.pth"


def spoil_content(rng: random.Random, folder: Path) -> Spoiled:
    """A sound .pth file of something else."""
    _, weights = model(rng)
    path = folder / "model.pth"
    loop: dict[str, Any] = {}
    loop["model"] = loop
    torch.save(rng.choice([
        [1, 2], "text", 5, None, {}, {"a": 1}, torch.zeros(3), list(weights.values()), {3: torch.zeros(2)}, loop,
        {"model": weights, "ema": weights}, {"resnet.conv.weight": torch.zeros(3)}, {"optimizer": {"state": {}}},
        {"emb.weight": torch.zeros(3, 4).to_sparse()}, {"emb.weight": torch.zeros(3, 4, device="meta")},
        {"emb.weight": torch.zeros(3, 4)},
    ]), path)  # fmt: skip
    return path, "model.pth"


FILES: dict[bytes, str | tuple[str, str]] = {
    b"": "empty", b"GGUF\x03\x00\x00\x00": "truncated", b"version https://git-lfs.github.com/spec/v1\noid": "git-lfs",
    b"<!DOCTYPE html><html>": "web page", b'\n {"error": "gated"}': "JSON", b"\x1f\x8b\x08\x00": "gzip",
    b"\x80\x02}q\x00.": "PyTorch before 1.6", b"tjgg\x01\x00\x00\x00": "ggjt", b"\x00" * 100: "not a checkpoint",
    b"hello": "not a checkpoint", b"PK\x03\x04": "damaged", b"fmgg": ("truncated", "of version"),
}  # fmt: skip


def spoil_foreign_file(rng: random.Random, folder: Path) -> Spoiled:
    start = rng.choice(list(FILES))
    path = folder / rng.choice(["model.pth", "model.bin", "model", "model.ckpt"])
    path.write_bytes(start + (rng.randbytes(rng.choice([0, 50])) if start else b""))
    return path, FILES[start]


def spoil_rwkv_cpp(rng: random.Random, folder: Path) -> Spoiled:
    """Numbers in the headers of an rwkv.cpp file."""
    name = rng.choice([name for name in NAMES if name != "rwkv7a"])
    path = folder / "model.bin"
    write_rwkv_cpp(path, name, official(name))
    data = bytearray(path.read_bytes())
    wild = [-1, 0, 3, 13, 2**16, 2**31 - 1, -(2**31)]
    place = rng.randrange(4)
    if place == 0:
        offset = rng.choice([4, 8, 12, 16])
    elif place == 1:
        offset = 24 + 4 * rng.randrange(5)  # the first tensor: dimensions, key length, type, sizes
    else:
        key = rng.choice([b"blocks.1.ln1.weight", b"blocks.0.ffn.key.weight", b"ln_out.bias"])
        offset = data.index(key) - 4 * rng.choice([1, 4])
    before = struct.unpack_from("<i", data, offset)[0]
    struct.pack_into("<i", data, offset, rng.choice([value for value in wild if value != before]))
    path.write_bytes(data)
    return path, "model.bin"


def spoil_rwkv_cpp_keys(rng: random.Random, folder: Path) -> Spoiled:
    path = folder / "model.bin"
    write_rwkv_cpp(path, "rwkv4", official("rwkv4"))
    data = path.read_bytes()
    old, new, word = rng.choice([
        (b"blocks.1.ln1.weight", b"blocks.1.ln2.weight", "blocks.1.ln2.weight occurs twice"),
        (b"blocks.1.ln1.weight", b"blocks.1.ln1.w\xffigh\x00", "missing blocks.1.ln1.weight"),
        (b"blocks.2.", b"blocks.7.", "layer 2 is missing"), (b"emb.weight", b"emc.weight", "missing emb.weight"),
    ])  # fmt: skip
    path.write_bytes(data.replace(old, new))
    return path, word


def spoil_description(rng: random.Random, folder: Path) -> Spoiled:
    """The metadata of our own format."""
    name, weights = model(rng)
    described = {"model": name, "config": tiny(name).config.to_dict(), "tokenizer": None, "version": "0.1.0"}
    config = described["config"]
    change: Any = rng.randrange(12)
    if change < 4:
        key = rng.choice(["vocab_size", "hidden_size", "num_layers", "ffn_size"])
        config[key] = rng.choice([config[key] + 1, 10**12, -3, "12", 0, None if key == "vocab_size" else 2.5, True])
    elif change == 4:
        described["model"] = rng.choice(["rwkv99", "", None, 4, [], next(other for other in NAMES if other != name)])
    elif change == 5:
        described["tokenizer"] = rng.choice([{"kind": "runes"}, 5, "bytes", {"kind": "bpe"}, ["bytes"]])
    elif change == 6:
        del described[rng.choice(["model", "config", "tokenizer"])]
    elif change == 7:
        config["colour"] = "red"
    elif change == 8:
        described["config"] = rng.choice([None, [], 5, {}, "text"])
    elif change == 9:
        weights.pop(any_key(rng, weights))
    elif change == 10:
        del config["vocab_size"]
    text = "{" if change == 11 else json.dumps(described)
    path = folder / "model.safetensors"
    save_file(weights, path, {"wkv": text})
    return path, "model.safetensors"


def spoil_folder(rng: random.Random, folder: Path) -> Spoiled:
    """Folders and lists that are no complete checkpoint."""
    _, weights = model(rng)
    keys = list(weights)
    first, second = ({key: weights[key] for key in part} for part in (keys[:9], keys[9:]))
    index = folder / "model.safetensors.index.json"
    kind = rng.randrange(11)
    if kind == 0:
        (folder / "readme.txt").write_text("no weights here")
        return folder, "a folder without weights"
    if kind == 1:
        save_file(second, folder / "model-2-of-2.safetensors")
        return folder, "model-1-of-2.safetensors is missing"
    if kind == 2:
        torch.save(first, folder / "a.pth")
        torch.save({**second, keys[0]: weights[keys[0]]}, folder / "b.pth")
        return folder, f"{keys[0]} is in "
    if kind == 3:
        index.write_text(rng.choice(["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "null"]))
        return folder, index.name
    if kind == 4:
        save_file(weights, folder / "x.safetensors")
        index.write_text(json.dumps({"weight_map": {"emb.weight": rng.choice(["../x.safetensors", "/etc/passwd"])}}))
        return folder, "expected a file name in the same folder"
    if kind == 5:
        index.write_text(json.dumps({"weight_map": {"emb.weight": "gone.safetensors"}}))
        return folder, "gone.safetensors, which is not there"
    if kind == 6:
        for name in ("a-1-of-1", "b-1-of-1"):
            save_file(weights, folder / f"{name}.safetensors")
        return folder, "shards of several checkpoints"
    if kind == 7:
        path = write(rng, folder, weights)
        return [path, path], "pass one checkpoint"
    if kind == 8:
        return rng.choice([[folder / "gone.pth"], folder / "gone.pth", str(folder / "gone")]), "no such file"
    if kind == 9:
        return [], "the list of shards is empty"
    save_file(weights, folder / "model.st")
    return folder / "model.st", "web-rwkv"


def spoil_source(rng: random.Random, folder: Path) -> Spoiled:
    """Arguments that are no source at all."""
    source: Any
    source, word = rng.choice([
        (None, "found NoneType"), (5, "found int"), (b"model.pth", "found bytes"), ([1, 2], "found list"),
        ({}, "no tensors"), ({"a": 1}, "no tensors"), ("", "empty"), (object(), "found object"),
        ({"emb.weight": torch.zeros(2, 2)}, "no layers"), ({3: torch.zeros(2)}, "expected text"),
        ("/dev/null", "neither a file nor a folder"), (torch.nn.Linear(1, 1), "found Linear"),
    ])  # fmt: skip
    return source, word


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "owned")


class Shell(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


class Evaluated(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w')",)


def spoil_with_code(rng: random.Random, folder: Path) -> Spoiled:
    _, weights = model(rng)
    bomb = rng.choice([Bomb, Shell, Evaluated])(folder / "owned")
    content = rng.choice([bomb, {**weights, "blocks.0.att.key.weight": bomb}, {"model": weights, "args": bomb}])
    path = folder / "model.pth"
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    return path, "model.pth"
