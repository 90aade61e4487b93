"""Operators of run.py: inputs like a model's, who computes them, their times, and how fast WKV-7 could be at best.

The roofline of WKV-7, forward and backward. Let E = B T H N be the entries of one input, s the bytes of an entry.

    Bytes: the forward pass reads r, log_w, k, v, a, b and writes y: 7 E. The backward pass reads the six inputs and dy
    and writes six gradients: 13 E. Together 20 E s; nothing that lives between the two passes is counted.

    FLOPs: for a chunk of L tokens of a head, with tiles computed whole,
        r and a times k and b, four products                    8 L^2 N
        the triangular inverse of [L, L] by substitution        2/3 L^3
        a k^T times v, and the inverse times the right side     4 L^2 N
        r k^T times v and r b^T times u                         4 L^2 N
        a and r times the state, and its update by k and b      8 L N^2
    so a token costs F = 16 L N + 8 N^2 + 2/3 L^2. Every product has two products of its size in the backward pass,
    which gives 3 F B T H. L = 16, the smallest tile of the tensor cores, makes the least of it, and recomputing what
    was not saved is not counted either.

The time at best is the larger of bytes over the copy bandwidth and FLOPs over the bfloat16 rate, both as measured on
this device. The share reached is that time over ours. No kernel reaches 1: states at the starts of chunks have to be
written and read between passes, and products of small tiles do not run at the rate of large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Budget, Device, Row, Save, halved, reason_of, turns
from torch import Tensor

from wkv import ops
from wkv.ops import dispatch

FLA_HINT = "not installed: pip install --no-deps fla-core==0.6.0 einops"
LOWEST_LOG_DECAY = -0.60654  # of RWKV-7
CHUNK = 16
WORKING_COPIES = 60  # float32 tensors of the size of an input that the torch form may need at once
Arguments = dict[str, Tensor]
Run = Callable[[Arguments], Tensor]


@dataclass(frozen=True)
class Case:
    """One operator at one size; heads and size are channels alone for `wkv4` and `bi_wkv`."""

    operator: str
    batch: int
    length: int
    heads: int
    size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """As in tables."""
        sizes = f"B{self.batch} T{self.length} H{self.heads} N{self.size}"
        return f"{self.operator} {sizes} {str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case("wkv7", 8, 4096, 32, 64),
    Case("wkv6", 8, 2048, 32, 64),
    Case("wkv5", 8, 2048, 32, 64),
    Case("wkv4", 8, 2048, 32, 64),
    Case("bi_wkv", 32, 1024, 12, 64),
    Case("taylor_attention", 8, 2048, 16, 64),
]
OPERATORS = [case.operator for case in CASES]


def quick_cases() -> list[Case]:
    """Tiny ones."""
    return [Case(operator, 1, 20, 1, 16, torch.float32) for operator in OPERATORS]


# ---- inputs ----


def arguments(case: Case, device: torch.device, seed: int = 0) -> Arguments:
    """The operator's tensors by the names of its parameters, as a model makes them."""
    g = torch.Generator(device).manual_seed(seed)
    shape = (case.batch, case.length, case.heads, case.size)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, device=device)

    if case.operator == "wkv7":
        kk = F.normalize(normal(*shape), dim=-1)
        iclr = torch.sigmoid(normal(*shape))
        log_w = LOWEST_LOG_DECAY * torch.sigmoid(2 * normal(*shape))
        found = {"r": normal(*shape), "log_w": log_w, "k": normal(*shape), "v": normal(*shape)}
        found |= {"a": -kk, "b": kk * iclr}
    elif case.operator in ("wkv5", "wkv6"):
        log_w = -torch.exp(normal(*(shape if case.operator == "wkv6" else shape[2:])) - 2)
        found = {"r": normal(*shape), "log_w": log_w, "k": normal(*shape), "v": normal(*shape)}
        found["u"] = normal(*shape[2:])
    elif case.operator in ("wkv4", "bi_wkv"):
        channels = case.heads * case.size
        log_w = -torch.rand(channels, generator=g, device=device)
        log_w = log_w if case.operator == "wkv4" else 5 * log_w / case.length
        k, v = (normal(case.batch, case.length, channels) for _ in range(2))
        found = {"log_w": log_w, "u": normal(channels), "k": k, "v": v}
    else:
        q, k = (normal(*shape[:3], 16) for _ in range(2))
        found = {"q": q, "k": k, "v": normal(*shape)}
    return {name: x.to(case.dtype) for name, x in found.items()}


