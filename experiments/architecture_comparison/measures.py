"""Speed and memory: training steps of all contenders in alternating turns, and peaks of processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import LLAMA, MODEL_SIZE, NAMES, Contender, Size, build
from torch import Tensor

from wkv.training import head_loss

TURN_SECONDS = 1.0
SCRIPT = Path(__file__).resolve().parent / "run.py"


def step(contender: Contender, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Forward, loss, backward and update on tokens [B, T + 1]."""
    optimizer.zero_grad()
    head_loss(contender.hidden(tokens[:, :-1]), contender.head, tokens[:, 1:], l2wrap=0).backward()
    optimizer.step()


def random_tokens(size: Size, rows: int, length: int) -> Tensor:
    """Tokens [rows, length + 1] from a seed of their own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, size.vocabulary, (rows, length + 1), generator=generator)


# ---- speed ----


def speed(size: Size, length: int, tokens_per_step: int, rounds: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of training steps at T = `length`; in every round each contender has one turn of a second.

    Returns:
        per contender the median, lowest and highest rate over rounds, the median over rounds of its ratio to
        `MODEL_SIZE` in the same round, and the ratio of the two medians.
    """
    contenders = [build(name, size, seed=0) for name in NAMES]
    optimizers = {each.name: each.optimizer(1e-4) for each in contenders}
    tokens = random_tokens(size, max(1, tokens_per_step // length), length)
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        show(f"speed at T={length}: round {number} of {rounds}")
        turn = number % len(contenders)
        for each in contenders[turn:] + contenders[:turn]:
            rate = _turn(each, optimizers[each.name], tokens)
            if number:  # the first round warms up
                rates[each.name].append(rate)
    return {name: _summary(rates[name], rates[MODEL_SIZE]) for name in NAMES}


def _turn(contender: Contender, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < TURN_SECONDS:
        step(contender, optimizer, tokens)
        count += 1
    return count * tokens[:, 1:].numel() / (time.perf_counter() - start)


def _summary(rates: list[float], reference: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(rates)),
        "lowest": round(min(rates)),
        "highest": round(max(rates)),
        "ratio": round(statistics.median(a / b for a, b in zip(rates, reference, strict=True)), 3),
        "ratio_of_medians": round(statistics.median(rates) / statistics.median(reference), 3),
    }


# ---- memory ----


def peak_bytes() -> int:
    """Largest resident memory of this process so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def training_peak(name: str, size: Size, length: int) -> None:
    """Print, as JSON, what a training step with one row of `length` tokens adds to the peak after one with 8 tokens."""
    contender = build(name, size, seed=0)
    optimizer = contender.optimizer(1e-4)
    step(contender, optimizer, random_tokens(size, 1, 8))
    before = peak_bytes()
    step(contender, optimizer, random_tokens(size, 1, length))
    print(json.dumps({"before": before, "added": peak_bytes() - before}))


def training_memory(name: str, length: int, repeats: int, arguments: list[str]) -> dict[str, Any]:
    """`training_peak` in processes of its own: the median of what was added, and all of it, in bytes."""
    command = [sys.executable, str(SCRIPT), *arguments, "--peak", name, str(length)]
    runs = []
    for _ in range(repeats):
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    added = [run["added"] for run in runs]
    return {"added": round(statistics.median(added)), "all": added, "before": [run["before"] for run in runs]}


@torch.inference_mode()
def generation_memory(size: Size, lengths: tuple[int, ...], measured: tuple[int, ...]) -> dict[str, Any]:
    """Bytes kept per sequence after T tokens, by name and T; Llama's are checked against real caches at `measured`."""
    contenders = [build(name, size, seed=0) for name in NAMES]
    kept = {each.name: {str(length): each.memory_bytes(length) for length in lengths} for each in contenders}
    llama = next(each for each in contenders if each.name == LLAMA)
    for length in measured:
        cache = llama.model(input_ids=random_tokens(size, 1, length)[:, :-1], use_cache=True)[1]
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if real != llama.memory_bytes(length):
            sys.exit(f"Llama's cache holds {real} bytes at T={length}, computed were {llama.memory_bytes(length)}")
    return {"bytes": kept, "caches_measured_at": list(measured)}
