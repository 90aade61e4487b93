"""One sequence on two and three processes against one process. The processes are started once, for all cases."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import wkv
from tests.training.test_segments import (
    B,
    T,
    V,
    batch,
    build,
    carried,
    error,
    gradients,
    leaf,
    one_pass,
    state_values,
)  # fmt: skip
from wkv.errors import WkvError
from wkv.state import State
from wkv.training.segments import SegmentResult
from wkv.training.sequence_parallel import sequence_parallel_backward, sum_gradients

MODELS = wkv.list_models()
BARS = {"float64": 1e-11, "float32": 1e-5}
# Columns of the sequence at which the next process takes over.
CUTS = {2: [0, 8, T], 3: [0, 4, 15, T]}
Case = Callable[[int, int, dist.ProcessGroup], dict[str, float]]


def share(data: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """The columns of one process."""
    columns = slice(*CUTS[size][rank : rank + 2])
    return {key: x[:, columns] for key, x in data.items()}


def compare(found: SegmentResult, found_gradients: list[Tensor], expected: SegmentResult, wanted: list[Tensor]) -> Any:
    return {
        "loss": error([found.loss], [expected.loss]),
        "state": error(state_values(found.state), state_values(expected.state)),
        "gradients": error(found_gradients, wanted),
        "tokens": abs(found.tokens - expected.tokens),
    }


def model_case(name: str, dtype: str, flags: str, row_groups: int, scale: float = 1.0) -> Case:
    """Every gradient, that of the initial state too, in two calls so that gradients must add up."""

    def run(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, float]:
        model, data = build(name, getattr(torch, dtype)), batch(flags)
        state = carried(model)
        expected = one_pass(model, state, **data)
        wanted = [x * 2 * scale for x in gradients(model, state)]
        for _ in range(2):
            found = sequence_parallel_backward(
                model, **share(data, rank, size), row_groups=row_groups, state=state, l2wrap=0.3, group=group,
                backward=lambda loss: (loss * scale).backward(),
            )  # fmt: skip
        sum_gradients(model, group)
        start_gradients = [x.grad for layer in state.layers for x in layer.values()]
        assert rank == 0 or all(x is None for x in start_gradients)
        found_gradients = gradients(model, state)
        if rank:  # only the first process has those of the initial state
            found_gradients, wanted = found_gradients[: -len(start_gradients)], wanted[: -len(start_gradients)]
        return compare(found, found_gradients, expected, wanted)

    return run


def tuned_state_case(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, float]:
    """Frozen weights; the initial state is made from what learns by a graph that can be walked once."""
    model, data = build("rwkv7"), batch("packed")
    model.requires_grad_(False)
    raw = [{key: leaf(x[:1]) for key, x in layer.items()} for layer in carried(model, False).layers]
    tuned = [x for layer in raw for x in layer.values()]

    def made() -> State:
        return State("rwkv7", [{k: (x * x).expand(B, *x.shape[1:]) for k, x in layer.items()} for layer in raw])

    expected = one_pass(model, made(), **data)
    wanted = [torch.zeros_like(x) if x.grad is None else x.grad for x in tuned]
    for x in tuned:
        x.grad = None
    found = sequence_parallel_backward(
        model, **share(data, rank, size), row_groups=3, state=made(), l2wrap=0.3, group=group
    )
    sum_gradients(model, group)
    found_gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in tuned]
    assert rank == 0 or not any(x.any() for x in found_gradients)
    return compare(found, found_gradients if rank == 0 else wanted, expected, wanted)


def refusals_case(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, float]:
    """What one process refuses ends the call on all of them."""
    model, data = build("rwkv7"), share(batch(), rank, size)
    frozen = build("rwkv7")
    frozen.requires_grad_(False)
    last = rank == size - 1
    calls = [
        (model, {**data, "targets": data["targets"][:, :1] if last else data["targets"]},
         "targets must be integers" if last else f"process {size - 1} of the sequence cannot start"),
        (model, {key: x[:2] if last else x for key, x in data.items()}, "all processes need the same rows"),
        (model, {**data, "row_groups": 1 if last else 2}, "all processes need the same rows"),
        (model, {**data, "row_groups": 4}, "in at most as many groups"),
        (frozen, data, "nothing to train" if rank == 0 else "process 0 of the sequence cannot start"),
    ]  # fmt: skip
    for its_model, arguments, message in calls:
        with pytest.raises(WkvError, match=message):
            sequence_parallel_backward(its_model, **arguments, group=group)
    return {"refusals": 0.0}


CASES: dict[str, Case] = {
    **{f"{name}-float64": model_case(name, "float64", "everything", 2) for name in MODELS},
    **{f"{name}-float32": model_case(name, "float32", "everything", 1) for name in ("rwkv4", "rwkv7")},
    "scaled-float64": model_case("rwkv7", "float64", "plain", 3, scale=1024.0),
    "tuned-float64": tuned_state_case,
    "refusals-float64": refusals_case,
}
RUNS = [(3, name) for name in CASES] + [(2, name) for name in CASES if name.startswith(("rwkv7-", "tuned", "refusals"))]


def process(rank: int, folder: str) -> None:
    """One of three processes: all cases on all three, then some on the first two."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    groups = {3: dist.new_group([0, 1, 2]), 2: dist.new_group([0, 1])}
    results = {f"{name}-{size}": CASES[name](rank, size, groups[size]) for size, name in RUNS if rank < size}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """Errors of every case, by process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=3)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize(("size", "case"), RUNS)
def test_equals_one_process(results: Any, size: int, case: str) -> None:
    for rank in range(size):
        found = results[rank][f"{case}-{size}"]
        assert max(found.values()) < BARS[case.rsplit("-", 1)[1]], found


def test_without_processes() -> None:
    data = batch()
    with pytest.raises(WkvError, match="init_process_group first"):
        sequence_parallel_backward(build("rwkv7"), data["inputs"] % V, data["targets"])
