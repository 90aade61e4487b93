"""One model in one program, told to read tokens. Each runs in a process of its own, with the program's own defaults."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
from typing import Any, Protocol


class Runner(Protocol):
    """What a worker times. `facts` may say what the model is and how much of it one token reads."""

    facts: dict[str, Any]

    def set_threads(self, threads: int) -> None:
        """Use as many threads from now on."""

    def start(self) -> None:
        """Forget everything read."""

    def read(self, tokens: list[int]) -> None:
        """Read tokens and compute the logits of the last one."""

    def logits(self, count: int) -> list[float]:
        """The first `count` of the logits that `read` computed last."""


class OurRunner:
    """wkv on its native kernels.

    Args:
        path: a file of `files.Weights`.
        mapped: leave the weights in the mapped file; else they are moved to large pages, as `wkv generate` does.
    """

    def __init__(self, path: str, mapped: bool = False) -> None:
        import torch

        import wkv
        from wkv.inference.huge_pages import use_huge_pages
        from wkv.inference.native_rwkv7 import NativeRWKV7

        self._torch = torch
        model = wkv.load_model(path)
        moved = 0 if mapped else use_huge_pages(model)
        self._native = NativeRWKV7(model)
        self._state: Any = None
        self._logits: Any = None
        self._one = torch.zeros(1, 1, dtype=torch.int64)
        self.facts = {"version": wkv.__version__, "moved_to_large_pages": moved, **self._bytes(model)}

    def set_threads(self, threads: int) -> None:
        """See `Runner`."""
        self._torch.set_num_threads(threads)

    def start(self) -> None:
        """See `Runner`."""
        self._state = None

    def read(self, tokens: list[int]) -> None:
        """See `Runner`."""
        if len(tokens) == 1:
            self._one[0, 0] = tokens[0]
            ids = self._one
        else:
            ids = self._torch.tensor([tokens])
        self._logits, self._state = self._native.read(ids, self._state, inplace=True)

    def logits(self, count: int) -> list[float]:
        """See `Runner`."""
        found: list[float] = self._logits[0, :count].tolist()
        return found

    def _bytes(self, model: Any) -> dict[str, Any]:
        """Bytes that a token reads; rows of value matrices that are skipped count only in `bytes_stored`."""
        from wkv.quantization.modules import QuantizedLinear
        from wkv.speed.files import bytes_per_token

        stored = bytes_per_token(model)
        sparse = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear) and layer.sparse]
        if not sparse:
            return {"bytes_stored": stored, "bytes_read": stored}
        for token in range(32):
            self.read([token])
        share = self._native.skipped_share
        # The scales of int4, a ninth of the bytes, are read all the same.
        skippable = sum(layer.data.nbytes * (8 / 9 if layer.kind == "int4" else 1) for layer in sparse)
        return {"bytes_stored": stored, "bytes_read": round(stored - share * skippable), "skipped_share": share}


class RwkvRunner:
    """The `rwkv` package's own forward functions.

    Args:
        path: an official .pth file.
        weights: "fp32" or "bf16".
    """

    def __init__(self, path: str, weights: str) -> None:
        os.environ["RWKV_V7_ON"] = "1"  # how that package is told the version
        import torch

        package = importlib.import_module("rwkv.model")
        self._torch = torch
        self._model = package.RWKV(model=path.removesuffix(".pth"), strategy=f"cpu {weights}")
        self._state: Any = None
        self._logits: Any = None
        weights_read = [x for name, x in self._model.z.items() if not name.startswith("emb.")]
        size = sum(x.nbytes for x in weights_read) + self._model.z["emb.weight"][0].nbytes
        self.facts = {
            "version": importlib.metadata.version("rwkv"), "torch": torch.__version__,
            "bytes_stored": size, "bytes_read": size,
        }  # fmt: skip

    def set_threads(self, threads: int) -> None:
        """See `Runner`."""
        self._torch.set_num_threads(threads)

    def start(self) -> None:
        """See `Runner`."""
        self._state = None

    def read(self, tokens: list[int]) -> None:
        """See `Runner`."""
        self._logits, self._state = self._model.forward(tokens, self._state)

    def logits(self, count: int) -> list[float]:
        """See `Runner`."""
        found: list[float] = self._logits[:count].float().tolist()
        return found


class LlamaRunner:
    """llama.cpp through the C interface that llama-cpp-python passes on.

    Args:
        path: a GGUF file.
        batch: the most tokens read at a time.
    """

    def __init__(self, path: str, batch: int) -> None:
        self._lib: Any = importlib.import_module("llama_cpp")
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(path.encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {os.path.basename(path)}")
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = 8192
        settings.n_batch = settings.n_ubatch = batch
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._logits: Any = None
        self.facts = {
            "version": self._lib.__version__,
            "system": self._lib.llama_print_system_info().decode().strip(),
        }

    def set_threads(self, threads: int) -> None:
        """See `Runner`."""
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def start(self) -> None:
        """See `Runner`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def read(self, tokens: list[int]) -> None:
        """See `Runner`."""
        ids = (self._lib.llama_token * len(tokens))(*tokens)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._logits = self._lib.llama_get_logits_ith(self._context, -1)  # waits for the result

    def logits(self, count: int) -> list[float]:
        """See `Runner`."""
        found: list[float] = self._logits[:count]
        return found


def llama_quantize(source: str, target: str, weights: str, threads: int) -> None:
    """Let llama.cpp quantise a GGUF file, as its own command does.

    Args:
        source: a float32 GGUF file.
        target: the file to write.
        weights: a type such as "Q4_0"; " head" behind it gives the head that type too.
        threads: how many to use.
    """
    library: Any = importlib.import_module("llama_cpp")
    kind, _, head = weights.partition(" ")
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = threads
    settings.pure = bool(head)
    temporary = f"{target}.part"
    status = library.llama_model_quantize(source.encode(), temporary.encode(), ctypes.byref(settings))
    if status != 0:
        raise RuntimeError(f"llama.cpp's quantiser returned {status}")
    os.replace(temporary, target)
