"""GGUF files held against llama.cpp: it loads ours, says what we say, and quantizes to the same bytes.

    pip install llama-cpp-python
    python benchmarks/cpu/check_gguf_against_llama_cpp.py --model rwkv7 --hidden-size 256

A model with random weights and the World vocabulary is written as GGUF in every type. For each, llama.cpp's logits are
compared with those of the same file loaded by wkv. llama.cpp also rounds the inputs of quantized matrices to 8 bits:
the largest difference must stay below twice what the quantization itself changes ("own error": wkv's logits before
against after). For the types whose inputs it rounds to Q8_0 blocks, the same rounding is imitated here ("imitated":
median over the tokens; a value on the boundary of two codes may fall on the other side and change all that follow).
Then llama.cpp quantizes the F32 file itself; every tensor must have the bytes that `quantize` makes of its values.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn

import wkv
from wkv.checkpoints.gguf_file import GGUFFile
from wkv.layers.language_model import LanguageModel
from wkv.quantization.ggml_blocks import dequantize, quantize
from wkv.speed.evidence import evidence
from wkv.tokenizers import WorldTokenizer

FOLDER = Path(__file__).resolve().parent
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q4_K_M")
ROUNDS_INPUTS_TO_Q8_0 = ("Q8_0", "Q4_0", "Q5_0")
THEIRS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M", "Q6_K")
TEXT = "The quick brown fox's tail, 12,345 \U0001f98a and 你好 — naïve\n\n\tEnd\x00 \"quoted\" \\ 'single'.\n"


def main() -> None:
    """Run all checks and write the result; exit status 1 if one fails."""
    options = parse()
    llama_cpp.llama_log_set(no_log, ctypes.c_void_p(0))
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    model = random_model(options)
    tokens = torch.randint(1, 65529, (options.tokens,), generator=torch.Generator().manual_seed(options.seed)).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = logits(model, tokens)
        ours = [check_ours(model, kind, reference, tokens, folder) for kind in KINDS]
        theirs = [check_theirs(kind, folder) for kind in THEIRS]
        same_ids = check_vocabulary(folder / "F32.gguf")
    result = {
        "what": "GGUF written by wkv against llama.cpp", "model": {"name": model.name, **model.config.to_dict()},
        "written_by_wkv": ours, "quantized_by_llama_cpp": theirs, "same_token_ids": same_ids,
        "tokens": options.tokens, "seed": options.seed,
        **evidence(__file__, sys.argv[1:], ("torch", "llama_cpp_python")),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(ours, theirs, same_ids)
    if not (same_ids and all(row["passed"] for row in ours + theirs)):
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("rwkv7", "rwkv6"), default="rwkv7")
    parser.add_argument("--hidden-size", type=int, default=256, help="128 shows the types that replace K-quants")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.out is None:
        file = f"check_gguf_{options.model}_{options.hidden_size}.json"
        options.out = FOLDER / "results" / file
    return options


def random_model(options: argparse.Namespace) -> LanguageModel:
    """Initial values with noise, so that every parameter matters, with the World tokenizer."""
    model: LanguageModel = wkv.create_model(
        options.model, vocab_size=65536, hidden_size=options.hidden_size, num_layers=options.layers, head_size=64
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim == 2 and "emb" not in name and min(parameter.shape) > 1
            scale = parameter.shape[-1] ** -0.5 if matrix else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    model.tokenizer = WorldTokenizer()
    return model.eval()


def check_ours(model: LanguageModel, kind: str, reference: Tensor, tokens: list[int], folder: Path) -> dict[str, Any]:
    """Write one type, load it in both programs, compare the logits."""
    path = folder / f"{kind}.gguf"
    wkv.save_model(model, path, "gguf", quantization=kind)
    theirs = llama_logits(path, tokens)
    loaded = wkv.load_model(path, dtype="float32")
    ours = logits(loaded, tokens)
    row: dict[str, Any] = {
        "kind": kind,
        "bytes": path.stat().st_size,
        "largest_logit": ours.abs().max().item(),
        "difference": (ours - theirs).abs().max().item(),
        "own_error": (ours - reference).abs().max().item(),
        "lowest_cosine": torch.cosine_similarity(ours, theirs, dim=-1).min().item(),
    }
    if kind in ROUNDS_INPUTS_TO_Q8_0:
        with rounded_inputs(loaded):
            per_token = (logits(loaded, tokens) - theirs).abs().amax(-1)
            row["imitated"], row["imitated_first"] = per_token.median().item(), per_token[0].item()
    row["passed"] = row["difference"] <= max(1e-5 * row["largest_logit"], 2 * row["own_error"])
    return row


def logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Logits of every position [T, V] in float32."""
    with torch.inference_mode():
        result: Tensor = model(torch.tensor([tokens])).logits[0].float()
    return result


