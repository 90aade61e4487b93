"""What quantisation costs: bits per byte on held-out text, changes of the logits, group by group; and what it saves."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import wide
from wkv.quantization.model import plan, quantize_model, resident_bytes
from wkv.quantization.policy import GROUPS, Policy
from wkv.state import State
from wkv.tokenizers import Tokenizer

Progress = Callable[[int, int, str], None]

# Tokens that are read at a time; each document is read from its start to its end.
SEGMENT = 512


@dataclass(frozen=True)
class Difference:
    """How far a model is from the reference on the same text.

    Args:
        bits_per_byte: its own.
        change: relative change of bits per byte against the reference; 0.01 is one percent more.
        largest_logit_change, rms_logit_change: of all logits at all positions.
        kl: mean Kullback-Leibler divergence of its next-token distribution from the reference's, nats per token.
    """

    bits_per_byte: float
    change: float
    largest_logit_change: float
    rms_logit_change: float
    kl: float


@dataclass(frozen=True)
class Comparison:
    """Models on the same text.

    Args:
        tokens, num_bytes: length of the text.
        bits_per_byte: of the reference.
        others: name -> what changes.
    """

    tokens: int
    num_bytes: int
    bits_per_byte: float
    others: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return dataclasses.asdict(self)


class _Sums:
    """Running sums of one model."""

    def __init__(self) -> None:
        self.nats = self.squares = self.kl = self.largest = 0.0
        self.logits = 0

    def add(self, logits_TV: Tensor, log_p_TV: Tensor, reference: tuple[Tensor, Tensor] | None, ids_T: Tensor) -> None:
        self.nats -= float(log_p_TV.gather(-1, ids_T[:, None]).double().sum())
        if reference is None:
            return
        change = logits_TV - reference[0]
        self.largest = max(self.largest, float(change.abs().max()))
        self.squares += float(change.double().square().sum())
        self.kl += float((reference[1].exp() * (reference[1] - log_p_TV)).double().sum())
        self.logits += change.numel()


@torch.inference_mode()
def compare_models(
    reference: LanguageModel,
    others: Mapping[str, LanguageModel],
    documents: Sequence[str | bytes],
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Read the same text with several models.

    Args:
        reference: what the others are compared with.
        others: name -> model with the same vocabulary.
        documents: texts, each read with an empty state from its start, as `wkv.evaluation.bits_per_byte` does.
        tokenizer: the reference's own by default.
        max_tokens: stop after so many tokens, in the middle of a document if need be.
        progress: called as progress(tokens done, tokens, document) now and then.

    Raises:
        WkvError: if there is no tokenizer or no text.
    """
    tokenizer = tokenizer or _tokenizer(reference)
    lines, num_bytes = _encode(documents, tokenizer, max_tokens)
    tokens = sum(map(len, lines))
    start_id = tokenizer.eos_id
    models = {"": reference, **others}
    modes = {name: model.training for name, model in models.items()}
    readers = {name: _reader(model.eval()) for name, model in models.items()}
    sums = {name: _Sums() for name in models}
    done = 0
    for number, line in enumerate(lines):
        if progress is not None:
            progress(done, tokens, f"document {number + 1} of {len(lines)}")
        ids = torch.tensor(line if start_id is None else [start_id, *line], device=reference.ln_out.weight.device)
        _read_document(readers, sums, ids)
        done += len(line)
    for name, model in models.items():
        model.train(modes[name])
    first = len(lines) * math.log(reference.config.vocab_size) if start_id is None else 0.0
    return _comparison(sums, tokens, num_bytes, first)


def _comparison(sums: dict[str, _Sums], tokens: int, num_bytes: int, first: float) -> Comparison:
    bits = {name: (each.nats + first) / math.log(2) / num_bytes for name, each in sums.items()}
    own = bits[""]
    differences = {
        name: Difference(
            bits_per_byte=bits[name],
            change=bits[name] / own - 1,
            largest_logit_change=each.largest,
            rms_logit_change=math.sqrt(each.squares / max(1, each.logits)),
            kl=each.kl / tokens,
        )
        for name, each in sums.items()
        if name
    }
    return Comparison(tokens, num_bytes, own, differences)


def _read_document(readers: Mapping[str, Any], sums: Mapping[str, _Sums], ids: Tensor) -> None:
    states: dict[str, State | None] = dict.fromkeys(readers)
    for begin in range(0, len(ids) - 1, SEGMENT):
        window = ids[begin : begin + SEGMENT + 1]
        reference = None
        for name, read in readers.items():
            logits, states[name] = read(window[None, :-1], states[name])
            logits = wide(logits[0])
            log_p = torch.log_softmax(logits, -1)
            sums[name].add(logits, log_p, reference, window[1:])
            reference = reference or (logits, log_p)


def _reader(model: LanguageModel) -> Any:
    """The native kernels where they know the model, else the model itself."""
    from wkv.inference.native_rwkv7 import NativeRWKV7, unsupported

    return model if unsupported(model) is not None else NativeRWKV7(model)


def _tokenizer(model: LanguageModel) -> Tokenizer:
    from wkv.inference.prompts import find_tokenizer

    return find_tokenizer(model, None)


def _encode(
    documents: Sequence[str | bytes], tokenizer: Tokenizer, max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Ids of each document and the number of bytes they stand for."""
    if isinstance(documents, str | bytes):
        raise WkvError(f"documents must be a list of texts, found one {type(documents).__name__}")
    lines: list[list[int]] = []
    left, num_bytes = max_tokens or 2**62, 0
    for text in documents:
        ids = tokenizer.encode(text)[:left]
        if ids:
            lines.append(ids)
            num_bytes += len(tokenizer.decode_bytes(ids))
        left -= len(ids)
        if left <= 0:
            break
    if not num_bytes:
        raise WkvError("measuring needs some text, found none")
    return lines, num_bytes


def quality_report(
    model: LanguageModel,
    quantized: LanguageModel,
    policy: Policy,
    documents: Sequence[str | bytes] | None = None,
    ablation: bool = False,
    max_tokens: int | None = None,
    files: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything `wkv quantize` tells about a quantised model, for JSON.

    Args:
        model, quantized: before and after.
        policy: how `quantized` was made.
        documents: held-out texts; None leaves the quality out.
        ablation: also quantise each group alone and report its share.
        max_tokens, progress: see `compare_models`.
        files: both checkpoints, for their sizes on disk.
    """
    parts = plan(model, policy)
    report: dict[str, Any] = {
        "policy": policy.to_dict(),
        "resident_bytes": {"before": resident_bytes(model), "after": resident_bytes(quantized)},
        "kept": {part.name: part.note for part in parts if part.note},
    }
    if files is not None:
        report["file_bytes"] = {"before": file_bytes(files[0]), "after": file_bytes(files[1])}
    if documents is None:
        return report
    alone = alone_models(model, policy) if ablation else {}
    models = {"all": quantized, **alone}
    found = compare_models(model, models, documents, max_tokens=max_tokens, progress=progress)
    report["quality"] = found.to_dict()
    return report


def alone_models(model: LanguageModel, policy: Policy) -> dict[str, LanguageModel]:
    """For the ablation: group -> the model with this group alone stored as `policy` says."""
    kinds, used = policy.to_dict(), {part.group for part in plan(model, policy) if part.kind != "keep"}
    return {
        f"{group} {kinds[group]}": quantize_model(model, policy=policy.only(group)) for group in GROUPS if group in used
    }


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Size of a file, or of all files of a folder."""
    path = Path(path)
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
