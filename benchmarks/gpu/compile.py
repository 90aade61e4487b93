"""Compile every Triton kernel for NVIDIA GPUs, without one, and list registers, spills, shared memory and time.

    python benchmarks/gpu/compile.py                          # every operator, head sizes 64 and 128, all input types
    python benchmarks/gpu/compile.py --operators wkv7 --sizes 64 --types bfloat16 --capability 80

Triton's own ptxas makes machine code for compute capability 8.0 (A100) or 9.0 (H100, H200). A kernel that needs more
shared memory than the GPU has fails here as it would there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wkv.ops import gpu
from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program can have
LENGTH = 160  # several chunks of every kernel
FEW = 4


def tokens(size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """`count` inputs [2, T, 2, N] with gradients."""
    return [torch.randn(2, LENGTH, 2, size, dtype=dtype, requires_grad=True) for _ in range(count)]


def flags() -> tuple[Tensor, Tensor]:
    """A mask and a reset."""
    return torch.ones(2, LENGTH, dtype=torch.bool), torch.zeros(2, LENGTH, dtype=torch.bool)


def matrix_state(size: int) -> Tensor:
    """[B, H, N, N]"""
    return torch.randn(2, 2, size, size, requires_grad=True)


def wkv7(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator's backends."""
    r, k, v, a, b = tokens(size, dtype, 5)
    log_w = (-torch.rand(r.shape)).requires_grad_()
    return r, log_w, k, v, a, b, matrix_state(size), *flags()


