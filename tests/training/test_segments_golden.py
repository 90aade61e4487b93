"""Segmented training against the reference implementation (tests/golden/state_tuning)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wkv
from tests.training.test_segments import error
from wkv.state import State
from wkv.training.segments import segmented_backward

GOLDEN = Path(__file__).parent.parent / "golden" / "state_tuning"


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_batch(data: dict[str, Tensor]) -> dict[str, Tensor]:
    targets = data["targets"].long()
    return {"inputs": data["idx"], "targets": targets, "loss_mask": targets >= 0}


def test_golden_infctx_states_and_full_loss() -> None:
    model, data = wkv.load_model(GOLDEN / "model_x070.safetensors"), golden("infctx_x070")
    for mode in ("truncated", "exact"):
        result = segmented_backward(model, **golden_batch(data), segment=8, mode=mode)
        assert error([result.loss], [data["loss_full"][0]]) < 1e-6
        for layer, shift, wkv_state in zip(result.state.layers, data["final_shift"], data["final_wkv"], strict=True):
            assert error([layer["att_shift"]], [shift[0]]) < 5e-6
            assert error([layer["ffn_shift"]], [shift[1]]) < 5e-6
            assert error([layer["wkv"]], [wkv_state.mT]) < 5e-6
    with torch.no_grad():
        first = model(data["idx"][:, :8])
        second = model(data["idx"][:, 8:], first.state)
    assert error([torch.cat([first.logits, second.logits], 1)], [data["logits_full"]]) < 5e-6


@pytest.mark.parametrize(("kind", "options"), [
    ("detach", {"mode": "truncated"}), ("bptt", {"mode": "exact"}), ("bptt", {"mode": "truncated", "through": 2}),
])  # fmt: skip
def test_golden_infctx_gradients(kind: str, options: dict[str, Any]) -> None:
    model, data = wkv.load_model(GOLDEN / "model_x070.safetensors"), golden("infctx_x070")
    result = segmented_backward(model, **golden_batch(data), segment=8, l2wrap=0.0, reference_weighting=True, **options)
    assert error([result.loss], [data["loss_2chunk"][0]]) < 1e-6
    wanted = {key.removeprefix(f"grad_{kind}."): x for key, x in data.items() if key.startswith(f"grad_{kind}.")}
    assert len(wanted) == 4
    for key, expected in wanted.items():
        assert error([model.get_parameter(key).grad], [expected]) < 1e-5


@pytest.mark.parametrize("segment", [3, 8, 16])
def test_golden_gradients_of_initial_states(segment: int) -> None:
    model, data = wkv.load_model(GOLDEN / "model_x070.safetensors"), golden("state_x070")
    model.requires_grad_(False)
    names = [f"blocks.{i}.att.time_state" for i in range(3)]
    starts = [data[f"s0.{name}"].clone().requires_grad_() for name in names]
    found = {}
    for l2wrap in (0.0, 1e-4):
        layers = model.init_state(2).layers
        for layer, start in zip(layers, starts, strict=True):
            layer["wkv"] = start.expand(2, *start.shape)
        state = State("rwkv7", layers)
        result = segmented_backward(
            model, **golden_batch(data), segment=segment, mode="exact", state=state, l2wrap=l2wrap
        )
        assert error([result.loss], [data["loss"][0]]) < 1e-6
        found[l2wrap] = [x.grad for x in starts]
        for x in starts:
            x.grad = None
    for i, name in enumerate(names):
        plain, wrapped = data[f"grad.{name}"], data[f"grad_l2wrap.{name}"]
        assert error([found[0.0][i]], [plain]) < 1e-5
        assert error([found[1e-4][i] - found[0.0][i]], [wrapped - plain]) < 2e-2
