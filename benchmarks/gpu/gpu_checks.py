"""Are the kernels right here? Against the golden vectors of tests/golden, and against the equation in float64.

On a GPU every operator and type is checked in a process of its own, several at a time: nearly all of the time is the
compiler's, and what it makes stays in Triton's cache for the measurements that follow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_operators import Arguments, Case, arguments, by_backend, fla, gradients, ours, unusable
from gpu_timing import Budget, Device, Row, Save, reason_of
from safetensors.torch import load_file
from torch import Tensor

from wkv import ops
from wkv.errors import WkvError

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
CASES = [f"{shape}_{kind}" for shape in ("n64", "n32", "b2") for kind in ("normal", "nostate", "extreme")]
# Relative RMS of y, and of gradients, against float64.
BARS = {"float32": (2e-5, 5e-5), "bfloat16": (5e-3, 1e-2), "float16": (5e-3, 1e-2)}
FLA = "fla"  # in place of a type: only has fla's kernels compiled


def tasks(operators: Sequence[str], with_fla: bool) -> list[tuple[str, str]]:
    """(operator, type), the slowest to compile first."""
    found = [(operator, dtype) for dtype in ("bfloat16", "float32", "float16") for operator in operators]
    timed = [operator for operator in ("wkv7", "wkv6", "taylor_attention") if operator in operators]
    return found + ([(operator, FLA) for operator in timed] if with_fla else [])


def measure(device: Device, budget: Budget, operators: Sequence[str], save: Save, with_fla: bool, script: Path) -> Row:
    """All checks; `script` is what worker processes start, as `python script --worker operator type`."""
    rows: Row = {}
    todo = []
    for operator, dtype in tasks(operators, with_fla and device.is_gpu):
        wanted = device.backend or ("triton" if device.is_gpu else ours(operator, device))
        reason = unusable(operator, wanted, device) if dtype != FLA else None
        if reason is None:
            todo.append((operator, dtype))
        else:
            rows[operator] = {"skipped": f"{wanted}: {reason}"}
    if not device.is_gpu or device.quick:
        for operator, dtype in todo:
            if budget.left() == 0:
                rows[f"{operator} {dtype}"] = {"skipped": "no time left"}
                continue
            rows[f"{operator} {dtype}"] = checked(operator, dtype, device)
            save(rows)
        return rows
    options = ["--backend", device.backend] if device.backend is not None else []
    for name, row in in_processes(todo, budget, script, options):
        rows[name] = row
        save(rows)
    return rows


def in_processes(
    todo: list[tuple[str, str]], budget: Budget, script: Path, options: Sequence[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Results as they come; what is not ready in time is ended and said."""
    waiting, running = list(todo), {}
    # Concurrent tuning would be misled by the other processes: fla is to tune again when it is timed.
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < max(1, (os.cpu_count() or 1) - 1):
                operator, dtype = waiting.pop(0)
                out = Path(folder) / f"{operator}-{dtype}.json"
                command = [sys.executable, str(script), "--worker", operator, dtype, "--out", str(out), *options]
                with out.with_suffix(".txt").open("wb") as said:
                    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
                running[process] = (f"{operator} {dtype}", out)
            for process in [process for process in running if process.poll() is not None]:
                name, out = running.pop(process)
                yield name, answer(out, process.returncode)
            if budget.left() == 0:
                for process, (name, _) in running.items():
                    process.kill()
                    process.wait()
                    yield name, {"skipped": "no time left"}
                yield from ((f"{operator} {dtype}", {"skipped": "no time left"}) for operator, dtype in waiting)
                return
            time.sleep(0.1)


def answer(out: Path, status: int) -> Row:
    """What a process has written, or its last words."""
    if status == 0:
        return json.loads(out.read_text())
    said = out.with_suffix(".txt").read_text(errors="replace").strip().splitlines()
    return {"failed": said[-1] if said else f"the process ended with status {status}"}


def worker(operator: str, dtype: str, device: Device, out: Path) -> None:
    """What a process does."""
    out.write_text(json.dumps(checked(operator, dtype, device)))


def checked(operator: str, dtype: str, device: Device) -> Row:
    """Errors of one operator with inputs of one type, and whether all are within their bars."""
    if dtype == FLA:
        return compiled(operator, device)
    began, errors, failed = time.perf_counter(), [], []
    backend = ours(operator, device)
    checks: list[tuple[str, Callable[[], list[Row]]]] = [
        ("float64", lambda: [against_float64(operator, dtype, backend, device)]),
        ("steps", lambda: list(step_by_step(operator, dtype, backend, device))),
    ]
    if dtype == "float32":
        checks.insert(0, ("golden", lambda: list(against_golden(operator, backend, device))))
    for what, check in checks:
        try:
            errors += check()
        except Exception as error:  # a kernel that does not compile or launch is a result, too
            failed.append(f"{what}: {reason_of(error)}")
    passed = not failed and all(row["error"] <= row["bar"] for row in errors if "error" in row)
    row: Row = {"backend": backend, "passed": passed, "checks": errors, "seconds": time.perf_counter() - began}
    return row | ({"failed": "; ".join(failed)} if failed else {})