def gradients(run: Run, leaves: Arguments, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(run(leaves), list(leaves.values()), dy)


# ---- contenders ----


def by_backend(operator: str, backend: str) -> Run:
    """Our operator, in one backend."""

    def run(x: Arguments) -> Tensor:
        with ops.use_backend(backend):
            found: Any = getattr(ops, operator)(**x)
        return found if isinstance(found, Tensor) else found[0]

    return run


def unusable(operator: str, backend: str, device: Device) -> str | None:
    """Why a backend cannot run; None where it can."""
    [reason] = [status.reason for status in dispatch.backends(operator, device.torch) if status.name == backend]
    return reason or None


def ours(operator: str, device: Device) -> str:
    """The backend that stands for us, see `Device`; where the Triton kernel cannot run, what would run."""
    wanted = device.backend or ("triton" if device.is_gpu else None)
    if wanted is not None and unusable(operator, wanted, device) is None:
        return wanted
    return dispatch.would_run(operator, device.torch)


def plain(operator: str, device: Device) -> str:
    """The backend in plain torch."""
    return "chunked" if unusable(operator, "chunked", device) is None else "reference"


def fla(operator: str) -> Run:
    """The operator of the `fla-core` package.

    Raises:
        ImportError: where the package is missing.
        LookupError: if it has no such operator.
    """
    try:
        import fla.ops  # noqa: F401
    except ImportError as error:
        raise ImportError(FLA_HINT) from error
    if operator == "wkv7":
        return fla_wkv7
    if operator in ("wkv5", "wkv6"):
        return fla_wkv6
    if operator == "wkv4":
        return fla_wkv4
    if operator == "taylor_attention":
        return fla_taylor
    raise LookupError(f"fla has no {operator}")


def fla_wkv7(x: Arguments) -> Tensor:
    """Told the lowest decay, which lets it use its fastest form."""
    from fla.ops.rwkv7 import chunk_rwkv7

    return chunk_rwkv7(x["r"], x["log_w"], x["k"], x["v"], x["a"], x["b"], lower_bound=LOWEST_LOG_DECAY)[0]


def fla_wkv6(x: Arguments) -> Tensor:
    """WKV-5 as WKV-6 with repeated decays: fla has no kernel of its own for it."""
    from fla.ops.rwkv6 import chunk_rwkv6

    log_w = x["log_w"].expand_as(x["r"]).contiguous()
    return chunk_rwkv6(x["r"], x["k"], x["v"], log_w, x["u"], scale=1.0)[0]


def fla_wkv4(x: Arguments) -> Tensor:
    """Token by token; it takes the logarithm of the negative log-decay."""
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    k = x["k"]
    state = k.new_zeros(k.shape[0], 3, 1, k.shape[2], dtype=torch.float32)
    state[:, 2] = -1e30
    return fused_recurrent_rwkv4((-x["log_w"].float()).log(), x["u"], k, x["v"], state)[0]


def fla_taylor(x: Arguments) -> Tensor:
    """The fused chunked form of BASED."""
    from fla.ops.based import fused_chunk_based

    return fused_chunk_based(x["q"], x["k"], x["v"])


def contenders(operator: str, device: Device) -> tuple[dict[str, Run], dict[str, str]]:
    """Who computes the operator here, and who does not with the reason."""
    runs, skipped = {"ours": by_backend(operator, ours(operator, device))}, {}
    try:
        if not device.is_gpu:
            raise LookupError("fla runs on GPUs only")
        runs["fla"] = fla(operator)
    except Exception as error:  # an import of a foreign library may raise anything
        skipped["fla"] = str(error) if isinstance(error, ImportError | LookupError) else reason_of(error)
    runs["torch"] = by_backend(operator, plain(operator, device))
    return runs, skipped


# ---- times ----


def measure(device: Device, budget: Budget, limits: Row | None, operators: Sequence[str], save: Save) -> Row:
    """Forward, and forward + backward, of every case."""
    rows: Row = {}
    for case in quick_cases() if device.quick else CASES:
        if case.operator not in operators:
            continue
        if budget.left() == 0:
            rows[case.name] = {"skipped": "no time left"}
            continue
        per_row = case.length * case.heads * case.size * 4 * WORKING_COPIES
        batch = halved(case.batch, per_row, device.free_bytes())
        case = Case(case.operator, batch, case.length, case.heads, case.size, case.dtype)
        rows[case.name] = measure_case(case, device, budget, limits)
        save(rows)
        device.clear()
    return rows


def measure_case(case: Case, device: Device, budget: Budget, limits: Row | None) -> Row:
    """One operator at one size."""
    runs, skipped = contenders(case.operator, device)
    row: Row = {
        "backends": {"ours": ours(case.operator, device), "torch": plain(case.operator, device)},
        "skipped": skipped,
    }
    leaves = {name: x.requires_grad_() for name, x in arguments(case, device.torch).items()}
    inputs = {name: x.detach() for name, x in leaves.items()}
    dy = torch.randn_like(inputs["v"])

    def forward(run: Run) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return run(inputs)

        return call

    row["differences"] = differences(runs, inputs)
    row["forward"] = turns(device, {name: forward(run) for name, run in runs.items()}, budget)
    both = {name: (lambda run=run: gradients(run, leaves, dy)) for name, run in runs.items()}
    row["forward_backward"] = turns(device, both, budget)
    if "ours" in row["forward_backward"]["ms"]:
        row["peak_bytes_beside_inputs"] = peak(device, runs, leaves, dy)
        if case.operator == "wkv7" and limits is not None:
            row["roofline"] = roofline(case, limits, row["forward_backward"]["ms"]["ours"]["median"] / 1e3)
    return row


def differences(runs: dict[str, Run], inputs: Arguments) -> Row:
    """Relative RMS between y of each contender and y of the torch form: that all compute the same thing."""
    with torch.no_grad():
        expected = runs["torch"](inputs).float()
        found = {}
        for name, run in runs.items():
            if name == "torch":
                continue
            try:
                found[name] = ((run(inputs).float() - expected).norm() / expected.norm()).item()
            except Exception as error:  # said here, and dropped when its time would be taken
                found[name] = reason_of(error)
    return found


def peak(device: Device, runs: dict[str, Run], leaves: Arguments, dy: Tensor) -> Row:
    """Peak memory of forward + backward, inputs and dy not counted."""
    if not device.is_gpu:
        return {}
    found = {}
    for name, run in runs.items():
        device.clear()
        before = torch.cuda.memory_allocated()
        try:
            found[name] = (device.peak_bytes(lambda run=run: gradients(run, leaves, dy)) or 0) - before
        except Exception as error:
            found[name] = reason_of(error)
    return found


def roofline(case: Case, limits: Row, seconds: float) -> Row:
    """See the head of this file."""
    entries = case.batch * case.length * case.heads * case.size
    moved = 20 * entries * torch.finfo(case.dtype).bits // 8
    per_token = 16 * CHUNK * case.size + 8 * case.size**2 + 2 * CHUNK**2 / 3
    flops = 3 * per_token * case.batch * case.length * case.heads
    by_bytes, by_flops = moved / limits["bytes_per_second"], flops / limits["flops_per_second"]
    best = max(by_bytes, by_flops)
    return {
        "bytes": moved,
        "flops": flops,
        "seconds_by_bytes": by_bytes,
        "seconds_by_flops": by_flops,
        "bound_by": "bytes" if by_bytes >= by_flops else "flops",
        "share": best / seconds,
    }
