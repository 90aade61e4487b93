"""The weights that all contenders read: one model with random weights (or the user's), written in each one's format."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import wkv
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.quantization.model import quantize_model
from wkv.quantization.modules import quantize_linear
from wkv.quantization.packed import Kind
from wkv.speed.contenders import LLAMA, OURS, Contender

DESCRIPTION = (
    "random: all matrices normal with standard deviation 1/sqrt(inputs), so that about half of the channel mix's "
    "squared-ReLU values are zero; trained models have more zeros"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of an RWKV-7 model; ranks are those of the released models of these sizes."""

    num_layers: int
    hidden_size: int
    vocab_size: int = 65536
    head_size: int = 64
    decay_rank: int = 64
    iclr_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128


SHAPES = {"0.1b": Shape(12, 768), "0.4b": Shape(24, 1024), "tiny": Shape(2, 256, vocab_size=4096)}


class Weights:
    """The files of one model in a folder; each is written when it is first asked for, and found again later.

    Args:
        folder: an existing folder.
        vocab_size: of the model.
        make: gives the float32 model.
    """

    def __init__(self, folder: Path, vocab_size: int, make: Callable[[], LanguageModel]) -> None:
        self.folder, self.vocab_size, self._make = folder, vocab_size, make
        self._model: LanguageModel | None = None
        self._bases: dict[str, LanguageModel] = {}

    @property
    def model(self) -> LanguageModel:
        """The model in float32."""
        if self._model is None:
            self._model = self._make()
        return self._model

    def forget(self) -> None:
        """Free the memory of the model."""
        self._model = None
        self._bases.clear()

    def path(self, contender: Contender) -> Path:
        """The file of a contender, written if it is not there.

        What llama.cpp quantises itself is only named: see `gguf_source`.
        """
        if contender.program == LLAMA:
            return self._gguf(contender.weights)
        if contender.program != OURS:
            return self._written("official.pth", lambda path: wkv.save_model(self.model, path, "official"))
        kind = contender.weights.split()[0]
        if kind in ("fp32", "bf16"):
            dtype = "float32" if kind == "fp32" else "bfloat16"
            return self._written(f"{kind}.safetensors", lambda path: wkv.save_model(self.model, path, dtype=dtype))
        weights = contender.weights.removesuffix(" mapped")  # the same file, read where it lies
        name = weights.replace(" ", "-") + ".safetensors"
        return self._written(name, lambda path: wkv.save_model(self._quantized(weights), path))

    def _quantized(self, weights: str) -> LanguageModel:
        kind, _, changed = weights.partition(" ")
        if kind not in self._bases:
            self._bases[kind] = quantize_model(self.model, bits=int(kind[3:]))
        base = copy.deepcopy(self._bases[kind]) if changed else self._bases[kind]
        result: LanguageModel = variant(base, self.model, "int8" if kind == "int8" else "int4", changed)
        return result

    def gguf_source(self) -> Path:
        """The float32 file that llama.cpp's quantiser reads."""
        return self._gguf("F32")

    def _gguf(self, weights: str) -> Path:
        name = weights.replace(" ", "-") + ".gguf"
        if weights not in ("F32", "F16"):
            return self.folder / name
        return self._written(name, lambda path: wkv.save_model(self.model, path, "gguf", quantization=weights))

    def _written(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.is_file():
            write(path)
        return path


def shape_weights(name: str, cache: Path, seed: int) -> Weights:
    """The files of a shape under `cache`.

    Raises:
        WkvError: for an unknown shape.
    """
    if name not in SHAPES:
        raise WkvError(f"shape {name!r} is unknown; one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    return Weights(
        _folder(cache, f"{name}-seed{seed}-{wkv.__version__}"), shape.vocab_size, lambda: random_model(shape, seed)
    )


def model_weights(source: Path, cache: Path) -> Weights:
    """The files of the user's own model under `cache`; a changed file gets a new folder.

    Raises:
        WkvError: if the file cannot be loaded or is not an RWKV-7 model.
    """
    from wkv.checkpoints import inspect

    found = inspect(source)
    if not found.loadable or found.model != "rwkv7":
        raise WkvError(f"{source}: wkv bench compares RWKV-7 models; this is: {found.verdict}")
    facts = source.stat()
    key = hashlib.sha256(f"{source.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:12]
    vocabulary = int(found.config["vocab_size"])
    return Weights(_folder(cache, f"{source.stem}-{key}-{wkv.__version__}"), vocabulary, lambda: _own_model(source))


def _own_model(source: Path) -> LanguageModel:
    model = wkv.load_model(source, dtype="float32").eval()
    model.tuned_state = None
    return model


def _folder(cache: Path, name: str) -> Path:
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def random_model(shape: Shape, seed: int) -> LanguageModel:
    """A model of a shape; see `DESCRIPTION` for its weights."""
    torch.manual_seed(seed)
    model: LanguageModel = wkv.create_model("rwkv7", **asdict(shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.squeeze().ndim == 2 and not name.endswith("r_k"):
                # nn.Linear has [outputs, inputs], the low-rank maps [inputs, outputs].
                inputs = parameter.shape[-1 if name.endswith("weight") else 0]
                parameter.normal_(std=inputs**-0.5)
    return model.eval()


def variant(quantized: Any, source: LanguageModel, kind: Kind, name: str) -> Any:
    """`quantized` with some layers made anew from `source`; it is changed in place.

    Args:
        name: "tiled" for value matrices in the order without skipping, "head" for the head in the body's type.
    """
    if name == "head":
        quantized.head = quantize_linear(source.head, kind)
    if name == "tiled":
        for to, block in zip(quantized.blocks, source.blocks, strict=True):
            to.ffn.value = quantize_linear(block.ffn.value, kind)
    return quantized


# ---- what is read per token ----


def unread(name: str) -> bool:
    """Whether decoding does not read this tensor as a whole: the embedding, and the first layer's value residual."""
    return name.startswith("emb.") or name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


def bytes_per_token(model: LanguageModel) -> int:
    """Bytes of weights that reading one token touches, were nothing skipped."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    table = [tensor for name, tensor in tensors.items() if name.startswith("emb.")]
    row = sum(tensor[0].nbytes for tensor in table)
    return row + sum(tensor.nbytes for name, tensor in tensors.items() if not unread(name))


def gguf_bytes(path: Path) -> int:
    """The same of a GGUF file; its embedding is counted as one row."""
    from wkv.checkpoints.gguf_file import GGUFFile
    from wkv.checkpoints.gguf_names import UNUSED

    tensors = GGUFFile(path).tensors
    embedding = tensors["token_embd.weight"]
    skipped = {"token_embd.weight", *UNUSED["rwkv7"]}
    read = sum(info.size for name, info in tensors.items() if name not in skipped)
    return read + embedding.size // embedding.shape[0]