def compiled(operator: str, device: Device) -> Row:
    """fla's kernels for the sizes that are timed."""
    heads = 16 if operator == "taylor_attention" else 32
    leaves = arguments(Case(operator, 1, 256, heads, 64), device.torch)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    gradients(fla(operator), leaves, torch.ones_like(leaves["v"]))
    return {"compiled": True}


# ---- against the equation ----


def against_float64(operator: str, dtype: str, backend: str, device: Device) -> Row:
    """Largest relative RMS of y and of the gradients, over the bars: the row's error has the bar 1."""
    length, heads, size = (20, 1, 16) if device.quick else (512, 2, 64)
    case = Case(operator, 2, length, heads, size, getattr(torch, dtype))
    given = {name: x.requires_grad_() for name, x in arguments(case, device.torch, seed=1).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    generator = torch.Generator(device.torch).manual_seed(1)
    dy = torch.randn(given["v"].shape, generator=generator, device=device.torch).to(case.dtype)
    found, expected = (
        both(by_backend(operator, name), leaves, dy) for name, leaves in ((backend, given), ("reference", exact))
    )
    errors = {name: relative_rms(found[name], expected[name]) for name in expected}
    with torch.no_grad():  # may run other kernels, that keep nothing for a backward pass
        errors["y alone"] = relative_rms(by_backend(operator, backend)(given), expected["y"])
    forward, backward = BARS[dtype]
    worst = max(error / (forward if name in ("y", "y alone") else backward) for name, error in errors.items())
    return {"case": f"float64 {case.name}", "error": worst, "bar": 1.0, "rms": errors}


def step_by_step(operator: str, dtype: str, backend: str, device: Device) -> Iterator[Row]:
    """Some tokens one by one, as in decoding, against all at once in float64."""
    if operator == "bi_wkv":
        return
    case = Case(operator, 2, 4, 2, 16 if device.quick else 64, getattr(torch, dtype))
    given, state, outputs = arguments(case, device.torch, seed=2), None, []
    exact = by_backend(operator, "reference")({name: x.double() for name, x in given.items()})
    with torch.no_grad(), ops.use_backend(backend):
        for t in range(case.length):
            token = {name: x[:, t : t + 1] if x.shape[:2] == (2, 4) else x for name, x in given.items()}
            y, state = getattr(ops, operator)(**token, state=state)
            outputs.append(y)
    error = relative_rms(torch.cat(outputs, 1), exact) / BARS[dtype][0]
    yield {"case": f"step by step {case.name}", "error": error, "bar": 1.0}


def both(run: Callable[[Arguments], Tensor], leaves: Arguments, dy: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of every input as "d" + name."""
    y = run(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Not a number counts as infinite."""
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error == error else float("inf")


def largest(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; not a number counts as infinite."""
    expected = expected.double()
    error = ((found.double() - expected).abs().max() / (expected.abs().max() or 1.0)).item()
    return error if error == error else float("inf")


# ---- against the golden vectors ----


def against_golden(operator: str, backend: str, device: Device) -> Iterator[Row]:
    """Every golden case at its float32 bar."""
    if not GOLDEN.is_dir():
        yield {"case": "golden", "skipped": "tests/golden is not beside the script"}
        return
    for name, run, bar in GOLDEN_CASES[operator](device):
        try:
            with ops.use_backend(backend):
                errors = {what: largest(found, expected.to(found.device)) for what, (found, expected) in run().items()}
            yield {"case": f"golden {name}", "error": max(errors.values()), "bar": bar, "errors": errors}
        except WkvError as error:  # sizes that the kernel leaves to other backends
            yield {"case": f"golden {name}", "skipped": str(error)}


Found = dict[str, tuple[Tensor, Tensor]]
Golden = Iterator[tuple[str, Callable[[], Found], float]]


def load(path: str, device: Device) -> dict[str, Tensor]:
    """Tensors of a file, on the device."""
    return {name: x.to(device.torch) for name, x in load_file(GOLDEN / f"{path}.safetensors").items()}


def some(cases: list[str], device: Device) -> list[str]:
    """All, or in a quick run the smallest."""
    return cases[-3:] if device.quick else cases


def grads_of(outputs: list[Tensor], leaves: dict[str, Tensor], given: list[Tensor]) -> dict[str, Tensor]:
    """Gradients as "d" + name."""
    grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def paired(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Found:
    """What is expected, beside what was found."""
    return {name: (found[name], x) for name, x in expected.items() if name in found}


def golden_wkv7(device: Device) -> Golden:
    """States [B, H, N_value, N_key]."""

    def run(case: str) -> Found:
        x, expected = load(f"wkv7/{case}_in", device), load(f"wkv7/{case}_out", device)
        x.setdefault("s0", torch.zeros_like(x["dsT"]))
        leaves = {name: x[name].requires_grad_() for name in ("r", "w_log", "k", "v", "a", "b", "s0")}
        y, final = ops.wkv7(*leaves.values())
        return paired({"y": y, "sT": final, **grads_of([y, final], leaves, [x["dy"], x["dsT"]])}, expected)

    for case in some(CASES, device):
        yield case, lambda case=case: run(case), 5e-6


def golden_linear(operator: str) -> Callable[[Device], Golden]:
    """WKV-5 and 6: the files hold w = log(-log_w), and states [B, H, N_key, N_value]."""

    def run(case: str, device: Device) -> Found:
        x, expected = load(f"{operator}/{case}_in", device), load(f"{operator}/{case}_out", device)
        state = x.get("s0", torch.zeros_like(x["dsT"])).mT.contiguous()
        tensors = {"r": x["r"], "log_w": -x["w"].exp(), "k": x["k"], "v": x["v"], "u": x["u"], "state": state}
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        y, final = getattr(ops, operator)(**leaves)
        found = grads_of([y, final], leaves, [x["dy"], x["dsT"].mT])
        found |= {"y": y, "sT": final.mT, "ds0": found["dstate"].mT, "dw": found["dlog_w"] * leaves["log_w"]}
        return paired(found, expected)

    def cases(device: Device) -> Golden:
        for case in some(CASES, device):
            bar = 5e-6 if operator == "wkv5" else 2e-4 if "extreme" in case else 1e-5
            yield case, lambda case=case: run(case, device), bar

    return cases


def golden_wkv4(device: Device) -> Golden:
    """The file holds w = log(-log_w); the final state is compared as log(den) + max and num / den."""

    def run(case: str) -> Found:
        x = load(f"wkv4/{case}", device)
        tensors = {"log_w": -x["w"].exp(), "u": x["u"], "k": x["k"], "v": x["v"]}
        tensors |= {name: x[name] for name in ("aa0", "bb0", "pp0") if name in x}
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        rest = tuple(leaves.values())
        y, (num, den, top) = ops.wkv4(*rest[:4], rest[4:] or None)
        found = grads_of([y], leaves, [x["dy"]])
        found |= {"y": y, "final_logden": den.log() + top, "final_ratio": num / den}
        found["dw"] = found["dlog_w"] * leaves["log_w"]
        names = [name for name in x if name.startswith(("d", "final", "y")) and name != "dy"]
        return paired(found, {name: x[name] for name in names})

    for case in ("normal", "zerostate", "extreme"):
        yield case, lambda case=case: run(case), 1e-5


def golden_bi_wkv(device: Device) -> Golden:
    """Form "paper"; the file holds w = -log_w."""

    def run(length: int) -> Found:
        x = load("vision_rwkv/bi_wkv_op", device)
        x = {name.split(".", 1)[1]: tensor for name, tensor in x.items() if name.startswith(f"T{length}.")}
        tensors = {"log_w": -x["w"], "u": x["u"], "k": x["k"], "v": x["v"]}
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        y = ops.bi_wkv(*leaves.values())
        found = grads_of([y], leaves, [x["gy"]])
        found = {"y": y, "gw": -found["dlog_w"], "gu": found["du"], "gk": found["dk"], "gv": found["dv"]}
        return {name: (tensor, x[f"paper.{name}"]) for name, tensor in found.items()}

    for length in (20, 49, 70):
        yield f"T{length}", lambda length=length: run(length), 2e-5


def golden_taylor(device: Device) -> Golden:
    """The operator, and a layer around it with its gradients."""

    def operator() -> Found:
        x = load("based/linear_attention", device)
        q, k, v = (x[f"op.{name}"].transpose(1, 2) for name in "qkv")
        return {"y": (ops.taylor_attention(q, k, v, eps=1e-6)[0], x["op.o_norm"].transpose(1, 2))}

    def layer() -> Found:
        x = load("based/linear_attention", device)
        leaves = {name: x[name].requires_grad_() for name in x if name == "x" or name.startswith("param.")}
        heads = x["fmap_in"].shape[1]
        q, k, v = ((x["x"] @ x[f"param.proj_{n}.weight"].mT).unflatten(-1, (heads, -1)) for n in "qkv")
        y = ops.taylor_attention(q, k, v)[0].flatten(2) @ x["param.out_proj.weight"].mT
        found: dict[str, Any] = grads_of([y], leaves, [x["dy"]])
        expected = {f"d{name}": x["dx" if name == "x" else name.replace("param", "grad")] for name in leaves}
        return {"y": (y, x["y_parallel"]), **paired(found, expected)}

    yield "operator", operator, 5e-6
    yield "layer", layer, 5e-6


GOLDEN_CASES: dict[str, Callable[[Device], Golden]] = {
    "wkv7": golden_wkv7,
    "wkv6": golden_linear("wkv6"),
    "wkv5": golden_linear("wkv5"),
    "wkv4": golden_wkv4,
    "bi_wkv": golden_bi_wkv,
    "taylor_attention": golden_taylor,
}
