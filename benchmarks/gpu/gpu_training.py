"""A whole training step of RWKV-7: forward, loss, backward and AdamW, with bfloat16 autocast, as `wkv train` does it.

The contenders are one and the same model and optimiser; only what computes WKV-7 differs: our kernel, that of the
`fla-core` package, plugged in as a backend for the time of its turn, or plain torch. "ours, fused stages" is our kernel
with the elementwise stages around it in Triton, too (`wkv.ops.gpu.stages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from gpu_models import TINY, random_model
from gpu_operators import fla, ours, plain
from gpu_timing import Budget, Device, Row, Save, halved, reason_of, turns
from torch import Tensor

from wkv.layers.language_model import LanguageModel
from wkv.ops import dispatch, gpu, use_backend
from wkv.ops.gpu import stages
from wkv.training import create_optimizer, head_loss

# Layers, width -> batch, length; small batches of the large model keep the torch form within the memory.
SIZES = {(12, 768): (8, 2048), (24, 2048): (4, 2048)}
FUSED = "ours, fused stages"
BYTES_PER_TOKEN_LAYER_CHANNEL = 250  # of activations with the torch form: a guess, made with no GPU at hand


@contextmanager
def plugged(function: Callable[..., Any]) -> Iterator[None]:
    """Inside the `with` block `function` is the "triton" backend of wkv7, and forced."""
    table = dispatch._operators["wkv7"]
    before = table.get("triton")
    dispatch.register("wkv7", dispatch.Backend("triton", function))
    try:
        with use_backend("triton"):
            yield
    finally:
        del table["triton"]
        if before is not None:
            dispatch.register("wkv7", before)


@contextmanager
def fused(backend: str) -> Iterator[None]:
    """Inside the `with` block `backend` runs, and the stages around it are fused."""
    with use_backend(backend), stages.fused():
        yield


def fla_backend(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *others: Any) -> Any:
    """fla's operator with the arguments of our backends, for sequences without state, mask and reset.

    Everything is bfloat16, as in fla's own models, and no final state is made.
    """
    state, mask, reset = others
    assert mask is None
    assert reset is None
    named = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    y = fla("wkv7")({name: x.to(torch.bfloat16) for name, x in named.items()})
    return y.to(v.dtype), state


def contexts(device: Device) -> tuple[dict[str, Callable[[], AbstractContextManager[Any]]], dict[str, str]]:
    """What is put around a step of each contender; and who does not take part, with the reason."""
    ours_, torch_ = ours("wkv7", device), plain("wkv7", device)
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {"ours": lambda: use_backend(ours_)}
    skipped = {}
    if (reason := gpu.unusable(device.torch)) is None:
        found[FUSED] = lambda: fused(ours_)
    else:
        skipped[FUSED] = reason
    try:
        if not device.is_gpu:
            raise LookupError("fla runs on GPUs only")
        fla("wkv7")
        found["fla"] = lambda: plugged(fla_backend)
    except Exception as error:  # an import of a foreign library may raise anything
        skipped["fla"] = str(error) if isinstance(error, ImportError | LookupError) else reason_of(error)
    found["torch"] = lambda: use_backend(torch_)
    return found, skipped


def measure(device: Device, budget: Budget, save: Save) -> Row:
    """Every size."""
    rows: Row = {}
    for (layers, width), (batch, length) in ({(2, 32): (2, 16)} if device.quick else SIZES).items():
        name = f"{layers}x{width}"
        if budget.left() == 0:
            rows[name] = {"skipped": "no time left"}
            continue
        rows[name] = measure_size(layers, width, batch, length, device, budget)
        save(rows)
        device.clear()
    return rows


def measure_size(layers: int, width: int, batch: int, length: int, device: Device, budget: Budget) -> Row:
    """Steps of all contenders in turns."""
    sizes = TINY if device.quick else {"vocab_size": 65536, "head_size": 64}
    sizes = {**sizes, "num_layers": layers, "hidden_size": width}
    model = random_model(device.torch, torch.float32, **sizes).train()
    optimizer = create_optimizer(model, 1e-5, weight_decay=0.1)
    free = device.free_bytes() - 16 * sum(x.numel() for x in model.parameters())
    batch = halved(batch, BYTES_PER_TOKEN_LAYER_CHANNEL * length * layers * width, free)
    tokens = torch.randint(1, sizes["vocab_size"], (batch, length + 1), device=device.torch)
    around, skipped = contexts(device)
    found: Row = {"parameters": sum(x.numel() for x in model.parameters()), "batch": batch, "length": length}
    found |= {
        "skipped": skipped,
        "backends": {"ours": ours("wkv7", device), "torch": plain("wkv7", device)},
    }
    losses: Row = {}
    for name, context in around.items():
        try:
            with torch.no_grad(), context():
                losses[name] = float(loss_of(model, tokens, device))
        except Exception as error:  # dropped with the reason when its time would be taken
            losses[name] = reason_of(error)

    def step(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], object]:
        def call() -> None:
            with context():
                loss = loss_of(model, tokens, device)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()

        return call

    times = turns(device, {name: step(context) for name, context in around.items()}, budget)
    processed = batch * length
    rates = {name: processed / (ms["median"] / 1e3) for name, ms in times["ms"].items()}
    return found | {"first_loss": losses, "tokens_per_second": rates, **times}


def loss_of(model: LanguageModel, tokens: Tensor, device: Device) -> Tensor:
    """Of tokens [B, T + 1]."""
    with device.autocast():
        hidden, _ = model.forward_features(tokens[:, :-1])
        return head_loss(hidden, model.head, tokens[:, 1:])