def llama_logits(path: Path, tokens: list[int]) -> Tensor:
    """The same from llama.cpp, on one thread."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=len(tokens) + 8, n_batch=len(tokens), logits_all=True, n_threads=1, verbose=False
    )
    llama.eval(tokens)
    result = torch.from_numpy(np.array(llama.scores[: len(tokens)], np.float32))
    llama.close()
    return result


@contextlib.contextmanager
def rounded_inputs(model: LanguageModel) -> Iterator[None]:
    """Every matrix sees its input rounded to Q8_0 blocks, as in llama.cpp."""

    def round_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return torch.from_numpy(dequantize("Q8_0", quantize("Q8_0", inputs[0].numpy())))

    handles = [m.register_forward_pre_hook(round_input) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_theirs(kind: str, folder: Path) -> dict[str, Any]:
    """Let llama.cpp quantize the F32 file; hold its bytes against ours, and load its file."""
    source, path = folder / "F32.gguf", folder / f"theirs_{kind}.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings))
    if status != 0:
        return {"kind": kind, "status": status, "passed": False}
    before, after = GGUFFile(source), GGUFFile(path)
    differing = 0
    for name, info in after.tensors.items():
        values = before.raw(name).view(np.float32).reshape(info.shape)
        differing += int((quantize(info.kind, values).reshape(-1) != after.raw(name)).sum())
    wkv.load_model(path)
    kinds = {name: info.kind for name, info in after.tensors.items()}
    row = {
        "kind": kind,
        "types": dict(Counter(kinds.values())),
        "head": kinds["output.weight"],
        "embedding": kinds["token_embd.weight"],
        "bytes_compared": sum(info.size for info in after.tensors.values()),
        "bytes_differing": differing,
    }
    if kind in KINDS:
        row["types_as_ours"] = same_types(folder / f"{kind}.gguf", kinds)
    row["passed"] = differing == 0 and row.get("types_as_ours", True)
    return row


def same_types(path: Path, kinds: dict[str, str]) -> bool:
    """Whether our file has the same types, but for the head, where the default differs for plain types."""
    ours = {name: info.kind for name, info in GGUFFile(path).tensors.items()}
    return all(ours[name] == kind for name, kind in kinds.items() if name != "output.weight")


def check_vocabulary(path: Path) -> bool:
    """Whether llama.cpp reads the vocabulary as we do."""
    llama = llama_cpp.Llama(str(path), n_ctx=8, vocab_only=True, verbose=False)
    text = TEXT.encode()
    found = llama.tokenize(text, add_bos=False, special=False)
    same = found == WorldTokenizer().encode(text) and llama.detokenize(found) == text
    llama.close()
    return bool(same)


@llama_cpp.llama_log_callback
def no_log(_level: int, _text: bytes, _data: Any) -> None:
    """Takes llama.cpp's log and drops it."""


def show(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], same_ids: bool) -> None:
    """Print both tables."""
    print(f"{'written by wkv':<16}{'difference':>12}{'own error':>12}{'imitated':>12}{'cosine':>12}")
    for row in ours:
        imitated = f"{row['imitated']:.1e}" if "imitated" in row else ""
        numbers = f"{row['difference']:>12.1e}{row['own_error']:>12.1e}{imitated:>12}{row['lowest_cosine']:>12.6f}"
        print(f"{row['kind']:<16}{numbers}  {'' if row['passed'] else 'FAILED'}")
    print(f"\n{'by llama.cpp':<16}{'bytes':>12}{'differing':>12}  head, embedding")
    for row in theirs:
        if "status" in row:
            print(f"{row['kind']:<16} llama.cpp returned {row['status']}")
            continue
        place = f"{row['head']}, {row['embedding']}"
        print(f"{row['kind']:<16}{row['bytes_compared']:>12}{row['bytes_differing']:>12}  {place}")
    print(f"\nsame token ids: {same_ids}")


if __name__ == "__main__":
    main()