def wkv6(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator's backends."""
    r, k, v = tokens(size, dtype, 3)
    log_w, u = (-torch.rand(r.shape)).requires_grad_(), torch.randn(2, size, requires_grad=True)
    return r, log_w, k, v, u, matrix_state(size), *flags()


def wkv5(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator's backends."""
    r, _, k, v, u, *others = wkv6(size, dtype)
    return r, (-torch.rand(2, size)).requires_grad_(), k, v, u, *others


def wkv4(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator's backends, for 2 `size` channels."""
    k, v = (x.detach().flatten(2).requires_grad_() for x in tokens(size, dtype, 2))
    log_w, u = (-torch.rand(2 * size)).requires_grad_(), torch.randn(2 * size, requires_grad=True)
    return log_w, u, k, v, tuple(torch.randn(2, 2 * size, requires_grad=True) for _ in range(3)), *flags()


def bi_wkv(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator's backends, for 2 `size` channels."""
    log_w, u, k, v, _, mask, _ = wkv4(size, dtype)
    return log_w, u, k, v, mask


def taylor_attention(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator's backends, for queries of 16."""
    (q, k), [v] = tokens(16, dtype, 2), tokens(size, dtype, 1)
    state = torch.randn(2, 2, size, 153, requires_grad=True), torch.randn(2, 2, 153, requires_grad=True)
    return q, k, v, state, 0.25, 1e-6, *flags()


def stages(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Tokens [2, T, 2, N] and vectors [2 N], for `run_stages`."""
    return tokens(size, dtype, 4), [torch.randn(2 * size, requires_grad=True) for _ in range(6)]


def run_stages(rows: list[Tensor], vectors: list[Tensor]) -> list[Any]:
    """What `wkv.ops.gpu.stages` has, in place of an operator."""
    from wkv.ops.gpu import stages

    size, (flat, other, *_) = rows[0].shape[-1], [x.flatten(2) for x in rows]
    mixed = stages.mix(flat, other, vectors)
    made = stages.keys(flat, other, *vectors[:2], size)
    return [mixed, made, stages.reading(*rows, flat, vectors[0].view(-1, size), *vectors[1:3], 64e-5)]


def packed(size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs of one token and of several, for `run_packed`."""
    return torch.randn(1, 16 * size, dtype=dtype), torch.randn(2, 16 * size, dtype=dtype)


def run_packed(*inputs: Tensor) -> list[Tensor]:
    """Products with every kind of quantised weights, in place of an operator."""
    from wkv.ops.gpu.packed import product
    from wkv.quantization.packed import quantize

    weight = torch.randn(64, inputs[0].shape[-1])
    kinds = [quantize(weight, *kind) for kind in KINDS]
    return [product(x, w.data, w.scale, w.bits, w.sparse, 64) for w in kinds for x in inputs]


KINDS: tuple[tuple[Any, bool], ...] = (
    ("int8", False),
    ("int8", True),
    ("int6", False),
    ("int4", False),
    ("int4", True),
)
# What is no operator of its own.
OTHERS = {"stages": run_stages, "packed": run_packed}
# Operator -> (module of its kernels, arguments).
OPERATORS: dict[str, tuple[str, Callable[[int, torch.dtype], tuple[Any, ...]]]] = {
    "wkv7": ("wkv7", wkv7),
    "wkv6": ("linear", wkv6),
    "wkv5": ("linear", wkv5),
    "wkv4": ("wkv4", wkv4),
    "bi_wkv": ("bi_wkv", bi_wkv),
    "taylor_attention": ("taylor", taylor_attention),
    "stages": ("stages", stages),
    "packed": ("packed", packed),
}


class Target:
    """Stands in for a driver: says for which GPU code is made."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        """For Triton."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """For Triton."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """For Triton."""
        return 0


class Compiler:
    """Compiles what would be launched, once per kernel and set of constants.

    Args:
        capability: 80 or 90.
    """

    def __init__(self, capability: int) -> None:
        from triton.runtime import driver

        self.capability, self.rows, self.label = capability, [], ""  # type: ignore[var-annotated]
        driver.set_active(Target(capability))

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """In place of `kernel[grid](*arguments, **options)`."""
        began = time.perf_counter()
        built = kernel.warmup(*arguments, grid=grid, **options)
        row = {
            "case": self.label,
            "kernel": kernel.fn.__name__,
            "warps": built.metadata.num_warps,
            "constants": {key: x for key, x in options.items() if key != "num_warps"},
            "shared": built.metadata.shared,
            **resources(built.asm["cubin"]),
        }
        if row not in [{key: x for key, x in known.items() if key != "seconds"} for known in self.rows]:
            row["seconds"] = round(time.perf_counter() - began, 1)
            self.rows.append(row)
            print(json.dumps(row), flush=True)
        if built.metadata.shared > SHARED[self.capability]:
            print(f"{row['kernel']}: more shared memory than a GPU has", file=sys.stderr)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of local memory: stack and spills."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def first_tokens(x: Any) -> Any:
    """What has LENGTH tokens, cut to the few that kernels take one by one."""
    return x[:, :FEW] if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == LENGTH else x


def differentiate(outputs: Any) -> None:
    """Launch the backward pass of all results."""
    leaves: list[Tensor] = []
    waiting = [outputs]
    while waiting:
        x = waiting.pop()
        if isinstance(x, Tensor):
            leaves += [x] * x.requires_grad
        else:
            waiting.extend(x)
    if leaves:
        torch.autograd.backward(leaves, [torch.zeros_like(x) for x in leaves])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="of heads")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--capability", type=int, choices=SHARED, default=90)
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    options = parser.parse_args()
    compiler = Compiler(options.capability)
    for operator in options.operators:
        module, arguments = OPERATORS[operator]
        run = OTHERS.get(operator) or importlib.import_module(f"wkv.ops.gpu.{module}").run
        for size in options.sizes:
            for name in options.types:
                compiler.label = f"{operator} {size} {name}"
                given = arguments(size, getattr(torch, name))
                with gpu.launching(compiler):
                    differentiate(run(*given))
                    with torch.no_grad():
                        run(*given)
                        run(*(first_tokens(x) for x in given))
    if options.out:
        books = evidence(HERE / "compile.py", sys.argv[1:], ("torch", "triton"))
        options.out.write_text(json.dumps({**books, "kernels": compiler.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
