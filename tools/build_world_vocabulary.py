"""Packs the World vocabulary of the PyPI package `rwkv` into the file that ships inside `wkv`.

    python tools/build_world_vocabulary.py PATH/rwkv_vocab_v20230424.txt

The text file is checked against its published hash and the facts known about it before anything is written.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import zlib
from pathlib import Path

from wkv.tokenizers.world import LONGEST_TOKEN, NUM_TOKENS, unpack_vocabulary

SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"  # with LF line ends
NUM_NODES = 116079  # of the trie, root included
DESTINATION = Path(__file__).parents[1] / "src/wkv/tokenizers/world_vocabulary.bin"


def read_text_file(path: Path) -> list[bytes]:
    """Token bytes in id order from `<id> <python literal> <byte length>` lines; both line-end variants."""
    raw = path.read_bytes().replace(b"\r\n", b"\n")
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} is not rwkv_vocab_v20230424.txt: sha256 {found}, expected {SHA256}")
    lines = raw.decode("utf-8").removesuffix("\n").split("\n")
    return [parse_line(line, number) for number, line in enumerate(lines, start=1)]


def parse_line(line: str, number: int) -> bytes:
    """The token of one line; the literal stands between the first and the last space and may contain spaces."""
    index, rest = line.split(" ", 1)
    literal, length = rest.rsplit(" ", 1)
    value = ast.literal_eval(literal)
    token: bytes = value.encode("utf-8") if isinstance(value, str) else value
    if int(index) != number or int(length) != len(token):
        raise SystemExit(f"line {number} is inconsistent: {line!r}")
    return token


def check(tokens: list[bytes]) -> None:
    """The facts that encoding, decoding and the packed form rest on."""
    prefixes = {token[:end] for token in tokens for end in range(len(token) + 1)}
    facts = {
        "65,529 tokens": len(tokens) == NUM_TOKENS,
        "all different": len(set(tokens)) == NUM_TOKENS,
        "sorted by length, then by bytes": tokens == sorted(tokens, key=lambda token: (len(token), token)),
        "byte b alone has id b + 1": tokens[:256] == [bytes([value]) for value in range(256)],
        "longest token": tokens[-1] == b" " * LONGEST_TOKEN and tokens[-2] == b"-" * 80,
        "two newlines are 261": tokens[260] == b"\n\n",
        "116,079 trie nodes": len(prefixes) == NUM_NODES,
    }
    wrong = [name for name, holds in facts.items() if not holds]
    if wrong:
        raise SystemExit(f"the vocabulary is not as expected: {', '.join(wrong)}")


def shared_prefix(first: bytes, second: bytes) -> int:
    """How many bytes both begin with; `first` is not a longer form of `second`, because they come in byte order."""
    same = (one == other for one, other in zip(first, second, strict=False))
    return next((at for at, equal in enumerate(same) if not equal), len(first))


def pack(tokens: list[bytes]) -> bytes:
    """Front coding in byte order, then zlib; `wkv.tokenizers.world.unpack_vocabulary` is the inverse."""
    shared, added, suffixes = bytearray(), bytearray(), bytearray()
    previous = b""
    for token in sorted(tokens):
        kept = shared_prefix(previous, token)
        shared.append(kept)
        added.append(len(token) - kept)
        suffixes += token[kept:]
        previous = token
    return zlib.compress(bytes(shared + added + suffixes), level=9)


def main() -> None:
    """Reads, checks, packs, checks the way back, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path, help="rwkv_vocab_v20230424.txt of the PyPI package rwkv")
    parser.add_argument("--out", type=Path, default=DESTINATION)
    arguments = parser.parse_args()
    tokens = read_text_file(arguments.vocabulary)
    check(tokens)
    packed = pack(tokens)
    if unpack_vocabulary(packed) != tokens:
        raise SystemExit("the packed vocabulary does not unpack to the same tokens")
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_bytes(packed)
    os.replace(temporary, arguments.out)
    print(f"{arguments.out}: {len(packed)} bytes, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
