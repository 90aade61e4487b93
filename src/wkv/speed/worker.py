"""A process that runs one contender: requests come as lines of JSON on standard input, answers go to standard output.

A process of its own keeps the thread pools of different programs apart. While it is not its turn it waits in a read.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from wkv.speed.runners import LlamaRunner, OurRunner, Runner, RwkvRunner, llama_quantize

WARM_UP = 3  # tokens
MOST_TOKENS = 4000  # in one turn


class Session:
    """What one worker knows."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.memory: Any = None

    def load(self, program: str, path: str, weights: str, batch: int, native: str | None) -> dict[str, Any]:
        """Load a model; the answer says what it is."""
        if native is not None:
            use_native(native)
        if program == "wkv":
            self.runner = OurRunner(path, mapped=weights.endswith(" mapped"))
        else:
            self.runner = RwkvRunner(path, weights) if program == "rwkv" else LlamaRunner(path, batch)
        return self.runner.facts

    def quantize(self, source: str, target: str, weights: str, threads: int) -> dict[str, Any]:
        """Write a GGUF file with llama.cpp's quantiser."""
        llama_quantize(source, target, weights, threads)
        return {}

    def decode(self, tokens: list[int], threads: int, seconds: float, count: int) -> dict[str, Any]:
        """Median milliseconds per token over at least `count` tokens and `seconds`."""
        runner = self._ready(threads)
        for token in tokens[:WARM_UP]:
            runner.read([token])
        times: list[float] = []
        total = 0.0
        while (total < seconds or len(times) < count) and len(times) < MOST_TOKENS:
            times.append(timed(runner.read, [tokens[len(times) % len(tokens)]]))
            total += times[-1]
        return {"ms": statistics.median(times) * 1e3, "fastest_ms": min(times) * 1e3, "tokens": len(times)}

    def prefill(self, tokens: list[int], threads: int, seconds: float) -> dict[str, Any]:
        """Median seconds to read all tokens at once, over as many readings as fit into `seconds`, at least one."""
        runner = self._ready(threads)
        times: list[float] = []
        while not times or sum(times) + min(times) < seconds:
            runner.start()
            times.append(timed(runner.read, tokens))
        return {"seconds": statistics.median(times), "readings": len(times)}

    def logits(self, tokens: list[int], threads: int, count: int) -> dict[str, Any]:
        """The first logits after all tokens, to see that all contenders compute the same; also a warm-up."""
        runner = self._ready(threads)
        runner.read(tokens)
        return {"logits": runner.logits(count)}

    def bandwidth(self, threads: int, passes: int, size: int | None, native: str | None) -> dict[str, Any]:
        """Bytes per second of reading memory, best and median, in pages of 2 MiB and of the usual size."""
        from wkv.speed.bandwidth import buffer, read_seconds

        if native is not None and self.memory is None:
            use_native(native)
        if self.memory is None:
            self.memory = {"huge_pages": buffer(size, huge_pages=True), "usual_pages": buffer(size)}
        found: dict[str, Any] = {}
        for name, memory in self.memory.items():
            count, times = memory.numel(), read_seconds(memory, threads, passes)
            found[name] = {"best": count / min(times), "median": count / statistics.median(times)}
        return {"best": max(pages["best"] for pages in found.values()), "bytes": count, **found}

    def _ready(self, threads: int) -> Runner:
        if self.runner is None:
            raise RuntimeError("no model is loaded")
        self.runner.set_threads(threads)
        self.runner.start()
        return self.runner


def use_native(path: str) -> None:
    """Use a native library other than the installed one."""
    from wkv import native

    native.load(path)


def timed(function: Callable[[list[int]], None], tokens: list[int]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function(tokens)
    return time.perf_counter() - started


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests {"do": name, ...} until there are no more."""
    session = Session()
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "load": session.load, "quantize": session.quantize, "decode": session.decode,
        "prefill": session.prefill, "logits": session.logits, "bandwidth": session.bandwidth,
    }  # fmt: skip
    for line in requests:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("do")](**request)
        except Exception as error:  # whatever another program raises becomes one line for the parent
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[-1]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve on the pipes that the parent made; what programs print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
