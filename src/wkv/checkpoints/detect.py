"""Which model a set of keys and shapes is, and all its sizes. Key order, file names and hints play no part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from wkv.checkpoints.archive import Archive, Shape, printable
from wkv.checkpoints.official import FIELDS, split_key, symbolic_shape

Shapes = Mapping[str, Shape]

_MARKS_7 = ("att.r_k", "att.k_k", "att.k_a", "att.a1")
_MARKS_7A = ("ffn.s_emb.weight", "ffn.s_emb_x.weight")
_MARKS_5 = ("att.ln_x.weight", "att.ln_x.bias")


def model_name(shapes: Shapes) -> str:
    """The registered name of the model with these keys.

    RWKV-5.0 and 5.1 keep one decay per head, 5.2 one per channel; the file name or a version number never counts.
    """
    if "convert3.weight" in shapes:
        return "temporal"
    parts = [(split[1], shape) for key, shape in shapes.items() if (split := split_key(key))]
    names = {name for name, _ in parts}
    if names.intersection(_MARKS_7):
        return "rwkv7a" if names.intersection(_MARKS_7A) else "rwkv7"
    if any(name.startswith("att.time_maa_") for name in names):
        return "rwkv6"
    if not names.intersection(_MARKS_5):
        return "rwkv4"
    decays = [len(shape) > 1 and shape[1] > 1 for name, shape in parts if name == "att.time_decay"]
    if sum(decays) > len(decays) / 2:
        return "rwkv5"
    return "rwkv5_1" if "att.gate.weight" in names else "rwkv5_0"


def layer_count(archive: Archive, keys: Iterable[str]) -> int:
    """Number of layers.

    Raises:
        CheckpointError: if there are none, or one in the middle is missing.
    """
    examples = {split[0]: key for key in keys if (split := split_key(key))}
    if not examples:
        raise archive.error("no layers in it: expected keys such as blocks.0.att.key.weight")
    gap = next((layer for layer in range(len(examples)) if layer not in examples), None)
    if gap is not None:
        beyond = printable(min((key for layer, key in examples.items() if layer > gap)))
        raise archive.error(f"layer {gap} is missing (no key begins with blocks.{gap}.), though it holds {beyond}")
    return len(examples)


class Reading(NamedTuple):
    """A size as one tensor tells it."""

    key: str
    value: int


def sizes(archive: Archive, name: str, shapes: Shapes) -> dict[str, int]:
    """All sizes, letter -> value, that the shapes tell; every tensor is asked and all must agree.

    Raises:
        CheckpointError: naming the tensor whose shape does not fit, or disagrees with the majority.
    """
    readings: dict[str, list[Reading]] = defaultdict(list)
    for key, shape in shapes.items():
        symbols = symbolic_shape(name, key)
        if symbols is None:
            continue
        found = bind(symbols, shape)
        if found is None:
            expected = f"[{', '.join(symbols)}], {_legend(symbols)}"
            raise archive.error(f"{key} has shape {list(shape)}, expected {expected}")
        for letter, value in found:
            readings[letter].append(Reading(key, value))
    result = {letter: _agreed(archive, letter, readings[letter], shapes) for letter in readings}
    return _with_heads(archive, result, readings)


def bind(symbols: list[str], shape: Shape) -> list[tuple[str, int]] | None:
    """What the letters stand for in `shape`; dimensions of 1 may be missing or added. None if it cannot fit."""
    if 0 in shape:
        return None
    if len(shape) != len(symbols):
        symbols = [symbol for symbol in symbols if symbol != "1"]
        shape = tuple(size for size in shape if size != 1)
        if len(symbols) == 1 and not shape:
            shape = (1,)
        if len(shape) != len(symbols):
            return None
    found = [_bind_one(symbol, size) for symbol, size in zip(symbols, shape, strict=True)]
    return None if None in found else [pair for pair in found if pair and pair[0]]


def _bind_one(symbol: str, size: int) -> tuple[str, int] | None:
    if symbol.isdigit():
        return ("", size) if size == int(symbol) else None
    if symbol == "5M":
        return ("M", size // 5) if size % 5 == 0 else None
    if symbol == "EE":
        return ("E", math.isqrt(size)) if math.isqrt(size) ** 2 == size else None
    return symbol, size


def _legend(symbols: list[str]) -> str:
    letters = dict.fromkeys(letter for symbol in symbols for letter in symbol if letter in FIELDS)
    return ", ".join(f"{letter} = {FIELDS[letter]}" for letter in letters)


def _agreed(archive: Archive, letter: str, readings: list[Reading], shapes: Shapes) -> int:
    """The value most tensors tell; an error that names one that does not."""
    votes: dict[int, list[Reading]] = defaultdict(list)
    for reading in readings:
        votes[reading.value].append(reading)
    ranked = sorted(votes.values(), key=len, reverse=True)
    winner = ranked[0][0]
    if len(ranked) > 1:
        odd = ranked[-1][0]
        more = f" and {len(ranked[0]) - 1} more" if len(ranked[0]) > 1 else ""
        raise archive.error(
            f"{odd.key} has shape {list(shapes[odd.key])}, so {FIELDS[letter]} would be {odd.value}, "
            f"but it is {winner.value} in {winner.key}{more}"
        )
    return winner.value


def _with_heads(archive: Archive, found: dict[str, int], readings: Mapping[str, list[Reading]]) -> dict[str, int]:
    """Check A = H N, or derive N where only H is stored."""
    if "H" not in found or "A" not in found:
        return found
    heads, width = found["H"], found["A"]
    key = readings["H"][0].key
    if width % heads:
        raise archive.error(f"{key} has {heads} heads, but attention_size {width} is not a multiple of that")
    size = found.setdefault("N", width // heads)
    if heads * size != width:
        other = readings["A"][0].key
        raise archive.error(f"{key} is [{heads}, {size}], but attention_size is {width} in {other}, not {heads * size}")
    return found
