"""Time, memory and progress: what all parts of run.py measure with. Contenders take turns; ratios are within a turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

Row = dict[str, Any]
Call = Callable[[], object]
Save = Callable[[Row], None]

ROUNDS = 7
LEAST_ROUNDS = 5
TURN_SECONDS = 0.06  # of a contender in a round; as many calls as fit, at most MOST_CALLS
MOST_CALLS = 50


class Budget:
    """Seconds that a part may take.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, 0 when they are used up."""
        return max(0.0, self._end - time.monotonic())

    def part(self, seconds: float) -> Budget:
        """At most `seconds`, and what is left."""
        return Budget(min(seconds, self.left()))


class Device:
    """Where everything runs. On a CPU times are of the wall clock, on a GPU between CUDA events.

    Args:
        name: "cuda" or "cpu".
        quick: tiny shapes and few rounds.
        backend: which backend stands for us; None is Triton's on a GPU, and what would run on a CPU.
    """

    def __init__(self, name: str, quick: bool, backend: str | None = None) -> None:
        self.torch, self.quick, self.backend = torch.device(name), quick, backend
        self.is_gpu = self.torch.type == "cuda"
        self.rounds, self.calls = (2, 1) if quick else (ROUNDS, 8)

    def milliseconds(self, call: Call, count: int = 1) -> float:
        """Of one of `count` calls in a row."""
        if not self.is_gpu:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) * 1e3 / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(count):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / count

    def free_bytes(self) -> int:
        """Memory that may be used, what torch keeps for later included."""
        if not self.is_gpu:
            return 2**30
        self.clear()
        return torch.cuda.mem_get_info()[0]

    def clear(self) -> None:
        """Give back memory of the GPU that nothing uses."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def peak_bytes(self, call: Call) -> int | None:
        """Peak memory allocated during a call; None on a CPU."""
        if not self.is_gpu:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def autocast(self, on: bool = True) -> Any:
        """bfloat16 for matrix products."""
        return torch.autocast(self.torch.type, torch.bfloat16) if on else nullcontext()


def halved(batch: int, bytes_per_row: float, free: int) -> int:
    """The batch, halved until it fits."""
    while batch > 1 and batch * bytes_per_row > free:
        batch //= 2
    return batch


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def turns(device: Device, contenders: dict[str, Call], budget: Budget, base: str = "ours") -> Row:
    """Time the contenders in turns; every round begins with another one.

    Returns:
        `ms` of each, `ratios`: time of a contender over that of `base` in the same round, `dropped` with reasons.
    """
    running, dropped = dict(contenders), {}
    counts = {}
    for name, call in contenders.items():
        try:
            call()  # compiles
            once = device.milliseconds(call) / 1e3
            counts[name] = max(1, min(MOST_CALLS, int(TURN_SECONDS / max(once, 1e-9)))) if not device.quick else 1
        except Exception as error:  # whatever a foreign library raises
            del running[name]
            dropped[name] = reason_of(error)
            device.clear()
    rounds: list[dict[str, float]] = []
    for number in range(device.rounds):
        if len(rounds) >= (1 if device.quick else LEAST_ROUNDS) and budget.left() == 0:
            break
        names = list(running)
        turn = number % max(1, len(names))
        rounds.append({name: device.milliseconds(running[name], counts[name]) for name in names[turn:] + names[:turn]})
    found: Row = {"ms": {name: spread([row[name] for row in rounds]) for name in running}, "rounds": len(rounds)}
    if base in running:
        peers = [name for name in running if name != base]
        found["ratios"] = {name: spread([row[name] / row[base] for row in rounds]) for name in peers}
    found["calls_per_turn"] = {name: counts[name] for name in running}
    return found | ({"dropped": dropped} if dropped else {})


def reason_of(error: BaseException) -> str:
    """In one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def limits(device: Device) -> Row:
    """The device's own limits: bytes per second of a copy (read and written), and FLOPs per second of a product."""
    size = 2**24 if device.quick or not device.is_gpu else min(2**31, device.free_bytes() // 4)
    side = 256 if device.quick else 8192
    copies, products = copy_times(device, size), product_times(device, side)
    return {
        "copy_bytes": size,
        "copy_ms": spread(copies),
        "bytes_per_second": 2 * size / (statistics.median(copies) / 1e3),
        "product_side": side,
        "product_ms": spread(products),
        "flops_per_second": 2 * side**3 / (statistics.median(products) / 1e3),
    }


def copy_times(device: Device, size: int) -> list[float]:
    """Milliseconds of copies of `size` random bytes within the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device.torch).random_(0, 256)
    target = torch.empty_like(source)
    target.copy_(source)
    return [device.milliseconds(lambda: target.copy_(source), device.calls) for _ in range(device.rounds)]


def product_times(device: Device, side: int) -> list[float]:
    """Milliseconds of products of two random bfloat16 matrices."""
    a, b = torch.randn(2, side, side, device=device.torch).to(torch.bfloat16)
    out = torch.mm(a, b)
    return [device.milliseconds(lambda: torch.mm(a, b, out=out), device.calls) for _ in range(device.rounds)]
