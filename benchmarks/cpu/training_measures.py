"""The three measurements of training.py. Whatever is compared takes turns in one process; ratios are within a turn."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from training_contenders import HEAD_SIZE, Contender, Size

from wkv.ops import wkv7

TURN_SECONDS = 0.5  # a turn has as many steps as fit, at most MOST_STEPS
MOST_STEPS = 10
LONG = 4096  # from here on the warm-up has shorter sequences
LISTED = 15  # operators of a profile
Row = dict[str, Any]
Watch = Callable[[str], None]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---- share of the operator in a step ----


def share(contender: Contender, size: Size, tokens: Tensor, rounds: int, watch: Watch) -> Row:
    """How much of a whole step WKV-7 forward and backward take, by two independent ways.

    Returns:
        `alone`: the operator by itself at the model's shapes, once per layer, over a step of the same round;
        `profiler`: self CPU time of the native operators over that of everything, Python between operators included.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    operator = operator_turn(size, rows, length)
    watch("warm-up")
    contender.step(tokens)
    operator()
    steps, operators = [], []
    for number in range(rounds):
        watch(f"round {number + 1} of {rounds}")
        steps.append(contender.timed(tokens))
        start = time.perf_counter()
        operator()
        operators.append(time.perf_counter() - start)
    watch("profiler")
    return {
        "tokens_per_step": rows * length,
        "parameters": contender.parameters,
        "step_seconds": spread(steps),
        "operator_seconds": spread(operators),
        "alone": spread([part / whole for part, whole in zip(operators, steps, strict=True)]),
        "profiler": profiled(contender, tokens),
        "rounds": rounds,
    }


def operator_turn(size: Size, rows: int, length: int) -> Callable[[], None]:
    """Forward and backward of WKV-7 for all layers of a model, on inputs as a model makes them."""
    shape = (rows, length, size.width // HEAD_SIZE, HEAD_SIZE)
    r, q, k, v, kk, iclr, dy = (torch.randn(shape) for _ in range(7))
    kk = F.normalize(kk, dim=-1)
    inputs = [r, -0.6065 * torch.sigmoid(q), k, v, -kk, kk * torch.sigmoid(iclr)]
    inputs = [x.requires_grad_() for x in inputs]
    r, log_w, k, v, a, b = inputs
    state = torch.zeros(rows, shape[2], HEAD_SIZE, HEAD_SIZE)

    def turn() -> None:
        for _ in range(size.layers):
            y, _ = wkv7(r, log_w, k, v, a, b, state)
            torch.autograd.grad(y, inputs, dy)

    return turn


def profiled(contender: Contender, tokens: Tensor) -> Row:
    """One step under torch's profiler: the operator's share, and what else the time goes to."""
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("python between operators"):
        contender.step(tokens)
    times = {event.key: event.self_cpu_time_total / 1e3 for event in found.key_averages()}
    whole = sum(times.values())
    # The forward kernel runs inside the autograd function that torch makes for the operator.
    native = {name: ms for name, ms in times.items() if "wkv7_native" in name}
    largest = sorted(times.items(), key=lambda item: -item[1])[:LISTED]
    return {
        "share": sum(native.values()) / whole,
        "native_ms": {name: round(ms, 2) for name, ms in native.items()},
        "whole_ms": round(whole, 2),
        "largest_ms": {name: round(ms, 2) for name, ms in largest},
    }


# ---- ours against a peer ----


def pairs(our: Contender, peer: Contender, tokens: Tensor, count: int, watch: Watch) -> Row:
    """Whole steps of two contenders in alternating turns.

    Returns:
        tokens per second of both, and `ratio` (ours over theirs) as median, min and max over pairs.
    """
    both = (our, peer)
    processed = tokens.shape[0] * (tokens.shape[1] - 1)
    watch("warm-up")
    part = 8 if tokens.shape[1] > LONG else 1  # of the sequence: enough to have everything in place
    warm = {x.name: part * x.timed(tokens[:, : tokens.shape[1] // part]) for x in both}
    steps = {name: min(MOST_STEPS, math.ceil(TURN_SECONDS / seconds)) for name, seconds in warm.items()}
    turns = []
    for number in range(count):
        watch(f"pair {number + 1} of {count}")
        order = both if number % 2 == 0 else both[::-1]
        turns.append({x.name: x.timed(tokens, steps[x.name]) for x in order})
    return {
        "contenders": {
            x.name: {
                "parameters": x.parameters,
                "tokens_per_second": spread([processed / turn[x.name] for turn in turns]),
            }
            for x in both
        },
        "ratio": spread([turn[peer.name] / turn[our.name] for turn in turns]),
        "seconds_per_step": turns,
        "steps_per_turn": steps,
        "tokens_per_step": processed,
    }


# ---- time against length ----


def peak_megabytes() -> float:
    """Peak resident memory of this process so far, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def slope_round(contender: Contender, batches: dict[int, Tensor], number: int, watch: Watch) -> Row:
    """Every length once; the first round, a warm-up, goes upwards, so that the peak so far is that of the length."""
    lengths = sorted(batches)
    turn = number % len(lengths)
    seconds, peaks = {}, {}
    for length in lengths[turn:] + lengths[:turn]:
        watch(f"T={length}")
        steps = 1 if number == 0 else max(1, 2048 // length)
        seconds[str(length)] = contender.timed(batches[length], steps)
        peaks[str(length)] = peak_megabytes()
    return {"seconds": seconds, "peak_rss_mb": peaks} if number == 0 else {"seconds": seconds}


def slope_summary(rounds: Sequence[Row]) -> Row:
    """The slope of log time against log length by least squares: of the medians, and of every round."""
    warm, timed = rounds[0], rounds[1:]
    lengths = list(warm["seconds"])
    medians = {length: statistics.median(row["seconds"][length] for row in timed) for length in lengths}
    return {
        "seconds": medians,
        "tokens_per_second": {length: int(length) / value for length, value in medians.items()},
        "peak_rss_mb": warm["peak_rss_mb"],
        "slope": fit(medians),
        "slope_of_rounds": spread([fit(row["seconds"]) for row in timed]),
    }


def fit(seconds: dict[str, float]) -> float:
    """Least-squares slope in log-log of length -> seconds."""
    result = statistics.linear_regression([math.log(int(x)) for x in seconds], [math.log(y) for y in seconds.values()])
    return float(result.slope)
